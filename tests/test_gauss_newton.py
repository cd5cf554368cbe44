"""The implicit solver: exact where it can be checked, and at horizons where nothing else goes."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.polynomial import legendre
from scipy.integrate import solve_ivp

import gflow
from gflow.dynamics.radau import ending, gram as radau_gram, jacobian, newton, part, spectral
from gflow.dynamics.radau.gram import Gram
from gflow.dynamics.radau.spectral import NEGLIGIBLE, SINGLE, Spectral, Systems
from gflow.dynamics.radau.stages import Balance
from gflow.dynamics.radau.tableau import left_of_residuals, radau
from gflow.problem.design import Products

# The error of a whole run at step tolerance 1e-8: the requirement is eight correct digits.
EIGHT_DIGITS = 1e-8
# What a long run may lose of the conserved matrices, relative to the squared norm.
DRIFT = 1e-12


def points(n=40, d=2, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, d))
    inputs += 0.3 * np.sign(inputs[:, :1])
    return gflow.Dataset(inputs / 3, np.sign(inputs[:, 0]))


def start(widths=(2, 6, 6, 1), seed=1):
    return gflow.init.gaussian(widths, seed=seed)


def state(weights):
    return gflow.FlowState(tuple(jnp.asarray(w) for w in weights), jnp.zeros(()))


def beginning(field, weights):
    return jnp.asarray(field.clock.read(float(field.problem.log_risk(weights)), -np.inf))


@jax.jit
def solve(field, y0, times, solver, rtol=1e-8):
    """States at ``times``, by diffrax alone, with steps that end there."""
    control = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=rtol, atol=rtol), step_ts=times
    )
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        times[0],
        times[-1],
        1e-3,
        y0,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=control,
        max_steps=4096,
    )


def explicitly(field, y0, times, rtol):
    """The state at the end, by SciPy: of the field it is one small program to compile."""
    flat, state_of = ravel_pytree(y0)
    slope = jax.jit(lambda s, y: ravel_pytree(field(s, state_of(y), None))[0])
    found = solve_ivp(
        lambda s, y: np.asarray(slope(s, y)), times, flat, "DOP853", rtol=rtol, atol=rtol
    )
    return state_of(found.y[:, -1])


def imbalance_is_conserved(solution, to=DRIFT):
    def kept(lower, upper):
        imbalance = np.swapaxes(upper, 1, 2) @ upper - lower @ np.swapaxes(lower, 1, 2)
        drift = np.abs(imbalance - imbalance[0]).max(axis=(1, 2))
        return np.all(drift <= to * np.maximum(1, np.sum(lower**2, axis=(1, 2))))

    weights = [np.asarray(w) for w in solution.ys.weights]
    return all(kept(*pair) for pair in itertools.pairwise(weights))


def walk(field, weights, step, number, solver):
    """Steps of equal length made by hand; differentiable if their number is a Python integer."""
    term = diffrax.ODETerm(field)
    y = gflow.FlowState(weights, jnp.zeros(()))
    s = beginning_of(field, weights)

    def one(_, carried):
        s, y, _, carry = carried
        y, error, _, carry, _ = solver.step(term, s, s + step, y, None, carry, jnp.array(False))
        return s + step, y, error, carry

    start = (s, y, y, solver.init(term, s, s + step, y, None))
    return jax.lax.fori_loop(0, number, one, start)[1:]


walked = jax.jit(walk)


def beginning_of(field, weights):
    return jnp.arcsinh(-field.problem.log_risk(weights))


@pytest.fixture(scope="module")
def field():
    return gflow.FlowField(gflow.Problem(points()), gflow.clocks.LogRisk())


@pytest.fixture(scope="module")
def long_run(field):
    weights = start()
    times = jnp.concatenate(
        [beginning(field, weights)[None], jnp.arcsinh(jnp.array([1e2, 1e6, 1e9, 1e13]))]
    )
    return times, solve(field, state(weights), times, gflow.GaussNewton(), rtol=EIGHT_DIGITS / 10)


def test_radau_quadrature_has_order_2p_minus_1_and_integrates_its_interpolants():
    for p in (3, 5, 7):
        tableau = radau(p)
        powers = np.arange(2 * p - 1)
        exact = 1 / (powers + 1)
        np.testing.assert_allclose(
            tableau.matrix[-1] @ tableau.nodes[:, None] ** powers, exact, rtol=1e-13
        )
        low = powers[:p]
        np.testing.assert_allclose(
            tableau.matrix @ tableau.nodes[:, None] ** low,
            tableau.nodes[:, None] ** (low + 1) / (low + 1),
            atol=1e-14,
        )


def test_agrees_with_an_explicit_solver_where_that_is_possible(field, long_run):
    times, solution = long_run
    explicit = explicitly(field, state(start()), times[:2], 1e-12)
    for ours, theirs in zip(solution.ys.weights, explicit.weights, strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=0, atol=EIGHT_DIGITS)
    np.testing.assert_allclose(
        solution.ys.scaled_time[1], explicit.scaled_time, rtol=0, atol=EIGHT_DIGITS
    )


@pytest.mark.parametrize("linear", [False, True])
def test_whole_vectors_agree_with_an_integrator_of_the_written_out_gradient(linear):
    # Arrays that are zero at the start, and stay zero as far as a first step knows, are among them.
    rng, (num, dim, classes) = np.random.default_rng(3), (25, 4, 3)
    x, labels = rng.normal(size=(num, dim)), np.arange(num) % classes
    if linear:
        forward = lambda w, x: w[1] @ (w[0] @ x)  # noqa: E731
        network, begin = gflow.DeepLinear(), (np.zeros((4, dim)), rng.normal(size=(classes, 4)))
    else:
        forward = lambda w, x: w["out"] @ jnp.tanh(w["in"] @ x + w["b"]) + w["c"]  # noqa: E731
        network, begin = gflow.Network(forward), {"in": rng.normal(size=(5, dim)) / 2}
        begin |= {"out": np.zeros((classes, 5)), "b": np.zeros(5), "c": np.zeros(classes)}
    assert network.no_vectors(begin).are_whole
    problem = gflow.Problem(gflow.Dataset(x, labels, num_classes=classes), network=network)
    flow = gflow.gradient_flow(
        problem, begin, until=gflow.LogTime(2.0), save=3, solver=gflow.GaussNewton(), progress=False
    )
    flat, shaped = ravel_pytree(jax.tree.map(jnp.asarray, begin))

    @jax.jit
    @jax.value_and_grad
    def loss(flat):
        outputs = jax.vmap(lambda x: forward(shaped(flat), x))(jnp.asarray(x))
        own = jnp.take_along_axis(outputs, jnp.asarray(labels)[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(outputs, axis=1) - own)

    times = np.exp(flow.log_time.values)
    slope = lambda _, v: -np.asarray(loss(v)[1])  # noqa: E731
    tight = {"rtol": 1e-11, "atol": 1e-13, "t_eval": times}
    found = solve_ivp(slope, (0, times[-1]), np.asarray(flat), "DOP853", **tight)
    theirs = [np.log(loss(jnp.asarray(v))[0]) for v in found.y.T]
    np.testing.assert_allclose(flow.log_risk.values, theirs, rtol=0, atol=1e-9)


def test_reaches_any_horizon_in_few_steps(long_run):
    # 13 decades of log R, 30 units of the clock; an explicit solver needs 1e13 steps.
    _, solution = long_run
    assert solution.stats["num_steps"] < 200


def test_the_clock_shows_the_risk_to_eight_digits(field, long_run):
    times, solution = long_run
    log_risk = jax.vmap(field.problem.log_risk)(solution.ys.weights)
    np.testing.assert_allclose(-log_risk, jnp.sinh(times), rtol=EIGHT_DIGITS)


def test_imbalance_is_conserved_by_the_flow(long_run):
    _, solution = long_run
    assert imbalance_is_conserved(solution)


def test_the_limits_are_the_max_margin_solution_and_rank_one(field, long_run):
    _, solution = long_run
    weights = [np.asarray(w[-1]) for w in solution.ys.weights]
    direction = np.linalg.multi_dot(weights[::-1])[0]
    direction /= np.linalg.norm(direction)
    # The direction converges like 1/log R, here 1e-13, up to rounding.
    np.testing.assert_allclose(direction, field.problem.data.max_margin().direction, atol=1e-10)
    for w in weights:
        values = np.linalg.svd(w, compute_uv=False)
        assert np.all(values[1:] < 1e-3 * values[0])


@pytest.mark.parametrize(
    ("loss", "clock", "data", "end"),
    [
        (gflow.Exponential(), gflow.clocks.LogTime(), points(), 12.0),
        (gflow.PolynomialTail(2.0), gflow.clocks.Time(), points(n=4, d=9), 50.0),
        (gflow.Logistic(), gflow.clocks.Risk(), points(n=4, d=9), 20.0),
    ],
)
def test_every_clock_and_loss_agrees_with_an_explicit_solver(loss, clock, data, end):
    field = gflow.FlowField(gflow.Problem(data, loss=loss), clock)
    weights = start((data.dim, 5, 1))
    weights = (0 * weights[0], weights[1])  # a first layer that starts at zero
    times = jnp.stack([beginning(field, weights), jnp.asarray(end)])
    ours = solve(field, state(weights), times, gflow.GaussNewton())
    theirs = explicitly(field, state(weights), times, 1e-11)
    for a, b in zip(jax.tree.leaves(ours.ys), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a[-1], b, rtol=10 * EIGHT_DIGITS, atol=EIGHT_DIGITS)


def test_a_network_written_as_a_function_takes_the_same_steps_as_its_deep_linear_form(field):
    def apply(weights, x):
        for matrix in weights:
            x = matrix @ x
        return x[0]

    problem = gflow.Problem(field.problem.data, network=gflow.Network(apply))
    general = gflow.FlowField(problem, field.clock)
    weights = state(start()).weights
    ours, _, _ = walked(general, weights, 0.05, 4, gflow.GaussNewton())
    deep, _, _ = walked(field, weights, 0.05, 4, gflow.GaussNewton())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(deep), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("large", [jacobian.LARGE[True], 1])
def test_sharing_one_jacobian_among_the_stages_changes_nothing(large, field, monkeypatch):
    weights = state(start()).weights
    separate, _, _ = walked(field, weights, 0.05, 4, gflow.GaussNewton())
    monkeypatch.setattr(newton, "DIRECT", 0)
    monkeypatch.setattr(jacobian, "LARGE", {True: large})
    shared, _, _ = jax.jit(lambda *a: walk(*a))(field, weights, 0.05, 4, gflow.GaussNewton())
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(separate), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("negligible", [0.0, 1.0])
def test_large_systems_are_solved_in_all_coordinates_or_in_the_few_margins_that_matter(
    negligible, num_outputs, monkeypatch
):
    monkeypatch.setattr(radau_gram, "FACTORED", 1)
    monkeypatch.setattr(spectral, "few", lambda order: [order // 3, order // 2])  # 4 fit, and fill
    rng, order, num = np.random.default_rng(0), 12, 30
    slopes = np.full(num, NEGLIGIBLE * negligible)
    slopes[[3, 7, 20, 21]] = [1.0, 0.5, -0.3, 0.1]
    if negligible == 0.0:
        slopes += 2 * NEGLIGIBLE  # too many of them
    count = order // num_outputs
    left, right = rng.normal(size=(num, num_outputs)), rng.normal(size=(num, count))
    design = (left[:, :, None] * right[:, None, :]).reshape(num, order)
    lefts = [jnp.asarray(rng.normal(size=(num_outputs, 5))) for _ in range(2)]
    columns = [jnp.asarray(rng.normal(size=(count, 20))) for _ in range(2)]
    # The Gram matrix of pullbacks, in factors if there are several outputs.
    pulled = [np.kron(a, b) for a, b in zip(lefts, columns, strict=True)]
    gram = sum(a @ a.T for a in pulled)
    assert len(Gram.of(lefts, columns).inputs) == (2 if num_outputs > 1 else 1)
    curvature = np.diag(np.where(np.abs(slopes) > 1.5 * NEGLIGIBLE, 7.0, 0.0))
    stiffness = design.T @ curvature @ design
    h, rhs, tableau = jnp.asarray(0.3), rng.normal(size=(5, order)), radau(5)
    all_rows = Products(jnp.asarray(left), jnp.asarray(right))

    @jax.jit
    def solve(lefts, columns, slopes, rhs):
        gram, twice, thrice = (Gram.of([r * a for a in lefts], columns) for r in (1, 2, 3**0.5))
        systems = Systems.blank(gram, all_rows.among(jnp.zeros(order // 2, int))).decomposed(
            gram,
            slopes,
            True,
            lambda dtype: jnp.asarray(stiffness, dtype),
            lambda chosen: (all_rows.among(chosen), 7.0 * jnp.eye(len(chosen))),
            jnp.asarray(1.0),
            h,
        )
        # Twice in a row: what G has grown by since it was decomposed adds up.
        kept = systems.rescaled(twice, jnp.asarray(0.5)).rescaled(thrice, jnp.asarray(2.0))

        def solutions(systems, gram):
            damped = systems.damped(jnp.asarray(0.2), rhs[0])
            return *systems.solve(tableau, h, gram, rhs), damped

        return systems.few, solutions(systems, gram), solutions(kept, thrice)

    few, first, later = solve(lefts, columns, slopes, rhs)
    assert few == (negligible == 1.0)
    for (y, forces, damped), g, t in ((first, gram, stiffness), (later, 3 * gram, 2 * stiffness)):
        system = np.eye(5 * order) + h * np.kron(tableau.matrix, g @ t)
        expected = np.linalg.solve(system, rhs.ravel()).reshape(5, order)
        np.testing.assert_allclose(y, expected, atol=1e-10)
        np.testing.assert_allclose(forces, expected @ t, rtol=1e-9, atol=1e-9)
        expected = t @ np.linalg.solve(np.eye(order) + 0.2 * g @ t, rhs[0])
        np.testing.assert_allclose(damped, expected, rtol=1e-9, atol=1e-9)


def test_systems_of_many_unknowns_are_decomposed_in_single_precision_where_that_does():
    order, rng, tableau = SINGLE + 10, np.random.default_rng(0), radau(5)
    root, other = rng.normal(size=(2, order, order)) / np.sqrt(order)
    gram, stiffness = root @ root.T + np.eye(order), other @ other.T
    rhs, h = rng.normal(size=(5, order)), jnp.asarray(0.5)

    @jax.jit
    def solve(scale):
        size = jnp.max(jnp.diag(gram))

        def unit(dtype):
            return jnp.asarray(gram / size, dtype)

        def known(dtype):
            return jnp.asarray(stiffness, dtype)

        found = Spectral.of(unit, known, size, scale, h, order)
        return found.solve(tableau, h, rhs) @ found.into @ gram

    def error(scale):
        system = np.eye(5 * order) + 0.5 * scale * np.kron(tableau.matrix, gram @ stiffness)
        expected = np.linalg.solve(system, rhs.ravel()).reshape(5, order)
        return np.linalg.norm(solve(jnp.asarray(scale)) - expected) / np.linalg.norm(expected)

    assert 1e-9 < error(1.0) < 1e-3
    assert error(1e5) < 1e-9  # the trace of hGS is above SINGLE_TRACE


def test_a_long_run_of_six_stages_in_single_precision_has_the_same_digits(
    field, long_run, monkeypatch
):
    precisions, decompose = set(), Spectral._of

    def seen(gram, stiffness, ridge):
        precisions.add(str(gram.dtype))
        return decompose(gram, stiffness, ridge)

    monkeypatch.setattr(newton, "DIRECT", 0)
    monkeypatch.setattr(jacobian, "LARGE", {True: 1})
    monkeypatch.setattr(spectral, "SINGLE", 1)
    monkeypatch.setattr(Spectral, "_of", seen)
    times, expected = long_run
    follow = jax.jit(lambda *a: solve.__wrapped__(*a))
    found = follow(field, state(start()), times[:3], gflow.GaussNewton(stages=6))
    assert precisions == {"float32", "float64"}  # the second where the first does not do
    assert imbalance_is_conserved(found, to=1e-9)  # corrections of small systems stagnate
    for a, b in zip(jax.tree.leaves(found.ys), jax.tree.leaves(expected.ys), strict=True):
        np.testing.assert_allclose(a, b[:3], rtol=10 * EIGHT_DIGITS, atol=10 * EIGHT_DIGITS)


def test_margins_below_round_off_are_left_out_of_a_step_and_no_others(field, long_run, monkeypatch):
    late = tuple(w[2] for w in long_run[1].ys.weights)
    cases = {
        "late": late,
        "early": tuple(0.8 * w[1] for w in long_run[1].ys.weights),  # log R near -50
        "start": state(start()).weights,
    }

    def compiled(**constants):
        """Two steps, with constants of the module that are read while they are traced."""
        for name, value in constants.items():
            monkeypatch.setattr(part, name, value)
        program = jax.jit(lambda *a: walk(*a))

        def steps(weights):
            found, _, solution = program(field, weights, 0.05, 2, gflow.GaussNewton())
            log_risk = field.problem.log_risk(found.weights)
            return found.weights, part.Part.of(field, log_risk, solution.offsets)

        return steps

    steps = compiled()
    whole = {name: steps(cases[name]) for name in ("late", "early")}
    assert all(chosen is None for _, chosen in whole.values())
    steps = compiled(LEAST=1, PART=4)
    found, chosen = steps(late)
    assert chosen.enough and len(chosen.margins) == 10
    for a, b in zip(found, whole["late"][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    # Where the prediction is wrong, what is seen at the stages decides; before all margins are
    # large the loss is no sum of exponentials.
    found, chosen = compiled(PREDICTED=np.inf)(cases["early"])
    assert chosen.enough
    for a, b in zip(found, whole["early"][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    steps = compiled(ROUND_OFF=np.inf, PART=16)
    found, _ = steps(cases["early"])
    assert not np.allclose(found[0], whole["early"][0][0], rtol=1e-6)
    _, chosen = steps(cases["start"])
    assert not chosen.enough


def test_order_of_convergence_is_2p_minus_1(field, long_run):
    weights = tuple(w[1] for w in long_run[1].ys.weights)  # log R = -100, already stiff

    def end(number, stages):
        y, error, _ = walked(field, weights, 1.2 / number, number, gflow.GaussNewton(stages=stages))
        assert np.isfinite(error.scaled_time)
        return y.weights

    exact = end(12, 7)
    errors = [
        max(float(jnp.abs(a - b).max()) for a, b in zip(end(n, 3), exact, strict=True))
        for n in (6, 12)
    ]
    order = np.log2(errors[0] / errors[1])
    assert 4.5 < order < 5.5


def test_forward_and_reverse_derivatives_agree_with_differences(field):
    weights = state(start((2, 3, 1))).weights
    direction = jax.tree.map(lambda w: jnp.cos(jnp.arange(1.0 * w.size)).reshape(w.shape), weights)

    def outcome(weights):
        y, _, _ = walk(field, weights, 0.05, 2, gflow.GaussNewton(stages=3))
        return jnp.sum(y.weights[0] ** 2) + jnp.log(y.scaled_time)

    def along(size):
        return jax.tree.map(lambda w, d: w + size * d, weights, direction)

    @jax.jit
    def both(weights):
        value, forward = jax.linearize(outcome, weights)
        (gradient,) = jax.linear_transpose(forward, weights)(jnp.ones(()))
        return value, forward(direction), gradient

    size = 1e-4  # the error of the central difference is then about its square
    above, below = (both(along(step))[0] for step in (size, -size))
    difference = (above - below) / (2 * size)
    _, forward, gradient = both(weights)
    reverse = sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(forward, difference, rtol=1e-6)
    np.testing.assert_allclose(reverse, forward, rtol=1e-9)


def test_vmap_over_starts_equals_the_loop(field):
    starts = [state(start(seed=seed)).weights for seed in range(3)]
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *starts)
    together = jax.jit(jax.vmap(lambda w: walk(field, w, 0.05, 4, gflow.GaussNewton())[0]))(stacked)
    for index, weights in enumerate(starts):
        alone, _, _ = walked(field, weights, 0.05, 4, gflow.GaussNewton())
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-11, atol=1e-12)


def test_a_step_that_newton_cannot_solve_is_rejected_and_leaves_the_state_alone(field):
    weights = state(start()).weights
    y, error, carry = walked(field, weights, 40.0, 1, gflow.GaussNewton())
    assert all(bool(jnp.all(jnp.isinf(leaf))) for leaf in jax.tree.leaves(error))
    for a, b in zip(y.weights, weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert carry.num_iterations <= gflow.GaussNewton().max_iterations


@pytest.mark.parametrize("stages", [5, 6])
def test_a_long_step_does_not_lead_time_backwards(stages):
    # r' = -r: over h = 50 the risk falls by exp(100), and u = tR with it, below any error of u.
    field = gflow.FlowField(gflow.Problem(gflow.Regression([[1.0]], [1.0])), gflow.clocks.Time())
    term, solver = diffrax.ODETerm(field), gflow.GaussNewton(stages=stages)
    weights, t0, t1 = (jnp.array([[0.5]]),), jnp.array(1.0), jnp.array(51.0)
    before = gflow.FlowState(weights, jnp.exp(field.problem.log_risk(weights)))
    carry = solver.init(term, t0, t1, before, None)
    after, *_ = solver.step(term, t0, t1, before, None, carry, jnp.array(False))
    fallen = jnp.exp(field.problem.log_risk(after.weights))
    assert 0 < fallen < before.scaled_time and after.scaled_time >= fallen


@pytest.mark.parametrize(("of_weights", "rate"), [(1e-3, 0.1), (0.5, 0.5), (2.0, 1.0)])
def test_a_coefficient_of_time_that_passes_through_zero_is_not_its_rate(field, of_weights, rate):
    # u' of size 10^-k in the k-th Legendre polynomial, but for the one before the last.
    p, h, nothing = 6, 0.5, jnp.zeros(6)
    coefficients = np.array([1.0, 1e-1, 1e-2, 1e-3, 0.0, 1e-5])
    slopes = jnp.asarray(np.linalg.solve(radau(p).legendre, coefficients))
    weights = state(start()).weights
    at = Balance(log_risk=nothing - 2.0, rate=slopes, squared_norm=nothing)
    solution = gflow.GaussNewton().start(field, jnp.array(0.5), state(weights), jnp.array(h))
    before = gflow.FlowState(weights, jnp.array(0.3))
    errors = [jnp.zeros_like(w) for w in weights]
    end = ending.end(p, 1e-12, h, before, -2.0, solution, (errors, of_weights), at)
    # With no decay the end has of a residual what the weights at the nodes miss of its integral.
    missed = radau(p).matrix[-1] @ legendre.legval(2 * radau(p).nodes - 1, np.eye(2 * p)[-1])
    np.testing.assert_allclose(end.error.scaled_time, abs(h * 1e-5 * rate**6 * missed), rtol=1e-8)


def test_the_end_has_of_a_residual_what_the_decay_leaves():
    p, (x, weights) = 6, legendre.leggauss(200)
    residual = np.array([1.0, -1.0]) @ legendre.legvander(x, p)[:, [p, p - 1]].T  # P_p at the nodes
    for rate in (0.1, 4.0, 40.0):  # of u, growing along the step as in u' = -rate (1 + s) u
        s = (x + 1) / 2
        left = np.exp(-rate * (1.5 - s - s**2 / 2))
        found = left_of_residuals(jnp.asarray(rate * (1 + radau(p).nodes)))
        np.testing.assert_allclose(found[0], abs(weights @ (residual * left)) / 2, rtol=1e-6)


@pytest.mark.parametrize(("num", "depth"), [(3, 3), (2, 4)])
def test_the_estimate_of_time_is_its_error_where_the_risk_falls_by_much(num, depth):
    # Steps in which u falls to a thirtieth were off by twenty times what they said.
    problem = gflow.Problem(gflow.Dataset(np.eye(num), np.arange(num), num_classes=num))
    begin = (0.3 ** (1 / depth) * (np.eye(num) - 1 / num),) * depth
    flow = gflow.gradient_flow(problem, begin, until=gflow.LogRisk(-10.0), save=2, progress=False)
    exact = gflow.exact.simplex_modes(num, 0.3, depth, log_risk=flow.log_risk.values[1:])
    np.testing.assert_allclose(flow.log_time.values[1:], exact.log_time, rtol=1e-9)


@pytest.mark.parametrize("h", [1.0, 0.01])
def test_sizes_of_coefficients_are_no_round_off_of_the_larger_ones_before_them(h):
    rng, tableau = np.random.default_rng(0), radau(6)
    slope = h * tableau.nodes[:, None, None]
    a, b = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 7))  # (what, rank, width)
    left, right = a[0] + np.exp(-slope) * a[1], b[0] + np.sin(2 * slope) * b[1]
    coefficients = np.einsum("kj,jra,jrb->kab", tableau.legendre, left, right)
    found = ending.squares_of_coefficients(tableau, jnp.asarray(left), jnp.asarray(right))
    np.testing.assert_allclose(np.sqrt(found), np.linalg.norm(coefficients, axis=(1, 2))[-3:], 1e-4)


def test_short_smooth_steps_grow_whatever_the_number_of_stages():
    # Weights and time are smooth at all risks, so that an order more is a step less.
    eye, depth = np.eye(3), 4
    problem = gflow.Problem(gflow.Dataset(eye, np.arange(3), num_classes=3))
    begin = (0.3 ** (1 / depth) * (eye - 1 / 3),) * depth
    until = gflow.LogRisk(-1e6)
    flow = gflow.gradient_flow(
        problem, begin, until=until, save=2, solver=gflow.GaussNewton(stages=8), progress=False
    )
    exact = gflow.exact.simplex_modes(3, 0.3, depth, log_risk=flow.log_risk.values[1:])
    np.testing.assert_allclose(flow.log_time.values[1:], exact.log_time, rtol=1e-9)
    assert int(flow.num_steps[-1]) < 40  # 23; no more than 59 while rates were lost to round-off


def test_an_attempt_is_not_over_before_its_rate_is_known_or_its_error_is_small(field):
    # After two corrections, where the first only tells how far the slopes move, no rate is known.
    h, at = jnp.asarray(0.02), state(start())
    solver, s = gflow.GaussNewton(), beginning(field, start())
    new = jax.jit(lambda: solver.begin(field, s, h, at, solver.start(field, s, at, h)))()

    def over(size, contraction, count=2):
        return solver.solved(new._replace(count=count, size=size, contraction=contraction))

    tolerance = solver.tolerance
    assert not over(50 * tolerance, new.contraction)  # of which ten steps' noise may be made
    assert over(50 * tolerance, 0.9) and over(50 * tolerance, 0.01)  # stands still; shrinks
    assert over(0.5 * tolerance, new.contraction)
    assert not over(1e-3, new.contraction, 11) and over(1e-3, new.contraction, 12)
    # Slopes that still move by much have longer than to their rate, but not as long as that.
    assert not over(1.0, new.contraction, 7) and over(1.0, new.contraction, 8)

    def stale(size, contraction):
        late = new._replace(count=jacobian.PATIENCE, size=size, contraction=contraction)
        return jacobian.stale(late)

    # Nor is it slow, where the slopes have just stopped moving by much.
    assert stale(1e-3, 0.9)
    assert not stale(1e-7, new.contraction) and not stale(1e-7, 0.1)


def test_counts_iterations_and_evaluations(field):
    weights = state(start()).weights
    _, _, carry = walked(field, weights, 0.05, 4, gflow.GaussNewton())
    assert 8 <= int(carry.num_iterations) <= 48
    # One evaluation to begin with, and per step one more than iterations, at six stages each.
    assert int(carry.num_evaluations) == 1 + 6 * (int(carry.num_iterations) + 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": 2},
        {"stages": 6.5},
        {"stages": "six"},
        {"tolerance": -1.0},
        {"tolerance": 1},
        {"max_iterations": 1},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` is .*; expected a"):
        gflow.GaussNewton(**wrong)


def test_a_field_without_structure_is_refused():
    term = diffrax.ODETerm(lambda t, y, args: -y)
    with pytest.raises(ValueError, match="FlowField"):
        gflow.GaussNewton().init(term, 0.0, 1.0, state(start()), None)


def test_steps_grow_where_the_error_estimate_is_round_off():
    # A step so short that its error is round-off of a tenth of the tolerance must not be kept.
    problem = gflow.Problem(points(), loss=gflow.Exponential())
    record = gflow.gradient_flow(
        problem,
        gflow.init.admissible(start(), problem),
        until=gflow.LogRisk(-1e3),
        save=2,
        solver=gflow.GaussNewton(stages=9, tolerance=1e-14),
        rtol=1e-13,
        max_steps=1_000,
    )
    assert record.attrs["status"] == "reached"


def test_another_attempt_at_a_step_begins_from_what_the_first_has_solved(field):
    solver, weights = gflow.GaussNewton(), state(start())
    s = beginning(field, start())

    @jax.jit
    def steps(s, h, state):
        before = solver.start(field, s, state, h)
        whole = solver.from_begin_to_end(field, s, h, state, before)
        again = solver.again(whole.memory, before)
        halves = [solver.from_begin_to_end(field, s, h / 2, state, at) for at in (before, again)]
        failed = whole.memory._replace(newton_error=jnp.full((), jnp.inf))
        return whole, halves, before, solver.again(failed, before)

    whole, (plain, repeated), before, kept = steps(s, jnp.asarray(0.02), weights)
    assert repeated.memory.num_iterations < plain.memory.num_iterations < 10
    assert whole.memory.num_iterations > 0 == before.num_iterations  # not what led here
    for a, b in zip(plain.state.weights, repeated.state.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


class Stubborn(gflow.GaussNewton):
    """An error that does not fall until a step from where the risk is e^-100 is 6e-3 long.

    The loop takes an error for round-off that a step 256 times as short would not lessen: 1.5, more
    than the first step tried there.
    """

    def end(self, field, s, h, state, *rest):
        made = super().end(field, s, h, state, *rest)
        there = (s > np.arcsinh(99.9)) & (s < np.arcsinh(100.05)) & (h > 6e-3)
        size = jnp.where(there, 1e-7, 0.0)
        error = jax.tree.map(lambda e, w: e + size * jnp.abs(w), made.error, state)
        return made._replace(error=error)


def test_an_event_shortly_behind_a_saved_point_is_not_taken_for_round_off():
    problem = gflow.Problem(points(8))
    run = gflow.gradient_flow(
        problem,
        gflow.init.admissible(start((2, 3, 1)), problem),
        until=gflow.LogRisk(-1e3),
        save=[-100.0],
        solver=Stubborn(),
        progress=False,
    )
    assert run.attrs["status"] == "reached"
    assert run.attrs["num_rejected"] > 3

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow import gradient_descent, loss_line_search, loss_scaled, on_log_risk, paper_steps, polyak
from gflow.dynamics.descending import lanes as module
from gflow.dynamics.descending.method import Sampler

# One set of shapes for most tests, so that most of what they need is compiled once.
DATA = gflow.Dataset(
    [[0.9, 0.1], [0.3, -0.5], [0.6, 0.7], [-0.4, 0.2], [-0.8, -0.3], [-0.2, 0.6]],
    [1, 1, 1, -1, -1, -1],
)
PROBLEM = gflow.Problem(DATA, loss=gflow.Logistic())
RATE = 0.5
SGD = optax.sgd(RATE)
START = gflow.init.admissible(gflow.init.gaussian((2, 3, 2, 1), seed=3), PROBLEM)
STEPS = 60
ROUND_OFF = 1e-12
"""A few hundred steps, each right to a few units in the last place."""


def every_step(problem, weights, optimizer, steps=STEPS, **options):
    return gradient_descent(
        problem,
        weights,
        optimizer,
        until=gflow.Steps(steps),
        save=np.arange(1, steps + 1),
        keep_weights=True,
        **options,
    )


def layers_of(record):
    names = (f"weights_{k}" for k in range(1, 100))
    return [record[name].values for name in names if name in record]


def gradient_by_hand(layers, z=DATA.signed_inputs):
    """The gradient of the mean logistic loss, matrix by matrix."""
    w = layers[0]
    for matrix in layers[1:]:
        w = matrix @ w
    slope = -1 / (1 + np.exp(z @ w[0])) @ z / len(z)
    gradient = []
    for k in range(len(layers)):
        before, after = np.eye(z.shape[1]), np.eye(1)
        for matrix in layers[:k]:
            before = matrix @ before
        for matrix in layers[:k:-1]:
            after = after @ matrix
        gradient.append(after.T @ (before @ slope)[None, :])
    return gradient


@pytest.fixture(scope="module")
def run():
    return every_step(PROBLEM, START, SGD)


# ---------------------------------------------------------------------------------------------
# Closed forms and independent implementations
# ---------------------------------------------------------------------------------------------


def test_descent_is_the_plain_loop(run):
    layers = [np.array(layer) for layer in START]
    for k in range(STEPS + 1):
        for found, expected in zip(layers_of(run), layers, strict=True):
            np.testing.assert_allclose(found[k], expected, rtol=ROUND_OFF, atol=ROUND_OFF)
        gradient = gradient_by_hand(layers)
        layers = [w - RATE * g for w, g in zip(layers, gradient, strict=True)]


def test_a_step_changes_the_imbalance_by_its_square_alone(run):
    # Exactly, for any step size: B_k = W_{k+1}^T W_{k+1} - W_k W_k^T gains
    # eta^2 (G_{k+1}^T G_{k+1} - G_k G_k^T).
    layers = layers_of(run)
    for k in range(STEPS):
        gradient = gradient_by_hand([layer[k] for layer in layers])
        for j in range(len(layers) - 1):

            def imbalance(a, b):
                return b.T @ b - a @ a.T

            change = imbalance(layers[j][k + 1], layers[j + 1][k + 1]) - imbalance(
                layers[j][k], layers[j + 1][k]
            )
            expected = RATE**2 * imbalance(gradient[j], gradient[j + 1])
            np.testing.assert_allclose(change, expected, atol=1e-14)


def test_the_scalar_network_multiplies_its_imbalance(run):
    # x^2 - y^2 is multiplied by 1 - eta^2 l'(q)^2 in every step; a = |z| = 1.
    one = gflow.Problem(gflow.datasets.one_datum((1.0,)), loss=gflow.Logistic())
    record = every_step(one, (np.array([[0.4]]), np.array([[1.1]])), SGD)
    x, y = (layer[:, 0, 0] for layer in layers_of(record))
    slope = 1 / (1 + np.exp(x * y))
    expected = (x[0] ** 2 - y[0] ** 2) * np.cumprod(1 - (RATE * slope[:-1]) ** 2)
    np.testing.assert_allclose((x**2 - y**2)[1:], expected, rtol=ROUND_OFF)


def test_one_datum_follows_its_recursion():
    # One layer, one datum, exponential loss, y = e^q, h = eta |z|^2: y' = y e^{h/y} and
    # y_k = h k + (h/2) log k + C + o(1) with C = 1.29024 for h = 1, q_0 = 0.
    one = gflow.Problem(gflow.datasets.one_datum((1.0,)), loss=gflow.Exponential())
    steps = 100_000
    record = gradient_descent(
        one, (np.zeros((1, 1)),), optax.sgd(1.0), until=gflow.Steps(steps), save=[1, 10, 100, 1000]
    )
    y, expected, k = 1.0, [], 0
    for k_end in record.num_steps.values:
        while k < k_end:
            y, k = y * math.exp(1 / y), k + 1
        expected.append(-math.log(y))
    np.testing.assert_allclose(record.log_risk, expected, rtol=1e-12, atol=1e-15)
    constant = math.exp(-float(record.log_risk[-1])) - steps - math.log(steps) / 2
    assert abs(constant - 1.29024) < 1e-4


def test_loss_scaled_descent_on_two_points_never_underflows():
    # R = kappa e^{-a w_1} cosh(b (w_2 - w_2*)), so a step of -rate grad log R adds rate a to w_1,
    # and |w/|w| - (1, 0)| k tends to w_2*/(rate a) = log 3/(2 b rate a).
    a, b, rate = 0.8, 0.5, 1.0
    problem = gflow.Problem(gflow.datasets.two_point(a, b), loss=gflow.Exponential())
    start = np.array([[0.3, -0.4]])
    record = gradient_descent(problem, (start,), loss_scaled(rate), until=gflow.LogRisk(-1e5))
    assert record.attrs["status"] == "reached"
    k = record.num_steps.values
    w_1 = record.end_to_end.values[:, 0]
    np.testing.assert_allclose(w_1, start[0, 0] + rate * a * k, rtol=1e-11)
    limit = math.log(3) / (2 * b * rate * a)
    found = float(record.direction_error[-1]) * k[-1]
    assert abs(found / limit - 1) < 1e-4
    # eta_k = rate/R_k grows geometrically, and so does their sum.
    log_last_but_one = float(record.log_risk[-1]) + rate * a**2
    np.testing.assert_allclose(record.log_step_size[-1], -log_last_but_one, rtol=1e-12)
    log_sum = -log_last_but_one - math.log(-math.expm1(-rate * a**2))
    np.testing.assert_allclose(record.log_time[-1], log_sum, rtol=1e-12)


def test_a_general_network_descends_as_the_deep_linear_one(run):
    network = gflow.Network(lambda w, x: (w[2] @ (w[1] @ (w[0] @ x)))[0], homogeneity=3)
    general = gflow.Problem(DATA, network, gflow.Logistic())
    record = gradient_descent(general, START, SGD, until=gflow.Steps(STEPS), save=2)
    for k in (1, 2, 3):
        final = f"final_weights_{k}"
        np.testing.assert_allclose(record[final], run[final], rtol=ROUND_OFF, atol=ROUND_OFF)


# ---------------------------------------------------------------------------------------------
# The paper's steps
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharper", [False, True])
def test_every_step_of_the_papers_rule_decreases_the_risk_as_proved(sharper):
    steps = 300
    record = every_step(PROBLEM, START, paper_steps(PROBLEM, sharper=sharper), steps)
    layers = layers_of(record)
    eta = np.exp(record.log_step_size.values[1:])
    risk = np.exp(record.log_risk.values)
    squares = np.array(
        [
            sum(np.sum(g**2) for g in gradient_by_hand([layer[k] for layer in layers]))
            for k in range(steps)
        ]
    )
    moved = np.sum([np.sum(np.diff(w, axis=0) ** 2, axis=(1, 2)) for w in layers], axis=0)
    np.testing.assert_allclose(eta, np.sqrt(moved / squares), rtol=1e-11)
    assert np.all(np.diff(risk) <= -eta / 2 * squares * (1 - 1e-9))
    assert np.sum(eta * squares) <= 2 * risk[0]
    radius = 1 + np.maximum.accumulate(
        np.max([np.linalg.norm(w, axis=(1, 2)) for w in layers], axis=0)
    )
    smoothness = [papers_smoothness(radius_now, sharper) for radius_now in radius[:-1]]
    np.testing.assert_allclose(eta, 1 / np.array(smoothness), rtol=1e-11)


def papers_smoothness(radius, sharper):
    if sharper:
        return 0.25 * 3 * radius**4 + 2 * radius
    return 2 * 9 * radius**4 * 1.25


# ---------------------------------------------------------------------------------------------
# Step sizes and time
# ---------------------------------------------------------------------------------------------


def test_the_time_of_constant_steps_is_their_sum(run):
    assert run.attrs["step_size"] == "nominal"
    assert run.log_time[0] == run.log_step_size[0] == -np.inf
    np.testing.assert_array_equal(run.num_steps, np.arange(STEPS + 1))
    np.testing.assert_allclose(np.exp(run.log_time), RATE * np.arange(STEPS + 1), rtol=1e-14)
    np.testing.assert_allclose(run.log_step_size[1:], math.log(RATE), rtol=1e-15)


def test_the_step_size_of_momentum_adds_up_its_echoes():
    record = every_step(PROBLEM, START, optax.sgd(0.1, momentum=0.5))
    k = np.arange(1, STEPS + 1)
    expected = 0.1 * (1 - 0.5**k) / (1 - 0.5)
    np.testing.assert_allclose(np.exp(record.log_step_size[1:]), expected, rtol=1e-13)


def test_a_clipped_step_is_measured():
    limit = 0.1
    optimizer = optax.chain(optax.clip_by_global_norm(limit), SGD)
    record = every_step(PROBLEM, START, optimizer, 10)
    assert record.attrs["step_size"] == "measured"
    layers = layers_of(record)
    norms = [
        math.sqrt(sum(np.sum(g**2) for g in gradient_by_hand([layer[k] for layer in layers])))
        for k in range(10)
    ]
    assert max(norms) > limit
    expected = RATE * np.minimum(1, limit / np.array(norms))
    np.testing.assert_allclose(np.exp(record.log_step_size[1:]), expected, rtol=1e-12)


def test_polyaks_step_is_that_of_optax_where_nothing_underflows():
    # eta = R/|grad R|^2, and on log R the same in the log domain.
    ours = every_step(PROBLEM, START, polyak(), 15)
    theirs = every_step(PROBLEM, START, optax.polyak_sgd(1e300), 15)
    np.testing.assert_allclose(ours.end_to_end, theirs.end_to_end, rtol=1e-9)
    np.testing.assert_allclose(ours.log_time[1:], theirs.log_time[1:], rtol=1e-9)


def test_searches_decrease_the_risk_far_below_underflow():
    armijo = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30))
    for optimizer in (on_log_risk(armijo), loss_line_search(0.1)):
        record = gradient_descent(
            PROBLEM, START, optimizer, until=gflow.LogRisk(-1e4) | gflow.Steps(20_000), save=30
        )
        assert np.all(np.diff(record.log_risk) < 0)
        assert record.log_risk[-1] < -1000
        assert np.all(np.isfinite(record.log_time[1:]))
        assert np.all(np.diff(record.log_time[1:]) > 0)


# ---------------------------------------------------------------------------------------------
# Stopping and saving
# ---------------------------------------------------------------------------------------------


def test_a_time_is_reached_after_the_steps_that_fill_it(run):
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.Time(30), save=[10.0])
    np.testing.assert_array_equal(record.num_steps, [0, 20, 60])
    np.testing.assert_array_equal(record.log_risk, run.log_risk.values[[0, 20, 60]])


def test_the_first_iterate_that_reaches_a_value_is_saved(run):
    log_risk = run.log_risk.values
    wanted = np.linspace(log_risk[0], log_risk[50] + 1e-9, 8)[1:]
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.LogRisk(wanted[-1]), save=wanted)
    expected = [0, *(int(np.argmax(log_risk <= value)) for value in wanted)]
    np.testing.assert_array_equal(record.num_steps, expected)
    np.testing.assert_array_equal(record.log_risk, log_risk[expected])


def test_the_first_rule_that_is_met_ends_the_run():
    until = gflow.LogRisk(-1e6) | gflow.Steps(7)
    record = gradient_descent(PROBLEM, START, SGD, until=until)
    assert record.attrs["status"] == "reached"
    assert record.attrs["message"] == "Steps(7) after 7 steps"
    assert record.num_steps[-1] == 7


def test_alignment_ends_a_run_at_a_multiple_of_a_hundred_steps():
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.Misalignment(0.02), save=5)
    assert record.attrs["status"] == "reached"
    assert record.num_steps[-1] % 100 == 0
    worst = record.misalignment.max("pair").values
    assert worst[-1] <= 0.02 < worst[-2]


def test_a_rule_met_at_the_start_makes_no_step():
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.LogRisk(1.0))
    assert record.sizes["point"] == 1
    assert record.attrs["status"] == "reached" and "no step" in record.attrs["message"]


def test_divergence_is_a_status_and_the_last_point_is_finite():
    mixed = gflow.Dataset(DATA.inputs, [1, 1, -1, -1, 1, -1])
    steep = gflow.Problem(mixed, loss=gflow.Exponential())
    start = gflow.init.admissible(START, steep)
    optimizer = optax.sgd(2.0)
    record = every_step(steep, start, optimizer, 100)
    assert record.attrs["status"] == "diverged"
    assert 3 < record.sizes["point"] < 50
    for name in ("log_risk", "end_to_end", "weights_1", "weights_2", "weights_3"):
        assert np.all(np.isfinite(record[name])), name
    # The same, found after the fact inside one long call.
    once = gradient_descent(
        steep, start, optimizer, until=gflow.Steps(100_000), save=2, keep_weights=True
    )
    assert once.num_steps[-1] == record.num_steps[-1]
    np.testing.assert_array_equal(once.weights_1[-1], record.weights_1[-1])


def test_an_optimiser_without_numbers_is_stopped_at_once():
    record = gradient_descent(PROBLEM, START, optax.sgd(math.nan), until=gflow.Steps(5))
    assert record.attrs["status"] == "diverged" and record.sizes["point"] == 1
    assert "first update is not finite" in record.attrs["message"]


def test_an_underflown_gradient_is_reported_as_a_stall():
    steep = gflow.Problem(DATA, loss=gflow.Exponential())
    solution = DATA.max_margin()
    far = gflow.init.balanced((2, 3, 2, 1), end_to_end=800 * solution.direction / solution.margin)
    record = gradient_descent(steep, far, SGD, until=gflow.Steps(100_000), save=2)
    assert record.attrs["status"] == "stalled"
    assert "underflows" in record.attrs["message"] and "on_log_risk" in record.attrs["message"]


def test_steps_that_go_uphill_are_told():
    turning = optax.sgd(lambda step: RATE * jnp.where(step < 5, 1.0, -0.01))
    record = gradient_descent(PROBLEM, START, turning, until=gflow.Steps(8), save=2)
    assert record.attrs["message"] == (
        "Steps(8) after 8 steps; 3 of 8 steps went uphill and count as no time"
    )
    np.testing.assert_allclose(record.log_time[-1], np.log(5 * RATE), rtol=1e-14)
    record = gradient_descent(PROBLEM, START, optax.sgd(0.0), until=gflow.Steps(8), save=2)
    assert record.attrs["status"] == "stalled"
    assert "none of 8 steps went downhill" in record.attrs["message"]


def test_a_run_that_takes_too_long_says_so():
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.LogRisk(-30), save=5, max_steps=150)
    assert record.attrs["status"] == "max_steps"
    assert record.num_steps[-1] == 150


def test_an_interrupted_run_returns_what_it_has(monkeypatch, run):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return advance(*arguments)

    advance = module.advance
    monkeypatch.setattr(module, "advance", interrupted)
    record = every_step(PROBLEM, START, SGD)
    assert record.attrs["status"] == "interrupted"
    np.testing.assert_array_equal(record.num_steps, np.arange(12))
    np.testing.assert_array_equal(record.log_risk, run.log_risk.values[:12])


# ---------------------------------------------------------------------------------------------
# Mini-batches
# ---------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_point_once():
    sampler = Sampler(jax.random.key(0), 2)

    @jax.jit
    def draw(step, order):
        order = sampler.order(PROBLEM, step, order)
        return sampler.batch(PROBLEM, step, order).design.rows, order

    order, seen, epochs = jnp.arange(6), [], []
    for step in range(9):
        batch, order = draw(jnp.asarray(step), order)
        seen.extend(np.asarray(batch).tolist())
        if step % 3 == 2:
            assert sorted(seen) == sorted(DATA.signed_inputs.tolist())
            epochs.append(seen)
            seen = []
    assert epochs[0] != epochs[1] != epochs[2]


def test_mini_batches_follow_their_seed_and_a_full_batch_is_none(run):
    def descend(seed, size):
        return gradient_descent(
            PROBLEM, START, SGD, until=gflow.Steps(STEPS), save=2,
            batch_size=size, seed=seed,
        ).end_to_end.values[-1]  # fmt: skip

    full = run.end_to_end.values[-1]
    np.testing.assert_allclose(descend(0, 6), full, rtol=ROUND_OFF)
    first, again, other = descend(1, 2), descend(1, 2), descend(2, 2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(first, full, rtol=0.2)


def test_mini_batches_stop_by_the_risk_on_all_points():
    record = gradient_descent(PROBLEM, START, SGD, until=gflow.LogRisk(-3), save=4, batch_size=2)
    assert record.attrs["status"] == "reached" and record.attrs["batch_size"] == 2
    assert record.log_risk[-1] <= -3 and record.num_steps[-1] % 3 == 0


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def needs_hessian():
    def update(updates, state, params=None, *, hessian, **extra):
        return jax.tree.map(jnp.negative, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("optimizer", "options", "complaint"),
    [
        (optax.sgd(-0.1), {}, "step of 0.1; expected a negative number: learning rates are"),
        (0.1, {}, "`optimizer` is a float; expected an optax optimiser"),
        (needs_hessian(), {}, "`optimizer` cannot make a step.*'hessian'"),
        (optax.sgd(0.1), {"batch_size": 7}, "`batch_size` is 7; expected at most 6"),
        (optax.sgd(0.1), {"batch_size": 0}, "`batch_size` is 0; expected a positive"),
        (optax.sgd(0.1), {"max_steps": 0}, "`max_steps` is 0"),
        (optax.sgd(0.1), {"save": 1}, "`save` is 1"),
        (optax.sgd(0.1), {"until": 7}, "`until` is 7; expected a stopping rule"),
    ],
)
def test_bad_arguments_are_named(optimizer, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        gradient_descent(PROBLEM, START, optimizer, **{"until": gflow.Steps(3), **options})


def test_only_deep_linear_networks_have_a_misalignment():
    network = gflow.Network(lambda w, x: w[0] @ x)
    general = gflow.Problem(DATA, network, gflow.Logistic())
    with pytest.raises(ValueError, match=r"`until` holds Misalignment.* product of matrices"):
        gradient_descent(general, (np.ones(2),), SGD, until=gflow.Misalignment(0.1))

"""Networks with kinks: flows that land on them, cross them, and slide along them."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gflow
from gflow.dynamics.drive import checkpoint as checkpoint_module
from gflow.dynamics.kinks.decide import Alone, Block, decide, decide_alone
from gflow.dynamics.kinks.kinked import moment
from gflow.dynamics.kinks.meeting import Layers
from gflow.dynamics.kinks.patterns import Slide
from gflow.dynamics.kinks.piece import Piece
from gflow.dynamics.kinks.ways import TornError, decide_layers
from gflow.problem import kinks as activations
from gflow.problem.mlp import balances

X = np.array([[1.0, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]]) / np.sqrt(3)
XOR = gflow.Dataset(X, [1, -1, -1, 1])
QUIET = {"progress": False}
LOCATED = 1e-8  # of weights, by default tolerances
NET = gflow.Network(lambda w, x: (w[1] @ gflow.relu(w[0] @ x))[0], homogeneity=2)


def start(width=20, seed=0, d=3):
    rng = np.random.default_rng(seed)
    a, w = rng.normal(size=width) * 0.3, rng.normal(size=(width, d)) * 0.5
    return w, a[None]


def last(record):
    return [record[f"final_weights_{k + 1}"].values for k in range(2)]


# ---------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------


def test_activations_are_what_they_say_and_batch_and_differentiate():
    z = jnp.array([[-2.0, 3.0], [0.0, -1.0]])
    np.testing.assert_array_equal(jax.jit(gflow.relu)(z), np.maximum(z, 0.0))
    np.testing.assert_array_equal(jax.vmap(lambda r: gflow.leaky_relu(r, -1.0))(z), np.abs(z))
    gates = jax.grad(lambda z: jnp.sum(gflow.leaky_relu(z, 0.1)))(z)
    np.testing.assert_array_equal(gates, [[0.1, 1.0], [0.1, 0.1]])
    with pytest.raises(ValueError, match=r"`slope` is 1\.5; expected a number below 1"):
        gflow.leaky_relu(z, 1.5)
    with pytest.raises(ValueError, match="`branch` is 'left'; expected 'on' or 'off'"):
        gflow.MLP(branch="left")


def test_kinks_are_found_in_calls_and_refused_in_loops():
    def deep(w, x):
        return jax.jit(jax.vmap(lambda z: gflow.leaky_relu(z, 0.1)))(gflow.relu(w @ x))

    bends = gflow.Network(lambda w, x: jnp.sum(deep(w, x))).kinks(np.ones((2, 3)), XOR)
    assert bends.sizes == (2, 2) and bends.slopes == (0.0, 0.1)
    # A maximum is b + relu(a - b), an absolute value leaky_relu of slope -1.
    pooled = gflow.Network(lambda w, x: jnp.sum(w[:2] @ x + gflow.relu((w[2:] - w[:2]) @ x)))
    w = np.random.default_rng(0).normal(size=(4, 3))
    largest = np.sum(np.maximum(X @ w[:2].T, X @ w[2:].T), 1)
    np.testing.assert_allclose(jax.vmap(lambda x: pooled.apply(w, x))(X), largest, rtol=1e-12)
    assert pooled.kinks(w, XOR).sizes == (2,)
    looped = gflow.Network(lambda w, x: jax.lax.fori_loop(0, 2, lambda _, z: gflow.relu(z), w[0]))
    with pytest.raises(ValueError, match=r"inside a `(while|scan)`; expected it outside of loops"):
        looped.kinks(np.ones(2), XOR)
    hidden = gflow.Network(lambda w, x: jnp.sum(jax.nn.relu(w @ x)))
    assert hidden.kinks(np.ones((2, 3)), XOR) is None
    assert hidden.hidden_kinks(np.ones((2, 3)), XOR)
    program = activations.traced(lambda x: jax.nn.softmax(x), np.ones(3))
    assert not activations.holds(program.jaxpr, activations.is_switch)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((np.ones((2, 2)), np.ones((1, 2))), r"`weights\[0\]` has shape \(2, 2\); expected 3 colu"),
        (((np.ones((2, 3)), np.ones(3)), np.ones((1, 2))), r"`weights\[0\]\[1\]`, a bias, has sh"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        gflow.MLP().check(weights, XOR)


def test_biases_are_a_constant_feature_and_cost_homogeneity():
    w, a = start()
    (plain,) = (gflow.MLP().coordinates((w, a), XOR),)
    with_bias = ((w[:, :2], w[:, 2] / np.sqrt(3)), a)
    flat = gflow.Dataset(X[:, :2], [1, -1, -1, 1])
    np.testing.assert_allclose(gflow.MLP().coordinates(with_bias, flat), plain, rtol=1e-12)
    assert gflow.MLP().degree((w, a)) == 2 and gflow.MLP().degree(with_bias) is None


# ---------------------------------------------------------------------------------------------
# Decisions
# ---------------------------------------------------------------------------------------------


def block(normals, base, force, on=True, free=False, lower=0.0):
    k = len(normals)
    full = np.broadcast_to
    return Block(
        np.arange(k),
        np.asarray(normals, float),
        np.asarray(base, float),
        np.asarray(force, float),
        full(lower, k),
        full(on, k),
        full(free, k),
    )


def test_a_kink_is_crossed_or_slid_along_by_its_one_sided_speeds():
    # z' = base + gate * force, for one weight.
    for base, force, side in [(1.0, -2.0, 0), (1.0, -0.5, 1), (-1.0, -2.0, -1), (1.0, 2.0, 1)]:
        (group,) = decide(block([[1.0]], [base], [force], on=False))
        assert group.side == side
    (group,) = decide(block([[1.0]], [1.0], [-4.0]))
    assert group.theta == pytest.approx(0.25)  # 1 - 4 theta = 0


def test_points_on_one_ray_share_one_kink():
    (group,) = decide(block([[1.0, 2.0], [-2.0, -4.0]], [0.1, 0.2], [-1.0, -1.0]))
    assert group.members.tolist() == [0, 1] and group.alpha.tolist() == [1.0, -2.0]
    # b_1 theta - 2 b_2 (1 - theta) = -0.1
    assert group.side == 0 and group.theta == pytest.approx(2.1 / 3)


def test_dependent_kinks_are_decided_together():
    # Four points that span three dimensions, at w = 0: all slide where a mixture of gates rests.
    groups = decide(block(X, -X.T @ [-0.3, -0.3, -0.3, -0.3], [-1.0] * 4))
    velocity = -X.T @ np.full(4, -0.3) + X.T @ [-1.0 * group.theta for group in groups]
    np.testing.assert_allclose(velocity, 0.0, atol=1e-12)


def test_a_repelling_kink_is_open_only_where_the_flow_begins_on_it():
    assert not decide(block([[1.0]], [0.5], [1.0], on=False))[0].open
    at = block([[1.0]], [-0.5], [1.0], free=True)
    assert decide(at)[0].open
    assert [decide(at, side)[0].side for side in (1, -1)] == [1, -1]


# ---------------------------------------------------------------------------------------------
# Flows of one hidden layer
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xor():
    problem = gflow.Problem(XOR, gflow.MLP())
    return gflow.gradient_flow(problem, start(), until=gflow.LogRisk(-1e4), save=6, **QUIET)


def test_xor_is_learnt_along_its_kinks(xor):
    assert xor.attrs["status"] == "reached"
    assert xor.num_steps[-1] <= 300
    # As the prototype in NumPy and SciPy's DOP853 has it: 24 kinks to -10, 32 to -100.
    assert xor.num_kinks.values[-1] == 34 and xor.num_sliding.values[-1] == 32
    assert np.all(xor.balance_drift < 1e-11) and np.all(xor.clock_error < 1e-8)
    after = xor.smoothed_margin.values[np.isfinite(xor.smoothed_margin.values)]
    assert np.all(np.diff(after) > 0)
    assert xor.kkt_residual[-1] < 0.03


def test_kinks_that_are_not_known_are_stepped_over_and_the_record_says_so():
    w, a = start()
    network = gflow.Network(lambda at, x: at[1] @ jax.nn.relu(at[0] @ x), 2.0)
    problem = gflow.Problem(XOR, network, gflow.Exponential())
    until = {"until": gflow.LogRisk(-2), "save": 3, "max_steps": 2000}
    record = gflow.gradient_flow(problem, (w, a[0]), solver=diffrax.Tsit5(), **until)
    # Where the flow slides every step ends on the other side.
    assert record.attrs["status"] == "max_steps" and "gflow.relu" in record.attrs["message"]
    assert record.attrs["kinks"].startswith("stepped over") and record.attrs["num_switched"] > 0


def test_what_the_theory_says_of_homogeneous_networks_holds(xor):
    claims = gflow.verify(xor)
    assert not list(claims.failed), str(claims)
    for name in ("neurons stay balanced", "smoothed margin grows", "KKT: residual", "law of time"):
        assert claims[name].holds, str(claims)
    limit = claims["margin from a small start"]
    assert limit.holds is None and "not orthogonally separable: points" in limit.why
    heavier = xor.assign(balance_drift=xor.balance_drift + 1e-6)
    assert gflow.verify(heavier)["neurons stay balanced"].holds is False


def test_the_log_of_kinks_is_in_the_record_and_its_file(xor, tmp_path):
    log = gflow.kinks(gflow.load(gflow.save(xor, tmp_path / "xor.nc")))
    events = log.event.values.tolist()
    assert len(events) == 34 and set(events) <= {"crossed", "slid", "left"}
    assert events.count("slid") - events.count("left") == 32
    assert np.all(np.diff(log.log_time) >= 0) and set(log.layer.values) == {1}
    with pytest.raises(ValueError, match="`record` has no log of kinks"):
        gflow.kinks(xor.drop_vars("num_kinks"))


def test_figures_show_where_neurons_switch_and_when_units_slid(xor):
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ax = gflow.plot.patterns(xor)
    bars, left = ax.get_lines()
    ends = bars.get_xdata().reshape(-1, 3)[:, :2]
    assert np.sum(ends[:, 1] == xor.log_time.values[-1]) == 32 and np.all(np.diff(ends) > 0)
    assert left.get_label() == "left" and left.get_xdata()[0] in ends[:, 1]
    assert len(gflow.plot.patterns(xor, "log_risk").get_lines()) == 2
    layers = zip(start(), last(xor), strict=True)
    both = {
        f"weights_{k}": (("point", f"row_{k}", f"column_{k}"), np.stack(layer))
        for k, layer in enumerate(layers, 1)
    }
    (ax,) = gflow.plot.neurons(XOR, xor.isel(point=[0, -1]).assign(both), points=[1])
    w = last(xor)[0]
    for line, neuron in zip(ax.get_lines()[::2], w, strict=True):
        for point in (line.get_xy1(), line.get_xy2()):  # on the line where it switches
            assert abs(neuron @ [*point, X[0, 2]]) < 1e-12 * np.linalg.norm(neuron)
    plt.close("all")
    with pytest.raises(ValueError, match="holds no weights; make it with `keep_weights=True`"):
        gflow.plot.neurons(XOR, xor)


def test_a_run_that_is_stopped_among_kinks_goes_on_bit_for_bit(xor, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "SECONDS_A_SEGMENT", 0.0)
    monkeypatch.setattr(checkpoint_module, "SHARE", 0.0)
    problem = gflow.Problem(XOR, gflow.MLP())
    options = {"until": gflow.LogRisk(-1e4), "save": 6, "checkpoint": tmp_path / "x", **QUIET}
    among = int(gflow.kinks(xor).step[5])  # a step that ends at a kink counts as one
    for steps in sorted({among, among + 1, 60}):
        stopped = gflow.gradient_flow(problem, start(), max_steps=steps, **options)
        assert stopped.attrs["status"] == "max_steps"
        assert stopped.num_steps[-1] + stopped.attrs["num_rejected"] == steps
    whole = gflow.gradient_flow(problem, start(), **options)
    for name in xor.data_vars:
        np.testing.assert_array_equal(xor[name], whole[name], err_msg=name)


def smooth_pieces(x, y, w, a, time):
    """The flow by SciPy, of small steps of an implicit kind: descent in its limit."""
    m, d = w.shape

    def rhs(_, v):
        a, w = v[:m], v[m:].reshape(m, d)
        z = w @ x.T
        gates = (1 + np.tanh(z / 1e-7)) / 2
        q = y * (a @ (gates * z))
        c = y / (1 + np.exp(q)) / len(y)
        return np.concatenate([(gates * z) @ c, ((a[:, None] * gates * c) @ x).ravel()])

    found = solve_ivp(
        rhs, (0, time), np.concatenate([a.ravel(), w.ravel()]), "LSODA", rtol=1e-9, atol=1e-11
    )
    return found.y[:, -1]


@pytest.fixture(scope="module")
def six_points():
    rng = np.random.default_rng(3)  # the first seed where units slide at the end
    x, y = rng.normal(size=(6, 2)), np.sign(rng.normal(size=6))
    return gflow.Dataset(x, y), (rng.normal(size=6) * 0.3, rng.normal(size=(6, 2)) * 0.5)


@pytest.fixture(scope="module")
def to_five(six_points):
    data, (a, w) = six_points
    options = {"until": gflow.Time(5.0), "save": 3, "solver": diffrax.Tsit5(), **QUIET}
    problems = [gflow.Problem(data, network) for network in (gflow.MLP(), NET)]
    return [gflow.gradient_flow(each, (w, a[None]), **options) for each in problems]


def test_a_flow_that_slides_is_the_limit_of_smooth_ones(six_points, to_five):
    data, (a, w) = six_points
    record = to_five[0]
    assert record.num_sliding[-1] >= 1 and record.attrs["kinks"].startswith("located")
    smooth = smooth_pieces(np.asarray(data.inputs), np.asarray(data.labels), w, a, 5.0)
    got = np.concatenate([last(record)[1].ravel(), last(record)[0].ravel()])
    np.testing.assert_allclose(got, smooth, atol=2e-6)  # the smooth gates are 1e-7 wide


def test_relu_in_a_network_of_ones_own_is_the_same(to_five):
    one, other = to_five
    np.testing.assert_array_equal(one.num_kinks, other.num_kinks)
    for a, b in zip(last(one), last(other), strict=True):
        np.testing.assert_allclose(a, b, atol=LOCATED)


def test_deep_networks_of_frameworks_have_the_kinks_of_the_same_mlp():
    rng = np.random.default_rng(0)
    shapes = ((5, 3), (4, 5), (2, 4))
    layers = tuple((rng.normal(size=s), rng.normal(size=s[0])) for s in shapes)
    data = gflow.Regression(rng.normal(size=(6, 3)), rng.normal(size=(6, 2)))
    gates = rng.uniform(size=(6, 9))

    def seen(network, weights):
        problem = gflow.Problem(data, network)
        bends = network.kinks(problem.check(weights), data)
        assert bends.place().layer.tolist() == [1] * 5 + [2] * 4

        @jax.jit
        def evaluated(weights):
            parts = bends.evaluate(weights, data, jnp.asarray(gates), None)
            return parts, problem.log_risk_and_gradient(weights)

        with jax.enable_x64(True):
            parts, (log_risk, gradient) = evaluated(weights)
        return [*map(np.asarray, parts), np.asarray(log_risk)], gradient

    wanted, gradient = seen(gflow.MLP(), layers)
    sizes, key = {"in_size": 3, "out_size": 2, "width_size": 1, "depth": 2}, jax.random.key(0)
    model = eqx.nn.MLP(**sizes, activation=gflow.relu, key=key)
    model = eqx.tree_at(
        lambda m: [leaf for layer in m.layers for leaf in (layer.weight, layer.bias)],
        model,
        jax.tree.leaves(layers),
    )
    got, slopes = seen(*gflow.from_equinox(model))
    for a, b in zip(
        [*got, *jax.tree.leaves(slopes)], [*wanted, *jax.tree.leaves(gradient)], strict=True
    ):
        np.testing.assert_array_equal(a, b)

    nn = pytest.importorskip("flax.linen", reason="flax is in the extra `images`")
    module = nn.Sequential([nn.Dense(5), gflow.relu, nn.Dense(4), gflow.relu, nn.Dense(2)])
    params = {
        f"layers_{2 * k}": {"kernel": matrix.T, "bias": bias}
        for k, (matrix, bias) in enumerate(layers)
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got, _ = seen(*gflow.from_flax(module, params))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_many_units_are_decided_about_as_each_by_itself():
    rng = np.random.default_rng(0)
    normals, base, force = (
        rng.normal(size=(200, 2)),
        rng.normal(size=(200, 2)),
        rng.normal(size=200),
    )
    on, free = rng.random((2, 200)) < 0.5
    many = decide_alone(Alone(normals, base, force, np.full(200, 0.1), on, free), 1)
    for k in range(200):
        one = block(normals[k : k + 1], base[k], force[k : k + 1], on[k : k + 1], free[k], 0.1)
        (group,) = decide(one, 1)
        assert (group.side, group.open) == (many[0][k], many[2][k])
        assert group.side != 0 or group.theta == pytest.approx(many[1][k], rel=1e-12)
    assert set(many[0].tolist()) == {-1, 0, 1} and np.any(many[2])


def test_kinks_of_a_wide_network_are_stepped_over_within_the_tolerance():
    # Each kink is shared by two points, x and -x, and two points are there twice.
    rng = np.random.default_rng(1)
    half = rng.normal(size=(10, 3)) / np.sqrt(3)
    x = np.concatenate([half, -half, half[:2]])
    weights = rng.normal(size=(150, 3)), rng.normal(size=(1, 150)) / np.sqrt(150)
    problem = gflow.Problem(gflow.Dataset(x, np.sign(x @ np.ones(3))), gflow.MLP(slope=0.1))
    options = {"until": gflow.LogRisk(-2.0), "save": 2, "solver": diffrax.Tsit5(), **QUIET}
    loose, tight = (
        gflow.gradient_flow(problem, weights, rtol=rtol, **options) for rtol in (1e-6, 1e-10)
    )
    assert loose.attrs["num_stepped_over"] > 10 and tight.attrs["num_stepped_over"] < 10
    for name in ("num_kinks", "num_sliding"):
        np.testing.assert_array_equal(loose[name], tight[name])
    assert loose.num_kinks[-1] > 15 and loose.attrs["num_rejected"] == 0
    for a, b in zip(last(loose), last(tight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # measured: 2e-7
    assert loose.balance_drift[-1] < 1e-9


# ---------------------------------------------------------------------------------------------
# Deep networks, and limits
# ---------------------------------------------------------------------------------------------


def meeting(ahead, gram, force, behind, speed, on=False, free=False, branch=None):
    """Of two units, the second of layer 2 and moved by `behind` times the first's activation."""
    later = np.array([[0.0, 0.0], [behind, 0.0]])
    own = np.array(gram) > 0
    layers = Layers(own, later, np.array([1, 2]), np.array(speed), np.full(2, 0.5))
    units = block(np.diag(np.sqrt(gram)), [0.0, 0.0], force, np.array(on), np.array(free))
    base = np.where(own, np.array(ahead) / np.sqrt(np.where(own, gram, 1.0)), 0.0)
    groups = decide_layers(units._replace(base=base), layers, branch)
    return {group.members[0]: (group.side, group.theta, group.open) for group in groups}


def test_a_unit_behind_a_layer_that_is_off_counts_as_it_will_be():
    # z' = 1 + 2 gate * b behind it: the unit behind is on where 2 > 0, and off where -2 < 0.
    off = np.array([False, False]), np.array([False, False])
    one = meeting([1.0, 0.0], [1.0, 0.0], [0.0, -1.0], 2.0, [1.0, 0.0], *off)
    assert one[0][:2] == (0, pytest.approx(0.5)) and one[1][0] == 1
    other = meeting([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], -2.0, [1.0, 0.0], *off)
    assert other[0][0] == 1 and other[1][0] == -1


def test_a_joint_slide_is_left_where_the_force_in_front_repels_on_average():
    # Along z_2 = 0 with unit 1 on, nu_2 is what keeps p_2 + G_2 nu_2 + A z_1' = 0.
    p, g, b, a = (0.006, 0.046), (1.5, 0.35), (0.27, -0.33), 1.46
    side = np.array([True, True]), np.array([True, False])
    with pytest.raises(TornError, match="descent by small steps leads elsewhere"):
        meeting(p, g, b, a, [0.0, -0.07], *side)  # it passes the way out again and again
    found = meeting(p, g, b, a, [0.0, -0.07], *side, branch=1)
    nu = -(p[1] + a * (p[0] + g[0] * b[0])) / (g[1] + a**2 * g[0])
    assert b[0] + a * -p[1] / g[1] > 0  # with both held the first would repel
    assert p[0] + g[0] * (b[0] + a * nu) > 0
    assert found[0][0] == 1 and found[1][:2] == (0, pytest.approx(nu / b[1], rel=1e-9))
    held = meeting(p, g, (0.1, -0.33), a, [0.0, -0.07], *side)
    assert held[0][0] == held[1][0] == 0  # and here it attracts


def test_a_meeting_with_two_ways_on_says_so_and_takes_the_branch():
    both = [-0.5, 0.0], [1.0, 0.0], [1.0, 0.0], 1.0, [0.0, 0.0]
    start = np.array([True, True]), np.array([True, False])
    with pytest.raises(TornError, match="both ways lead away"):
        meeting(*both, *start)
    assert meeting(*both, *start, branch=1)[0][::2] == (1, False)
    assert meeting(*both, *start, branch=-1)[0][::2] == (-1, False)


def two_layers_of_kinks(seed):
    """A problem of two hidden layers, a third with ties, and its flow to T = 15."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 2))
    x = np.concatenate([x[:3], -x[:3]]) if seed % 3 == 1 else x
    data = gflow.Regression(x, rng.normal(size=(6, 2)))
    start = tuple(rng.normal(size=shape) * 0.9 for shape in ((3, 2), (3, 3), (2, 3)))
    problem = gflow.Problem(data, gflow.MLP())
    options = {"save": 2, "solver": diffrax.Tsit5(), **QUIET}
    return problem, start, gflow.gradient_flow(problem, start, until=gflow.Time(15.0), **options)


@pytest.fixture(scope="module")
def two_hidden_layers():
    """Networks whose kinks meet, their flows and where descent of two step sizes is."""

    @eqx.filter_jit
    def descended(problem, weights, eta, steps):
        def step(_, w):
            log_risk, gradient = problem.log_risk_and_gradient(w)
            return jax.tree.map(lambda a, g: a - eta * jnp.exp(log_risk) * g, w, gradient)

        return jax.lax.fori_loop(0, steps, step, weights)

    found = []
    for seed in (55, 108, 123, 146):
        problem, start, flow = two_layers_of_kinks(seed)
        ends = [
            descended(problem, jax.tree.map(jnp.asarray, start), jnp.asarray(15.0 / n), n)
            for n in (15_000, 150_000)
        ]
        leaves = [flow[f"final_weights_{k}"].values for k in (1, 2, 3)]
        off = [max(np.max(np.abs(a - b)) for a, b in zip(leaves, end, strict=True)) for end in ends]
        found.append((flow, off))
    return found


def test_kinks_of_two_layers_that_meet_are_passed_as_by_descent(two_hidden_layers):
    # A layer that is off, a neuron that is zero, joint slides, slides of one kink.
    for flow, (large, small) in two_hidden_layers:
        assert flow.attrs["status"] == "reached" and flow.balance_drift[-1] < LOCATED
        assert large < 3e-3 and small < large / 4
        when = gflow.kinks(flow).log_time.values
        assert np.all(np.diff(when) >= 0) and when[-1] < np.log(15.0)


def test_a_way_on_that_seems_at_rest_is_followed_until_slow_units_have_left():
    # Gates of the second layer far sharper than those of the first rest where two units of the
    # first slide. One of them leaves, at 1/30 of a width in one of time; off by 0.12 if it did not.
    layers = np.zeros((5, 5))
    layers[2:, :2] = [[1.97552, -0.70839], [-0.82294, 0.77873], [1.20625, -0.05913]]
    normals, root = np.zeros((5, 3)), np.sqrt(4.340483)
    normals[[0, 1], [0, 1]] = root
    base = np.array([0.0870627 / root, 0.17152 / root, 0.3])
    force = np.array([0, 0, 0.07743, -0.06979, -0.12989])
    on, free = np.arange(5) == 3, np.arange(5) == 1
    at = Block(np.arange(5), normals, base, force, np.zeros(5), on, free)
    speed, gates = np.array([0.0870627, 0, 0, 0, 0]), np.array([0, 0.3025, 0, 1, 0])
    own, number = np.arange(5) < 2, np.array([1, 1, 2, 2, 2])
    groups = decide_layers(at, Layers(own, layers, number, speed, gates), None)
    sides = {int(group.members[0]): group.side for group in groups}
    assert sides == {0: 1, 1: 0, 2: 1, 3: -1, 4: 1}


def test_certified_errors_cover_those_of_a_flow_through_kinks_of_two_layers():
    problem, weights, _ = two_layers_of_kinks(108)
    options = {"until": gflow.Time(15.0), "save": 4, "solver": diffrax.Tsit5(), **QUIET}
    flow = gflow.gradient_flow(problem, weights, rtol=1e-5, certify=True, **options)
    exact = gflow.gradient_flow(problem, weights, rtol=1e-10, **options)
    assert flow.attrs["num_joint_slides"] > 0 and set(gflow.kinks(flow).layer.values) == {1, 2}
    for name in ("norm", "alignment"):
        off, bar = np.abs(flow[name] - exact[name]).values, flow[f"{name}_error"].values
        assert np.all(off <= bar) and np.all(bar[-1] < 1e-3)


def test_a_run_ends_by_name_where_limits_part_or_no_gates_lead_on():
    # At the first descent stays on a kink that smoothed gates leave. At the second gates of a unit
    # behind two that slide are between their ends: no piece, and off by 0.6 if taken for one.
    flow = two_layers_of_kinks(39)[2]
    assert flow.attrs["status"] == "not_unique"
    assert "neuron 1 in layer 1 at point 2 is on its kink, and descent" in flow.attrs["message"]
    flow = two_layers_of_kinks(316)[2]
    assert flow.attrs["status"] == "precision_lost"
    assert "of several layers at points 0, 3 none leads on" in flow.attrs["message"]


def test_kinks_at_rest_are_told_by_the_clock_that_knows_the_time():
    # There t R is what round-off makes of it: e^16 times too large after 579 units of time.
    state = gflow.FlowState((), np.array(6e-20))
    clock, time = gflow.clocks.LogTime(), np.log(579.0)
    at = moment(clock, clock.read(-67.8, time), state, -67.8, 1)
    assert at.log_time == pytest.approx(time, rel=1e-14)
    by_risk = moment(gflow.clocks.LogRisk(), 0.0, state, -2.0, 1)
    assert by_risk.log_time == pytest.approx(np.log(6e-20) + 2, rel=1e-15)


def test_a_deep_network_of_ties_follows_descent_to_first_order():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(4, 2))
    data = gflow.Regression(np.concatenate([x, x[:1], -2 * x[1:2]]), rng.normal(size=(6, 2)))
    shapes = ((3, 2), (3, 3), (2, 3))
    weights = tuple((rng.normal(size=s) * 0.7, rng.normal(size=s[0]) * 0.3) for s in shapes)
    problem = gflow.Problem(data, gflow.MLP(slope=0.1))
    options = {"save": 2, "solver": diffrax.Tsit5(), **QUIET}
    record = gflow.gradient_flow(problem, weights, until=gflow.Time(3.0), **options)
    assert record.attrs["status"] == "reached" and record.num_kinks[-1] == 7
    assert record.num_sliding[-1] == 3
    assert record.balance_drift[-1] < LOCATED

    @jax.jit
    def descended(eta, steps):
        def step(_, w):
            log_risk, gradient = problem.log_risk_and_gradient(w)
            return jax.tree.map(lambda a, g: a - eta * jnp.exp(log_risk) * g, w, gradient)

        return jax.lax.fori_loop(0, steps, step, jax.tree.map(jnp.asarray, weights))

    def off(eta):
        found = jax.tree.leaves(descended(eta, round(3.0 / eta)))
        leaves = [record[f"final_weights_{k + 1}"].values for k in range(len(found))]
        return max(np.max(np.abs(a - b)) for a, b in zip(found, leaves, strict=True))

    assert off(1e-3) < 2e-3
    assert off(1e-4) < off(1e-3) / 5  # first order, but for the noise of its zigzag


def symmetric(seed):
    """Two points, their opposites and a small balanced start, in the shape of XOR."""
    rng = np.random.default_rng(seed)
    half, towards = rng.normal(size=(2, 3)), np.array([1, 0.5, -0.3])
    half = half * np.sign(half @ towards)[:, None] + 0.3 * towards
    data = gflow.Dataset(np.concatenate([half, -half]), np.repeat([1, -1], 2))
    w = rng.normal(size=(20, 3)) * 1e-3
    return data, (w, np.linalg.norm(w, axis=1) * rng.choice([-1, 1], 20))


@pytest.mark.parametrize("seed", [0, 1])
def test_saved_times_are_met_among_kinks_in_a_clock_that_does_not_know_them(seed):
    # A mended step may end behind a saved time (seed 1), and a kink that is to be landed on come
    # third in a step that is made shorter (seed 0).
    data, (w, a) = symmetric(seed)
    times, clock = np.linspace(0.25, 10, 40), gflow.clocks.LogRisk()
    problem, until = gflow.Problem(data, gflow.MLP()), gflow.Time(10.0)
    options = {"until": until, "save": times, "clock": clock, "max_steps": 1000, **QUIET}
    flow = gflow.gradient_flow(problem, (w, a[None]), **options)
    assert flow.attrs["status"] == "reached" and flow.num_kinks[-1] > 30
    np.testing.assert_allclose(flow.log_time[1:], np.log(times), atol=1e-9)


def test_a_small_start_on_symmetric_data_finds_the_linear_rule():
    # Lyu, Li, Wang and Arora, arXiv 2110.13905: margin (1 + slope) gamma / 4 from a small start.
    # Of a slope above zero the notebook `15_kinks` follows the flow.
    data, (w, a) = symmetric(0)
    problem = gflow.Problem(data, gflow.MLP())
    flow = gflow.gradient_flow(problem, (w, a[None]), until=gflow.LogRisk(-1e6), save=6, **QUIET)
    wanted = gflow.exact.small_start_margin(data)
    assert wanted == pytest.approx(gflow.max_margin(data).margin / 4, rel=1e-9)
    assert flow.margin[-1] == pytest.approx(wanted, rel=1e-6)
    assert gflow.verify(flow)["margin from a small start"].holds
    off = flow.assign_attrs(small_start_margin=1.001 * wanted)
    assert gflow.verify(off)["margin from a small start"].holds is False
    leaky = gflow.MLP(slope=0.1).small_start((100 * w, a[None]), data)
    assert leaky.margin == pytest.approx(1.1 * wanted)
    assert "the start is not small" in leaky.obstacles[0]
    drift = np.abs(balances(tuple(last(flow))) - balances((w, a[None])))
    assert np.max(drift) < 1e-8


def test_the_limit_of_orthogonally_separable_data_is_that_of_each_class_alone():
    # Phuong and Lampert. The margins: 3/sqrt(2), along (1, 1), of one class, sqrt(5) of the other.
    x = [[2.0, 1], [1, 2], [-1, -2]]
    data = gflow.Dataset(x, [1, 1, -1])
    wanted = 1 / (2 * (np.sqrt(2) / 3 + 1 / np.sqrt(5)))
    assert gflow.exact.small_start_margin(data) == pytest.approx(wanted, rel=1e-12)
    w = np.array([[1.0, 0], [-1, 0], [0, -1]]) * 1e-3
    known = gflow.MLP().small_start((w, np.array([[1.0, 1, -1]]) * 1e-3), data)
    assert known.margin == pytest.approx(wanted) and known.obstacles == ()
    for outer, why in [([1e-3, 1, 1], "class has no neuron"), ([1e-3, 1e-4, -1e-3], "balanced")]:
        obstacles = gflow.MLP().small_start((w, np.array([outer])), data).obstacles
        assert any(why in each for each in obstacles)
    with pytest.raises(ValueError, match=r"points 0 and 2 of one class have the cosine -0\.8"):
        gflow.exact.small_start_margin(gflow.Dataset(x, [1, 1, 1]))
    with pytest.raises(ValueError, match="not symmetric under"):
        gflow.exact.small_start_margin(data, 0.1)


@pytest.mark.parametrize("inputs", ["orthogonal", "any"])
def test_neurons_of_a_tiny_start_align_when_they_are_predicted_to(inputs):
    # Boursier, Pillaud-Vivien and Flammarion: orthogonal inputs; of any others neurons slide too.
    rng = np.random.default_rng(3)
    x = 1.3 * np.eye(4) if inputs == "orthogonal" else rng.normal(size=(4, 4))
    y = np.array([1.0, 0.5, -0.7, -0.4])
    w = rng.normal(size=(16, 4))
    weights = 1e-10 * w, 1e-10 * (np.linalg.norm(w, axis=1) * rng.choice([-1, 1], 16))[None]
    found = gflow.exact.early_alignment(x, y, weights, angle=0.1)
    moving = np.flatnonzero(np.isfinite(found.time))
    order = moving[np.argsort(found.time[moving])]
    assert len(order) >= 12 and np.max(found.num_kinks) >= 2
    problem = gflow.Problem(gflow.Regression(x, y), gflow.MLP())
    options = {"save": found.time[order], "keep_weights": True, "solver": diffrax.Tsit5(), **QUIET}
    until = gflow.Time(found.time[order[-1]] + 1)
    flow = gflow.gradient_flow(problem, weights, until=until, rtol=1e-10, **options)
    for j, turned in zip(order, flow.weights_1.values[1:], strict=False):
        cosine = turned[j] @ found.direction[j] / np.linalg.norm(turned[j])
        assert np.arccos(cosine) == pytest.approx(0.1, abs=LOCATED)
    with pytest.raises(ValueError, match=r"`weights\[1\]` of neuron 0 is smaller than the neuron"):
        gflow.exact.early_alignment(x, y, (w, 0.9 * weights[1] / 1e-10))


def test_an_output_weight_that_changes_sign_on_a_slide_leaves_two_ways():
    rng = np.random.default_rng(58)  # the first seed where that happens
    data = gflow.Dataset(rng.normal(size=(6, 2)), np.sign(rng.normal(size=6)))
    weights = rng.normal(size=(6, 2)), rng.normal(size=(1, 6)) * 0.3
    options = {"until": gflow.Time(20.0), "save": 2, "solver": diffrax.Tsit5(), **QUIET}
    none, on, off = (
        gflow.gradient_flow(gflow.Problem(data, gflow.MLP(branch=branch)), weights, **options)
        for branch in (None, "on", "off")
    )
    assert none.attrs["status"] == "not_unique"
    assert "neuron 3 in layer 1 at point 3" in none.attrs["message"]
    assert on.attrs["status"] == off.attrs["status"] == "reached"
    assert np.max(np.abs(last(on)[0] - last(off)[0])) > 1e-3


def test_units_that_slide_together_behind_a_layer_share_the_gate_that_their_lengths_now_ask_for():
    # Two points are on at one neuron of the first layer only, so that its weight at one of the
    # second puts both on their kinks; how long one normal is in units of the other changes.
    x = np.array([[1.0, 0.2], [1.0, -0.3], [-1.0, 1.5]])
    first, second = np.array([[1.0, 1.0], [-1.0, 0.1]]), np.array([[0.0, 0.7], [0.4, 0.5]])
    last = np.array([[1.3, -0.6]])
    problem = gflow.Problem(gflow.Regression(x, [-2.0, 0.3, 2.0]), gflow.MLP())
    weights = problem.check((first, second, last))
    with jax.enable_x64(True):
        bends = problem.network.kinks(weights, problem.data)
        piece = Piece(problem, bends, weights, None)
        force = np.asarray(piece.look(weights).at.force)
        stale = {2: Slide(np.array([2, 6]), np.array([1.0, 3.0]), 0.5)}  # alpha of long ago
        piece.patterns.replace(None, stale, force)
        piece.freeze()
        seen = piece.look(weights).at
    h = np.maximum(x @ first.T, 0)
    b, on = np.asarray(seen.force)[:, 2], (h @ second[0] > 0) * 1.0
    assert h[0, 1] == h[1, 1] == 0
    assert np.isclose(seen.theta[0], -(on * b) @ h[:, 0] / (b[:2] @ h[:2, 0]), rtol=1e-12)
    assert np.isclose(seen.pull[0], b[0] + b[1] * h[1, 0] / h[0, 0], rtol=1e-12)

    # At points x and -2x the neuron in front slides too: its gates differ, and what these put into
    # the normals behind it counts for its own slide.
    x = np.array([[1.0, 0.5], [-2.0, -1.0], [0.3, -1.0]])
    first, second = np.array([[0.5, -1.0], [1.0, 0.3]]), np.array([[0.8, 0.0], [0.4, 0.5]])
    problem = gflow.Problem(gflow.Regression(x, [-2.0, 0.3, 2.0]), gflow.MLP(slope=0.1))
    weights = problem.check((first, second, last))
    with jax.enable_x64(True):
        piece = Piece(problem, problem.network.kinks(weights, problem.data), weights, None)
        slides = {
            0: Slide(np.array([0, 4]), np.array([1.0, -2.0]), 0.3),
            2: Slide(np.array([2, 6]), np.array([1.0, -0.7]), 0.5),
        }
        piece.patterns.replace(None, slides, force)
        piece.freeze()
        seen = piece.look(weights).at
    b = np.asarray(seen.force)[:, 2]  # h is 1.15 and -0.23
    assert np.isclose(seen.pull[1], 0.9 * (b[0] + 0.2 * b[1]), rtol=1e-12)

"""Targets and the square loss: data, terms, flows against closed forms, and where they end."""

import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import gflow
from gflow.problem.design import OutputDesign
from gflow.problem.squared import Squared

ROUND_OFF = 1e-13
INTEGRATED = 1e-9  # what the default tolerances are to give
RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 2))  # no linear map fits
PROBLEM = gflow.Problem(gflow.Regression(X, Y))
START = gflow.init.gaussian((3, 4, 2), scale=0.5, seed=0)
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def flow():
    options = {"save": 5, "certify": True, "keep_weights": True, **QUIET}
    return gflow.gradient_flow(PROBLEM, START, until=gflow.Time(5.0), **options)


def one_mode(target, start):
    """Two layers of width one, from a product ``start``; two points with one target or two."""
    problem = gflow.Problem(gflow.Regression([[1.0], [1.0]], np.broadcast_to(target, 2)))
    return problem, (np.array([[math.sqrt(start)]]),) * 2


# ---------------------------------------------------------------------------------------------
# Data, designs and terms
# ---------------------------------------------------------------------------------------------


def test_the_outputs_of_a_linear_map_are_its_design_times_its_entries():
    w, s = RNG.normal(size=(2, 3)), RNG.normal(size=12)
    blocks = np.stack([b @ b.T for b in RNG.normal(size=(6, 2, 2))])
    h = np.zeros((12, 12))
    for i, block in enumerate(blocks):
        h[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block

    @jax.jit
    def products(x, w, s, blocks):
        design = OutputDesign(x, 2)
        few = design.chosen(jnp.asarray([4, 1]))  # two points, three features
        axes, inner = few.axes()
        grams = design.gram_of_diagonal(s), design.gram_of_blocks(blocks)
        few = few.matrix, axes, inner.matrix
        return design.matrix, design.spread(w), design.gather(s), *grams, *few

    a, spread, gathered, *grams, few, axes, inner = products(X, w.ravel(), s, blocks)
    np.testing.assert_allclose(a @ w.ravel(), (X @ w.T).ravel(), atol=ROUND_OFF)
    np.testing.assert_allclose(spread, a @ w.ravel(), atol=ROUND_OFF)
    np.testing.assert_allclose(gathered, a.T @ s, atol=ROUND_OFF)
    np.testing.assert_allclose(grams[0], a.T @ np.diag(s) @ a, atol=10 * ROUND_OFF)
    np.testing.assert_allclose(grams[1], a.T @ h @ a, atol=10 * ROUND_OFF)
    assert axes.shape == (2, 6) and inner.shape == (4, 4)
    both = [np.pad(np.asarray(axes)[:, :3], ((0, 0), (3 * k, 3 - 3 * k))) for k in range(2)]
    np.testing.assert_allclose(inner @ np.concatenate(both), few, atol=ROUND_OFF)


def test_terms_are_the_derivatives_of_the_log_risk():
    def direct(f):
        return jnp.sum((f - Y.ravel()) ** 2) / 12

    @jax.jit
    def both(f):
        terms, at_level = PROBLEM.loss.terms(f), PROBLEM.loss.terms(f - 0.3, jnp.asarray(0.3))
        gradient, hessian = jax.grad(direct)(f), jax.hessian(direct)(f)
        wanted = jnp.log(direct(f)), -gradient / direct(f), hessian / direct(f), -gradient
        found = terms.log_risk, terms.slopes, terms.curvature.gram(None)
        return (*found, PROBLEM.loss.risk_slopes(f)), wanted, at_level.slopes

    found, wanted, at_level = both(RNG.normal(size=12))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(at_level, found[1], rtol=1e-12)
    assert np.any(at_level > 0) and np.any(at_level < 0)


def test_a_fit_without_residuals_is_at_rest_and_small_targets_are_known():
    at_rest = PROBLEM.loss.terms(jnp.asarray(Y.ravel()))
    assert at_rest.log_risk == -np.inf
    assert not np.any(at_rest.slopes) and not np.any(at_rest.curvature.diagonal)
    small = Squared(1e-180 * Y).terms(jnp.zeros(12))
    assert float(small.log_risk) == pytest.approx(
        float(PROBLEM.log_risk_at_zero()) - 360 * math.log(10), rel=ROUND_OFF
    )
    np.testing.assert_allclose(1e-180 * small.slopes, PROBLEM.loss.terms(jnp.zeros(12)).slopes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.ones(5), r"`targets` has shape \(5,\) and `inputs` has 6 rows"),
        (np.ones((2, 6)), r"transposed\?"),
        (np.ones((6, 2, 2)), r"targets\.reshape\(len\(targets\), -1\)"),
        (np.where(np.arange(6) == 3, np.nan, 1.0), r"`targets\[3\]` is nan"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        gflow.Regression(X, targets)


def test_what_is_of_margins_is_refused_with_what_fits(unchecked):
    signs = gflow.datasets.two_point()
    with pytest.raises(ValueError, match=r"Logistic, .*have targets.*gflow\.Squared\(\)"):
        gflow.Problem(PROBLEM.data, loss=gflow.Logistic())
    with pytest.raises(ValueError, match=r"CrossEntropy, .*have targets.*gflow\.Squared\(\)"):
        gflow.Problem(PROBLEM.data, loss=gflow.CrossEntropy())
    with pytest.raises(ValueError, match=r"Squared, .*labels -1, \+1.*gflow\.Logistic\(\)"):
        gflow.Problem(signs, loss=gflow.Squared())
    with pytest.raises(ValueError, match=r"which no direction separates"):
        gflow.max_margin(PROBLEM.data)
    for rule in (gflow.KKT(0.1), gflow.MarginGap(0.1), gflow.Misalignment(0.1)):
        with pytest.raises(ValueError, match=r"the data have targets\. Choose another rule"):
            gflow.gradient_flow(PROBLEM, START, until=rule)
    with pytest.raises(ValueError, match=r"2 rows, an output for each column of the targets"):
        gflow.gradient_flow(PROBLEM, gflow.init.gaussian((3, 4, 1)), until=gflow.Time(1.0))
    scalar = gflow.Problem(PROBLEM.data, gflow.Network(lambda w, x: jnp.dot(w, x)))
    with pytest.raises(ValueError, match=r"as many outputs as a point has targets, shape \(2,\)"):
        gflow.gradient_flow(scalar, np.ones(3), until=gflow.Time(1.0))
    with pytest.raises(ValueError, match=r"R = 0: every output is its target"):
        gflow.gradient_flow(one_mode(1.0, 1.0)[0], (np.eye(1),) * 2, until=gflow.Time(1.0))


# ---------------------------------------------------------------------------------------------
# Flows
# ---------------------------------------------------------------------------------------------


def test_a_flow_is_that_of_an_independent_integrator(flow):
    def field(_, z):
        first, second = z[:12].reshape(4, 3), z[12:].reshape(2, 4)
        slope = (X @ (second @ first).T - Y).T @ X / 6
        return -np.concatenate([(second.T @ slope).ravel(), (slope @ first.T).ravel()])

    z0 = np.concatenate([w.ravel() for w in START])
    sol = solve_ivp(field, (0, 5), z0, method="DOP853", rtol=1e-12, atol=1e-13)
    assert flow.attrs["status"] == "reached"
    final = [flow[f"final_weights_{k}"].values.ravel() for k in (1, 2)]
    np.testing.assert_allclose(np.concatenate(final), sol.y[:, -1], atol=INTEGRATED)


def test_a_record_of_targets_holds_what_they_have(flow):
    last, w = flow.isel(point=-1), flow.end_to_end.values
    assert flow.end_to_end.dims == ("point", "output", "coordinate")
    best = np.linalg.lstsq(X, Y, rcond=None)[0].T
    distance = np.linalg.norm(w - best, axis=(1, 2)) / np.linalg.norm(best)
    np.testing.assert_allclose(flow.solution_distance, distance, rtol=1e-12)
    values = [np.linalg.svd(flow[f"weights_{k}"].values[-1])[1] for k in (1, 2)]
    np.testing.assert_allclose(last.singular_values, np.stack([v[:2] for v in values]))
    np.testing.assert_allclose(last.end_to_end_values, np.linalg.svd(w[-1])[1])
    assert not {"margin", "min_margin", "kkt_residual", "separable"} & {*flow, *flow.attrs}
    assert float(flow.imbalance_drift.max()) < 1e-10 and float(flow.clock_error.max()) < INTEGRATED
    assert all(claim.holds is not False for claim in gflow.verify(flow))
    assert "digits certain" in repr(flow)


def test_a_record_is_drawn_with_what_it_has(flow):
    import matplotlib.pyplot as plt

    axes = gflow.plot.summary(flow)
    assert axes[0, 0].lines and axes[0, 1].lines  # risk and norms
    plt.close("all")


def test_a_saved_record_comes_back(flow, tmp_path):
    gflow.save(flow, tmp_path / "flow.nc")
    assert gflow.load(tmp_path / "flow.nc").identical(flow)


def test_members_of_an_ensemble_are_the_flows_by_themselves(flow):
    starts = [START, gflow.init.gaussian((3, 4, 2), scale=0.5, seed=1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    found = gflow.ensemble(PROBLEM, stacked, until=gflow.Time(5.0), save=5, **QUIET)
    assert found.status.values.tolist() == ["reached"] * 2
    np.testing.assert_allclose(found.end_to_end[0], flow.end_to_end, atol=ROUND_OFF)


def test_a_network_that_computes_the_same_flows_the_same(flow):
    network = gflow.Network(lambda w, x: w[1] @ (w[0] @ x), homogeneity=2)
    problem = gflow.Problem(PROBLEM.data, network)
    found = gflow.gradient_flow(problem, START, until=gflow.Time(5.0), save=5, **QUIET)
    assert {"norm", "log_risk"} <= set(found) and "margin" not in found
    np.testing.assert_allclose(found.log_risk, flow.log_risk, atol=INTEGRATED)
    np.testing.assert_allclose(found.final_weights_1, flow.final_weights_1, atol=INTEGRATED)


# Both follow widths 4, 3, 2 on whitened inputs, and share their programs.


def whitened(target):
    return gflow.Problem(gflow.Regression(2.0 * np.eye(4), 2.0 * target.T))


def test_implicit_steps_meet_the_riccati_equation():
    # lambda-balanced, K < hidden < d: W_2^T W_2 - W_1 W_1^T = -0.4 I.
    q, second = np.linalg.qr(RNG.normal(size=(4, 4)))[0][:3], 0.3 * RNG.normal(size=(2, 3))
    values, vectors = np.linalg.eigh(second.T @ second + 0.4 * np.eye(3))
    weights, target = (vectors * np.sqrt(values) @ vectors.T @ q, second), RNG.normal(size=(2, 4))
    options = {"save": np.array([1.0, 3.0, 6.0]), "solver": gflow.GaussNewton(), **QUIET}
    found = gflow.gradient_flow(whitened(target), weights, until=gflow.Time(6.0), **options)
    truth = gflow.exact.two_layer_riccati([1.0, 3.0, 6.0], target=target, weights=weights)
    np.testing.assert_allclose(found.end_to_end[1:], truth.end_to_end, atol=INTEGRATED)


def test_long_after_convergence_implicit_steps_stand_still():
    # Rotated modes of strengths 10 and 0.1 with known sigmoids.
    left, right = np.linalg.qr(RNG.normal(size=(2, 2)))[0], np.linalg.qr(RNG.normal(size=(4, 2)))[0]
    modes, times = np.array([10.0, 0.1]), np.array([1.0, 30.0, 1e4])
    weights = np.zeros((3, 4)), np.zeros((2, 3))
    weights[0][:2], weights[1][:, :2] = 0.1 * right.T, 0.1 * left
    problem = whitened((left * modes) @ right.T)
    found = gflow.gradient_flow(problem, weights, until=gflow.Time(1e4), save=times, **QUIET)
    assert found.attrs["solver"] == "Dopri8, then GaussNewton"
    assert int(found.num_steps[-1]) < 150
    sigmoids = [
        gflow.exact.square_loss_mode(times, target=s, start=0.01, depth=2).end_to_end.ravel()
        for s in modes
    ]
    wanted = np.einsum("ik,kt,jk->tij", left, sigmoids, right)
    np.testing.assert_allclose(found.end_to_end[1:], wanted, atol=10 * INTEGRATED)
    assert float(found.solution_distance[-1]) < 1e-14


# ---------------------------------------------------------------------------------------------
# Plateaus, and the end of float64
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.05, 1e-15, 1e-100, 1e-200])
def test_a_plateau_costs_its_logarithm_and_ends_in_time(start):
    target = 1.7
    half = math.log(target / start - 1) / (2 * target)  # u = s/2, of Saxe's sigmoid
    problem, weights = one_mode(target, start)
    until = gflow.LogTime(math.log(half + 2))
    found = gflow.gradient_flow(problem, weights, until=until, save=[math.log(half)], **QUIET)
    truth = gflow.exact.square_loss_mode([half, half + 2], target=target, start=start, depth=2)
    product, wanted = found.end_to_end.values[1:, 0], np.ravel(truth.end_to_end)
    # An error of the time, relative to half, is one of 2 s half times as much at half height.
    np.testing.assert_allclose(product, wanted, rtol=2 * target * half * INTEGRATED)
    assert int(found.num_steps[-1]) < 60 - 1.3 * math.log(start)


@pytest.mark.parametrize("start", [1e-100, 1e-300])
def test_small_modes_keep_their_digits_over_the_plateaus_of_the_modes_before(start):
    # The first mode limits explicit steps on the second plateau, which is no reason to hand over.
    sizes = np.array([5.0, 3.0, 1.2])
    scaled = math.sqrt(3.0)
    problem = gflow.Problem(gflow.Regression(scaled * np.eye(3), scaled * np.diag(sizes)))
    weights = (math.sqrt(start) * np.eye(3),) * 2
    found = gflow.gradient_flow(problem, weights, until=gflow.Saddle(3), save=[1, 2], **QUIET)
    wanted = gflow.exact.saddle_times(sizes, start, depth=2)
    np.testing.assert_allclose(np.exp(found.log_time[1:]), wanted, rtol=1e-9)
    assert found.attrs["solver"] == "Dopri8"
    assert int(found.num_steps[-1]) < -2.5 * math.log(start)


def test_a_plateau_whose_end_is_below_the_resolution_of_the_time_ends_with_that_word():
    # It lasts u0^(-1/3)/s = 6e19 and is left in about 1.
    problem, _ = one_mode(1.7, 1.0)
    options = {"until": gflow.LogTime(46.0), "save": 2, **QUIET}
    found = gflow.gradient_flow(problem, (np.full((1, 1), 1e-20),) * 3, **options)
    assert found.attrs["status"] == "precision_lost"
    assert "less time than float64 can tell" in found.attrs["message"]
    assert float(found.log_time[-1]) == pytest.approx(math.log(1e20 / 1.7), rel=1e-8)


def test_the_length_of_the_path_leads_over_a_plateau_of_any_length():
    # The same, and one of 1e67: its escape, at the time of the closed form, costs the logarithm.
    problem, _ = one_mode(1.7, 1.0)
    for power in (-60, -200):
        layer = 10.0 ** (power / 3)
        options = {"clock": gflow.clocks.PathLength(layer), "save": 2, **QUIET}
        found = gflow.gradient_flow(
            problem, (np.full((1, 1), layer),) * 3, until=gflow.Saddle(1), **options
        )
        assert found.attrs["status"] == "reached"
        wanted = gflow.exact.saddle_times([1.7], 10.0**power, depth=3)[0]
        assert float(found.log_time[-1]) == pytest.approx(math.log(wanted), abs=1e-8)
        assert int(found.num_steps[-1]) < 20 + 1.7 * abs(power)
    with pytest.raises(ValueError, match=r"`scale` is 0"):
        gflow.clocks.PathLength(0)
    with pytest.raises(ValueError, match=r"`certify` is true, and `clock` is PathLength"):
        gflow.gradient_flow(problem, START, until=gflow.Time(1.0), certify=True, **options)


def test_a_risk_that_float64_cannot_show_ends_with_that_word():
    problem, weights = one_mode(1.7, 0.05)
    found = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-200.0), save=3, **QUIET)
    assert found.attrs["status"] == "precision_lost"
    assert "round-off of float64 outputs" in found.attrs["message"]
    # Residuals of 1e-14 of the target.
    relative = float(found.log_risk[-1] - problem.log_risk_at_zero()) / math.log(10)
    assert -29 < relative < -27
    assert float(found.clock_error.max()) < INTEGRATED


def test_a_clock_of_risk_follows_the_risk_and_knows_the_time():
    problem, weights = one_mode(1.7, 0.05)
    clock = gflow.clocks.LogRisk()
    until = gflow.LogRisk(-20.0)
    found = gflow.gradient_flow(problem, weights, until=until, clock=clock, save=4, **QUIET)
    wanted = np.sqrt(2 * np.exp(found.log_risk.values[1:]))
    np.testing.assert_allclose(1.7 - found.end_to_end.values[1:, 0], wanted, rtol=1e-9)
    truth = gflow.exact.square_loss_mode(
        np.exp(found.log_time.values[1:]), target=1.7, start=0.05, depth=2
    )
    np.testing.assert_allclose(found.end_to_end.values[1:, 0], truth.end_to_end.ravel(), rtol=1e-9)


def test_a_risk_below_the_least_of_linear_maps_is_not_waited_for():
    problem, weights = one_mode([2.2, 1.2], 0.05)
    found = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-5.0), save=3, **QUIET)
    assert found.attrs["status"] == "stalled"
    assert "least of all linear maps of rank 1 or less" in found.attrs["message"]
    assert float(found.log_risk[-1]) == pytest.approx(math.log(0.125), abs=2e-9)


def test_the_least_risk_of_a_rank_is_that_of_the_projected_targets():
    u, s, vt = np.linalg.svd(X @ np.linalg.lstsq(X, Y, rcond=None)[0])
    for rank in (1, 2):
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        least = math.log(np.sum((best - Y) ** 2) / 12)
        assert PROBLEM.loss.least_log_risk_of(PROBLEM.data, rank) == pytest.approx(least, abs=1e-12)


# ---------------------------------------------------------------------------------------------
# Descent
# ---------------------------------------------------------------------------------------------


def test_descent_takes_the_steps_of_an_obvious_loop():
    descent = gflow.gradient_descent(
        PROBLEM, START, optax.sgd(0.05), until=gflow.Steps(20), save=2, **QUIET
    )
    first, second = (np.array(w) for w in START)
    for _ in range(20):
        slope = (X @ (second @ first).T - Y).T @ X / 6
        first, second = first - 0.05 * second.T @ slope, second - 0.05 * slope @ first.T
    np.testing.assert_allclose(descent.final_weights_1, first, atol=1e-14)
    np.testing.assert_allclose(descent.final_weights_2, second, atol=1e-14)


def test_mini_batches_keep_points_and_targets_together():
    # Where every point is fitted no batch has a slope.
    fitted = gflow.Problem(gflow.Regression(X, X @ (START[1] @ START[0]).T))
    options = {"until": gflow.Steps(6), "batch_size": 2, "seed": 0, "save": 2, **QUIET}
    near = (START[0], START[1] + 1e-9)
    descent = gflow.gradient_descent(fitted, near, optax.sgd(0.05), **options)
    np.testing.assert_allclose(descent.final_weights_2, START[1], atol=2e-9)


# ---------------------------------------------------------------------------------------------
# Descent against flows
# ---------------------------------------------------------------------------------------------


def test_descent_follows_the_flow_and_the_modified_flows_at_their_orders():
    measured = gflow.ladder(PROBLEM, START, [0.02, 0.04], 1.0)
    np.testing.assert_allclose(measured.order, [1, 2, 3], atol=0.03)


def test_implicit_steps_follow_a_modified_flow_of_several_outputs():
    options = {"until": gflow.Time(2.0), "save": 2, "modified": gflow.ModifiedEquation(0.05)}
    ends = [
        gflow.gradient_flow(PROBLEM, START, solver=solver, **options, **QUIET).end_to_end[-1]
        for solver in (diffrax.Dopri8(), gflow.GaussNewton())
    ]
    np.testing.assert_allclose(ends[1], ends[0], atol=INTEGRATED)

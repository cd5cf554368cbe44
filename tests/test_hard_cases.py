"""Starts and data at the edge: each ends right, or says why not."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

import gflow
from gflow.dynamics.drive.standstill import why_stalled

ONE = gflow.Problem(
    gflow.Dataset(np.array([[0.6, 0.8]]), np.array([1.0])), loss=gflow.Exponential()
)
PLANE = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)


def plane(data):
    """A problem of the one shape that most cases share, here and in other files."""
    inputs, labels = (
        np.resize(array, (20, *array.shape[1:])) for array in (data.inputs, data.labels)
    )
    return gflow.Problem(gflow.Dataset(inputs, labels, name="plane"), loss=gflow.Exponential())


def follow(problem, start, to=-100.0, **options):
    start = gflow.init.admissible(start, problem)
    return gflow.gradient_flow(problem, start, until=gflow.LogRisk(to), save=20, **options)


def check(flow, rtol=1e-9):
    """What no exact flow breaks."""
    assert flow.attrs["status"] == "reached", flow.attrs["message"]
    assert not gflow.verify(flow).failed, str(gflow.verify(flow))
    assert flow.clock_error.max() < 1e3 * rtol and flow.imbalance_drift.max() < 1e3 * rtol
    assert np.isfinite(flow.margin[1:]).all() and np.isfinite(flow.log_time[1:]).all()


@pytest.mark.parametrize("depth", [2, 3])
def test_the_plateau_of_a_tiny_start_is_as_long_as_its_closed_form(depth):
    size = 1e-12  # of the end-to-end vector; |z| = 1
    start = gflow.init.balanced((2, *[2] * (depth - 1), 1), end_to_end=size * np.array([0.6, 0.8]))
    flow = gflow.gradient_flow(ONE, start, until=gflow.LogRisk(-100), save=[-1.0, -10.0])
    assert flow.attrs["status"] == "reached"
    w = flow.end_to_end.values[1:]
    truth = gflow.exact.one_datum_balanced(
        np.array([0.6, 0.8]), size, depth=depth, log_risk=flow.log_risk.values[1:]
    )
    np.testing.assert_allclose(flow.log_time[1:], truth.log_time, rtol=1e-8)
    np.testing.assert_allclose(w, truth.end_to_end, rtol=1e-8)
    plateau = np.log(1 / size) / 2 if depth == 2 else size ** -(1 / 3)
    np.testing.assert_allclose(np.exp(flow.log_time[1]), plateau, rtol=0.2 if depth == 2 else 1e-3)
    assert flow.misalignment.max() < 1e-15 and flow.imbalance_drift.max() < 1e-9


def test_a_tie_of_singular_values_is_marked_and_the_flow_goes_on():
    flow = follow(plane(PLANE), (np.eye(3, 2), np.full((1, 3), 0.5)))
    check(flow)
    assert np.isnan(flow.misalignment[0]).all()  # undefined at the tie, and nowhere after it
    assert np.isfinite(flow.misalignment[1:]).all()
    assert np.isfinite(flow.direction_error).all()


def test_a_rule_on_misalignment_counts_a_tie_as_unaligned():
    problem = plane(PLANE)
    start = gflow.init.admissible((np.eye(3, 2), np.full((1, 3), 0.5)), problem)
    flow = gflow.gradient_flow(problem, start, until=gflow.Misalignment(1e-3), save=3)
    assert flow.attrs["status"] == "reached"
    np.testing.assert_allclose(flow.misalignment[-1, 0], 1e-3, rtol=1e-6)


DATA = {
    "duplicates": gflow.Dataset(np.tile([[0.6, 0.3]], (20, 1)), np.ones(20)),
    "collinear": gflow.Dataset(np.outer(np.linspace(0.2, 1.0, 20), [0.6, 0.3]), np.ones(20)),
    "one class": gflow.Dataset(PLANE.signed_inputs, np.ones(20)),
}


@pytest.mark.parametrize("name", DATA)
def test_data_in_a_special_position_are_followed(name):
    flow = follow(plane(DATA[name]), gflow.init.gaussian((2, 3, 1), seed=0))
    check(flow)
    np.testing.assert_allclose(flow.margin[-1], flow.attrs["max_margin"], rtol=0.05)


@pytest.mark.parametrize("scales", [(1e-8, 1e8), (1e8, 1e-8), (1e-6, 1e-6)])
def test_layers_of_very_different_scale_are_followed(scales):
    start = gflow.init.gaussian((2, 3, 1), seed=3)
    flow = follow(plane(PLANE), tuple(a * matrix for a, matrix in zip(scales, start, strict=True)))
    check(flow)


def test_a_start_above_the_risk_at_zero_reaches_a_saddle_or_passes_it():
    problem = plane(DATA["duplicates"])
    z = problem.data.signed_inputs[0]
    into = (
        np.stack([-z, 0 * z, 0 * z]),
        np.array([[np.linalg.norm(z), 0.0, 0.0]]),
    )  # balanced, uphill
    with pytest.warns(UserWarning, match=r"R\(W\(0\)\)"):
        flow = gflow.gradient_flow(problem, into, until=gflow.LogRisk(-100), save=5)
    assert flow.attrs["status"] == "stalled" and "saddle" in flow.attrs["message"]
    past = (into[0] + np.array([[0.0, 0.0], [0.1, 0.2], [0.0, 0.0]]), into[1])
    with pytest.warns(UserWarning, match=r"R\(W\(0\)\)"):
        flow = gflow.gradient_flow(problem, past, until=gflow.LogRisk(-100), save=5)
    assert flow.attrs["status"] == "reached"


def test_almost_inseparable_data_are_followed_within_what_float64_holds():
    data = gflow.datasets.separable(n=20, d=2, margin=1e-8, seed=0)
    start = gflow.init.gaussian((2, 3, 1), seed=0)
    flow = follow(plane(data), start, to=-1e4, rtol=1e-7)
    assert flow.attrs["status"] == "reached"  # in split coordinates once every margin exceeds 1
    assert flow.attrs["hand_over"] == "made" and flow.attrs["hand_over_log_risk"] > -100
    np.testing.assert_allclose(flow.margin[-1], flow.attrs["max_margin"], rtol=1e-3)
    tight = follow(plane(data), start, to=-1e4)
    assert tight.attrs["status"] == "precision_lost"
    assert "almost not separable" in tight.attrs["message"] and "`rtol`" in tight.attrs["message"]


def test_one_layer_of_more_dimensions_than_points_keeps_what_no_point_sees():
    rng = np.random.default_rng(0)
    data = gflow.Dataset(rng.normal(size=(2, 5)), np.array([1.0, -1.0]))
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = 0.1 * rng.normal(size=(1, 5))
    flow = follow(problem, (start,))
    check(flow)
    unseen = np.linalg.svd(data.inputs)[2][2:]
    np.testing.assert_allclose(
        unseen @ flow.end_to_end.values[-1],
        unseen @ flow.initial_weights_1.values[0],
        atol=1e-10,
    )


def test_thirty_two_layers_of_width_one_in_one_dimension_follow_the_closed_form():
    problem = gflow.Problem(gflow.Dataset([[0.8]], [1.0]), loss=gflow.Exponential())
    start = gflow.init.balanced((1,) * 33, end_to_end=[0.3])
    flow = gflow.gradient_flow(
        problem,
        start,
        until=gflow.LogRisk(-20),
        save=3,
        solver=diffrax.Tsit5(),  # of the solvers the one that compiles fastest
    )
    assert flow.attrs["status"] == "reached"
    truth = gflow.exact.one_datum_balanced(
        np.array([0.8]), 0.3, depth=32, log_risk=flow.log_risk.values[1:]
    )
    np.testing.assert_allclose(flow.log_time[1:], truth.log_time, rtol=1e-7)
    np.testing.assert_allclose(flow.end_to_end[1:], truth.end_to_end, rtol=1e-7)


def test_a_hundred_thousand_points_are_followed():
    data = gflow.datasets.separable(n=100_000, d=2, margin=0.2, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    check(follow(problem, (np.array([[0.1, -0.2]]),), to=-20.0))


def test_a_kink_of_the_network_is_named():
    def relu(weights, x):
        return weights[1] @ jnp.maximum(weights[0] @ x, 0.0)

    problem = gflow.Problem(PLANE, network=gflow.Network(relu, homogeneity=2.0))
    u = PLANE.max_margin().direction
    start = (np.stack([u, -u]), np.array([1.0, -1.0]))
    field = gflow.FlowField(problem, gflow.clocks.LogRisk())
    reason = why_stalled(field, start, first_slope=1.0, rtol=1e-9)
    assert reason.status == "precision_lost" and "kink" in reason.message


# -------------------------------------------------------------------------------------------------
# Tolerance in function space
# -------------------------------------------------------------------------------------------------

FUNCTION_RTOL = 1e-5


@pytest.mark.parametrize("scales", [(0.0, 1e4), (1e-6, 1e3), (1e8, 1e-8)])
def test_in_function_space_margins_and_direction_are_right_to_the_tolerance(scales):
    problem = plane(PLANE)
    start = gflow.init.gaussian((2, 3, 1), seed=1)
    start = tuple(a * matrix for a, matrix in zip(scales, start, strict=True))
    truth = follow(problem, start, to=-30.0, rtol=1e-12)
    # An explicit solver's error is that of its tolerance; GaussNewton's is far below.
    flow = follow(
        problem, start, to=-30.0, rtol=FUNCTION_RTOL, function_space=True, solver=diffrax.Tsit5()
    )
    found, true = flow.end_to_end.values[1:], truth.end_to_end.values[1:]

    def unit(w):
        return w / np.linalg.norm(w, axis=1, keepdims=True)

    assert np.abs(unit(found) - unit(true)).max() < FUNCTION_RTOL
    assert np.abs(flow.margin - truth.margin)[1:].max() < FUNCTION_RTOL
    assert flow.attrs["function_space"] == 1


def test_a_function_space_tolerance_has_no_absolute_part():
    with pytest.raises(ValueError, match="`atol`"):
        follow(plane(PLANE), gflow.init.gaussian((2, 3, 1)), atol=1e-9, function_space=True)


# -- why a flow stalls ----------------------------------------------------------------------------


def stalled(problem, start, first_slope):
    """What is said of a flow that stands at ``start`` and cannot go on."""
    return why_stalled(gflow.FlowField(problem, gflow.clocks.LogRisk()), start, first_slope, 1e-9)


def test_a_network_in_single_precision_is_not_called_a_saddle():
    def single(w, x):
        return (w.astype(jnp.float32) @ x.astype(jnp.float32)).astype(jnp.float64)

    network = gflow.Network(single)
    problem = gflow.Problem(PLANE, network=network)
    end = stalled(problem, np.ones(2), 0.2)
    assert end.status == "precision_lost"
    assert "computes in float32" in end.message and "saddle" not in end.message


@pytest.mark.parametrize(
    ("weights", "data", "first_slope"), [(1e-80, 1.0, 1e-80), (1.0, 1e-30, 1e-30)]
)
def test_a_risk_that_is_that_of_zero_to_all_digits_is_told(weights, data, first_slope):
    problem = gflow.Problem(gflow.Dataset(data * PLANE.inputs, PLANE.labels))
    start = tuple(weights * layer for layer in gflow.init.gaussian((2, 3, 1), seed=0))
    end = stalled(problem, start, first_slope)
    assert "below float64's round-off beside R(0)" in end.message and "saddle" not in end.message
    assert "data.scaled()" in end.message


def test_a_slope_that_has_vanished_at_the_level_of_zero_is_a_saddle():
    start = tuple(1e-12 * layer for layer in gflow.init.gaussian((2, 3, 1), seed=0))
    end = stalled(gflow.Problem(PLANE), start, 1.0)
    assert end.status == "stalled" and "running into a saddle" in end.message


def test_a_gradient_whose_square_underflows_is_not_called_zero():
    start = tuple(1e-200 * layer for layer in gflow.init.gaussian((2, 3, 1), seed=0))
    with pytest.raises(ValueError, match=r"gradient of log R of size .*e-20., whose square"):
        gflow.gradient_flow(gflow.Problem(PLANE), start, until=gflow.LogRisk(-1))

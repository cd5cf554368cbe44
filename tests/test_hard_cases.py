"""Starts and data at the edge: each ends right, or says why not."""

import numpy as np
import pytest

import gflow

ONE = gflow.Problem(
    gflow.Dataset(np.array([[0.6, 0.8]]), np.array([1.0])), loss=gflow.Exponential()
)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_plateau_of_a_tiny_start_is_as_long_as_its_closed_form(depth):
    size = 1e-12  # of the end-to-end vector; |z| = 1
    start = gflow.init.balanced((2, *[2] * (depth - 1), 1), end_to_end=size * np.array([0.6, 0.8]))
    flow = gflow.gradient_flow(ONE, start, until=gflow.LogRisk(-100), save=[-1.0, -10.0])
    assert flow.attrs["status"] == "reached"
    plateau = np.log(1 / size) / 2 if depth == 2 else size ** -(1 / 3)
    np.testing.assert_allclose(np.exp(flow.log_time[1]), plateau, rtol=0.2 if depth == 2 else 1e-3)
    assert flow.misalignment.max() < 1e-15 and flow.imbalance_drift.max() < 1e-9


def test_a_tie_of_singular_values_is_marked_and_the_flow_goes_on():
    data = gflow.datasets.separable(n=12, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    flow = gflow.gradient_flow(
        problem,
        gflow.init.admissible((np.eye(2), np.full((1, 2), 0.5)), problem),
        until=gflow.LogRisk(-100),
        save=5,
    )
    assert flow.attrs["status"] == "reached"
    assert np.isnan(flow.misalignment[0]).all()  # undefined at the tie, and nowhere after it
    assert np.isfinite(flow.misalignment[1:]).all()
    assert np.isfinite(flow.direction_error).all()


def test_a_rule_on_misalignment_counts_a_tie_as_unaligned():
    data = gflow.datasets.separable(n=12, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.admissible((np.eye(2), np.full((1, 2), 0.5)), problem)
    flow = gflow.gradient_flow(problem, start, until=gflow.Misalignment(1e-3), save=3)
    assert flow.attrs["status"] == "reached"
    np.testing.assert_allclose(flow.misalignment[-1, 0], 1e-3, rtol=1e-6)

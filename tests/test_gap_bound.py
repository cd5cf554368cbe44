"""The bound against its closed form and above the gap that descent shows."""

import numpy as np
import optax
import pytest

import gflow

DATUM = np.array([0.6, 0.5, -0.3])
TIME, RATE = 6.0, 0.02

# A hundred times the tolerance.
CLOSE = 1e-6


def test_the_bound_of_one_datum_has_a_closed_form():
    # Convex: no growth. |H grad R| = R^2 |z|^3 and dR/dt = -R^2 |z|^2: b = |z| (R(0) - R(t))/2.
    problem = gflow.Problem(gflow.Dataset([DATUM], [1]), loss=gflow.Exponential())
    found = gflow.gap_bound(problem, (0.3 * DATUM[None],), np.log([0.5, 3.0, 1e6]))
    size = np.linalg.norm(DATUM)
    before = np.exp(-0.3 * size**2)
    after = 1 / (1 / before + size**2 * np.exp(found.log_time))
    np.testing.assert_allclose(found.bound, size / 2 * (before - after), rtol=CLOSE)
    np.testing.assert_allclose(found.growth, 0.0, atol=1e-15)
    assert found.attrs["status"] == "reached"
    np.testing.assert_allclose(found.uniform_bound, found.bound, rtol=CLOSE)


@pytest.fixture(scope="module")
def deep():
    """A network of two layers near its saddle, where the curvature is negative."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.balanced((2, 3, 1), end_to_end=0.02 * data.max_margin().direction)
    steps = round(TIME / RATE)
    descent = gflow.gradient_descent(
        problem, weights, optax.sgd(RATE), until=gflow.Steps(steps),
        save=np.linspace(steps / 10, steps, 10), keep_weights=True,
    )  # fmt: skip
    times = descent.log_time.values[1:]
    flow = gflow.gradient_flow(
        problem, weights, until=gflow.LogTime(float(times[-1])), save=times, keep_weights=True
    )
    return gflow.compare(flow, descent).isel(point=slice(1, None)), gflow.gap_bound(
        problem, weights, times
    )


def test_the_gap_stays_below_the_bound_and_the_bound_near_the_gap(deep):
    gaps, found = deep
    gap = np.sqrt((gaps.weights_gap**2).sum("layer")).values
    assert np.all(gap < RATE * found.bound) and np.all(found.bound <= found.uniform_bound)
    assert RATE * found.bound[0] < 1.5 * gap[0] and RATE * found.bound[-1] < 30 * gap[-1]
    assert found.growth[-1] > 0.1 and np.all(np.diff(found.growth) >= 0)


def test_malformed_times_are_refused():
    problem = gflow.Problem(gflow.datasets.one_datum(), loss=gflow.Exponential())
    weights = (0.1 * np.ones((1, 3)),)
    with pytest.raises(ValueError, match="`log_times` is not increasing"):
        gflow.gap_bound(problem, weights, np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match="`log_times` has shape"):
        gflow.gap_bound(problem, weights, np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="`rtol` is 2"):
        gflow.gap_bound(problem, weights, np.array([1.0]), rtol=2)

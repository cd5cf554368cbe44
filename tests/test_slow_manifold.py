"""The flow past float64's wall, against independent integrators, closed forms and invariants."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gflow
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.slow_manifold import (
    ManifoldError,
    SlowManifold,
    difference,
)
from gflow.problem import observables as plain

LSODA = 1e-8  # what LSODA at rtol 1e-11 and the split coordinates at 1e-9 agree to
SOLVER = 1e-8  # a run at rtol 1e-9, several factors of its tolerance
ROUND_OFF = 1e-12


def separable(n, d, seed, gap=0.1):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    points = []
    while len(points) < n:
        x = rng.uniform(-1, 1, size=d) / np.sqrt(d)
        if abs(x @ direction) > gap:
            points.append(x * np.sign(x @ direction))
    return np.array(points)


def problem_of(points, loss=None):
    data = gflow.Dataset(points, np.ones(len(points)))
    return gflow.Problem(data, loss=loss or gflow.Exponential())


def end_to_end(weights):
    w = weights[-1]
    for matrix in weights[-2::-1]:
        w = w @ matrix
    return w[0]


def log_risk(points, weights):
    margins = points @ end_to_end(weights)
    return float(np.log(np.mean(np.exp(margins.min() - margins))) - margins.min())


def reference_flow(points, weights, s_end, rtol=1e-11):
    """LSODA on the weights themselves, exponential loss, in the clock -log R."""
    shapes = [matrix.shape for matrix in weights]
    cuts = np.cumsum([matrix.size for matrix in weights])[:-1]

    def unpack(flat):
        pieces = np.split(flat, cuts)
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def field(_, flat):
        layers = unpack(flat)
        lefts = [np.ones(1)]
        for matrix in reversed(layers):
            lefts.append(lefts[-1] @ matrix)
        lefts = lefts[::-1]
        margins = points @ lefts[0]
        p = np.exp(margins.min() - margins)
        right = (p / p.sum()) @ points
        parts = []
        for left, matrix in zip(lefts[1:], layers, strict=True):
            parts.append(np.outer(left, right).ravel())
            right = matrix @ right
        v = np.concatenate(parts)
        return v / (v @ v)

    flat = np.concatenate([matrix.ravel() for matrix in weights])
    span = (-log_risk(points, weights), s_end)
    found = solve_ivp(field, span, flat, method="LSODA", rtol=rtol, atol=1e-12)
    return unpack(found.y[:, -1])


def gaussian(points, widths, seed):
    """A Gaussian start with R(W) < R(0)."""
    rng = np.random.default_rng(seed)
    while True:
        weights = [rng.normal(size=(b, a)) / np.sqrt(a) for a, b in pairwise(widths)]
        for sign in (1.0, -1.0):
            weights[-1] = sign * weights[-1]
            if log_risk(points, weights) < -0.05:
                return weights


def early(points, widths, seed, s=30.0):
    return reference_flow(points, gaussian(points, widths, seed), s)


def largest_relative(a, b):
    return max(np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(a, b, strict=True))


def bounded_drift(state):
    """The largest change of the bounded blocks of a conserved matrix, relative to its size."""
    views, layers = state.layout.views(state.slow), state.layers
    worst = 0.0
    for k, (lower, upper) in enumerate(pairwise(layers), start=1):
        basis = views["frame", k]
        start = basis.T @ state.imbalance[k - 1] @ basis
        side = upper.rest.T @ upper.below - lower.sigma * lower.below - start[1:, 0]
        block = upper.rest.T @ upper.rest - lower.rest @ lower.rest.T
        block -= np.outer(lower.below, lower.below) + start[1:, 1:]
        change = np.sqrt(2 * np.sum(side**2) + np.sum(block**2))
        worst = max(worst, float(change / max(np.linalg.norm(start), 1e-300)))
    return worst


def states_at(problem, weights, log_risk, log_time, targets):
    """The states at each target, in order."""
    solver = SlowManifold()
    states = [solver.start(problem, weights, log_risk=log_risk, log_time=log_time)]
    for target in targets:
        states.append(solver.advance(states[-1], target))
    return states[1:]


@pytest.fixture(scope="module")
def planar():
    points = separable(100, 2, 0)
    weights = early(points, (2, 10, 10, 10, 1), 0)
    return problem_of(points), weights


@pytest.fixture(scope="module")
def far(planar):
    problem, weights = planar
    targets = [-1e4, -1e6, -1e10, -1e16, -1e30, -1e100]
    return states_at(
        problem, weights, log_risk(problem.data.signed_inputs, weights), -np.inf, targets
    )


def test_split_coordinates_represent_the_weights_exactly(planar):
    problem, weights = planar
    state = SlowManifold().start(problem, weights)
    assert largest_relative(state.weights(), weights) < ROUND_OFF


def test_observables_agree_with_the_plain_ones_where_both_hold(planar):
    problem, weights = planar
    state = SlowManifold().start(problem, weights)
    found = observables(state)
    reference = plain.Reference.of(problem.data.max_margin(), problem, tuple(weights))
    expected = plain.standard(problem, tuple(weights), reference)
    for name, value in found.items():
        scale = np.maximum(np.abs(np.asarray(expected[name])), 1e-3)
        assert np.max(np.abs(value - np.asarray(expected[name])) / scale) < 1e-10, name


CASES = {
    "deep": ((5, 4, 6, 1), separable(30, 5, 3), 0),
    "six layers": ((3, 3, 4, 3, 4, 3, 1), separable(30, 3, 4), 1),
    "two layers, support does not span": ((6, 4, 1), separable(12, 6, 5), 2),
    "width one": ((2, 1, 1, 1), separable(20, 2, 6), 3),
    "one layer": ((4, 1), separable(30, 4, 7), 4),
    "a point that enters late": (
        (2, 3, 3, 1),
        np.array([[1.0, 0.5], [1.0, -0.5], [1.03, -1.1], [2.0, 0.1]]),
        5,
    ),
    "data in a subspace": (
        (4, 3, 4, 1),
        np.hstack([separable(15, 2, 8), np.zeros((15, 2))]),
        6,
    ),
    "more support vectors than dimensions": (
        (3, 4, 4, 1),
        np.array([[1, a, b] for a in (-0.5, 0.5) for b in (-0.3, 0.3)] + [[1.7, 0.3, 0.2]]),
        7,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flow_agrees_with_an_independent_integrator(name):
    widths, points, seed = CASES[name]
    weights = early(points, widths, seed)
    expected = reference_flow(points, weights, 300.0)
    solver = SlowManifold(rtol=1e-9)
    state = solver.advance(solver.start(problem_of(points), weights), -300.0)
    assert state.log_risk == -300.0
    assert largest_relative(state.weights(), expected) < LSODA


def test_advancing_in_stages_equals_advancing_at_once(planar):
    problem, weights = planar
    solver = SlowManifold(rtol=1e-9)
    start = solver.advance(solver.start(problem, weights), -1e2)
    whole = solver.advance(start, -1e8)
    parts = solver.advance(solver.advance(start, -1e4), -1e8)
    gap = difference(whole, parts)
    assert max(gap.values()) < SOLVER, gap


def test_smaller_tolerances_give_smaller_errors(planar):
    problem, weights = planar
    start = SlowManifold(rtol=1e-6).start(problem, weights)
    start = SlowManifold(rtol=1e-6).advance(start, -1e4)
    best = SlowManifold(rtol=1e-11).advance(start, -1e6)
    coarse, fine = (
        difference(SlowManifold(rtol=rtol).advance(start, -1e6), best)["rank_one_gap"]
        for rtol in (1e-5, 1e-8)
    )
    assert fine < 1e-1 * coarse


def test_conserved_matrices_stay_at_every_horizon(far):
    for state in far:
        assert bounded_drift(state) < SOLVER
        assert observables(state)["imbalance_drift"] < SOLVER


def test_limits_stand_as_constants_to_any_horizon(far):
    """Ten digits from 1e16 on, where the next order, s^(-1/2) relative for four layers, is gone."""
    found = {state.minus_log_risk: observables(state) for state in far}
    for name, power in (("rank_one_gap", 0.5), ("misalignment", 1.0), ("direction_error", 1.0)):
        last = found[1e100][name] * 1e100**power
        for s, tolerance in ((1e10, 1e-4), (1e16, 1e-7), (1e30, SOLVER)):
            here = found[s][name] * s**power
            assert np.all(np.abs(here - last) <= tolerance * np.abs(last)), (name, s)


def test_nothing_is_noise_or_nan_at_any_horizon(far):
    for state in far:
        for name, value in observables(state).items():
            assert np.all(np.isfinite(value)), name
        assert np.all(observables(state)["misalignment"] > 0)


def test_float64_weights_past_the_wall_still_give_the_norms(far):
    state = far[-2]
    norms = [np.linalg.norm(matrix) for matrix in state.weights()]
    assert np.max(np.abs(norms / observables(state)["frobenius_norm"] - 1)) < ROUND_OFF


def test_doubling_every_point_changes_nothing():
    points = separable(20, 3, 9)
    weights = early(points, (3, 4, 4, 1), 8)
    twice = np.repeat(points, 2, axis=0)
    solver = SlowManifold()
    once, doubled = (
        solver.advance(solver.start(problem_of(z), weights), -1e12) for z in (points, twice)
    )
    assert max(difference(once, doubled).values()) < SOLVER


def test_rotating_the_inputs_rotates_the_flow():
    points = separable(20, 3, 9)
    weights = early(points, (3, 4, 4, 1), 8)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = [weights[0] @ turn.T, *weights[1:]]
    solver = SlowManifold()
    plain_state = solver.advance(solver.start(problem_of(points), weights), -1e12)
    state = solver.advance(solver.start(problem_of(points @ turn.T), turned), -1e12)
    assert max(difference(plain_state, state).values()) < SOLVER
    w, rotated = observables(plain_state)["end_to_end"], observables(state)["end_to_end"]
    assert np.linalg.norm(turn @ w - rotated) < ROUND_OFF * np.linalg.norm(w)


@pytest.mark.parametrize("s", [1e3, 1e12])
def test_time_of_one_layer_on_one_datum_is_exact(s):
    """R = 1/(e^q0 + |z|^2 t) for the mean risk of one datum, one layer, exponential loss."""
    point = np.array([[0.6, 0.8]])
    start = [np.array([[1.2, 1.6]])]  # q0 = 2
    (state,) = states_at(problem_of(point), start, -2.0, -np.inf, [-s])
    assert abs(state.log_time - s) < 1e-9 * s


def test_time_of_an_aligned_chain_follows_its_asymptotic_series():
    """t = e^{ap} p^{-2+2/L} / (L a^2) (1 + (2-2/L)/(ap) + ...), p = |w|, a = |z|."""
    size = 1.5
    weights = [np.array([[size, 0.0]]), np.array([[size]]), np.array([[size]])]
    datum = np.array([[0.9, 0.0]])
    begin = -log_risk(datum, weights)
    (state,) = states_at(problem_of(datum), weights, -begin, -np.inf, [-1e4])
    s, power = 1e4, 2 - 2 / 3
    series = 1 + power / s + power * (power + 1) / s**2
    expected = s - power * np.log(s / 0.9) - np.log(3 * 0.81) + np.log(series)
    assert abs(state.log_time - expected) < 1e-7


def test_imbalance_of_the_start_repairs_what_rounding_took():
    """Weights rounded to single precision lose the misalignment; the conserved matrices have it."""
    points = separable(20, 2, 1)
    problem = problem_of(points)
    weights = early(points, (2, 4, 4, 1), 1)
    solver = SlowManifold()
    state = solver.advance(solver.start(problem, weights), -1e12)
    rounded = [matrix.astype(np.float32).astype(np.float64) for matrix in state.weights()]
    kept = {"log_risk": -1e12, "log_time": state.log_time}
    repaired = solver.start(problem, rounded, imbalance=state.imbalance, **kept)
    lost = solver.start(problem, rounded, **kept)
    true = observables(state)["misalignment"]
    assert np.max(np.abs(observables(repaired)["misalignment"] / true - 1)) < 1e-4
    assert np.max(np.abs(observables(lost)["misalignment"] / true - 1)) > 1e-1


def test_any_increasing_coordinate_can_be_landed_on(planar):
    problem, weights = planar
    solver = SlowManifold()
    start = solver.advance(solver.start(problem, weights), -1e3)

    def reach(ahead, log_risk=-1e140):
        state, arrived = start, False
        while not arrived:
            state, arrived, *_ = solver.walk(state, log_risk, ahead)
        return state

    state = reach(lambda state: state.log_time - 1e6)
    assert abs(state.log_time / 1e6 - 1) < 1e-13

    def alignment(state):
        return -np.log(observables(state)["misalignment"].max())

    state = reach(lambda state: alignment(state) - 30.0)
    assert abs(alignment(state) - 30) < 1e-10
    assert reach(lambda state: alignment(state) - 1e3, -1e4).log_risk == -1e4


def test_saving_many_points_costs_few_steps(planar):
    """A run that goes on keeps its step size and derivatives; one from rest starts with 1e-14."""
    problem, weights = planar
    solver = SlowManifold()
    state = solver.advance(solver.start(problem, weights), -1e6)
    before = state.num_steps
    for s in np.geomspace(1e6, 1e16, 101)[1:]:
        state = solver.advance(state, -s)
    assert state.num_steps - before < 120


def test_running_out_of_steps_keeps_what_was_computed(planar):
    problem, weights = planar
    solver = SlowManifold(max_steps=5)
    start = solver.start(problem, weights)
    with pytest.raises(ManifoldError, match="raise `max_steps`") as caught:
        solver.advance(start, -1e10)
    assert -1e10 < caught.value.state.log_risk < start.log_risk


@pytest.mark.parametrize(
    ("points", "loss", "network", "reason"),
    [
        (separable(9, 2, 0), gflow.PolynomialTail(), None, "no exponential tail"),
        (separable(9, 2, 0), gflow.Logistic(), None, "smallest margin"),
        (np.array([[1.0, 0.0], [-1.0, 0.0]]), gflow.Exponential(), None, "not separable"),
        (
            separable(9, 2, 0),
            gflow.Exponential(),
            gflow.Network(lambda weights, x: (weights[0] @ x)[0]),
            "not deep linear",
        ),
    ],
)
def test_what_has_no_slow_manifold_is_refused(points, loss, network, reason):
    data = gflow.Dataset(points, np.ones(len(points)))
    problem = gflow.Problem(data, network, loss)
    weights = (np.ones((1, 2)),)
    assert reason in SlowManifold.obstacle(problem, weights)
    with pytest.raises(ValueError, match="cannot be continued"):
        SlowManifold().start(problem, weights)


def test_malformed_arguments_are_named():
    with pytest.raises(ValueError, match="`rtol` is 2"):
        SlowManifold(rtol=2.0)
    point = np.array([[1.0, 0.0]])
    state = SlowManifold().start(problem_of(point), (np.array([[2.0, 0.0]]),))
    with pytest.raises(ValueError, match="`log_risk` is -1e\\+200"):
        SlowManifold().advance(state, -1e200)

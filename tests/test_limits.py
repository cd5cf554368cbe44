"""The sharp asymptotic laws: constants predicted from the start, met by the trajectory."""

import numpy as np
import pytest
from test_slow_manifold import early, gaussian, problem_of, reference_flow, separable

from gflow.analysis.law_constants import limits
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.slow_manifold import SlowManifold

FAR = 1e-6  # at s = 1e16 the next order is below this for up to four layers
LAWS = ("rank_one_gap", "misalignment", "direction_error", "margin_gap", "frobenius_norm")


def relative(predicted, found):
    predicted, found = np.atleast_1d(predicted), np.atleast_1d(found)
    there = np.abs(found) > 0
    return float(np.max(np.abs(predicted - found)[there] / np.abs(found)[there], initial=0.0))


def settle(points, weights, *targets):
    """The observables at each of the risks, log R and log t."""
    solver = SlowManifold(rtol=1e-10)
    state = solver.start(problem_of(points), weights)
    found = []
    for target in targets:
        state = solver.advance(state, -target)
        times = {"log_time": np.asarray(state.log_time), "log_risk": np.asarray(state.log_risk)}
        found.append({**observables(state), **times})
    return found


CASES = {
    "two layers": ((3, 5, 1), separable(30, 3, 0), 0),
    "three layers": ((4, 4, 3, 1), separable(30, 4, 1), 1),
    "four layers": ((2, 6, 5, 4, 1), separable(50, 2, 2), 2),
    "more support vectors than dimensions": (
        (3, 4, 4, 1),
        np.array([[1, 0.5, 0.3], [1, -0.5, 0.3], [1, 0.5, -0.3], [1, -0.5, -0.3], [1, 0.1, 0.2]]),
        3,
    ),
    "duplicates": ((2, 4, 4, 1), np.repeat(separable(20, 2, 3), [1, 2] * 10, axis=0), 4),
}


AT = (1e5, 1e6, 1e8, 1e16)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    widths, points, seed = CASES[request.param]
    start = gaussian(points, widths, seed)
    late = reference_flow(points, start, 50.0)
    far = dict(zip(AT, settle(points, late, *AT), strict=True))
    return limits(problem_of(points), start, late=late), far


def test_constants_from_the_start_are_met_at_minus_1e16(case):
    law, far = case
    found = far[1e16]
    assert law.degenerate == ()
    assert law.direction_exponent == 1.0
    s, depth = 1e16, law.depth
    for constant, name, power in (
        (law.rank_one_gap, "rank_one_gap", 2 / depth),
        (law.misalignment, "misalignment", 4 / depth),
        (law.direction_error, "direction_error", 1.0),
    ):
        assert relative(constant, found[name] * s**power) < FAR, name


def test_next_order_laws_close_faster_than_the_leading_ones(case):
    """Two decades of s: leading terms err by s^(-2/L), with the next order by s^(-3/L) or less."""
    law, far = case
    for name in LAWS:
        first, second = (relative(law.predict(-s)[name], far[s][name]) for s in (1e6, 1e8))
        floor = 1e-8  # the start is known to LSODA's tolerance
        assert second < max(floor, 1.3 * first * 100 ** (-3 / max(law.depth, 3))), name


def test_time_law_holds_to_many_digits(case):
    law, far = case
    found = far[1e5]
    assert abs(law.predict(-1e5)["log_time"] - found["log_time"]) < 1e-5
    w = np.linalg.norm(found["end_to_end"])
    power = 2 - 2 / law.depth
    ratio = np.exp(found["log_risk"] + found["log_time"]) * law.depth * law.margin**2 * w**power
    assert abs(ratio - 1) < 1e-3


def test_direction_is_reached_at_rate_one_over_depth_where_the_support_does_not_span():
    points = np.hstack([separable(20, 2, 5), np.zeros((20, 2))])
    late = early(points, (4, 4, 3, 1), 5)
    law = limits(problem_of(points), late, late=late)
    assert law.direction_exponent == pytest.approx(1 / 3)
    first, second = settle(points, late, 1e9, 1e18)
    assert relative(law.direction_error, second["direction_error"] * 1e6) < FAR
    for s, found in ((1e9, first), (1e18, second)):
        assert relative(law.predict(-s)["direction_error"], found["direction_error"]) < 2e-6


def test_next_order_holds_where_the_support_does_not_span():
    """Fewer support vectors than dimensions turn u_1 as fast as the misalignment does."""
    points = np.hstack([separable(20, 2, 5), 0.2 * np.ones((20, 1)), np.zeros((20, 1))])
    late = early(points, (4, 4, 3, 5, 1), 5)
    law = limits(problem_of(points), late, late=late)
    assert law.direction_exponent == 0.25
    at = (1e8, 1e12)
    found = settle(points, late, *at)
    for name in ("misalignment", "direction_error", "rank_one_gap"):
        first, second = (
            relative(law.predict(-s)[name], f[name]) for s, f in zip(at, found, strict=True)
        )
        # s^(-3/4) or better; with the middle taken for the limit it is s^(-1/2).
        assert second < max(1e-8, 1.5 * first * 1e4 ** (-3 / 4)), name


def test_one_layer_has_soudrys_limit_on_weighted_two_point_data():
    """Points (a, b) three times and (a, -b) once: w_2 tends to ln(3)/(2b)."""
    a, b = 0.8, 0.5
    points = np.array([[a, b]] * 3 + [[a, -b]])
    weights = [np.array([[3.0, -0.4]])]
    law = limits(problem_of(points), weights)
    assert abs(abs(law.tangent[0]) - np.log(3) / (2 * b)) < 1e-12
    assert law.direction_error == pytest.approx(a * np.log(3) / (2 * b), rel=1e-12)
    assert law.dual == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_depth_enters_the_direction_at_relative_order_one_over_s_only(depth):
    """Balanced layers on that data: w_2 = w_2* (1 + (L-1) a / (b^2 w_1) + ...)."""
    a, b = 0.8, 0.5
    points = np.array([[a, b]] * 3 + [[a, -b]])
    row = np.array([[3.0, 0.5]])
    size = np.linalg.norm(row) ** (1 / depth)
    weights = [row / np.linalg.norm(row) * size] + [np.array([[size]])] * (depth - 1)
    (found,) = settle(points, weights, 1e4)
    w = found["end_to_end"]
    expected = np.log(3) / (2 * b) * (1 + (depth - 1) * a / (b**2 * w[0]))
    assert abs(w[1] / expected - 1) < 1e-5
    law = limits(problem_of(points), weights)
    assert relative(law.predict(-1e4)["direction_error"], found["direction_error"]) < 1e-5
    assert np.max(np.abs(law.rank_one)) < 1e-12 and np.max(law.misalignment) < 1e-20


def test_limits_are_the_same_from_any_later_point():
    widths, points, seed = CASES["three layers"]
    start = gaussian(points, widths, seed)
    late = reference_flow(points, start, 50.0)
    later = reference_flow(points, late, 200.0)
    first = limits(problem_of(points), start, late=late)
    second = limits(problem_of(points), later)
    for a, b in zip(first.directions, second.directions, strict=True):
        assert np.linalg.norm(a - np.sign(a @ b) * b) < 1e-7
    assert relative(first.misalignment, second.misalignment) < 1e-6


def test_conserved_matrices_alone_do_not_fix_the_limits():
    """W_1 -> W_1 O keeps every D_k and moves the limit of the singular vectors."""
    points = separable(20, 2, 6)
    weights = early(points, (2, 3, 1), 6, s=20.0)
    c, s = np.cos(0.02), np.sin(0.02)
    turned = [weights[0] @ np.array([[c, -s], [s, c]]), weights[1]]
    first, second = (limits(problem_of(points), w) for w in (weights, turned))
    cosine = abs(float(first.directions[0] @ second.directions[0]))
    assert cosine < 1 - 1e-7


def test_support_vectors_without_weight_are_reported():
    points = np.array([[1.0, 0.5, 0.0], [1.0, -0.5, 0.0], [1.0, 0.0, 0.4], [2.0, 0.1, 0.2]])
    law = limits(problem_of(points), early(points, (3, 4, 1), 7))
    assert any("[2] lie on the margin but carry no weight" in reason for reason in law.degenerate)


def test_support_vectors_that_nearly_lie_in_a_line_are_reported():
    points = np.array([[1.0, 0.5, 1e-6], [1.0, -0.5, 1e-6], [1.0, 0.0, -1e-6], [2.0, 0.1, 0.2]])
    law = limits(problem_of(points), early(points, (3, 4, 1), 7))
    np.testing.assert_allclose(law.relaxed_from, 1e12, rtol=0.2)
    assert any("nearly lie in a space of fewer dimensions" in reason for reason in law.degenerate)


def test_a_near_tie_is_reported():
    points = np.array([[1.0, 0.5], [1.0, -0.5], [1.0000001, -1.1]])
    law = limits(problem_of(points), early(points, (2, 3, 1), 8))
    assert 1e8 < law.settled_from < 1e9
    assert any("lies off the margin by a relative 1e-07 only" in r for r in law.degenerate)

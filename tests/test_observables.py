import mpmath
import numpy as np
import pytest

import gflow
from gflow.problem.observables import Reference, largest_misalignment, singular, standard

DATA = gflow.datasets.separable(n=20, d=3, margin=0.1, seed=0)
PROBLEM = gflow.Problem(DATA)


def unit(angle, size):
    vector = np.zeros(size)
    vector[0], vector[1] = np.cos(angle), np.sin(angle)
    return vector


def observe(weights, problem=PROBLEM):
    reference = Reference.of(problem.data.max_margin(), problem, weights)
    return {
        name: np.asarray(value) for name, value in standard(problem, weights, reference).items()
    }


def test_a_perfectly_aligned_network_has_alignment_one():
    found = observe(gflow.init.balanced((3, 5, 4, 1), scale=2.0, seed=0))
    np.testing.assert_allclose(found["alignment"], 1.0, atol=1e-15)
    assert found["rank_one_residual"].max() < 1e-15
    np.testing.assert_allclose(found["direction_alignment"], 1.0, atol=1e-15)


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
def test_misalignment_of_a_small_angle_is_right_to_six_digits(angle):
    first = np.outer(unit(0.0, 4), unit(0.3, 3))
    last = unit(angle, 4)[None]
    # 1 - cos(angle) = 2 sin^2(angle / 2): 5e-13 for the smallest angle.
    expected = 2 * np.sin(angle / 2) ** 2
    np.testing.assert_allclose(observe((first, last))["misalignment"], [expected], rtol=1e-6)
    np.testing.assert_allclose(largest_misalignment((first, last)), expected, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-6])
def test_rank_one_gap_of_a_small_second_singular_value_is_right_to_six_digits(ratio):
    rotate = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    first = rotate[:, :3] @ np.diag([1.0, ratio, 0.0]) @ rotate[:3, :3].T
    with mpmath.workdps(40):
        exact = mpmath.mpf(ratio) ** 2
        gap = 1 - 1 / mpmath.sqrt(1 + exact)
    first = np.linalg.svd(first)[0][:, :3] * [1.0, ratio, 0.0] @ np.linalg.qr(np.eye(3))[0]
    found = observe((first, np.ones((1, 4))))
    np.testing.assert_allclose(found["rank_one_gap"][0], float(gap), rtol=1e-6)
    np.testing.assert_allclose(found["rank_one_residual"][0], ratio, rtol=1e-2)


def test_the_margin_of_the_best_direction_is_the_max_margin():
    solution = DATA.max_margin()
    found = observe(gflow.init.balanced((3, 5, 1), end_to_end=7.0 * solution.direction))
    np.testing.assert_allclose(found["margin"], solution.margin, rtol=1e-13)
    np.testing.assert_allclose(found["layer_margin"], solution.margin, rtol=1e-13)
    assert found["direction_error"] < 1e-15
    assert abs(found["margin_gap"]) < 1e-15


def test_direction_error_and_margin_gap_are_those_of_the_definition():
    weights = gflow.init.gaussian((3, 5, 1), seed=3)
    solution = DATA.max_margin()
    w = (weights[1] @ weights[0])[0]
    found = observe(weights)
    best = np.min(DATA.signed_inputs @ w) / np.linalg.norm(w)
    np.testing.assert_allclose(found["margin"], best, rtol=1e-13)
    np.testing.assert_allclose(found["margin_gap"], solution.margin - best, rtol=1e-12)
    expected = np.linalg.norm(w / np.linalg.norm(w) - solution.direction)
    np.testing.assert_allclose(found["direction_error"], expected, rtol=1e-13)


def test_smoothed_margin_of_the_exponential_loss_is_that_of_lyu_and_li():
    problem = gflow.Problem(DATA, loss=gflow.Exponential())
    weights = gflow.init.balanced((3, 5, 1), end_to_end=9.0 * DATA.max_margin().direction)
    q = DATA.signed_inputs @ (weights[1] @ weights[0])[0]
    norms = np.prod([np.linalg.norm(matrix) for matrix in weights])
    expected = -np.log(np.sum(np.exp(-q))) / norms
    np.testing.assert_allclose(observe(weights, problem)["smoothed_margin"], expected, rtol=1e-12)


def test_alignment_of_a_zero_layer_or_a_tie_is_undefined_rather_than_made_up():
    assert np.isnan(np.asarray(singular(np.zeros((3, 2))).left)).all()
    assert np.isnan(np.asarray(singular(np.eye(3)).right)).all()
    assert np.isnan(observe((np.zeros((4, 3)), np.ones((1, 4))))["misalignment"]).all()


def test_one_layer_has_no_pairs():
    found = observe((np.array([[1.0, 2.0, 3.0]]),))
    assert found["misalignment"].shape == (0,)
    assert found["imbalance_drift"] == 0
    assert largest_misalignment((np.ones((1, 3)),)) == 0


def test_weights_along_minus_the_gradient_have_gradient_alignment_one():
    data = gflow.datasets.one_datum()
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.balanced((3, 4, 1), end_to_end=data.signed_inputs[0])
    np.testing.assert_allclose(gflow.observables.gradient_alignment(problem, weights), 1.0)


def test_kkt_conditions_are_those_of_the_definition():
    start = gflow.init.gaussian((3, 4, 1), seed=0)
    direction = DATA.max_margin().direction + np.array([0.01, -0.02, 0.01])
    weights = (start[0] + 30 * np.outer(start[1][0], direction), start[1])  # separates the data
    found = observe(weights)
    w, z = (weights[1] @ weights[0])[0], DATA.signed_inputs
    q = z @ w
    assert q.min() > 0
    gradients = [(np.outer(weights[1][0], x), weights[0] @ x) for x in z]
    flat = np.array([np.concatenate([a.ravel(), b]) for a, b in gradients])
    scaled = np.concatenate([matrix.ravel() for matrix in weights]) / q.min() ** 0.5
    pull = (1 / (1 + np.exp(q))) @ flat / q.min() ** 0.5  # grad q_i is homogeneous of degree 1
    multipliers = np.linalg.norm(scaled) / np.linalg.norm(pull) / (1 + np.exp(q))
    residual = scaled - multipliers @ flat / q.min() ** 0.5
    np.testing.assert_allclose(found["kkt_residual"], np.linalg.norm(residual), rtol=1e-9)
    np.testing.assert_allclose(
        found["kkt_slackness"], np.max(multipliers * (q / q.min() - 1)), rtol=1e-9
    )
    u = DATA.max_margin().direction
    across, slope = w - (w @ u) * u, -(1 / (1 + np.exp(q))) @ z
    cosine = across @ slope / np.linalg.norm(across) / np.linalg.norm(slope)
    np.testing.assert_allclose(found["perpendicular_cosine"], cosine, rtol=1e-9)

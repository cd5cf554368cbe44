import jax
import mpmath
import numpy as np
import pytest

import gflow
from gflow.problem.conserved import drift, kept
from gflow.problem.observables import Reference, largest_misalignment, singular, standard
from gflow.problem.singular import EXACT

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


WIDE = 60, 56
TURNS = [np.linalg.qr(np.random.default_rng(m).normal(size=(m, m)))[0] for m in WIDE]
DECOMPOSED = 1e-13
"""Relative round-off of a decomposition, times one over the least gap of the spectra below."""


@pytest.fixture(scope="module")
def iterated():
    """The program for a layer too large to be decomposed."""
    assert np.prod(WIDE) > EXACT
    return jax.jit(singular)


def with_values(values):
    """A matrix of the shape `WIDE` with these singular values, and its singular vectors."""
    values = np.concatenate([values, np.zeros(min(WIDE) - len(values))])
    left, right = TURNS[0][:, : len(values)], TURNS[1]
    return (left * values) @ right.T, left, right


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(3, 1, 56),
        [100.0, 1e-3, 1e-3, 1e-7],
        [2.0],
        [2.0, 1.0, 1.0],
        0.1 ** np.arange(50),
    ],
)
def test_the_leading_triple_of_a_wide_layer_is_the_one_it_was_made_of(iterated, values):
    matrix, left, right = with_values(values)
    found = iterated(matrix)
    sign = np.sign(found.right @ right[:, 0])
    np.testing.assert_allclose(found.value, values[0], rtol=1e-14)
    np.testing.assert_allclose(found.left, sign * left[:, 0], atol=DECOMPOSED)
    np.testing.assert_allclose(found.right, sign * right[:, 0], atol=DECOMPOSED)
    assert found.right[np.argmax(np.abs(found.right))] > 0
    rest = np.linalg.norm(values[1:])
    np.testing.assert_allclose(np.sqrt(found.tail), rest, rtol=1e-9, atol=1e-14 * values[0])


@pytest.mark.parametrize("values", [[], [1.0, 1.0], [1.0, 1.0 - 1e-16, 0.5], np.ones(56)])
def test_a_tie_of_a_wide_layer_is_undefined_too(iterated, values):
    matrix, *_ = with_values(values)
    found = iterated(matrix)
    np.testing.assert_allclose(found.value, values[0] if len(values) else 0, rtol=1e-14)
    assert np.isnan(found.left).all() and np.isnan(found.right).all()
    np.testing.assert_allclose(found.tail, np.sum(np.square(values[1:])), rtol=1e-13)


def test_a_wide_layer_whose_triple_is_not_proven_is_decomposed(monkeypatch):
    monkeypatch.setattr("gflow.problem.singular.ITERATIONS", 2)
    matrix, _, right = with_values(np.linspace(3, 1, 56))
    found = singular(matrix)
    np.testing.assert_allclose(np.abs(found.right @ right[:, 0]), 1, rtol=DECOMPOSED)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_drift_of_wide_layers_is_that_of_their_matrices(rank):
    rng = np.random.default_rng(rank)
    start = gflow.init.gaussian((3, 150, 140, 1), seed=0)
    later = tuple(
        w + 1e-9 * rng.normal(size=(w.shape[0], rank)) @ rng.normal(size=(rank, w.shape[1]))
        for w in start
    )
    exact = gflow.observables.imbalance_drift(later, gflow.observables.imbalance(start))
    # Up to rank 16 all is seen: a change of rank 1 in each layer is one of 4, and one of 8 of 32.
    np.testing.assert_allclose(drift(later, kept(start)), exact, rtol=1e-5 if rank == 1 else 0.15)


def test_the_constant_of_lemma_2_is_the_same_by_products():
    start = gflow.init.gaussian((3, 60, 50, 1), seed=0)
    norms = [np.linalg.norm(matrix) ** 2 for matrix in start]
    spread = sum(np.linalg.norm(matrix, 2) for matrix in gflow.observables.imbalance(start))
    expected = max(norms) - norms[-1] + spread
    np.testing.assert_allclose(gflow.observables.lemma_constant(start), expected, rtol=1e-13)

import jax
import numpy as np
import pytest

import gflow
from gflow.problem.observables import imbalance

DATA = gflow.datasets.separable(n=20, d=3, margin=0.1, seed=0)
PROBLEM = gflow.Problem(DATA)
WIDTHS = (3, 5, 4, 1)


@pytest.mark.parametrize("start", [gflow.init.gaussian, gflow.init.xavier, gflow.init.he])
def test_random_starts_have_the_variance_they_state(start):
    after, before = 400, 300
    layer = start((before, after, 1), scale=2.0, seed=3)[0]
    variance = {
        gflow.init.gaussian: 4 / before,
        gflow.init.xavier: 8 / (before + after),
        gflow.init.he: 8 / before,
    }[start]
    assert layer.shape == (after, before)
    # 120,000 entries: the relative deviation of a variance is sqrt(2/120000) = 0.4 %.
    np.testing.assert_allclose(layer.var(), variance, rtol=0.02)


def test_the_same_seed_gives_the_same_start():
    for one, two in zip(gflow.init.he(WIDTHS, seed=5), gflow.init.he(WIDTHS, seed=5), strict=True):
        np.testing.assert_array_equal(one, two)


def test_balanced_is_balanced_and_has_the_given_product():
    w = np.array([0.3, -0.2, 0.7])
    weights = gflow.init.balanced(WIDTHS, end_to_end=w)
    for matrix in map(np.asarray, imbalance(weights)):
        # Processors sum the squares of a row in different orders.
        assert abs(matrix[0, 0]) < 1e-15 and np.count_nonzero(matrix) <= 1
    np.testing.assert_allclose(gflow.observables.end_to_end(weights), w, rtol=1e-14)


def test_balanced_in_a_random_basis_is_balanced_to_round_off():
    weights = gflow.init.balanced(WIDTHS, scale=2.0, seed=1)
    assert max(np.abs(np.asarray(matrix)).max() for matrix in imbalance(weights)) < 1e-14
    np.testing.assert_allclose(np.linalg.norm(weights[1]), 2.0)


def test_orthogonal_layers_have_equal_singular_values():
    for layer in gflow.init.orthogonal(WIDTHS, scale=0.5, seed=2):
        np.testing.assert_allclose(np.linalg.svd(layer)[1], 0.5, rtol=1e-13)


def test_zero_first_starts_at_the_risk_of_zero():
    weights = gflow.init.zero_first(WIDTHS, seed=4)
    assert not weights[0].any()
    np.testing.assert_allclose(PROBLEM.log_risk(weights), PROBLEM.log_risk_at_zero(), rtol=1e-14)
    PROBLEM.check(weights)  # does not warn


@pytest.mark.parametrize("seed", range(6))
def test_admissible_starts_satisfy_the_assumption_of_the_paper(seed):
    weights = gflow.init.gaussian(WIDTHS, scale=3.0, seed=seed)
    repaired = gflow.init.admissible(weights, PROBLEM)
    assert float(PROBLEM.log_risk(repaired)) <= float(PROBLEM.log_risk_at_zero()) + 1e-13
    for before, after in zip(weights[:-1], repaired[:-1], strict=True):
        np.testing.assert_array_equal(before, after)


def test_admissible_works_in_double_precision_whatever_the_global_setting():
    weights = gflow.init.gaussian(WIDTHS, scale=3.0, seed=1)
    with jax.enable_x64(False):
        plain = gflow.init.admissible(weights, PROBLEM)
    np.testing.assert_array_equal(plain[-1], gflow.init.admissible(weights, PROBLEM)[-1])


@pytest.mark.parametrize("widths", [(2,), (2, 0, 1), (2, 2.5, 1), ()])
@pytest.mark.usefixtures("unchecked")
def test_impossible_widths_are_named(widths):
    with pytest.raises(ValueError, match="`widths` is"):
        gflow.init.gaussian(widths)


def test_a_balanced_start_at_the_saddle_is_refused():
    with pytest.raises(ValueError, match="`end_to_end` is zero"):
        gflow.init.balanced(WIDTHS, end_to_end=np.zeros(3))
    with pytest.raises(ValueError, match=r"`end_to_end` has shape \(2,\)"):
        gflow.init.balanced(WIDTHS, end_to_end=np.ones(2))

import itertools
import math
from fractions import Fraction

import equinox as eqx
import jax
import mpmath
import numpy as np
import pytest

import gflow
from gflow import datasets
from gflow.problem.compensated import Pair, least_squares, residual
from gflow.problem.data import Dataset
from gflow.problem.max_margin import max_margin

# What the bounds promise wherever float64 permits; they reach about 3e-15.
CERTIFIED = 1e-12
# The agreement asked of an independent solver.
AGREEMENT = 1e-9
# A few roundings of numbers of order one.
ROUNDING = 1e-14

NORMS = (1, 2, math.inf)


def cloud(n, d, kind, seed=0):
    """Gaussian points labelled by a teacher: as they are (`tight`), moved apart by 0.5 (`gap`), or
    labelled by chance (`mixed`)."""
    generator = np.random.default_rng(seed)
    x, teacher = generator.normal(size=(n, d)), generator.normal(size=d)
    teacher /= np.linalg.norm(teacher)
    y = np.sign(x @ teacher)
    if kind == "gap":
        x += 0.5 * y[:, None] * teacher
    if kind == "mixed":
        y = generator.choice([-1.0, 1.0], size=n)
    return y[:, None] * x


def barely(margin, n=200, d=10, seed=3):
    """Points of norm up to 10 whose margin is `margin` up to the rounding of their coordinates."""
    generator = np.random.default_rng(seed)
    u = generator.normal(size=d)
    u /= np.linalg.norm(u)
    across = generator.normal(size=(n, d))
    across -= np.outer(across @ u, u)
    p = generator.uniform(1.0, 2.0, d)
    across[d - 1] = -(p[:-1] @ across[: d - 1]) / p[-1]
    height = np.full(n, margin)
    height[d:] *= 1.0 + 10.0 * generator.exponential(size=n - d)
    return across + np.outer(height, u)


def shortest_in_hull(z):
    """Wolfe's algorithm for the point of smallest norm in a convex hull: (point, weights).

    Slow and plain: keep an affinely independent set of points, move to the shortest point of its
    affine hull, or as far as weights stay positive, and add the point that is least ahead.
    """
    rows = [int(np.argmin(np.linalg.norm(z, axis=1)))]
    weights = np.ones(1)
    for _ in range(10_000):
        x = weights @ z[rows]
        worst = int(np.argmin(z @ x))
        if worst in rows or x @ z[worst] >= x @ x * (1 - 1e-13):
            return x, dict(zip(rows, weights, strict=True))
        rows, weights = [*rows, worst], np.append(weights, 0.0)
        while True:
            k = len(rows)
            gram = z[rows] @ z[rows].T
            system = np.block([[gram, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
            target = np.linalg.solve(system, np.append(np.zeros(k), 1.0))[:k]
            if (target > 1e-14).all():
                weights = target
                break
            falling = target < weights
            step = min(1.0, (weights[falling] / (weights - target)[falling]).min())
            weights = weights + step * (target - weights)
            kept = weights > 1e-14
            rows, weights = list(np.array(rows)[kept]), weights[kept]
    raise AssertionError("Wolfe's algorithm did not end")


def exact_norm(vector, norm):
    if norm == 1:
        return sum(map(abs, vector))
    if norm == 2:
        square = sum(x * x for x in vector)
        return mpmath.sqrt(mpmath.mpf(square.numerator) / square.denominator)
    return max(map(abs, vector))


def real(x):
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def exact_bounds(z, solution):
    """What `direction` and `dual`, as float64, prove: computed in rational arithmetic."""
    dual_norm = {1: math.inf, 2: 2, math.inf: 1}[solution.norm]
    rows = [[Fraction(float(x)) for x in row] for row in z]
    u = [Fraction(float(x)) for x in solution.direction]
    p = [Fraction(float(x)) for x in solution.dual]
    smallest = min(sum(a * b for a, b in zip(row, u, strict=True)) for row in rows)
    mean = [sum(a * row[j] for a, row in zip(p, rows, strict=True)) for j in range(len(u))]
    lower = real(smallest) / real(exact_norm(u, solution.norm))
    return lower, real(exact_norm(mean, dual_norm)) / real(sum(p))


def check(z, solution):
    """The properties that any separable solution has."""
    dual_norm = {1: math.inf, 2: 2, math.inf: 1}[solution.norm]
    scale = np.linalg.norm(z, axis=1).max()
    assert solution.separable
    assert 0 < solution.margin_lower <= solution.margin <= solution.margin_upper
    assert np.linalg.norm(solution.direction, solution.norm) == pytest.approx(1.0, abs=1e-15)
    slack = z @ solution.direction - solution.margin
    assert slack.min() >= -ROUNDING * scale
    assert np.abs(slack[solution.support]).max() <= ROUNDING * scale
    assert (solution.dual >= 0).all()
    assert solution.dual.sum() == pytest.approx(1.0, abs=1e-15 * len(z))
    mean = solution.dual @ z
    assert np.linalg.norm(mean, dual_norm) == pytest.approx(solution.margin, abs=ROUNDING * scale)
    assert set(np.flatnonzero(solution.dual)) <= set(solution.support)
    if solution.norm == 2:
        np.testing.assert_allclose(
            mean, solution.margin * solution.direction, atol=ROUNDING * scale
        )


# -- against closed forms -------------------------------------------------------------------------


def test_one_point_is_its_own_direction_in_every_norm():
    z = np.array([[1.0, 0.9, 0.3]])
    expected = {
        2: (z[0] / np.linalg.norm(z), np.linalg.norm(z)),
        1: (np.array([1.0, 0.0, 0.0]), 1.0),
        math.inf: (np.ones(3), 2.2),
    }
    for norm, (direction, margin) in expected.items():
        solution = max_margin(z, norm=norm)
        check(z, solution)
        np.testing.assert_allclose(solution.direction, direction, atol=1e-15)
        assert solution.margin == pytest.approx(margin, rel=1e-15)
        assert solution.dual.tolist() == [1.0] and solution.support.tolist() == [0]


@pytest.mark.parametrize("d", [2, 5, 17])
def test_bounds_enclose_the_margin_of_the_unit_vectors(d):
    # max_w min_j w_j: 1/sqrt(d) on the sphere, 1/d on the cross-polytope, 1 on the cube.
    with mpmath.workdps(40):
        exact = {2: 1 / mpmath.sqrt(d), 1: mpmath.mpf(1) / d, math.inf: mpmath.mpf(1)}
        for norm, margin in exact.items():
            solution = max_margin(np.eye(d), norm=norm)
            assert solution.margin_lower <= margin <= solution.margin_upper
            assert solution.relative_gap < CERTIFIED


def test_more_points_on_the_margin_than_dimensions_are_all_in_the_support():
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=6)))
    z = np.column_stack([np.full(len(corners), 0.01), corners])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
    for points in (z, z @ rotation):
        solution = max_margin(points)
        check(points, solution)
        assert len(solution.support) == 64
        assert solution.margin == pytest.approx(0.01, rel=1e-12)
        assert solution.relative_gap < CERTIFIED


def test_duplicates_change_nothing_but_the_support():
    z = cloud(50, 5, "gap")
    once, often = max_margin(z), max_margin(np.tile(z, (7, 1)))
    assert often.margin == pytest.approx(once.margin, rel=1e-15)
    np.testing.assert_allclose(often.direction, once.direction, atol=1e-14)
    assert len(often.support) == 7 * len(once.support)
    for noise in (1e-9, 1e-13):
        shaken = np.tile(z, (20, 1)) + noise * np.random.default_rng(0).normal(size=(1000, 5))
        solution = max_margin(shaken)
        assert solution.margin == pytest.approx(once.margin, abs=10 * noise)
        assert solution.relative_gap < CERTIFIED


@pytest.mark.parametrize("norm", NORMS)
def test_margin_scales_with_the_data_over_the_range_of_float64(norm):
    z = cloud(40, 4, "gap")
    margin = max_margin(z, norm=norm).margin
    for exponent in (-900, 900):
        scaled = max_margin(np.ldexp(z, exponent), norm=norm)
        assert math.ldexp(scaled.margin, -exponent) == margin


# -- against an independent solver ----------------------------------------------------------------


@pytest.mark.parametrize(
    "z",
    [
        *(
            cloud(n, d, kind)
            for n, d in ((20, 2), (200, 20), (60, 60))
            for kind in ("gap", "tight")
        ),
        datasets.digits(3, 5).signed_inputs,
        datasets.digits(1, 8).signed_inputs,
        datasets.iris(0, 2).signed_inputs,
        datasets.wine(1, 2).signed_inputs,
    ],
    ids=lambda z: f"{z.shape[0]}x{z.shape[1]}",
)
def test_margin_and_direction_equal_those_of_an_independent_solver(z):
    solution = max_margin(z)
    check(z, solution)
    assert solution.relative_gap < CERTIFIED
    shortest, weights = shortest_in_hull(z)
    margin = np.linalg.norm(shortest)
    assert solution.margin == pytest.approx(margin, rel=AGREEMENT)
    np.testing.assert_allclose(solution.direction, shortest / margin, atol=AGREEMENT)
    found = dict(zip(np.flatnonzero(solution.dual), solution.dual[solution.dual > 0], strict=True))
    assert found == pytest.approx(weights, abs=1e-7)


def test_the_hard_case_has_a_margin_of_seven_in_a_hundred_thousand():
    z = datasets.breast_cancer().signed_inputs
    solution = max_margin(z)
    check(z, solution)
    assert solution.relative_gap < CERTIFIED
    assert np.linalg.norm(shortest_in_hull(z)[0]) == pytest.approx(solution.margin, rel=AGREEMENT)
    assert solution.margin == pytest.approx(6.8e-5, rel=0.01)
    # In units where the largest entry is one, as often quoted, the margin is 1.15e-4.
    assert solution.margin / np.abs(z).max() == pytest.approx(1.15e-4, rel=0.01)


@pytest.mark.parametrize("norm", [1, math.inf])
@pytest.mark.parametrize(("n", "d"), [(20, 2), (150, 12), (30, 80)])
@pytest.mark.parametrize("kind", ["gap", "tight"])
def test_other_norms_agree_with_one_linear_programme_over_all_points(norm, n, d, kind):
    from scipy.optimize import linprog

    z = cloud(n, d, kind, seed=1)
    solution = max_margin(z, norm=norm)
    check(z, solution)
    assert solution.relative_gap < CERTIFIED
    # The dual: min t with |sum_i p_i z_ij| <= t (norm 1), or sum_j |.| (norm infinity).
    ones = np.ones((d, 1))
    if norm == 1:
        cost = np.append(np.zeros(n), 1.0)
        matrix = np.block([[z.T, -ones], [-z.T, -ones]])
    else:
        cost = np.append(np.zeros(n), np.ones(d))
        matrix = np.block([[z.T, -np.eye(d)], [-z.T, -np.eye(d)]])
    total = np.append(np.ones(n), np.zeros(len(cost) - n))[None, :]
    found = linprog(cost, matrix, np.zeros(2 * d), total, [1.0], method="highs-ipm")
    assert solution.margin == pytest.approx(found.fun, rel=1e-7)


def test_margins_of_different_norms_are_ordered():
    z = cloud(100, 6, "tight", seed=2)
    one, two, inf = (max_margin(z, norm=norm).margin for norm in NORMS)
    assert one < two < inf < math.sqrt(6) * two < 6 * one


# -- certificates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_agree_with_rational_arithmetic(norm):
    z = cloud(60, 6, "tight", seed=5)
    solution = max_margin(z, norm=norm)
    with mpmath.workdps(40):
        lower, upper = exact_bounds(z, solution)
        # Rounding the two vectors to float64 costs the bounds about 1e-16.
        assert abs(solution.margin_lower - lower) < ROUNDING * solution.margin
        assert abs(solution.margin_upper - upper) < ROUNDING * solution.margin
        assert solution.margin_lower <= upper and lower <= solution.margin_upper


@pytest.mark.parametrize("margin", [1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_almost_inseparable_data_are_solved_to_full_relative_accuracy(margin):
    z = barely(margin)
    solution = max_margin(z)
    assert solution.separable
    assert solution.relative_gap < CERTIFIED
    # The coordinates are rounded to 1e-16 of their size.
    assert solution.margin == pytest.approx(margin, abs=1e-15)
    with mpmath.workdps(40):
        # As float64 the direction still separates, with the margin up to that rounding.
        assert abs(exact_bounds(z, solution)[0] - margin) < 1e-14


def test_a_margin_below_the_rounding_of_the_data_is_bounded_by_it():
    for margin in (1e-17, 0.0):
        solution = max_margin(barely(margin))
        assert not solution.separable
        assert solution.margin_upper < 1e-14


@pytest.mark.parametrize(("n", "d"), [(20, 2), (300, 10), (40, 200)])
def test_data_that_cannot_be_separated_come_with_weights_that_cancel(n, d):
    z = cloud(n, d, "tight")
    z = np.vstack([z, -z[:5].mean(axis=0)])
    for norm in NORMS:
        solution = max_margin(z, norm=norm)
        assert not solution.separable
        assert solution.margin == solution.margin_lower == 0.0
        assert solution.margin_upper < 1e-14
        assert np.isnan(solution.direction).all()
        assert (solution.dual >= 0).all() and solution.dual.sum() == pytest.approx(1.0)
        assert np.linalg.norm(solution.certificate @ z) < 1e-14
        np.testing.assert_array_equal(solution.support, np.flatnonzero(solution.dual))


def test_generic_inseparable_data_are_proven_so_to_twice_float64():
    for z in (cloud(200, 20, "mixed"), datasets.breast_cancer(bias=None).signed_inputs):
        assert max_margin(z).margin_upper < 1e-25


def test_a_zero_point_or_a_point_and_its_opposite_are_not_separable():
    z = cloud(10, 3, "gap")
    zero = max_margin(np.vstack([z, np.zeros(3)]))
    assert zero.margin_upper == 0.0 and zero.support.tolist() == [10]
    opposite = max_margin(np.vstack([z, -z[3]]))
    assert not opposite.separable and opposite.margin_upper < 1e-28
    assert not max_margin(np.zeros((1, 1))).separable


def test_all_pairs_of_digits_are_separable_with_certified_margins():
    margins = []
    for first, second in itertools.combinations(range(10), 2):
        solution = datasets.digits(first, second).max_margin()
        assert solution.separable and solution.relative_gap < CERTIFIED
        margins.append(solution.margin)
    assert min(margins) > 0.01


# -- shapes of problems ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "kind"),
    [(3000, 20, "tight"), (60, 200, "gap"), (5000, 2, "tight"), (1, 5, "gap"), (30, 1, "gap")],
)
def test_large_wide_and_small_problems_are_certified(n, d, kind):
    z = cloud(n, d, kind)
    solution = max_margin(z)
    check(z, solution)
    assert solution.relative_gap < CERTIFIED


@pytest.mark.parametrize("norm", [1, math.inf])
def test_working_sets_of_the_linear_programmes_reach_the_optimum_of_all_points(norm):
    z = cloud(4000, 10, "tight")
    solution = max_margin(z, norm=norm)
    check(z, solution)
    assert solution.relative_gap < CERTIFIED


def test_data_in_a_subspace_and_badly_scaled_features_are_certified():
    generator = np.random.default_rng(0)
    flat = cloud(300, 5, "gap") @ generator.normal(size=(5, 30))
    scaled = cloud(300, 8, "gap") * 10.0 ** np.arange(-8, 8, 2)
    for z in (flat, flat[:20], scaled):
        assert max_margin(z).relative_gap < CERTIFIED


def test_a_data_set_and_its_signed_inputs_give_the_same():
    data = datasets.separable(n=30, d=3)
    assert (
        data.max_margin().margin == max_margin(data).margin == max_margin(data.signed_inputs).margin
    )


def test_solution_is_deterministic_and_a_pytree():
    z = cloud(500, 10, "tight")
    first, second = max_margin(z), max_margin(z)
    assert first == second
    assert "traced" in repr(jax.eval_shape(lambda s: s, first))


def test_repr_tells_the_verdict_and_the_proof():
    solution = max_margin(np.array([[3.0, 4.0], [3.0, 4.5]]))
    assert "norm 2: margin 5, proven within [4.99" in repr(solution)
    assert "support: 1 of 2 points" in repr(solution)
    assert solution.certificate is solution.direction
    assert solution.duality_gap == solution.margin_upper - solution.margin_lower
    inseparable = max_margin(np.array([[1.0], [-1.0], [-2.0]]))
    assert "no direction through the origin separates the data by more than" in repr(inseparable)
    assert "proven by 2 of 3 points" in repr(inseparable)
    assert "no direction separates" in inseparable.summary


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (np.ones(3), {}, r"`data` has shape \(3,\)"),
        (np.ones((0, 3)), {}, r"`data` has shape \(0, 3\)"),
        (np.array([["a"]]), {}, r"type <U1; expected a `Dataset`"),
        (np.array([[1.0, np.nan]]), {}, r"`data\[0, 1\]` is nan; expected finite numbers"),
        (np.ones((2, 2)), {"norm": 3}, r"`norm` is 3; expected 2, 1, math.inf or"),
    ],
)
def test_what_is_no_problem_is_refused(z, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        max_margin(z, **options)


def test_the_data_set_caches_what_it_is_told():
    data = Dataset([[0.5, 0.5], [-0.5, 0.1]], [1, -1])
    assert data.max_margin() is data.max_margin()
    assert data.separable == data.max_margin().separable


# -- twice the working precision ------------------------------------------------------------------


def test_residuals_are_exact_where_float64_has_no_digit_left():
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(7, 33))
    x = Pair(generator.normal(size=33), np.zeros(33))
    rounded = Pair.of(matrix @ x.high)
    found = residual(rounded, matrix, x)
    for row, target, value in zip(matrix, rounded.high, found, strict=True):
        products = (Fraction(a) * Fraction(b) for a, b in zip(row, x.high, strict=True))
        exact = Fraction(target) - sum(products)
        assert value == pytest.approx(float(exact), rel=1e-15, abs=1e-31)


def test_refined_least_squares_solve_an_ill_conditioned_system_to_32_digits():
    n = 8
    exact = [Fraction(i + 1, 3) for i in range(n)]
    hilbert = [[Fraction(float(1 / (i + j + 1))) for j in range(n)] for i in range(n)]
    target = [sum(a * b for a, b in zip(row, exact, strict=True)) for row in hilbert]
    high = np.array([float(t) for t in target])
    low = np.array([float(t - Fraction(h)) for t, h in zip(target, high, strict=True)])
    found = least_squares(np.array([[float(a) for a in row] for row in hilbert]), Pair(high, low))
    assert found is not None
    for x, high, low in zip(exact, found.high, found.low, strict=True):
        # The target itself is rounded to 32 digits; the condition number is 1e10.
        assert abs(Fraction(high) + Fraction(low) - x) < Fraction(1, 10**20)
    assert least_squares(np.ones((2, 3)), Pair.of(np.ones(2))) is None


# -- units ----------------------------------------------------------------------------------------


def spread(ratio, separable=True, rows=False):
    """Points of a plane with a margin, in units that lie far apart."""
    generator = np.random.default_rng(2)
    x, w = generator.normal(size=(30, 4)), generator.normal(size=4)
    y = np.sign(x @ w) if separable else generator.choice([-1.0, 1.0], 30)
    z = y[:, None] * x + (0.05 * w if separable else 0.0)
    exponents = np.linspace(-0.5, 0.5, 30 if rows else 4)
    return z * (ratio ** exponents[:, None] if rows else ratio**exponents)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1e14, 1e20, 1e30, 1e100])
def test_the_verdict_does_not_depend_on_units(ratio, rows):
    found = max_margin(spread(ratio, rows=rows))
    assert found.separable and not found.inseparable and found.verdict == "the data are separable"
    assert (spread(ratio, rows=rows) @ found.direction > 0).all()
    assert 0 < found.margin_lower <= found.margin <= found.margin_upper
    none = max_margin(spread(ratio, separable=False, rows=rows))
    assert none.inseparable and not none.separable and "not separable" in none.verdict


def test_columns_that_lie_far_apart_do_not_cost_the_margin_its_digits():
    assert max_margin(spread(1e14)).relative_gap < 1e-12
    # In equal units the same data have a margin of order one, and it is the same direction.
    one = max_margin(spread(1e10)).direction * 1e10 ** np.linspace(-0.5, 0.5, 4)
    assert (spread(1.0) @ one > 0).all()


def test_what_is_not_known_is_not_told_as_a_proof():
    unknown = max_margin(np.array([[1.0], [-1.0]]))
    unknown = eqx.tree_at(lambda m: m.margin_upper, unknown, 0.5)
    object.__setattr__(unknown, "inseparable", False)
    assert "not known whether" in unknown.verdict and "not known whether" in unknown.summary
    assert "not known whether separable" in repr(unknown)


def test_a_problem_may_stand_for_its_data(unchecked):
    data = Dataset([[0.5, 0.5], [-0.5, 0.1]], [1, -1])
    assert max_margin(gflow.Problem(data)).margin == data.max_margin().margin
    masked = np.ma.masked_array(np.eye(2), mask=np.eye(2))
    with pytest.raises(ValueError, match=r"`data\[0, 0\]` is masked \(2 such entries\)"):
        max_margin(masked)

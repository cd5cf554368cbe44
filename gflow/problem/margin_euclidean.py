"""Solver behind `max_margin` for norm 2. What it returns is judged by `margin_bounds` alone."""

import math

import numpy as np
from jaxtyping import Float
from scipy.linalg import qr, solve_triangular
from scipy.optimize import nnls

from gflow.problem.compensated import EPSILON, Pair, least_squares, refine, residual
from gflow.problem.margin_bounds import smallest_margins, upper_bound


def euclidean(z: Float[np.ndarray, "points dim"]) -> tuple[Pair | None, Pair]:
    r"""Solve $\min_{p\in\Delta}\lVert\sum_i p_i z_i\rVert_2$ and its dual.

    In two stages. A working set of points is solved by non-negative least squares, which finds the
    support; then an active-set method, starting there and keeping 32 digits, makes it exact.

    Args:
        z: signed inputs with entries of order one.

    Returns:
        A predictor, or None if none separates, and weights.
    """
    zero = np.flatnonzero(~z.any(axis=1))
    if zero.size:
        return None, Pair.scattered(len(z), zero[:1], Pair.of(np.ones(1)))
    rows, separable = _support_by_least_squares(z)
    if not separable:
        weights = Pair.scattered(len(z), *_vanishing_combination(z, rows))
        # A bound above what rounding does to the data is no proof yet.
        if upper_bound(z, weights, 2.0) < 8 * EPSILON * np.linalg.norm(z, axis=1).max():
            return None, weights
    w, rows, a = active_set(z, rows)
    return w, Pair.scattered(len(z), rows, a)


def _support_by_least_squares(z: np.ndarray) -> tuple[np.ndarray, bool]:
    r"""Points that carry the solution, or the certificate that there is none.

    Lawson and Hanson's least-distance programming: with $E$ the matrix of columns
    $(\alpha z_i, 1)$ and $f = (0, \dots, 0, 1)$, the residual $r = Eu - f$ of
    $\min_{u\ge0}\lVert Eu - f\rVert$ satisfies $E^\top r \ge 0$ and $r_{d+1} = -\lVert r\rVert^2$.
    So either $r = 0$ and $u$ is a combination that vanishes, or $w = -\alpha r_{1:d}/r_{d+1}$ has
    $\langle w, z_i\rangle\ge1$, with equality where $u_i > 0$. Since
    $\lVert r\rVert^{-2} = 1 + (\alpha\gamma)^{-2}$ a small margin looks like none unless the factor
    $\alpha$, here raised as needed, makes up for it.
    """
    n, d = z.shape
    if d > n:  # the span of the points is all that matters
        z = np.linalg.qr(z.T)[1].T
        d = n
    # The start: points that a mean direction does not favour, and others by chance.
    generator = np.random.default_rng(0)
    size = min(n, 4 * d + 16)
    working = np.union1d(
        np.argpartition(z @ z.mean(axis=0), size // 2 - 1)[: size // 2],
        generator.choice(n, size, replace=False),
    )
    factor = 1.0
    target = np.append(np.zeros(d), 1.0)
    for _ in range(200):
        matrix = np.vstack([factor * z[working].T, np.ones(len(working))])
        weights = _nonnegative_least_squares(matrix, target)
        if weights is None:
            return working[:1], True
        rows = working[weights > 0.0]
        r = matrix @ weights - target
        if np.linalg.norm(r) < 1e-6 or not r[d] < 0.0:
            vanishing = _vanishing_combination(z, rows)
            bound = upper_bound(z, Pair.scattered(n, *vanishing), 2.0)
            if bound < EPSILON**1.5 or factor > 1e12:
                return rows, False
            factor *= 1e6
            continue
        w = -factor * r[:d] / r[d]
        margins = z @ w
        fresh = np.flatnonzero(margins < 1.0 - 1e-9)
        fresh = fresh[~np.isin(fresh, working)]
        if not fresh.size:
            return rows, True
        # The most violated points, and those about to be.
        count = min(n, 4 * d)
        working = np.union1d(rows, np.argpartition(margins, count - 1)[:count])
    return rows, True


def active_set(z: np.ndarray, rows: np.ndarray) -> tuple[Pair | None, np.ndarray, Pair]:
    r"""The exact solution, from a guess of the support.

    $$\min\tfrac12\lVert w\rVert^2 \quad\text{subject to}\quad \langle w, z_i\rangle\ge1$$

    by the dual active-set method of Goldfarb and Idnani. Each round holds $w = \sum_{i\in S} a_i
    z_i$ with $a \ge 0$, equality on a linearly independent $S$, both with 32 digits; adds the most
    violated point; and moves along the ray that keeps equality on $S$, dropping a point whenever
    its weight meets zero.
    """
    best = None
    best_gap = math.inf
    for _ in range(4 * (z.shape[1] + 10)):
        solved = _equality_solution(z[rows])
        if solved is None:
            # Numerically dependent: leave out what a pivoted factorisation finds last.
            if len(rows) == 1:
                break
            order = np.asarray(qr(z[rows].T, mode="r", pivoting=True)[-1])
            rows = rows[np.sort(order[:-1])]
            continue
        w, a = solved
        if (a.high <= 0.0).any():
            rows = np.delete(rows, np.argmin(a.high))
            continue
        near, margins, _ = smallest_margins(z, w)
        gap = 1.0 - float(margins.min())
        if gap < best_gap:
            best, best_gap = (w, rows, a), gap
        if gap < 4 * EPSILON:
            break
        entering = int(near[np.argmin(margins)])
        rows, feasible = _exchange(z, rows, a.high, entering, gap)
        if not feasible:
            rows, weights = _vanishing_combination(z, rows)
            return None, rows, weights
    if best is None:
        index = np.argmin(np.linalg.norm(z, axis=1))
        return None, np.array([index]), Pair.of(np.ones(1))
    return best


def _exchange(
    z: np.ndarray, rows: np.ndarray, a: np.ndarray, entering: int, violation: float
) -> tuple[np.ndarray, bool]:
    """The support after a violated point has joined; False if the two cannot hold together."""
    a = np.array(a)
    new = z[entering]
    while True:
        if rows.size:
            q, r = np.linalg.qr(z[rows].T)
            inner = q.T @ new
            across = new - q @ inner
            across -= q @ (q.T @ across)
            coefficients = solve_triangular(r, inner)
        else:
            across, coefficients = new, np.zeros(0)
        square = across @ across
        full = violation / square if square > (1e-14 * np.linalg.norm(new)) ** 2 else math.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = np.where(coefficients > 0.0, a / coefficients, math.inf)
        partial = limits.min(initial=math.inf)
        if full == partial == math.inf:
            return np.append(rows, entering), False
        if full <= partial:
            return np.append(rows, entering), True
        a = a - partial * coefficients
        violation -= partial * square if full < math.inf else 0.0
        leaving = np.argmin(limits)
        rows, a = np.delete(rows, leaving), np.delete(a, leaving)


def _equality_solution(points: np.ndarray) -> tuple[Pair, Pair] | None:
    r"""The shortest $w$ with margin one at all points, and $a$ with $w = Z^\top a$.

    Iterative refinement of the augmented system (Björck): with $Z^\top = QR$ and the residuals
    $g = 1 - Zw$, $f = Z^\top a - w$, the corrections satisfy $Z\,dw = g$, $dw = f + Z^\top da$,
    hence $R\,da = h := R^{-\top}g - Q^\top f$ and $dw = f + Qh$.

    Returns None where the points are too close to dependent for refinement to converge.
    """
    m, d = points.shape
    if m > d:
        return None
    q, r = np.linalg.qr(points.T)
    ones = Pair.of(np.ones(m))

    def correction(w: Pair, a: Pair) -> tuple[np.ndarray, ...]:
        g = residual(ones, points, w)
        f = -residual(w, points.T, a)
        h = solve_triangular(r, g, trans=1) - q.T @ f
        return f + q @ h, solve_triangular(r, h)

    found = refine(correction, d, m, accept=1e-12)
    return None if found is None else (found[0], found[1])


def _vanishing_combination(z: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Pair]:
    r"""Weights $p\ge0$, $\sum p_i = 1$, with $\sum p_i z_i$ as close to zero as 32 digits allow."""
    while True:
        matrix = np.vstack([z[rows].T, np.ones(len(rows))])
        target = Pair.of(np.append(np.zeros(z.shape[1]), 1.0))
        p = least_squares(matrix, target)
        if p is not None and (p.high > 0.0).all():
            return rows, p
        if len(rows) == 1:
            return rows, Pair.of(np.ones(1))
        weights = _nonnegative_least_squares(matrix, target.high)
        if weights is None or not weights.any():
            return rows, Pair.of(np.ones(len(rows)))
        if (weights > 0.0).all():  # nothing to leave out, and refinement does not converge
            return rows, Pair.of(weights)
        rows = rows[weights > 0.0]


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    try:
        return nnls(matrix, target, maxiter=30 * sum(matrix.shape))[0]
    except RuntimeError:  # it ran out of iterations
        return None

r"""The largest margin of several classes in the nuclear norm, with a certificate.

$$\gamma_* = \max_{\lVert W\rVert_*\le1}\min_{i,k} m_{ik}(W)
= \min_{p\ge0,\ \sum p=1}\lVert A(p)\rVert_2, \qquad A(p) = \sum_{i,k}p_{ik}z_{ik},$$

the norm that two layers maximise the margin in. Any $W$ bounds it from below and any $p$ from
above, whatever found them.

**The method** is a barrier method for the dual in the form $\max\sum p$, $\lVert A(p)\rVert_2\le1$,
which any small $p > 0$ satisfies strictly:

$$f_t(p) = -t\sum_j p_j - \sum_j\log p_j - \log\det(I - AA^\top).$$

With $X = I - AA^\top$, $Y = I - A^\top A$ the last term has the gradient $G = 2X^{-1}A$ and the
second derivative $\mathcal H D = 2X^{-1}DY^{-1} + 2X^{-1}AD^\top X^{-1}A$. A Newton step, with
$g_j = -t - 1/p_j + \langle z_j, G\rangle$ and $E = \mathcal H\,\delta A$, is

$$\mathcal H^{-1}E + M E = -\sum_j p_j^2g_jz_j, \quad M = \sum_jp_j^2z_jz_j^\top, \qquad
\delta p_j = -p_j^2(g_j + \langle z_j, E\rangle):$$

a system of order $(K-1)d$ for any number of points. The predictor is $W = (G + E)/t$, whose
margins $1 + (1 - \delta p_j/p_j)/(t p_j)$ follow from the equation for $\delta p$ alone: rounding
in $G$, where $X$ is nearly singular, does not reach them.

**The end** is Newton's method for the conditions of optimality, once the barrier has told which
margins are smallest, $j \in S$, and the rank r of W. In factors $W = PQ^\top$, of r columns, with
$\lVert W\rVert_* = \min\frac12(\lVert P\rVert^2 + \lVert Q\rVert^2)$, they are

$$P = A(p)\,Q, \qquad Q = A(p)^\top P, \qquad \langle z_j, PQ^\top\rangle = 1, \quad j \in S,$$

solved in the least-squares sense, since factors may be rotated. Where the barrier's square roots
of round-off end at a gap of about 1e-7 this goes on to 1e-14.

Boyd and Vandenberghe, *Convex Optimization* (2004), 11.3 and 11.6.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import lstsq

from gflow.problem.margin_classes import Contrasted

GAP = 1e-11
"""Relative gap at which the method stops; rounding may end it earlier."""

FASTER = 2.5
"""The factor of t from one centre to the next."""

BISECTIONS = 40
"""Of a step: where it ends need not be known well."""

NEAR = 2e-3
"""Relative distance from the optimum along the central path from which the end is tried."""

BEGIN = 0.3
"""Relative distance from the optimum along the central path at which the method begins."""

POLISHING, EXCHANGES = 6, 20
"""Newton steps, and margins that join or leave those that are smallest, at the end."""

FARTHEST = 1.0
"""A Newton step may be lengthened so many times."""

MOST = 200
"""Newton steps."""

EPSILON = float(np.finfo(np.float64).eps)


class Nuclear(NamedTuple):
    """The best predictor and the best weights that were found."""

    matrix: Float[np.ndarray, "contrasts dim"]
    """In contrasts, of nuclear norm one."""
    weights: Float[np.ndarray, " margins"]
    lower: float
    upper: float


def nuclear(data: Contrasted, start: np.ndarray, weights: np.ndarray) -> Nuclear:
    r"""Solve for $\gamma_*$ of separable data.

    Args:
        data: with entries of order one.
        start: a separating predictor, in contrasts, as the Frobenius norm's.
        weights: those of the Frobenius norm's solution.
    """
    (matrix, lower), (total, upper) = _lower(data, start), _upper(data, weights)
    best = Nuclear(matrix, total, lower, upper)
    q, d = data.shape
    num = len(weights)
    # Near a centre: weights of the Frobenius norm's solution, and 1/(t (m_j - 1)) of the others.
    margins = data.margins(start)
    p = weights / np.linalg.norm(data.gather(weights), 2)
    t = num / (BEGIN * p.sum())
    p = p + 1 / (t * (1.5 * margins / margins.min() - 1))
    p = p * (0.8 / np.linalg.norm(data.gather(p), 2))
    for _ in range(MOST):
        a = data.gather(p)
        x_inv, y_inv = (np.linalg.inv(np.eye(len(m)) - m) for m in (a @ a.T, a.T @ a))
        xa = x_inv @ a
        g = -t - 1 / p + 2 * data.margins(xa)
        # On flattened D; the second term takes D[j, k] to E[i, l] by xa[i, k] xa[j, l].
        hessian = 2 * np.kron(x_inv, y_inv)
        hessian += 2 * np.einsum("ik,jl->iljk", xa, xa).reshape(q * d, q * d)
        root = _root(hessian)
        m = data.gram(p**2)
        rhs = -data.gather(p**2 * g).ravel()
        inner = np.linalg.solve(np.eye(q * d) + root.T @ m @ root, root.T @ rhs)
        e = (root @ inner).reshape(q, d)
        change = -(p**2) * (g + data.margins(e))
        matrix, lower = _lower(data, (2 * xa + e) / t)
        if lower > best.lower:
            best = best._replace(matrix=matrix, lower=lower)
        decrement = float(np.sqrt(max(-(g @ change), 0.0)))
        if not np.isfinite(decrement):
            break
        step = _along(data, t, p, change)
        p = p + step * change
        total, upper = _upper(data, p)
        if upper < best.upper:
            best = best._replace(weights=total, upper=upper)
        if decrement < 0.5:
            if (num + q) / (t * p.sum()) < NEAR:
                best = _better(data, best, *polished(data, best.matrix, p, t))
            if best.upper - best.lower <= GAP * best.upper:
                break
            t *= FASTER
        elif step == 0.0:  # rounding
            break
    return best


def _better(data: Contrasted, best: Nuclear, matrix: np.ndarray, weights: np.ndarray) -> Nuclear:
    """The best of both bounds."""
    if not (np.all(np.isfinite(matrix)) and weights.sum() > 0):
        return best
    (matrix, lower), (weights, upper) = _lower(data, matrix), _upper(data, weights)
    if lower > best.lower:
        best = best._replace(matrix=matrix, lower=lower)
    if upper < best.upper:
        best = best._replace(weights=weights, upper=upper)
    return best


def polished(
    data: Contrasted, matrix: np.ndarray, p: np.ndarray, t: float
) -> tuple[np.ndarray, np.ndarray]:
    """The end: a predictor and weights from those near a solution.

    Args:
        data: of the problem.
        matrix: a predictor.
        p: weights with a matrix A of norm one, nearly.
        t: of the barrier, where p is a centre.
    """
    slack = data.margins(matrix)
    matrix, slack = matrix / slack.min(), slack / slack.min() - 1
    u, sizes, vt = np.linalg.svd(matrix, full_matrices=False)
    below = 1 - np.linalg.svd(data.gather(p), compute_uv=False)
    # On the central path p_j (m_j - 1) = 1/t, and w_i (1 - s_i^2) = 2 s_i/t: which is the smaller.
    on = np.flatnonzero(p * slack.size > slack * p.sum())
    rank = max(1, int(np.count_nonzero(sizes / sizes.sum() > below)))
    left, right = u[:, :rank] * np.sqrt(sizes[:rank]), vt[:rank].T * np.sqrt(sizes[:rank])
    weights = p[on]
    for _ in range(EXCHANGES):
        left, right, weights = _optimal(data.some(on), left, right, weights)
        if not np.all(np.isfinite(weights)):
            break
        margins = data.margins(left @ right.T)
        worst, low = int(np.argmin(weights)), int(np.argmin(margins))
        if weights[worst] < 0:
            on, weights = np.delete(on, worst), np.delete(weights, worst)
        elif margins[low] < 1 - 1e-12 and low not in on:
            on, weights = np.append(on, low), np.append(weights, 0.0)
        else:
            break
    found = np.zeros_like(p)
    found[on] = np.maximum(weights, 0.0)
    return left @ right.T, found


def _optimal(
    z: np.ndarray, left: np.ndarray, right: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's method for the conditions of optimality with given margins at one.

    Args:
        z: of these margins, shape (count, q, d).
        left, right: P and Q.
        weights: p.
    """
    (q, rank), d, count = left.shape, len(right), len(z)
    parts = np.cumsum([q * rank, d * rank])
    eye = np.eye(rank)
    for _ in range(POLISHING):
        a = np.tensordot(weights, z, 1)
        zr, zl = z @ right, z.mT @ left
        rows_l, rows_r = zr.reshape(count, -1), zl.reshape(count, -1)
        residual = np.concatenate(
            [
                (left - a @ right).ravel(),
                (right - a.T @ left).ravel(),
                1 - rows_l @ left.ravel(),
            ]
        )
        jacobian = np.block(
            [
                [np.eye(q * rank), -np.kron(a, eye), -rows_l.T],
                [-np.kron(a.T, eye), np.eye(d * rank), -rows_r.T],
                [-rows_l, -rows_r, np.zeros((count, count))],
            ]
        )
        change = lstsq(jacobian, -residual, cond=1e-13, lapack_driver="gelsy")[0]  # pyright: ignore
        dl, dr, dp = np.split(change, parts)
        left, right = left + dl.reshape(q, rank), right + dr.reshape(d, rank)
        weights = weights + dp
        if not np.linalg.norm(change) > 1e-13 * np.linalg.norm(left):
            break
    return left, right, weights


def _along(data: Contrasted, t: float, p: np.ndarray, change: np.ndarray) -> float:
    """Where f_t is smallest along a Newton step, by bisection of its slope, at most so far.

    It is convex, and infinite where p or I - A A^T ceases to be positive.
    """
    a, da = data.gather(p), data.gather(change)
    falling = change < 0
    high = min(FARTHEST, 0.8 * float(np.min(-p[falling] / change[falling], initial=np.inf)))

    def slope(step: float) -> float:
        here, at = a + step * da, p + step * change
        inside = np.eye(len(a)) - here @ here.T
        if np.min(at) <= 0 or np.linalg.eigvalsh(inside)[0] <= 0:
            return np.inf
        barrier = 2 * np.sum(np.linalg.solve(inside, here) * da)
        return float(-t * change.sum() - np.sum(change / at) + barrier)

    if slope(high) <= 0:
        return high
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return low


def _root(hessian: np.ndarray) -> np.ndarray:
    """R with R R^T = H, also where rounding has made H indefinite."""
    try:
        return np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(hessian)
        return vectors * np.sqrt(np.maximum(values, EPSILON * values[-1]))


def _lower(data: Contrasted, matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """A predictor of norm one, and a number surely below its smallest margin.

    Rounding: of a margin at most so many ulps as its sum has terms, of the sum of their sizes; of
    the norm some of its dimension.
    """
    norm = float(np.sum(np.linalg.svd(matrix, compute_uv=False)))
    if not (np.isfinite(norm) and norm > 0):
        return matrix, -np.inf
    unit = matrix / norm
    lost = (sum(data.shape) + 8) * EPSILON
    sure = float(np.min(data.margins(unit) - lost * data.magnitudes(unit)))
    return unit, sure * (1 - math.copysign(lost, sure))


def _upper(data: Contrasted, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights that sum to one, and a number surely above the norm of their matrix."""
    p = weights / weights.sum()
    lost = (sum(data.shape) + 8) * EPSILON
    size = float(np.linalg.norm(data.gather(p), 2))
    rounding = lost * float(np.linalg.norm(data.gather_sizes(p)))
    return p, float(size * (1 + lost) + rounding)

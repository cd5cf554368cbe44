"""Solver behind `max_margin` for norms 1 and infinity, judged by `margin_bounds` alone."""

import math

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog

from gflow.problem.compensated import Pair, least_squares
from gflow.problem.margin_bounds import lower_bound, upper_bound


def polyhedral(z: Float[np.ndarray, "points dim"], norm: float, w: Pair) -> tuple[Pair, Pair]:
    r"""Solve $\max t$ subject to $\langle w, z_i\rangle\ge t$, $\lVert w\rVert\le1$, and its dual.

    A linear programme on a working set of points, then the vertex it found with 32 digits.

    Args:
        z: signed inputs with entries of order one, separable.
        norm: 1 or infinity.
        w: a separating direction: it gives the scale and the first working set.
    """
    n, d = z.shape
    margins = z @ w.high
    y = z / (margins.min() / np.linalg.norm(w.high))  # so that the best margin is of order one
    size = min(n, 4 * d + 16)
    working = np.sort(np.argpartition(margins, size - 1)[:size])
    for _ in range(200):
        x, t, weights = _linear_programme(y[working], norm)
        margins = y @ x
        wrong = np.flatnonzero(margins < t - 1e-9 * max(1.0, abs(t)))
        fresh = wrong[~np.isin(wrong, working)]
        if not fresh.size:
            break
        if len(fresh) > 4 * d:
            fresh = fresh[np.argpartition(margins[fresh], 4 * d)[: 4 * d]]
        working = np.union1d(working, fresh)
    p = np.zeros(n)
    p[working] = weights
    return _vertex(z, norm, x, Pair.of(p), margins - t)


def _linear_programme(y: np.ndarray, norm: float) -> tuple[np.ndarray, float, np.ndarray]:
    """The vertex: predictor, margin, weights of the points."""
    m, d = y.shape
    if norm == math.inf:
        matrix = np.hstack([-y, np.ones((m, 1))])
        bounds = [(-1.0, 1.0)] * d + [(None, None)]
        rhs = np.zeros(m)
    else:  # w = w_plus - w_minus
        ball = np.append(np.ones(2 * d), 0.0)
        matrix = np.vstack([np.hstack([-y, y, np.ones((m, 1))]), ball])
        bounds = [(0.0, None)] * (2 * d) + [(None, None)]
        rhs = np.append(np.zeros(m), 1.0)
    cost = np.append(np.zeros(matrix.shape[1] - 1), -1.0)
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(cost, matrix, rhs, bounds=bounds, method="highs-ds", options=options)
    if found.x is None:
        raise RuntimeError(f"The linear programme of the margin failed: {found.message}")
    w = found.x[:d] if norm == math.inf else found.x[:d] - found.x[d : 2 * d]
    weights = np.maximum(-found.ineqlin.marginals[:m], 0.0)
    return w, float(found.x[-1]), weights


def _vertex(
    z: np.ndarray, norm: float, w: np.ndarray, p: Pair, excess: np.ndarray
) -> tuple[Pair, Pair]:
    r"""The optimal pair again, from its active constraints.

    With $C$ the active constraints of the unit ball, $Cw = c$ ($w_j = \pm1$ for norm infinity;
    $w_j = 0$ and $\langle s, w\rangle = 1$, $s$ the signs, for norm 1), the vertex solves
    $\begin{pmatrix} Z_A & -1\\ C & 0\end{pmatrix}(w, t) = (0, c)$, and its weights solve the
    transposed system with right-hand side $(0, -1)$. Which constraints are active is read off $w$,
    and again off $p$. Each solution is used only if its bound is the better one.
    """
    d = z.shape[1]
    identity = np.eye(d)
    mean, carried = z.T @ p.high, np.abs(z).T @ p.high
    if norm == math.inf:
        at_bound, pushed = np.abs(w) > 1.0 - 1e-9, np.abs(mean) > 1e-9 * carried
        balls = [
            (identity[at_bound], np.sign(w[at_bound])),
            (identity[pushed], np.sign(mean[pushed])),
        ]
    else:
        used, tight = np.abs(w) > 1e-9, np.abs(mean) > (1.0 - 1e-9) * np.abs(mean).max()
        balls = [
            (
                np.vstack([identity[~chosen], signs * chosen]),
                np.append(np.zeros((~chosen).sum()), 1.0),
            )
            for chosen, signs in ((used, np.sign(w)), (tight, np.sign(mean)))
        ]
    rows = [np.flatnonzero(excess < 1e-9), np.flatnonzero(p.high > 1e-10 * p.high.max())]

    def system(rows: np.ndarray, ball: np.ndarray) -> np.ndarray:
        ones = np.append(-np.ones(len(rows)), np.zeros(len(ball)))
        return np.column_stack([np.vstack([z[rows], ball]), ones])

    best_w, best_p = Pair.of(w), p
    for active, (ball, values) in zip(rows, balls, strict=True):
        x = least_squares(system(active, ball), Pair.of(np.append(np.zeros(len(active)), values)))
        if x is not None:
            polished = Pair(x.high[:d], x.low[:d])
            if lower_bound(z, polished, norm)[1] > lower_bound(z, best_w, norm)[1]:
                best_w = polished
    rows[0] = lower_bound(z, best_w, norm)[2]
    for active, (ball, _) in zip(rows, balls, strict=True):
        y = least_squares(system(active, ball).T, Pair.of(np.append(np.zeros(d), -1.0)))
        k = len(active)
        if y is not None and (y.high[:k] > 0.0).all():
            polished = Pair.scattered(len(z), active, Pair(y.high[:k], y.low[:k]))
            if upper_bound(z, polished, norm) < upper_bound(z, best_p, norm):
                best_p = polished
    return best_w, best_p

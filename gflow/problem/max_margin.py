r"""The hard-margin direction through the origin, with bounds that prove it.

For signed inputs $z_i$ and a norm with dual norm $\lVert\cdot\rVert_*$ the two problems

$$\gamma = \max_{\lVert w\rVert \le 1}\, \min_i \langle w, z_i\rangle
       = \min_{p \ge 0,\ \sum p_i = 1}\, \Big\lVert \sum_i p_i z_i \Big\rVert_*$$

have the same value. So any $w$ bounds $\gamma$ from below and any $p$ from above, whatever found
them, and the bounds reported here are evaluated from $w$ and $p$ alone, in twice the working
precision, with the remaining rounding error on the safe side.

Data are separable through the origin exactly when $\gamma > 0$. If they are not, some convex
combination of the $z_i$ is zero, and its weights $p$ are the certificate (Farkas).
"""

import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int

from gflow.problem.compensated import EPSILON, Pair, residual

if TYPE_CHECKING:
    from gflow.problem.data import Dataset

# A point counts as on the margin when its excess over it is below this multiple of its own norm: what
# rounding the data to float64 does to points that are meant to lie there.
_SUPPORT_TOLERANCE = 64 * EPSILON


class MaxMargin(eqx.Module):
    r"""The solution of a max-margin problem, or the proof that there is none.

    The bounds hold for the data as given. They refer to $w$ and $p$ with 32 digits; rounding them to
    float64, as `direction` and `dual` are, changes the margin by about $10^{-16}\max\lVert z_i\rVert$,
    which matters where the margin is below 1e-4 of that.
    """

    direction: Float[np.ndarray, " dim"]
    r"""The maximiser $\bar u$, of unit norm; NaN where no separating direction was found."""
    margin: float
    r"""$\min_i \langle\bar u, z_i\rangle$, or zero where no separating direction was found."""
    margin_lower: float
    r"""A proven lower bound of $\gamma$; zero (the value of $w = 0$) unless a direction separates."""
    margin_upper: float
    r"""A proven upper bound of $\gamma$."""
    dual: Float[np.ndarray, " points"]
    r"""The weights $p$: non-negative, sum one. For norm 2, $\sum_i p_i z_i = \gamma\bar u$; for data
    that are not separable, $\sum_i p_i z_i = 0$."""
    support: Int[np.ndarray, " support"]
    r"""Indices of all points on the margin, also those with $p_i = 0$; for data that are not
    separable, those with $p_i > 0$."""
    norm: float = eqx.field(static=True)
    """The norm of the direction: 1, 2 or infinity."""

    @property
    def separable(self) -> bool:
        r"""Whether $\gamma > 0$ is proven. If not, $\gamma$ is at most `margin_upper`."""
        return self.margin_lower > 0.0

    @property
    def certificate(self) -> Float[np.ndarray, " entries"]:
        """What proves the verdict: `direction` if separable, else `dual`."""
        return self.direction if self.separable else self.dual

    @property
    def duality_gap(self) -> float:
        """`margin_upper - margin_lower`, certified."""
        return self.margin_upper - self.margin_lower

    @property
    def relative_gap(self) -> float:
        """The duality gap relative to `margin_upper`: one if nothing is known, zero if all is."""
        return self.duality_gap / self.margin_upper if self.margin_upper > 0.0 else 0.0

    @property
    def summary(self) -> str:
        """The verdict in a few words."""
        if self.separable:
            return f"max margin {self.margin:.6g} (certified to {self.relative_gap:.0e})"
        return f"not separable through the origin (margin <= {self.margin_upper:.2g})"

    def __repr__(self) -> str:
        if not isinstance(self.dual, np.ndarray):  # inside a transformation
            return f"MaxMargin(norm={self.norm:g}, traced)"
        points = f"{len(self.support)} of {len(self.dual)} points"
        if self.separable:
            return (
                f"MaxMargin(norm {self.norm:g}: margin {self.margin:.15g}, proven within "
                f"[{self.margin_lower:.17g}, {self.margin_upper:.17g}], relative gap "
                f"{self.relative_gap:.1e}; support: {points})"
            )
        return (
            f"MaxMargin(norm {self.norm:g}: no direction through the origin separates the data; margin "
            f"<= {self.margin_upper:.3g}, proven by {points} whose weighted mean has that norm)"
        )


def max_margin(
    data: "Dataset | Float[np.ndarray, 'points dim']", *, norm: float = 2
) -> MaxMargin:
    r"""Find the direction of the largest margin, $\max_{\lVert w\rVert\le1}\min_i\langle w, z_i\rangle$.

    For norm 2 this is the hard-margin support vector machine without bias.

    Args:
        data: a data set, or its signed inputs $z_i = y_i x_i$, one row a point.
        norm: of the direction $w$, not of the data: 2, 1 or `inf`.

    Returns:
        The direction, the dual weights and proven bounds of the margin.

    Raises:
        ValueError: if `norm` is another number, or `data` is not a table of finite numbers.

    >>> solution = max_margin(np.array([[3.0, 4.0]]))
    >>> solution.direction.tolist(), solution.margin
    ([0.6, 0.8], 5.0)
    >>> max_margin(np.array([[1.0, 0.0], [-1.0, 0.0]])).separable
    False
    """
    z = _signed_inputs(data)
    if norm not in (1, 2, math.inf):
        raise ValueError(f"`norm` is {norm!r}; expected 2, 1 or math.inf.")
    # A power of two, so that scaling is exact.
    largest = float(np.abs(z).max())
    scale = 2.0 ** math.frexp(largest)[1] if largest > 0.0 else 1.0
    z = np.ldexp(z, -math.frexp(scale)[1] + 1)

    from gflow.problem import max_margin_solvers as solvers

    w, p = solvers.euclidean(z)
    solution = _certified(z, w, p, 2.0, scale)
    if norm == 2:
        return solution
    if not solution.separable:
        return _certified(z, None, p, float(norm), scale)
    w, p = solvers.polyhedral(z, float(norm), w, solution.margin / scale)
    return _certified(z, w, p, float(norm), scale)


# -------------------------------------------------------------------------------------------------
# Bounds
# -------------------------------------------------------------------------------------------------


def _certified(z: np.ndarray, w: Pair | None, p: Pair, norm: float, scale: float) -> MaxMargin:
    upper = upper_bound(z, p, norm)
    dual = np.zeros(len(z))
    dual[:] = p.high / p.high.sum()
    if w is not None:
        achieved, lower, near = lower_bound(z, w, norm)
        if lower > 0.0:
            direction = w.high / _norm(w.high, norm)
            return MaxMargin(
                direction=direction / _norm(direction, norm),
                margin=achieved * scale,
                margin_lower=lower * scale,
                margin_upper=max(upper, lower) * scale,
                dual=dual,
                support=near,
                norm=norm,
            )
    return MaxMargin(
        direction=np.full(z.shape[1], np.nan),
        margin=0.0,
        margin_lower=0.0,
        margin_upper=upper * scale,
        dual=dual,
        support=np.flatnonzero(dual > 0.0),
        norm=norm,
    )


def lower_bound(
    z: Float[np.ndarray, "points dim"], w: Pair, norm: float
) -> tuple[float, float, Int[np.ndarray, " support"]]:
    r"""$\min_i \langle w, z_i\rangle/\lVert w\rVert$, a number surely below it, and who attains it."""
    size = _pair_norm(w, norm)
    if not (size > 0.0 and np.isfinite(size)):
        return 0.0, 0.0, np.zeros(0, dtype=int)
    # Float64 first; exactly where its error leaves the minimum, or the support, open.
    rough = z @ w.high
    norms = np.linalg.norm(z, axis=1)
    slack = (4 * (z.shape[1] + 2) * EPSILON) * norms * np.linalg.norm(w.high)
    slack += _SUPPORT_TOLERANCE * norms * size
    open_rows = np.flatnonzero(rough - slack <= (rough + slack).min())
    margins = -residual(None, z[open_rows], w)
    smallest = margins.min()
    achieved = smallest / size
    # Left over: ulps of `smallest` and `size`, and the second-order error of the products.
    remainder = 64 * EPSILON**2 * math.sqrt(z.shape[1]) * norms.max()
    lower = achieved * (1.0 - 4 * EPSILON * math.copysign(1.0, achieved)) - remainder
    on_margin = margins - smallest <= _SUPPORT_TOLERANCE * norms[open_rows] * size
    return float(achieved), float(lower), open_rows[on_margin]


def upper_bound(z: Float[np.ndarray, "points dim"], p: Pair, norm: float) -> float:
    r"""A number surely above $\lVert\sum_i p_i z_i\rVert_*/\sum_i p_i$."""
    rows = np.flatnonzero(p.high > 0.0)
    weights = Pair(p.high[rows], p.low[rows])
    mean = -residual(None, z[rows].T, weights)
    total = float(-residual(None, np.ones((1, len(rows))), weights)[0])
    dual_norm = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]
    # Where the mean is exactly zero so are the products and their errors, and the bound.
    magnitude = np.abs(z[rows]).T @ weights.high
    remainder = 64 * EPSILON**2 * _norm(magnitude, dual_norm)
    value = _norm(mean, dual_norm)
    return float((value * (1.0 + (8 + z.shape[1]) * EPSILON) + remainder) / total * (1 + EPSILON))


def _norm(vector: np.ndarray, norm: float) -> float:
    return float(np.linalg.norm(vector, norm))

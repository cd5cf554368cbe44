r"""What a predictor and a set of weights prove about the margin.

Any $w$ bounds the margin from below and any $p\ge0$ from above. Both bounds are evaluated in twice
the working precision, with the remaining rounding error on the safe side.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from gflow.problem.compensated import EPSILON, Pair, residual

# A point counts as on the margin when its excess over it is below this multiple of its own norm:
# what rounding to float64 does to points that are meant to lie there.
_SUPPORT_TOLERANCE = 64 * EPSILON


def lower_bound(
    z: Float[np.ndarray, "points dim"], w: Pair, norm: float
) -> tuple[float, float, Int[np.ndarray, " support"]]:
    r"""The smallest margin, a number surely below it, and the points that attain it.

    $$\min_i \langle w, z_i\rangle/\lVert w\rVert$$
    """
    size = norm_of(w.high, norm)
    if not (size > 0.0 and np.isfinite(size)):
        return 0.0, 0.0, np.zeros(0, dtype=np.intp)
    rows, margins, magnitudes = smallest_margins(z, w)
    smallest = margins.min()
    support = rows[margins - smallest <= _SUPPORT_TOLERANCE * magnitudes]
    achieved = smallest / size
    # What is left: ulps of `smallest`, of `size` and of their ratio, and the squared epsilon of the
    # sums.
    sure = float((margins - 256 * EPSILON**2 * magnitudes).min()) / size
    lower = sure - 4 * EPSILON * abs(achieved)
    return float(achieved), float(lower), support


def smallest_margins(
    z: Float[np.ndarray, "points dim"], w: Pair
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    r"""The points that attain the smallest margin, or may, and their margins with 32 digits.

    The third array is $\sum_j\lvert z_{ij}w_j\rvert$: times epsilon, what rounding the data does.
    """
    rough = z @ w.high
    magnitudes = np.abs(z) @ np.abs(w.high)
    slack = ((z.shape[1] + 4) * EPSILON + _SUPPORT_TOLERANCE) * magnitudes
    rows = np.flatnonzero(rough - slack <= (rough + slack).min())
    return rows, -residual(None, z[rows], w), magnitudes[rows]


def upper_bound(z: Float[np.ndarray, "points dim"], p: Pair, norm: float) -> float:
    r"""A number surely above $\lVert\sum_i p_i z_i\rVert_*/\sum_i p_i$."""
    dual_norm = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]
    rows = np.flatnonzero(p.high > 0.0)
    weights = Pair(p.high[rows], p.low[rows])
    mean = residual(None, z[rows].T, weights)
    tiny = 256 * EPSILON**2 * norm_of(np.abs(z[rows]).T @ weights.high, dual_norm)
    total = math.fsum(weights.high)
    return float((norm_of(mean, dual_norm) * (1.0 + 8 * EPSILON) + tiny) / total)


def norm_of(vector: Float[np.ndarray, " entries"], norm: float) -> float:
    """The 1-, 2- or infinity-norm, to an ulp or two."""
    size = np.abs(vector)
    largest = float(size.max())
    if norm == math.inf or largest == 0.0 or not math.isfinite(largest):
        return largest
    if norm == 1.0:
        return math.fsum(size)
    return largest * math.sqrt(math.fsum((size / largest) ** 2))

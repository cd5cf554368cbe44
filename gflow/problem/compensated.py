r"""Dot products and linear systems in twice the working precision.

A sum of products in float64 carries an error of about $10^{-16}\sum_i\lvert a_i b_i\rvert$. Where
the terms cancel, as the margins of a barely separable data set do, that error is all there is. Here
the rounding error of each product and each sum is itself computed exactly in float64 and added up,
so the result is as if computed with 32 digits and then rounded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

EPSILON = float(np.finfo(np.float64).eps)


class Pair(NamedTuple):
    """The vector `high + low`, with about 32 digits an entry."""

    high: Float[np.ndarray, " entries"]
    low: Float[np.ndarray, " entries"]

    @classmethod
    def of(cls, vector: Float[np.ndarray, " entries"]) -> "Pair":
        """The pair of a float64 vector."""
        return cls(np.asarray(vector, dtype=np.float64), np.zeros(len(vector)))

    @classmethod
    def scattered(cls, size: int, places: np.ndarray, values: "Pair") -> "Pair":
        """The pair of a vector that is zero but for `values` at `places`."""
        high, low = np.zeros(size), np.zeros(size)
        high[places], low[places] = values
        return cls(high, low)

    def plus(self, correction: Float[np.ndarray, " entries"]) -> "Pair":
        """The sum with a small float64 vector."""
        total, error = _two_sum(self.high, correction)
        return Pair(*_two_sum(total, error + self.low))


def residual(
    target: Pair | None, matrix: Float[np.ndarray, "rows columns"], vector: Pair
) -> Float[np.ndarray, " rows"]:
    """`target - matrix @ vector`, rounded once; a missing target is zero.

    The error is an ulp of the result plus about 1e-31 times the sum of the absolute terms. Entries
    are expected well inside the range of float64, below 1e150 and their products above 1e-290.
    """
    products, errors = _two_product(matrix, vector.high)
    errors = errors + matrix * vector.low
    if target is not None:
        products = np.column_stack([target.high, -products])
        errors = np.column_stack([target.low, -errors])
    else:
        products, errors = -products, -errors
    # Sum by halves, all rows at once.
    while products.shape[1] > 1:
        if products.shape[1] % 2:
            zero = np.zeros((len(products), 1))
            products, errors = np.hstack([products, zero]), np.hstack([errors, zero])
        half = products.shape[1] // 2
        products, error = _two_sum(products[:, :half], products[:, half:])
        errors = errors[:, :half] + errors[:, half:] + error
    return products[:, 0] + errors[:, 0]


def refine(
    correction: Callable[..., tuple[np.ndarray, ...]], *sizes: int, accept: float
) -> tuple[Pair, ...] | None:
    """Iterative refinement from zero: add corrections for as long as each is half the last.

    Args:
        correction: takes the current pairs and returns what to add to each.
        sizes: the lengths of the vectors sought.
        accept: the relative size that corrections must have reached; else the answer is None, as it
            is for a singular system.
    """
    current = tuple(Pair.of(np.zeros(size)) for size in sizes)
    last = math.inf
    try:
        with np.errstate(all="ignore"):
            for _ in range(12):
                steps = correction(*current)
                proposed = tuple(x.plus(dx) for x, dx in zip(current, steps, strict=True))
                change = max(
                    float(np.linalg.norm(dx) / np.linalg.norm(x.high))
                    for x, dx in zip(proposed, steps, strict=True)
                )
                if not change < 0.5 * last:
                    break
                current, last = proposed, change
                if change < EPSILON**2:
                    break
    except (np.linalg.LinAlgError, ValueError):  # singular, or no longer finite
        return None
    return current if last < accept else None


def least_squares(matrix: Float[np.ndarray, "rows columns"], target: Pair) -> Pair | None:
    """The solution of a consistent system; None if refinement does not converge to one."""
    from scipy.linalg import solve_triangular

    rows, columns = matrix.shape
    if rows < columns:
        return None
    q, r = np.linalg.qr(matrix)

    def correction(x: Pair) -> tuple[np.ndarray, ...]:
        return (solve_triangular(r, q.T @ residual(target, matrix, x)),)

    found = refine(correction, columns, accept=1e-8)
    return None if found is None else found[0]


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and what rounding took away (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded product and what rounding took away (Dekker, with Veltkamp's splitting)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = 134217729.0 * a  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high

r"""Dot products and linear systems in twice the working precision.

A sum of products in float64 carries an error of about $10^{-16}\sum_i\lvert a_i b_i\rvert$. Where the
terms cancel, as the margins of a barely separable data set do, that error is all there is. Here the
rounding error of each product and each sum is itself computed exactly in float64 and added up, so the
result is as if computed with 32 digits and then rounded.
"""

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

    def plus(self, correction: Float[np.ndarray, " entries"]) -> "Pair":
        """The sum with a small float64 vector."""
        return Pair(*_two_sum(*_two_sum_then(self.high, correction, self.low)))


def residual(
    target: Pair | None, matrix: Float[np.ndarray, "rows columns"], vector: Pair
) -> Float[np.ndarray, " rows"]:
    """`target - matrix @ vector`, rounded once; a missing target is zero.

    The error is an ulp of the result plus about 1e-31 times the sum of the absolute terms. Entries are
    expected well inside the range of float64, below 1e150 and their products above 1e-290.
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


def _two_sum(
    a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and what rounding took away (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_sum_then(a: np.ndarray, b: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, error = _two_sum(a, b)
    return total, error + low


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

"""Logarithms without overflow or cancellation, in NumPy."""

import numpy as np

Values = np.ndarray | float
"""An array, or one number."""


def log_expm1(x: Values) -> np.ndarray:
    r"""$\log(e^x - 1)$ for $x \ge 0$: from $\log(1 + t)$ to $\log t$. Minus infinity at zero.

    >>> float(log_expm1(1000.0))
    1000.0
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(x < 1.0, np.log(np.expm1(x)), x + np.log1p(-np.exp(-np.asarray(x))))

"""Where a quantity is zero that is known by values and slopes at both ends of an interval."""

from types import ModuleType
from typing import Any

NEWTON = 12
"""Newton iterations, each kept within what is known to hold the root."""


def root_of_cubic(a: Any, c: Any, b: Any, d: Any, xp: ModuleType) -> tuple[Any, Any]:
    """Where in [0, 1] cubics of Hermite pass zero, and their slopes there.

    Args:
        a, b: values at 0 and 1, a <= 0 <= b.
        c, d: slopes there.
        xp: ``numpy`` or ``jax.numpy``, whose arrays these are.
    """
    # a + c x + p x^2 + q x^3
    p, q = 3 * (b - a) - 2 * c - d, c + d - 2 * (b - a)
    low, high = xp.zeros_like(b), xp.ones_like(b)
    x = xp.clip(-a / xp.where(b > a, b - a, 1.0), 0.0, 1.0)
    for _ in range(NEWTON):
        value, slope = a + x * (c + x * (p + x * q)), c + x * (2 * p + 3 * x * q)
        low, high = xp.where(value < 0, x, low), xp.where(value < 0, high, x)
        new = x - value / xp.where(slope == 0, 1.0, slope)
        x = xp.where((new >= low) & (new <= high), new, (low + high) / 2)
    return x, c + x * (2 * p + 3 * x * q)

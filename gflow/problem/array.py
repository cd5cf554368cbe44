"""The type of arrays, of NumPy or of JAX, and their sum."""

import functools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    Array = jax.Array  # whose operators the checker knows; JAX takes NumPy's arrays as well
else:
    Array = jax.Array | np.ndarray | np.generic


def as_array(values: Any) -> Array:
    """``values``, which are NumPy's, where an array of either kind is taken."""
    return values


def total(terms: Iterable[Array]) -> Array:
    """The sum of arrays of one shape, of which there is at least one.

    Added where they are made. XLA's sum over a leading axis of an array of them takes ten times as
    long on a CPU: 3.4 ms for three matrices of order 288.
    """
    return functools.reduce(operator.add, terms)

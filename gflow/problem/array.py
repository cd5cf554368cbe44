"""The type of arrays, of NumPy or of JAX."""

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

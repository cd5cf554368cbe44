"""How long the next step is: the one step-size control of all adaptive solvers."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0

STEADY = 0.1
"""A step whose error is below this part of the tolerance does not shorten the next: part of such an
error is round-off, which shorter steps do not reduce."""

DOUBTFUL = 100 * float(np.finfo(np.float64).eps)
"""An error below this, relative to the weights, may be round-off as a whole. It is no reason to
stay at a short step, as the memory of the control would have it."""

LEAST_ERROR = 1e-10
"""Errors are counted as at least this part of the tolerance."""


def propose(
    step: Any,
    norm: Any,
    last: Any,
    *,
    exponent: float,
    rtol: Any,
    grow: float = GROW,
    xp: ModuleType = jnp,
) -> tuple[Any, Any]:
    """Whether a step is accepted, and the next step.

    Proportional-integral control (Gustafsson 1991) after an accepted step, plain integral control
    after a refused one.

    Args:
        step: its length.
        norm: of its error, in units of the tolerance; infinite where the step failed.
        last: the norm of the last accepted step before.
        exponent: one over the order of the error in the step.
        rtol: the tolerance, relative to the weights.
        grow: the largest ratio of two steps.
        xp: ``jax.numpy``, or ``numpy`` for a solver that is not compiled.

    >>> propose(1.0, 0.5, 1.0, exponent=0.5, rtol=1e-9, xp=np)[0]
    np.True_
    """
    norm = xp.maximum(norm, LEAST_ERROR)
    accept = norm <= 1
    steady = norm ** (-0.7 * exponent) * last ** (0.4 * exponent)
    factor = xp.where(accept, steady, xp.minimum(norm ** (-exponent), 1.0))
    factor = xp.clip(SAFETY * factor, SHRINK, grow)
    factor = xp.where(norm < STEADY, xp.maximum(factor, 1.0), factor)
    doubtful = (norm < STEADY) & (norm * rtol < DOUBTFUL)
    longer = xp.maximum(SAFETY * norm ** (-exponent), 1.0)
    return accept, step * xp.where(doubtful, xp.maximum(factor, longer), factor)

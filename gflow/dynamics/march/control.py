"""How long the next step is: the one step-size control of all adaptive solvers."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0

STEADY = 0.1
"""The part of the tolerance at which steps settle, of any order. One whose error is below it does
not shorten the next: part of such an error is round-off, which shorter steps do not reduce."""

ROUND_OFF = 100 * float(np.finfo(np.float64).eps)
"""An error below this, relative to the weights, may be round-off as a whole."""


def propose(
    step: Any,
    norm: Any,
    last: Any,
    *,
    exponent: float,
    noise: Any,
    grow: Any = GROW,
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
        noise: the norm that round-off, or an iteration within the step, may leave at any length.
            A smaller error says no more than that: it is no reason to stay at a short step, as the
            memory of the control would have it, nor how much longer the next may be.
        grow: the largest ratio of two steps. Behind a step that has been refused it leads to less
            than the length at which that was (1 in Hairer, Norsett and Wanner, section II.4, which
            would be more steps where an iteration failed, and would not have at the next).
        xp: ``jax.numpy``, or ``numpy`` for a solver that is not compiled.

    >>> accept, longer = propose(1.0, 1e-4, 1.0, exponent=0.5, noise=0.01, xp=np)
    >>> bool(accept), round(float(longer), 9)
    (True, 9.0)
    """
    noise = xp.minimum(noise, STEADY)
    doubtful, norm = norm <= noise, xp.maximum(norm, noise)
    accept = norm <= 1
    # With SAFETY for a factor steps would settle at the norm SAFETY^(1/(0.3 exponent)), which is
    # 0.17, 0.06 and 0.02 of the tolerance for the orders 5, 8 and 11.
    steady = (norm / STEADY) ** (-0.7 * exponent) * (last / STEADY) ** (0.4 * exponent)
    factor = xp.where(accept, steady, SAFETY * xp.minimum(norm ** (-exponent), 1.0))
    factor = xp.clip(factor, SHRINK, grow)
    factor = xp.where(norm < STEADY, xp.maximum(factor, 1.0), factor)
    longer = xp.clip(SAFETY * norm ** (-exponent), 1.0, grow)
    return accept, step * xp.where(doubtful, xp.maximum(factor, longer), factor)

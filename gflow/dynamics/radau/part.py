r"""Steps of many margins of which few count.

Once the risk is small, slopes of most margins are below round-off, and what solves the equations of
a step among the others solves them for all, to the last digit. Which these are is predicted before
the step: as many as there are coordinates, or one in 32, those with the largest shares of the
risk, where what is left out has no more than ``PREDICTED`` of it. That it had no more than
``ROUND_OFF`` at any stage, which is where the equations look, is seen from all margins once the
step is solved; a step for which it does not hold is solved again among all. No bound on how far
margins move is asked for.

All margins are then so large that the loss is a sum of exponentials of theirs to the last digit,
whichever points they belong to. Shares are those of :math:`e^{-q}`.
"""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField
from gflow.problem.array import Array
from gflow.problem.risk import Problem

LEAST = 8192
"""Margins from which on it is worth a second loop, which takes as long to compile as the first."""

PART = 32
"""One in so many margins is chosen, or as many as there are coordinates. Late steps of ten digits
take 0.93 of the time with 576 of 16,173 that they take with 1,010."""

MOST = 4
"""And one in so many at most."""

PREDICTED, ROUND_OFF = 1e-22, 1e-18
"""Shares of the risk that all left out may have together."""


class Part(NamedTuple):
    """The margins that a step is solved among."""

    margins: Array
    """Their numbers, shape (r,)."""
    enough: Array
    """Whether they do, as predicted."""

    @classmethod
    def of(cls, field: AbstractField, log_risk: Array, offsets: Array) -> "Part | None":
        """Those for a step; None for a field or so few margins that all serve.

        Args:
            field: of the flow.
            log_risk: at the start of the step.
            offsets: margins up to a common level at its stages, as predicted, shape (p, margins).
        """
        problem = field.problem
        # Support vectors are no more than coordinates but by chance.
        size = max(problem.num_margins // PART, problem.num_coordinates)
        able = problem.num_margins >= max(LEAST, MOST * size) and problem.design is not None
        if not (able and problem.loss.exponential_tail and field.separates_points):
            return None
        shares = _shares(offsets)
        # In single precision XLA looks for the largest, in double precision it sorts all.
        _, margins = jax.lax.top_k(shares.astype(jnp.float32), size)
        # No loss of a point is larger than their sum, which falls along the step.
        late = log_risk + math.log(problem.data.num_points) < -problem.loss.tail_from
        return cls(margins, late & (jnp.sum(shares.at[margins].set(0.0)) < PREDICTED))

    def field(self, field: AbstractField) -> AbstractField:
        """The field of the risk that they make."""
        problem = field.problem
        assert problem.design is not None
        parts = problem.design.among(self.margins), problem.loss.of_margins
        return eqx.tree_at(lambda f: (f.problem.design, f.problem.loss), field, parts)

    def log_share(self, problem: Problem) -> float:
        """What the logarithm of the mean over them lacks of that of the risk."""
        return math.log(len(self.margins) / problem.data.num_points)

    def proven(self, offsets: Array) -> Array:
        """Whether those left out are below round-off at all stages."""
        shares = _shares(offsets)
        return jnp.sum(shares.at[self.margins].set(0.0)) < ROUND_OFF


def _shares(offsets: Array) -> Array:
    """Bounds of what the margins have of the risk at any stage, shape (margins,).

    Relative to the largest, which is less than the risk: of all stages one exponential.
    """
    behind = jnp.min(offsets, 1, keepdims=True) - offsets
    return jnp.exp(functools.reduce(jnp.maximum, behind))

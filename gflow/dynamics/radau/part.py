r"""Steps of many points of which few count.

Once the risk is small, slopes of most points are below round-off, and what solves the equations of
a step among the others solves them for all, to the last digit. Which these are is predicted before
the step: a quarter of the points, those with the largest shares of the risk, where what is left out
has no more than ``PREDICTED`` of it. That it had no more than ``ROUND_OFF`` at any stage, which is
where the equations look, is seen from all margins once the step is solved; a step for which it does
not hold is solved again among all. No bound on how far margins move is asked for.

Shares are those of :math:`e^{-q}`, which bounds a loss from above. For positive q it is no more
than 1/log 2 times as large, and positive they all are where the losses sum to less than 1/2.
"""

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

PART = 4
"""One in so many points is chosen."""

PREDICTED, ROUND_OFF = 1e-22, 1e-18
"""Shares of the risk that all left out may have together."""

LOG_TOTAL = math.log(0.5)
"""Of the sum of losses: below, all margins are positive."""


class Part(NamedTuple):
    """The points that a step is solved among."""

    points: Array
    """Their numbers, shape (r,)."""
    enough: Array
    """Whether they do, as predicted."""

    @classmethod
    def of(cls, field: AbstractField, log_risk: Array, offsets: Array) -> "Part | None":
        """Those for a step; None for a field or so few points that all serve.

        Args:
            field: of the flow.
            log_risk: at the start of the step.
            offsets: margins up to a common level at its stages, as predicted, shape (p, margins).
        """
        problem = field.problem
        size = problem.data.num_points // PART
        # Fewer points than features have other coordinates (``AbstractDesign.axes``).
        able = problem.design is not None and size >= problem.data.dim
        able = able and problem.num_margins >= LEAST
        if not (able and problem.loss.exponential_tail and field.separates_points):
            return None
        shares = jnp.max(_shares(problem, offsets), 0)
        _, points = jax.lax.top_k(shares, size)
        late = log_risk + math.log(problem.data.num_points) < LOG_TOTAL
        return cls(points, late & (jnp.sum(shares.at[points].set(0.0)) < PREDICTED))

    def field(self, field: AbstractField) -> AbstractField:
        """The field of the points' risk."""
        problem = field.problem
        assert problem.design is not None
        parts = problem.design.chosen(self.points), problem.loss.chosen(self.points)
        return eqx.tree_at(lambda f: (f.problem.design, f.problem.loss), field, parts)

    def log_share(self, problem: Problem) -> float:
        """The logarithm of the part of all points that they are, which a mean is to know."""
        return math.log(len(self.points) / problem.data.num_points)

    def take(self, of_margins: Array, problem: Problem) -> Array:
        """Of numbers of all margins, shape (p, margins), those of the points."""
        by_point = of_margins.reshape(len(of_margins), problem.data.num_points, -1)
        return by_point[:, self.points].reshape(len(of_margins), -1)

    def put(self, of_margins: Array, others: Array, problem: Problem) -> Array:
        """The other way, among the numbers of the others."""
        shape = len(others), problem.data.num_points, -1
        own = of_margins.reshape(len(others), len(self.points), -1)
        return others.reshape(shape).at[:, self.points].set(own).reshape(others.shape)

    def proven(self, problem: Problem, offsets: Array) -> Array:
        """Whether those left out are below round-off at all stages."""
        shares = jnp.max(_shares(problem, offsets), 0)
        return jnp.sum(shares.at[self.points].set(0.0)) < ROUND_OFF


def _shares(problem: Problem, offsets: Array) -> Array:
    """Of the points in the risk, at each stage, shape (p, points)."""
    least = jnp.min(offsets, 1, keepdims=True)
    each = jnp.exp(least - offsets).reshape(len(offsets), problem.data.num_points, -1)
    of_points = jnp.sum(each, 2)
    return of_points / jnp.sum(of_points, 1, keepdims=True)

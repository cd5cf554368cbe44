r"""What a solver asks of a loss: the risk, its slopes and its curvature at given margins.

A risk is a function $R(q)$ of the vector of all margins. A solver needs three things of it, none of
which may underflow with $R$: $\log R$; the slopes $s = -\nabla_q\log R$; and the matrix
$H = \nabla^2_q R/R$, through products only, so that it may be diagonal (a mean of one-point
losses), block diagonal (cross-entropy) or anything else. A loss for one of them is a file of its
own: nothing here asks which loss it is.
"""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gflow.problem.abstract_data import AbstractData
from gflow.problem.array import Array
from gflow.problem.design import AbstractDesign
from gflow.problem.module import Module


class AbstractCurvature(Module):
    r"""The symmetric positive semi-definite matrix $H = \nabla^2_qR/R$, shape (points, points)."""

    @property
    @abc.abstractmethod
    def diagonal(self) -> Array:
        """The diagonal of H, shape (points,)."""

    @abc.abstractmethod
    def apply(self, vector: Array) -> Array:
        """$H v$, shape (points,)."""

    @abc.abstractmethod
    def gram(self, design: AbstractDesign | None) -> Array:
        r"""$A^\top H A$, shape (m, m), for A of shape (points, m); H itself for None."""

    @abc.abstractmethod
    def among(self, chosen: Array) -> Array:
        """The rows and columns of H of some of the margins, by their r numbers, shape (r, r)."""


class Diagonal(AbstractCurvature):
    """A diagonal matrix: every point has a loss of its own."""

    entries: Array

    @property
    def diagonal(self) -> Array:
        return self.entries

    def apply(self, vector: Array) -> Array:
        return self.entries * vector

    def gram(self, design: AbstractDesign | None) -> Array:
        if design is None:
            return jnp.diag(self.entries)
        return design.gram_of_diagonal(self.entries)

    def among(self, chosen: Array) -> Array:
        return jnp.diag(self.entries[chosen])


class Shares(AbstractCurvature):
    r"""Blocks $t(\operatorname{diag}(p) - p p^\top) + c\, p p^\top$, one a point.

    What a function of the soft margin $-\log\sum_k e^{-m_k}$ of a point has, $p$ the shares in
    the sum.
    """

    entries: Array
    """$c$, shape (points,)."""
    slopes: Array
    """$t$, shape (points,)."""
    shares: Array
    """$p$, shape (points, k)."""

    @property
    def diagonal(self) -> Array:
        p, t, c = self.shares, self.slopes[:, None], self.entries[:, None]
        return (p * (t * (1 - p) + c * p)).reshape(-1)

    def apply(self, vector: Array) -> Array:
        rows = vector.reshape(self.shares.shape)
        mean = jnp.sum(self.shares * rows, 1, keepdims=True)
        found = self.slopes[:, None] * (rows - mean) + self.entries[:, None] * mean
        return (self.shares * found).reshape(vector.shape)

    def gram(self, design: AbstractDesign | None) -> Array:
        p, k = self.shares, self.shares.shape[1]
        diagonal = jnp.where(jnp.eye(k, dtype=bool), (self.slopes[:, None] * p)[:, :, None], 0.0)
        outer = ((self.entries - self.slopes)[:, None] * p)[:, :, None] * p[:, None, :]
        if design is None:
            same = jnp.eye(len(p), dtype=bool)[:, None, :, None]
            blocks = jnp.where(same, (diagonal + outer)[:, :, None, :], 0.0)
            return blocks.reshape(p.size, p.size)
        return design.gram_of_blocks(diagonal + outer)

    def among(self, chosen: Array) -> Array:
        point = chosen // self.shares.shape[1]
        p, t, c = self.shares.reshape(-1)[chosen], self.slopes[point], self.entries[point]
        together = point[:, None] == point[None, :]
        outer = ((c - t) * p)[:, None] * p[None, :]
        return jnp.diag(t * p) + jnp.where(together, outer, 0.0)


class Sum(NamedTuple):
    r"""A sum of exponentials $\sum_i e^{x_i}$, of the numbers $x$, shape (points,)."""

    top: Array
    """The largest of them, which the next two are relative to."""
    log_total: Array
    r"""$\log\sum_i e^{x_i - \text{top}}$, at least zero."""
    shares: Array
    r"""$e^{x_i}/\sum_j e^{x_j}$, shape (points,)."""

    @property
    def logarithm(self) -> Array:
        r"""$\log\sum_i e^{x_i}$."""
        return self.top + self.log_total


def sum_of_exponentials(logarithms: Array) -> Sum:
    """The sum, from one pass of exponentials, which a solver's iteration spends its time on."""
    top = jax.lax.stop_gradient(jnp.max(logarithms))
    each = jnp.exp(logarithms - top)
    total = jnp.sum(each)
    return Sum(top, jnp.log(total), each / total)


class LossTerms(NamedTuple):
    """A risk at given margins: what its value, its gradient and its curvature are made of."""

    log_risk: Array
    slopes: Array
    r"""$s_i = -\partial\log R/\partial q_i$, shape (points,), of either sign."""
    curvature: AbstractCurvature


class AbstractJointLoss(Module):
    r"""A risk as a function of all margins together.

    Most losses are means of a function of one margin and extend ``gflow.AbstractLoss`` instead,
    which makes the terms of its elementwise logarithms.
    """

    @abc.abstractmethod
    def terms(self, offsets: Array, level: Array | None = None) -> LossTerms:
        r"""The terms at the margins ``offsets + level``.

        Args:
            offsets: shape (points,).
            level: a number common to all, so large that adding it would cost the offsets digits;
                None is zero.
        """

    def on(self, data: AbstractData) -> "AbstractJointLoss":
        """The loss with all that it needs to know of a data set.

        Raises:
            ValueError: when it is no loss for such data.
        """
        return self

    def risk_slopes(self, margins: Array) -> Array:
        r"""$-\partial R/\partial q_i$, shape (points,), which underflows with the risk."""
        log_risk, slopes, _ = self.terms(margins)
        return jnp.exp(log_risk) * slopes

    def log_risk_at_zero(self, num_points: int) -> Array:
        r"""$\log R$ where all margins are zero."""
        return self.terms(jnp.zeros((num_points,))).log_risk

    def advance(self, offsets: Array, change: Array) -> tuple[Array, Array]:
        r"""Offsets moved by a Newton correction, and which of them were held back.

        Where the slopes depend on the offsets exponentially a correction by Newton's method may be
        too long to mean anything; a loss that knows bounds it here. Shapes (points,).
        """
        return offsets + change, jnp.zeros_like(change, dtype=bool)

    def level(self, offsets: Array, distance: Array) -> Array:
        r"""What margins have in common beyond the offsets, for an implicit solver.

        Offsets are its unknowns, to which a level adds nothing (see ``terms``): by default the
        distance of the smallest margins, which share the slopes of an exponential tail.

        Args:
            offsets: shape (points,).
            distance: margins less offsets, shape (points,).
        """
        return jnp.sum(sum_of_exponentials(-offsets).shares * distance)

    @property
    def of_margins(self) -> "AbstractJointLoss":
        """The loss of single margins that adds up to this one where all of them are large.

        That is where they exceed ``tail_from``, of a loss with an exponential tail.
        """
        return self

    def chosen(self, points: Array) -> "AbstractJointLoss":
        """The loss of some of the points, by their numbers; pure JAX."""
        return self

    @property
    def quadratic(self) -> bool:
        r"""Whether R is quadratic in the margins: $R\,H$ constant, and Newton's method exact."""
        return False

    @property
    def attained(self) -> bool:
        r"""Whether the risk has its infimum at finite margins.

        If not, it tends to zero as margins grow, and a flow of separable data can come to rest
        on the level $R(0)$ only. If so there are saddles on many levels, and a clock that follows
        the risk stands still at each.
        """
        return False

    @property
    def least_log_risk(self) -> float:
        """Where the risk is round-off of float64 margins that tend to finite ones."""
        return float("-inf")

    def least_log_risk_of(self, data: AbstractData, rank: int) -> float:
        """The least log risk of linear maps of a rank, where one is known."""
        return float("-inf")

    @property
    @abc.abstractmethod
    def exponential_tail(self) -> bool:
        r"""Whether the risk is a sum over points of $e^{-q}$ times what tends to a constant."""

    @property
    def tail_from(self) -> float:
        """The margin from which an exponential tail is exponential to the last digit."""
        return 40.0

    def inverse(self, log_value: Array) -> Array:
        r"""The margin at which the loss of a single point has a logarithm; NaN if it has none."""
        return jnp.full_like(log_value, jnp.nan)

    @property
    def decay_bound(self) -> float:
        r"""A $c$ with $\sum_i s_i \le c$ everywhere; infinite if none is known."""
        return float("inf")

    @property
    def slope_bound(self) -> float:
        r"""The largest $n\,|\partial R/\partial q_i|$ for n points; infinite if unknown."""
        return float("inf")

    @property
    def smoothness(self) -> float:
        r"""The Lipschitz constant of a point's slope; infinite if unknown."""
        return float("inf")

    def pull_radius(self, num_points: int) -> float:
        """Where Ji and Telgarsky's Lemma 4 begins to hold; not a number if unknown."""
        return float("nan")

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name for tables and records."""

r"""Losses of several classes: a margin loss of each point's soft margin.

With the margins $m_{ik} = f_{y_i}(x_i) - f_k(x_i)$, $k \ne y_i$, and

$$\tilde q_i = -\log\sum_{k\ne y_i} e^{-m_{ik}}, \qquad
p_{ik} = e^{\tilde q_i - m_{ik}}, \quad \sum_k p_{ik} = 1,$$

cross-entropy is the logistic loss of the soft margin,
$-\log\operatorname{softmax}(f)_{y} = \log(1 + e^{-\tilde q})$, and $\sum_k e^{-m_k}$ is the
exponential one. So logarithms, tails and their exactness are those of the margin loss. With its
slopes $t_i$ and curvatures $c_i$, both relative to the risk, those of the margins are $t_i p_{ik}$
and, a block a point, $t_i(\operatorname{diag}p_i - p_i p_i^\top) + c_i\,p_i p_i^\top$. For
two classes $p = 1$, and everything is the margin loss itself.
"""

import abc
import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import positive_count
from gflow.problem.array import Array
from gflow.problem.losses import AbstractLoss, Exponential, Logistic, exponential_advance
from gflow.problem.terms import AbstractJointLoss, LossTerms, Shares, sum_of_exponentials


def _count(num_classes: int | None) -> int | None:
    return None if num_classes is None else positive_count("num_classes", num_classes, 2)


class SoftMargin(AbstractJointLoss):
    r"""A margin loss $\ell$ of the soft margin; the risk is $\frac1n\sum_i\ell(\tilde q_i)$.

    Attributes:
        num_classes: K, which the problem takes from its data.

    Raises:
        ValueError: when that is given and no whole number from 2 on.
    """

    num_classes: eqx.AbstractVar[int | None]

    @property
    @abc.abstractmethod
    def of_one(self) -> AbstractLoss:
        r"""$\ell$."""

    def on(self, data: AbstractData) -> "SoftMargin":
        if "targets" in data.offers:
            raise ValueError(
                f"`loss` is {type(self).__name__}, which is for classes; the data have "
                f"{data.kind}. Expected gflow.Squared(), or classes: gflow.Dataset(inputs, labels)."
            )
        if data.num_classes is None:
            raise ValueError(
                f"`loss` is {type(self).__name__}, which is for classes; the data have labels -1 "
                f"and +1. Expected gflow.{type(self.of_one).__name__}, its form for one output, or "
                "data with classes: Dataset(inputs, labels, num_classes=2), with labels 0 and 1."
            )
        if self.num_classes not in (None, data.num_classes):
            raise ValueError(
                f"`loss` is for {self.num_classes} classes and the data have {data.num_classes}; "
                f"leave it out: {type(self).__name__} takes the number from the data."
            )
        return dataclasses.replace(self, num_classes=data.num_classes)

    def _rows(self, margins: Array) -> Array:
        """Margins by points, shape (points, K - 1)."""
        if self.num_classes is None:
            raise ValueError(
                f"`{type(self).__name__}` does not know the number of classes yet: ask the loss of "
                "a problem, `gflow.Problem(data, loss=...).loss`, or give it `num_classes`."
            )
        return jnp.reshape(margins, (-1, self.num_classes - 1))

    def _soft(self, margins: Array) -> tuple[Array, Array]:
        """The soft margin of each point, and the shares of its margins in it."""
        found = jax.vmap(sum_of_exponentials)(-self._rows(margins))
        return -found.logarithm, found.shares

    def terms(self, offsets: Array, level: Array | None = None) -> LossTerms:
        soft, shares = self._soft(offsets)
        if level is None:  # what large margins have in common costs their differences digits
            level = jax.lax.stop_gradient(jnp.maximum(jnp.min(soft), 0.0))
            soft = soft - level
        log_risk, slopes, curvature = self.of_one.terms(soft, level)
        return LossTerms(
            log_risk=log_risk,
            slopes=(slopes[:, None] * shares).reshape(offsets.shape),
            curvature=Shares(curvature.diagonal, slopes, shares),
        )

    def risk_slopes(self, margins: Array) -> Array:
        soft, shares = self._soft(margins)
        slopes = self.of_one.slope(soft) / len(soft)
        return (slopes[:, None] * shares).reshape(margins.shape)

    def log_risk_at_zero(self, num_points: int) -> Array:
        assert self.num_classes is not None
        return self.of_one.log_value(jnp.full((), -math.log(self.num_classes - 1)))

    def advance(self, offsets: Array, change: Array) -> tuple[Array, Array]:
        if not self.exponential_tail:
            return super().advance(offsets, change)
        found = sum_of_exponentials(-self._soft(offsets)[0])
        return exponential_advance(offsets, change, found.logarithm)

    def level(self, offsets: Array, distance: Array) -> Array:
        # The shares of all margins, from those within the points that the terms are made of.
        soft, shares = self._soft(offsets)
        of_points = jnp.sum(shares * self._rows(distance), 1)
        return jnp.sum(sum_of_exponentials(-soft).shares * of_points)

    @property
    def exponential_tail(self) -> bool:
        return self.of_one.exponential_tail

    @property
    def tail_from(self) -> float:
        return self.of_one.tail_from

    @property
    def of_margins(self) -> AbstractLoss:
        return self.of_one

    def inverse(self, log_value: Array) -> Array:
        r"""The soft margin at which the loss of a point has a logarithm."""
        return self.of_one.inverse(log_value)

    @property
    def decay_bound(self) -> float:
        """That of the margin loss: a point's shares sum to one."""
        return self.of_one.decay_bound

    @property
    def slope_bound(self) -> float:
        r"""$\sqrt2\,G$: a bound of $\lVert\partial\ell/\partial f\rVert$, of the outputs.

        $\partial\ell/\partial f = -\ell'\,(p - e_y)$, of norm at most $\sqrt2\,|\ell'|$.
        """
        return math.sqrt(2) * self.of_one.slope_bound

    @property
    def smoothness(self) -> float:
        r"""The largest eigenvalue of $\nabla_f^2\ell$, of the outputs; infinite if unknown."""
        return math.inf


class CrossEntropy(SoftMargin):
    r"""Cross-entropy $-\log\operatorname{softmax}(f)_y$, for K classes; the risk is its mean.

    >>> import gflow
    >>> problem = gflow.Problem(gflow.Dataset([[1.0], [0.0], [-1.0]], [0, 1, 2]))
    >>> round(float(jnp.exp(problem.log_risk_at_zero())), 6)  # log K
    1.098612
    """

    num_classes: int | None = eqx.field(static=True, default=None, converter=_count)

    @property
    def of_one(self) -> Logistic:
        return Logistic()

    @property
    def smoothness(self) -> float:
        r"""$\frac12$: $\nabla_f^2\ell = \operatorname{diag}\sigma - \sigma\sigma^\top$."""
        return 0.5

    @property
    def name(self) -> str:
        """`cross-entropy`."""
        return "cross-entropy"


class PairwiseExponential(SoftMargin):
    r"""The pairwise exponential loss $\sum_{k\ne y}e^{-m_k}$, for K classes."""

    num_classes: int | None = eqx.field(static=True, default=None, converter=_count)

    @property
    def of_one(self) -> Exponential:
        return Exponential()

    @property
    def name(self) -> str:
        """`pairwise exponential`."""
        return "pairwise exponential"

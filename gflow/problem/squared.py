r"""The square loss of outputs $f$ against targets $y$.

$$R = \frac{1}{2n}\sum_i\lVert f(x_i) - y_i\rVert^2 = \frac{\lVert r\rVert^2}{2n}, \qquad
s = -\nabla_f\log R = -\frac{2r}{\lVert r\rVert^2}, \qquad
H = \frac{\nabla_f^2R}{R} = \frac{2}{\lVert r\rVert^2}\,I,$$

with $r$ the residuals of all points and outputs: the margins are the outputs themselves, and slopes
have either sign. Squares are those of $r$ over its largest entry, so that targets of any size work.
Where $r = 0$ slopes and curvature are zero and $\log R = -\infty$, a risk at which all is at rest.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from gflow.problem.abstract_data import AbstractData
from gflow.problem.abstract_targets import targets_of
from gflow.problem.array import Array, as_array
from gflow.problem.terms import AbstractJointLoss, Diagonal, LossTerms

LOST = 64 * float(np.finfo(np.float64).eps)
"""Residuals of this size, relative to the targets, are round-off of the outputs."""


class Squared(AbstractJointLoss):
    r"""The square loss $\frac12\lVert f - y\rVert^2$; the risk is its mean over the points.

    Attributes:
        targets: shape (points, K), which the problem takes from its data.

    >>> import gflow
    >>> problem = gflow.Problem(gflow.Regression([[1.0], [2.0]], [3.0, 4.0]))
    >>> round(float(jnp.exp(problem.log_risk_at_zero())), 6)  # (9 + 16) / 4
    6.25
    """

    targets: Any = None

    def on(self, data: AbstractData) -> "Squared":
        if "targets" not in data.offers:
            instead = "Logistic()" if data.num_classes is None else "CrossEntropy()"
            raise ValueError(
                f"`loss` is Squared, which is of targets; the data have {data.kind}. Expected a "
                f"loss of margins, as gflow.{instead}, or gflow.Regression(inputs, targets)."
            )
        targets = as_array(data.answers).reshape(data.num_points, -1)
        return dataclasses.replace(self, targets=targets)

    def _targets(self) -> Any:
        if self.targets is None:
            raise ValueError(
                "`Squared` does not know the targets yet: ask the loss of a problem, "
                "`gflow.Problem(data, loss=...).loss`."
            )
        return self.targets

    def terms(self, offsets: Array, level: Array | None = None) -> LossTerms:
        outputs = offsets if level is None else offsets + level
        residuals = outputs - jnp.reshape(self._targets(), (-1,))
        size = jnp.max(jnp.abs(residuals))
        unit = jnp.where(size > 0, size, 1.0)
        scaled = residuals / unit
        square = jnp.sum(scaled**2)
        known = jnp.where(size > 0, square, 1.0)  # at least 1 where there are residuals
        inverse = jnp.where(size > 0, 2 / (known * unit), 0.0)
        log_risk = 2 * jnp.log(unit) + jnp.log(known) - math.log(2 * len(self._targets()))
        return LossTerms(
            log_risk=jnp.where(size > 0, log_risk, -jnp.inf),
            slopes=-inverse * scaled,
            curvature=Diagonal(jnp.full_like(residuals, inverse / unit)),
        )

    def risk_slopes(self, margins: Array) -> Array:
        targets = jnp.reshape(self._targets(), (-1,))
        return (targets - margins) / len(self._targets())

    def log_risk_at_zero(self, num_points: int) -> Array:
        return self.terms(jnp.zeros((self._targets().size,))).log_risk

    def level(self, offsets: Array, distance: Array) -> Array:
        """Zero: residuals are what counts, and nothing is gained by leaving out a level."""
        return jnp.zeros_like(distance[0])

    def chosen(self, points: Array) -> "Squared":
        return dataclasses.replace(self, targets=jnp.asarray(self._targets())[points])

    @property
    def quadratic(self) -> bool:
        """True."""
        return True

    @property
    def attained(self) -> bool:
        """True."""
        return True

    @property
    def least_log_risk(self) -> float:
        r"""That of residuals of $64\cdot2^{-52}$ times the targets: $10^{-28}R(0)$, about.

        Minus infinity for targets that are all zero, whose residuals are known relatively.
        """
        targets = np.asarray(self._targets())
        size = float(np.max(np.abs(targets)))
        if size == 0.0:
            return -math.inf
        mean = float(np.sum((targets / size) ** 2)) / (2 * len(targets))
        return 2 * (math.log(size) + math.log(LOST)) + math.log(mean)

    def least_log_risk_of(self, data: AbstractData, rank: int) -> float:
        r"""A bound of $\log R$ from below for linear maps of a rank (``abstract_targets.py``)."""
        total = targets_of(data).least_sum_of_squares(rank)
        return math.log(total / (2 * data.num_points)) if total > 0 else -math.inf

    @property
    def exponential_tail(self) -> bool:
        """False."""
        return False

    @property
    def smoothness(self) -> float:
        """1."""
        return 1.0

    @property
    def name(self) -> str:
        """`squared`."""
        return "squared"

    def __repr__(self) -> str:
        return "Squared()"

r"""Clocks: the coordinate $s$ in which the solver steps (public as ``gflow.clocks``).

Every clock walks the same path at its own speed. With $g = \nabla\log R$

$$\frac{dW}{ds} = -\mu\,g, \qquad \frac{d\log R}{ds} = -\mu\lVert g\rVert^2, \qquad
\frac{dt}{ds} = \frac{\mu}{R},$$

where $\dot W = -\nabla R$ in physical time. Plain log-loss time, $\mu = 1$, is not
offered: for three layers or more the weights blow up in finite $s$.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gflow.problem.arguments import positive
from gflow.problem.array import Array, as_array
from gflow.problem.module import Module

Numbers = Any
"""A number or an array of NumPy's: the same comes back."""


class AbstractClock(Module):
    """A strictly increasing function of physical time along the flow."""

    name: ClassVar[str]
    centred: ClassVar[bool]
    r"""Whether the clock follows the risk: its stiffness is then that of $\log R$ (centred
    Gauss–Newton matrix), else that of $R$ itself."""
    knows_time: ClassVar[bool] = False
    """Whether the clock is a function of the time."""

    @abstractmethod
    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        r"""The speed $\mu$ at clock value ``s``; ``squared_norm`` is $\lVert g\rVert^2$."""

    @abstractmethod
    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        """The clock's value $s$ at a given risk and time."""

    def at_log_risk(self, log_risk: Numbers) -> Numbers | None:
        """The clock's value where the risk has a given value; None if the clock cannot know."""
        return self.read(log_risk, -math.inf) if self.centred else None

    def log_risk_at(self, s: Numbers) -> Numbers | None:
        """The risk that the clock's value implies, or None: the free error monitor."""
        return None

    def log_time_at(self, s: Numbers) -> Numbers | None:
        """The log time that the clock's value implies, or None."""
        return None

    def at_log_time(self, log_time: Numbers) -> Numbers | None:
        """The clock's value at a given time; None if the clock cannot know."""
        return self.read(math.nan, log_time) if self.knows_time else None


class Time(AbstractClock):
    r"""$s = t$, $\mu = R$: short horizons, and comparison with descent at given times."""

    name = "Time"
    centred = False
    knows_time = True

    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        return jnp.exp(log_risk)

    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        return np.exp(log_time)

    def log_time_at(self, s: Numbers) -> Numbers:
        with np.errstate(divide="ignore"):
            return np.log(s)


class LogTime(AbstractClock):
    r"""$s = \log(1 + t)$, $\mu = R\,e^s$: given times on a long horizon."""

    name = "LogTime"
    centred = False
    knows_time = True

    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        return jnp.exp(s + log_risk)

    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        return np.logaddexp(0.0, log_time)

    def log_time_at(self, s: Numbers) -> Numbers:
        with np.errstate(divide="ignore"):
            return s + np.log(-np.expm1(-s))


class Risk(AbstractClock):
    r"""$s = -\log R$, $\mu = 1/\lVert g\rVert^2$: even spacing in the log risk.

    $-\log R - s$ vanishes for the exact flow: a free error monitor.
    """

    name = "Risk"
    centred = True

    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        return 1 / squared_norm

    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        return -log_risk

    def log_risk_at(self, s: Numbers) -> Numbers:
        return -s


class LogRisk(AbstractClock):
    r"""$s = \operatorname{asinh}(-\log R)$, $\mu = \sqrt{1+\log^2 R}/\lVert g\rVert^2$.

    For small risk $s = \log(-2\log R) + O(\log^{-2} R)$, in which everything asymptotic is
    smooth; near and above $R = 1$ it is the risk clock, so that one clock serves the whole
    run. $-\log R - \sinh s$ vanishes for the exact flow: a free error monitor.
    """

    name = "LogRisk"
    centred = True

    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        return jnp.hypot(1.0, log_risk) / squared_norm

    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        return np.arcsinh(-log_risk)

    def log_risk_at(self, s: Numbers) -> Numbers:
        return -np.sinh(s)


def _scale(value: Numbers) -> Array:
    return as_array(np.float64(positive("scale", value)))


class PathLength(AbstractClock):
    r"""$s = \log(1 + \ell/\ell_0)$ of the length $\ell$ of the path of the weights.

    $\mu = \ell_0e^s/\lVert g\rVert$, so that $\lVert dW/ds\rVert = \ell_0 + \ell$: weights that
    grow from $10^{-50}$ to one do so in 115 units, whatever the time. With three layers or more a
    plateau at the origin lasts like a power of one over the start and is left in a time that
    float64 cannot tell beside it; here it is a piece of road like any other. The clock knows
    neither time nor risk: it lands on rules by watching them, and the time is integrated.

    It is for the way from the start over the first saddle. Behind it what is still small moves less
    than round-off of the path, and a flow at rest has no path: go on in ``LogTime`` from the final
    weights.

    Args:
        scale: $\ell_0$, the size of the weights at the start or less; where it is less, the first
            steps find out.

    Raises:
        ValueError: when the scale is not positive.
    """

    scale: Array = eqx.field(converter=_scale, default=1e-100)  # no constant of a program
    name = "PathLength"
    centred = False
    knows_time = False

    def rate(self, s: Array, log_risk: Array, squared_norm: Array) -> Array:
        return self.scale * jnp.exp(s) / jnp.sqrt(squared_norm)

    def read(self, log_risk: Numbers, log_time: Numbers) -> Numbers:
        return log_risk * 0.0

    def at_log_time(self, log_time: Numbers) -> None:
        return None


def readings(
    clock: AbstractClock,
    s: np.ndarray,
    scaled_time: np.ndarray,
    log_risk: np.ndarray,
    energy: float | None = None,
    least: float = -math.inf,
) -> dict[str, np.ndarray]:
    """The log time, and how far a clock is off: the defect of the energy identity.

    Args:
        clock: that the flow was integrated in.
        s: its values, shape (points,).
        scaled_time: $tR$ there.
        log_risk: there.
        energy: log R at the start, where the risk may fall to round-off and its logarithm is no
            monitor: what a time clock is off is then the defect of R, relative to R at the start.
        least: the log risk at which it is round-off, of which there is no defect.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_time = np.log(scaled_time) - log_risk
        found = {"log_time": log_time}
        by_risk, by_time = clock.log_risk_at(s), clock.log_time_at(s)
        if by_risk is not None:
            off = np.abs(log_risk - np.asarray(by_risk))
            found["clock_error"] = off / np.maximum(1.0, np.abs(log_risk))
        if by_time is not None:
            time = np.asarray(by_time)
            off = np.abs(log_time - time) / np.maximum(1.0, np.abs(time))
            found["clock_error"] = np.where(scaled_time > 0, off, 0.0)
            # Where t R underflows, the clock still knows t.
            found["log_time"] = np.where(scaled_time > 0, log_time, time)
            if energy is not None:
                defect = np.exp(np.log(scaled_time) - time - energy) - np.exp(log_risk - energy)
                known = np.isfinite(time) & (log_risk > least)
                found["clock_error"] = np.where(known, np.abs(defect), 0.0)
                found["log_time"] = time
    return found

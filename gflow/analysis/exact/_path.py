r"""Flows along a known path: one number says where, one quadrature says when.

With one datum $z$ (or one direction that the data share) gradient flow moves on a curve that does
not depend on the loss. Along its parameter $x$ the margin $q(x)$ is explicit, and the flow only
sets the pace: $dt = \frac{1}{-\ell'(q(x))}\,e^{c + \kappa x}\,dx$ with constants $c$, $\kappa$ of
the network. Hence the state at a given risk is the root of one explicit equation, and

$$\log t = \log \int_{x_0}^{x} e^{-\log(-\ell'(q(x'))) + c + \kappa x'}\,dx'.$$
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike as _ArrayLike, Float, Real

from gflow.analysis.exact import _quadrature as quadrature
from gflow.problem.arguments import numbers_of
from gflow.problem.losses import AbstractLoss, Exponential, Logistic

Times = Real[_ArrayLike, "*times"] | Sequence[float] | None


class ExactFlow(NamedTuple):
    """A gradient flow at the points asked for, float64, in the shape that was asked for.

    Attributes:
        log_time: natural logarithm of the flow time; minus infinity at the start.
        log_risk: natural logarithm of the mean loss.
        end_to_end: the vector $w$ of the linear predictor, along a last axis.
    """

    log_time: Float[np.ndarray, "*times"]
    log_risk: Float[np.ndarray, "*times"]
    end_to_end: Float[np.ndarray, "*times dim"]


# ---------------------------------------------------------------------------------------------
# Losses. Independent of `gflow.problem.losses`, which these closed forms are there to test.
# ---------------------------------------------------------------------------------------------


def is_logistic(loss: AbstractLoss) -> bool:
    """Whether the loss is the logistic one; raises for anything but the two that are known.

    The one place that asks which loss it is: the formulas here are of these two by name, and are to
    stay independent of what the losses say of themselves.
    """
    if isinstance(loss, Exponential):
        return False
    if isinstance(loss, Logistic):
        return True
    raise ValueError(
        f"`loss` is {loss!r}; closed forms exist for gflow.Exponential() and gflow.Logistic()"
    )


def log_loss(margin: quadrature.Values, logistic: bool) -> quadrature.Values:
    r"""$\log\ell(q)$: $-q$, or $\log\log(1 + e^{-q})$, which is $-q - e^{-q}/2 + \dots$."""
    if not logistic:
        return -margin
    with np.errstate(over="ignore", divide="ignore"):
        return np.where(
            margin > 37.0,
            -margin - 0.5 * np.exp(-margin),
            np.log(quadrature.softplus(-np.minimum(margin, 37.0))),
        )


def margin_of(log_risk: quadrature.Values, logistic: bool) -> quadrature.Values:
    r"""The margin at a given $\log\ell$: $-\log\ell$, or $-\log(e^{\ell} - 1)$."""
    if not logistic:
        return -log_risk
    with np.errstate(over="ignore"):
        loss = np.exp(log_risk)
    # log(expm1(R)/R) = R/2 + R^2/24 + ...
    return np.where(log_risk < -18.0, -log_risk - 0.5 * loss, -quadrature.log_expm1(loss))


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------


class AbstractPath(abc.ABC):
    r"""A curve of increasing margin $q(x)$ from `start` on, with the pace $e^{c + \kappa x}$."""

    start: float
    log_pace: float
    pace_slope: float

    @abc.abstractmethod
    def margin(self, x: np.ndarray) -> np.ndarray:
        """$q(x)$."""

    @abc.abstractmethod
    def margin_rate(self, x: np.ndarray) -> np.ndarray:
        """$q'(x)$; only its size matters."""

    @abc.abstractmethod
    def margin_drop(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """$q(x) - q(x - y)$ for $0 <= y <= x - start$, without cancellation."""


@dataclasses.dataclass(frozen=True)
class ExponentialPath(AbstractPath):
    r"""$q(x) = \sum_j \pm e^{a_j + k_j x}$, every term increasing (the sign is that of $k_j$)."""

    start: float
    log_pace: float
    pace_slope: float
    log_coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def margin(self, x):
        return self._sum(lambda a, k: np.sign(k) * np.exp(a + k * x), x)

    def margin_rate(self, x):
        return self._sum(lambda a, k: np.abs(k) * np.exp(a + k * x), x)

    def margin_drop(self, x, y):
        # From the larger end of each term: x where it grows, x - y where it decays.
        def drop(a, k):
            larger = a + k * (x if k > 0.0 else x - y)
            return np.exp(larger) * -np.expm1(-abs(k) * y)

        return self._sum(drop, x + y)

    def _sum(self, term, like):
        total = np.zeros_like(like)
        for a, k in zip(self.log_coefficients, self.exponents, strict=True):
            total = total + term(a, k)
        return total


def log_time_at(
    path: AbstractPath, x: np.ndarray, margin: np.ndarray, logistic: bool
) -> np.ndarray:
    """The log of the time at which the flow passes `x` (where the margin is `margin`)."""
    # 1 / (-l'(q)) is e^q, or 1 + e^q.
    growth = quadrature.softplus(margin) if logistic else margin
    log_far = -np.asarray(quadrature.softplus(margin))  # of 1 / (1 + e^q)
    log_near = -np.asarray(quadrature.softplus(-margin))  # of 1 minus that

    def drop(i, y):
        fall = path.margin_drop(x[i], y)
        if logistic:
            # log(1 + e^q) - log(1 + e^(q - fall)): minus the log of a sum of positive numbers.
            fall = -np.logaddexp(log_far[i], log_near[i] - fall)
        return fall + path.pace_slope * y

    rate = path.margin_rate(x) + abs(path.pace_slope)
    integral = quadrature.log_integral(drop, rate, x - path.start)
    return growth + path.log_pace + path.pace_slope * x + integral


def follow(
    path: AbstractPath, loss: AbstractLoss, log_time: Times, log_risk: Times
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions on a path at given times or at given risks: `(log_time, log_risk, x)`."""
    logistic = is_logistic(loss)
    times, risks = requested(log_time, log_risk)
    start = np.asarray([path.start])
    # Brackets reach beyond float64; `invert` takes what is not finite there for "too far".
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if risks is not None:
            check_reachable(risks, float(log_loss(path.margin(start)[0], logistic)))
            margin = np.asarray(margin_of(risks.ravel(), logistic))
            upper = quadrature.upper_bracket(path.margin, margin, path.start)
            x = quadrature.invert(path.margin, margin, path.start, upper)
            times = log_time_at(path, x, margin, logistic).reshape(risks.shape)
            return times, risks, x.reshape(risks.shape)
        assert times is not None

        def log_time_of(x):
            return log_time_at(path, x, path.margin(x), logistic)

        # By the logarithm of the way from the start, in which early times are a straight line.
        upper = quadrature.upper_bracket(log_time_of, times.ravel(), path.start)
        log_way = quadrature.invert(
            lambda way: log_time_of(path.start + np.exp(way)),
            times.ravel(),
            -700.0,
            np.log(upper - path.start),
        )
        x = np.where(np.isneginf(times.ravel()), path.start, path.start + np.exp(log_way))
        x = x.reshape(times.shape)
        return times, np.asarray(log_loss(path.margin(x), logistic)), x


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


def requested(log_time: Times, log_risk: Times) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The one of the two that is given, as a float64 array that is no NaN."""
    if (log_time is None) == (log_risk is None):
        raise ValueError(
            "exactly one of `log_time` and `log_risk` must be given: the flow is wanted at these "
            "times, or when its risk has fallen to these values"
        )
    name, value = ("log_time", log_time) if log_risk is None else ("log_risk", log_risk)
    value = numbers_of(name, value)
    if (
        np.any(np.isnan(value))
        or np.any(value == np.inf)
        or (log_time is None and np.isinf(value).any())
    ):
        raise ValueError(
            f"`{name}` must be finite (`log_time` may be -inf, the start); got {value}"
        )
    return (value, None) if log_risk is None else (None, value)


def check_reachable(log_risk: np.ndarray, start: float) -> None:
    """The flow only descends: refuse a risk above that of the start (beyond round-off)."""
    if np.any(log_risk > start + 1e-12 * max(1.0, abs(start))):
        raise ValueError(
            f"`log_risk` goes up to {np.max(log_risk)}, but the flow starts at {start} and only "
            "descends"
        )


def vector(name: str, value, dim: int | None = None, *, nonzero: bool = False) -> np.ndarray:
    """A finite float64 vector, of a given size where `dim` is given."""
    result = numbers_of(name, value)
    if result.ndim != 1 or result.size == 0 or (dim is not None and result.size != dim):
        expected = "a non-empty vector" if dim is None else f"a vector of {dim} numbers"
        raise ValueError(f"`{name}` has shape {result.shape}; expected {expected}")
    if not np.all(np.isfinite(result)):
        raise ValueError(f"`{name}` must be finite; got {result}")
    if nonzero and not np.any(result):
        raise ValueError(f"`{name}` is zero; a zero vector has no direction to follow")
    return result


def depth_at_least(smallest: int, depth: int) -> int:
    """A whole number of layers, not below `smallest`."""
    if depth != int(depth) or depth < smallest:
        raise ValueError(f"`depth` must be a whole number of at least {smallest}; got {depth}")
    return int(depth)

r"""Margin losses, known through their logarithms.

A margin loss $\ell(q)$ is a decreasing convex function of the unnormalised margin $q$, with
$\ell \to \infty$ at $-\infty$ and $\ell \to 0$ at $+\infty$. Along a flow $\ell(q)$ leaves the
range of float64 at once ($e^{-q}$ is zero from $q = 746$ on) while its logarithm is an ordinary
number at any horizon, so a loss here is the three functions

$$\log \ell(q), \qquad \log(-\ell'(q)), \qquad \log \ell''(q)$$

and the inverse of the first. The first two are exact to a few units in the last place for every
float64 from -1e300 to 1e300, also next to their zeros. That needs x64: in single precision they are
accurate to single precision.

Derivatives are exact as well. Differentiating through the branches would not be, so each function
carries its own rule, of which the first two are

$$\frac{d}{dq}\log\ell = -e^{\log(-\ell') - \log\ell}, \qquad
  \frac{d}{dq}\log(-\ell') = -e^{\log\ell'' - \log(-\ell')}.$$

Values smaller than 2.2e-308 in magnitude are flushed to zero, as XLA does on a CPU.
"""

import abc
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Float

from gflow.problem.terms import AbstractJointLoss, Diagonal, LossTerms

# ---------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------


class AbstractLoss(AbstractJointLoss):
    r"""A margin loss $\ell(q)$: decreasing, convex, from $\infty$ to $0$; the risk is its mean.

    The methods to implement act elementwise on arrays of any shape and may be used under `jit`,
    `vmap` and `grad`.
    """

    @abc.abstractmethod
    def log_value(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log \ell(q)$."""

    @abc.abstractmethod
    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q))$."""

    @abc.abstractmethod
    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log \ell''(q)$."""

    @abc.abstractmethod
    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""The margin $q$ at which $\log \ell(q)$ is `log_value` (infinite where float64 ends)."""

    def slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$-\ell'(q)$, which underflows as the loss does."""
        return jnp.exp(self.log_slope(margin))

    def terms(self, offsets: Array, level: Array | None = None) -> LossTerms:
        r"""$\log R$, the slopes $-\ell'_i/\sum_j\ell_j$ and the diagonal of $\ell''_i/\sum_j\ell_j$.

        Where the loss is exponential up to a bounded factor, that factor is taken at the margin and
        the exponential at the offset, so that a large level costs no digits.
        """
        margins, shift, base = offsets, jnp.zeros_like(offsets), jnp.zeros(())
        if level is not None:
            margins = offsets + level
            if self.exponential_tail:
                margins = jnp.minimum(margins, self.tail_from)  # beyond it the factor is constant
                shift, base = margins - offsets, level
        log_total = logsumexp(self.log_value(margins) + shift)
        return LossTerms(
            log_risk=log_total - base - np.log(offsets.shape[0]),
            slopes=jnp.exp(self.log_slope(margins) + shift - log_total),
            curvature=Diagonal(jnp.exp(self.log_curvature(margins) + shift - log_total)),
        )

    def risk_slopes(self, margins: Array) -> Array:
        return self.slope(margins) / margins.shape[0]

    def log_risk_at_zero(self, num_points: int) -> Array:
        return self.log_value(jnp.zeros(()))

    # Newton's method predicts how shares of the slopes change, linearly. Where a share is to grow
    # by more than a factor e and beyond exp(-5), the share is moved by that, not its logarithm.
    def advance(self, offsets: Array, change: Array) -> tuple[Array, Array]:
        if not self.exponential_tail:
            return super().advance(offsets, change)
        share = jax.nn.log_softmax(-offsets)
        limit = jnp.maximum(share + 1 + jnp.log(jnp.maximum(-change, 1.0)), -5.0)
        return -jnp.minimum(share - change, limit), share - change > limit

    @property
    @abc.abstractmethod
    def slope_bound(self) -> float:
        r"""$G = \sup_q \lvert\ell'(q)\rvert$, the Lipschitz constant; may be infinite."""

    @property
    @abc.abstractmethod
    def smoothness(self) -> float:
        r"""$\beta = \sup_q \ell''(q)$, the Lipschitz constant of $\ell'$; may be infinite."""

    @property
    def decay_bound(self) -> float:
        r"""A $c$ with $-\ell'(q) \le c\,\ell(q)$ everywhere; infinite if none is known.

        It bounds the risk from below by the slopes, which descent has at hand: a rule on the risk
        then costs next to nothing a step.
        """
        return math.inf

    @property
    @abc.abstractmethod
    def exponential_tail(self) -> bool:
        r"""Whether $\ell(q) e^{q}$ tends to a positive constant as $q \to \infty$."""


# ---------------------------------------------------------------------------------------------
# Exponential
# ---------------------------------------------------------------------------------------------


class Exponential(AbstractLoss):
    r"""The exponential loss $\ell(q) = e^{-q}$.

    Neither $\ell'$ nor $\ell''$ is bounded, so statements about descent that ask for a smooth or
    Lipschitz loss do not cover it.

    >>> float(Exponential().log_value(3.0))
    -3.0
    """

    def log_value(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell(q) = -q$."""
        return -floating(margin)

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = -q$."""
        return -floating(margin)

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = -q$."""
        return -floating(margin)

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -\log\ell$."""
        return -floating(log_value)

    @property
    def slope_bound(self) -> float:
        r"""Infinite: $\lvert\ell'(q)\rvert = e^{-q}$."""
        return math.inf

    @property
    def smoothness(self) -> float:
        r"""Infinite: $\ell''(q) = e^{-q}$."""
        return math.inf

    @property
    def decay_bound(self) -> float:
        r"""$c = 1$, attained everywhere."""
        return 1.0

    @property
    def exponential_tail(self) -> bool:
        """True."""
        return True

    @property
    def tail_from(self) -> float:
        """Any margin would do: it is its own tail."""
        return 0.0

    @property
    def name(self) -> str:
        """`exponential`."""
        return "exponential"


# ---------------------------------------------------------------------------------------------
# Logistic
# ---------------------------------------------------------------------------------------------

# log l(q) = log log(1 + exp(-q)) vanishes at q = -log(e - 1). Below, c is the double next to that
# root. Since 1 + exp(-q) = (1 + exp(-c)) + exp(-c) (exp(-(q - c)) - 1),
#     l(q) - 1 = log((1 + exp(-q)) / e) = log(1 + eta + kappa expm1(-(q - c))),
#     kappa = exp(-c) / e,    eta = (1 + exp(-c)) / e - 1,
# in which q - c is exact near the root and eta carries the digits of the root that c lacks.
_LOGISTIC_CENTRE = -0.5413248546129181
_LOGISTIC_KAPPA = 0.6321205588285577
_LOGISTIC_ETA = 1.1465763589783119e-17

# The inverse, q = -log(expm1(exp(v))), vanishes at v = log log 2. With c the double next to it,
#     expm1(exp(v)) = 1 + 2 expm1(exp(v) - log 2),  exp(v) - log 2 = eta + kappa expm1(v - c),
#     kappa = exp(c),    eta = exp(c) - log 2.
_INVERSE_CENTRE = -0.36651292058166435
_INVERSE_KAPPA = 0.6931471805599453
_INVERSE_ETA = -1.4283387082036463e-17


@jax.custom_jvp
def _logistic_log_value(q):
    # Three ranges, each without cancellation. High: with x = exp(-q), log l = -q + log(log1p(x)/x),
    # a correction in [-0.37, 0] to -q; beyond q = 40 it is less than an ulp, so x is kept from
    # underflowing. Middle: around the root, see above. Low: l = -q + log1p(exp(q)) is far from one.
    x = jnp.exp(-jnp.clip(q, 0.0, 40.0))
    high = -q + jnp.log(jnp.log1p(x) / x)
    shifted = jnp.clip(q, -2.0, 0.25) - _LOGISTIC_CENTRE
    middle = accurate_log1p(accurate_log1p(_LOGISTIC_ETA + _LOGISTIC_KAPPA * jnp.expm1(-shifted)))
    negative = jnp.minimum(q, -2.0)
    low = jnp.log(-negative + jnp.log1p(jnp.exp(negative)))
    return jnp.where(q > 0.25, high, jnp.where(q > -2.0, middle, low))


@jax.custom_jvp
def _logistic_log_slope(q):
    return -(jnp.maximum(q, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(q))))


@jax.custom_jvp
def _logistic_log_curvature(q):
    return -(jnp.abs(q) + 2.0 * jnp.log1p(jnp.exp(-jnp.abs(q))))


@jax.custom_jvp
def _logistic_inverse(v):
    value = jnp.exp(v)
    small = jnp.minimum(value, 1.0)
    tiny = small < 1e-17  # expm1(y) / y is one there, and y may have underflowed
    ratio = jnp.where(tiny, 1.0, jnp.expm1(small) / jnp.where(tiny, 1.0, small))
    high = -v - jnp.log(ratio)
    shifted = jnp.clip(v, -1.0, 1.0) - _INVERSE_CENTRE
    middle = -accurate_log1p(2.0 * jnp.expm1(_INVERSE_ETA + _INVERSE_KAPPA * jnp.expm1(shifted)))
    low = -(value + accurate_log1p(-jnp.exp(-jnp.maximum(value, 1.0))))
    return jnp.where(v < -1.0, high, jnp.where(v < 0.5, middle, low))


# `out` is the function itself at q, so these rules can be differentiated again.
_logistic_log_value.defjvps(lambda t, out, q: -jnp.exp(_logistic_log_slope(q) - out) * t)
_logistic_log_slope.defjvps(lambda t, out, q: -jnp.exp(_logistic_log_curvature(q) - out) * t)
_logistic_log_curvature.defjvps(lambda t, out, q: -jnp.tanh(0.5 * q) * t)
_logistic_inverse.defjvps(lambda t, out, v: -jnp.exp(v - _logistic_log_slope(out)) * t)


class Logistic(AbstractLoss):
    r"""The logistic loss $\ell(q) = \log(1 + e^{-q})$.

    With $\sigma(q) = 1/(1 + e^{-q})$: $-\ell'(q) = \sigma(-q) < 1$, approached at $-\infty$, and
    $\ell''(q) = \sigma(q)\sigma(-q) \le 1/4$, attained at $0$. So $G = 1$ and $\beta = 1/4$.

    >>> round(float(Logistic().log_value(1e9)))
    -1000000000
    """

    def log_value(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell(q) = \log\log(1 + e^{-q})$."""
        return _logistic_log_value(floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = -\log(1 + e^{q})$."""
        return _logistic_log_slope(floating(margin))

    def slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$-\ell'(q) = 1/(1 + e^{q})$."""
        return 1 / (1 + jnp.exp(floating(margin)))

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = -\lvert q\rvert - 2\log(1 + e^{-\lvert q\rvert})$."""
        return _logistic_log_curvature(floating(margin))

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -\log(e^{\ell} - 1)$."""
        return _logistic_inverse(floating(log_value))

    @property
    def slope_bound(self) -> float:
        r"""$G = 1$: $-\ell'(q) = 1/(1 + e^{q})$ increases to $1$ as $q \to -\infty$."""
        return 1.0

    @property
    def smoothness(self) -> float:
        r"""$\beta = 1/4$: $\ell'' = \sigma(1 - \sigma)$ is largest at $\sigma = 1/2$."""
        return 0.25

    @property
    def decay_bound(self) -> float:
        r"""$c = 1$: with $s = -\ell'$, $\ell = -\log(1 - s) \ge s$; approached at $\infty$."""
        return 1.0

    @property
    def exponential_tail(self) -> bool:
        """True."""
        return True

    @property
    def name(self) -> str:
        """`logistic`."""
        return "logistic"


def floating(x: ArrayLike) -> Array:
    """An array of a floating type: integers become the default one."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def accurate_log1p(x: Array) -> Array:
    """log(1 + x) to an ulp or two: XLA's own loses 120 of them where x is near -0.41."""
    return jnp.where(x < -0.25, jnp.log(1.0 + x), jnp.log1p(x))

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
import functools
import math
import numbers
from decimal import Decimal, localcontext

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

# ---------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------


class AbstractLoss(eqx.Module):
    r"""A margin loss $\ell(q)$: decreasing, convex, from $\infty$ to $0$.

    All methods act elementwise on arrays of any shape and may be used under `jit`, `vmap` and
    `grad`.
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

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name for tables and records."""


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
        return -_floating(margin)

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = -q$."""
        return -_floating(margin)

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = -q$."""
        return -_floating(margin)

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -\log\ell$."""
        return -_floating(log_value)

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
    middle = _log1p(_log1p(_LOGISTIC_ETA + _LOGISTIC_KAPPA * jnp.expm1(-shifted)))
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
    middle = -_log1p(2.0 * jnp.expm1(_INVERSE_ETA + _INVERSE_KAPPA * jnp.expm1(shifted)))
    low = -(value + _log1p(-jnp.exp(-jnp.maximum(value, 1.0))))
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
        return _logistic_log_value(_floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = -\log(1 + e^{q})$."""
        return _logistic_log_slope(_floating(margin))

    def slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$-\ell'(q) = 1/(1 + e^{q})$."""
        return 1 / (1 + jnp.exp(_floating(margin)))

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = -\lvert q\rvert - 2\log(1 + e^{-\lvert q\rvert})$."""
        return _logistic_log_curvature(_floating(margin))

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -\log(e^{\ell} - 1)$."""
        return _logistic_inverse(_floating(log_value))

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


# ---------------------------------------------------------------------------------------------
# Polynomial tail
# ---------------------------------------------------------------------------------------------

# With a = asinh(q/2), s = sqrt(q^2 + 4) = 2 cosh a and T = tanh a = q/s:
#     log l       = -p a
#     log(-l')    = log p - p a - log s                              (a' = 1/s)
#     log l''     = log p - p a - 2 log s + log(p + T)               ((log s)' = T/s, T' = 4/s^3)
# For p = 1 the last simplifies, e^{-a} (1 + T) = 2/s, to log 2 - 3 log s.
# For negative q the three leading terms of log(-l') nearly cancel; there it is written as
#     log p + (p - 1) |a| - log1p(e^{-2|a|}).


@jax.custom_jvp
def _reciprocal_root(q):
    """1/s, without overflow of q^2."""
    return 1.0 / jnp.hypot(q, 2.0)


@jax.custom_jvp
def _one_plus_tanh(q):
    """1 + T, also where T is close to -1: (1 + T)(1 - T) = 4/s^2."""
    reciprocal = _reciprocal_root(q)
    folded = (2.0 * reciprocal) ** 2 / (1.0 + jnp.abs(q) * reciprocal)
    return jnp.where(q < 0.0, folded, 1.0 + q * reciprocal)


_reciprocal_root.defjvps(lambda t, out, q: -(_one_plus_tanh(q) - 1.0) * out * out * t)
_one_plus_tanh.defjvps(lambda t, out, q: (2.0 * _reciprocal_root(q)) ** 2 * _reciprocal_root(q) * t)


def _decay(q):
    """exp(-2 |a|), without the error that exp makes of a large argument."""
    return jnp.square(2.0 / (jnp.abs(q) + jnp.hypot(q, 2.0)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _polynomial_log_value(power, q):
    return -power * jnp.arcsinh(0.5 * q)


@_polynomial_log_value.defjvp
def _(power, primals, tangents):
    (q,), (t,) = primals, tangents
    return _polynomial_log_value(power, q), -power * _reciprocal_root(q) * t


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _polynomial_log_slope(power, q):
    a = jnp.arcsinh(0.5 * q)
    size = jnp.abs(a)
    tail = jnp.where(a > 0.0, -(power + 1.0) * size, (power - 1.0) * size)
    plain = math.log(power) + tail - jnp.log1p(_decay(q))
    if power == 1.0:
        return plain  # negative everywhere: log p = 0 and nothing cancels

    # For p > 1 there is a zero. With c the double next to it and delta = a - asinh(c/2),
    #     cosh a / cosh a_c = e^{-delta} (1 + (1 + T_c) (e^{2 delta} - 1)/2),  so
    #     log(-l'(q)) = log(-l'(c)) - (p - 1) delta - log1p((1 + T_c)/2 expm1(2 delta)),
    # whose last two terms have the same sign. The difference delta itself comes from q - c, through
    # e^{delta} - 1 = (x - x_c)(1 + (x + x_c)/(r + r_c))/(x_c + r_c), x = q/2, r = sqrt(1 + x^2),
    # when c is positive, and from its mirror image when c is negative.
    centre, log_slope_at_centre = _slope_root(power)
    x, x_c = 0.5 * q, 0.5 * centre
    r, r_c = jnp.hypot(x, 1.0), math.hypot(x_c, 1.0)
    half = 0.5 / (r_c * (r_c - x_c)) if x_c < 0 else 0.5 * (1.0 + x_c / r_c)
    sign = -1.0 if x_c < 0 else 1.0
    growth = sign * (x - x_c) * (1.0 + sign * (x + x_c) / (r + r_c)) / (abs(x_c) + r_c)
    delta = jnp.clip(sign * _log1p(growth), -1.0, 1.0)
    near = log_slope_at_centre - (power - 1.0) * delta - _log1p(half * jnp.expm1(2.0 * delta))
    return jnp.where(jnp.abs(a - math.asinh(x_c)) < 0.5, near, plain)


@_polynomial_log_slope.defjvp
def _(power, primals, tangents):
    (q,), (t,) = primals, tangents
    rate = -((power - 1.0) + _one_plus_tanh(q)) * _reciprocal_root(q)
    return _polynomial_log_slope(power, q), rate * t


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _polynomial_log_curvature(power, q):
    a = jnp.arcsinh(0.5 * q)
    size = jnp.abs(a)
    correction = jnp.log1p(_decay(q))  # log s = |a| + correction
    if power == 1.0:
        return math.log(2.0) - 3.0 * (size + correction)
    tail = jnp.where(a > 0.0, -(power + 2.0) * size, (power - 2.0) * size)
    return math.log(power) + tail - 2.0 * correction + jnp.log((power - 1.0) + _one_plus_tanh(q))


@_polynomial_log_curvature.defjvp
def _(power, primals, tangents):
    (q,), (t,) = primals, tangents
    reciprocal, one_plus = _reciprocal_root(q), _one_plus_tanh(q)
    if power == 1.0:
        rate = -3.0 * (one_plus - 1.0) * reciprocal
    else:
        inner = (2.0 * reciprocal) ** 2 / ((power - 1.0) + one_plus)
        rate = (inner - power - 2.0 * (one_plus - 1.0)) * reciprocal
    return _polynomial_log_curvature(power, q), rate * t


@functools.cache
def _slope_root(power: float) -> tuple[float, float]:
    """The double next to the zero of log(-l'), and log(-l') there, correct in every digit.

    In the variable a the function is concave and decreasing, so Newton's method from a point right
    of the zero (log p is one) moves monotonically towards it.
    """
    with localcontext() as context:
        context.prec = 60
        p = Decimal(power)

        def value(a: Decimal) -> Decimal:
            return p.ln() - p * a - (a.exp() + (-a).exp()).ln()

        a = p.ln()
        for _ in range(200):
            decay = (-2 * a).exp()
            step = value(a) / ((p - 1) + 2 / (1 + decay))
            a += step
            if abs(step) < Decimal("1e-45"):
                break
        centre = float(a.exp() - (-a).exp())
        x = Decimal(centre) / 2
        root = (1 + x * x).sqrt()
        asinh = (x + root).ln() if x > 0 else -(root - x).ln()
        return centre, float(value(asinh))


class PolynomialTail(AbstractLoss):
    r"""A loss with a polynomial tail, $\ell(q) = e^{-p\,\operatorname{asinh}(q/2)}$.

    It is analytic, $\ell(0) = 1$, and $\ell(q)\ell(-q) = 1$: like $q^{-p}$ at $+\infty$ and like
    $\lvert q\rvert^{p}$ at $-\infty$. For $p = 1$ it is $(\sqrt{q^2 + 4} - q)/2$.

    With $s = \sqrt{q^2 + 4}$ and $T = q/s$: $-\ell' = p\,\ell/s$ and
    $\ell'' = p\,\ell\,(p + T)/s^2$, which is positive for every $q$ exactly when $p \ge 1$.

    Args:
        power: the exponent $p \ge 1$; static, a plain number.

    Raises:
        ValueError: if `power` is not a finite number of at least one.

    >>> float(PolynomialTail(2.0).log_value(0.0))
    -0.0
    """

    power: float = eqx.field(static=True)

    def __init__(self, power: float = 1.0):
        if not (isinstance(power, numbers.Real) and 1.0 <= power < math.inf):
            raise ValueError(
                f"`power` is {power!r}; expected a finite number of at least 1. With a smaller "
                "power the loss exp(-power * asinh(q/2)) is not convex."
            )
        self.power = float(power)

    def log_value(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell(q) = -p\,\operatorname{asinh}(q/2)$."""
        return _polynomial_log_value(self.power, _floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = \log p + \log\ell(q) - \log\sqrt{q^2 + 4}$."""
        return _polynomial_log_slope(self.power, _floating(margin))

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = \log(-\ell'(q)) + \log(p + q/s) - \log s$."""
        return _polynomial_log_curvature(self.power, _floating(margin))

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -2\sinh(\log\ell/p)$; infinite beyond $\lvert\log\ell\rvert/p = 710$."""
        return -2.0 * jnp.sinh(_floating(log_value) / self.power)

    @property
    def slope_bound(self) -> float:
        r"""$G = 1$ for $p = 1$, else infinite.

        $-\ell' = p\,\ell/s$ is decreasing and behaves like $p\lvert q\rvert^{p-1}$ at $-\infty$.
        """
        return 1.0 if self.power == 1.0 else math.inf

    @property
    def smoothness(self) -> float:
        r"""$\beta = 1/4$ for $p = 1$, finite up to $p = 2$ (where it is $2$), then infinite.

        At $-\infty$ $\ell''$ behaves like $p(p-1)\lvert q\rvert^{p-2}$. In $a =
        \operatorname{asinh}(q/2)$, $\ell'' = p e^{-pa}(p + T)(1 - T^2)/4$ with $T = \tanh a$, whose
        logarithm is stationary where $3T^2 + 3pT + p^2 - 1 = 0$; the root in $(-1, 1)$ is
        $T = (\sqrt{12 - 3p^2} - 3p)/6$, and $e^{-2a} = (1 - T)/(1 + T)$.
        """
        p = self.power
        if p > 2.0:
            return math.inf
        if p == 2.0:
            return 2.0  # the supremum, approached at minus infinity: l'' = 1 - (3T - T^3)/2
        t = (math.sqrt(12.0 - 3.0 * p * p) - 3.0 * p) / 6.0
        return 0.25 * p * (p + t) * (1.0 - t) ** (1.0 + 0.5 * p) * (1.0 + t) ** (1.0 - 0.5 * p)

    @property
    def decay_bound(self) -> float:
        r"""$c = p/2$: $-\ell'/\ell = p/s$ with $s = \sqrt{q^2 + 4} \ge 2$."""
        return 0.5 * self.power

    @property
    def exponential_tail(self) -> bool:
        """False."""
        return False

    @property
    def name(self) -> str:
        """`polynomial tail (power p)`."""
        return f"polynomial tail (power {self.power:.12g})"


def _floating(x: ArrayLike) -> Array:
    """An array of a floating type: integers become the default one."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _log1p(x: Array) -> Array:
    """log(1 + x) to an ulp or two: XLA's own loses 120 of them where x is near -0.41."""
    return jnp.where(x < -0.25, jnp.log(1.0 + x), jnp.log1p(x))

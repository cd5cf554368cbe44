r"""A loss with a polynomial tail, exact to a few units in the last place as the others are."""

import functools
import math
import numbers
from decimal import Decimal, localcontext

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gflow.problem.losses import AbstractLoss, accurate_log1p, floating

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
    delta = jnp.clip(sign * accurate_log1p(growth), -1.0, 1.0)
    near = (
        log_slope_at_centre - (power - 1.0) * delta - accurate_log1p(half * jnp.expm1(2.0 * delta))
    )
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
        return _polynomial_log_value(self.power, floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = \log p + \log\ell(q) - \log\sqrt{q^2 + 4}$."""
        return _polynomial_log_slope(self.power, floating(margin))

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = \log(-\ell'(q)) + \log(p + q/s) - \log s$."""
        return _polynomial_log_curvature(self.power, floating(margin))

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -2\sinh(\log\ell/p)$; infinite beyond $\lvert\log\ell\rvert/p = 710$."""
        return -2.0 * jnp.sinh(floating(log_value) / self.power)

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

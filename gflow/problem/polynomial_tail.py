r"""A loss with a polynomial tail."""

import math
import numbers

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import sigmoid, softplus
from jaxtyping import Array, ArrayLike, Float

from gflow.problem.losses import AbstractLoss, floating

# With a = asinh(q/2), s = sqrt(q^2 + 4) = 2 cosh a = e^{-a} (1 + e^{2a}) and T = q/s = tanh a:
#     log l       = -p a
#     log(-l')    = log p - p a - log s             = log p - (p - 1) a - log(1 + e^{2a})
#     log l''     = log(-l') + log(p + T) - log s,    p + T = (p - 1) + 2/(1 + e^{-2a})
# in which nothing large cancels. Only a itself needs a rule: JAX's own overflows where q^2 does.


@jax.custom_jvp
def _reciprocal_root(q):
    """1/s."""
    return 1.0 / jnp.hypot(q, 2.0)


@jax.custom_jvp
def _half_asinh(q):
    """The variable a = asinh(q/2), with a' = 1/s."""
    return jnp.arcsinh(0.5 * q)


def _times(factor: float, a: Array) -> Array:
    """``factor * a``, which is zero for the factor 0 although a be infinite."""
    return factor * a if factor else jnp.zeros_like(a)


_reciprocal_root.defjvps(lambda t, out, q: -(q * out) * out * out * t)
_half_asinh.defjvps(lambda t, out, q: _reciprocal_root(q) * t)


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
        return -self.power * _half_asinh(floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = \log p + \log\ell(q) - \log\sqrt{q^2 + 4}$."""
        a = _half_asinh(floating(margin))
        return math.log(self.power) - _times(self.power - 1.0, a) - softplus(2.0 * a)

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = \log(-\ell'(q)) + \log(p + q/s) - \log s$."""
        a, p = _half_asinh(floating(margin)), self.power
        if p == 1.0:  # p + q/s underflows
            log_sum = math.log(2.0) - softplus(-2.0 * a)
        else:
            log_sum = jnp.log((p - 1.0) + 2.0 * sigmoid(2.0 * a))
        return math.log(p) - _times(p - 2.0, a) - 2.0 * softplus(2.0 * a) + log_sum

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

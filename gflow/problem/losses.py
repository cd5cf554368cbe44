r"""Margin losses, known through their logarithms.

A margin loss $\ell(q)$ is a decreasing convex function of the unnormalised margin $q$, with
$\ell \to \infty$ at $-\infty$ and $\ell \to 0$ at $+\infty$. Along a flow $\ell(q)$ leaves the
range of float64 at once ($e^{-q}$ is zero from $q = 746$ on) while its logarithm is an ordinary
number at any horizon, so a loss here is the three functions

$$\log \ell(q), \qquad \log(-\ell'(q)), \qquad \log \ell''(q)$$

and the inverse of the first, each to a few units in the last place of itself or of one, whichever
is larger, for every float64 from -1e300 to 1e300: the shares of the points in the gradient are
$e^{\log(-\ell') - \log\sum_i\ell}$ and see no more of them. That needs x64: in single precision
they are accurate to single precision. Derivatives are as exact, at branch points and in the tails
too.

Values smaller than 2.2e-308 in magnitude are flushed to zero, as XLA does on a CPU.
"""

import abc
import math

import jax
import jax.numpy as jnp
from jax.nn import softplus
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Float

from gflow.problem.abstract_data import AbstractData
from gflow.problem.array import Array as Margins
from gflow.problem.terms import AbstractJointLoss, Diagonal, LossTerms, sum_of_exponentials

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

    def terms(self, offsets: Margins, level: Margins | None = None) -> LossTerms:
        r"""$\log R$, slopes $-\ell'_i/\sum_j\ell_j$, the diagonal $\ell''_i/\sum_j\ell_j$.

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
            log_risk=log_total - base - math.log(offsets.shape[0]),
            slopes=jnp.exp(self.log_slope(margins) + shift - log_total),
            curvature=Diagonal(jnp.exp(self.log_curvature(margins) + shift - log_total)),
        )

    def risk_slopes(self, margins: Margins) -> Margins:
        return self.slope(margins) / margins.shape[0]

    def log_risk_at_zero(self, num_points: int) -> Margins:
        return self.log_value(jnp.zeros(()))

    def advance(self, offsets: Margins, change: Margins) -> tuple[Margins, Margins]:
        if not self.exponential_tail:
            return super().advance(offsets, change)
        found = sum_of_exponentials(-offsets)
        return exponential_advance(offsets, change, found.logarithm)

    def on(self, data: AbstractData) -> "AbstractLoss":
        if "one output" in data.offers:
            return self
        which = f"{self.for_classes}, or one output for two classes, with labels -1 and +1"
        if "targets" in data.offers:
            which = "gflow.Squared(), or labels -1 and +1: gflow.Dataset(inputs, labels)"
        raise ValueError(
            f"`loss` is {type(self).__name__}, a loss of one output; the data have {data.kind}. "
            f"Expected {which}."
        )

    @property
    def for_classes(self) -> str:
        """What to take instead where the data have classes."""
        return "gflow.CrossEntropy() or gflow.PairwiseExponential()"

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

    def pull_radius(self, num_points: int) -> float:
        r"""Ji and Telgarsky's Lemma 4 for this loss, times $\alpha$: where the pull begins.

        Off the best direction, $\langle\Pi_\perp w, \nabla R(w)\rangle \ge 0$ where
        $\lVert\Pi_\perp w\rVert$ exceeds this over $\alpha$. NaN where there is no such lemma.
        """
        return math.nan

    @property
    @abc.abstractmethod
    def exponential_tail(self) -> bool:
        r"""Whether $\ell(q) e^{q}$ tends to a positive constant as $q \to \infty$."""


# Newton's method predicts how shares of the slopes change, linearly. Where a share is to grow by
# more than a factor e and beyond exp(-5), the share is moved by that, not its logarithm.
def exponential_advance(
    offsets: Margins, change: Margins, log_total: Margins
) -> tuple[Margins, Margins]:
    """``AbstractJointLoss.advance`` where the risk is a sum of exponentials of margins.

    ``log_total`` is the logarithm of that sum at the offsets.
    """
    share = -offsets - log_total
    # A limit needs few digits, and a logarithm of few takes a third of the time.
    growth = jnp.log(jnp.clip(-change, 1.0, 1e30).astype(jnp.float32)).astype(share.dtype)
    limit = jnp.maximum(share + 1 + growth, -5.0)
    return -jnp.minimum(share - change, limit), share - change > limit


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

    def terms(self, offsets: Margins, level: Margins | None = None) -> LossTerms:
        r"""$\log R$, and $e^{-q_i}/\sum_je^{-q_j}$ for slopes and curvature, at any level."""
        found = sum_of_exponentials(-offsets)
        base = jnp.zeros(()) if level is None else level
        log_risk = found.log_total + (found.top - base) - math.log(offsets.shape[0])
        return LossTerms(log_risk, found.shares, Diagonal(found.shares))

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

    def pull_radius(self, num_points: int) -> float:
        r"""$1 + \ln n$."""
        return 1 + math.log(num_points)

    @property
    def exponential_tail(self) -> bool:
        """True."""
        return True

    @property
    def tail_from(self) -> float:
        """Any margin would do: it is its own tail."""
        return 0.0

    @property
    def for_classes(self) -> str:
        """gflow.PairwiseExponential()."""
        return "gflow.PairwiseExponential()"

    @property
    def name(self) -> str:
        """`exponential`."""
        return "exponential"


# ---------------------------------------------------------------------------------------------
# Logistic
# ---------------------------------------------------------------------------------------------


# Differentiating through the branches of the next two would leave 0/0 in the tails, so each carries
# its own rule; `out` is the function itself, so that the rules can be differentiated again.
@jax.custom_jvp
def _log_softplus(x):
    r"""$\log\log(1 + e^x)$, also where $e^x$ underflows.

    With $y = e^{-|x|}$ and $l = \log(1 + y)$ it is $\log(x + l)$ for positive x and
    $x + \log(l/y)$ for negative; below x = -40 the second term is less than an ulp. The slope and
    the curvature are made of the same $l$, so that a compiler finds it once.
    """
    y = jnp.exp(-jnp.abs(x))
    log_sum = jnp.log1p(y)
    ratio = jnp.where(x < -40.0, 1.0, log_sum / jnp.maximum(y, jnp.finfo(y.dtype).tiny))
    return jnp.minimum(x, 0.0) + jnp.log(jnp.where(x < 0.0, ratio, x + log_sum))


@jax.custom_jvp
def _inverse_log_softplus(v):
    r"""$\log(e^y - 1)$ with $y = e^v$: $v + \log((e^y - 1)/y)$ or $y + \log(1 - e^{-y})$."""
    small, large = jnp.exp(jnp.clip(v, -40.0, 0.0)), jnp.exp(jnp.maximum(v, 0.0))
    below = v + jnp.log(jnp.expm1(small) / small)
    return jnp.where(v < 0.0, below, large + jnp.log(-jnp.expm1(-large)))


_log_softplus.defjvps(lambda t, out, x: jnp.exp(-softplus(-x) - out) * t)
_inverse_log_softplus.defjvps(lambda t, out, v: jnp.exp(v + softplus(-out)) * t)


class Logistic(AbstractLoss):
    r"""The logistic loss $\ell(q) = \log(1 + e^{-q})$.

    With $\sigma(q) = 1/(1 + e^{-q})$: $-\ell'(q) = \sigma(-q) < 1$, approached at $-\infty$, and
    $\ell''(q) = \sigma(q)\sigma(-q) \le 1/4$, attained at $0$. So $G = 1$ and $\beta = 1/4$.

    >>> round(float(Logistic().log_value(1e9)))
    -1000000000
    """

    def log_value(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell(q) = \log\log(1 + e^{-q})$."""
        return _log_softplus(-floating(margin))

    def log_slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log(-\ell'(q)) = -\log(1 + e^{q})$."""
        return -softplus(floating(margin))

    def slope(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$-\ell'(q) = 1/(1 + e^{q})$."""
        return 1 / (1 + jnp.exp(floating(margin)))

    def log_curvature(self, margin: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$\log\ell''(q) = -\log(1 + e^{q}) - \log(1 + e^{-q})$."""
        margin = floating(margin)
        return -softplus(margin) - softplus(-margin)

    def inverse(self, log_value: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        r"""$q = -\log(e^{\ell} - 1)$."""
        return -_inverse_log_softplus(floating(log_value))

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

    def pull_radius(self, num_points: int) -> float:
        r"""$2n/e$."""
        return 2 * num_points / math.e

    @property
    def exponential_tail(self) -> bool:
        """True."""
        return True

    @property
    def for_classes(self) -> str:
        """gflow.CrossEntropy()."""
        return "gflow.CrossEntropy()"

    @property
    def name(self) -> str:
        """`logistic`."""
        return "logistic"


def floating(x: ArrayLike) -> Array:
    """An array of a floating type: integers become the default one."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))

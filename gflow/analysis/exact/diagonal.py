r"""Diagonal networks $w = u_+^{\circ D} - u_-^{\circ D}$ from $u_\pm = \alpha\mathbf 1$.

For any data and any loss the weights are a function of the accumulated slopes
$c = \sum_i z_i \int \frac{-\ell'(q_i)}{n}\,dt$ alone, since
$\dot u_\pm = \pm D\,u_\pm^{D-1} \dot c$ gives

$$u_\pm = \alpha e^{\pm 2c} \quad (D = 2), \qquad
  u_\pm = \alpha\,(1 \mp D(D-2)\alpha^{D-2} c)^{-1/(D-2)} \quad (D \ge 3).$$

The size $\alpha$ of the start decides between the kernel regime (large; L2 margin) and the rich one
(small; L1 margin for $D = 2$).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Real

from gflow.analysis.exact import _path, _quadrature as quadrature
from gflow.analysis.exact._path import ExactFlow, Times
from gflow.analysis.exact.one_datum import Vector
from gflow.problem import settings
from gflow.problem.arguments import numbers_of, positive
from gflow.problem.losses import AbstractLoss, Exponential


@settings.own()
def diagonal_network(
    accumulated_slopes: Real[np.ndarray, "*shape"], *, scale: float, depth: int = 2
) -> Float[np.ndarray, "*shape"]:
    r"""The end-to-end vector of a diagonal network at given accumulated slopes, any data and loss.

    $$w = 2\alpha^2\sinh(4c) \quad (D = 2), \qquad
      w = \alpha^D\,h_D(D(D-2)\alpha^{D-2} c), \quad
      h_D(x) = (1-x)^{-\frac{D}{D-2}} - (1+x)^{-\frac{D}{D-2}} \quad (D \ge 3).$$

    Args:
        accumulated_slopes: $c = Z^\top s$ with $s_i = \int -\ell'(q_i)/n\,dt$, coordinates on the
            last axis.
        scale: $\alpha > 0$, the value of every weight at the start.
        depth: $D \ge 2$.

    Raises:
        ValueError: where $D \ge 3$ and $D(D-2)\alpha^{D-2}\lvert c\rvert \ge 1$: no finite weights
            have such slopes.

    >>> diagonal_network(np.array([0.0, 0.25]), scale=1.0)
    array([0.        , 2.35040239])

    References:
        Woodworth, Gunasekar, Lee, Moroshko, Savarese, Golan, Soudry and Srebro, "Kernel and rich
        regimes in overparametrized models", COLT 2020, arXiv 2002.09277.
    """
    depth = _path.depth_at_least(2, depth)
    scale = positive("scale", scale)
    slopes = numbers_of("accumulated_slopes", accumulated_slopes)
    if depth == 2:
        return 2.0 * scale**2 * np.sinh(4.0 * slopes)
    x = depth * (depth - 2) * scale ** (depth - 2) * slopes
    if not np.all(np.abs(x) < 1.0):
        largest = np.max(np.abs(slopes))
        raise ValueError(
            f"`accumulated_slopes` reaches {largest}; a network of depth {depth} and scale {scale} "
            f"has infinite weights at {largest / np.max(np.abs(x))}"
        )
    power = depth / (depth - 2)
    lower = np.log1p(x)
    return scale**depth * np.exp(-power * lower) * np.expm1(power * (lower - np.log1p(-x)))


@settings.own()
def one_datum_diagonal(
    datum: Vector,
    *,
    scale: float,
    depth: int = 2,
    log_time: Times = None,
    log_risk: Times = None,
    loss: AbstractLoss = Exponential(),  # noqa: B008  (immutable)
) -> ExactFlow:
    r"""A diagonal network on one datum, at any risk: the forms of `diagonal_network` at $c = sz$.

    $s = \int -\ell'(q)\,dt$ is found from the risk by one root, and the time by one quadrature
    $t = \int ds/(-\ell'(q(s)))$, so the slow turn of the direction from $z$ towards the largest
    coordinate of $z$ is visible at any horizon: $w_1/w_2 \sim q^{1 - z_2/z_1}$ for $D = 2$.

    Args:
        datum: $z = yx$, not zero.
        scale: $\alpha > 0$, the value of every weight at the start (where $w = 0$).
        depth: $D \ge 2$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.Exponential()` or `gflow.Logistic()`.

    Raises:
        ValueError: for a scale or depth out of range, and as `one_datum_linear` does.

    >>> w = one_datum_diagonal([1.0, 0.9, 0.3], scale=1.0, log_risk=-1e6).end_to_end
    >>> round(float(w[0] / w.sum()), 3)
    0.796

    References:
        Woodworth et al., "Kernel and rich regimes in overparametrized models", COLT 2020; Moroshko
        et al., "Implicit bias in deep linear classification", NeurIPS 2020, for the finite horizon.
    """
    z = _path.vector("datum", datum, nonzero=True)
    path = DiagonalPath(
        tuple(float(abs(part)) for part in z),
        positive("scale", scale),
        _path.depth_at_least(2, depth),
    )
    times, risks, x = _path.follow(path, loss, log_time, log_risk)
    ratio, x = np.abs(z) / np.max(np.abs(z)), x[..., None]
    size = path.difference(path.log_growth(-ratio, x), path.log_growth(ratio, x))
    return ExactFlow(times, risks, np.sign(z) * size)


@dataclasses.dataclass(frozen=True)
class DiagonalPath(_path.AbstractPath):
    r"""The path of `one_datum_diagonal`, by $x = \log(u_+/\alpha)$ where $z$ is largest.

    With $m = D - 2$, $r_j = z_j/\max_i z_i$ and $A(r) = \log(u/\alpha)$ of a weight driven by $r$:
    $e^{-mA(r)} = 1 - r(1 - e^{-mx})$, and $A(r) = rx$ for $m = 0$. In these terms
    $ds = e^{-mx}\,dx\,\alpha^{-m}/(D \max_i z_i)$.
    """

    sizes: tuple[float, ...]
    scale: float
    depth: int

    start: float = dataclasses.field(default=0.0, init=False)

    @property
    def pace_slope(self) -> float:
        return 2.0 - self.depth

    @property
    def log_pace(self) -> float:
        return float((2.0 - self.depth) * np.log(self.scale) - np.log(self.depth * max(self.sizes)))

    def margin(self, x):
        return self._sum(
            lambda r: self.difference(self.log_growth(-r, x), self.log_growth(r, x)), x
        )

    def margin_rate(self, x):
        m = self.depth - 2

        def rate(r):  # dA/dx = r e^{m (A - x)}
            up, down = self.log_growth(r, x), self.log_growth(-r, x)
            growth = self.depth * r * (self._power(up) * np.exp(m * (up - x)))
            return growth + self.depth * r * (self._power(down) * np.exp(m * (down - x)))

        return self._sum(rate, x)

    def margin_drop(self, x, y):
        def drop(r):  # what u_+ gained, and what u_- lost, from the larger end of each
            gain, loss = self._growth_lost(r, x, y), -self._growth_lost(-r, x, y)
            up = self._power(self.log_growth(r, x)) * -np.expm1(-self.depth * gain)
            return up + self._power(self.log_growth(-r, x) + loss) * -np.expm1(-self.depth * loss)

        return self._sum(drop, x + y)

    def difference(self, low, high):
        r"""$\alpha^D (e^{D\,\mathrm{high}} - e^{D\,\mathrm{low}})$."""
        return self._power(high) * -np.expm1(self.depth * (low - high))

    def _power(self, log_growth):
        return np.exp(self.depth * (np.log(self.scale) + log_growth))

    def log_growth(self, r, x):
        """$A(r)$ at $x$."""
        m = self.depth - 2
        if m == 0:
            return r * x
        shrink = r * np.expm1(-m * x)
        # Near r = 1 the bracket is a small sum of two positive numbers, known by their logarithms.
        with np.errstate(divide="ignore"):
            near = -np.logaddexp(np.log(np.maximum(1.0 - r, 0.0)), np.log(np.abs(r)) - m * x)
        return np.where(shrink > -0.5, -np.log1p(np.maximum(shrink, -0.5)), near) / m

    def _growth_lost(self, r, x, y):
        """$A(r)$ at $x$ minus $A(r)$ at $x - y$."""
        m = self.depth - 2
        if m == 0:
            return r * y
        log_share = np.log(abs(r)) - m * x + quadrature.log_expm1(m * y) + m * self.log_growth(r, x)
        return (quadrature.softplus(log_share) if r > 0 else np.log1p(-np.exp(log_share))) / m

    def _sum(self, term, like):
        largest = max(self.sizes)
        total = np.zeros_like(like)
        for size in self.sizes:
            if size > 0.0:
                total = total + size * term(size / largest)
        return total

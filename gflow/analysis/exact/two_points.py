r"""The two-point problem: one layer, $z = (a, \pm b)$ with multiplicities, exponential loss."""

import numpy as np
from jaxtyping import Float, Real

from gflow.analysis.exact import _path, _quadrature as quadrature
from gflow.analysis.exact._path import ExactFlow, Times
from gflow.analysis.exact.one_datum import Vector
from gflow.problem import settings
from gflow.problem.arguments import positive


@settings.own()
def two_point_linear(
    datum: Vector,
    counts: Vector,
    start: Vector,
    *,
    log_time: Times = None,
    log_risk: Times = None,
) -> ExactFlow:
    r"""One layer on $z = (a, b)$, $m_1$ times, and $(a, -b)$, $m_2$ times; exponential loss.

    With $\kappa = 2\sqrt{m_1m_2}/n$, $w_2^* = \log(m_1/m_2)/(2b)$ and $\rho = b^2/a^2$ the risk is
    $R = \kappa e^{-aw_1}\cosh(b(w_2 - w_2^*))$. Let $\sigma = a(w_1 - w_1(0))$ and
    $S = \sinh(b(w_2 - w_2^*))$, $S_0$ at the start. The flow keeps

    $$S = S_0 e^{-\rho\sigma}, \qquad
      t = \frac{e^{aw_1(0)}}{a^2\kappa}
          \int_0^\sigma \frac{e^{x}\,dx}{\sqrt{1 + S_0^2e^{-2\rho x}}},$$

    the integral being $\Phi(e^\sigma) - \Phi(1)$ with
    $\Phi(x) = x\,{}_2F_1(\tfrac12, -\tfrac1{2\rho}; 1 - \tfrac1{2\rho}; -S_0^2x^{-2\rho})$
    wherever that has no pole. The maximum margin is $a$, along $(1, 0)$; the direction tends to
    it like $w_2^*/w_1 \sim 1/\log t$ unless $m_1 = m_2$, where it does like $t^{-\rho}/\log t$.

    Args:
        datum: $(a, b)$, both positive.
        counts: $(m_1, m_2)$, positive; need not be whole numbers.
        start: $w(0)$, two numbers.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.

    Raises:
        ValueError: for numbers out of range, a risk that is not below that of the start, or not
            exactly one of `log_time` and `log_risk`.

    >>> flow = two_point_linear([0.8, 0.5], [3, 1], [0.3, -0.4], log_time=np.log(20.0))
    >>> print(*flow.end_to_end.round(12))
    3.249748297056 0.456189695595

    References:
        Separation of variables. Its limit is the residual vector of Soudry, Hoffer, Nacson,
        Gunasekar and Srebro, "The implicit bias of gradient descent on separable data", JMLR 2018.
    """
    a, b = _two_positive("datum", datum)
    m1, m2 = _two_positive("counts", counts)
    w1, w2 = (float(part) for part in _path.vector("start", start, 2))
    times, risks = _path.requested(log_time, log_risk)

    log_kappa = float(np.log(2.0) + 0.5 * (np.log(m1) + np.log(m2)) - np.log(m1 + m2))
    centre = float(np.log(m1) - np.log(m2)) / (2.0 * b)
    ratio = (b / a) ** 2
    offset = b * (w2 - centre)
    with np.errstate(divide="ignore"):
        log_s = float(abs(offset) + np.log(-np.expm1(-2.0 * abs(offset))) - np.log(2.0))
    log_unit = a * w1 - log_kappa - 2.0 * np.log(a)  # log of e^{a w1(0)} / (a^2 kappa)
    start_risk = log_kappa - a * w1 + 0.5 * float(quadrature.softplus(2.0 * log_s))
    widest = 0.5 * float(quadrature.softplus(2.0 * log_s))  # log sqrt(1 + S_0^2)

    def log_cosh(sigma):  # log sqrt(1 + S^2)
        return 0.5 * quadrature.softplus(2.0 * log_s - 2.0 * ratio * sigma)

    def descent(sigma):  # minus log R, up to a constant
        return sigma - log_cosh(sigma)

    def log_time_of(sigma):
        def drop(i, y):
            # log_cosh falls as sigma grows, so that it is larger at sigma - y.
            return y + log_cosh(sigma[i] - y) - log_cosh(sigma[i])

        slope = 1.0 + ratio * np.exp(-np.logaddexp(0.0, 2.0 * ratio * sigma - 2.0 * log_s))
        return log_unit + descent(sigma) + quadrature.log_integral(drop, slope, sigma)

    if risks is not None:
        _path.check_reachable(risks, start_risk)
        target = (log_kappa - a * w1 - risks).ravel()
        # sigma exceeds the target by log_cosh, which is between 0 and its value at the start.
        sigma = quadrature.invert(
            descent, target, np.maximum(target, 0.0), np.maximum(target + widest, 0.0)
        )
        times = log_time_of(sigma).reshape(risks.shape)
        sigma = sigma.reshape(risks.shape)
    else:
        assert times is not None
        scaled = times.ravel() - log_unit
        # The integrand is between e^x / sqrt(1 + S_0^2) and e^x.
        sigma = quadrature.invert(
            log_time_of,
            times.ravel(),
            quadrature.softplus(scaled),
            quadrature.softplus(scaled + widest),
        ).reshape(times.shape)
        risks = log_kappa - a * w1 - descent(sigma)

    log_sinh = log_s - ratio * sigma
    # asinh(e^l), for any l.
    angle = np.where(
        log_sinh < 0.0,
        np.arcsinh(np.exp(np.minimum(log_sinh, 0.0))),
        np.logaddexp(log_sinh, 0.5 * quadrature.softplus(2.0 * log_sinh)),
    )
    second = centre + np.sign(offset) * angle / b
    return ExactFlow(
        np.asarray(times), np.asarray(risks), np.stack([w1 + sigma / a, second], axis=-1)
    )


def _two_positive(name: str, value: Real[np.ndarray, " 2"] | Vector) -> tuple[float, float]:
    first, second = _path.vector(name, value, 2)
    return positive(f"{name}[0]", first), positive(f"{name}[1]", second)


@settings.own()
def risk_clock(
    clock: Real[np.ndarray, "*points"] | float, start: float
) -> Float[np.ndarray, "*points"]:
    r"""The log risk of any flow in the risk clock.

    With $\theta' = \nabla\lambda/\lVert\nabla\lambda\rVert^2$, $\lambda = -\log R$ has unit speed:
    $\lambda(s) = \lambda(0) + s$ exactly,
    whatever the network, data and loss: what a solver shows beyond that is its error.

    Args:
        clock: $s$.
        start: the log risk at $s = 0$.

    >>> risk_clock(np.array([0.0, 1e6]), -0.5)
    array([-5.0000000e-01, -1.0000005e+06])
    """
    return np.asarray(start - np.asarray(clock, dtype=np.float64))

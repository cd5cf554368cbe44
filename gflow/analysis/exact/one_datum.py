r"""Closed forms for one datum $z$ (inputs times labels): linear, deep, diagonal and convolutional.

One datum decides nothing but how far the flow has gone, so every form here is a known path through
weight space; where on it the flow is at a given risk or time is one scalar equation. The forms also
hold for any number of equal copies of the datum, and for data that the predictor sees only along
one fixed direction.

All of them take the points wanted as `log_time` or as `log_risk`, of any shape, and return both,
with the end-to-end vector: float64, at any risk that float64 can write the logarithm of.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

from gflow.analysis.exact import _path, _quadrature as quadrature
from gflow.analysis.exact._path import ExactFlow, Times
from gflow.analysis.exact._quadrature import Values
from gflow.problem import settings
from gflow.problem.arguments import positive
from gflow.problem.losses import AbstractLoss, Exponential

Vector = Sequence[float] | Real[np.ndarray, " dim"]


@settings.own()
def one_datum_linear(
    datum: Vector,
    start: Vector,
    *,
    log_time: Times = None,
    log_risk: Times = None,
    loss: AbstractLoss = Exponential(),  # noqa: B008  (immutable)
) -> ExactFlow:
    r"""One layer, one datum, exponential or logistic loss.

    $w(t) = w_0 + (q(t) - q_0)\,z/\lVert z\rVert^2$, where the margin $q = \langle w, z\rangle$
    solves

    $$e^{q} = e^{q_0} + \lVert z\rVert^2 t \quad\text{(exponential)}, \qquad
      q + e^{q} = q_0 + e^{q_0} + \lVert z\rVert^2 t \quad\text{(logistic)},$$

    the latter by the Wright omega function: $e^q = \omega(q_0 + e^{q_0} + \lVert z\rVert^2 t)$.

    Args:
        datum: $z = yx$, not zero.
        start: $w_0$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.Exponential()` or `gflow.Logistic()`.

    Raises:
        ValueError: for a zero datum, another loss, a risk that is not below that of the start, or
            not exactly one of `log_time` and `log_risk`.

    >>> import math
    >>> flow = one_datum_linear([1.0, 0.0], [0.0, 2.0], log_time=math.log(math.e - 1))
    >>> float(flow.log_risk.round(12)), flow.end_to_end.round(12)
    (-1.0, array([1., 2.]))

    References:
        Separation of variables; Soudry, Hoffer, Nacson, Gunasekar and Srebro, "The implicit bias of
        gradient descent on separable data", JMLR 2018, for the setting.
    """
    z = _path.vector("datum", datum, nonzero=True)
    w = _path.vector("start", start, z.size)
    logistic = _path.is_logistic(loss)
    times, risks = _path.requested(log_time, log_risk)
    start_margin = float(z @ w)
    log_scale = 2.0 * np.log(np.linalg.norm(z))  # of ||z||^2
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if risks is not None:
            _path.check_reachable(risks, float(_path.log_loss(start_margin, logistic)))
            gain = np.maximum(_path.margin_of(risks, logistic) - start_margin, 0.0)
            times = _log_linear_time(gain, start_margin, logistic) - log_scale
        else:
            assert times is not None
            gain = _linear_gain(times + log_scale, start_margin, logistic)
            risks = _path.log_loss(start_margin + gain, logistic)
    direction = z / np.linalg.norm(z) / np.linalg.norm(z)
    return ExactFlow(
        np.asarray(times), np.asarray(risks), w + np.asarray(gain)[..., None] * direction
    )


def _log_linear_time(gain: Values, start: float, logistic: bool) -> Values:
    r"""$\log(\lVert z\rVert^2 t)$ when the margin has grown by `gain` from `start`."""
    exponential = start + quadrature.log_expm1(gain)
    return np.logaddexp(np.log(gain), exponential) if logistic else exponential


def _linear_gain(log_scaled_time: Values, start: float, logistic: bool) -> Values:
    """How far the margin has grown from `start` at $log(||z||^2 t)$: inverse of the above."""
    from scipy.special import wrightomega

    exponential = np.logaddexp(0.0, log_scaled_time - start)
    if not logistic:
        return exponential
    # q + e^q = c. Beyond e^600 the q on the left is lost beside e^q; below, omega(c) = e^q, and
    # q = c - omega(c) where e^q is small.
    c = start + np.exp(start) + np.exp(np.minimum(log_scaled_time, 600.0))
    omega = np.real(wrightomega(c))
    margin = np.where(c < 1.0, c - omega, np.log(omega))
    margin = np.where(
        np.maximum(log_scaled_time, start) < 600.0, margin, np.logaddexp(start, log_scaled_time)
    )
    gain = np.maximum(margin - start, 0.0)
    # Early on the gain is a small difference: two Newton steps in log t make it exact again.
    gain = np.where(gain > 0.0, gain, np.exp(log_scaled_time - quadrature.softplus(start)))
    for _ in range(2):
        reached = _log_linear_time(gain, start, logistic)
        pace = quadrature.softplus(start + gain)  # log of d(||z||^2 t)/d(gain)
        change = (log_scaled_time - reached) * np.exp(reached - pace)
        gain = np.where(np.isfinite(change), gain + change, gain)
    return np.where(np.isneginf(log_scaled_time), 0.0, gain)


@settings.own()
def one_datum_balanced(
    datum: Vector,
    start: float,
    depth: int,
    *,
    log_time: Times = None,
    log_risk: Times = None,
    loss: AbstractLoss = Exponential(),  # noqa: B008  (immutable)
) -> ExactFlow:
    r"""Any depth, one datum, from a balanced start aligned with it.

    $W_k = \sigma u_k u_{k-1}^\top$ with $u_0 = z/\lVert z\rVert$ (as `gflow.init.balanced` makes
    for an end-to-end vector along $z$) stays of this form, and $p = \sigma^L = \lVert w\rVert$
    obeys $\dot p = L a\,p^{2-2/L}(-\ell'(ap))$ with $a = \lVert z\rVert$. With $s = 2/L - 1$,

    $$t = \frac{F(p) - F(p_0)}{La}, \qquad F(x) = \frac{x^s}{s}\,{}_1F_1(s; s+1; ax)
      \quad (\mathrm{Ei}(ax) \text{ for } L = 2),$$

    and for the logistic loss $F(x) + x^s/s$ ($\mathrm{Ei}(ax) + \log x$). From a small start this
    is a plateau of length $\log(1/p_0)/(2a)$ for $L = 2$ and $p_0^{-(1-2/L)}/((L-2)a)$ above.

    Args:
        datum: $z = yx$, not zero.
        start: $p_0 > 0$, the norm of the end-to-end vector at the start.
        depth: $L \ge 1$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.Exponential()` or `gflow.Logistic()`.

    Raises:
        ValueError: for a start or depth out of range, and as `one_datum_linear` does.

    >>> flow = one_datum_balanced([0.9], 0.5, depth=3, log_time=np.log(10.0))
    >>> print(*flow.end_to_end.round(12))
    5.62100074449

    References:
        Separation of variables in the end-to-end equation of Arora, Cohen and Hazan, "On the
        optimization of deep networks: implicit acceleration by overparameterization", ICML 2018.
    """
    z = _path.vector("datum", datum, nonzero=True)
    depth = _path.depth_at_least(1, depth)
    norm = float(np.linalg.norm(z))
    # In x = log p: dt = (1/-l') p^(2/L - 1) dx / (La).
    path = _path.ExponentialPath(
        start=float(np.log(positive("start", start))),
        log_pace=float(-np.log(depth * norm)),
        pace_slope=2.0 / depth - 1.0,
        log_coefficients=(float(np.log(norm)),),
        exponents=(1.0,),
    )
    times, risks, x = _path.follow(path, loss, log_time, log_risk)
    return ExactFlow(times, risks, np.exp(x)[..., None] * (z / norm))


@settings.own()
def two_layer_one_datum(
    datum: Vector,
    start: tuple[float, float],
    *,
    log_time: Times = None,
    log_risk: Times = None,
    loss: AbstractLoss = Exponential(),  # noqa: B008  (immutable)
) -> ExactFlow:
    r"""Two layers of width one, one datum, balanced or not.

    With $W_2 = u$ and $W_1 = v z^\top/\lVert z\rVert$, $\delta = u^2 - v^2$ is conserved and
    $p = uv$ obeys $\dot p = a\sqrt{\delta^2 + 4p^2}\,(-\ell'(ap))$ with $a = \lVert z\rVert$:

    $$t = \int_{p_0}^{p} \frac{e^{ax}\,dx}{a\sqrt{\delta^2 + 4x^2}}, \qquad
      e^{ax} \to 1 + e^{ax} \text{ for the logistic loss.}$$

    $v = 0$ is the start $W_1 = 0$ of Ji and Telgarsky, which is unbalanced; a start with $p_0 < 0$
    goes through $p = 0$ unless it is balanced.

    Args:
        datum: $z = yx$, not zero.
        start: $(u, v)$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.Exponential()` or `gflow.Logistic()`.

    Raises:
        ValueError: for a start that only flows to the saddle ($u = -v$, or zero), and as
            `one_datum_linear` does.

    >>> flow = two_layer_one_datum([1.0], (1.0, 0.0), log_risk=[-10.0, -1000.0])
    >>> flow.end_to_end[:, 0]
    array([  10., 1000.])

    References:
        Ji and Telgarsky, "Gradient descent aligns the layers of deep linear networks", ICLR 2019,
        arXiv 1810.02032, for the conserved quantity; then separation of variables.
    """
    z = _path.vector("datum", datum, nonzero=True)
    u, v = (float(part) for part in _path.vector("start", start, 2))
    norm = float(np.linalg.norm(z))
    imbalance = abs((u - v) * (u + v))
    if imbalance == 0.0:
        if u * v <= 0.0:
            raise ValueError(
                f"`start` is {start}: with u = -v (or zero) the flow ends in the saddle at zero"
            )
        return one_datum_balanced(z, u * v, 2, log_time=log_time, log_risk=log_risk, loss=loss)
    # p = (|delta|/2) sinh x makes dp / sqrt(delta^2 + 4p^2) = dx/2.
    log_coefficient = float(np.log(norm) + np.log(imbalance) - np.log(4.0))
    path = _path.ExponentialPath(
        start=float(np.arcsinh(2.0 * u * v / imbalance)),
        log_pace=float(-np.log(2.0 * norm)),
        pace_slope=0.0,
        log_coefficients=(log_coefficient, log_coefficient),
        exponents=(1.0, -1.0),
    )
    times, risks, x = _path.follow(path, loss, log_time, log_risk)
    # Near its zero the margin is a difference of two exponentials: use the hyperbolic sine there.
    small = 0.5 * imbalance * np.sinh(np.clip(x, -1.0, 1.0))
    product = np.where(np.abs(x) < 1.0, small, path.margin(x) / norm)
    return ExactFlow(times, risks, product[..., None] * (z / norm))


@settings.own()
def one_datum_convolution(
    datum: Vector,
    start: Vector,
    *,
    log_time: Times = None,
    log_risk: Times = None,
    loss: AbstractLoss = Exponential(),  # noqa: B008  (immutable)
) -> ExactFlow:
    r"""Two full-width circular convolutions, one datum, from a start in phase with it.

    $w = u * v$ (circular), in the unnormalised discrete Fourier transform
    $\hat w_k = \hat u_k \hat v_k$. If $\lvert\hat u_k\rvert = \lvert\hat v_k\rvert$ and $\hat w_k$
    has the phase of $\hat z_k$, both stay so, and each mode grows at its own rate in the loss-free
    time $s = \int -\ell'(q)\,dt$:

    $$\lvert\hat w_k(s)\rvert = \lvert\hat w_k(0)\rvert\,e^{2\lvert\hat z_k\rvert s}.$$

    The direction turns to the strongest mode, slowly: it is the L1 margin in the Fourier domain
    that is maximised.

    Args:
        datum: $z = yx$, not zero.
        start: the end-to-end vector at the start, with $\hat w_k\overline{\hat z_k} \ge 0$ for
            every $k$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.Exponential()` or `gflow.Logistic()`.

    Raises:
        ValueError: for a start out of phase or without a mode of the datum, and as
            `one_datum_linear` does.

    >>> flow = one_datum_convolution([1.0, 0.5], [1.0, 0.5], log_risk=-10.0)
    >>> float((flow.end_to_end @ [1.0, 0.5]).round(12))
    10.0

    References:
        Gunasekar, Lee, Soudry and Srebro, "Implicit bias of gradient descent on linear
        convolutional networks", NeurIPS 2018, for the network and its limit.
    """
    z = _path.vector("datum", datum, nonzero=True)
    w = _path.vector("start", start, z.size, nonzero=True)
    z_modes, w_modes = np.fft.fft(z), np.fft.fft(w)
    product = w_modes * np.conj(z_modes)
    size = np.linalg.norm(w_modes) * np.linalg.norm(z_modes)
    if np.any(product.real < -1e-12 * size) or np.any(np.abs(product.imag) > 1e-12 * size):
        raise ValueError(
            "`start` is out of phase with `datum`; expected fft(start) * conj(fft(datum)) >= 0 in "
            "every mode, as any non-negative combination of the datum's own modes has"
        )
    rates = 2.0 * np.abs(z_modes)
    driven = np.abs(product) > 1e-15 * size
    if not np.any(driven):
        raise ValueError("`start` has no mode of `datum`; its gradient is zero: a saddle")
    path = _path.ExponentialPath(
        start=0.0,
        log_pace=0.0,
        pace_slope=0.0,
        log_coefficients=tuple(np.log(np.abs(product[driven]) / z.size)),
        exponents=tuple(rates[driven]),
    )
    times, risks, s = _path.follow(path, loss, log_time, log_risk)
    growth = np.where(driven, np.exp(np.where(driven, rates, 0.0) * s[..., None]), 1.0)
    return ExactFlow(times, risks, np.fft.ifft(w_modes * growth).real)

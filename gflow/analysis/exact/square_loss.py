r"""Closed forms for the square loss: one mode at any depth, two layers of width one.

Square loss converges exponentially, so time is an ordinary number here, while the distance to the
target leaves float64 and is returned as a log risk.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike as _ArrayLike, Float, Real

from gflow.analysis.exact import _path, _quadrature as quadrature
from gflow.problem import settings
from gflow.problem.arguments import numbers_of, positive

Times = Real[_ArrayLike, "*times"] | Sequence[float]


class SquareLossFlow(NamedTuple):
    r"""A gradient flow of $\tfrac12\lVert\text{target} - w\rVert^2$ at the times asked for.

    Attributes:
        time: the flow times.
        log_risk: natural logarithm of the risk, also where the risk is below the range of float64.
        end_to_end: the product of the layers: a number a time, or a matrix on two last axes.
    """

    time: Float[np.ndarray, "*times"]
    log_risk: Float[np.ndarray, "*times"]
    end_to_end: Float[np.ndarray, "..."]


@settings.own()
def square_loss_mode(time: Times, *, target: float, start: float, depth: int) -> SquareLossFlow:
    r"""The strength $u$ of one mode of a balanced network of any depth, loss $\tfrac12(s - u)^2$.

    $\dot u = L\,u^{2-2/L}(s - u)$. With $x = \log\frac{u}{\lvert s - u\rvert}$, which resolves both
    the start near zero and the end near the target, this is one smooth quadrature,

    $$t = \frac{s^{-k}}{L}\int_{x_0}^{x} (1 \pm e^{-x'})^{k-1}\,dx', \qquad k = 2 - \tfrac2L,$$

    ($+$ for $u_0 < s$), the same as $(H(u) - H(u_0))/L$ with
    $H(x) = \frac{x^{1-k}}{s(1-k)}\,{}_2F_1(1, 1-k; 2-k; x/s)$. $L = 2$ is the sigmoid
    $u = s e^{2st}/(e^{2st} - 1 + s/u_0)$.

    Args:
        time: flow times, at least zero.
        target: $s > 0$, the singular value to learn.
        start: $u_0 > 0$.
        depth: $L \ge 1$.

    Raises:
        ValueError: for numbers out of range.

    >>> float(square_loss_mode(2.0, target=1.7, start=0.05, depth=3).end_to_end.round(12))
    1.686937044639

    References:
        Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks", ICLR 2014, arXiv 1312.6120.
    """
    times = checked_times(time)
    target, start = positive("target", target), positive("start", start)
    depth = _path.depth_at_least(1, depth)
    if start == target:
        return SquareLossFlow(times, np.full(times.shape, -np.inf), np.full(times.shape, target))
    k = 2.0 - 2.0 / depth
    sign = 1.0 if start < target else -1.0
    first = float(np.log(start) - np.log(abs(target - start)))
    with np.errstate(divide="ignore"):
        goal = np.log(times.ravel()) + np.log(depth) + k * np.log(target)
    log_shrink, log_time_of = _mode_path(first, depth, sign)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        upper = quadrature.upper_bracket(log_time_of, goal, first)
        x = quadrature.invert(log_time_of, goal, first, upper).reshape(times.shape)
        strength = target * np.exp(-log_shrink(x))
        log_risk = 2.0 * (np.log(strength) - x) - np.log(2.0)  # |s - u| = u e^{-x}
    return SquareLossFlow(times, log_risk, np.asarray(strength))


@settings.own()
def saddle_times(
    targets: Real[_ArrayLike, " modes"] | Sequence[float],
    starts: Real[_ArrayLike, " modes"] | Sequence[float] | float,
    *,
    depth: int,
) -> Float[np.ndarray, " modes"]:
    r"""When modes are half learnt, which ends a plateau each: $u = s/2$ in `square_loss_mode`.

    For two layers $t = \frac{1}{2s}\log(s/u_0 - 1)$; for more about
    $u_0^{-(1-2/L)}/((L-2)s)$.

    Args:
        targets: the singular values $s > 0$ to learn.
        starts: their strengths at the start, positive and below $s/2$: one each, or one for all.
        depth: $L \ge 1$.

    Returns:
        Times, in the order of ``targets``.

    Raises:
        ValueError: for numbers out of range.

    >>> saddle_times([2.0, 1.0], 1e-15, depth=2).round(6).tolist()
    [8.807981, 17.269388]
    """
    s = np.atleast_1d(numbers_of("targets", targets))
    u = np.broadcast_to(numbers_of("starts", starts), s.shape)
    depth = _path.depth_at_least(1, depth)
    if s.ndim != 1 or not np.all((s > 0.0) & (u > 0.0) & (u < s / 2) & np.isfinite(s)):
        raise ValueError(
            f"`targets` is {targets} and `starts` {starts}; expected positive finite numbers, the "
            "starts below half of the targets."
        )
    found = []
    for target, start in zip(s, u, strict=True):
        first = float(np.log(start) - np.log(target - start))
        log_time = _mode_path(first, depth, 1.0)[1](np.zeros(1))[0]
        found.append(log_time - np.log(depth) - (2.0 - 2.0 / depth) * np.log(target))
    with np.errstate(over="ignore"):
        return np.exp(np.array(found))


Path = Callable[[Any], Any]


def _mode_path(first: float, depth: int, sign: float) -> tuple[Path, Path]:
    r"""Of $x = \log(u/|s - u|)$: $\log(s/u)$, and $\log t + \log L + k\log s$."""
    power = 1.0 - 2.0 / depth  # k - 1

    def log_shrink(x):  # log(1 +- e^{-x}), which is log(s/u)
        return quadrature.softplus(-x) if sign > 0 else np.log(-np.expm1(-x))

    def log_time_of(x):
        slope = power * np.exp(-x - log_shrink(x))
        integral = quadrature.log_integral(
            lambda i, y: np.asarray(power * (log_shrink(x[i]) - log_shrink(x[i] - y))),
            slope,
            x - first,
        )
        return power * log_shrink(x) + integral

    return log_shrink, log_time_of


@settings.own()
def two_layer_square_loss(
    time: Times, *, target: float, start: tuple[float, float]
) -> SquareLossFlow:
    r"""Two layers of width one, balanced or not, loss $\tfrac12(s - uv)^2$.

    $\delta = u^2 - v^2$ is conserved, and $p = uv$ obeys
    $\dot p = \sqrt{\delta^2 + 4p^2}\,(s - p)$. With $\Delta = \sqrt{\delta^2 + 4s^2}$ and
    $E(t) = E_0 e^{\Delta t}$,
    $E_0 = \frac{\delta^2 + 4sp_0 + \Delta\sqrt{\delta^2 + 4p_0^2}}{s - p_0}$,

    $$s - p = \frac{2\Delta^2}{E + 8s - 4\delta^2/E}, \qquad
      p = \frac{sE^2 - 2\delta^2E - 4s\delta^2}{E^2 + 8sE - 4\delta^2}.$$

    Args:
        time: flow times, at least zero.
        target: $s \ne 0$.
        start: $(u, v)$.

    Raises:
        ValueError: for a zero target, or a start that only flows to the saddle at zero (balanced,
            with $uv$ zero or of the wrong sign).

    >>> flow = two_layer_square_loss(1e3, target=2.0, start=(1.0, 0.0))
    >>> float(flow.end_to_end), float(flow.log_risk.round(6))
    (2.0, -8241.732905)

    References:
        Separation of variables; the conserved quantity and the time scales are those of Saxe,
        McClelland and Ganguli, arXiv 1312.6120, and Braun, Dominé, Fitzgerald and Saxe, NeurIPS
        2022.
    """
    # Derivation. d/dp log[(delta^2 + 4sp + Delta D)/(s - p)] = Delta / (D (s - p)) with
    # D = sqrt(delta^2 + 4p^2), so the bracket E grows as e^{Delta t}. With r = s - p,
    # delta^2 + 4sp = Delta^2 - 4sr and D^2 = Delta^2 - 8sr + 4r^2; squaring
    # Delta D = (E + 4s) r - Delta^2 leaves an equation that is linear in r.
    times = checked_times(time)
    u, v = (float(part) for part in _path.vector("start", start, 2))
    s = float(target)
    if not np.isfinite(s) or s == 0.0:
        raise ValueError(f"`target` must be finite and not zero; got {target}")
    flip = np.sign(s)  # p -> -p, s -> -s is the symmetry v -> -v
    s, product = abs(s), flip * u * v
    delta = (u - v) * (u + v)
    if delta == 0.0 and product <= 0.0:
        raise ValueError(f"`start` is {start}: for this target the flow ends in the saddle at zero")
    if product == s:
        return SquareLossFlow(
            times, np.full(times.shape, -np.inf), np.full(times.shape, flip * product)
        )
    big, speed = np.hypot(delta, 2.0 * s), np.hypot(delta, 2.0 * product)
    inner = delta**2 + 4.0 * s * product
    if inner >= 0.0:
        log_bracket = np.log(inner + big * speed)
    else:  # the same, without cancellation
        log_bracket = np.log(4.0 * delta**2 * (s - product) ** 2) - np.log(big * speed - inner)
    sign = np.sign(s - product)
    log_e = log_bracket - np.log(abs(s - product)) + big * times
    with np.errstate(over="ignore"):
        inverse = sign * np.exp(-log_e)  # 1/E
        below = 1.0 + 8.0 * s * inverse - 4.0 * (delta * inverse) ** 2
        log_residual = np.log(2.0 * big**2) - log_e - np.log(below)
        p = (s - 2.0 * delta**2 * inverse - 4.0 * s * (delta * inverse) ** 2) / below
        log_risk = 2.0 * log_residual - np.log(2.0)
    return SquareLossFlow(times, log_risk, np.asarray(flip * p))


def checked_times(time: Times) -> np.ndarray:
    """Finite times, none before the start."""
    times = numbers_of("time", time)
    if not np.all((times >= 0.0) & np.isfinite(times)):
        raise ValueError(f"`time` must be finite and at least zero; got {times}")
    return times

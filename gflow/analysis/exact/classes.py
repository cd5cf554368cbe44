r"""Closed forms of several classes: one point a class, from starts that are symmetric.

The inputs are the unit vectors, so that the end-to-end matrix $W$ is the matrix of all outputs:
gradient flow of the unconstrained features model, of any depth.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gflow.analysis.exact import _path
from gflow.analysis.exact._path import Times
from gflow.problem import settings
from gflow.problem.arguments import numbers_of, positive, shown, whole
from gflow.problem.soft_margin import CrossEntropy, SoftMargin


class ExactClassFlow(NamedTuple):
    """A gradient flow of several classes at the points asked for, float64.

    Attributes:
        log_time: natural logarithm of the flow time; minus infinity at the start.
        log_risk: natural logarithm of the mean loss.
        end_to_end: the matrix $W$, on two last axes.
    """

    log_time: Float[np.ndarray, "*times"]
    log_risk: Float[np.ndarray, "*times"]
    end_to_end: Float[np.ndarray, "*times outputs dim"]


@dataclasses.dataclass(frozen=True)
class _SoftMarginPath(_path.ExponentialPath):
    r"""$\tilde q = p - \log(K - 1)$, with $p = e^x$."""

    shift: float = 0.0

    def margin(self, x):
        return super().margin(x) - self.shift


@settings.own()
def simplex_modes(
    num_classes: int,
    start: float,
    depth: int,
    *,
    log_time: Times = None,
    log_risk: Times = None,
    loss: SoftMargin = CrossEntropy(),  # noqa: B008  (immutable)
) -> ExactClassFlow:
    r"""Any number of classes and any depth: neural collapse, exact at all times.

    One point a class, $x_c = e_c$, and $W_k = p_0^{1/L}(I - \frac1K11^\top)$. By symmetry every
    layer stays of this form, $W = p\,(I - \frac1K11^\top)$, all margins are $p$, and

    $$\dot p = \frac{L\,p^{2-2/L}}{e^p + K - 1}, \qquad
      t = \frac{F(p) - F(p_0) + (K - 1)(G(p) - G(p_0))}{L}, \qquad
      R = \log\bigl(1 + (K - 1)e^{-p}\bigr),$$

    with $F$ and $G$ of `one_datum_balanced`, where $a = 1$; without the term $K - 1$ in the
    denominator, and $R = (K - 1)e^{-p}$, for the pairwise exponential loss.

    Args:
        num_classes: K of at least 2; the data are `Dataset(np.eye(K), np.arange(K),
            num_classes=K)`.
        start: $p_0 > 0$.
        depth: $L \ge 1$.
        log_time: natural logarithm of the times wanted; or else
        log_risk: natural logarithm of the risks wanted, at most that of the start.
        loss: `gflow.CrossEntropy()` or `gflow.PairwiseExponential()`.

    Raises:
        ValueError: for arguments out of range, a risk that is not below that of the start, or not
            exactly one of `log_time` and `log_risk`.

    >>> flow = simplex_modes(3, 1.0, depth=1, log_risk=np.log(np.log1p(2 * np.exp(-2.0))))
    >>> np.exp(flow.log_time).round(9) == round(np.exp(2) - np.exp(1) + 2, 9)  # e^p + 2p
    np.True_
    >>> flow.end_to_end[0].round(6).tolist()
    [1.333333, -0.666667, -0.666667]

    References:
        Separation of variables; for K = 2 it is `one_datum_balanced` of the datum $\sqrt2$ and
        $p\,/\sqrt2$.
    """
    num = _classes(num_classes)
    depth = _path.depth_at_least(1, depth)
    # In x = log p: dt = (K - 1)/(-l'(q)) p^(2/L - 1) dx / L, with the soft margin q.
    path = _SoftMarginPath(
        start=math.log(positive("start", start)),
        log_pace=math.log((num - 1) / depth),
        pace_slope=2.0 / depth - 1.0,
        log_coefficients=(0.0,),
        exponents=(1.0,),
        shift=math.log(num - 1),
    )
    times, risks, x = _path.follow(path, _of_one(loss), log_time, log_risk)
    centred = np.eye(num) - 1 / num
    return ExactClassFlow(times, risks, np.exp(x)[..., None, None] * centred)


# With the Hadamard matrix H (entries +-1, H H = K), V = H/sqrt(K) and W = V diag(s) V the outputs
# of point c are those of point 0, permuted: z = H s/K. So all points share one loss
# l = log(1 + S), S = sum_{k>0} e^{-m_k}, with the margins m_k = z_0 - z_k = sum_r (1 - H_kr) s_r/K,
# and R = l. A mode of W has the gradient -(1 - p^_r)/K, 1 - p^_r = sum_k (1 - H_rk) p_k, p the
# softmax of z, so that s_r' = L s_r^(2-2/L) (1 - p^_r)/K: every term is positive. With the shares
# P_k = e^{-m_k}/S of the other classes, p_k = P_k S/(1 + S) for k > 0.
@settings.own()
def hadamard_modes(
    start: Float[np.ndarray, " classes"],
    depth: int,
    *,
    log_risk: Times,
) -> ExactClassFlow:
    r"""Modes of unequal strength, K a power of two, cross-entropy: an equation for K numbers.

    One point a class, $x_c = e_c$, and $W_k = V\operatorname{diag}(s^{1/L})V^\top$ with
    $V = H/\sqrt K$ of the Hadamard matrix $H$ (Sylvester's). The singular vectors never move, and
    with $z = Hs/K$ and $p = \operatorname{softmax}(z)$

    $$\dot s_r = \frac{L\,s_r^{2-2/L}}{K}\sum_k(1 - H_{rk})\,p_k,$$

    which is integrated here by SciPy's Radau in the clock $-\log R$ at a relative tolerance of
    1e-12, all of it in logarithms.

    Args:
        start: $s \ge 0$, shape (K,); $s_0$, the mode of $(1, \dots, 1)$, never moves.
        depth: $L \ge 1$.
        log_risk: natural logarithm of the risks wanted, at most that of the start.

    Raises:
        ValueError: for a start that is no vector of a power of two of numbers that are not
            negative, or with fewer than one positive mode after the first.

    >>> flow = hadamard_modes(np.array([0.0, 1.0]), depth=1, log_risk=[-20.0])
    >>> one = simplex_modes(2, 1.0, depth=1, log_risk=[-20.0])  # for K = 2 the same
    >>> bool(abs(flow.log_time - one.log_time) < 1e-9)
    True

    References:
        For two layers arXiv 2512.04006; at any depth by the symmetry above.
    """
    from scipy.integrate import solve_ivp
    from scipy.linalg import hadamard
    from scipy.special import logsumexp

    s0 = numbers_of("start", start)
    num = s0.size
    if s0.ndim != 1 or num < 2 or num & (num - 1) or np.any(s0 < 0) or not np.any(s0[1:] > 0):
        raise ValueError(
            f"`start` is {shown(start)}; expected K numbers of at least 0, K a power of two, and "
            "one at least of those after the first positive."
        )
    depth = _path.depth_at_least(1, depth)
    _, risks = _path.requested(None, log_risk)
    assert risks is not None
    h = hadamard(num).astype(float)
    apart = (1 - h)[1:] / num  # of m_k, k > 0
    moving = np.flatnonzero(s0[1:] > 0) + 1

    def where(s: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, float]:
        """Log R, the shares, ds_r/dt over S/(1 + S), and log of l (1 + S)/S."""
        margins = apart @ s
        soft = -float(np.asarray(logsumexp(-margins)))
        shares = np.exp(soft - margins)
        log_risk = float(_path.log_loss(np.asarray(soft), True))
        pace = depth * s ** (2 - 2 / depth) * (shares @ apart)
        return log_risk, shares, pace, log_risk + float(np.logaddexp(0.0, soft))

    # s as log s, which is smooth from the plateau on, and u = t R: du/dx = mu - u with
    # mu = R dt/dx, x = -log R.
    def rate(x: float, state: np.ndarray) -> np.ndarray:
        s = np.zeros(num)
        s[0], s[moving] = s0[0], np.exp(state[:-1])
        _, shares, pace, log_factor = where(s)
        # The soft margin q has q' = speed S/(1 + S), and with f = l (1 + S)/S, l' = -S/(1 + S):
        # x' = -l' q'/l = (S/(1 + S)) speed/f, so that ds/dx = f pace/speed, R dt/dx = f^2/speed.
        speed = shares @ (apart @ pace)
        mu = math.exp(2 * log_factor) / speed
        by_x = math.exp(log_factor) / speed
        return np.append(by_x * pace[moving] / s[moving], mu - state[-1])

    first = where(s0)[0]
    _path.check_reachable(risks, first)
    goals = -np.unique(risks.ravel())[::-1]
    begin = np.append(np.log(s0[moving]), 0.0)
    found = solve_ivp(
        rate,
        (-first, max(float(goals[-1]), -first)),
        begin,
        method="Radau",
        t_eval=np.maximum(goals, -first),
        rtol=1e-12,
        atol=1e-13,
    )
    assert found.success, found.message
    place = np.searchsorted(goals, -risks.ravel())
    s = np.zeros((risks.size, num))
    s[:, 0], s[:, moving] = s0[0], np.exp(found.y[:-1, place].T)
    with np.errstate(divide="ignore"):
        log_time = np.log(found.y[-1, place]) - risks.ravel()
    w = (h / num) * s[:, None, :] @ h
    return ExactClassFlow(log_time.reshape(risks.shape), risks, w.reshape(*risks.shape, num, num))


def _classes(num_classes: int) -> int:
    if not whole(num_classes) or num_classes < 2:
        raise ValueError(
            f"`num_classes` is {shown(num_classes)}; expected a whole number of at least 2."
        )
    return int(num_classes)


def _of_one(loss: SoftMargin):
    if not isinstance(loss, SoftMargin):
        raise ValueError(
            f"`loss` is {loss!r}; closed forms exist for gflow.CrossEntropy() and "
            "gflow.PairwiseExponential()"
        )
    return loss.of_one

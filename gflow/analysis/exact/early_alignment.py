r"""How the neurons of a network of two layers turn while their weights are tiny.

As long as outputs are small the loss pulls with the slopes that it has at zero, so that neurons do
not see each other (Maennel, Bousquet and Gelly, arXiv 1803.08367; Boursier, Pillaud-Vivien and
Flammarion, arXiv 2206.00939). With gates $g_i$ of neuron $w$ with output weight $a$, and pulls
$r_i = -n\,\partial R/\partial f(x_i)$ at $f = 0$,

$$\dot w = a D, \qquad \dot a = \langle w, D\rangle, \qquad D = \frac1n\sum_i r_ig_ix_i.$$

In one pattern D is constant. With $\alpha = \lvert a\rvert$, $s$ its sign, $\rho = \lVert D\rVert$,
$e = sD/\rho$, $p = \langle w, e\rangle$ and $\tau = \rho t$ that is linear,

$$p = p_0\cosh\tau + \alpha_0\sinh\tau, \qquad \alpha = \alpha_0\cosh\tau + p_0\sinh\tau, \qquad
w = w_0 + (p - p_0)e:$$

w moves along a straight line, and meets the kinks on it in their order. A kink is crossed, or slid
along with the gate that keeps $\langle D, x_i\rangle$ zero, which is constant as well; points of
one line through the origin share a kink. The last pattern is that of an extremal vector $e$, to
which w turns: $\tan\angle(w, e) = q/p$, q being the length across e.

Both papers give these times up to constants, of neurons from a vanishing start; what is here is the
solution of the same equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike as _ArrayLike, Float, Int, Real

from gflow.problem import settings
from gflow.problem.arguments import numbers_of
from gflow.problem.kinks import checked_slope

ROUND_OFF = 1e-12
"""Part of its size that is zero in the speed of a pre-activation, or beyond the end of a gate."""

ANGLE = 0.1
"""In radians: a neuron has aligned from here on."""

Matrix = Real[_ArrayLike, "_ _"] | Sequence[Sequence[float]]
Vector = Real[_ArrayLike, " _"] | Sequence[float]


class EarlyAlignment(NamedTuple):
    r"""Where the neurons of a tiny start turn, and when.

    Attributes:
        time: from when on a neuron is within the angle of its direction; infinite where nothing
            pulls it, or where it stands against the pull.
        direction: the unit vectors to which neurons turn; NaN where nothing pulls.
        rate: $\rho$, at which the weights grow then, like $e^{\rho t}$.
        num_kinks: how many kinks a neuron meets before, those of points on one line as one.
    """

    time: Float[np.ndarray, " neurons"]
    direction: Float[np.ndarray, "neurons dim"]
    rate: Float[np.ndarray, " neurons"]
    num_kinks: Int[np.ndarray, " neurons"]


@settings.own()
def early_alignment(
    inputs: Matrix,
    pulls: Vector,
    weights: tuple[Matrix, Matrix],
    *,
    slope: float = 0.0,
    angle: float = ANGLE,
) -> EarlyAlignment:
    r"""When and where neurons align, before the network has learnt anything.

    Exact in the limit of a vanishing start; corrections are of the order of the network's outputs.

    Args:
        inputs: the points, shape (n, d).
        pulls: $r_i = -n\,\partial R/\partial f(x_i)$ at $f = 0$, shape (n,): the targets for the
            square loss, labels $\pm1$ halved for the logistic loss, labels for the exponential.
        weights: $(W_1, W_2)$, shapes (m, d) and (1, m), with $\lvert a_j\rvert \ge \lVert
            w_j\rVert$, so that no output weight changes its sign.
        slope: $\kappa$, that of the activation where z < 0.
        angle: in radians, below a right angle.

    Raises:
        ValueError: for other shapes, an output weight smaller than its neuron, or an angle out of
            range; also where a neuron meets kinks without end.

    >>> found = early_alignment([[1.0, 0.0]], [1.0], ([[0.6, 0.8]], [[1.0]]), angle=0.5)
    >>> found.direction.tolist(), round(float(found.time[0]), 6)
    ([[1.0, 0.0]], 0.672005)

    References:
        Maennel, Bousquet and Gelly, arXiv 1803.08367; Boursier, Pillaud-Vivien and Flammarion,
        NeurIPS 2022, arXiv 2206.00939.
    """
    x, pull = numbers_of("inputs", inputs), numbers_of("pulls", pulls)
    inner, outer = numbers_of("weights[0]", weights[0]), numbers_of("weights[1]", weights[1])
    slope = checked_slope(slope)
    if x.ndim != 2 or pull.shape != x.shape[:1]:
        raise ValueError(
            f"`inputs` has shape {x.shape} and `pulls` {pull.shape}; expected (n, d) and (n,)."
        )
    if inner.ndim != 2 or inner.shape[1] != x.shape[1] or outer.shape != (1, len(inner)):
        raise ValueError(
            f"`weights` have shapes {inner.shape} and {outer.shape}; expected (m, {x.shape[1]}) "
            "and (1, m)."
        )
    if not 0.0 < angle < np.pi / 2:
        raise ValueError(f"`angle` is {angle}; expected one between zero and pi/2, in radians.")
    small = np.abs(outer[0]) < np.linalg.norm(inner, axis=1) * (1 - ROUND_OFF)
    if np.any(small):
        raise ValueError(
            f"`weights[1]` of neuron {int(np.argmax(small))} is smaller than the neuron; expected "
            "at least its norm, as of a balanced start. Otherwise its sign may change."
        )
    rays = _rays(x, pull / len(x), slope)
    found = [
        _Neuron(rays, float(np.sign(a)), w, float(abs(a))).aligned(angle)
        for w, a in zip(inner, outer[0], strict=True)
    ]
    return EarlyAlignment(*(np.array(part) for part in zip(*found, strict=True)))


class _Rays(NamedTuple):
    """The kinks, one for all points of a line: one of these, and their pull by the sign of z."""

    x: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def _rays(x: np.ndarray, pull: np.ndarray, slope: float) -> _Rays:
    found: list[tuple[np.ndarray, float, float]] = []
    for point, r in zip(x, pull, strict=True):
        if not np.any(point):
            continue
        for k, (first, lower, upper) in enumerate(found):
            c = float(point @ first) / float(first @ first)
            if np.linalg.norm(point - c * first) <= ROUND_OFF * np.linalg.norm(point):
                below, above = (slope, 1.0) if c > 0 else (1.0, slope)
                found[k] = first, lower + c * r * below, upper + c * r * above
                break
        else:
            found.append((point, slope * r, r))
    parts = zip(*found, strict=True) if found else ([], [], [])
    at, lower, upper = (np.array(part) for part in parts)
    return _Rays(at.reshape(-1, x.shape[1]), lower, upper)


class _Neuron:
    """One neuron on its way; its gates are 0 where z < 0, 1 where z > 0, in between on a kink."""

    def __init__(self, rays: _Rays, sign: float, w: np.ndarray, alpha: float):
        x = self.x = rays.x
        self.lower, self.upper = sign * rays.lower, sign * rays.upper
        self.size = np.linalg.norm(x, axis=1)
        self.most = float(np.maximum(np.abs(self.lower), np.abs(self.upper)) @ self.size)
        self.w, self.alpha, self.time = w, alpha, 0.0
        z = x @ w
        flat = np.abs(z) <= ROUND_OFF * self.size * np.linalg.norm(w)
        self.gates, self.sliding = np.where(z > 0, 1.0, 0.0), np.zeros(len(x), bool)
        self.num_kinks = 0
        for i in np.flatnonzero(flat):  # where it begins on a kink it goes to where it is driven
            self._decide(int(i))

    def aligned(self, angle: float) -> tuple[float, np.ndarray, float, int]:
        """When, where, how fast, after how many kinks."""
        pieces = []
        for _ in range(4 * len(self.x) + 4):
            force = self._force()
            rho = float(np.linalg.norm(force))
            if rho <= ROUND_OFF * self.most or self.alpha == 0.0:
                return np.inf, np.full(len(self.w), np.nan), 0.0, self.num_kinks
            e = force / rho
            pieces.append((self.time, self.w, self.alpha, e, rho))
            speed = self.x @ e
            speed[np.abs(speed) <= ROUND_OFF * self.size] = 0.0
            z = self.x @ self.w
            towards = np.where(self.gates == 1.0, speed < 0, speed > 0) & ~self.sliding
            if not np.any(towards):
                return _first(pieces, e, angle), e, rho, self.num_kinks
            way = np.full(len(z), np.inf)
            way[towards] = np.maximum(-z[towards] / speed[towards], 0.0)
            i = int(np.argmin(way))
            self._go(e, rho, float(way[i]))
            if not np.isfinite(self.time):
                return np.inf, np.full(len(self.w), np.nan), 0.0, self.num_kinks
            self._decide(i)
            self.num_kinks += 1
        raise ValueError(
            "`weights` have a neuron that meets kinks without end; expected one that turns to a "
            "direction. Are inputs dependent to round-off?"
        )

    def _force(self, gates: np.ndarray | None = None) -> np.ndarray:
        gates = self.gates if gates is None else gates
        return (self.lower + gates * (self.upper - self.lower)) @ self.x

    def _go(self, e: np.ndarray, rho: float, way: float) -> None:
        """As far as ``way`` along e."""
        p = float(self.w @ e)
        tau = _when(p, self.alpha, p + way)
        if np.isinf(tau):  # it shrinks along e, and does not come there
            self.time = np.inf
            return
        self.w = self.w + way * e
        self.alpha = float(self.alpha * np.cosh(tau) + p * np.sinh(tau))
        self.time += tau / rho

    def _decide(self, i: int) -> None:
        """Cross the kink of a point, or slide along it; then let slides go that end here."""
        self.sliding[i] = False
        on, off = (self._speed(i, gate) for gate in (1.0, 0.0))
        if on > 0 and off >= 0:
            self.gates[i] = 1.0
        elif on <= 0 and off <= 0:
            self.gates[i] = 0.0
        elif on > 0:  # both sides lead away: stay where it came from
            return
        else:
            self.sliding[i] = True
        while np.any(self.sliding):
            gates = self._at_rest(self.gates, self.sliding)
            held = np.clip(gates, 0.0, 1.0)
            gone = np.abs(held - gates) > ROUND_OFF
            self.gates, self.sliding = held, self.sliding & ~gone
            if not np.any(gone):
                return

    def _at_rest(self, gates: np.ndarray, sliding: np.ndarray) -> np.ndarray:
        """The gates with those of slides such that their pre-activations rest."""
        k = np.flatnonzero(sliding)
        if not len(k):
            return gates
        x, found = self.x[k], gates.copy()
        found[k] = 0.0
        pulled = x @ ((self.upper - self.lower)[k, None] * x).T
        found[k] = np.linalg.lstsq(pulled, -x @ self._force(found), rcond=None)[0]
        return found

    def _speed(self, i: int, gate: float) -> float:
        """Of the pre-activation at a point, by its gate, the slides of others going on."""
        gates = self.gates.copy()
        gates[i] = gate
        gates = self._at_rest(gates, self.sliding)
        speed = float(self.x[i] @ self._force(gates))
        return 0.0 if abs(speed) <= ROUND_OFF * self.size[i] * self.most else speed


def _when(p: float, alpha: float, goal: float) -> float:
    r"""The $\tau$ at which $p\cosh\tau + \alpha\sinh\tau$ is a number of at least p.

    With $E = e^\tau$ that is $(p + \alpha)E^2 - 2\,\text{goal}\,E + (p - \alpha) = 0$.
    """
    total, product = p + alpha, (alpha - p) * (alpha + p)
    if total <= ROUND_OFF * alpha:
        return np.inf  # against the pull, where it only shrinks
    root = np.sqrt(goal**2 + max(product, 0.0))
    larger = goal + root if goal >= 0 else product / (root - goal)
    return float(max(np.log(larger / total), 0.0))


Pieces = list[tuple[float, np.ndarray, float, np.ndarray, float]]


def _first(pieces: Pieces, direction: np.ndarray, angle: float) -> float:
    """From when on the angle to a direction is small."""
    after = True  # the last piece, along the direction itself
    for begun, w, alpha, e, rho in reversed(pieces):
        along = float(w @ direction)
        across = float(np.linalg.norm(w - along * direction))
        if along <= 0 or across > np.tan(angle) * along:
            if after:
                return begun + _when(along, alpha, across / np.tan(angle)) / rho
            return begun + _turned(w, alpha, e, direction, angle) / rho
        after = False  # it is small already: look before
    return 0.0


def _turned(
    w: np.ndarray, alpha: float, e: np.ndarray, direction: np.ndarray, angle: float
) -> float:
    r"""The $\tau$ at which $w + he$ comes to the angle: with the cone's $c = \cos^2$ of it.

    $\langle w + he, u\rangle^2 = c\lVert w + he\rVert^2$ is quadratic in h.
    """
    c = np.cos(angle) ** 2
    wu, eu, we = float(w @ direction), float(e @ direction), float(w @ e)
    roots = np.roots([eu**2 - c, 2 * (wu * eu - c * we), wu**2 - c * float(w @ w)])
    inside = [h.real for h in roots if abs(h.imag) == 0.0 and h.real >= 0 and wu + h.real * eu > 0]
    return _when(we, alpha, we + min(inside)) if inside else np.inf

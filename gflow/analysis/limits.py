r"""Sharp asymptotics of gradient flow on separable data: every limit with its rate and constant.

With $s = -\log R \to \infty$, $\gamma$ the margin, $\bar u$ its direction, exponential tails:

1. In the chain frame (``gflow.dynamics.split``) $\dot e_k = O(s^{-1-2/L})$ and
   $\dot C_k = O(s^{-1-3/L})$: $e_k \to u_k$ and $C_k$ converge, $\sigma_k \to \infty$. So do the
   singular vectors of $W_k$, to $u_k$ and $u_{k-1}$, where $u_L = 1$, $u_0 = \bar u$. The $u_k$
   are not functions of the conserved $D_k = W_{k+1}^\top W_{k+1} - W_k W_k^\top$ ($W_1 \to W_1 O$,
   O orthogonal, keeps every $D_k$ and moves $u_1$); they are read off a late state.
2. Norms. $\sigma_{k+1}^2 - \sigma_k^2 \to u_k^\top D_k u_k$ and $\prod_k\sigma_k = \lVert w\rVert$:
   $\lVert W_k\rVert_2^2 = \lVert w\rVert^{2/L} + a_k + O(s^{-2/L})$,
   $a_{k+1} - a_k = u_k^\top D_k u_k$, $\sum_k a_k = 0$.
3. Rank one. $\lVert W_k\rVert_F^2 - \lVert W_k\rVert_2^2 \to r_k$, $r_L = 0$,
   $r_k = r_{k+1} - \operatorname{tr} D_k + u_k^\top D_k u_k$, up to $O(s^{-3/L})$.
4. Alignment. The upper right block of $D_k$ gives the angle $\varphi_k$ between $u_k(W_k)$ and
   $v_{k+1}(W_{k+1})$, of which $u_k$ is the middle: with $n$ the unit vector along
   $(I - u_k u_k^\top) D_k u_k$

   $$\varphi_k = \frac{\lVert (I - u_k u_k^\top) D_k u_k\rVert}{\lVert w\rVert^{2/L}
   + \frac12(a_k + a_{k+1}) - \frac12(\lVert C_k^\top n\rVert^2 + \lVert C_{k+1} n\rVert^2)}
   \,(1 + O(s^{-3/L})).$$

5. Direction. Across $\bar u$, in the span T of the differences of support vectors, $w_T \to b^*$,
   the minimiser of $\sum_{i\in S} e^{-\langle b, z_i\rangle}$ over T, which exists if and only if
   all support vectors can carry weight at once; next order
   $\Sigma\,(w_T - b^*) = (L-1)\gamma^2 b^*/s + \gamma\, C_1^\top c_1/\sigma^2$, $\Sigma$ the
   covariance of $z$ under $p^*$. Outside T nothing pulls any more: $W_1$ is constant there, so that
   $w_N \simeq (s/\gamma)^{1-1/L}\,(W_1^\top u_1)_N$. If the support spans, the direction error is
   $\gamma\lVert b^*\rVert/s$ at every depth; if it does not, it is of order $s^{-1/L}$.
6. Time. $\log t = s - \log\kappa + (2 - 2/L)/s + O(s^{-2})$ with, up to $O(s^{-4/L})$,
   $\kappa = \gamma^2\lVert w\rVert^2\sigma_1^{-2} + m^2\sum_{k\ge2}\sigma_k^{-2}$, so that
   $R\,L\,\gamma^2\,t\,\lVert w\rVert^{2-2/L} \to 1$.
"""

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gflow.dynamics.slow_manifold import SlowManifold
from gflow.dynamics.split import Geometry, SplitState
from gflow.problem.network import Weights, check_weights

if TYPE_CHECKING:
    from gflow.problem.risk import Problem

FAR = -1e30
"""log R at which the limits of the frames are read; their error there is below round-off."""

HAND_OVER = -1e3
"""log R to which a start is integrated before it continues on the slow manifold."""

NEAR = 1e-3
"""A point off the margin by less than this, relatively, is reported."""

WEIGHTLESS = 1e-9
"""A support vector whose limiting weight is below this is reported."""


@dataclasses.dataclass(frozen=True, eq=False)
class Limits:
    r"""The constants of the asymptotic laws of one flow; ``predict`` evaluates the laws.

    Attributes:
        margin: $\gamma$.
        depth: L.
        directions: $u_1 … u_{L-1}$, limits of the singular vectors between the layers.
        rank_one: $r_k$, shape (layers,).
        rank_one_gap: limit of $(1 - \lVert W_k\rVert_2/\lVert W_k\rVert_F)\,s^{2/L}$.
        misalignment: limit of $(1 - |\langle v_{k+1}, u_k\rangle|)\,s^{4/L}$, shape (pairs,).
        direction_error: limit of $\lVert w/\lVert w\rVert - \bar u\rVert\,s^{\beta}$.
        direction_exponent: $\beta$: 1, or 1/L where the support does not span.
        spectral_shift: $a_k$, shape (layers,).
        tangent: $b^*$ in the coordinates of ``geometry.basis``.
        free: $(W_1^\top u_1)_N$, the limit outside the span of the support.
        dual: $p^*$, the limit of the normalised loss slopes, shape (points,).
        degenerate: reasons why some law fails or holds late; empty in general position.
    """

    margin: float
    depth: int
    directions: tuple[np.ndarray, ...]
    rank_one: np.ndarray
    rank_one_gap: np.ndarray
    misalignment: np.ndarray
    direction_error: float
    direction_exponent: float
    spectral_shift: np.ndarray
    tangent: np.ndarray
    free: np.ndarray
    dual: np.ndarray
    degenerate: tuple[str, ...]
    _geometry: Geometry
    _turn: np.ndarray
    _lean: np.ndarray
    _pull: np.ndarray
    _free_turn: np.ndarray

    def predict(self, log_risk: float) -> dict[str, np.ndarray]:
        """The laws with their next-order terms at one risk, under the names of a record."""
        s, gamma, depth = -float(log_risk), self.margin, self.depth
        geometry, support = self._geometry, self._geometry.support
        tangent = geometry.across[support, : geometry.num_tangent]
        level = (s / gamma) ** (2 / depth)
        across = self.tangent
        if len(across):
            weights = self.dual[support]
            covariance = (tangent.T * weights) @ tangent
            drive = (depth - 1) * gamma**2 * across / s + gamma * self._pull / level**1.5
            across = across + np.linalg.lstsq(covariance, drive, rcond=1e-10)[0]
        bracket = tangent @ across
        lowest = float(bracket.min())
        total = lowest - float(np.log(np.sum(np.exp(lowest - bracket))))
        along = s - total - np.log(geometry.num_points)
        tangent_size = np.linalg.norm(across)
        norm = along / gamma
        slope, stretch = 0.0, 1.0
        for _ in range(20):  # |w| and w outside the support's span need each other; converges fast
            level = norm ** (2 / depth)
            first = level + self.spectral_shift[0]
            free = self.free - self._free_turn / first
            outside = norm / np.sqrt(first) * np.linalg.norm(free) if depth > 1 else self.free
            slope = gamma / along * float(np.hypot(tangent_size, np.linalg.norm(outside)))
            stretch = np.hypot(1.0, slope)
            norm = along / gamma * stretch
        level = norm ** (2 / depth)
        spectral = level + self.spectral_shift
        frobenius = spectral + self.rank_one
        pairs = (self.spectral_shift[1:] + self.spectral_shift[:-1]) / 2
        angle = self._turn / (level + pairs - self._lean)
        speed = (gamma * norm) ** 2 / spectral[0] + along**2 * np.sum(1 / spectral[1:])
        log_time = s - np.log(speed) + (2 - 2 / depth) / s
        return {
            "rank_one_gap": self.rank_one / (frobenius + np.sqrt(frobenius * spectral)),
            "misalignment": 2 * np.sin(angle / 2) ** 2,
            "direction_error": np.asarray(slope * np.sqrt(2 / (stretch * (1 + stretch)))),
            "margin_gap": np.asarray((along * slope**2 / (1 + stretch) - lowest) / norm),
            "spectral_norm": np.sqrt(spectral),
            "frobenius_norm": np.sqrt(frobenius),
            "log_time": np.asarray(log_time),
        }


def limits(problem: "Problem", weights: Weights, *, late: Weights | None = None) -> Limits:
    """The asymptotic laws of the flow that starts at ``weights``, with their constants.

    Args:
        problem: separable data, a deep linear network, a loss with an exponential tail.
        weights: the start, or any later point of the flow: the conserved matrices are read here.
        late: a later point of the same flow, where its margins exceed 40; it saves integrating
            there from ``weights``.

    Raises:
        ValueError: for another network or loss, for data that are not separable, and for a flow
            that does not reach risk zero.
    """
    start = check_weights(weights)
    imbalance = [b.T @ b - a @ a.T for a, b in pairwise(start)]
    solver = SlowManifold(rtol=1e-8)
    late = start if late is None else check_weights(late)
    if solver.obstacle(problem, late) is not None:
        late = _integrate(problem, late)
    state = solver.advance(solver.start(problem, late, imbalance=imbalance), FAR)
    return _read(state, imbalance)


def _integrate(problem: "Problem", weights: Weights) -> Weights:
    """The flow's weights at ``HAND_OVER``."""
    from gflow.dynamics.flow import gradient_flow
    from gflow.dynamics.until import LogRisk

    record = gradient_flow(
        problem, weights, until=LogRisk(HAND_OVER), save=2, rtol=1e-11, progress=False
    )
    if record.attrs["status"] != "reached":
        raise ValueError(f"The flow has no limits of this kind: {record.attrs['message']}.")
    return tuple(record[f"final_weights_{k + 1}"].values for k in range(len(weights)))


def _read(state: SplitState, imbalance: list[np.ndarray]) -> Limits:
    geometry, layers, depth = state.geometry, state.layers, state.layout.depth
    views = state.layout.views(state.slow)
    gamma = geometry.margin
    directions, turn, lean = [], np.zeros(depth - 1), np.zeros(depth - 1)
    shift, rank_one = np.zeros(depth), np.zeros(depth)
    for k in range(depth - 1, 0, -1):
        basis, layer, above = views["frame", k], layers[k - 1], layers[k]
        # The frame turns by half the angle that is left (e_k is the right vector of layer k + 1).
        u = basis[:, 0] + basis[:, 1:] @ layer.below / (2 * layer.sigma)
        u /= np.linalg.norm(u)
        pushed = imbalance[k - 1] @ u
        corner = float(u @ pushed)
        side = basis[:, 1:].T @ (pushed - corner * u)
        turn[k - 1] = np.linalg.norm(side)
        if turn[k - 1] > 0:
            n = side / turn[k - 1]
            lean[k - 1] = (np.sum((layer.rest.T @ n) ** 2) + np.sum((above.rest @ n) ** 2)) / 2
        directions.append(u)
        shift[k - 1] = shift[k] - corner
        rank_one[k - 1] = rank_one[k] - np.trace(imbalance[k - 1]) + corner
    shift -= shift.mean()
    tangent, dual, degenerate = _soft_minimiser(geometry)
    degenerate += _near(geometry)
    free = state.across[geometry.num_tangent :]
    pull, free_turn, rest = np.zeros(geometry.num_tangent), np.zeros_like(free), 1.0
    if depth > 1:
        first = layers[0]
        moved = first.sigma * views["rest", 1].T @ first.below
        pull, free_turn = np.split(moved, [geometry.num_tangent])
        free_turn = free_turn / 2
        free = free / np.prod([layer.sigma for layer in layers[1:]]) + free_turn / first.sigma**2
        rest = float(np.linalg.norm(views["rest", 1]))
    spans = float(np.linalg.norm(free)) <= 1e-14 * rest
    if depth == 1:
        size = float(np.hypot(np.linalg.norm(tangent), np.linalg.norm(free)))
        constant, exponent = gamma * size, 1.0
    elif spans:
        constant, exponent = gamma * float(np.linalg.norm(tangent)), 1.0
    else:
        constant, exponent = gamma ** (1 / depth) * float(np.linalg.norm(free)), 1 / depth
    return Limits(
        margin=gamma,
        depth=depth,
        directions=tuple(reversed(directions)),
        rank_one=rank_one,
        rank_one_gap=rank_one * gamma ** (2 / depth) / 2,
        misalignment=turn**2 * gamma ** (4 / depth) / 2,
        direction_error=constant,
        direction_exponent=exponent,
        spectral_shift=shift,
        tangent=tangent,
        free=free,
        dual=dual,
        degenerate=tuple(degenerate),
        _geometry=geometry,
        _turn=turn,
        _lean=lean,
        _pull=pull,
        _free_turn=free_turn,
    )


def _soft_minimiser(geometry: Geometry) -> tuple[np.ndarray, np.ndarray, list[str]]:
    r"""$b^*$, the limiting weights $p^*$, and what is degenerate about the support."""
    support = geometry.support
    points = geometry.across[support, : geometry.num_tangent]
    b = np.zeros(geometry.num_tangent)
    weights = np.full(len(support), 1 / len(support))
    for _ in range(200 if len(b) else 0):
        bracket = points @ b
        weights = np.exp(bracket.min() - bracket)
        weights /= weights.sum()
        mean = weights @ points
        centred = points - mean
        change = np.linalg.lstsq((centred.T * weights) @ centred, mean, rcond=1e-13)[0]
        largest = float(np.max(np.abs(points @ change)))
        b = b + change * min(1.0, 2 / max(largest, 1e-300))
        if largest < 1e-14:
            break
    dual = np.zeros(geometry.num_points)
    dual[support] = weights
    reasons = []
    idle = support[weights < WEIGHTLESS]
    if len(idle):
        reasons.append(
            f"points {idle.tolist()} lie on the margin but carry no weight: w keeps moving across "
            "the margin's direction like log s, and the direction law is off by that logarithm"
        )
    return b, dual, reasons


def _near(geometry: Geometry) -> list[str]:
    gaps = geometry.gaps[geometry.gaps > 0]
    if len(gaps) == 0 or gaps.min() > NEAR:
        return []
    return [
        f"a point lies off the margin by a relative {gaps.min():.2g} only: it keeps its weight "
        f"until s is well beyond {1 / gaps.min():.2g}, and the laws hold from there on"
    ]

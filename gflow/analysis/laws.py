r"""The asymptotic laws of one flow: every limit with its rate, its constant and its next order.

With $s = -\log R \to \infty$, $\gamma$ the margin, $\bar u$ its direction, exponential tails, and
the conserved $D_k = W_{k+1}^\top W_{k+1} - W_k W_k^\top$ (derived in ``docs/asymptotics.md``):

1. In the chain frame (``gflow.dynamics.split.state``) $\dot e_k = O(s^{-1-2/L})$ and
   $\dot C_k = O(s^{-1-3/L})$: $e_k \to u_k$ and $C_k$ converge, $\sigma_k \to \infty$. So do the
   singular vectors of $W_k$, to $u_k$ and $u_{k-1}$, where $u_L = 1$, $u_0 = \bar u$. The middle
   of the two vectors between layers k and k+1 is $u_k$ up to $O(s^{-3/L})$, except $k = 1$ where
   the support does not span: there it is $u_1$ plus a constant ``_drift`` times
   $\lVert w\rVert^{-2/L}$. The laws apply the matrices $D_k$ to the middles.
2. Norms. $\sigma_{k+1}^2 - \sigma_k^2 \to u_k^\top D_k u_k$ and $\prod_k\sigma_k = \lVert w\rVert$:
   $\lVert W_k\rVert_2^2 = \lVert w\rVert^{2/L} + a_k + O(s^{-2/L})$,
   $a_{k+1} - a_k = u_k^\top D_k u_k$, $\sum_k a_k = 0$.
3. Rank one. $\lVert W_k\rVert_F^2 - \lVert W_k\rVert_2^2 \to r_k$, $r_L = 0$,
   $r_k = r_{k+1} - \operatorname{tr} D_k + u_k^\top D_k u_k$, up to $O(s^{-3/L})$.
4. Alignment. The upper right block of $D_k$ gives the angle $\varphi_k$ between $u_k(W_k)$ and
   $v_{k+1}(W_{k+1})$: with $n$ the unit vector along $(I - u_k u_k^\top) D_k u_k$

   $$\varphi_k = \frac{\lVert (I - u_k u_k^\top) D_k u_k\rVert}{\lVert w\rVert^{2/L}
   + \frac12(a_k + a_{k+1}) - \frac12(\lVert C_k^\top n\rVert^2 + \lVert C_{k+1} n\rVert^2)}
   \,(1 + O(s^{-3/L})).$$

5. Direction. Across $\bar u$, in the span T of the differences of support vectors, $w_T \to b^*$,
   the minimiser of $\sum_{i\in S} e^{-\langle b, z_i\rangle}$ over T, which exists if and only if
   all support vectors can carry weight at once; next order
   $\Sigma\,(w_T - b^*) = (L-1)\gamma^2 b^*/s + \gamma\, (V^\top V\bar u)_T/\sigma^2$, V the rows of
   $W_1$ across $u_1$, $\Sigma$ the covariance of $z$ under $p^*$. Outside T nothing pulls any more:
   $W_1$ is constant there, so that
   $w_N \simeq (s/\gamma)^{1-1/L}\,(W_1^\top u_1)_N$. If the support spans, the direction error is
   $\gamma\lVert b^*\rVert/s$ at every depth; if it does not, it is of order $s^{-1/L}$.
6. Time. $\log t = s - \log\kappa + (2 - 2/L)/s + O(s^{-2})$ with, up to $O(s^{-4/L})$,
   $\kappa = \gamma^2\lVert w\rVert^2\sigma_1^{-2} + m^2\sum_{k\ge2}\sigma_k^{-2}$, so that
   $R\,L\,\gamma^2\,t\,\lVert w\rVert^{2-2/L} \to 1$.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Product(NamedTuple):
    r"""The end-to-end vector at one risk, $w = (m/\gamma)\bar u + w_T + w_N$."""

    along: np.float64
    """m."""
    tangent: np.ndarray
    outside: np.ndarray
    norm: np.float64
    slope: np.float64
    r"""The tangent of the angle between $w$ and $\bar u$."""
    lowest: float
    r"""The smallest $q_i - m$ on the support."""


class Conserved(NamedTuple):
    """What the conserved matrices say about the layers, given the vectors between them."""

    matrices: tuple[np.ndarray, ...]
    rounding: np.ndarray
    """What is below this in a matrix is the rounding of the start."""
    lean: np.ndarray
    r"""$\frac12(\lVert C_k^\top n\rVert^2 + \lVert C_{k+1} n\rVert^2)$."""

    def laws(self, middle: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""$a_k$, $r_k$, and $\lVert(I - uu^\top)D_ku\rVert$ at $u = $ ``middle[k]``."""
        depth = len(self.matrices) + 1
        shift, rank_one, turn = np.zeros(depth), np.zeros(depth), np.zeros(depth - 1)
        for k in range(depth - 2, -1, -1):
            matrix, u = self.matrices[k], middle[k]
            pushed = matrix @ u
            corner = float(u @ pushed)
            turn[k] = np.linalg.norm(pushed - corner * u)
            shift[k] = shift[k + 1] - corner
            rank_one[k] = rank_one[k + 1] - np.trace(matrix) + corner
        noise = np.append(np.cumsum(self.rounding[::-1])[::-1], 0.0)
        rank_one[rank_one <= noise] = 0.0
        turn[turn <= self.rounding] = 0.0
        return shift - shift.mean(), rank_one, turn


@dataclasses.dataclass(frozen=True, eq=False)
class Limits:
    r"""The constants of the asymptotic laws of one flow; ``predict`` evaluates the laws.

    Attributes:
        margin: $\gamma$.
        depth: L.
        num_points: the number of data points, over which the risk is a mean.
        directions: $u_1 … u_{L-1}$, limits of the singular vectors between the layers.
        rank_one: $r_k$, shape (layers,).
        rank_one_gap: limit of $(1 - \lVert W_k\rVert_2/\lVert W_k\rVert_F)\,s^{2/L}$.
        misalignment: limit of $(1 - |\langle v_{k+1}, u_k\rangle|)\,s^{4/L}$, shape (pairs,).
        direction_error: limit of $\lVert w/\lVert w\rVert - \bar u\rVert\,s^{\beta}$.
        direction_exponent: $\beta$: 1, or 1/L where the support does not span.
        spectral_shift: $a_k$, shape (layers,).
        tangent: $b^*$, in an orthonormal basis of the differences of support vectors.
        free: $(W_1^\top u_1)_N$, the limit outside the span of the support.
        support: indices of the points on the margin.
        dual: $p^*$ on the support, the limit of the normalised loss slopes.
        imbalance: the largest $\lVert D_k\rVert_2$: the laws are series in ``expansion``.
        settled_from: the s from which the points off the margin have lost their weight.
        degenerate: reasons why some law fails or holds late; empty in general position.
    """

    margin: float
    depth: int
    num_points: int
    directions: tuple[np.ndarray, ...]
    rank_one: np.ndarray
    rank_one_gap: np.ndarray
    misalignment: np.ndarray
    direction_error: float
    direction_exponent: float
    spectral_shift: np.ndarray
    tangent: np.ndarray
    free: np.ndarray
    support: np.ndarray
    dual: np.ndarray
    imbalance: float
    settled_from: float
    degenerate: tuple[str, ...]
    _points: np.ndarray
    _conserved: Conserved
    _drift: np.ndarray
    _pull: np.ndarray
    _free_turn: np.ndarray

    def expansion(self, log_risk: float) -> float:
        r"""$\max_k\lVert D_k\rVert_2\,(\gamma/s)^{2/L}$, in whose powers the laws are series."""
        return float(self.imbalance * np.divide(self.margin, -log_risk) ** (2 / self.depth))

    @property
    def _sigma(self) -> np.ndarray:
        r"""$\Sigma$, the covariance of $z_T$ under $p^*$."""
        return (self._points.T * self.dual) @ self._points

    @property
    def least_variance(self) -> float:
        r"""The least eigenvalue of $\Sigma$; infinite if there are no differences."""
        return float(np.linalg.eigvalsh(self._sigma)[0]) if len(self.tangent) else np.inf

    @property
    def relaxed_from(self) -> float:
        r"""The s where the next order of $w_T$ is as large as $b^*$: $(L-1)\gamma^2/\lambda$."""
        least = max(self.least_variance, np.finfo(float).tiny)
        return (self.depth - 1) * self.margin**2 / least

    @np.errstate(invalid="ignore", divide="ignore")
    def predict(self, log_risk: float) -> dict[str, np.ndarray]:
        """The laws with their next-order terms at one risk, under the names of a record.

        NaN where s is so small that a law has no value.
        """
        s, depth = -np.float64(log_risk), self.depth
        w = self.product(log_risk)
        level = w.norm ** (2 / depth)
        middle = list(self.directions)
        if depth > 1:
            middle[0] = middle[0] + self._drift / level
            middle[0] = middle[0] / np.linalg.norm(middle[0])
        shift, rank_one, turn = self._conserved.laws(middle)
        spectral = level + shift
        frobenius = spectral + rank_one
        angle = turn / (level + (shift[1:] + shift[:-1]) / 2 - self._conserved.lean)
        speed = (self.margin * w.norm) ** 2 / spectral[0] + w.along**2 * np.sum(1 / spectral[1:])
        stretch = np.hypot(1.0, w.slope)
        gap = (w.along * w.slope**2 / (1 + stretch) - w.lowest) / w.norm
        return {
            "rank_one_gap": rank_one / (frobenius + np.sqrt(frobenius * spectral)),
            "misalignment": 2 * np.sin(angle / 2) ** 2,
            "direction_error": np.asarray(w.slope * np.sqrt(2 / (stretch * (1 + stretch)))),
            "margin_gap": np.asarray(gap),
            "spectral_norm": np.sqrt(spectral),
            "frobenius_norm": np.sqrt(frobenius),
            "log_time": np.asarray(s - np.log(speed) + (2 - 2 / depth) / s),
        }

    @np.errstate(invalid="ignore", divide="ignore")
    def product(self, log_risk: float) -> Product:
        """The end-to-end vector at one risk, with its next-order terms."""
        s, gamma, depth = -np.float64(log_risk), self.margin, self.depth
        level = (s / gamma) ** (2 / depth)
        tangent = self.tangent
        if len(tangent):
            # Sigma (w_T - b*) = (L - 1) gamma^2 w_T / s + ..., where that is small beside Sigma.
            pull = (depth - 1) * gamma**2 / s
            drive = pull * tangent + gamma * self._pull / level**1.5
            sigma = self._sigma
            rcond = max(float(pull / np.linalg.norm(sigma, 2)), 1e-14)
            matrix = sigma - pull * np.eye(len(tangent))
            tangent = tangent + np.linalg.lstsq(matrix, drive, rcond=rcond)[0]
        bracket = self._points @ tangent
        lowest = float(bracket.min())
        total = lowest - float(np.log(np.sum(np.exp(lowest - bracket))))
        along = np.float64(s - total - np.log(self.num_points))
        outside, slope, norm = self.free, np.float64(0.0), along / gamma
        for _ in range(20):  # |w| and w_N need each other
            first = norm ** (2 / depth) + self.spectral_shift[0]
            if depth > 1:
                outside = norm / np.sqrt(first) * (self.free - self._free_turn / first)
            slope = gamma / along * np.hypot(np.linalg.norm(tangent), np.linalg.norm(outside))
            norm = along / gamma * np.hypot(1.0, slope)
        return Product(along, tangent, outside, norm, slope, lowest)

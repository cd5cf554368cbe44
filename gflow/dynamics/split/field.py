r"""The field of gradient flow in split coordinates, and the solution of its implicit stages.

With $p_i \propto e^{-q_i}$, $\bar z = \sum_i p_i z_i$ and $K = \sum_k
\frac{\partial w}{\partial W_k}\frac{\partial w}{\partial W_k}^\top$ the flow in the clock
$s = -\log R$ is $W' = v/\lVert v\rVert^2$ with $v = \sum_i p_i\nabla q_i$. Hence
$w' = K\bar z/\kappa$, $\kappa = \bar z^\top K\bar z$, and in the notation of
``gflow.dynamics.split.state``

$$K\bar z = \rho^2\bar z + V^\top Y_1 + \tfrac{\dot\rho}{\rho} w, \qquad
Y_{k-1} = \lVert a_k\rVert^2 y_{k-1} + C_k^\top Y_k, \quad \omega_k = Y_k/\lVert a_k\rVert.$$

Across $\bar u$ all three terms are small; none is a difference of large ones. All of it is linear
in $q = (\bar z, x_1)$, $x_1 = \langle w, \bar z\rangle/\rho$, so one pass through the layers
makes matrices that serve every evaluation of an implicit stage.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import get_lapack_funcs

from gflow.dynamics.split.state import SplitState

(GESV,) = get_lapack_funcs(("gesv",), dtype=np.float64)

NEWTON_STEPS = 60
LARGEST_CHANGE = 3.0
"""Newton's step may change a softmax exponent of a point that matters by this much."""


class Weighed(NamedTuple):
    """The softmax at a point: what depends on b."""

    along: float
    weights: np.ndarray
    zbar: np.ndarray


class Chain(NamedTuple):
    r"""One pass through the layers: all that is linear in $q = (\bar z, x_1)$."""

    s: float
    growth: float
    views: dict[tuple[str, int], np.ndarray]
    sigma: np.ndarray
    size: np.ndarray
    r"""$\lVert a_k\rVert$, k = 0 … L, entry 0 unused."""
    top: np.ndarray
    r"""$x_k/x_1$."""
    below: dict[int, np.ndarray]
    pulled: dict[int, np.ndarray]
    r"""$Y_k$ as a matrix acting on q."""
    metric: np.ndarray
    r"""$V^\top Y_1$ as a matrix acting on q."""
    rate: np.ndarray
    r"""$\dot\rho/\rho$ as a row acting on q."""


class Motion(NamedTuple):
    """A point at which the field has been balanced."""

    q: np.ndarray
    w: np.ndarray
    kappa: float


class Solved(NamedTuple):
    """An implicit stage: the scaled b, its derivative, m, Newton's matrix, the motion."""

    scaled: np.ndarray
    slope: np.ndarray
    along: float
    matrix: np.ndarray
    motion: Motion


def joined(first: float, rest: np.ndarray) -> np.ndarray:
    """A number before a vector: ``np.append`` costs more than a small product."""
    out = np.empty(len(rest) + 1)
    out[0], out[1:] = first, rest
    return out


def solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The solution of a small linear system, by LAPACK without checks; NaN if it is singular."""
    _, _, found, info = GESV(matrix, rhs)
    return found if info == 0 else np.full_like(rhs, np.nan)


class SplitField:
    """The field of one network on one data set in split coordinates."""

    def __init__(self, state: SplitState):
        self.layout, self.geometry = state.layout, state.geometry
        self.depth = state.layout.depth
        self.gaps, self.margin = state.geometry.gaps, state.geometry.margin
        width = len(state.across)
        self.points = np.zeros((state.geometry.num_points, width))
        self.points[:, : state.geometry.across.shape[1]] = state.geometry.across
        # Across the span of the support the end-to-end vector grows like s^(1-1/L): scaled away.
        free = np.arange(width) >= state.geometry.num_tangent
        self.power = np.where(free, 1 - 1 / self.depth, 0.0)
        self.time_power = 2 - 2 / self.depth
        self.log_points = np.log(state.geometry.num_points)
        self.eye = np.eye(width)

    def weigh(self, state: SplitState) -> Weighed:
        """The softmax weights at a state."""
        return self.softmax(state.minus_log_risk, state.across, state.along)

    def softmax(self, s: float, across: np.ndarray, along: float) -> Weighed:
        """The softmax weights at risk s; ``along`` is the guess from which m is found."""
        fixed = self.points @ across
        for _ in range(50):
            bracket = along * self.gaps + fixed
            lowest = bracket.min()
            terms = np.exp(lowest - bracket)
            total = terms.sum()
            weights = terms / total
            gap = weights @ self.gaps
            step = (along + lowest - np.log(total) + self.log_points - s) / (1 + gap)
            along -= step
            if abs(step) <= 1e-15 * abs(along) + 1e-13:
                break
        zbar = joined(self.margin * (1 + gap), weights @ self.points)
        return Weighed(float(along), weights, zbar)

    def chain(self, slow: np.ndarray, s: float) -> Chain:
        """The pass through the layers: up with the inputs, down with the outputs."""
        depth, views = self.depth, self.layout.views(slow)
        width = self.points.shape[1] + 1
        growth = s ** (1 / depth)
        sigma, size, top = np.ones(depth + 1), np.ones(depth + 1), np.ones(depth + 1)
        for k in range(2, depth + 1):
            sigma[k] = growth * np.exp(views["log_growth", k])
            top[k] = top[k - 1] * sigma[k]
        for k in range(depth - 1, 0, -1):
            size[k] = size[k + 1] * sigma[k + 1]
        rate = np.zeros(width + 1)
        rate[-1] = sum(size[k] * top[k - 1] / sigma[k] for k in range(2, depth + 1))
        below = {k: views["below", k] / growth for k in range(1, depth)}
        pulled: dict[int, np.ndarray] = {}
        if depth == 1:
            metric = np.zeros((width, width + 1))
            return Chain(s, growth, views, sigma, size, top, below, pulled, metric, rate)
        lower = np.column_stack([below[1], views["rest", 1]])
        sent = [np.column_stack([lower, np.zeros(len(lower))])]
        for k in range(2, depth):
            block = views["rest", k] @ sent[-1]
            block[:, -1] += below[k] * top[k - 1]
            sent.append(block)
        pulled[depth - 1] = sent[-1]
        for k in range(depth - 1, 1, -1):
            pulled[k - 1] = size[k] ** 2 * sent[k - 2] + views["rest", k].T @ pulled[k]
            rate += below[k] @ pulled[k] / (size[k] * sigma[k])
        metric = lower.T @ pulled[1]
        return Chain(s, growth, views, sigma, size, top, below, pulled, metric, rate)

    def move(
        self, chain: Chain, zbar: np.ndarray, w: np.ndarray
    ) -> tuple[Motion, float, np.ndarray]:
        r"""The motion for a given $\bar z$, $\dot\rho/\rho$, and $K\bar z$."""
        rho = chain.size[1]
        q = np.empty(len(zbar) + 1)
        q[:-1], q[-1] = zbar, w @ zbar / rho
        rate = float(chain.rate @ q)
        pushed = rho**2 * zbar + chain.metric @ q + rate * w
        return Motion(q, w, float(zbar @ pushed)), rate, pushed

    def direct(
        self, chain: Chain, scaled: np.ndarray, along: float
    ) -> tuple[np.ndarray, Motion, float]:
        """The derivative of the scaled b, evaluated as it stands: for the very first step."""
        scale = chain.s**self.power
        found = self.softmax(chain.s, scaled * scale, along)
        w = joined(found.along / self.margin, scaled * scale)
        motion, _, pushed = self.move(chain, found.zbar, w)
        slope = chain.s * pushed[1:] / (motion.kappa * scale) - self.power * scaled
        return slope, motion, found.along

    def solve(
        self, chain: Chain, base: np.ndarray, step: float, scaled: np.ndarray, along: float
    ) -> Solved | None:
        """Solve scaled = base + step * derivative(scaled); None if Newton's iteration fails."""
        s, scale, size = chain.s, chain.s**self.power, len(base)
        rho = chain.size[1]
        eye = self.eye
        metric = rho**2 * eye + chain.metric[1:, 1:-1]
        ratio = scale / scale[:, None]
        matrix = eye
        previous = np.inf
        for _ in range(NEWTON_STEPS):
            found = self.softmax(s, scaled * scale, along)
            along = found.along
            w = joined(along / self.margin, scaled * scale)
            motion, rate, pushed = self.move(chain, found.zbar, w)
            if size == 0:
                return Solved(scaled, base, along, matrix, motion)
            residual = base - scaled
            residual += step * (s * pushed[1:] / (motion.kappa * scale) - self.power * scaled)
            centred = self.points - found.zbar[1:]
            covariance = (centred.T * found.weights) @ centred
            stiff = (metric @ covariance - rate * eye) * ratio
            matrix = eye * (1 + step * self.power) + step * s / motion.kappa * stiff
            change = solve(matrix, residual)
            heavy = found.weights > 1e-12
            largest = np.max(np.abs(self.points[heavy] @ (change * scale)), initial=0.0)
            factor = min(1.0, LARGEST_CHANGE / largest) if largest > 0 else 1.0
            scaled = scaled + factor * change
            error = np.abs(change).max() / (1 + np.abs(scaled).max())
            if not np.isfinite(error):
                return None
            coming = error * min(1.0, error / previous) if np.isfinite(previous) else error
            settled = error < 1e-13 or coming < 1e-13 or (error < 1e-9 and error > 0.3 * previous)
            if factor == 1 and settled:
                return self._balance(chain, base, step, scaled, along, found.zbar, matrix)
            previous = error
        return None

    def _balance(
        self,
        chain: Chain,
        base: np.ndarray,
        step: float,
        scaled: np.ndarray,
        along: float,
        zbar: np.ndarray,
        matrix: np.ndarray,
    ) -> Solved:
        r"""The stage equation read as an equation for $\bar z_\perp$, of order 1/s."""
        scale, rho = chain.s**self.power, chain.size[1]
        slope = (scaled - base) / step
        across = scaled * scale
        w = joined(along / self.margin, across)
        motion, _, _ = self.move(chain, zbar, w)
        by_last = chain.metric[1:, -1] + chain.rate[-1] * across
        by_up = chain.metric[1:, 0] + chain.rate[0] * across + by_last * w[0] / rho
        by_across = rho**2 * self.eye + chain.metric[1:, 1:-1]
        by_across += np.outer(across, chain.rate[1:-1]) + np.outer(by_last, across) / rho
        # kappa barely depends on zbar across, and zbar is known to round-off: once is enough.
        wanted = motion.kappa * scale * (slope + self.power * scaled) / chain.s
        across_part = solve(by_across, wanted - by_up * zbar[0])
        motion, _, _ = self.move(chain, joined(zbar[0], across_part), w)
        return Solved(scaled, slope, along, matrix, motion)

    def slow(self, chain: Chain, motion: Motion) -> np.ndarray:
        r"""$d/d\tau$ of the slow variables."""
        depth = self.depth
        out = np.zeros(self.layout.size)
        if depth == 1:
            return out
        new, views, growth = self.layout.views(out), chain.views, chain.growth
        pace = chain.s / motion.kappa
        sigma, size, below = chain.sigma, chain.size, chain.below
        turn = {k: chain.pulled[k] @ motion.q * (pace / size[k]) for k in range(1, depth)}
        for k in range(2, depth + 1):
            speed = pace * size[k] * chain.top[k - 1] * motion.q[-1]
            if k < depth:
                speed += turn[k] @ below[k]
            new["log_growth", k][...] = speed / sigma[k] - 1 / depth
        rho = size[1]
        new["below", 1][...] = views["below", 1] / depth - turn[1] * (growth * motion.w[0] / rho)
        np.multiply.outer(turn[1], motion.w[1:] / -rho, out=new["rest", 1])
        for k in range(2, depth):
            swing = views["rest", k] @ turn[k - 1] - sigma[k] * turn[k]
            new["below", k][...] = views["below", k] / depth + growth * swing
            np.multiply.outer(-below[k], turn[k - 1], out=new["rest", k])
        for k in range(1, depth):
            basis, moved = views["frame", k], new["frame", k]
            moved[:, 0] = basis[:, 1:] @ turn[k]
            np.multiply.outer(-basis[:, 0], turn[k], out=moved[:, 1:])
        return out

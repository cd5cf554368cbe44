r"""Coordinates of a deep linear network in which nothing that tends to zero is a difference.

Far out every layer is a growing rank-one matrix plus a bounded rest, and float64 entries of $W_k$
lose the rest, the misalignment and the differences of margins. The *chain frame* keeps them apart.

1. Let $a_k = (W_L \cdots W_{k+1})^\top$, so $a_L = 1$, $a_0 = w$, and $e_k = a_k/\lVert a_k\rVert$.
   Since $W_k^\top a_k = a_{k-1}$, in orthonormal bases $F_k$ with first vector $e_k$

   $$F_k^\top W_k F_{k-1} = \begin{pmatrix}\sigma_k & 0\\ c_k & C_k\end{pmatrix}, \qquad
   \lVert a_k\rVert = \sigma_L \cdots \sigma_{k+1}:$$

   the upper right block vanishes exactly, $\sigma_k$ grows like $(s/\gamma)^{1/L}$, $C_k$ stays
   bounded, and $c_k = O(1/\sigma_k)$ is the misalignment of layers k and k+1.
2. $\partial w/\partial W_k$ pulls $\bar z$ back to $a_k (W_{k-1} \cdots W_1 \bar z)^\top$, which
   touches the first row only. So a flow $\dot W_k = a_k (W_{k-1}\cdots W_1 \bar z)^\top$ with
   $x_k, y_k$ the first and the other components of $F_k^\top W_k \cdots W_1 \bar z$ turns the
   frames by $\dot e_k = F_k^\perp\omega_k$, $\omega_L = 0$, and reads

   $$\dot\sigma_k = \lVert a_k\rVert x_{k-1} + \omega_k \cdot c_k, \quad
   \dot c_k = C_k\omega_{k-1} - \sigma_k\omega_k, \quad \dot C_k = -c_k\omega_{k-1}^\top, \quad
   \omega_{k-1} = (\lVert a_k\rVert y_{k-1} + C_k^\top\omega_k)/\sigma_k.$$

3. The first layer keeps fixed input axes instead: the maximum-margin direction $\bar u$, an
   orthonormal basis of the differences of support vectors, one of the rest of the data, one of the
   rest of the row space of $W_1$. Its first row is $w/\rho$ with $\rho = \lVert a_1\rVert$, the
   other rows $V = (V_u, V_\perp)$ follow $\dot V = -\omega_1 w^\top/\rho$.
4. $w = (m/\gamma)\bar u + b$ with $b \perp \bar u$. With $\hat w = \bar u/\gamma$ and the gaps
   $\delta_i = \langle\hat w, z_i\rangle - 1 \ge 0$, exactly 0 on the support,

   $$q_i = m + (m\,\delta_i + \langle b, z_i\rangle):$$

   the bracket, of order one where it matters, is never formed from numbers of size $m$.

The D-invariants in these terms, $F_k^{\perp\top} D_k e_k = C_{k+1}^\top c_{k+1} - \sigma_k c_k$,
give $c_k$ from the start to full relative precision.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from gflow.dynamics.split.geometry import Geometry
from gflow.problem.data import Dataset


def frame(first: np.ndarray) -> np.ndarray:
    """An orthogonal matrix with the unit vector ``first`` as its first column (Householder)."""
    sign = 1.0 if first[0] <= 0 else -1.0
    normal = first.copy()
    normal[0] -= sign
    matrix = np.eye(len(first)) - np.outer(normal, 2 * normal / (normal @ normal))
    matrix[:, 0] = first
    return matrix


class Layout:
    r"""Where each block lies in the flat vector of slow variables.

    Blocks, all bounded and convergent in the clock $s = -\log R$: ``("log_growth", k)``
    $\log\sigma_k - \frac1L\log s$ for k = 2 … L; ``("below", k)`` $s^{1/L} c_k$ and ``("rest", k)``
    $C_k$ for k = 1 … L-1 ($V_u$ and $V_\perp$ for k = 1); ``("frame", k)`` $F_k$.
    """

    def __init__(self, widths: Sequence[int]):
        self.widths = tuple(widths)
        self.depth = len(widths) - 1
        self.slices: dict[tuple[str, int], tuple[slice, tuple[int, ...]]] = {}
        self.size = 0
        for k in range(2, self.depth + 1):
            self._add("log_growth", k, ())
        for k in range(1, self.depth):
            self._add("below", k, (widths[k] - 1,))
            self._add("rest", k, (widths[k] - 1, widths[k - 1] - 1))
            self._add("frame", k, (widths[k], widths[k]))

    def _add(self, name: str, k: int, shape: tuple[int, ...]) -> None:
        end = self.size + int(np.prod(shape))
        self.slices[name, k] = (slice(self.size, end), shape)
        self.size = end

    def views(self, flat: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
        """The blocks of ``flat``, sharing its memory."""
        return {key: flat[part].reshape(shape) for key, (part, shape) in self.slices.items()}


class Layer(NamedTuple):
    r"""$W_k$ in the chain frame, $\begin{pmatrix}\sigma & 0\\ c & C\end{pmatrix}$."""

    sigma: float
    below: np.ndarray
    rest: np.ndarray


class Momentum(NamedTuple):
    """Derivatives at the end of a step, and the next step's size."""

    slope: np.ndarray
    slow_slope: np.ndarray
    time_slope: float
    step_size: float
    last_error: float


@dataclasses.dataclass(frozen=True, eq=False)
class SplitState:
    r"""A point of the flow in split coordinates; immutable.

    Attributes:
        minus_log_risk: $s = -\log R$.
        along: $m$, the size of $w$ along $\bar u$ as a margin.
        across: $b$, the components of $w$ across $\bar u$, in ``geometry.basis`` and beyond.
        scaled_time: $s^{2-2/L}\,t R$.
        slow: all other variables, in ``layout``.
        input_basis: (d, widths[0]) orthonormal columns, those of ``geometry.basis`` first.
        imbalance: the conserved matrices that the flow started from.
        num_steps: solver steps taken so far.
        momentum: what the solver needs to go on as if it had not stopped; None at a start.
    """

    geometry: Geometry
    layout: Layout
    input_basis: np.ndarray
    imbalance: tuple[np.ndarray, ...]
    minus_log_risk: float
    along: float
    across: np.ndarray
    scaled_time: float
    slow: np.ndarray
    num_steps: int = 0
    momentum: Momentum | None = dataclasses.field(default=None, repr=False)

    def facts(self) -> dict[str, Any]:
        """What a blank of this state is made from."""
        return {"widths": list(self.layout.widths), "has_momentum": self.momentum is not None}

    @classmethod
    def blank(cls, geometry: Geometry, facts: Mapping[str, Any]) -> "SplitState":
        """A state of the structure that ``facts`` tell, its numbers yet to be filled in."""
        widths, nothing = facts["widths"], np.zeros(0)
        return cls(
            geometry=geometry,
            layout=Layout(widths),
            imbalance=(nothing,) * (len(widths) - 2),
            momentum=Momentum(nothing, nothing, 0.0, 0.0, 0.0) if facts["has_momentum"] else None,
            input_basis=nothing,
            across=nothing,
            slow=nothing,
            minus_log_risk=0.0,
            along=0.0,
            scaled_time=0.0,
        )

    @property
    def log_risk(self) -> float:
        r"""$\log R$."""
        return -self.minus_log_risk

    @property
    def log_time(self) -> float:
        r"""$\log t$, minus infinity at time 0."""
        if self.scaled_time <= 0:
            return -np.inf
        power = 2 - 2 / self.layout.depth
        log_scaled = np.log(self.scaled_time) - power * np.log(self.minus_log_risk)
        return float(log_scaled + self.minus_log_risk)

    @cached_property
    def layers(self) -> list[Layer]:
        """Layers 1 … L in the chain frame, the first one in the frame of $w$ too."""
        views, depth = self.layout.views(self.slow), self.layout.depth
        growth = self.minus_log_risk ** (1 / depth)
        found = []
        for k in range(2, depth + 1):
            sigma = float(growth * np.exp(views["log_growth", k]))
            if k < depth:
                below, rest = views["below", k] / growth, views["rest", k]
            else:
                below, rest = np.zeros(0), np.zeros((0, self.layout.widths[k - 1] - 1))
            found.append(Layer(sigma, below, rest))
        rho = float(np.prod([layer.sigma for layer in found]))
        across, along = self.across, self.along / self.geometry.margin
        norm = np.hypot(along, np.linalg.norm(across))
        if depth == 1:
            return [Layer(norm, np.zeros(0), np.zeros((0, len(across))))]
        below, rest = views["below", 1] / growth, views["rest", 1]
        toward = np.append(along, across) / norm
        turned = below[:, None] * frame(toward)[0, 1:] + rest @ frame(toward)[1:, 1:]
        first = Layer(norm / rho, below * toward[0] + rest @ toward[1:], turned)
        return [first, *found]

    def weights(self) -> tuple[np.ndarray, ...]:
        """The layer matrices in float64, rounded: small quantities live in the state itself."""
        views, depth = self.layout.views(self.slow), self.layout.depth
        growth = self.minus_log_risk ** (1 / depth)
        matrices, outer = [], np.ones((1, 1))
        rho = 1.0
        for k in range(depth, 1, -1):
            layer = self.layers[k - 1]
            inner = views["frame", k - 1]
            upper = np.append(layer.sigma, np.zeros(len(inner) - 1))
            block = np.vstack([upper, np.column_stack([layer.below, layer.rest])])
            matrices.append(outer @ block @ inner.T)
            outer = inner
            rho *= layer.sigma
        upper = np.append(self.along / self.geometry.margin, self.across)[None] / rho
        if depth > 1:
            lower = np.column_stack([views["below", 1] / growth, views["rest", 1]])
            upper = np.vstack([upper, lower])
        matrices.append(outer @ upper @ self.input_basis.T)
        return tuple(reversed(matrices))


_NUMBERS = (
    "input_basis",
    "minus_log_risk",
    "along",
    "across",
    "scaled_time",
    "slow",
    "num_steps",
)

# A pytree, so that a checkpoint serialises it as it does any other state.
jax.tree_util.register_dataclass(
    SplitState,
    data_fields=[*_NUMBERS, "imbalance", "momentum"],
    meta_fields=["geometry", "layout"],
)


def split(
    data: Dataset,
    weights: Sequence[np.ndarray],
    log_risk: float,
    log_time: float,
    imbalance: Sequence[np.ndarray] | None = None,
    geometry: Geometry | None = None,
) -> SplitState:
    """Split coordinates of ``weights``; ``imbalance`` of the start makes them more exact."""
    geometry = geometry or Geometry(data)
    weights = [np.asarray(matrix, dtype=np.float64) for matrix in weights]
    depth, s = len(weights), -float(log_risk)
    basis = _input_basis(geometry, weights[0])
    weights[0] = weights[0] @ basis
    if imbalance is not None:
        imbalance = [np.asarray(matrix) for matrix in imbalance]
    layout = Layout([basis.shape[1], *(matrix.shape[0] for matrix in weights)])
    given = imbalance is not None
    if imbalance is None:
        imbalance = [b.T @ b - a @ a.T for a, b in pairwise(weights)]
    slow = np.zeros(layout.size)
    views = layout.views(slow)
    growth = s ** (1 / depth)
    outer, rho, row = np.ones((1, 1)), 1.0, np.zeros(0)
    upper = Layer(0.0, np.zeros(0), np.zeros((0, 0)))  # the layer above, in its chain frame
    for k in range(depth, 0, -1):
        row = weights[k - 1].T @ outer[:, 0]
        sigma = float(np.linalg.norm(row))
        inner = frame(row / sigma)
        block = outer[:, 1:].T @ weights[k - 1] @ inner
        below, rest = block[:, 0], block[:, 1:]
        # An imbalance of far larger layers than this one is rounded more coarsely than its entries.
        if given and k < depth and _norm(imbalance[k - 1]) <= sigma * _norm(weights[k - 1]):
            carried = upper.rest.T @ upper.below
            below = (carried - outer[:, 1:].T @ (imbalance[k - 1] @ outer[:, 0])) / sigma
        upper = Layer(sigma, below, rest)
        if k == 1:
            break
        views["log_growth", k][...] = np.log(sigma / growth)
        views["frame", k - 1][...] = inner
        if k < depth:
            views["below", k][...] = growth * below
            views["rest", k][...] = rest
        outer = inner
        rho *= sigma
    w = rho * row
    if depth > 1:
        lower = outer[:, 1:].T @ weights[0]
        fixed = (upper.below * np.linalg.norm(w) - lower[:, 1:] @ w[1:]) / w[0]
        views["below", 1][...] = growth * fixed
        views["rest", 1][...] = lower[:, 1:]
    power = 2 - 2 / depth
    scaled = np.exp(log_time - s + power * np.log(s)) if np.isfinite(log_time) else 0.0
    return SplitState(
        geometry=geometry,
        layout=layout,
        input_basis=basis,
        imbalance=tuple(imbalance),
        minus_log_risk=s,
        along=float(w[0] * geometry.margin),
        across=w[1:].copy(),
        scaled_time=float(scaled),
        slow=slow,
    )


def _norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix))


def _input_basis(geometry: Geometry, first: np.ndarray) -> np.ndarray:
    """The data's basis, extended by the row space of the first layer outside the data's span."""
    basis = geometry.basis
    room = geometry.dim - basis.shape[1]
    if room == 0:
        return basis
    rest = first - (first @ basis) @ basis.T
    _, _, vt = np.linalg.svd(rest, full_matrices=False)
    new = vt[: min(room, len(vt))].T
    return np.hstack([basis, np.linalg.qr(new - basis @ (basis.T @ new))[0]])

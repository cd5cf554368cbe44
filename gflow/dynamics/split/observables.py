r"""The observables of a record, from split coordinates: right at any horizon.

For a layer $\begin{pmatrix}\sigma & 0\\ c & C\end{pmatrix}$ in the chain frame the leading singular
triple follows from the secular equation of $M^\top M$: with $\eta$ the lower part of the right
vector $(1, \eta)$,

$$\theta = \sigma^2 + \lVert c\rVert^2 + c^\top C\eta, \quad (\theta - C^\top C)\,\eta = C^\top c,
\quad \xi = (c + C\eta)/\sigma, \quad
\lVert W\rVert_F^2 - \theta = \lVert C\rVert_F^2 - c^\top C\eta,$$

with $(1, \xi)$ the left vector. Layer k's left and layer k+1's right vectors live in the same
frame, so that the angle between them is that of $(1, \xi_k)$ and $(1, \eta_{k+1})$, with two
small vectors of different order. Where $\sigma$ does not dominate $C$ yet an ordinary SVD is exact
enough.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gflow.dynamics.split.field import SplitField, Weighed
from gflow.dynamics.split.state import Layer, SplitState

DOMINANCE = 4.0
r"""$\sigma^2/\lVert C\rVert_2^2$ from which on the secular equation is used."""


class Leading(NamedTuple):
    """The leading singular triple of a layer in the chain frame; the vectors are not normalised."""

    value: float
    left: np.ndarray
    right: np.ndarray
    tail: float
    r"""$\lVert W\rVert_F^2 - \lVert W\rVert_2^2$."""


def leading(layer: Layer) -> Leading:
    """The leading singular triple of one layer, its small parts to full relative precision."""
    sigma, below, rest = layer
    if len(below) == 0:
        return Leading(sigma, np.ones(1), np.append(1.0, np.zeros(rest.shape[1])), 0.0)
    u, values, vt = np.linalg.svd(rest, full_matrices=False)
    if sigma**2 < DOMINANCE * np.max(values, initial=0.0) ** 2:
        upper = np.append(sigma, np.zeros(rest.shape[1]))
        u, values, vt = np.linalg.svd(np.vstack([upper, np.column_stack([below, rest])]))
        return Leading(float(values[0]), u[:, 0], vt[0], float(np.sum(values[1:] ** 2)))
    pull = values * (u.T @ below)
    base = sigma**2 + below @ below
    theta = base
    for _ in range(100):
        previous, theta = theta, base + np.sum(pull**2 / (theta - values**2))
        if abs(theta - previous) <= 1e-16 * theta:
            break
    eta = vt.T @ (pull / (theta - values**2))
    back = rest @ eta
    left = np.append(1.0, (below + back) / sigma)
    tail = max(float(np.sum(rest**2) - below @ back), 0.0)
    return Leading(float(np.sqrt(theta)), left, np.append(1.0, eta), tail)


def misalignment(left: np.ndarray, right: np.ndarray) -> float:
    """One minus the cosine of the angle between two lines, by Lagrange's identity."""
    u, v = left[1:], right[1:]
    mixed = left[0] * v - right[0] * u
    wedge = max((u @ u) * (v @ v) - (u @ v) ** 2, 0.0)
    squared_sine = min((mixed @ mixed + wedge) / ((left @ left) * (right @ right)), 1.0)
    return float(squared_sine / (1 + np.sqrt(1 - squared_sine)))


def brackets(state: SplitState) -> np.ndarray:
    r"""$q_i - m$, shape (points,)."""
    across = state.across[: state.geometry.across.shape[1]]
    return state.along * state.geometry.gaps + state.geometry.across @ across


def observables(state: SplitState) -> dict[str, np.ndarray]:
    """Every deep linear variable of a record, under its name there."""
    geometry, layers = state.geometry, state.layers
    triples = [leading(layer) for layer in layers]
    spectral = np.array([triple.value for triple in triples])
    tail = np.array([triple.tail for triple in triples])
    frobenius = np.sqrt(spectral**2 + tail)
    relative = tail / frobenius**2
    gap = relative / (1 + spectral / frobenius)
    misaligned = np.array([misalignment(a.left, b.right) for a, b in pairwise(triples)])
    along = state.along / geometry.margin
    slope = float(np.linalg.norm(state.across)) / along  # tangent of the angle between w and u
    stretch = np.hypot(1.0, slope)
    norm = along * stretch
    lowest = float(np.min(brackets(state)))
    product = float(np.exp(np.sum(np.log(frobenius))))
    first = triples[0].right
    toward = abs(first[0]) / np.linalg.norm(first)
    total = state.minus_log_risk - np.log(geometry.num_points)
    weighed = SplitField(state).weigh(state)
    residual, slackness = kkt(state, weighed, state.along + lowest)
    return {
        "kkt_residual": np.asarray(residual),
        "kkt_slackness": np.asarray(slackness),
        "perpendicular_cosine": np.asarray(perpendicular_cosine(state, weighed)),
        "log_risk": np.asarray(state.log_risk),
        "margin": np.asarray((state.along + lowest) / norm),
        # gamma |w| - min q = m (stretch - 1) - min bracket
        "margin_gap": np.asarray((state.along * slope**2 / (1 + stretch) - lowest) / norm),
        "layer_margin": np.asarray((state.along + lowest) / product),
        "smoothed_margin": np.asarray(total / product),
        "direction_error": np.asarray(slope * np.sqrt(2 / (stretch * (1 + stretch)))),
        "direction_alignment": np.asarray(norm / product * toward),
        "alignment": 1 - misaligned,
        "misalignment": misaligned,
        "frobenius_norm": frobenius,
        "spectral_norm": spectral,
        "rank_one_residual": np.sqrt(gap**2 + relative),
        "rank_one_gap": gap,
        "imbalance_drift": np.asarray(imbalance_drift(state)),
        "end_to_end": state.input_basis @ np.append(along, state.across),
    }


def kkt(state: SplitState, weighed: Weighed, smallest: float) -> tuple[float, float]:
    r"""``gflow.observables.kkt``, with the softmax weights of split coordinates.

    Rounded weights do not know which points share the slope; their layers are exact enough.
    """
    zbar = weighed.zbar
    right = state.input_basis[:, : len(zbar)] @ zbar
    weights = state.weights()
    lefts = [np.ones(1)]
    for matrix in reversed(weights[1:]):
        lefts.insert(0, lefts[0] @ matrix)
    slopes = []
    for left, matrix in zip(lefts, weights, strict=True):
        slopes.append(np.outer(left, right))
        right = matrix @ right
    size = np.sqrt(sum(np.sum(matrix**2) for matrix in weights))
    slope = np.sqrt(sum(np.sum(matrix**2) for matrix in slopes))
    apart = sum(np.sum((w / size - g / slope) ** 2) for w, g in zip(weights, slopes, strict=True))
    depth = len(weights)
    above = brackets(state)
    multipliers = size * smallest ** (1 - 2 / depth) * weighed.weights / slope
    slackness = np.max(multipliers * (above - np.min(above))) / smallest
    return float(size / smallest ** (1 / depth) * np.sqrt(apart)), float(slackness)


def perpendicular_cosine(state: SplitState, weighed: Weighed) -> float:
    """``gflow.observables.perpendicular_cosine``."""
    across, pull = state.across, weighed.zbar[1:]
    size = np.linalg.norm(across) * np.linalg.norm(weighed.zbar)
    return float(-(across[: len(pull)] @ pull) / size) if size > 0 else 0.0


def imbalance_drift(state: SplitState) -> float:
    r"""The largest change of a conserved matrix, relative to $\max_k\lVert W_k\rVert_F^2$.

    Formed block by block in the chain frames, so that what is bounded is compared with what is
    bounded.
    """
    views, layers = state.layout.views(state.slow), state.layers
    largest, worst = 0.0, 0.0
    for layer in layers:
        size = layer.sigma**2 + np.sum(layer.below**2) + np.sum(layer.rest**2)
        largest = max(largest, float(size))
    for k, (lower, upper) in enumerate(pairwise(layers), start=1):
        basis = views["frame", k]
        start = basis.T @ state.imbalance[k - 1] @ basis
        corner = (upper.sigma - lower.sigma) * (upper.sigma + lower.sigma)
        corner += upper.below @ upper.below
        side = upper.rest.T @ upper.below - lower.sigma * lower.below
        block = upper.rest.T @ upper.rest - lower.rest @ lower.rest.T
        block -= np.outer(lower.below, lower.below)
        change = (corner - start[0, 0]) ** 2 + 2 * np.sum((side - start[1:, 0]) ** 2)
        worst = max(worst, float(change + np.sum((block - start[1:, 1:]) ** 2)))
    return float(np.sqrt(worst) / largest)

r"""Observables: pure functions of a problem and its weights (public as ``gflow.observables``).

Nothing that tends to zero is computed as a difference of numbers near one: misalignment is half a
squared distance of unit vectors, rank-one gaps come from what a layer is beside its leading triple
(`singular.py`), direction and margin gaps from the difference of directions. Quantities quadratic
in a small angle are thus right far below machine precision; those linear in it (direction error,
margin gap) carry an absolute error of about 1e-16.

Singular vectors follow the paper: $W_k \approx \sigma_k u_k v_k^\top$ with the largest
singular value $\sigma_k = \lVert W_k\rVert_2$.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.array import Array, as_array
from gflow.problem.conserved import (
    Kept,
    drift,
    imbalance as imbalance,
    imbalance_drift as imbalance_drift,
    kept,
    lemma_constant as lemma_constant,
    lemma_slacks as lemma_slacks,
)
from gflow.problem.curvature import (
    log_sharpness as log_sharpness,
    sharpness as sharpness,
    sharpness_error as sharpness_error,
)
from gflow.problem.data import labelled
from gflow.problem.deep_linear import end_to_end
from gflow.problem.dense import beside
from gflow.problem.max_margin import MaxMargin
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.singular import Singular as Singular, singular as singular, singulars
from gflow.problem.target_observables import (
    distance_to as distance_to,
    effective_rank as effective_rank,
    gram_misalignment as gram_misalignment,
    kernel_movement as kernel_movement,
    mode_strengths as mode_strengths,
)
from gflow.problem.weights import Weights, inner_product, squared_norm


def misalignment(before: Singular, after: Singular) -> Array:
    r"""Misalignment $1 - |\langle v_{k+1}, u_k\rangle| = \frac12\lVert v_{k+1} \mp u_k\rVert^2$."""
    sign = jnp.where(jnp.dot(after.right, before.left) < 0, -1.0, 1.0)
    return jnp.sum((after.right - sign * before.left) ** 2) / 2


def largest_misalignment(weights: Weights) -> Array:
    """The largest misalignment over all pairs of neighbouring layers; 0 for one layer."""
    pairs = [misalignment(a, b) for a, b in pairwise(singulars(weights))]
    return jnp.max(jnp.stack(pairs)) if pairs else jnp.zeros((), weights[0].dtype)


def margin(problem: Problem, weights: Weights) -> Array:
    r"""The normalised margin $\min_i q_i/\lVert w\rVert$ of a deep linear network."""
    return jnp.min(problem.margins(weights)) / jnp.linalg.norm(end_to_end(weights))


def smoothed_margin(problem: Problem, weights: Weights) -> Array:
    r"""Lyu and Li's $\tilde\gamma = \ell^{-1}(\sum_i\ell(q_i))/\prod_k\lVert W_k\rVert_F$.

    Never decreases along the flow once $\sum_i\ell(q_i) < \ell(0)$ (arXiv 1906.05890,
    theorem 4.1, in its form for multi-homogeneous networks).
    """
    return problem.loss.inverse(_log_total(problem, weights)) / _norm_product(weights)


def gradient_alignment(problem: Problem, weights: Weights) -> Array:
    r"""The cosine of the angle between the weights and $-\nabla R$.

    Tends to one for homogeneous networks (Ji and Telgarsky, arXiv 2006.06657).
    """
    _, gradient = problem.log_risk_and_gradient(weights)
    return -inner_product(weights, gradient) / jnp.sqrt(
        squared_norm(weights) * squared_norm(gradient)
    )


class Reference(Module):
    """What observables are measured against: the maximum-margin solution and the start."""

    direction: Array
    max_margin: Array
    slack: Array
    r"""$\langle z_i, \bar u\rangle - \gamma$, shape (points,); exactly zero on the support."""
    conserved: tuple[Kept, ...]
    """What is kept of the conserved matrices of the start."""

    @classmethod
    def of(cls, solution: MaxMargin, problem: Problem, weights: Weights) -> "Reference":
        """The reference of a run; NaN throughout where the data are not separable."""
        z = np.asarray(labelled(problem.data).signed_inputs)
        start = kept(weights)
        if not solution.separable:
            nothing = np.full(z.shape, np.nan)
            direction, margin, slack = nothing[0], np.nan, nothing[:, 0]
            return cls(as_array(direction), as_array(np.float64(margin)), as_array(slack), start)
        slack = np.maximum(z @ solution.direction - solution.margin, 0.0)
        slack[np.asarray(solution.support)] = 0.0
        direction, margin = np.asarray(solution.direction), np.float64(solution.margin)
        return cls(as_array(direction), as_array(margin), as_array(slack), start)


def margin_gap(problem: Problem, weights: Weights, reference: Reference) -> Array:
    r"""$\gamma - \min_i q_i/\lVert w\rVert$ of a deep linear network, without cancellation."""
    # gamma - <z_i, w>/|w| = -<z_i, w/|w| - u> - slack_i
    w = end_to_end(weights)
    toward = w / jnp.linalg.norm(w) - reference.direction
    return jnp.max(-problem.spread(toward) - reference.slack)


def kkt(problem: Problem, weights: Weights) -> tuple[Array, Array]:
    r"""Lyu and Li's $(\varepsilon, \delta)$: how far scaled weights are from a KKT point.

    $\tilde W = W/q_{\min}^{1/L}$ is feasible for $\min\frac12\lVert W\rVert^2$, $q_i(W) \ge 1$.
    With the multipliers $\lambda_i \propto -\ell'(q_i)$ that make
    $\lVert\sum_i\lambda_i\nabla q_i(\tilde W)\rVert = \lVert\tilde W\rVert$

    $$\varepsilon = \Bigl\lVert \tilde W - \sum_i \lambda_i\nabla q_i(\tilde W)\Bigr\rVert
    = \lVert\tilde W\rVert\;\Bigl\lVert\frac{W}{\lVert W\rVert}
    + \frac{\nabla R}{\lVert\nabla R\rVert}\Bigr\rVert, \qquad
    \delta = \max_i \lambda_i\,(q_i(\tilde W) - 1).$$

    Both tend to zero along the flow (arXiv 1906.05890, theorem 4.4). NaN before the data are
    separated.
    """
    coordinates, pull = problem.network.pullback(weights, problem.data)
    margins = problem.spread(coordinates)
    slopes = problem.loss.terms(margins).slopes
    gradient, squared_slope = pull(-problem.gather(slopes))
    smallest = jnp.min(margins)
    scale = jnp.where(smallest > 0, smallest, jnp.nan)
    size, slope = jnp.sqrt(squared_norm(weights)), jnp.sqrt(squared_slope)
    apart = squared_norm(jax.tree.map(lambda w, g: w / size + g / slope, weights, gradient))
    degree = problem.network.degree(weights)
    assert degree is not None
    residual = size / scale ** (1 / degree) * jnp.sqrt(apart)
    multipliers = size * scale ** (1 - 2 / degree) * slopes / slope
    return residual, jnp.max(multipliers * (margins - smallest) / scale)


def kkt_residual(problem: Problem, weights: Weights) -> Array:
    r"""Lyu and Li's $\varepsilon$; see :func:`kkt`."""
    return kkt(problem, weights)[0]


def perpendicular_cosine(problem: Problem, w: Array, reference: Reference) -> Array:
    r"""The cosine between $\Pi_\perp w$ and $\nabla R(w)$, $\Pi_\perp$ off the best direction.

    Not negative where Ji and Telgarsky's Lemma 4 applies; 0 where one of the two vectors is.

    Args:
        problem: of linear networks.
        w: the end-to-end vector, shape (d,).
        reference: of the run.
    """
    slopes = problem.loss.terms(problem.spread(w)).slopes
    gradient = -problem.gather(slopes)
    across = w - jnp.dot(w, reference.direction) * reference.direction
    size = jnp.linalg.norm(across) * jnp.linalg.norm(gradient)
    return jnp.dot(across, gradient) / jnp.where(size == 0, 1.0, size)


def standard(problem: Problem, weights: Weights, reference: Reference) -> dict[str, Array]:
    """Every observable that a record of a deep linear network holds, by name."""
    w = end_to_end(weights)
    norm = jnp.linalg.norm(w)
    margins = problem.margins(weights)
    smallest = jnp.min(margins)
    product = _norm_product(weights)
    layers, of_each = _of_layers(weights)
    toward = w / norm - reference.direction
    residual, slackness = kkt(problem, weights)
    return {
        "log_risk": problem.log_risk(weights),
        "margin": smallest / norm,
        "margin_gap": margin_gap(problem, weights, reference),
        "kkt_residual": residual,
        "kkt_slackness": slackness,
        "perpendicular_cosine": perpendicular_cosine(problem, w, reference),
        "layer_margin": smallest / product,
        "smoothed_margin": smoothed_margin(problem, weights),
        "direction_error": jnp.linalg.norm(toward),
        "direction_alignment": jnp.abs(jnp.dot(w / product, layers[0].right)),
        **of_each,
        "imbalance_drift": drift(weights, reference.conserved),
        "end_to_end": w,
    }


def _of_layers(matrices: tuple[Array, ...]) -> tuple[list[Singular], dict[str, Array]]:
    """The leading triple of each layer, and the observables of layers and neighbours, by name."""
    layers = singulars(matrices)
    frobenius = jnp.stack([jnp.sqrt(jnp.sum(matrix**2)) for matrix in matrices])
    spectral = jnp.stack([layer.value for layer in layers])
    # With r^2 = tail/|W|_F^2: 1 - sigma/|W|_F = r^2/(1 + sigma/|W|_F) and
    # |W/|W|_F - u v^T|_F^2 = (1 - sigma/|W|_F)^2 + r^2.
    tail = jnp.stack([layer.tail for layer in layers]) / frobenius**2
    gap = tail / (1 + spectral / frobenius)
    pairs = [misalignment(a, b) for a, b in pairwise(layers)]
    misaligned = jnp.stack(pairs) if pairs else jnp.zeros((0,), frobenius.dtype)
    return layers, {
        "alignment": 1 - misaligned,
        "misalignment": misaligned,
        "frobenius_norm": frobenius,
        "spectral_norm": spectral,
        "rank_one_residual": jnp.sqrt(gap**2 + tail),
        "rank_one_gap": gap,
    }


def dense(problem: Problem, weights: Weights) -> dict[str, Array]:
    """The observables of a network's dense layers, and the norms of all other leaves, by name.

    Nothing for a network that has no such layers. Layers are decomposed in float64 also where
    weights have fewer digits.
    """
    layers = problem.network.dense_layers(weights)
    if layers is None:
        return {}
    wide = tuple(jnp.asarray(matrix, jnp.result_type(float)) for matrix in layers)
    leaves = jax.tree.leaves(weights)
    rest = [leaves[k] for k in beside(problem.network, weights)]
    norms = [jnp.sqrt(jnp.sum(jnp.asarray(leaf, jnp.result_type(float)) ** 2)) for leaf in rest]
    norms = jnp.stack(norms) if norms else jnp.zeros((0,))
    return {**_of_layers(wide)[1], "leaf_norm": norms}


def general(problem: Problem, weights: Weights) -> dict[str, Array]:
    """The observables that make sense for any network."""
    margins = problem.margins(weights)
    norm = jnp.sqrt(squared_norm(weights))
    log_risk = problem.loss.terms(margins).log_risk
    found = {"log_risk": log_risk, "norm": norm, **dense(problem, weights)}
    if "margins" not in problem.data.offers:
        return found
    found["min_margin"] = jnp.min(margins)
    degree = problem.network.degree(weights)
    if degree is not None:
        total = _log_total(problem, weights)
        found["margin"] = jnp.min(margins) / norm**degree
        found["smoothed_margin"] = problem.loss.inverse(total) / norm**degree
        found["kkt_residual"], found["kkt_slackness"] = kkt(problem, weights)
    return found


def _log_total(problem: Problem, weights: Weights) -> Array:
    r"""$\log\sum_i\ell(q_i)$."""
    return problem.log_risk(weights) + math.log(problem.data.num_points)


def _norm_product(weights: Weights) -> Array:
    return jnp.prod(jnp.stack([jnp.sqrt(jnp.sum(matrix**2)) for matrix in weights]))

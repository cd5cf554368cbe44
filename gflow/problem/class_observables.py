r"""Observables of deep linear networks on several classes.

$W = W_L \cdots W_1$ is a matrix of K rows and has up to K - 1 directions that grow: softmax slopes
sum to zero over the classes, so that $1^\top W_L$ is conserved. Where one output has rank one and
two vectors that align, K have rank K - 1 and subspaces that align; the margin is
$\min_{i,k} m_{ik}$ over a norm of W, and depth decides which: Schatten's with $p = 2/L$, since

$$\min_{W_L\cdots W_1 = W} \sum_k\lVert W_k\rVert_F^2 = L\sum_i\sigma_i(W)^{2/L}.$$

As everywhere, nothing that tends to zero is a difference of numbers near one: angles of subspaces
are those of what is left of one after projection off the other, ranks those of the trailing
singular values, and spreads within classes those of differences of inputs.
"""

from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gflow.problem.array import Array, as_array
from gflow.problem.conserved import Kept, drift, imbalance, kept
from gflow.problem.data import labelled
from gflow.problem.deep_linear import end_to_end
from gflow.problem.module import Module
from gflow.problem.observables import kkt, smoothed_margin
from gflow.problem.risk import Problem
from gflow.problem.singular import leading
from gflow.problem.weights import Weights, squared_norm


class Spectrum(NamedTuple):
    """The leading singular values and vectors of a matrix, and the norm of the rest."""

    values: Array
    left: Array
    """Shape (rows, r)."""
    right: Array
    """Shape (r, columns)."""
    tail: Array
    r"""$(\sum_{j>r}\sigma_j^2)^{1/2}$."""


def spectrum(matrix: Array, rank: int) -> Spectrum:
    """Of the ``rank`` largest; vectors are NaN where the subspace that they span is undefined.

    That is where the last of them and the next singular value agree to round-off.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    following = s[rank] if s.shape[0] > rank else jnp.zeros_like(s[0])
    defined = s[rank - 1] - following > 8 * jnp.finfo(s.dtype).eps * s[0]
    known = jnp.where(defined, 1.0, jnp.nan)
    return Spectrum(s, known * u[:, :rank], known * vt[:rank], jnp.sqrt(jnp.sum(s[rank:] ** 2)))


def subspace_misalignment(before: Spectrum, after: Spectrum) -> Array:
    r"""$1 - \cos\theta$ for the largest angle between two subspaces, without cancellation.

    Between the left vectors of a layer and the right vectors of the next. $\sin\theta$ is the
    largest singular value of $(I - UU^\top)V$, and $1 - \cos = \sin^2/(1 + \cos)$.
    """
    u, v = before.left, after.right.T
    across = v - u @ (u.T @ v)
    # As a sum of squares; a norm of 2 by the Gram matrix, whose eigenvalues lose only relative
    # digits that are not asked for: the largest is exact relative to itself.
    square = jnp.minimum(jnp.linalg.eigvalsh(across.T @ across)[-1], 1.0)
    return square / (1 + jnp.sqrt(1 - square))


def schatten_norm(values: Array, depth: int) -> Array:
    r"""$(\sum_i\sigma_i^{2/L})^{L/2}$: the Frobenius norm for L = 1, the nuclear norm for L = 2."""
    largest = jnp.max(values)
    scaled = values / jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sum(scaled ** (2 / depth)) ** (depth / 2)


def output_sum(weights: Weights) -> Array:
    r"""$1^\top W_L$, which the flow conserves and descent too, shape (width of the last layer,)."""
    return jnp.sum(jnp.asarray(weights[-1]), axis=0)


class ClassReference(Module):
    """What observables are measured against: the start, and the class means of the data."""

    conserved: tuple[Kept, ...]
    """What is kept of the conserved matrices of the start."""
    output_sum: Array
    means: Array
    r"""$\bar x_c - \bar x$, shape (K, d)."""
    within: Array
    r"""$x_i - \bar x_{y_i}$, shape (points, d)."""

    @classmethod
    def of(cls, problem: Problem, weights: Weights) -> "ClassReference":
        """The reference of a run."""
        data = labelled(problem.data)
        inputs, classes = np.asarray(data.inputs), data.classes
        counts = np.bincount(classes)
        means = np.stack([inputs[classes == c].mean(axis=0) for c in range(len(counts))])
        return cls(
            conserved=kept(weights),
            output_sum=as_array(np.asarray(output_sum(weights))),
            means=as_array(means - (counts / len(inputs)) @ means),
            within=as_array(inputs - means[classes]),
        )


class Collapse(NamedTuple):
    """How far the last hidden layer is from neural collapse; all zero in the limit."""

    variability: Array
    simplex: Array
    duality: Array
    classifier: Array


def collapse(problem: Problem, weights: Weights, reference: ClassReference) -> Collapse:
    r"""NC1 to NC4 of Papyan, Han and Donoho (PNAS 2020), of $h = W_{L-1}\cdots W_1x$.

    With centred class means $M$ (columns $\mu_c - \mu$), $\Sigma_B = \frac1K MM^\top$ and
    $\Sigma_W$ the mean of $(h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top$:

    1. $\operatorname{tr}(\Sigma_W\Sigma_B^+)/K$;
    2. $\lVert M^\top M/\lVert M^\top M\rVert_F - (I - \frac1K11^\top)/\sqrt{K-1}\rVert_F$;
    3. $\lVert W_L/\lVert W_L\rVert_F - M^\top/\lVert M\rVert_F\rVert_F$;
    4. the part of the points that the network does not put into the class of the nearest mean.
    """
    *below, last = weights
    means, within, points = reference.means, reference.within, jnp.asarray(problem.data.inputs)
    for matrix in below:
        means, within, points = means @ matrix.T, within @ matrix.T, points @ matrix.T
    num = means.shape[0]
    rank = min(num - 1, means.shape[1])
    _, s, vt = jnp.linalg.svd(means, full_matrices=False)  # of M^T
    whitened = (within @ vt[:rank].T) / s[None, :rank]
    gram = means @ means.T
    simplex = (jnp.eye(num) - 1 / num) / np.sqrt(num - 1)
    dual = last / jnp.sqrt(jnp.sum(last**2)) - means / jnp.sqrt(jnp.sum(means**2))
    # |h - mu_c|^2 - |h|^2; the centre is the mean of all points.
    centred = points - jnp.mean(points, axis=0)[None]
    distances = jnp.sum(means**2, axis=1)[None] - 2 * centred @ means.T
    chosen = jnp.argmax(points @ last.T, axis=1)
    return Collapse(
        jnp.sum(whitened**2) / within.shape[0],  # tr(S_W (M M^T/K)^+)/K
        jnp.sqrt(jnp.sum((gram / jnp.sqrt(jnp.sum(gram**2)) - simplex) ** 2)),
        jnp.sqrt(jnp.sum(dual**2)),
        jnp.mean((chosen != jnp.argmin(distances, axis=1)).astype(points.dtype)),
    )


def dual_matrix(problem: Problem, weights: Weights) -> Array:
    r"""$A(p) = \sum_{i,k}p_{ik}(e_{y_i} - e_k)x_i^\top$ of the shares p in the slopes, (K - 1, d).

    In contrasts of the outputs, which have the same singular values. Any $p \ge 0$, $\sum p = 1$
    bounds margins: $\gamma \le \lVert A(p)\rVert_F$, $\gamma_* \le \lVert A(p)\rVert_2$.
    """
    slopes = problem.loss.terms(problem.margins(weights)).slopes
    matrix = problem.gather(slopes / jnp.sum(slopes))
    return matrix.reshape(problem.data.num_outputs - 1, -1)


def of_classes(problem: Problem, weights: Weights, reference: ClassReference) -> dict[str, Array]:
    """Every observable that a record of a deep linear network on classes holds, by name."""
    depth, rank = len(weights), problem.data.num_outputs - 1
    rank = min([rank, *(min(jnp.shape(matrix)) for matrix in weights)])
    margins = problem.margins(weights)
    smallest = jnp.min(margins)
    w = end_to_end(weights)
    of_all = jnp.linalg.svd(w, compute_uv=False)
    layers = [spectrum(matrix, rank) for matrix in weights]
    num = problem.data.num_outputs
    frobenius = jnp.stack([jnp.sqrt(jnp.sum(matrix**2)) for matrix in weights])
    pairs = [subspace_misalignment(a, b) for a, b in pairwise(layers)]
    product = jnp.prod(frobenius)
    dual = jnp.linalg.svd(dual_matrix(problem, weights), compute_uv=False)
    sums = output_sum(weights) - reference.output_sum
    residual, slackness = kkt(problem, weights)
    neural = collapse(problem, weights, reference)
    return {
        "log_risk": problem.log_risk(weights),
        "norm": jnp.sqrt(squared_norm(weights)),
        "min_margin": smallest,
        "margin": smallest / jnp.sqrt(jnp.sum(of_all**2)),
        "margin_bound": jnp.sqrt(jnp.sum(dual**2)),
        "nuclear_margin": smallest / jnp.sum(of_all),
        "nuclear_margin_bound": dual[0],
        "schatten_margin": smallest / schatten_norm(of_all, depth),
        "layer_margin": smallest / product,
        "smoothed_margin": smoothed_margin(problem, weights),
        "kkt_residual": residual,
        "kkt_slackness": slackness,
        "end_to_end_values": leading(of_all, num),
        "singular_values": jnp.stack([leading(layer.values, num) for layer in layers]),
        "rank_residual": jnp.stack([layer.tail for layer in layers]) / frobenius,
        "subspace_misalignment": jnp.stack(pairs) if pairs else jnp.zeros((0,), w.dtype),
        "frobenius_norm": frobenius,
        "spectral_norm": jnp.stack([layer.values[0] for layer in layers]),
        "imbalance_drift": drift(weights, reference.conserved),
        "output_sum_drift": jnp.sqrt(jnp.sum(sums**2)) / frobenius[-1],
        "collapse_variability": neural.variability,
        "collapse_simplex": neural.simplex,
        "collapse_duality": neural.duality,
        "collapse_classifier": neural.classifier,
        "end_to_end": w,
    }


def class_slacks(start: Weights, singular_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""What the form of Ji and Telgarsky's Lemma 2 for K outputs leaves, never negative.

    From $W_{k+1}^\top W_{k+1} = W_kW_k^\top + D_k$ and Weyl's inequality

    $$|\sigma_i(W_{k+1})^2 - \sigma_i(W_k)^2| \le \lVert D_k\rVert_2, \qquad
    \sigma_K(W_k)^2 \le \tfrac1K\lVert 1^\top W_L(0)\rVert^2 + \sum_{j\ge k}\lVert D_j\rVert_2,$$

    the second since $\sigma_K(W_L) \le \lVert 1^\top W_L\rVert/\sqrt K$.

    Args:
        start: the initial weights.
        singular_values: the K largest along the run, shape (points, layers, K).

    Returns:
        Of the second (points, layers), of the first (points, layers - 1).
    """
    norms = imbalance_norms(start)
    num = start[-1].shape[0]
    first = float(np.sum(np.sum(start[-1], axis=0) ** 2)) / num
    bounds = first + np.append(np.cumsum(norms[::-1])[::-1], 0.0)
    squares = singular_values**2
    apart = np.max(np.abs(np.diff(squares, axis=1)), axis=2)
    return bounds - squares[:, :, num - 1], norms - apart


def imbalance_norms(start: Weights) -> np.ndarray:
    r"""$\lVert D_k\rVert_2$ of the conserved matrices, shape (layers - 1,)."""
    return np.array([float(np.linalg.norm(matrix, 2)) for matrix in imbalance(start)])

"""Starts: weights at time zero for deep linear networks (public as ``gflow.init``).

Every function returns a tuple of float64 NumPy matrices, ``weights[k]`` of shape
``(widths[k + 1], widths[k])``, ordered from input to output. Random starts take a seed and are the
same on every machine and every version of JAX.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gflow.problem import settings
from gflow.problem.arguments import (
    A_PROBLEM,
    expect,
    number,
    numbers_of,
    positive,
    seed_of,
    whole,
)
from gflow.problem.data import labelled
from gflow.problem.deep_linear import check_weights, end_to_end
from gflow.problem.dense import replaced
from gflow.problem.risk import ROUND_OFF, Problem, level_at_zero, risk_and_slope
from gflow.problem.weights import Weights

LayerWeights = tuple[np.ndarray, ...]


@settings.own()
def gaussian(widths: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> LayerWeights:
    r"""Independent entries $\mathcal N(0, \text{scale}^2/d_{k-1})$ (LeCun's scaling).

    With ``scale=1`` a layer keeps the expected norm of what passes through it.
    """
    scale = number("scale", scale)
    return _random(widths, lambda rows, columns: scale / np.sqrt(columns), seed)


@settings.own()
def xavier(widths: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> LayerWeights:
    r"""Gaussian entries of variance $2\,\text{scale}^2/(d_{k-1} + d_k)$ (Glorot, Bengio)."""
    scale = number("scale", scale)
    return _random(widths, lambda rows, columns: scale * np.sqrt(2 / (rows + columns)), seed)


@settings.own()
def he(widths: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> LayerWeights:
    r"""Gaussian entries of variance $2\,\text{scale}^2/d_{k-1}$ (He et al. 2015)."""
    scale = number("scale", scale)
    return _random(widths, lambda rows, columns: scale * np.sqrt(2 / columns), seed)


@settings.own()
def orthogonal(widths: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> LayerWeights:
    """Each layer ``scale`` times a random matrix with orthonormal rows or columns (Haar)."""
    scale = number("scale", scale)
    rng = np.random.default_rng(seed_of("seed", seed))

    def layer(rows: int, columns: int) -> np.ndarray:
        q, r = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diag(r))
        return scale * (q if rows >= columns else q.T)

    return tuple(layer(rows, columns) for rows, columns in _shapes(widths))


@settings.own()
def balanced(
    widths: Sequence[int],
    end_to_end: Sequence[float] | np.ndarray | None = None,
    *,
    scale: float = 1.0,
    seed: int | None = None,
) -> LayerWeights:
    r"""A balanced start $W_{k+1}^\top W_{k+1} = W_k W_k^\top$ with a given end-to-end vector.

    With one output a balanced network is rank one: $W_k = \sigma u_k u_{k-1}^\top$ with
    $u_0 = w/\lVert w\rVert$, $u_L = 1$ and $\sigma = \lVert w\rVert^{1/L}$. The paper's
    $D$ is then zero, and alignment and rank one hold exactly at all times.

    With K outputs and $W = U\Sigma V^\top$ it is $W_k = U_k\Sigma^{1/L}U_{k-1}^\top$, $U_0 = V$,
    $U_L = U$ and orthonormal columns between.

    Args:
        widths: the widths $(d_0, …, d_L)$.
        end_to_end: the vector $w$, shape (d_0,), not zero; of K outputs the matrix, shape (K, d_0),
            of a rank that the widths can carry. If not given a random direction of norm
            ``scale ** depth``, of K outputs a random matrix with such singular values.
        scale: the layers' norm $\sigma$, of K outputs their singular values, when ``end_to_end`` is
            not given.
        seed: of the hidden directions $u_k$. None takes the first unit vectors, of
            whose matrices $D_k$ only the first entry is not exactly zero, but round-off of a
            square; with a random basis all are round-off.
    """
    shapes = _shapes(widths)
    rng = np.random.default_rng(0 if seed is None else seed_of("seed", seed))
    if shapes[-1][0] > 1:
        return _balanced_matrix(shapes, end_to_end, number("scale", scale), seed, rng)
    direction = rng.normal(size=shapes[0][1])
    if end_to_end is None:
        sigma = number("scale", scale)
    else:
        direction = numbers_of("end_to_end", end_to_end)
        if direction.shape != (shapes[0][1],) or not np.all(np.isfinite(direction)):
            raise ValueError(
                f"`end_to_end` has shape {direction.shape}; expected ({shapes[0][1]},) finite "
                "numbers, one for each input of `widths`."
            )
        sigma = float(np.linalg.norm(direction)) ** (1 / len(shapes))
    if sigma == 0.0:
        raise ValueError(
            "`end_to_end` is zero; expected a vector that is not: the balanced network with zero "
            "product is the saddle at the origin."
        )
    units = [direction / np.linalg.norm(direction)]
    for rows, _ in shapes[:-1]:
        hidden = np.eye(rows)[0] if seed is None else rng.normal(size=rows)
        units.append(hidden / np.linalg.norm(hidden))
    units.append(np.ones(1))
    return tuple(sigma * np.outer(after, before) for before, after in pairwise(units))


def _balanced_matrix(
    shapes: Sequence[tuple[int, int]],
    end_to_end: Any,
    scale: float,
    seed: int | None,
    rng: np.random.Generator,
) -> LayerWeights:
    """``balanced`` for several outputs."""
    outputs, inputs = shapes[-1][0], shapes[0][1]
    rank = min(outputs, *(min(shape) for shape in shapes))
    if end_to_end is None:
        u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (outputs, inputs))
        values = np.full(rank, scale)
    else:
        matrix = numbers_of("end_to_end", end_to_end)
        if matrix.shape != (outputs, inputs) or not np.all(np.isfinite(matrix)):
            raise ValueError(
                f"`end_to_end` has shape {matrix.shape}; expected ({outputs}, {inputs}) finite "
                "numbers: a row for each output of `widths` and a column for each input."
            )
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        if np.any(s[rank:] > 1e-14 * s[0]):
            raise ValueError(
                f"`end_to_end` has a rank above {rank}, the smallest of `widths`; expected one "
                "that a product of such layers has."
            )
        u, values, v = u[:, :rank], s[:rank] ** (1 / len(shapes)), vt[:rank].T
    if not np.any(values):
        raise ValueError(
            "`end_to_end` is zero; expected a matrix that is not: the balanced network with zero "
            "product is the saddle at the origin."
        )
    bases = [v]
    for rows, _ in shapes[:-1]:
        hidden = np.eye(rows) if seed is None else np.linalg.qr(rng.normal(size=(rows, rows)))[0]
        bases.append(hidden[:, :rank])
    bases.append(u)
    return tuple((after * values) @ before.T for before, after in pairwise(bases))


@settings.own()
def zero_first(widths: Sequence[int], *, scale: float = 1.0, seed: int = 0) -> LayerWeights:
    """The paper's recipe $W_1(0) = 0$, the other layers as :func:`gaussian`.

    It meets the assumption on the start with equality, $R(W(0)) = R(0)$, for any data.
    """
    first, *rest = gaussian(widths, scale=scale, seed=seed)
    return (np.zeros_like(first), *rest)


@settings.own()
def from_arrays(arrays: Sequence[np.ndarray]) -> LayerWeights:
    """Given layer matrices from input to output, checked and copied to float64."""
    layers = tuple(arrays) if isinstance(arrays, list) else arrays
    return tuple(np.array(layer) for layer in check_weights(layers, None))


@settings.own()
def admissible(weights: Sequence[np.ndarray], problem: Problem) -> LayerWeights:
    r"""The nearest start of the same shape that satisfies $R(W(0)) \le R(0)$.

    The last layer's sign is flipped when the product points uphill,
    $\langle\nabla R(0), w\rangle > 0$, and the last layer is then halved until the risk is
    at most that of zero; both leave the other layers alone. A start that already satisfies the
    assumption is returned as it is, and so is one for targets: a risk that has its infimum at
    finite weights does not ask for it.

    Raises:
        ValueError: when the weights do not fit the problem, or the product is orthogonal to the
            gradient at zero, so no scaling helps.
    """
    expect("problem", problem, Problem, A_PROBLEM)
    if problem.loss.attained:
        return from_arrays(weights)
    *rest, last = problem.network.check(from_arrays(weights), problem.data)
    at_zero = level_at_zero(problem)

    def excess(factor: float) -> float:
        return float(risk_and_slope(problem, (*rest, factor * last))[0]) - at_zero

    if excess(1.0) <= ROUND_OFF:
        return (*rest, last)
    # R(0) has the gradient l'(0) mean_i z_i, with l' < 0.
    w = np.ravel(end_to_end((*rest, last)))
    factor = float(np.sign(np.mean(labelled(problem.data).signed_inputs, axis=0) @ w))
    if factor == 0.0:
        raise ValueError(
            "`weights` have an end-to-end vector orthogonal to the gradient of the risk at zero; "
            "no sign or scale of the last layer brings the risk below that of zero. Use another "
            "seed, or `gflow.init.zero_first`."
        )
    while excess(factor) > ROUND_OFF:
        factor /= 2
    return (*rest, factor * last)


@settings.own()
def rescaled(
    weights: Weights, problem: Problem | None = None, *, frobenius: float = 4.0
) -> Weights:
    r"""The weights with every dense layer scaled to one Frobenius norm.

    Ji and Telgarsky start the dense layers of a convolutional network so, each at norm 4: the
    differences $\lVert W_{k+1}\rVert_F^2 - \lVert W_k\rVert_F^2$, which a deep linear network
    conserves, are then zero, and as the norms grow the random part of each layer counts less.

    Args:
        weights: matrices from input to output, or with a ``problem`` any weights of its network.
        problem: whose network says which of the weights are its dense layers. All others stay.
        frobenius: the norm that every layer gets, positive.

    Raises:
        ValueError: when the network has no dense layers, a layer is zero, or ``frobenius`` is not
            positive.

    >>> layers = rescaled(gaussian((2, 8, 1)), frobenius=2.0)
    >>> [round(float(np.linalg.norm(matrix)), 12) for matrix in layers]
    [2.0, 2.0]
    """
    frobenius = positive("frobenius", frobenius)
    if problem is None:
        layers, network = from_arrays(weights), None
    else:
        expect("problem", problem, Problem, A_PROBLEM)
        network = problem.network
        weights = network.check(weights, problem.data)
        layers = network.dense_layers(weights)
    if layers is None:
        raise ValueError(
            f"`problem` has a {type(network).__name__} without dense layers; expected a "
            "network that says which they are: Network(apply, layers=...)."
        )
    norms = [float(np.linalg.norm(matrix)) for matrix in layers]
    if 0.0 in norms:
        raise ValueError(
            f"`weights` have a dense layer that is zero, number {norms.index(0.0) + 1}; expected "
            "layers that can be scaled to a norm."
        )
    scaled = [
        np.asarray(matrix) * (frobenius / norm) for matrix, norm in zip(layers, norms, strict=True)
    ]
    return tuple(scaled) if network is None else replaced(network, weights, scaled)


def _random(
    widths: Sequence[int], deviation: Callable[[int, int], float], seed: int
) -> LayerWeights:
    rng = np.random.default_rng(seed_of("seed", seed))
    return tuple(deviation(*shape) * rng.normal(size=shape) for shape in _shapes(widths))


def _shapes(widths: Sequence[int]) -> list[tuple[int, int]]:
    widths = list(widths) if np.ndim(widths) else [widths]  # pyright: ignore
    bad = [width for width in widths if not whole(width) or width < 1]
    if len(widths) < 2 or bad:
        raise ValueError(
            f"`widths` is {tuple(widths)}; expected at least two positive integers from the "
            "dimension of the inputs to the outputs, such as (2, 10, 10, 1)."
        )
    return [(int(after), int(before)) for before, after in pairwise(widths)]

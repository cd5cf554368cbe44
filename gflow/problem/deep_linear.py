r"""Deep linear networks: products of matrices, $W = W_L \cdots W_1$.

``weights[k]`` has shape ``(widths[k + 1], widths[k])``, ``k = 0`` touches the input and is the
paper's $W_1$. For labels -1 and +1 there is one output, ``widths[-1] == 1``, and the end-to-end
vector is $w = (W_L \cdots W_1)^\top$; for K classes there are K outputs, and $W$ has shape (K, d).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import numbers_of
from gflow.problem.array import Array, as_array
from gflow.problem.design import AbstractDesign
from gflow.problem.network import AbstractNetwork
from gflow.problem.sharding import check_cut, placed
from gflow.problem.weights import Factors, Weights, move


class DeepLinear(AbstractNetwork):
    r"""The deep linear network $x \mapsto W_L \cdots W_1 x$ of any widths.

    Its depth and widths are those of the weights it is given. One output for labels -1 and +1, K
    for K classes or K targets.
    """

    devices: Mesh | None = eqx.field(static=True, default=None, repr=False)
    """Those that share the weights: ``Problem.sharded``."""

    @property
    def mesh(self) -> Mesh | None:
        return self.devices

    def over(self, mesh: Mesh) -> "DeepLinear":
        return DeepLinear(mesh)

    def placed(self, weights: Weights) -> Weights:
        return weights if self.mesh is None else placed(weights, self.mesh)

    def layers(self, weights: Weights) -> tuple[Array, ...]:
        return tuple(weights)

    def degree(self, weights: Weights) -> float:
        return float(len(weights))

    def design(self, data: AbstractData) -> AbstractDesign:
        return data.design()

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        if data.rows is None:
            return left_products(weights)[0]
        return _chain(weights, as_array(data.rows))[0].reshape(-1)

    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        # With l_k = W_L ... W_{k+1} (a row) and r_k = W_{k-1} ... W_1 cbar (a column) the pullback
        # is the outer product l_k^T r_k^T, of squared norm |l_k|^2 |r_k|^2: vector times matrix
        # only, each matrix read twice and its gradient written once.
        if data.rows is not None:
            return self._pullback_of_rows(weights, data.rows)
        lefts = left_products(weights)

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            right = cotangent
            gradient = []
            squared_norm = jnp.zeros((), cotangent.dtype)
            for left, matrix in zip(lefts[1:], weights, strict=True):
                gradient.append(jnp.outer(left, right))
                squared_norm = squared_norm + jnp.sum(left**2) * jnp.sum(right**2)
                right = matrix @ right
            return tuple(gradient), squared_norm

        return lefts[0], pull

    # The same with q rows P: l_k = P W_L ... W_{k+1}, r_k = Cbar (W_{k-1} ... W_1)^T, both as
    # rows, and the norm |l_k^T r_k|_F^2 = <l_k l_k^T, r_k r_k^T>.
    def _pullback_of_rows(
        self, weights: Weights, rows: np.ndarray
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        lefts = _chain(weights, as_array(rows))

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            right = cotangent.reshape(lefts[0].shape)
            gradient = []
            squared_norm = jnp.zeros((), cotangent.dtype)
            for left, matrix in zip(lefts[1:], weights, strict=True):
                gradient.append(left.T @ right)
                squared_norm = squared_norm + jnp.sum((left @ left.T) * (right @ right.T))
                right = right @ matrix.T
            return tuple(gradient), squared_norm

        return lefts[0].reshape(-1), pull

    def no_vectors(self, weights: Weights) -> Factors:
        if self.mesh is None and self._smaller_whole(weights):
            return super().no_vectors(weights)
        rank = max(1, jnp.shape(weights[-1])[0] - 1)
        layers = [jnp.asarray(matrix) for matrix in weights]
        none = [jnp.zeros((0, rank, 1), matrix.dtype) for matrix in layers]
        pairs = list(zip(none, layers, strict=True))
        return Factors(
            [jnp.repeat(each, matrix.shape[0], 2) for each, matrix in pairs],
            [jnp.repeat(each, matrix.shape[1], 2) for each, matrix in pairs],
        )

    # The pullback of v is (W_L ... W_{k+1})^T (W_{k-1} ... W_1 v)^T in layer k, an outer product;
    # with K outputs it is a sum of several, one a row that margins see. W_0 + sum_j c_j K_j with
    # such K_j is applied to vectors without being formed: all stages of a step share the products
    # with W_0, and the rest costs as little as the vectors.
    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array, data: AbstractData
    ) -> tuple[Array, Callable[[Array], Factors]]:
        layers, stages = _layers_along(weights, vectors, coefficients), coefficients.shape[0]
        first = np.ones((1, 1)) if data.rows is None else data.rows
        row, rows = (
            jnp.broadcast_to(jnp.asarray(first, coefficients.dtype), (stages, *first.shape)),
            [],
        )
        for times, _ in reversed(layers):
            rows.append(row)
            row = times(row)
        shape = row.shape

        def pull(cotangents: Array) -> Factors:
            column, columns = cotangents.reshape(-1, *shape[1:]), []
            for _, times_turned in layers:
                columns.append(column)
                column = times_turned(column)
            return Factors(rows[::-1], columns)

        return row.reshape(stages, -1), pull

    def _smaller_whole(self, weights: Weights) -> bool:
        """Whether gradients of K outputs have no more entries than their K - 1 factors have.

        Ten classes in ten features, four layers, to log R = -1e6: 172 corrections for 189, since
        the vectors are then the pullbacks themselves, and 0.85 of the time.
        """
        shapes = [jnp.shape(matrix) for matrix in weights]
        rank = shapes[-1][0] - 1
        return rank * sum(map(sum, shapes)) >= sum(map(math.prod, shapes))

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        weights = check_weights(weights, data.num_outputs, data.rows_in_words)
        if weights[0].shape[1] != data.dim:
            raise ValueError(
                f"`weights[0]` has shape {weights[0].shape}; expected {data.dim} columns, the "
                "dimension of the data's inputs. Weights are ordered from input to output."
            )
        if self.mesh is not None:
            check_cut(weights, self.mesh)
        return weights


def left_products(weights: Weights) -> list[Array]:
    r"""The rows $l_k = W_L \cdots W_{k+1}$ for k = 0 … L; ``l_0`` is $w$, ``l_L`` is [1].

    Evaluated from the output, vector times matrix: 2P flops for P weights.
    """
    return _chain(weights, jnp.ones_like(jnp.asarray(weights[-1])[:, 0]))


def _chain(weights: Weights, first: Array) -> list[Array]:
    r"""The products ``first`` $W_L \cdots W_{k+1}$ for k = 0 … L."""
    rows = [jnp.asarray(first, jnp.result_type(*weights))]
    for matrix in reversed(weights):
        rows.append(rows[-1] @ matrix)
    return rows[::-1]


def _layers_along(
    weights: Weights, vectors: Factors, coefficients: Array
) -> list[tuple[Callable[[Array], Array], Callable[[Array], Array]]]:
    """The products of a row a stage with each layer at ``weights + coefficients @ vectors``.

    And with each layer turned.
    """

    def whole(moved: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        return lambda rows: rows @ moved, lambda rows: rows @ moved.mT

    def in_factors(
        matrix: Array, left: Array, right: Array
    ) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        return (
            lambda rows: rows @ matrix + _combined(coefficients, rows, left, right),
            lambda rows: _turned(rows, matrix) + _combined(coefficients, rows, right, left),
        )

    if vectors.are_whole:
        return [*map(whole, jax.vmap(lambda row: move(weights, vectors, row))(coefficients))]
    return [in_factors(*layer) for layer in zip(weights, *vectors, strict=True)]


def _turned(rows: Array, matrix: Array) -> Array:
    """``rows @ matrix.T``, for rows of shape (stages, q, b)."""
    if math.prod(rows.shape[:-1]) == 1:
        # XLA turns the matrix for a single row, which takes ten times as long: 70 ms at width 4096.
        return (matrix @ rows.reshape(-1))[None, None]
    return rows @ matrix.T


def _combined(coefficients: Array, rows: Array, first: Array, second: Array) -> Array:
    r"""``rows[i] @ sum_j`` $c_{ij}$ ``first[j].T @ second[j]`` for every stage i.

    Args:
        coefficients: shape (stages, J).
        rows: shape (stages, q, a).
        first: shape (J, r, a).
        second: shape (J, r, b).

    Returns:
        Shape (stages, q, b).
    """
    stages, q, _ = rows.shape
    num, rank, width = first.shape
    parts = rows.reshape(stages * q, width) @ first.reshape(num * rank, width).T
    weighted = coefficients[:, None, :, None] * parts.reshape(stages, q, num, rank)
    found = weighted.reshape(stages * q, num * rank) @ second.reshape(num * rank, second.shape[2])
    return found.reshape(stages, q, second.shape[2])


def end_to_end(weights: Weights) -> Float[Array, "..."]:
    r"""The end-to-end vector $w = (W_L \cdots W_1)^\top$, shape (d,), of a network of one output.

    Of K outputs the matrix $W_L \cdots W_1$, shape (K, d).

    >>> import numpy as np
    >>> end_to_end((np.array([[1.0, 2.0]]), np.array([[3.0]]))).tolist()
    [3.0, 6.0]
    """
    if jnp.shape(weights[-1])[0] == 1:
        return left_products(weights)[0]
    *before, last = weights
    return _chain(before, last)[0] if before else jnp.asarray(last)


def widths(weights: Weights) -> tuple[int, ...]:
    """The widths $(d_0, d_1, …, d_L)$ of a deep linear network; ``depth = len(widths) - 1``."""
    return (weights[0].shape[1], *(matrix.shape[0] for matrix in weights))


def check_weights(
    weights: Sequence[Any], num_outputs: int | None = 1, wanted: str = "one row, of one output"
) -> tuple[np.ndarray, ...]:
    """The layers of a deep linear network as float64 NumPy matrices, validated.

    Args:
        weights: from input to output.
        num_outputs: that they have to have; None for any number.
        wanted: how many rows the last layer has therefore, in words.

    Raises:
        ValueError: when there is no layer, a layer is not a finite matrix, neighbours do not fit,
            or there is another number of outputs.
    """
    if isinstance(weights, np.ndarray | jax.Array) or not isinstance(weights, Sequence):
        raise ValueError(
            f"`weights` is a {type(weights).__name__}; expected a tuple of matrices from input to "
            "output. For one layer write `(matrix,)`."
        )
    if len(weights) == 0:
        raise ValueError("`weights` is empty; expected at least one matrix.")
    checked: list[np.ndarray] = []
    for k, layer in enumerate(weights):
        matrix = numbers_of(f"weights[{k}]", layer)
        if matrix.ndim != 2:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected a matrix, "
                "shape (width after the layer, width before it)."
            )
        if 0 in matrix.shape:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected widths of at least 1."
            )
        if not np.all(np.isfinite(matrix)):
            raise ValueError(
                f"`weights[{k}]` has NaN or infinite entries; expected finite numbers."
            )
        if checked and matrix.shape[1] != checked[-1].shape[0]:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected {checked[-1].shape[0]} "
                f"columns, the rows of `weights[{k - 1}]`. Weights are ordered from input to "
                "output."
            )
        checked.append(matrix)
    if num_outputs is not None and checked[-1].shape[0] != num_outputs:
        raise ValueError(
            f"`weights[{len(checked) - 1}]` has shape {checked[-1].shape}; expected {wanted}."
        )
    return tuple(checked)

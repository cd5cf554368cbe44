"""Weights: pytrees of arrays, vectors of their space, and what is computed of them as such."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gflow.problem.arguments import numbers_of, shown
from gflow.problem.array import Array

Weights = PyTree[Array]
"""A tuple of layer matrices for a deep linear network, any pytree of arrays for another."""


class Factors(NamedTuple):
    """Vectors of weight space: vector j is ``lefts[k][j].T @ rights[k][j]`` in array k.

    Shapes (vectors, rank, rows) and (vectors, rank, columns), of one rank for all arrays. Whole
    vectors are rows of all arrays one behind the other: ``rights[0]`` alone, beside ones.
    """

    lefts: list[Array]
    rights: list[Array]

    @classmethod
    def whole(cls, vectors: Array) -> "Factors":
        """Those that are the rows of a matrix."""
        return cls([jnp.ones_like(vectors[:, :1, None])], [vectors[:, None]])

    @property
    def are_whole(self) -> bool:
        return len(self.lefts) == 1 and self.lefts[0].shape[1:] == (1, 1)

    def multiplied(self) -> "Factors":
        """The same vectors whole."""
        if self.are_whole:
            return self
        return Factors.whole(in_rows([a.mT @ b for a, b in zip(*self, strict=True)]))

    def in_arrays(self, weights: Weights) -> "Factors":
        """The same vectors with factors for each array of the weights."""
        leaves = jax.tree.leaves(weights)
        if len(self.rights) == len(leaves):
            return self
        rights = jnp.split(self.rights[0], _ends(leaves), -1)
        return Factors(self.lefts * len(leaves), rights)


def move(weights: Weights, vectors: Factors, coefficients: Array) -> Weights:
    """``weights + coefficients @ vectors``."""
    moves = [combined(coefficients, a, b) for a, b in zip(*vectors, strict=True)]
    return jax.tree.map(jnp.add, weights, shaped(moves, weights))


def combined(coefficients: Array, left: Array, right: Array) -> Array:
    """``coefficients @ vectors`` of the factors in one array, shape (rows, columns)."""
    scaled = coefficients[:, None, None] * left
    return scaled.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def shaped(leaves: list[Array], weights: Weights) -> Weights:
    """The arrays in ``leaves``, or all in a row, as a tree of the weights' structure and shapes."""
    old, structure = jax.tree.flatten(weights)
    if len(leaves) < len(old):
        leaves = jnp.split(leaves[0].reshape(-1), _ends(old))
    shaped = [new.reshape(jnp.shape(leaf)) for new, leaf in zip(leaves, old, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def in_rows(vectors: Weights) -> Array:
    """Vectors, on the leading axis of all arrays, as the rows of a matrix."""
    leaves = jax.tree.leaves(vectors)
    rows = [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves]
    return jnp.concatenate(rows, 1)


def _ends(leaves: list[Array]) -> list[int]:
    """Where arrays end that lie one behind the other, but for the last."""
    return np.cumsum([np.size(leaf) for leaf in leaves])[:-1].tolist()


def squared_norms(left: Array, right: Array) -> Array:
    r"""$\lVert l^\top r\rVert_F^2 = \langle ll^\top, rr^\top\rangle$ of each vector in an array."""
    return jnp.sum((left @ left.mT) * (right @ right.mT), (1, 2))


def squared_norm(tree: PyTree[Array]) -> Array:
    """Sum of the squares of all entries of a pytree."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # pyright: ignore


def inner_product(a: Weights, b: Weights) -> Array:
    r"""$\langle a, b\rangle$, summed over all arrays of two pytrees of one structure.

    Matrices are reduced by a vector times matrix product: XLA vectorises that on a CPU but not a
    plain sum, which would take longer than the rest of a step of descent.
    """

    def leaf(x: Array, y: Array) -> Array:
        product = x * y
        if product.ndim < 2:
            return jnp.sum(product)
        product = product.reshape(-1, product.shape[-1])
        return jnp.sum(jnp.ones((product.shape[0],), product.dtype) @ product)

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))  # pyright: ignore


def float_leaves(argument: str, weights: Weights) -> Weights:
    """Any pytree of weights as float64 NumPy arrays.

    Raises:
        ValueError: that names a leaf which is not to be trained: a function, a setting, an integer.
    """

    def converted(path: Any, leaf: Any) -> np.ndarray:
        where = argument + jax.tree_util.keystr(path)
        try:
            kind = np.asarray(leaf).dtype.kind
        except TypeError:  # a random key
            kind = "O"
        if kind in "fV":
            return numbers_of(where, leaf)
        outside = (
            "Keep the rest out of the weights: `arrays, rest = equinox.partition(model, "
            "equinox.is_inexact_array)`, with `equinox.combine(arrays, rest)` in the network."
        )
        if kind in "iub":
            raise ValueError(
                f"`{where}` is of the type {np.asarray(leaf).dtype}, {shown(leaf)}; expected real "
                f"numbers with a decimal point: every leaf is trained. {outside}"
            )
        raise ValueError(
            f"`{where}` is {shown(leaf)}; expected an array of real numbers: every leaf is "
            f"trained. {outside}"
        )

    return jax.tree_util.tree_map_with_path(converted, weights)


def size_of(weights: Weights) -> int:
    """How many numbers there are."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(weights))

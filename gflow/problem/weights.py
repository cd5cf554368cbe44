"""Weights: pytrees of arrays, vectors of their space, and what is computed of them as such."""

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

    Shapes (vectors, rank, rows) and (vectors, rank, columns), of one rank for all arrays.
    """

    lefts: list[Array]
    rights: list[Array]


def move(weights: Weights, vectors: Factors, coefficients: Array) -> Weights:
    """``weights + coefficients @ vectors``."""
    moves = [combined(coefficients, a, b) for a, b in zip(*vectors, strict=True)]
    return jax.tree.map(jnp.add, weights, shaped(moves, weights))


def combined(coefficients: Array, left: Array, right: Array) -> Array:
    """``coefficients @ vectors`` of the factors in one array, shape (rows, columns)."""
    scaled = coefficients[:, None, None] * left
    return scaled.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def shaped(leaves: list[Array], weights: Weights) -> Weights:
    """The arrays in ``leaves`` as a tree of the weights' structure and shapes."""
    old, structure = jax.tree.flatten(weights)
    shaped = [new.reshape(jnp.shape(leaf)) for new, leaf in zip(leaves, old, strict=True)]
    return jax.tree.unflatten(structure, shaped)


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

"""Small matrices by the thousand: sums over axes, members in the last one."""

import functools
import operator
from typing import Any

import jax.numpy as jnp

from gflow.problem.network import Array

UNROLLED = 32
"""Up to this order elimination is written out over the lanes."""


def times(rows: Array, matrix: Array) -> Array:
    """``rows @ matrix.T`` in every lane: (i, k, lanes) and (j, k, lanes) to (i, j, lanes)."""
    # As a reduction, which is computed once; written out, XLA repeats it in all that uses it.
    return jnp.sum(rows[:, None] * matrix[None], 2)


def mix(matrix: Any, values: Array) -> Array:
    """``matrix @ values`` in every lane: (i, j, lanes) and (j, …, lanes) to (i, …, lanes)."""
    shape = (matrix.shape[0], *[1] * (values.ndim - 2))
    terms = [
        matrix[:, j].reshape(*shape, matrix.shape[-1]) * values[j][None]
        for j in range(matrix.shape[1])
    ]
    return functools.reduce(operator.add, terms)


def outer(lefts: Array, rights: Array) -> Array:
    """Sum over j of the outer products of (j, a, lanes) and (j, b, lanes)."""
    terms = [left[:, None] * right[None] for left, right in zip(lefts, rights, strict=True)]
    return functools.reduce(operator.add, terms)


def dot(a: Array, b: Array, axis: int) -> Array:
    """The inner product along an axis."""
    return jnp.sum(a * b, axis)


def norm(vectors: Array, axis: int) -> Array:
    """The Euclidean norm along an axis."""
    return jnp.sqrt(jnp.sum(vectors**2, axis))


def ratio(a: Array, b: Array) -> Array:
    """``a / b``, zero where b is."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def solve(matrix: Array, rhs: Array) -> Array:
    """``matrix x = rhs`` in every lane, shapes (k, k, lanes) and (k, lanes)."""
    order = rhs.shape[0]
    if order > UNROLLED:
        moved = jnp.moveaxis(matrix, -1, 0), jnp.moveaxis(rhs, -1, 0)[:, :, None]
        return jnp.moveaxis(jnp.linalg.solve(*moved)[:, :, 0], 0, -1)
    rest, rows = jnp.concatenate([matrix, rhs[:, None]], 1), []
    for _ in range(order):
        first = rest[0, 1:] / rest[0, :1]
        rows.append(first)
        rest = rest[1:, 1:] - rest[1:, :1] * first[None]
    found: list[Array] = []
    for row in reversed(rows):
        *factors, value = row
        for factor, x in zip(factors, found, strict=True):
            value = value - factor * x
        found = [value, *found]
    return jnp.stack(found)

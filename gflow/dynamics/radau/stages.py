"""What a step is made of: the field at its stages, the frame of its middle, and what solves it.

The equations are in ``newton.py``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import AbstractField
from gflow.dynamics.radau.gram import Gram
from gflow.dynamics.radau.spectral import Systems
from gflow.problem.array import Array, total
from gflow.problem.design import AbstractDesign
from gflow.problem.risk import Problem
from gflow.problem.terms import AbstractCurvature
from gflow.problem.weights import Factors, Weights, squared_norms


class Solution(NamedTuple):
    """What a step hands to the next: its equations' solution, and counts since the start."""

    step: Array
    behind: Array
    """Where the next step begins, in units of this one: 1, its end; 0, its beginning."""
    derivatives: Factors
    """K, p vectors."""
    offsets: Array
    """Margins up to a common level, shape (p, n)."""
    num_iterations: Array
    num_evaluations: Array
    """Of the field, one for each stage in each iteration."""
    newton_error: Array
    """Of the last step, relative to the weights: the precision reached."""


class Balance(NamedTuple):
    """What a step's end asks of the field at its stages, shapes (p,)."""

    log_risk: Array
    rate: Array
    squared_norm: Array


class Stages(NamedTuple):
    """The field at the stages of a step; the stages are the leading axis of all arrays."""

    derivatives: Factors
    log_risk: Array
    rate: Array
    squared_norm: Array
    slopes: Array
    force: Array
    """$A^\\top s$, in the problem's coordinates, shape (p, coordinates)."""
    curvature: AbstractCurvature
    gap: Array

    @property
    def balance(self) -> Balance:
        return Balance(self.log_risk, self.rate, self.squared_norm)


class Frame(NamedTuple):
    """:math:`G_0`, of the predicted middle of a step.

    The pullback of a cotangent Z, (q, d), is ``lefts[k].T @ Z @ columns_k``.
    """

    lefts: list[Array]
    """Shapes (q, rows)."""
    columns: Array
    """Of all arrays side by side, (d, columns): a product for all of them."""
    turned: Array
    """The same, turned: to turn it in a product takes ten times as long as the product."""
    gram: Gram
    scales: list[Array]
    """What changes of each array of weights on the step are compared with: its norm where the step
    begins, and that of the step as it is predicted. Of whole vectors, of each number's array."""
    most: Array
    """Bound of the ratio of :math:`G_i` and :math:`G_0`, which are products of arrays: by how much
    all of them together may grow."""
    log_risk: Array
    """There."""

    def inner(self, vectors: Factors) -> Array:
        """The left factors of :math:`G_0` times K_j, side by side, shape (J, q, columns)."""
        parts = [
            jnp.swapaxes(left @ a.T, 1, 2) @ right
            for left, right, a in zip(*vectors, self.lefts, strict=True)
        ]
        return jnp.concatenate(parts, 2)

    def project(self, inner: Array) -> Array:
        """:math:`G_0 K_j` of what ``inner`` gave, shape (..., m)."""
        found = inner @ self.turned
        return found.reshape(*found.shape[:-2], -1)

    def pull(self, cotangents: Array, like: list[Array]) -> list[Array]:
        """Right factors of the pullbacks of z_j, beside ``lefts``, as wide as those of others."""
        z = cotangents.reshape(*cotangents.shape[:-1], self.lefts[0].shape[0], -1)
        ends = np.cumsum([right.shape[-1] for right in like])
        return jnp.split(z @ self.columns, ends[:-1], -1)


class Attempt(NamedTuple):
    """A Newton iterate: stage weights are :math:`W_0` + ``coefficients`` @ ``derivatives``."""

    frame: Frame
    count: Array
    coefficients: Array
    derivatives: Factors
    inner: Array
    """What :meth:`Frame.inner` gives of them."""
    offsets: Array
    size: Array
    """Of the last correction, relative to the weights."""
    contraction: Array
    """Its ratio to the one before; infinite as long as there is none to compare with."""
    stiffness: Array | Systems
    """The last stage's :math:`\\varphi^2\\mu A^\\top H A`, shape (m, m); of a large system, of all
    stages, as it was last decomposed."""
    kept: Array
    """Whether that was in an attempt before."""


def evaluate(
    field: AbstractField,
    weights: Weights,
    vectors: Factors,
    coefficients: Array,
    offsets: Array,
    s: Array,
    log_share: float = 0.0,
) -> Stages:
    """The field at ``weights + coefficients @ vectors``, with slopes taken at the offsets.

    Of some of the points, ``log_share`` is to be added to the logarithm of their mean loss.
    """
    problem = field.problem
    coordinates, pull = field.along(weights, vectors, coefficients)
    distance = problem.spread(coordinates) - offsets
    level = jax.vmap(problem.loss.level)(offsets, distance)
    log_risk, slopes, curvature = jax.vmap(problem.loss.terms)(offsets, level)
    log_risk = log_risk + log_share
    force = problem.gather(slopes)
    derivatives, rate, squared = field.velocities(
        s, weights, vectors, coefficients, log_risk, pull(force)
    )
    gap = distance - level[:, None]
    return Stages(derivatives, log_risk, rate, squared, slopes, force, curvature, gap)


def frame_of(
    field: AbstractField, weights: Weights, h: Array, vectors: Factors, coefficients: Array
) -> Frame:
    """G at ``weights + coefficients @ vectors``, and what a step h from the weights begins with.

    Coefficients have shape (J,).
    """
    problem = field.problem
    nothing = jnp.zeros((1, 0), coefficients.dtype)
    start, _ = field.along(weights, field.no_vectors(weights), nothing)
    coordinates, pull = field.along(weights, vectors, coefficients[None])
    lefts = [left[0] for left in pull(jnp.zeros_like(coordinates)).lefts]  # of every vector
    basis, _ = axes(problem)
    columns = [right[:, 0, 0] for right in jax.vmap(lambda v: pull(v[None]).rights)(basis)]
    gram = Gram.of(lefts, columns)
    if vectors.are_whole:
        columns = [jnp.kron(*pair) for pair in zip(lefts, columns, strict=True)]
        lefts = [jnp.ones((1, 1), coordinates.dtype)]
    together = jnp.concatenate(columns, 1)
    log_risk = problem.loss.terms(problem.spread(start[0])).log_risk
    scales, most = _scales(weights, h, vectors)
    return Frame(lefts, together, together.T, gram, scales, most, log_risk)


def _scales(weights: Weights, h: Array, vectors: Factors) -> tuple[list[Array], Array]:
    """A frame's scales, (1, 1, 1) and (1, 1, columns) beside right factors, and ``most``."""
    leaves = jax.tree.leaves(weights)
    sizes = [jnp.sqrt(jnp.sum(leaf**2)) for leaf in leaves]
    scales = [
        size + h * jnp.max(norms_of_products(left, right))
        for size, left, right in zip(sizes, *vectors.in_arrays(weights), strict=True)
    ]
    most = jnp.prod(jnp.stack([b / a for a, b in zip(sizes, scales, strict=True)]))
    most = jnp.where(jnp.isnan(most), jnp.inf, most)  # of an array that is zero
    # Of an array that is and stays zero, as far as one knows, the whole stands for it.
    scales = [jnp.where(scale == 0, total(scales), scale).reshape(1, 1, 1) for scale in scales]
    if len(vectors.rights) == len(leaves):
        return scales, most
    each = [
        jnp.broadcast_to(scale, (1, 1, leaf.size))
        for scale, leaf in zip(scales, leaves, strict=True)
    ]
    return [jnp.concatenate(each, 2)], most


def norms(factors: Array) -> Array:
    """The Frobenius norm of each vector's factor, shape (vectors,)."""
    return jnp.sqrt(jnp.sum(factors**2, axis=(1, 2)))


def norms_of_products(left: Array, right: Array) -> Array:
    r"""The Frobenius norm of each vector in an array, from its factors.

    Of rank one the product of theirs, else $\operatorname{tr}(LL^\top RR^\top)^{1/2}$: near a
    saddle the terms of a vector cancel, and the product of the norms is larger by $10^3$ and more.
    """
    if left.shape[1] == 1:
        return norms(left) * norms(right)
    return jnp.sqrt(jnp.maximum(squared_norms(left, right), 0.0))


def axes(problem: Problem) -> tuple[Array, AbstractDesign | None]:
    """The cotangents that G is kept for, of each row of coordinates the same, and A in their terms.

    With fewer margins than coordinates the margins serve as coordinates, and A is the identity.
    """
    if problem.design is None:
        return jnp.eye(problem.num_coordinates), None
    return problem.design.axes()

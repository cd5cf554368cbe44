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
from gflow.problem.array import Array
from gflow.problem.design import AbstractDesign
from gflow.problem.risk import Problem
from gflow.problem.terms import AbstractCurvature
from gflow.problem.weights import Factors, Weights


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
    sizes: list[Array]
    """Frobenius norm of each array of weights, where the step begins."""
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
    (lefts, rights), squared = field.bent(weights, vectors, coefficients, pull(force))
    rate = field.clock.rate(s, log_risk, squared)
    derivatives = Factors(lefts, [rate[:, None, None] * right for right in rights])
    gap = distance - level[:, None]
    return Stages(derivatives, log_risk, rate, squared, slopes, force, curvature, gap)


def frame_of(
    field: AbstractField, weights: Weights, vectors: Factors, coefficients: Array
) -> Frame:
    """G at ``weights + coefficients @ vectors``; the sizes and the risk are those of the weights.

    Coefficients have shape (J,).
    """
    problem = field.problem
    nothing = jnp.zeros((1, 0), coefficients.dtype)
    start, _ = field.along(weights, field.no_vectors(weights), nothing)
    coordinates, pull = field.along(weights, vectors, coefficients[None])
    lefts = [left[0] for left in pull(jnp.zeros_like(coordinates)).lefts]  # of every vector
    basis, _ = axes(problem, coordinates.shape[1], lefts[0].shape[0])
    columns = [right[:, 0, 0] for right in jax.vmap(lambda v: pull(v[None]).rights)(basis)]
    sizes = [jnp.sqrt(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(weights)]
    log_risk = problem.loss.terms(problem.spread(start[0])).log_risk
    together = jnp.concatenate(columns, 1)
    return Frame(lefts, together, together.T, Gram.of(lefts, columns), sizes, log_risk)


def axes(problem: Problem, num_coordinates: int, rank: int) -> tuple[Array, AbstractDesign | None]:
    """The cotangents that G is kept for, of each row of coordinates the same, and A in their terms.

    With fewer margins than coordinates the margins serve as coordinates, and A is the identity.
    Vectors of a lower rank than there are rows are whole arrays, which rows do not share.
    """
    if problem.design is None:
        return jnp.eye(num_coordinates), None
    if problem.data.rows is not None and rank < len(problem.data.rows):
        return jnp.eye(num_coordinates), problem.design
    return problem.design.axes()

r"""The field at collocation stages, with vectors of weight space kept as outer products.

The pullback of a deep linear network is an outer product in every layer,
:math:`(W_L\cdots W_{k+1})^\top\,(W_{k-1}\cdots W_1 v)^\top`. Here :math:`W_0 + \sum_j c_j K_j` with
such :math:`K_j` is applied to vectors without being formed: all stages of a step share the
products with :math:`W_0`, and the rest costs as little as the vectors. For any other network, and
for modified flows, a "layer" is a leaf of the weights and a "factor" the number one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.radau import legendre_values, radau
from gflow.problem.losses import AbstractLoss
from gflow.problem.modified import ModifiedProblem, still_falling
from gflow.problem.network import Array, Weights, inner_product
from gflow.problem.risk import Problem


class Factors(NamedTuple):
    """Weight-space vectors, ``outer(lefts[k][j], rights[k][j])`` for layer k and vector j."""

    lefts: list[Array]
    rights: list[Array]


class Stage(NamedTuple):
    """The field at a stage; all stages on a leading axis after ``vmap``."""

    derivative: Factors
    log_risk: Array
    rate: Array
    squared_norm: Array
    slopes: Array
    curvatures: Array
    gap: Array


class Frame(NamedTuple):
    """:math:`G_0`: the pullback of basis vector a is ``outer(lefts[k], columns[k][a])``."""

    design: Array | None
    """A; None for the identity: with fewer points than inputs the margins serve as coordinates."""
    lefts: list[Array]
    columns: list[Array]
    gram: Array
    sizes: list[Array]
    """Frobenius norm of each layer."""
    log_risk: Array

    def project(self, vectors: Factors) -> Array:
        """:math:`G_0 K_j`, shape (stages, m)."""
        layers = zip(*vectors, self.lefts, self.columns, strict=True)
        return sum((left @ a)[:, None] * (right @ b.T) for left, right, a, b in layers)  # pyright: ignore


class Collocation(diffrax.AbstractLocalInterpolation):
    """The collocation polynomial of a step."""

    t0: Any
    t1: Any
    state: FlowState
    derivatives: Factors
    time_slopes: Any

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> FlowState:
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        step, p = self.t1 - self.t0, self.time_slopes.size
        # The integral of the k-th Legendre polynomial is a difference of its neighbours.
        values = legendre_values((t0 - self.t0) / step, p + 1)
        integrals = [(values[1] + 1) / 2]
        integrals += [(values[k + 1] - values[k - 1]) / (4 * k + 2) for k in range(1, p)]
        coefficients = step * jnp.stack(integrals) @ radau(p).legendre
        return FlowState(
            move(self.state.weights, self.derivatives, coefficients),
            self.state.scaled_time + coefficients @ self.time_slopes,
        )


def evaluate_stage(
    field: FlowField,
    weights: Weights,
    vectors: Factors,
    t: Any,
    coefficients: Array,
    offsets: Array,
) -> Stage:
    """The field at ``weights + coefficients @ vectors``, with slopes taken at the offsets."""
    problem = field.problem
    coordinates, pull = _pullback(problem, weights, vectors, coefficients)
    distance = problem.spread(coordinates) - offsets
    level = jnp.sum(jax.nn.softmax(-offsets) * distance)
    log_risk, slopes, curvatures = loss_terms(problem.loss, offsets, level)
    lefts, rights = pull(problem.gather(slopes))
    squared_norm = sum(
        (jnp.sum(left**2) * jnp.sum(right**2) for left, right in zip(lefts, rights, strict=True)),
        start=jnp.zeros((), log_risk.dtype),
    )
    if isinstance(problem, ModifiedProblem):
        # -h and <g, h> in the place of -g and |g|^2; what is added needs the weights themselves.
        added = jax.tree.leaves(problem.correction(move(weights, vectors, coefficients)))
        slope = rights
        rights = [right - jnp.ravel(more) for right, more in zip(slope, added, strict=True)]
        squared_norm = still_falling(inner_product(slope, rights))
    rate = field.clock.rate(t, log_risk, squared_norm)
    derivative = Factors(lefts, [rate * right for right in rights])
    return Stage(derivative, log_risk, rate, squared_norm, slopes, curvatures, distance - level)


def _pullback(
    problem: Problem, weights: Weights, vectors: Factors, coefficients: Array
) -> tuple[Array, Callable[[Array], Factors]]:
    """Coordinates c at ``weights + coefficients @ vectors``; the map from v to :math:`G^T v`."""
    if not problem.outer:
        moved = move(weights, vectors, coefficients)
        coordinates, vjp = jax.vjp(lambda w: problem.network.coordinates(w, problem.data), moved)

        def pull_any(v: Array) -> Factors:
            leaves = jax.tree.leaves(vjp(v)[0])
            return Factors([jnp.ones_like(v[:1]) for _ in leaves], [jnp.ravel(x) for x in leaves])

        return coordinates, pull_any

    layers = list(zip(weights, *vectors, strict=True))
    row, rows = jnp.ones_like(weights[-1][:, 0]), []
    for matrix, left, right in reversed(layers):
        rows.append(row)
        row = row @ matrix + (coefficients * (left @ row)) @ right

    def pull(v: Array) -> Factors:
        columns = []
        for matrix, left, right in layers:
            columns.append(v)
            v = matrix @ v + (coefficients * (right @ v)) @ left
        return Factors(rows[::-1], columns)

    return row, pull


def start_frame(problem: Problem, weights: Weights) -> Frame:
    """G at the start of a step."""
    at_rest = no_vectors(problem, weights)
    coordinates, pull = _pullback(problem, weights, at_rest, at_rest.rights[0][:, 0])
    design = problem.design
    basis = jnp.eye(coordinates.size)
    if design is not None and design.shape[0] < design.shape[1]:
        basis, design = jnp.asarray(design), None
    lefts = pull(basis[0]).lefts
    columns = jax.vmap(lambda v: pull(v).rights)(basis)
    gram = sum(jnp.sum(a**2) * (b @ b.T) for a, b in zip(lefts, columns, strict=True))
    sizes = [jnp.sqrt(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(weights)]
    log_risk = problem.loss_slopes(problem.spread(coordinates)).log_risk
    return Frame(design, lefts, columns, gram, sizes, log_risk)  # pyright: ignore


def loss_terms(
    loss: AbstractLoss, offsets: Array, level: Array, axis: int = 0
) -> tuple[Array, Array, Array]:
    r""":math:`\log R`, slopes and :math:`\ell''_i/\sum_j\ell_j` at the margins offsets + level.

    The points are on ``axis`` of the offsets, which the level does not have.

    Where the loss is exponential up to a bounded factor, that factor is taken at the margin and the
    exponential at the offset, so that a large level costs no digits.
    """
    level = jnp.expand_dims(level, axis)
    margins, shift, base = offsets + level, jnp.zeros_like(offsets), jnp.zeros_like(level)
    if loss.exponential_tail:
        margins = jnp.minimum(margins, 40.0)  # beyond it the factor is constant to the last digit
        shift, base = margins - offsets, level
    log_total = logsumexp(loss.log_value(margins) + shift, axis=axis, keepdims=True)
    slopes = jnp.exp(loss.log_slope(margins) + shift - log_total)
    curvatures = jnp.exp(loss.log_curvature(margins) + shift - log_total)
    log_risk = jnp.squeeze(log_total - base, axis) - np.log(offsets.shape[axis])
    return log_risk, slopes, curvatures


def advance(
    loss: AbstractLoss, offsets: Array, change: Array, axis: int = -1
) -> tuple[Array, Array]:
    """Offsets moved by ``change``, points on ``axis``, and which were held back.

    Newton's method predicts how shares of the slopes change, linearly. Where a share is to grow by
    more than a factor e and beyond exp(-5), the share is moved by that, not its logarithm.
    """
    if not loss.exponential_tail:
        return offsets + change, jnp.zeros_like(change, dtype=bool)
    share = jax.nn.log_softmax(-offsets, axis=axis)
    limit = jnp.maximum(share + 1 + jnp.log(jnp.maximum(-change, 1.0)), -5.0)
    return -jnp.minimum(share - change, limit), share - change > limit


def move(weights: Weights, vectors: Factors, coefficients: Array) -> Weights:
    """``weights + coefficients @ vectors``."""
    moves = [(coefficients[:, None] * a).T @ b for a, b in zip(*vectors, strict=True)]
    return jax.tree.map(jnp.add, weights, shaped(moves, weights))


def shaped(leaves: list[Array], weights: Weights) -> Weights:
    """The arrays in ``leaves`` as a tree of the weights' structure and shapes."""
    old, structure = jax.tree.flatten(weights)
    shaped = [new.reshape(jnp.shape(leaf)) for new, leaf in zip(leaves, old, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def no_vectors(problem: Problem, weights: Weights) -> Factors:
    """No vectors. Layers move by outer products; leaves of other networks as a single row."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(weights)]
    if not problem.outer:
        leaves = [leaf.reshape(1, -1) for leaf in leaves]
    return Factors([leaf.T[:0] for leaf in leaves], [leaf[:0] for leaf in leaves])

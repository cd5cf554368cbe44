r"""Explicit Runge–Kutta steps, from the tableaus of diffrax.

$$k_i = f\Bigl(s + c_ih,\; y + h\sum_{j<i}a_{ij}k_j\Bigr), \qquad
y' = y + h\sum_ib_ik_i, \qquad e = h\sum_i(b_i - \hat b_i)k_i.$$

A step of diffrax's own does the same, with as much work beside the field as the field of a small
network takes: of the march to log R = -10 a third.

**Wide layers.** Slopes of a deep linear network are outer products, of as many numbers as a layer
has rows and columns. Large ones are kept so, and stages are applied to vectors without being
formed: a stage reads the weights twice, instead of those and all slopes, and writes nothing.
"""

import math
from functools import reduce
from typing import Any, TypeGuard

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.method import AtOnce, Step
from gflow.problem.array import Array
from gflow.problem.weights import Factors, Weights, combined, move, shaped

LARGE = 2**15
"""Numbers in a layer from which on the slopes of a step are summed without those whose coefficients
are zero, three in four of Dopri8's: reading them is what a step costs beside the field. Two layers
of width 512 take half the time, and 0.4 s longer to compile."""

FEWER = 8
"""They are kept as factors where these are as many times fewer numbers, and a layer is large."""


class RungeKutta(AtOnce):
    """An explicit pair, which makes a step at once.

    Attributes:
        solver: whose tableau it is.
        sharper: by how much its estimate of the error is to stay below the tolerance.
        attempts: see ``patience``.
    """

    solver: diffrax.AbstractERK
    sharper: float = 1.0
    attempts: int | None = None

    @property
    def patience(self) -> int | None:
        return self.attempts

    @property
    def _tableau(self) -> diffrax.ButcherTableau:
        tableau = self.solver.tableau
        assert isinstance(tableau, diffrax.ButcherTableau)
        return tableau

    @property
    def noise(self) -> float:
        return self.sharper * super().noise

    def start(self, field: AbstractField, s: Array, state: FlowState, h: Array) -> Any:
        return _slope(field, s, state)

    def end(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        attempt: Any,
        seen: Any,
        before: Any,
    ) -> Step:
        tableau = self._tableau
        count = len(tableau.c) + 1
        lower, nodes = np.zeros((count, count)), np.concatenate([[0.0], tableau.c])
        for i, row in enumerate(tableau.a_lower, start=1):
            lower[i, : len(row)] = row
        if outer(field, state.weights):
            return self._of_outer_products(field, s, h, state, before, lower, nodes)

        def sums(coefficients: Any, slopes: FlowState) -> FlowState:
            """The step times the sum of the slopes, each with its coefficient."""
            return jax.tree.map(
                lambda rows: h.astype(rows.dtype) * _sum(coefficients, rows), slopes
            )

        def ahead(i: Array, slopes: FlowState) -> FlowState:
            """The step times the sum that leads to a stage."""

            def one(rows: Array) -> Array:
                if not _is_large(rows):
                    return h.astype(rows.dtype) * _sum(jnp.asarray(lower)[i], rows)
                branches = [lambda rows, row=row: _sum(row, rows) for row in lower[1:]]
                return h.astype(rows.dtype) * jax.lax.switch(i - 1, branches, rows)

            return jax.tree.map(one, slopes)

        def stage(i: Array, slopes: FlowState) -> FlowState:
            at = jax.tree.map(jnp.add, state, ahead(i, slopes))
            slope = field(s + jnp.asarray(nodes)[i] * h, at)
            return jax.tree.map(lambda rows, row: rows.at[i].set(row), slopes, slope)

        slopes = _first_of(count, before)
        slopes = jax.lax.fori_loop(1, count, stage, slopes)
        after = jax.tree.map(jnp.add, state, sums(tableau.b_sol, slopes))
        error = jax.tree.map(lambda e: self.sharper * e, sums(tableau.b_error, slopes))
        # The last stage of most pairs is the first of the next step.
        if tableau.fsal:
            memory = jax.tree.map(lambda rows: rows[-1], slopes)
        else:
            memory = field(s + h, after)
        return Step(after, error, memory)

    def _of_outer_products(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        before: tuple[Factors, Array],
        lower: np.ndarray,
        nodes: np.ndarray,
    ) -> Step:
        """The same step, its slopes kept as factors: row i of each array is of stage i."""
        tableau, (weights, u) = self._tableau, state

        def stage(i: Array, slopes: tuple[Factors, Array]) -> tuple[Factors, Array]:
            vectors, of_u = slopes
            ahead = h * jnp.asarray(lower)[i]
            slope = field.slope_along(
                s + jnp.asarray(nodes)[i] * h, weights, vectors, ahead, u + ahead @ of_u
            )
            return jax.tree.map(lambda rows, row: rows.at[i].set(row), slopes, slope)

        slopes = _first_of(len(lower), before)
        slopes = vectors, of_u = jax.lax.fori_loop(1, len(lower), stage, slopes)
        ends, errors = (h * jnp.asarray(b) for b in (tableau.b_sol, tableau.b_error))
        after = FlowState(move(weights, vectors, ends), u + ends @ of_u)
        errors = self.sharper * errors
        found = [combined(errors, left, right) for left, right in zip(*vectors, strict=True)]
        error = FlowState(shaped(found, weights), errors @ of_u)
        if tableau.fsal:
            memory = jax.tree.map(lambda rows: rows[-1], slopes)
        else:
            memory = _slope(field, s + h, after)
        return Step(after, error, memory)

    def counts(self, tally: Any, num_steps: int) -> tuple[int, int]:
        tableau = self._tableau
        return (len(tableau.c) + 1 - int(tableau.fsal)) * num_steps, 0


def _slope(field: AbstractField, s: Array, state: FlowState) -> Any:
    """The field, in the form in which steps from there keep it."""
    if not outer(field, state.weights):
        return field(s, state)
    none, no_coefficients = field.no_vectors(state.weights), jnp.zeros(0, state.scaled_time.dtype)
    return field.slope_along(s, state.weights, none, no_coefficients, state.scaled_time)


def outer(field: AbstractField, weights: Weights) -> bool:
    """Whether slopes are kept as outer products, of which :meth:`AbstractField.along` is made."""
    factors = jax.eval_shape(field.no_vectors, weights)
    numbers = sum(math.prod(factor.shape[1:]) for factor in jax.tree.leaves(factors))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)]
    return max(sizes) > LARGE and FEWER * numbers < sum(sizes)


def _first_of(count: int, slope: Any) -> Any:
    """Room for the slopes of so many stages, with that of the first, on a new leading axis."""
    return jax.tree.map(lambda k: jnp.zeros((count, *k.shape), k.dtype).at[0].set(k), slope)


def _is_large(rows: Array) -> bool:
    return math.prod(rows.shape[1:]) > LARGE


def _sum(coefficients: Any, rows: Array) -> Array:
    """The sum of some rows, each with its coefficient; of large ones none without is read."""
    if not _is_large(rows):
        weighted = jnp.asarray(coefficients, rows.dtype)
        return jnp.tensordot(weighted, rows, 1, precision=jax.lax.Precision.HIGHEST)
    used = np.nonzero(coefficients)[0].tolist()
    return reduce(jnp.add, [float(coefficients[k]) * rows[k] for k in used])


def is_explicit_pair(solver: Any) -> TypeGuard[diffrax.AbstractERK]:
    """Whether a solver's step is what its tableau says, with an estimate of the error."""
    if not isinstance(solver, diffrax.AbstractERK):
        return False
    plain = type(solver).step is diffrax.AbstractERK.step
    return plain and isinstance(getattr(solver, "tableau", None), diffrax.ButcherTableau)


SHARPER, SHARPEST = 100.0, 1e-12
"""By how much, and down to which tolerance."""


def sharp(solver: diffrax.AbstractERK, rtol: float, attempts: int) -> RungeKutta:
    """An explicit solver whose steps are as exact as those of the implicit one at a tolerance.

    The estimate of the implicit solver is of lower order than its steps, whose errors are a hundred
    times smaller, or less. That of an explicit pair is as large as they are.
    """
    return RungeKutta(solver, min(SHARPER, max(1.0, rtol / SHARPEST)), attempts)

r"""The field and a Newton correction of ``GaussNewton``, for members in the last axis.

Formulas are those of ``stages.py`` and ``gauss_newton.py``, where they are derived. Elimination
does not pivot. The matrix is :math:`I + (ha_{ij}\,G G^\top B_j)` with positive semi-definite
:math:`B_j`, and a poor solution would only cost iterations: the residual decides.
"""

import functools
import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.radau.gauss_newton import GaussNewton, remaining
from gflow.dynamics.lanes.algebra import dot, mix, norm, outer, ratio, solve, times
from gflow.dynamics.radau import decay_rate, radau
from gflow.dynamics.stages import advance as advance_offsets, loss_terms
from gflow.problem.losses import AbstractLoss
from gflow.problem.network import Array


class Members(NamedTuple):
    """What the members in the lanes are asked to do."""

    design: Array
    """Signed inputs, shape (points, m, lanes), or (points, m, 1) for data that all share."""
    rtol: Array
    atol: Array
    targets: Array
    """Clock values to land on, increasing, shape (saved, lanes)."""
    max_steps: Array


class Frame(NamedTuple):
    """The pullback of basis vectors at the start of a step, as in ``stages.Frame``."""

    lefts: list[Array]
    columns: list[Array]
    gram: Array
    sizes: list[Array]
    log_risk: Array

    def project(self, lefts: list[Array], rights: list[Array]) -> Array:
        """:math:`G_0 K_j`, shape (stages, m, lanes)."""
        layers = zip(lefts, rights, self.lefts, self.columns, strict=True)
        parts = [dot(left, a[None], 1)[:, None] * times(right, b) for left, right, a, b in layers]
        return sum(parts[1:], parts[0])


class Solution(NamedTuple):
    """A step's derivatives at the stages, as outer products, and its offsets."""

    step: Array
    lefts: list[Array]
    rights: list[Array]
    offsets: Array


class Newton(NamedTuple):
    """A Newton iterate, as ``gauss_newton.Iterate``."""

    count: Array
    coefficients: Array
    lefts: list[Array]
    rights: list[Array]
    projection: Array
    offsets: Array
    size: Array
    contraction: Array
    stiffness: Array
    ended: Array


class Method(eqx.Module):
    """A step's mathematics: loss, clock and solver, for all lanes at once."""

    loss: AbstractLoss
    clock: AbstractClock
    solver: GaussNewton

    def evaluate(
        self,
        weights: tuple[Array, ...],
        members: Members,
        lefts: list[Array],
        rights: list[Array],
        coefficients: Array,
        offsets: Array,
        t: Array,
    ) -> dict[str, Any]:
        """The field at ``weights + coefficients @ vectors``: ``stages.evaluate_stage``."""
        layers = list(zip(weights, lefts, rights, strict=True))
        row = jnp.ones((offsets.shape[0], 1, offsets.shape[-1]))
        rows = []
        for matrix, left, right in reversed(layers):
            rows.append(row)
            inner = coefficients * times(row, left)
            row = times(row, matrix.swapaxes(0, 1)) + times(inner, right.swapaxes(0, 1))
        margins = times(row, members.design)
        distance = margins - offsets
        level = jnp.sum(jax.nn.softmax(-offsets, axis=1) * distance, 1)
        log_risk, slopes, curvatures = loss_terms(self.loss, offsets, level, axis=1)
        force = jnp.sum(slopes[:, :, None] * members.design[None], 1)
        column, columns = force, []
        for matrix, left, right in layers:
            columns.append(column)
            inner = coefficients * times(column, right)
            column = times(column, matrix) + times(inner, left.swapaxes(0, 1))
        rows = rows[::-1]
        terms = [jnp.sum(a**2, 1) * jnp.sum(b**2, 1) for a, b in zip(rows, columns, strict=True)]
        squared = functools.reduce(operator.add, terms)
        rate = self.clock.rate(t, log_risk, squared)
        return {
            "lefts": rows,
            "rights": [rate[:, None] * column for column in columns],
            "log_risk": log_risk,
            "rate": rate,
            "squared": squared,
            "slopes": slopes,
            "curvatures": curvatures,
            "force": force,
            "gap": distance - level[:, None],
        }

    def correct(
        self, newton: Newton, frame: Frame, h: Array, members: Members, stage: dict[str, Any]
    ) -> Newton:
        """One Newton correction in a step ``h``: ``GaussNewton._newton``'s iteration."""
        p = self.solver.stages
        matrix = h * radau(p).matrix[:, :, None]
        m, lanes = frame.gram.shape[0], h.shape[0]
        mu, slopes, curvatures = stage["rate"][:, None], stage["slopes"], stage["curvatures"]
        force, gap, design = stage["force"], stage["gap"], members.design

        against = jnp.sum(times(force, frame.gram) * force, 1)
        growth = jnp.sqrt(stage["squared"] / against)[:, None]
        weighted = mu * curvatures
        # mu A^T H e and mu A^T H A.
        pulled = jnp.sum((weighted * gap)[:, :, None] * design[None], 1)
        stiff = jnp.stack(
            [
                jnp.stack(
                    [jnp.sum(weighted * (design[:, a] * design[:, b])[None], 1) for b in range(m)],
                    1,
                )
                for a in range(m)
            ],
            1,
        )
        if self.clock.centred:
            pulled = pulled - mu * force * jnp.sum(slopes * gap, 1)[:, None]
            stiff = stiff - mu[:, :, None] * force[:, :, None] * force[:, None, :]

        change = frame.project(stage["lefts"], stage["rights"]) - newton.projection
        moved = change - growth * times(pulled, frame.gram)
        rhs = mix(matrix, moved)
        scaled = growth[:, :, None] ** 2 * stiff
        terms = [frame.gram[None, :, c, None] * scaled[:, c, None] for c in range(m)]
        blocks = functools.reduce(operator.add, terms)
        system = matrix[:, None, :, None] * blocks.swapaxes(0, 1)[None]
        system = system.reshape(p * m, p * m, lanes) + jnp.eye(p * m)[:, :, None]
        y = growth * solve(system, rhs.reshape(p * m, lanes)).reshape(p, m, lanes)
        z = pulled + sum(stiff[:, :, b] * y[:, b, None] for b in range(m))
        lefts, rights = stage["lefts"], []
        for left, right, a, b in zip(
            lefts, stage["rights"], frame.lefts, frame.columns, strict=True
        ):
            scale = ratio(norm(a, 0), norm(left, 1))[:, None]
            rights.append(right - growth * scale * times(z, b.swapaxes(0, 1)))
        shift = gap + times(y, design)
        share = jax.nn.softmax(-newton.offsets, axis=1)
        shift = shift - jnp.sum(share * shift, 1, keepdims=True)
        offsets, held = advance_offsets(self.loss, newton.offsets, shift, axis=1)

        sizes = [
            jnp.max(norm(l1 - l0, 1) * norm(r1, 1) + norm(l0, 1) * norm(r1 - r0, 1), 0)
            / (w + h * jnp.max(norm(l1, 1) * norm(r1, 1), 0))
            for l0, r0, l1, r1, w in zip(
                newton.lefts, newton.rights, lefts, rights, frame.sizes, strict=True
            )
        ]
        size = h * jnp.max(jnp.stack(sizes), 0)
        moving = jnp.max(jnp.sum(curvatures * jnp.abs(shift), 1), 0) > 1e-6
        held = jnp.any(held, (0, 1)) | moving | (newton.count == 0)
        size = jnp.where(held, jnp.maximum(size, 1.0), size)
        contraction = jnp.where(newton.size < 1, size / newton.size, 1.0)
        count = newton.count + 1
        solved = remaining(size, contraction) < self.solver.tolerance
        stagnant = (contraction > 0.5) & (size < 100 * self.solver.tolerance)
        spent = jnp.isnan(size) | (count >= self.solver.max_iterations)
        return Newton(
            count=count,
            coefficients=matrix,
            lefts=lefts,
            rights=rights,
            projection=frame.project(lefts, rights),
            offsets=offsets,
            size=size,
            contraction=contraction,
            stiffness=growth[-1, 0] ** 2 * stiff[-1],
            ended=(count >= 2) & (solved | stagnant | spent),
        )

    def frame(self, weights: tuple[Array, ...], members: Members) -> tuple[Frame, Array]:
        """G at the start of a step, and the coordinates there: ``stages.start_frame``."""
        row, lefts = jnp.ones_like(weights[-1][:, 0]), []
        for matrix in reversed(weights):
            lefts.append(row)
            row = times(row[None], matrix.swapaxes(0, 1))[0]
        lefts = lefts[::-1]
        m, lanes = row.shape
        column = jnp.broadcast_to(jnp.eye(m)[:, :, None], (m, m, lanes))
        columns = []
        for matrix in weights:
            columns.append(column)
            column = times(column, matrix)
        terms = [jnp.sum(a**2, 0) * times(b, b) for a, b in zip(lefts, columns, strict=True)]
        gram = functools.reduce(operator.add, terms)
        sizes = [jnp.sqrt(jnp.sum(w**2, (0, 1))) for w in weights]
        margins = times(row[None], members.design)[0]
        log_risk = jax.nn.logsumexp(self.loss.log_value(margins), axis=0)
        return Frame(lefts, columns, gram, sizes, log_risk - np.log(margins.shape[0])), row

    def size(
        self,
        error: list[Array],
        before: tuple[Array, ...],
        after: tuple[Array, ...],
        members: Members,
    ) -> Array:
        """``stepping.Tolerance``'s norm of an error of the weights."""
        squares = [
            jnp.sum(
                (e / (members.atol + members.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))) ** 2,
                (0, 1),
            )
            for e, a, b in zip(error, before, after, strict=True)
        ]
        size = sum(w.shape[0] * w.shape[1] for w in before)
        return jnp.sqrt(sum(squares[1:], squares[0]) / size)

    def error(self, newton: Newton, frame: Frame, h: Array) -> list[Array]:
        """The weights' error: ``GaussNewton._error``."""
        tableau = radau(self.solver.stages)
        tail = tableau.legendre[-3:][:, :, None]
        squares = sum(
            jnp.sum(tail * mix(tail, (times(left, left) * times(right, right)).swapaxes(0, 1)), 1)
            / (w + h * jnp.max(norm(left, 1) * norm(right, 1), 0)) ** 2
            for left, right, w in zip(newton.lefts, newton.rights, frame.sizes, strict=True)
        )
        third, second, final = jnp.sqrt(jnp.abs(squares))
        damping, m = h * tableau.damping, frame.gram.shape[0]
        system = jnp.eye(m)[:, :, None] + damping * times(newton.stiffness, frame.gram)
        last = mix(tail[-1:], newton.projection)  # (1, m, lanes)
        z = damping * solve(system, times(last, newton.stiffness)[0])
        scale = h * decay_rate(final, second, third) ** (self.solver.stages - 1)
        return [
            scale * (outer(tail[-1][:, None] * left, right) - a[:, None] * mix(z[None], b)[0][None])
            for left, right, a, b in zip(
                newton.lefts, newton.rights, frame.lefts, frame.columns, strict=True
            )
        ]

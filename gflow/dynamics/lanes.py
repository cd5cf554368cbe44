r"""Many flows in one loop: ``GaussNewton`` for members that lie side by side in the last axis.

The mathematics is that of ``gauss_newton.py``, and so are the results. What differs is the shape of
the work. Under ``vmap`` a small system costs a library call a member, and members wait for each
other twice: in Newton's loop for the one that needs most iterations, in the run for the one that
needs most steps. Here

- the members, *lanes*, are the last axis of every array, so that products of small matrices are
  vectorised sums over lanes, Gauss elimination included;
- the loop is flat. A trip evaluates the field at the stages of every lane, and then each lane makes
  either its next Newton correction or, if that was solved, the end of its step and the beginning of
  the next one. No lane waits for another;
- a lane that has landed on its last target is handed back to the host, which puts the next member
  there. Saved states go to a buffer on the way; observables are evaluated afterwards.

Elimination does not pivot. The matrix is :math:`I + (ha_{ij}\,G G^\top B_j)` with positive
semi-definite :math:`B_j`, and a poor solution would only cost iterations: the residual decides.
"""

import functools
import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.gauss_newton import GaussNewton, remaining
from gflow.dynamics.radau import decay_rate, legendre_values, radau
from gflow.dynamics.stages import advance as advance_offsets, loss_terms
from gflow.dynamics.stepping import (
    GROW,
    NOISE_ERRORS,
    NOISE_STEPS,
    SAFETY,
    SHRINK,
    STEADY,
)
from gflow.problem.losses import AbstractLoss
from gflow.problem.network import Array

UNROLLED = 32
"""Up to this order elimination is written out over the lanes."""

RUNNING, LANDED, STALLED, TIRED = range(4)
"""What a lane is doing: on its way; on its last target; given up; out of steps."""


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
        parts = [_dot(left, a[None], 1)[:, None] * _times(right, b) for left, right, a, b in layers]
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


class Lanes(NamedTuple):
    """Where every lane stands."""

    s: Array
    weights: tuple[Array, ...]
    scaled_time: Array
    next_step: Array
    error: Array
    step: Array
    """Of the attempt on its way; ``cut`` says that it was shortened to meet a target."""
    lands: Array
    cut: Array
    before: Solution
    newton: Newton
    frame: Frame
    status: Array
    saved: Array
    num_steps: Array
    num_rejected: Array
    num_iterations: Array
    refused_step: Array
    refused_norm: Array


class Saved(NamedTuple):
    """States on targets, a row a lane: shapes (lanes, saved, …)."""

    weights: tuple[Array, ...]
    scaled_time: Array
    num_steps: Array


class Machine(eqx.Module):
    """The program of all lanes: loss, clock and method."""

    loss: AbstractLoss
    clock: AbstractClock
    solver: GaussNewton

    # ---------------------------------------------------------------------------------------------
    # What the host calls
    # ---------------------------------------------------------------------------------------------

    @eqx.filter_jit
    def start(self, weights: tuple[Array, ...], s: Array, members: Members) -> tuple[Lanes, Saved]:
        """Lanes at the start of runs at clock values ``s``, and empty buffers."""
        p, zero = self.solver.stages, jnp.zeros_like(s)
        lanes, none = s.shape[0], jnp.zeros(s.shape, jnp.int64)
        frame, coordinates = self._frame(weights, members)
        margins = _times(coordinates[None], members.design)[0]
        offsets = margins - jnp.min(margins, 0)
        # The field at the start, once for all stages.
        offsets = jnp.broadcast_to(offsets, (p, *offsets.shape))
        stage = self._evaluate(
            weights,
            members,
            [jnp.zeros((0, w.shape[0], lanes)) for w in weights],
            [jnp.zeros((0, w.shape[1], lanes)) for w in weights],
            jnp.zeros((p, 0, lanes)),
            offsets,
            jnp.broadcast_to(s, (p, lanes)),
        )
        slope = [_outer(x[:1], y[:1]) for x, y in zip(stage["lefts"], stage["rights"], strict=True)]
        size = self._norm(list(weights), weights, weights, members)
        step = 0.01 * size / self._norm(slope, weights, weights, members)
        before = Solution(step, stage["lefts"], stage["rights"], offsets)
        shape = (lanes, members.targets.shape[0])
        saved = Saved(
            tuple(jnp.zeros((*shape, *w.shape[:2])) for w in weights),
            jnp.zeros(shape),
            jnp.zeros(shape, jnp.int64),
        )
        m = frame.gram.shape[0]
        blank = Newton(
            count=none,
            coefficients=jnp.zeros((p, p, lanes)),
            lefts=stage["lefts"],
            rights=stage["rights"],
            projection=jnp.zeros((p, m, lanes)),
            offsets=offsets,
            size=zero,
            contraction=zero,
            stiffness=jnp.zeros((m, m, lanes)),
            ended=zero > 0,
        )
        now = Lanes(
            s=s,
            weights=weights,
            scaled_time=zero,
            next_step=step,
            error=jnp.ones_like(s),
            step=step,
            lands=zero > 0,
            cut=zero > 0,
            before=before,
            newton=blank,
            frame=frame,
            status=none,
            saved=none,
            num_steps=none,
            num_rejected=none,
            num_iterations=none,
            refused_step=zero,
            refused_norm=zero,
        )
        return self._begin(now, members), saved

    @eqx.filter_jit
    def run(
        self, now: Lanes, saved: Saved, members: Members, trips: Array, enough: Array
    ) -> tuple[Lanes, Saved, Array, Array]:
        """Go on until ``enough`` lanes have stopped, or for so many trips.

        Returns:
            The lanes, the saved states, the trips made and how many of lanes × trips did work.
        """

        def go(loop: tuple) -> Array:
            now, _, made, _ = loop
            stopped = jnp.sum(now.status != RUNNING)
            return (made < trips) & (stopped < enough)

        def trip(loop: tuple) -> tuple:
            now, saved, made, busy = loop
            busy = busy + jnp.sum(now.status == RUNNING)
            landing = now.newton.ended & now.lands
            after = self._trip(now, members)
            landed = landing & (after.saved > now.saved)
            return after, _store(saved, after, landed), made + 1, busy

        zero = jnp.zeros((), jnp.int64)
        return jax.lax.while_loop(go, trip, (now, saved, zero, zero))

    @eqx.filter_jit
    def put(self, now: Lanes, fresh: Lanes, new: Array) -> Lanes:
        """The lanes ``new`` from ``fresh``, the others as they are."""
        return jax.tree.map(lambda a, b: jnp.where(new, a, b), fresh, now)

    # ---------------------------------------------------------------------------------------------
    # One trip
    # ---------------------------------------------------------------------------------------------

    def _trip(self, now: Lanes, members: Members) -> Lanes:
        """Evaluate; then a Newton correction, or the end of the step and the start of another."""
        newton = now.newton
        nodes = jnp.asarray(radau(self.solver.stages).nodes)[:, None]
        stage = self._evaluate(
            now.weights,
            members,
            newton.lefts,
            newton.rights,
            newton.coefficients,
            newton.offsets,
            now.s + now.step * nodes,
        )
        corrected = now._replace(newton=self._correct(now, members, stage))
        ended = self._begin(self._end(now, members, stage), members)
        chosen = jax.tree.map(lambda a, b: jnp.where(newton.ended, a, b), ended, corrected)
        return jax.tree.map(lambda a, b: jnp.where(now.status == RUNNING, a, b), chosen, now)

    def _evaluate(
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
            inner = coefficients * _times(row, left)
            row = _times(row, matrix.swapaxes(0, 1)) + _times(inner, right.swapaxes(0, 1))
        margins = _times(row, members.design)
        distance = margins - offsets
        level = jnp.sum(jax.nn.softmax(-offsets, axis=1) * distance, 1)
        log_risk, slopes, curvatures = loss_terms(self.loss, offsets, level, axis=1)
        force = jnp.sum(slopes[:, :, None] * members.design[None], 1)
        column, columns = force, []
        for matrix, left, right in layers:
            columns.append(column)
            inner = coefficients * _times(column, right)
            column = _times(column, matrix) + _times(inner, left.swapaxes(0, 1))
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

    def _correct(self, now: Lanes, members: Members, stage: dict[str, Any]) -> Newton:
        """One Newton correction: ``GaussNewton._newton``'s iteration."""
        p, newton, frame, h = self.solver.stages, now.newton, now.frame, now.step
        matrix = h * radau(p).matrix[:, :, None]
        m, lanes = frame.gram.shape[0], h.shape[0]
        mu, slopes, curvatures = stage["rate"][:, None], stage["slopes"], stage["curvatures"]
        force, gap, design = stage["force"], stage["gap"], members.design

        against = jnp.sum(_times(force, frame.gram) * force, 1)
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
        moved = change - growth * _times(pulled, frame.gram)
        rhs = _mix(matrix, moved)
        scaled = growth[:, :, None] ** 2 * stiff
        terms = [frame.gram[None, :, c, None] * scaled[:, c, None] for c in range(m)]
        blocks = functools.reduce(operator.add, terms)
        system = matrix[:, None, :, None] * blocks.swapaxes(0, 1)[None]
        system = system.reshape(p * m, p * m, lanes) + jnp.eye(p * m)[:, :, None]
        y = growth * _solve(system, rhs.reshape(p * m, lanes)).reshape(p, m, lanes)
        z = pulled + sum(stiff[:, :, b] * y[:, b, None] for b in range(m))
        lefts, rights = stage["lefts"], []
        for left, right, a, b in zip(
            lefts, stage["rights"], frame.lefts, frame.columns, strict=True
        ):
            ratio = _ratio(_norm(a, 0), _norm(left, 1))[:, None]
            rights.append(right - growth * ratio * _times(z, b.swapaxes(0, 1)))
        shift = gap + _times(y, design)
        share = jax.nn.softmax(-newton.offsets, axis=1)
        shift = shift - jnp.sum(share * shift, 1, keepdims=True)
        offsets, held = advance_offsets(self.loss, newton.offsets, shift, axis=1)

        sizes = [
            jnp.max(_norm(l1 - l0, 1) * _norm(r1, 1) + _norm(l0, 1) * _norm(r1 - r0, 1), 0)
            / (w + h * jnp.max(_norm(l1, 1) * _norm(r1, 1), 0))
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

    def _end(self, now: Lanes, members: Members, stage: dict[str, Any]) -> Lanes:
        """The end of a step: the new state, its error, accepted or not, and the next step."""
        p, newton, h = self.solver.stages, now.newton, now.step
        tableau = radau(p)
        matrix = h * tableau.matrix[:, :, None]
        decay = stage["rate"] * stage["squared"]
        time = _solve(
            matrix * decay[None] + jnp.eye(p)[:, :, None],
            now.scaled_time + _mix(matrix, stage["rate"]),
        )
        inverse = np.linalg.inv(tableau.matrix)[:, :, None]
        time_slopes = _mix(inverse, time - now.scaled_time) / h
        *_, third, second, final = jnp.abs(_mix(tableau.legendre[-3:, :, None], time_slopes))
        tail = h * final * decay_rate(final, second, third) ** (p - 1)
        balance = stage["log_risk"][-1] - now.frame.log_risk + _mix(matrix[-1:], decay)[0]
        u = time[-1]
        time_error = jnp.maximum(
            tail / (1 + h * tableau.damping * decay[-1]),
            10 * jnp.abs(u * balance) / jnp.hypot(1.0, now.frame.log_risk),
        )
        failed = ~(remaining(newton.size, newton.contraction) < 100 * self.solver.tolerance)
        weights = tuple(
            w + _outer(matrix[-1][:, None] * left, right)
            for w, left, right in zip(now.weights, newton.lefts, newton.rights, strict=True)
        )
        error = self._error(now)
        of_time = time_error / (
            members.rtol * jnp.maximum(jnp.abs(u), jnp.abs(now.scaled_time))
            + jnp.finfo(u.dtype).tiny
        )
        norm = jnp.maximum(self._norm(error, now.weights, weights, members), of_time)
        sound = ~failed & jnp.isfinite(norm)
        norm = jnp.where(sound, jnp.maximum(norm, 1e-10), jnp.inf)
        accept = norm <= 1

        # The step-size control of ``stepping.advance``.
        exponent = 1 / (2.0 * p - 1.0)
        steady = norm ** (-0.7 * exponent) * now.error ** (0.4 * exponent)
        factor = jnp.where(accept, steady, jnp.minimum(norm ** (-exponent), 1.0))
        factor = jnp.clip(SAFETY * factor, SHRINK, GROW)
        following = h * jnp.where(norm < STEADY, jnp.maximum(factor, 1.0), factor)
        following = jnp.where(accept & now.cut, jnp.maximum(following, now.next_step), following)
        noisy = (h * NOISE_STEPS <= now.refused_step) & (norm * NOISE_ERRORS > now.refused_norm)
        vanished = following <= 4 * jnp.finfo(h.dtype).eps * jnp.abs(now.s)
        fresh = ~accept & (now.refused_norm == 0) & jnp.isfinite(norm)

        target = self._target(now, members)
        saved = now.saved + (accept & now.lands).astype(jnp.int64)
        tried = now.num_steps + now.num_rejected + 1
        status = jnp.select(
            [
                saved >= members.targets.shape[0],
                ~accept & (vanished | (noisy & jnp.isfinite(norm))),
                tried >= members.max_steps,
            ],
            [LANDED, STALLED, TIRED],
            RUNNING,
        )

        def moved(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

        return now._replace(
            s=jnp.where(accept, jnp.where(now.lands, target, now.s + h), now.s),
            weights=moved(weights, now.weights),
            scaled_time=moved(u, now.scaled_time),
            next_step=following,
            error=moved(norm, now.error),
            before=moved(Solution(h, newton.lefts, newton.rights, newton.offsets), now.before),
            status=status,
            saved=saved,
            num_steps=now.num_steps + accept.astype(jnp.int64),
            num_rejected=now.num_rejected + (~accept).astype(jnp.int64),
            num_iterations=now.num_iterations + newton.count,
            refused_step=jnp.where(accept, 0.0, jnp.where(fresh, h, now.refused_step)),
            refused_norm=jnp.where(accept, 0.0, jnp.where(fresh, norm, now.refused_norm)),
        )

    def _begin(self, now: Lanes, members: Members) -> Lanes:
        """The beginning of a step: its length, and Newton's predictor."""
        p = self.solver.stages
        tableau = radau(p)
        remaining_clock = self._target(now, members) - now.s
        lands = now.next_step >= remaining_clock
        halved = now.next_step > remaining_clock / 2
        step = jnp.where(
            lands, remaining_clock, jnp.where(halved, remaining_clock / 2, now.next_step)
        )
        frame, _ = self._frame(now.weights, members)
        ahead = 1 + jnp.minimum(step / now.before.step, 3.0) * tableau.nodes[:, None]
        values = legendre_values(ahead, p)  # (degree, stage, lanes)
        terms = [values[k][:, None] * tableau.legendre[k][None, :, None] for k in range(p)]
        extrapolate = functools.reduce(operator.add, terms)
        latest = now.before.offsets[-1:]
        offsets, _ = advance_offsets(
            self.loss, latest, _mix(extrapolate, now.before.offsets) - latest, axis=1
        )
        newton = Newton(
            count=jnp.zeros_like(now.num_steps),
            coefficients=step * _mix(tableau.matrix[:, :, None], extrapolate),
            lefts=now.before.lefts,
            rights=now.before.rights,
            projection=_mix(extrapolate, frame.project(now.before.lefts, now.before.rights)),
            offsets=offsets,
            size=jnp.full_like(step, jnp.inf),
            contraction=jnp.ones_like(step),
            stiffness=jnp.zeros_like(frame.gram),
            ended=step < -jnp.inf,
        )
        return now._replace(step=step, lands=lands, cut=lands | halved, newton=newton, frame=frame)

    # ---------------------------------------------------------------------------------------------
    # Parts
    # ---------------------------------------------------------------------------------------------

    def _target(self, now: Lanes, members: Members) -> Array:
        """The clock value that each lane makes for."""
        index = jnp.minimum(now.saved, members.targets.shape[0] - 1)
        return jnp.take_along_axis(members.targets, index[None], 0)[0]

    def _frame(self, weights: tuple[Array, ...], members: Members) -> tuple[Frame, Array]:
        """G at the start of a step, and the coordinates there: ``stages.start_frame``."""
        row, lefts = jnp.ones_like(weights[-1][:, 0]), []
        for matrix in reversed(weights):
            lefts.append(row)
            row = _times(row[None], matrix.swapaxes(0, 1))[0]
        lefts = lefts[::-1]
        m, lanes = row.shape
        column = jnp.broadcast_to(jnp.eye(m)[:, :, None], (m, m, lanes))
        columns = []
        for matrix in weights:
            columns.append(column)
            column = _times(column, matrix)
        terms = [jnp.sum(a**2, 0) * _times(b, b) for a, b in zip(lefts, columns, strict=True)]
        gram = functools.reduce(operator.add, terms)
        sizes = [jnp.sqrt(jnp.sum(w**2, (0, 1))) for w in weights]
        margins = _times(row[None], members.design)[0]
        log_risk = jax.nn.logsumexp(self.loss.log_value(margins), axis=0)
        return Frame(lefts, columns, gram, sizes, log_risk - np.log(margins.shape[0])), row

    def _norm(
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

    def _error(self, now: Lanes) -> list[Array]:
        """The weights' error: ``GaussNewton._error``."""
        tableau, newton, frame, h = radau(self.solver.stages), now.newton, now.frame, now.step
        tail = tableau.legendre[-3:][:, :, None]
        squares = sum(
            jnp.sum(
                tail * _mix(tail, (_times(left, left) * _times(right, right)).swapaxes(0, 1)), 1
            )
            / (w + h * jnp.max(_norm(left, 1) * _norm(right, 1), 0)) ** 2
            for left, right, w in zip(newton.lefts, newton.rights, frame.sizes, strict=True)
        )
        third, second, final = jnp.sqrt(jnp.abs(squares))
        damping, m = h * tableau.damping, frame.gram.shape[0]
        system = jnp.eye(m)[:, :, None] + damping * _times(newton.stiffness, frame.gram)
        last = _mix(tail[-1:], newton.projection)  # (1, m, lanes)
        z = damping * _solve(system, _times(last, newton.stiffness)[0])
        scale = h * decay_rate(final, second, third) ** (self.solver.stages - 1)
        return [
            scale
            * (_outer(tail[-1][:, None] * left, right) - a[:, None] * _mix(z[None], b)[0][None])
            for left, right, a, b in zip(
                newton.lefts, newton.rights, frame.lefts, frame.columns, strict=True
            )
        ]


def _times(rows: Array, matrix: Array) -> Array:
    """``rows @ matrix.T`` in every lane: (i, k, lanes) and (j, k, lanes) to (i, j, lanes)."""
    # As a reduction, which is computed once; written out, XLA repeats it in all that uses it.
    return jnp.sum(rows[:, None] * matrix[None], 2)


def _mix(matrix: Any, values: Array) -> Array:
    """``matrix @ values`` in every lane: (i, j, lanes) and (j, …, lanes) to (i, …, lanes)."""
    shape = (matrix.shape[0], *[1] * (values.ndim - 2))
    terms = [
        matrix[:, j].reshape(*shape, matrix.shape[-1]) * values[j][None]
        for j in range(matrix.shape[1])
    ]
    return functools.reduce(operator.add, terms)


def _outer(lefts: Array, rights: Array) -> Array:
    """Sum over j of the outer products of (j, a, lanes) and (j, b, lanes)."""
    terms = [left[:, None] * right[None] for left, right in zip(lefts, rights, strict=True)]
    return functools.reduce(operator.add, terms)


def _dot(a: Array, b: Array, axis: int) -> Array:
    return jnp.sum(a * b, axis)


def _norm(vectors: Array, axis: int) -> Array:
    return jnp.sqrt(jnp.sum(vectors**2, axis))


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``, zero where b is."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _solve(matrix: Array, rhs: Array) -> Array:
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


def _store(saved: Saved, now: Lanes, landed: Array) -> Saved:
    """Copy the state of the lanes that have landed, one after the other, into their rows."""

    def one(loop: tuple[Saved, Array]) -> tuple[Saved, Array]:
        saved, landed = loop
        lane = jnp.argmax(landed)
        index = now.saved[lane] - 1

        def put(rows: Array, values: Array) -> Array:
            return rows.at[lane, index].set(values[..., lane])

        new = Saved(now.weights, now.scaled_time, now.num_steps)
        return jax.tree.map(put, saved, new), landed.at[lane].set(False)

    return jax.lax.while_loop(lambda loop: jnp.any(loop[1]), one, (saved, landed))[0]

r"""Many flows in one loop: ``GaussNewton`` for members that lie side by side in the last axis.

The mathematics is that of ``gauss_newton.py``, and so are the results. What differs is the shape of
the work. Under ``vmap`` a small system costs a library call a member, and members wait for each
other twice: in Newton's loop for the one that needs most iterations, in the run for the one that
needs most steps. Here

- the members, *lanes*, are the last axis of every array, so that products of small matrices are
  vectorised sums over lanes, Gauss elimination included;
- the loop is flat. A trip evaluates the field at the stages of every lane, and then each lane makes
  either its next Newton correction or, if that was solved, the end of its step and the beginning of
  the next one. Since an end costs as much as a correction, steps end in trips where a quarter of
  the lanes have one to end, about every second: the others sit out a trip, and no lane waits else;
- a lane that has landed on its last target is handed back to the host, which puts the next member
  there. Saved states go to a buffer on the way; observables are evaluated afterwards.
"""

import functools
import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.radau.gauss_newton import remaining
from gflow.dynamics.lanes.algebra import mix, outer, solve, times
from gflow.dynamics.lanes.newton import Frame, Members, Method, Newton, Solution
from gflow.dynamics.radau import decay_rate, legendre_values, radau
from gflow.dynamics.stages import advance as advance_offsets
from gflow.dynamics.stepping import (
    GROW,
    NOISE_ERRORS,
    NOISE_STEPS,
    SAFETY,
    SHRINK,
    STEADY,
)
from gflow.problem.network import Array

SHARE = 4
"""Steps end in a trip where at least one running lane in so many has solved its step."""

RUNNING, LANDED, STALLED, TIRED = range(4)
"""What a lane is doing: on its way; on its last target; given up; out of steps."""


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
    """The program of all lanes."""

    method: Method

    # ---------------------------------------------------------------------------------------------
    # What the host calls
    # ---------------------------------------------------------------------------------------------

    @eqx.filter_jit
    def start(self, weights: tuple[Array, ...], s: Array, members: Members) -> tuple[Lanes, Saved]:
        """Lanes at the start of runs at clock values ``s``, and empty buffers."""
        p, zero = self.method.solver.stages, jnp.zeros_like(s)
        lanes, none = s.shape[0], jnp.zeros(s.shape, jnp.int64)
        frame, coordinates = self.method.frame(weights, members)
        margins = times(coordinates[None], members.design)[0]
        offsets = margins - jnp.min(margins, 0)
        # The field at the start, once for all stages.
        offsets = jnp.broadcast_to(offsets, (p, *offsets.shape))
        stage = self.method.evaluate(
            weights,
            members,
            [jnp.zeros((0, w.shape[0], lanes)) for w in weights],
            [jnp.zeros((0, w.shape[1], lanes)) for w in weights],
            jnp.zeros((p, 0, lanes)),
            offsets,
            jnp.broadcast_to(s, (p, lanes)),
        )
        slope = [outer(x[:1], y[:1]) for x, y in zip(stage["lefts"], stage["rights"], strict=True)]
        size = self.method.size(list(weights), weights, weights, members)
        step = 0.01 * size / self.method.size(slope, weights, weights, members)
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
            running, ended = now.status == RUNNING, now.newton.ended
            stage = self._stages(now, members)

            def end() -> tuple[Lanes, Saved]:
                after = self._begin(self._end(now, members, stage), members)
                after = _chosen(running & ended, after, now)
                landed = running & ended & (after.saved > now.saved)
                return after, _store(saved, after, landed)

            ending = SHARE * jnp.sum(running & ended) >= jnp.sum(running)
            after, saved = jax.lax.cond(ending, end, lambda: (now, saved))
            corrected = self.method.correct(now.newton, now.frame, now.step, members, stage)
            newton = _chosen(running & ~ended, corrected, after.newton)
            busy = busy + jnp.sum(running & (ending | ~ended))
            return after._replace(newton=newton), saved, made + 1, busy

        zero = jnp.zeros((), jnp.int64)
        return jax.lax.while_loop(go, trip, (now, saved, zero, zero))

    @eqx.filter_jit
    def put(self, now: Lanes, fresh: Lanes, new: Array) -> Lanes:
        """The lanes ``new`` from ``fresh``, the others as they are."""
        return _chosen(new, fresh, now)

    def _stages(self, now: Lanes, members: Members) -> dict[str, Any]:
        """The field at the stages of every lane's step."""
        newton = now.newton
        nodes = jnp.asarray(radau(self.method.solver.stages).nodes)[:, None]
        return self.method.evaluate(
            now.weights,
            members,
            newton.lefts,
            newton.rights,
            newton.coefficients,
            newton.offsets,
            now.s + now.step * nodes,
        )

    def _end(self, now: Lanes, members: Members, stage: dict[str, Any]) -> Lanes:
        """The end of a step: the new state, its error, accepted or not, and the next step."""
        p, newton, h = self.method.solver.stages, now.newton, now.step
        tableau = radau(p)
        matrix = h * tableau.matrix[:, :, None]
        decay = stage["rate"] * stage["squared"]
        time = solve(
            matrix * decay[None] + jnp.eye(p)[:, :, None],
            now.scaled_time + mix(matrix, stage["rate"]),
        )
        inverse = np.linalg.inv(tableau.matrix)[:, :, None]
        time_slopes = mix(inverse, time - now.scaled_time) / h
        *_, third, second, final = jnp.abs(mix(tableau.legendre[-3:, :, None], time_slopes))
        tail = h * final * decay_rate(final, second, third) ** (p - 1)
        balance = stage["log_risk"][-1] - now.frame.log_risk + mix(matrix[-1:], decay)[0]
        u = time[-1]
        time_error = jnp.maximum(
            tail / (1 + h * tableau.damping * decay[-1]),
            10 * jnp.abs(u * balance) / jnp.hypot(1.0, now.frame.log_risk),
        )
        failed = ~(remaining(newton.size, newton.contraction) < 100 * self.method.solver.tolerance)
        weights = tuple(
            w + outer(matrix[-1][:, None] * left, right)
            for w, left, right in zip(now.weights, newton.lefts, newton.rights, strict=True)
        )
        error = self.method.error(newton, now.frame, h)
        of_time = time_error / (
            members.rtol * jnp.maximum(jnp.abs(u), jnp.abs(now.scaled_time))
            + jnp.finfo(u.dtype).tiny
        )
        norm = jnp.maximum(self.method.size(error, now.weights, weights, members), of_time)
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

        latest = Solution(h, newton.lefts, newton.rights, newton.offsets)
        return now._replace(
            s=jnp.where(accept, jnp.where(now.lands, target, now.s + h), now.s),
            weights=_chosen(accept, weights, now.weights),
            scaled_time=_chosen(accept, u, now.scaled_time),
            next_step=following,
            error=_chosen(accept, norm, now.error),
            before=_chosen(accept, latest, now.before),
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
        p = self.method.solver.stages
        tableau = radau(p)
        remaining_clock = self._target(now, members) - now.s
        lands = now.next_step >= remaining_clock
        halved = now.next_step > remaining_clock / 2
        step = jnp.where(
            lands, remaining_clock, jnp.where(halved, remaining_clock / 2, now.next_step)
        )
        frame, _ = self.method.frame(now.weights, members)
        ahead = 1 + jnp.minimum(step / now.before.step, 3.0) * tableau.nodes[:, None]
        values = legendre_values(ahead, p)  # (degree, stage, lanes)
        terms = [values[k][:, None] * tableau.legendre[k][None, :, None] for k in range(p)]
        extrapolate = functools.reduce(operator.add, terms)
        latest = now.before.offsets[-1:]
        offsets, _ = advance_offsets(
            self.method.loss, latest, mix(extrapolate, now.before.offsets) - latest, axis=1
        )
        newton = Newton(
            count=jnp.zeros_like(now.num_steps),
            coefficients=step * mix(tableau.matrix[:, :, None], extrapolate),
            lefts=now.before.lefts,
            rights=now.before.rights,
            projection=mix(extrapolate, frame.project(now.before.lefts, now.before.rights)),
            offsets=offsets,
            size=jnp.full_like(step, jnp.inf),
            contraction=jnp.ones_like(step),
            stiffness=jnp.zeros_like(frame.gram),
            ended=step < -jnp.inf,
        )
        return now._replace(step=step, lands=lands, cut=lands | halved, newton=newton, frame=frame)

    def _target(self, now: Lanes, members: Members) -> Array:
        """The clock value that each lane makes for."""
        index = jnp.minimum(now.saved, members.targets.shape[0] - 1)
        return jnp.take_along_axis(members.targets, index[None], 0)[0]


def _chosen(which: Array, new: Any, old: Any) -> Any:
    """The lanes ``which`` from ``new``, the others from ``old``."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)


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

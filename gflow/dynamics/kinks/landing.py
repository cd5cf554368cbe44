"""Landing on a kink: the last step made shorter so that it ends where the first unit is past it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField
from gflow.dynamics.march.lane import Lane
from gflow.dynamics.march.method import AbstractMethod, Step
from gflow.dynamics.stops import AbstractRule, Coordinates
from gflow.problem.bends import sight, violations
from gflow.problem.network import Array, Weights
from gflow.problem.risk import Problem

AIM, ENOUGH = 3.0, 50.0
"""In units of what counts as past a kink: where a landing aims, and what it is content with. It is
always a little past the kink, so that round-off cannot put a unit on the wrong side."""

MOST = 60
"""Trials."""


class PastKinks(AbstractRule):
    """How far a frozen network is beyond its pattern: at 1 it is."""

    value: float = 0.0
    variable = "kinks"

    def progress(self, at: Coordinates) -> Array:
        found = at.small[self.variable]
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def progress_of(self, value: Any) -> Any:
        return value

    def measure(self, problem: Problem, weights: Weights) -> Array:
        return jnp.max(_beyond(problem, weights))


PAST = PastKinks()
"""The rule that a run watches."""


def _beyond(problem: Problem, weights: Weights) -> Array:
    return violations(problem.network.pattern, sight(problem, weights))  # pyright: ignore


@eqx.filter_jit
def land_on_kink(field: AbstractField, method: AbstractMethod, lane: Lane) -> tuple[Lane, Array]:
    """Shorten the last accepted step so that it ends just past the first kink in it.

    Every unit that is past its kink at the end has a root of its own; the earliest is found by the
    Illinois variant of regula falsi for all of them at once. Each trial is a true step of the
    solver from where the last one began.

    Returns:
        The lane there, and the number of trials.
    """
    s0, state0, memory0 = lane.previous

    def trial(s: Array) -> Step:
        h = s - s0
        attempt = method.solve(field, s0, h, state0, memory0)
        seen = method.look(field, s0, h, state0, attempt)
        return method.end(field, s0, h, state0, attempt, seen, memory0)

    def beyond(state: Any) -> Array:
        return _beyond(field.problem, state.weights)

    def unfinished(loop: tuple) -> Array:
        low, high, *_, worst, tries = loop
        apart = high - low > 4 * jnp.finfo(low.dtype).eps * jnp.maximum(jnp.abs(high), 1.0)
        return apart & (worst > ENOUGH) & (tries < MOST)

    def refine(loop: tuple) -> tuple:
        low, high, below, above, state, memory, last, worst, tries = loop
        past = above > 1
        part = (AIM - below) / jnp.where(past, above - below, 1.0)
        part = jnp.min(jnp.where(past & jnp.isfinite(part), part, 1.0))
        s = low + (high - low) * jnp.clip(part, 1e-3, 0.999)
        made = trial(s)
        found = beyond(made.state)
        right = jnp.max(found) > 1
        # The end that stays twice counts half, towards the aim.
        below = jnp.where(right, jnp.where(last > 0, AIM + (below - AIM) / 2, below), found)
        above = jnp.where(
            right, found, jnp.where((last < 0) & (above > AIM), AIM + (above - AIM) / 2, above)
        )
        state, memory = jax.tree.map(
            lambda new, old: jnp.where(right, new, old), (made.state, made.memory), (state, memory)
        )
        return (
            jnp.where(right, low, s),
            jnp.where(right, s, high),
            below,
            above,
            state,
            memory,
            jnp.where(right, 1, -1),
            jnp.where(right, jnp.max(found), worst),
            tries + 1,
        )

    above = beyond(lane.state)
    begun = (
        s0,
        lane.s,
        beyond(state0),
        above,
        lane.state,
        lane.memory,
        jnp.array(0),
        jnp.max(above),
        jnp.array(0),
    )
    _, s, _, _, state, memory, *_, tries = jax.lax.while_loop(unfinished, refine, begun)
    landed = eqx.tree_at(
        lambda at: (at.s, at.state, at.memory, at.step),
        lane,
        (s, state, memory, jnp.zeros_like(s)),
    )
    return landed, tries

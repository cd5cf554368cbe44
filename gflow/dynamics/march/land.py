"""Landing: the last step made shorter so that it ends exactly where an event happens."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField
from gflow.dynamics.march.lane import Lane
from gflow.dynamics.march.loop import observe
from gflow.dynamics.march.method import AbstractMethod, Step
from gflow.dynamics.stops import AbstractRule
from gflow.problem.array import Array
from gflow.programs import by_size


@by_size
def land(
    field: AbstractField, method: AbstractMethod, rule: AbstractRule, lane: Lane, goal: Array
) -> Lane:
    """Shorten the last accepted step so that it ends where ``rule`` reaches ``goal``.

    The step's length is found by regula falsi with Anderson and Bjorck's rule for an end that stays
    (BIT 13, 1973), each trial a true step of the solver from where the last one began. No attempt is on its way then: its length is zero.
    """
    s0, state0, memory0 = lane.began

    def progress(state: Any) -> Array:
        return rule.progress(observe(field, state, lane.num_steps, (rule,)))

    def trial(s: Array) -> Step:
        h = s - s0
        attempt, seen = method.solve(field, s0, h, state0, memory0)
        return method.end(field, s0, h, state0, attempt, seen, memory0)

    start, end = progress(state0) - goal, progress(lane.state) - goal
    near = 1e-13 * jnp.maximum(1.0, jnp.abs(goal))

    def unfinished(loop: tuple) -> Array:
        (*_, miss), tries, *_ = loop
        # From where the progress is undefined, as that of a direction at w = 0, it jumps past the
        # goal, and past others: a step that does stays as it is.
        return jnp.isfinite(start) & (start < 0) & (jnp.abs(miss) > near) & (tries < 60)

    def refine(loop: tuple) -> tuple:
        (low, below, high, above, last), tries, *_ = loop
        s = low + (high - low) * below / (below - above)
        made = trial(s)
        miss = progress(made.state) - goal
        left, again = miss < 0, (miss < 0) == (last < 0)
        # Where an end stays for a second time, its value is made smaller.
        part = 1 - miss / jnp.where(left, below, above)
        part = jnp.where(again, jnp.where(part > 0, part, 0.5), 1.0)
        bracket = (
            jnp.where(left, s, low),
            jnp.where(left, miss, part * below),
            jnp.where(left, high, s),
            jnp.where(left, part * above, miss),
            miss,
        )
        return bracket, tries + 1, s, made.state, made.memory

    bracket = (s0, start, lane.s, end, end)
    _, _, s, state, memory = jax.lax.while_loop(
        unfinished, refine, (bracket, jnp.array(0), lane.s, lane.state, lane.memory)
    )
    return eqx.tree_at(
        lambda at: (at.s, at.state, at.memory, at.step, at.next_step),
        lane,
        (s, state, memory, jnp.zeros_like(s), jnp.maximum(lane.next_step, lane.s - s0)),
    )

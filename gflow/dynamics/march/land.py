"""Landing: steps made shorter, so that they end exactly where an event happens."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.lane import Lane
from gflow.dynamics.march.loop import observe
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.stops import AbstractRule
from gflow.problem.array import Array
from gflow.programs import by_size

MOST = 60
"""Trials."""


class Landed(NamedTuple):
    """Where a rule reaches its goals in a step."""

    s: Array
    """Clock values, one for each goal, shape (k,)."""
    states: FlowState
    """Likewise, on a leading axis."""
    lane: Lane
    """The step cut at the last of them."""
    trials: Array
    spent: Any
    """What they add to the solver's tally."""


class Search(NamedTuple):
    """What is known of where a goal is reached, by how far it is missed."""

    low: Array
    below: Array
    high: Array
    above: Array
    miss: Array
    """That of the last trial."""
    tries: Array
    s: Array
    state: FlowState
    memory: Any
    spent: Any


@by_size
def land(
    field: AbstractField, method: AbstractMethod, rule: AbstractRule, lane: Lane, goals: Array
) -> Landed:
    """Where ``rule`` reaches some ``goals`` in the last accepted step, and the states there.

    The lengths of steps that end there are found by regula falsi with Anderson and Bjorck's rule
    for an end that stays (BIT 13, 1973), each trial a true step of the solver from where the last
    one began. Infinite goals are none.
    """
    s0, state0, memory0 = lane.began
    memory0 = method.again(lane.memory, memory0)
    before = method.tally(memory0)

    def progress(state: FlowState) -> Array:
        return rule.progress(observe(field, state, lane.num_steps, (rule,)))

    start, end = progress(state0), progress(lane.state)

    def one(last: tuple, goal: Array) -> tuple[tuple, tuple]:
        near = 1e-13 * jnp.maximum(1.0, jnp.abs(goal))
        # From where the progress is undefined, as that of a direction at w = 0, it jumps past the
        # goal, and past others: a step that does stays as it is.
        within = jnp.isfinite(goal) & jnp.isfinite(start) & (start < goal)

        def unfinished(at: Search) -> Array:
            # The clock may hardly move while the progress does, as risk on a plateau.
            close = 4 * jnp.finfo(at.low.dtype).eps * jnp.abs(at.high)
            apart = at.high - at.low > close
            return within & apart & (jnp.abs(at.miss) > near) & (at.tries < MOST)

        def refine(at: Search) -> Search:
            s = at.low + (at.high - at.low) * at.below / (at.below - at.above)
            made = method.from_begin_to_end(field, s0, s - s0, state0, memory0)
            miss = progress(made.state) - goal
            left, again = miss < 0, (miss < 0) == (at.miss < 0)
            # Where an end stays for a second time, its value is made smaller.
            part = 1 - miss / jnp.where(left, at.below, at.above)
            part = jnp.where(again, jnp.where(part > 0, part, 0.5), 1.0)
            added = jax.tree.map(jnp.subtract, method.tally(made.memory), before)
            return Search(
                low=jnp.where(left, s, at.low),
                below=jnp.where(left, miss, part * at.below),
                high=jnp.where(left, at.high, s),
                above=jnp.where(left, part * at.above, miss),
                miss=miss,
                tries=at.tries + 1,
                s=s,
                state=made.state,
                memory=made.memory,
                spent=jax.tree.map(jnp.add, at.spent, added),
            )

        tries, spent, *place = last
        whole = lane.s, lane.state, lane.memory
        begun = Search(
            s0, start - goal, lane.s, end - goal, end - goal, jnp.array(0), *whole, spent
        )
        found = jax.lax.while_loop(unfinished, refine, begun)
        here = found.s, found.state, found.memory
        place = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(goal), a, b), here, tuple(place))
        return (tries + found.tries, found.spent, *place), (found.s, found.state)

    nothing = jnp.array(0), jax.tree.map(jnp.zeros_like, before)
    last, (s, states) = jax.lax.scan(one, (*nothing, lane.s, lane.state, lane.memory), goals)
    trials, spent, *place = last
    cut = eqx.tree_at(
        lambda at: (at.s, at.state, at.memory, at.next_step),
        lane,
        (*place, jnp.maximum(lane.next_step, lane.s - s0)),
    )
    return Landed(s, states, cut, trials, spent)

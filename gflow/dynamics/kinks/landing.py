"""Landing on a kink: the last step made shorter so that it ends where the first unit is past it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.cubic import root_of_cubic
from gflow.dynamics.march.lane import Lane
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.stops import AbstractRule, Coordinates
from gflow.problem.array import Array
from gflow.problem.bends import largest_violation, sight, violations
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights
from gflow.programs import by_size

AIM, ENOUGH = 3.0, 50.0
"""In units of what counts as past a kink: where a landing aims, and what it is content with. It is
always a little past the kink, so that round-off cannot put a unit on the wrong side."""

MOST = 60
"""Trials."""

PATIENCE = 5
"""One trial in so many is put halfway to the middle."""

LOWER = -2
"""Number of the trial that looks at the lower end; the next looks at the upper. Both are known, and
looked at in the same loop: what looks takes longer to compile than all else."""


class PastKinks(AbstractRule):
    """How far a frozen network is beyond its pattern: at 1 it is."""

    value: float = 0.0
    variable = "kinks"

    def progress(self, at: Coordinates) -> Array:
        found = at.small["kinks"]
        return jnp.where(jnp.isnan(found), jnp.inf, found)

    def progress_of(self, value: Any) -> Any:
        return value

    def measure(self, problem: Problem, weights: Weights) -> Array:
        at, frozen = sight(problem, weights), problem.network
        worst = largest_violation(frozen.pattern, at)  # pyright: ignore
        return jnp.where(at.log_risk <= frozen.quiet, 0.0, worst)  # pyright: ignore


PAST = PastKinks()
"""The rule that a run watches."""


def _beyond(problem: Problem, weights: Weights) -> Array:
    return violations(problem.network.pattern, sight(problem, weights))  # pyright: ignore


@by_size
def land_on_kink(
    field: AbstractField, method: AbstractMethod, lane: Lane
) -> tuple[Lane, Array, Any]:
    """Shorten the last accepted step so that it ends just past the first kink in it.

    Every unit that is past its kink at the end has a root of its own. The earliest is looked for in
    the cubic through values and slopes at the ends of what is known to hold it, which the slopes of
    the flow give; each trial is a true step of the solver from where the last one began, and a new
    end.

    Returns:
        The lane there, the number of trials, and what they add to the solver's tally.
    """
    s0, state0, memory0 = lane.began
    memory0 = method.again(lane.memory, memory0)
    before = method.tally(memory0)

    @jax.jit  # traced once, for the shapes and for the loop
    def beyond(s: Array, state: FlowState) -> tuple[Array, Array]:
        """How far each unit is past its kink, and the speed of that."""
        return jax.jvp(
            lambda weights: _beyond(field.problem, weights),
            (state.weights,),
            (field(s, state).weights,),
        )

    def unfinished(loop: Bracket) -> Array:
        close = 4 * jnp.finfo(loop.low.dtype).eps * jnp.maximum(jnp.abs(loop.high), 1.0)
        worst = jnp.max(loop.above[0])
        wide = (loop.high - loop.low > close) & (worst > ENOUGH) & (loop.tries < MOST)
        return (loop.tries < 0) | wide

    def known(tries: Array) -> tuple[FlowState, Any]:
        ends = (state0, memory0), (lane.state, lane.memory)
        return jax.tree.map(lambda a, b: jnp.where(tries == LOWER, a, b), *ends)

    def tried(s: Array) -> tuple[FlowState, Any]:
        made = method.from_begin_to_end(field, s0, s - s0, state0, memory0)
        return made.state, made.memory

    def refine(loop: Bracket) -> Bracket:
        part = _earliest(loop.below, loop.above, loop.high - loop.low)
        part = jnp.where(loop.tries % PATIENCE == PATIENCE - 1, (part + 0.5) / 2, part)
        end = jnp.where(loop.tries == LOWER, loop.low, loop.high)
        s = jnp.where(loop.tries < 0, end, loop.low + (loop.high - loop.low) * part)
        here = jax.lax.cond(loop.tries < 0, lambda: known(loop.tries), lambda: tried(s))
        found = beyond(s, here[0])
        right = (loop.tries > LOWER) & ((loop.tries < 0) | (jnp.max(found[0]) > 1))

        def chosen(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(right, a, b), new, old)

        return Bracket(
            low=jnp.where(right, loop.low, s),
            high=jnp.where(right, s, loop.high),
            below=chosen(loop.below, found),
            above=chosen(found, loop.above),
            end=chosen(here, loop.end),
            tries=loop.tries + 1,
            spent=jax.tree.map(
                lambda total, a, b: jnp.where(loop.tries < 0, total, total + a - b),
                loop.spent,
                method.tally(here[1]),
                before,
            ),
        )

    unseen = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(beyond, s0, state0)
    )
    begun = Bracket(
        low=s0,
        high=lane.s,
        below=unseen,
        above=unseen,
        end=(lane.state, lane.memory),
        tries=jnp.array(LOWER),
        spent=jax.tree.map(jnp.zeros_like, before),
    )
    last = jax.lax.while_loop(unfinished, refine, begun)
    landed = eqx.tree_at(lambda at: (at.s, at.state, at.memory), lane, (last.high, *last.end))
    return landed, last.tries, last.spent


class Bracket(NamedTuple):
    """Where a first kink is: not before ``low``, and before ``high``."""

    low: Array
    high: Array
    below: tuple[Array, Array]
    """How far each unit is past its kink at the lower end, and the speed of that."""
    above: tuple[Array, Array]
    end: tuple[FlowState, Any]
    """State and memory at the upper end."""
    tries: Array
    """Trials so far; negative before both ends have been looked at."""
    spent: Any


def _earliest(below: tuple[Array, Array], above: tuple[Array, Array], width: Array) -> Array:
    """The part of a bracket at which the first unit is where a landing aims."""
    (f0, d0), (f1, d1) = below, above
    past = f1 > 1
    a, b = f0 - AIM, jnp.where(past, jnp.maximum(f1 - AIM, 0.0), 1.0)
    a = jnp.where(past & jnp.isfinite(a) & (a < 0), a, -1.0)
    slope0, slope1 = (jnp.where(past & jnp.isfinite(d), width * d, 0.0) for d in (d0, d1))
    x, _ = root_of_cubic(a, slope0, b, slope1, jnp)
    return jnp.min(jnp.where(past, x, 1.0))

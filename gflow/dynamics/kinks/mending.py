r"""What a step did with the wrong gates is mended, and what that leaves is estimated.

A step from $s_0$ to $s_1$ is made in one pattern of gates, whose field is F. If unit k passes its
kink at $s_k$ in it, the true field has since been larger by $D_k$, the derivative of F in the
gate times the change of the gate: to the new side's, or to that of a slide. With
$\tau_k = s_1 - s_k$ the difference of the true end and the end of the step is

$$\sum_k \tau_kD_k + \sum_k\frac{\tau_k^2}{2}\,(F_+'D_k - D_k'F) + O(\tau^3)$$

at $s_1$, by Taylor's formula for both flows, $F_+$ with the new gates. Where a slide has ended in
the step the velocity has not jumped but begun to differ, $D(s)$ from zero at $s_k$, and what mends
it is $\tau_kD_k/2$. Rates of clocks are not linear in the gates, but functions of the square of the
velocity, which each kink changes by a number: the first-order term is summed from kink to kink.

What is left is of third order. It is estimated by the second-order term times what the fields
change by in that time, relatively.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.problem.array import Array
from gflow.problem.bends import AbstractBends, Pattern, past_ends, past_kinks, sight
from gflow.problem.weights import Weights, squared_norm
from gflow.programs import by_size


class End(NamedTuple):
    """An end of a step in a pattern; speeds are those in the clock."""

    z: Any
    """(n, U), as are the next two."""
    speed: Any
    force: Any
    past: Any
    """Which units are past their kinks, (n, U)."""
    ended: Any
    """See ``past_ends``."""
    theta: Any
    pull: Any
    rate: Any
    """Of the clock."""
    log_risk: Any
    fall: Any
    r"""$-d\log R/ds$."""


def _seen(field: AbstractField, s: Array, state: FlowState) -> End:
    at = sight(field.problem, state.weights)
    square = squared_norm(at.velocity)
    rate = field.clock.rate(s, at.log_risk, square)
    pattern = field.problem.network.pattern  # pyright: ignore
    past, ended = past_kinks(pattern, at) > 1, past_ends(pattern, at)
    speed, fall = rate * at.speed, rate * square
    return End(at.z, speed, at.force, past, ended, at.theta, at.pull, rate, at.log_risk, fall)


@by_size
def seen_at(field: AbstractField, s: Array, state: FlowState) -> End:
    """What is seen in a pattern at the end of a step."""
    return _seen(field, s, state)


def _together(
    clock: AbstractClock,
    s: Array,
    scaled_time: Array,
    bends: AbstractBends,
    at: tuple[Weights, Array, Array],
    jumps: Weights,
    since: Array,
    order: Array,
) -> FlowState:
    r"""What neurons do to first order since their kinks beyond what is linear in their gates.

    Args:
        clock, s, scaled_time, bends: of the step, at its end.
        at: $v = -\nabla\log R$, log R and $\lVert v\rVert^2$ with the gates of the step.
        jumps: what the new gates add to v, to each neuron's row by itself.
        since, order: see ``mended``.
    """
    ahead, log_risk, square = at
    rows, own = bends.of_neurons(ahead), bends.of_neurons(jumps)
    crossed, more = 2 * jnp.sum(rows * own, 1), jnp.sum(own**2, 1)
    # From one kink to the next |v|^2 is what those before have made it, each by its own row.
    ago = since[order]
    length = ago - jnp.append(ago[1:], 0.0)
    squares = square + jnp.cumsum((crossed + more)[order])
    rate, per_square = jax.jvp(lambda x: clock.rate(s, log_risk, x), (square,), (1.0,))
    rates = jnp.broadcast_to(clock.rate(s, log_risk, squares), squares.shape)
    passed = jnp.zeros_like(since).at[order].set(jnp.cumsum((length * rates)[::-1])[::-1])
    linear = jnp.sum(since * crossed)
    longer = jnp.sum(length * (rates - rate)) - per_square * linear
    of_time = rates * (1 - scaled_time * squares) - rate * (1 - scaled_time * square)
    of_linear = linear * (per_square * (1 - scaled_time * square) - rate * scaled_time)
    by_row = (passed - rate * since)[:, None] * own
    weights = bends.with_neurons(jax.tree.map(jnp.zeros_like, ahead), by_row)
    weights = jax.tree.map(lambda leaf, x: longer * leaf + x, ahead, weights)
    return FlowState(weights, jnp.sum(length * of_time) - of_linear)


@by_size
def mended(
    field: AbstractField,
    method: AbstractMethod,
    tolerance: AbstractTolerance,
    s: Array,
    h: Array,
    before: FlowState,
    state: FlowState,
    new: Pattern,
    since: Array,
    order: Array,
    ramp: Array,
    ratio: Array,
    curved: Array,
) -> tuple[FlowState, Any, Array, End]:
    """The mended end of a step, on its kinks, and the solver's memory there.

    Then the norm of what is left, in units of the tolerance, and what is seen there.

    Args:
        field: with the gates of the step.
        method: the solver.
        tolerance: whose norm it is.
        s, h: the clock at the end, and the length of the step.
        before, state: the states at both ends.
        new: the pattern there.
        since: how long ago, of each neuron, (U,).
        order: of the neurons, by that, the first to have met a kink first, (U,).
        ramp: which neurons only left a slide, (U,).
        ratio: the relative change of the jumps in that time.
        curved: likewise of what slides that have ended differ by.
    """
    gates = field.problem.network.pattern.gates  # pyright: ignore
    bends, change = field.problem.network.bends, new.gates - gates  # pyright: ignore
    scaled_time = state.scaled_time

    def at_gates(gates: Array) -> AbstractField:
        return eqx.tree_at(lambda f: f.problem.network.pattern.gates, field, gates)

    def velocity(gates: Array) -> tuple[Weights, Array, Array]:
        r"""$v = -\nabla\log R$ with some gates, log R, and $\lVert v\rVert^2$."""
        log_risk, direction, square = at_gates(gates).direction(state.weights)
        return jax.tree.map(jnp.negative, direction), log_risk, square

    def in_clock(ahead: Weights, log_risk: Array, square: Array) -> FlowState:
        rate = field.clock.rate(s, log_risk, square)
        return FlowState(
            jax.tree.map(lambda leaf: rate * leaf, ahead), rate * (1 - scaled_time * square)
        )

    def plus(*states: FlowState) -> FlowState:
        return jax.tree.map(lambda *leaves: sum(leaves), *states)

    once = jnp.where(ramp, since / 2, since)
    twice = jnp.where(ramp, 0.0, since**2 / 2)
    at, jump = jax.linearize(velocity, gates)

    def linear(by: Array) -> FlowState:
        return jax.jvp(in_clock, at, jump(change * by[None, :]))[1]

    motion, first = in_clock(*at), linear(once)
    each = jump(change)[0]
    together = _together(field.clock, s, scaled_time, bends, at, each, once, order)

    def jumps(s: Array, state: FlowState) -> FlowState:
        by = change * twice[None, :]
        return jax.jvp(lambda gates: at_gates(gates)(s, state), (gates,), (by,))[1]

    second, turned = jax.jvp(jumps, (s, state), (jnp.ones_like(s), motion))
    carried = jax.jvp(lambda state: at_gates(gates + change)(s, state), (state,), (second,))[1]
    later = jax.tree.map(jnp.subtract, carried, turned)
    after = plus(state, first, together, later)

    def norm(error: FlowState) -> Array:
        return tolerance.norm(error, before, after)

    several = jnp.sum(jnp.any(change != 0, 0)) > 1
    of_first, of_later = norm(first), norm(later)
    ratio = jnp.minimum(ratio + of_later / jnp.where(of_first > 0, of_first, 1.0), 1.0)
    ended = jax.lax.cond(
        jnp.any(ramp),
        lambda: norm(linear(jnp.where(ramp, once, 0.0))),
        lambda: jnp.zeros_like(of_first),
    )
    # Which neurons have met their kinks already changes the second-order terms of the others.
    others = jnp.where(several, jnp.sqrt(squared_norm(each) / at[2]), 0.0)
    left = jnp.minimum(ratio + others, 1.0) * of_later + curved * ended
    weights = new.tangent.across_removed(after.weights, bends)
    after = FlowState(weights, after.scaled_time)
    there = eqx.tree_at(lambda f: f.problem.network.pattern, field, new)
    return after, method.start(there, s, after, h), left, _seen(there, s, after)

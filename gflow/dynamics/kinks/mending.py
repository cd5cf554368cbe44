r"""What a step did with the wrong gates is mended, and what that leaves is estimated.

A step from $s_0$ to $s_1$ is made in one pattern of gates, whose field is F. If unit k passes its
kink at $s_k$ in it, the true field has since been larger by $D_k$, the derivative of F in the
gate times the change of the gate: to the new side's, or to that of a slide. With
$\tau_k = s_1 - s_k$ the difference of the true end and the end of the step is

$$\sum_k \tau_kD_k + \sum_k\frac{\tau_k^2}{2}\,(F_+'D_k - D_k'F) + O(\tau^3)$$

at $s_1$, by Taylor's formula for both flows, $F_+$ with the new gates. Where a slide has ended in
the step the velocity has not jumped but begun to differ, $D(s)$ from zero at $s_k$, and what mends
it is $\tau_kD_k/2$. Rates of clocks are not linear in the gates; what several of them do together
is added with the weights $\sqrt{\tau_k\tau_l}$, for the smaller one.

What is left is of third order. It is estimated by the second-order term times what the fields
change by in that time, relatively.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.problem.array import Array
from gflow.problem.bends import Pattern, past_ends, past_kinks, sight
from gflow.problem.weights import squared_norm


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


@eqx.filter_jit
def seen_at(field: AbstractField, s: Array, state: FlowState) -> End:
    """What is seen in a pattern at the end of a step."""
    return _seen(field, s, state)


@eqx.filter_jit
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
        ramp: which neurons only left a slide, (U,).
        ratio: the relative change of the jumps in that time.
        curved: likewise of what slides that have ended differ by.
    """
    gates = field.problem.network.pattern.gates  # pyright: ignore
    bends, change = field.problem.network.bends, new.gates - gates  # pyright: ignore

    def at_gates(gates: Array, s: Array, state: FlowState) -> FlowState:
        there = eqx.tree_at(lambda f: f.problem.network.pattern.gates, field, gates)
        return there(s, state)

    def plus(*states: FlowState) -> FlowState:
        return jax.tree.map(lambda *leaves: sum(leaves), *states)

    def times(factor: Array | float, state: FlowState) -> FlowState:
        return jax.tree.map(lambda leaf: factor * leaf, state)

    once = jnp.where(ramp, since / 2, since)
    twice = jnp.where(ramp, 0.0, since**2 / 2)
    longest = jnp.max(once)
    some = jnp.where(longest > 0, longest, 1.0)
    rooted = change * jnp.sqrt(once / some)[None, :]
    motion, jump = jax.linearize(lambda gates: at_gates(gates, s, state), gates)
    first = jump(change * once[None, :])
    together = plus(at_gates(gates + rooted, s, state), times(-1.0, motion))
    together = times(longest, plus(together, times(-1.0, jump(rooted))))

    def jumps(s: Array, state: FlowState) -> FlowState:
        by = change * twice[None, :]
        return jax.jvp(lambda gates: at_gates(gates, s, state), (gates,), (by,))[1]

    second, turned = jax.jvp(jumps, (s, state), (jnp.ones_like(s), motion))
    carried = jax.jvp(lambda state: at_gates(gates + change, s, state), (state,), (second,))[1]
    later = plus(carried, times(-1.0, turned))
    after = plus(state, first, together, later)

    def norm(error: FlowState) -> Array:
        return tolerance.norm(error, before, after)

    several = jnp.sum(jnp.any(change != 0, 0)) > 1
    of_first, of_later = norm(first), norm(later)
    ratio = jnp.minimum(ratio + of_later / jnp.where(of_first > 0, of_first, 1.0), 1.0)
    ended = jax.lax.cond(
        jnp.any(ramp),
        lambda: norm(jump(change * jnp.where(ramp, once, 0.0)[None, :])),
        lambda: jnp.zeros_like(of_first),
    )
    left = ratio * of_later + curved * ended + jnp.where(several, norm(together) / 2, 0.0)
    weights = new.tangent.across_removed(after.weights, bends)
    after = FlowState(weights, after.scaled_time)
    there = eqx.tree_at(lambda f: f.problem.network.pattern, field, new)
    return after, method.start(there, s, after, h), left, _seen(there, s, after)

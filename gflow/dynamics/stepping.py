"""The adaptive loop around a diffrax solver's ``step``.

diffrax's solvers make the step; the loop here decides how long it is and when to stop. It is not
``diffrax.diffeqsolve`` because a flow needs four things that call does not offer: the next step
size carried across a stop, so that a run in segments is the uninterrupted run bit for bit; landing
exactly on saved points and stopping conditions by steps, never by interpolation, whose error is
orders of magnitude larger; an error norm in which $u = tR$ is purely relative; and a reason
for every stop, with everything computed so far.
"""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.tolerance import AbstractTolerance
from gflow.dynamics.until import AbstractRule, Coordinates, watched
from gflow.problem.network import Array, Weights, squared_norm

RUNNING, LANDED, CROSSED, COUNTED, TIRED, STALLED, STIFF = range(7)
"""Why ``advance`` returned: the clock landed on its target, a watched rule was crossed, the step
count was met, the segment's budget of attempts is used, shorter steps do not help, an explicit
solver's step is limited by stability."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0

STEADY = 0.1
"""A step whose error is below this part of the tolerance does not shorten the next: part of such an
error is round-off, which shorter steps do not reduce."""

DOUBTFUL = 100 * float(np.finfo(np.float64).eps)
"""An error below this, relative to the weights, may be round-off as a whole. It is no reason to
stay at a short step, as the memory of the step-size control would have it."""

NOISE_STEPS, NOISE_ERRORS = 16.0, 4.0
"""Round-off exceeds the tolerance when a refused step has been made shorter by the first factor
and its error has not fallen by the second; at first order it would fall as much as the step."""

STIFF_PRODUCT, STIFF_LOOKS, LOOK_EVERY = 2.0, 2, 8
"""A run is stiff when step times spectral radius has exceeded the first in so many looks in a row,
one every so many steps. The methods of order 5 to 8 lose stability between 3 and 6."""


class Carry(eqx.Module):
    """Everything a run needs to go on; a pytree of arrays that can be saved and restored."""

    s: Array
    state: FlowState
    next_step: Array
    solver_state: Any
    error: Array
    """Norm of the last accepted step's error, the memory of the step-size control."""
    num_steps: Array
    num_rejected: Array
    refused: tuple[Array, Array]
    """The first refused step since the last accepted one, and its error norm; zeros for none."""
    num_stiff: Array
    """Looks in a row that found the step limited by stability."""
    previous: tuple[Array, FlowState, Any]
    """Where the last accepted step began: (s, state, solver state)."""


class Limits(NamedTuple):
    """Where a call of ``advance`` stops."""

    s_end: Array
    """The clock's target, infinite when it is not known."""
    num_steps: Array
    """Accepted steps in all."""
    goals: tuple[Array, ...]
    """The progress at which each watched rule is met."""
    attempts: Array
    """Steps to try in this call."""
    longest: Array
    """No step is longer, whatever the tolerance allows."""


@eqx.filter_jit
def start(
    field: FlowField,
    solver: diffrax.AbstractSolver,
    tolerance: AbstractTolerance,
    s: Array,
    state: FlowState,
) -> Carry:
    """A carry at the beginning of a run, with a first step of 1 % of the state's own scale."""
    slope = field(s, state)
    weights = FlowState(state.weights, jnp.zeros_like(s))
    motion = FlowState(slope.weights, jnp.zeros_like(s))
    norm = tolerance.at_start.norm
    step = 0.01 * norm(weights, weights, weights) / norm(motion, weights, weights)
    term = diffrax.ODETerm(field)
    solver_state = solver.init(term, s, s + step, state, None)
    zero = jnp.zeros((), jnp.int64)
    previous = (s, state, solver_state)
    none = (jnp.zeros_like(s), jnp.zeros_like(s))
    error = jnp.ones_like(s)
    return strong(Carry(s, state, step, solver_state, error, zero, zero, none, zero, previous))


def observe(
    field: FlowField, state: FlowState, num_steps: Array, rules: tuple[AbstractRule, ...]
) -> Coordinates:
    """The coordinates that the rules look at; what no rule needs is not computed."""
    log_risk = field.problem.log_risk(state.weights)
    return Coordinates(
        log_risk=log_risk,
        log_time=jnp.log(state.scaled_time) - log_risk,
        num_steps=num_steps,
        small=watched(rules, field.problem, state.weights),
    )


@eqx.filter_jit
def advance(
    field: FlowField,
    solver: diffrax.AbstractSolver,
    tolerance: AbstractTolerance,
    rules: tuple[AbstractRule, ...],
    carry: Carry,
    limits: Limits,
    watch_stiffness: bool = False,
) -> tuple[Carry, Array]:
    """Step until one of ``limits`` is met; returns the carry and why it stopped.

    Args:
        rules: the stopping rules to watch after each accepted step, one for each of
            ``limits.goals``.
        watch_stiffness: stop also where the step is limited by stability (for explicit solvers).
    """
    term = diffrax.ODETerm(field)
    exponent = 1 / jnp.asarray(solver.error_order(term), carry.s.dtype)

    def attempt(loop: tuple[Carry, Array, Array]) -> tuple[Carry, Array, Array]:
        carry, tried, _ = loop
        # A last step that fits is cut to land on the target; one that almost fits is halved, so
        # that no tiny step is left over.
        remaining = limits.s_end - carry.s
        allowed = jnp.minimum(carry.next_step, limits.longest)
        lands = allowed >= remaining
        halved = allowed > remaining / 2
        step = jnp.where(lands, remaining, jnp.where(halved, remaining / 2, allowed))
        s = jnp.where(lands, limits.s_end, carry.s + step)
        state, error, _, solver_state, result = solver.step(
            term, carry.s, s, carry.state, None, carry.solver_state, jnp.array(False)
        )
        assert error is not None  # the solver is adaptive
        norm = tolerance.norm(error, carry.state, state)
        sound = (result == diffrax.RESULTS.successful) & jnp.isfinite(norm)
        norm = jnp.where(sound, jnp.maximum(norm, 1e-10), jnp.inf)
        accept = norm <= 1
        # Proportional-integral control (Gustafsson 1991) after an accepted step, plain integral
        # control after a rejected one; a step that was cut does not shorten the next.
        steady = norm ** (-0.7 * exponent) * carry.error ** (0.4 * exponent)
        factor = jnp.where(accept, steady, jnp.minimum(norm ** (-exponent), 1.0))
        factor = jnp.clip(SAFETY * factor, SHRINK, GROW)
        following = step * jnp.where(norm < STEADY, jnp.maximum(factor, 1.0), factor)
        longer = step * jnp.maximum(SAFETY * norm ** (-exponent), 1.0)
        doubtful = (norm < STEADY) & (norm * tolerance.rtol < DOUBTFUL)
        following = jnp.where(doubtful, jnp.maximum(following, longer), following)
        following = jnp.where(
            accept & (lands | halved | (allowed < carry.next_step)),
            jnp.maximum(following, carry.next_step),
            following,
        )
        moved = Carry(
            s=s,
            state=state,
            next_step=following,
            solver_state=solver_state,
            error=norm,
            num_steps=carry.num_steps + 1,
            num_rejected=carry.num_rejected,
            refused=jax.tree.map(jnp.zeros_like, carry.refused),
            num_stiff=_count_stiff(field, carry, s, state, error)
            if watch_stiffness
            else carry.num_stiff,
            previous=(carry.s, carry.state, carry.solver_state),
        )
        first_step, first_norm = carry.refused
        fresh = (first_norm == 0) & jnp.isfinite(norm)
        stayed = eqx.tree_at(
            lambda c: (c.next_step, c.num_rejected, c.refused),
            carry,
            (
                following,
                carry.num_rejected + 1,
                (jnp.where(fresh, step, first_step), jnp.where(fresh, norm, first_norm)),
            ),
        )
        carry = jax.tree.map(lambda a, b: jnp.where(accept, a, b), moved, stayed)
        crossed = []
        if rules:
            at = observe(field, carry.state, carry.num_steps, rules)
            asked = zip(rules, limits.goals, strict=True)
            crossed = [rule.progress(at) >= goal for rule, goal in asked]
        noisy = (step * NOISE_STEPS <= first_step) & (norm * NOISE_ERRORS > first_norm)
        vanished = following <= 4 * jnp.finfo(s.dtype).eps * jnp.abs(carry.s)
        reason = jnp.select(
            [
                accept & jnp.any(jnp.array([False, *crossed])),
                accept & lands,
                accept & (carry.num_steps >= limits.num_steps),
                carry.num_stiff >= STIFF_LOOKS,
                ~accept & (vanished | (noisy & jnp.isfinite(norm))),
                tried + 1 >= limits.attempts,
            ],
            [CROSSED, LANDED, COUNTED, STIFF, STALLED, TIRED],
            RUNNING,
        )
        return carry, tried + 1, reason

    carry, _, reason = jax.lax.while_loop(
        lambda loop: loop[2] == RUNNING,
        attempt,
        (carry, jnp.zeros((), jnp.int64), jnp.array(RUNNING)),
    )
    return carry, reason


def _count_stiff(
    field: FlowField, carry: Carry, s: Array, state: FlowState, error: FlowState
) -> Array:
    """How many looks in a row, this step's included, found the flow stiff.

    An explicit method's error estimate is dominated by the stiffest modes as soon as their product
    with the step is of order one: applying the Jacobian to it once gives the spectral radius.
    """

    def size(weights: Weights) -> Array:
        return jnp.sqrt(squared_norm(weights))

    def look() -> Array:
        _, image = jax.jvp(
            lambda weights: field(s, FlowState(weights, state.scaled_time)).weights,
            (state.weights,),
            (error.weights,),
        )
        stiff = (s - carry.s) * size(image) > STIFF_PRODUCT * size(error.weights)
        return jnp.where(stiff, carry.num_stiff + 1, 0)

    due = carry.num_steps % LOOK_EVERY == LOOK_EVERY - 1
    return jax.lax.cond(due, look, lambda: carry.num_stiff)


@eqx.filter_jit
def land(
    field: FlowField, solver: diffrax.AbstractSolver, rule: AbstractRule, carry: Carry, goal: Array
) -> Carry:
    """Shorten the last accepted step so that it ends where ``rule`` reaches ``goal``.

    The step's length is found by the Illinois variant of regula falsi, each trial a true step of
    the solver from where the last one began.
    """
    term = diffrax.ODETerm(field)
    s0, state0, solver_state0 = carry.previous

    def trial(s: Array) -> tuple[Array, FlowState, Any]:
        state, _, _, solver_state, _ = solver.step(
            term, s0, s, state0, None, solver_state0, jnp.array(False)
        )
        at = observe(field, state, carry.num_steps, (rule,))
        return rule.progress(at) - goal, state, solver_state

    start = rule.progress(observe(field, state0, carry.num_steps, (rule,))) - goal
    end = rule.progress(observe(field, carry.state, carry.num_steps, (rule,))) - goal
    near = 1e-13 * jnp.maximum(1.0, jnp.abs(goal))

    def unfinished(loop: tuple) -> Array:
        (*_, miss), tries, *_ = loop
        # From where the progress is undefined, as that of a direction at w = 0, it jumps past the
        # goal, and past others: a step that does stays as it is.
        return jnp.isfinite(start) & (start < 0) & (jnp.abs(miss) > near) & (tries < 60)

    def refine(loop: tuple) -> tuple:
        (low, below, high, above, _, _), tries, *_ = loop
        s = low + (high - low) * below / (below - above)
        miss, state, solver_state = trial(s)
        left = miss < 0
        bracket = (
            jnp.where(left, s, low),
            jnp.where(left, miss, below / 2),
            jnp.where(left, high, s),
            jnp.where(left, above / 2, miss),
            s,
            miss,
        )
        return bracket, tries + 1, state, solver_state

    bracket = (s0, start, carry.s, end, carry.s, end)
    (*_, s, _), _, state, solver_state = jax.lax.while_loop(
        unfinished, refine, (bracket, jnp.array(0), carry.state, carry.solver_state)
    )
    return eqx.tree_at(
        lambda c: (c.s, c.state, c.solver_state, c.next_step),
        carry,
        (s, state, solver_state, jnp.maximum(carry.next_step, carry.s - s0)),
    )


def strong(tree: PyTree[Array]) -> PyTree[Array]:
    """The same arrays without JAX's weak types, so that one compilation serves them all."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.asarray(leaf).dtype), tree)

"""The march: the compiled loop that steps one or many members of a flow.

It is not ``diffrax.diffeqsolve`` because a flow needs four things that call does not offer: the
next step size carried across a stop, so that a run in segments is the uninterrupted run bit for
bit; landing exactly on saved points and stopping conditions by steps, never by interpolation, whose
error is orders of magnitude larger; an error norm in which $u = tR$ is purely relative; and a
reason for every stop, with everything computed so far.

**One or many.** All that happens to a member is a pure function of that member; the march maps it
over *lanes*, on a leading axis of every array, or calls it as it is for a single one. A step of an
iterative solver is worked on in an inner loop, which only the attempts pass through, and steps end
when a quarter of the lanes that run have solved theirs: the others sit out that trip, and no lane
waits for the slowest. What a lane does depends on nothing in another.

**Attempts** begin at the head of a trip, where the goals are known; a single member's ends in the
same trip. One that is under way, in a lane beside others, goes on if its step keeps its length: a
call may end in its midst, and goals change.

**Saved points.** A lane lands on one goal after the other and leaves its state in a buffer; the
host is asked when a goal is the last of those it gave, or the buffer is full.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.control import GROW, SAFETY, STEADY, propose
from gflow.dynamics.march.lane import Lane, Member, Rows, Saved, blank, strong
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.reasons import Reason
from gflow.dynamics.stops import AbstractRule, Coordinates, watched
from gflow.native import native
from gflow.problem.array import Array
from gflow.problem.weights import Weights, squared_norm
from gflow.programs import ONCE, by_size, compiled

SHARE = 4, 5
"""Steps end in a trip where at least so many in so many running lanes have solved theirs."""

NOISE_STEPS, NOISE_ERRORS = 256.0, 4.0
"""Round-off exceeds the tolerance when a refused step has been made shorter by the first factor
and its error has not fallen by the second; at first order it would fall as much as the step. A
point that enters the support shortly behind the step's beginning is seen better by the nodes of
shorter steps, and errors grow until they end about there: at a factor of 16 two in a hundred runs
of three layers to log R = -1e8 ended so."""

STIFF_PRODUCT, STIFF_LOOKS, LOOK_EVERY = 2.0, 2, 8
"""A run is stiff when step times spectral radius has exceeded the first in so many looks in a row,
one every so many steps. The methods of order 5 to 8 lose stability between 3 and 6."""

GROWTH = 50.0
"""It is not while something grows at more than the spectral radius over this: what grows limits the
steps of an implicit solver too, to some tenths of its time, and such a step costs several."""


# ---------------------------------------------------------------------------------------------
# What the host calls
# ---------------------------------------------------------------------------------------------


def lanes_at(
    member: Member,
    shared: Member,
    method: AbstractMethod,
    s: Array,
    state: FlowState,
    before: tuple[Array, Array, Array],
    many: bool = False,
) -> Lane:
    """Lanes at states.

    Args:
        member: what lanes have of their own, on a leading axis if there are ``many``.
        shared: what all lanes have in common; None at each other leaf.
        method: the solver.
        s: clock values.
        state: states.
        before: the next step, not a number for 1 % of the state's own scale, and the steps accepted
            and refused so far.
        many: whether the arrays have a leading axis, the lanes'.
    """

    def one(own: Member, s: Array, state: FlowState, before: tuple[Array, Array, Array]) -> Lane:
        member = eqx.combine(own, shared)
        field, zero, none = member.field, jnp.zeros_like(s), jnp.zeros((), jnp.int64)
        given, num_steps, num_rejected = before

        def measured() -> Array:
            slope = field(s, state)
            weights = FlowState(state.weights, zero)
            motion = FlowState(slope.weights, zero)
            norm = member.tolerance.at_start.norm
            return 0.01 * norm(weights, weights, weights) / norm(motion, weights, weights)

        # A run begins again behind each of its kinks, with a step that it knows.
        first = jax.lax.cond(jnp.isnan(given), measured, lambda: given)
        memory = method.start(field, s, state, first)
        lane = Lane(
            s=s,
            state=state,
            memory=memory,
            next_step=first,
            error=jnp.ones_like(s),
            step=jnp.full_like(s, jnp.nan),
            lands=jnp.array(False),
            cut=jnp.array(False),
            attempt=blank(jax.eval_shape(method.begin, field, s, first, state, memory)),
            previous=(s, state, memory) if member.rules else None,
            num_steps=num_steps,
            num_rejected=num_rejected,
            refused=(zero, zero),
            num_stiff=none,
            clock_goal=none,
            steps_goal=none,
            reason=jnp.array(Reason.RUNNING),
        )
        return strong(lane)

    return (jax.vmap(one) if many else one)(member, s, state, before)


start = compiled(lanes_at, ONCE)
""":func:`lanes_at`, compiled."""


@eqx.filter_jit
def choose(which: Array, new: Lane, old: Lane) -> Lane:
    """The lanes ``which`` from ``new``, the others from ``old``."""
    return _chosen(which, new, old)


@by_size
def march(
    member: Member,
    shared: Member,
    method: AbstractMethod,
    lane: Lane,
    trips: Array,
    enough: Array,
    rows: int,
    watch_stiffness: bool = False,
    many: bool = False,
    at_once: bool = False,
) -> tuple[Lane, Saved, Array, Array]:
    """Go on until ``enough`` lanes have a reason to stop, or for so many trips.

    Args:
        member, shared, method, many: as for :func:`lanes_at`.
        lane: where the members stand. Those with a reason other than RUNNING stay there.
        trips: rounds in which steps end; a single member makes one attempt in each.
        enough: how many lanes are to have stopped, 1 for a single member.
        rows: of the buffer of each lane.
        watch_stiffness: stop also where the step is limited by stability (for explicit solvers).
        at_once: whether a CPU may run it as one function.

    Returns:
        The lanes; the states on goals; the trips made, and how many lanes ended a step in them.
    """
    each = jax.vmap if many else lambda function: function

    def begun(own: Member, lane: Lane) -> Lane:
        return _begun(eqx.combine(own, shared), method, lane)

    def solved(lane: Lane) -> Array:
        return method.solved(lane.attempt)

    def look(own: Member, lane: Lane) -> Any:
        field = eqx.combine(own, shared).field
        return method.look(field, lane.s, lane.step, lane.state, lane.attempt)

    def correct(own: Member, lane: Lane, seen: Any) -> Any:
        return method.correct(eqx.combine(own, shared).field, lane.step, lane.attempt, seen)

    def end(own: Member, lane: Lane, seen: Any) -> tuple[Lane, Array]:
        return _end(eqx.combine(own, shared), method, lane, seen, watch_stiffness)

    def begin_or_go_on(lane: Lane) -> Lane:
        """Attempts at the next steps; one that is under way, and keeps its length, goes on."""
        new = each(begun)(member, lane)
        if not many:  # whose attempts end in the trip in which they begin
            return new
        attempt = _chosen(new.step == lane.step, lane.attempt, new.attempt)
        return eqx.tree_at(lambda at: at.attempt, new, attempt)

    def iterate(lane: Lane) -> tuple[Lane, Any]:
        """Work on attempts until enough of them are solved, and look at all."""
        if not many:
            field = eqx.combine(member, shared).field
            done, seen = method.work(field, lane.s, lane.step, lane.state, lane.attempt)
            return eqx.tree_at(lambda at: at.attempt, lane, done), seen
        if method.iterates:
            lane = together(lane)
        return lane, each(look)(member, lane)

    def together(lane: Lane) -> Lane:
        running = lane.reason == Reason.RUNNING

        def carrying(attempt: Any) -> Lane:
            return eqx.tree_at(lambda at: at.attempt, lane, attempt)

        def unfinished(attempt: Any) -> Array:
            ready = running & each(solved)(carrying(attempt))
            return SHARE[1] * jnp.sum(ready) < SHARE[0] * jnp.sum(running)

        def once(attempt: Any) -> Any:
            here = carrying(attempt)
            further = each(correct)(member, here, each(look)(member, here))
            return _chosen(running & ~each(solved)(here), further, attempt)

        return carrying(jax.lax.while_loop(unfinished, once, lane.attempt))

    def go(loop: tuple) -> Array:
        lane, _, made, _ = loop
        return (made < trips) & (jnp.sum(lane.reason != Reason.RUNNING) < enough)

    def trip(loop: tuple) -> tuple:
        lane, saved, made, busy = loop
        lane, seen = iterate(begin_or_go_on(lane))
        running = lane.reason == Reason.RUNNING
        ready = running & each(solved)(lane)
        after, arrived = each(end)(member, lane, seen)
        if many:
            after = _chosen(ready, after, lane)
            if method.iterates:  # the others use what was seen as well
                further = each(correct)(member, lane, seen)
                attempt = _chosen(running & ~ready, further, after.attempt)
                after = eqx.tree_at(lambda at: at.attempt, after, attempt)
        arrived = ready & arrived
        saved = _store(saved, after, arrived, many)
        full = saved.count >= rows
        reason = jnp.where(
            arrived & full & (after.reason == Reason.RUNNING), Reason.FULL, after.reason
        )
        after = eqx.tree_at(lambda at: at.reason, after, reason)
        return after, saved, made + 1, busy + jnp.sum(ready)

    zero = jnp.zeros((), jnp.int64)
    empty = _buffer(lane, rows, many)
    begin = lane, empty, zero, zero

    def until_over(begin: tuple) -> tuple:
        return jax.lax.while_loop(go, trip, begin)

    return native(until_over, begin) if at_once else until_over(begin)


# ---------------------------------------------------------------------------------------------
# What happens to one member
# ---------------------------------------------------------------------------------------------


def observe(
    field: AbstractField, state: FlowState, num_steps: Array, rules: tuple[AbstractRule, ...]
) -> Coordinates:
    """The coordinates that the rules look at; what no rule needs is not computed."""
    log_risk = field.problem.log_risk(state.weights)
    return Coordinates(
        log_risk=log_risk,
        log_time=jnp.log(state.scaled_time) - log_risk,
        num_steps=num_steps,
        small=watched(rules, field.problem, state.weights),
    )


def _begun(member: Member, method: AbstractMethod, lane: Lane) -> Lane:
    """The beginning of an attempt at the next step.

    A last step that fits is cut to land on the clock goal; one that almost fits is halved, so that
    no tiny step is left over.
    """
    goals = member.ahead
    ahead = lane.clock_goal - goals.first[0]
    remaining = _at(goals.clock, ahead) - lane.s
    allowed = jnp.minimum(lane.next_step, _at(goals.longest, ahead))
    lands, halved = allowed >= remaining, allowed > remaining / 2
    step = jnp.where(lands, remaining, jnp.where(halved, remaining / 2, allowed))
    return eqx.tree_at(
        lambda at: (at.step, at.lands, at.cut, at.attempt),
        lane,
        (
            step,
            lands,
            lands | halved | (allowed < lane.next_step),
            method.begin(member.field, lane.s, step, lane.state, lane.memory, lane.attempt),
        ),
    )


def _end(
    member: Member, method: AbstractMethod, lane: Lane, seen: Any, watch_stiffness: bool
) -> tuple[Lane, Array]:
    """The end of an attempt, accepted or not.

    Returns:
        The lane, and whether it stands on a clock goal or a count of steps.
    """
    field, goals, tolerance = member.field, member.ahead, member.tolerance
    made = method.end(field, lane.s, lane.step, lane.state, lane.attempt, seen, lane.memory)
    # Of round-off, up to where steps settle, no length of the step is to blame.
    most = STEADY * tolerance.rtol * jnp.abs(made.state.scaled_time)
    of_time = jnp.abs(made.error.scaled_time) - jnp.minimum(made.round_off, most)
    error = FlowState(made.error.weights, jnp.maximum(of_time, 0.0))
    norm = tolerance.norm(error, lane.state, made.state)
    norm = jnp.where(jnp.isfinite(norm), norm, jnp.inf)
    noise = method.noise / tolerance.rtol
    first_step, first_norm = lane.refused
    below = jnp.clip(SAFETY * first_step / lane.step, 1.0, GROW)
    grow = jnp.where(first_norm > 0, below, GROW)
    accept, following = propose(
        lane.step, norm, lane.error, exponent=method.exponent, noise=noise, grow=grow
    )
    # A step that was cut does not shorten the next; where it could have been longer, so can that.
    wanted = lane.next_step * jnp.maximum(following / lane.step, 1.0)
    kept = jnp.maximum(jnp.minimum(wanted, GROW * lane.step), lane.next_step)
    following = jnp.where(accept & lane.cut, jnp.maximum(following, kept), following)

    def now(after: Any, before: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), after, before)

    aim = _at(goals.clock, lane.clock_goal - goals.first[0])
    s = jnp.where(lane.lands, aim, lane.s + lane.step)
    one = jnp.ones((), lane.num_steps.dtype)
    num_steps = lane.num_steps + jnp.where(accept, one, 0)
    state = now(made.state, lane.state)
    num_stiff = lane.num_stiff
    if watch_stiffness:
        num_stiff = now(_count_stiff(field, lane, s, made), num_stiff)
    fresh = (first_norm == 0) & jnp.isfinite(norm)
    first = jnp.where(fresh, lane.step, first_step), jnp.where(fresh, norm, first_norm)

    crossed = jnp.array(False)
    if member.rules:
        at = observe(field, state, num_steps, member.rules)
        progress = jnp.stack([rule.progress(at) for rule in member.rules])
        crossed = accept & jnp.any(progress >= goals.events)
    landed = accept & ~crossed & lane.lands
    due = num_steps >= _at(goals.steps, lane.steps_goal - goals.first[1])
    counted = accept & ~crossed & due
    clock_goal = lane.clock_goal + jnp.where(landed, one, 0)
    steps_goal = lane.steps_goal + jnp.where(counted, one, 0)
    num_rejected = lane.num_rejected + jnp.where(accept, 0, one)
    noisy = (lane.step * NOISE_STEPS <= first_step) & (norm * NOISE_ERRORS > first_norm)
    vanished = following <= 4 * jnp.finfo(s.dtype).eps * jnp.abs(lane.s)
    tried = num_steps + num_rejected
    reason = jnp.select(
        [
            crossed,
            landed & (clock_goal >= goals.count[0]),
            counted & (steps_goal >= goals.count[1]),
            num_stiff >= STIFF_LOOKS,
            vanished | (~accept & noisy & jnp.isfinite(norm)),
            tried >= goals.max_steps,
        ],
        [
            Reason.CROSSED,
            Reason.ARRIVED,
            Reason.ARRIVED,
            Reason.STIFF,
            Reason.REFUSED_STEPS,
            Reason.OUT_OF_STEPS,
        ],
        Reason.RUNNING,
    )
    after = Lane(
        s=now(s, lane.s),
        state=state,
        memory=now(made.memory, method.again(made.memory, lane.memory)),
        next_step=following,
        error=now(jnp.maximum(norm, jnp.minimum(noise, STEADY)), lane.error),
        step=jnp.full_like(lane.step, jnp.nan),
        lands=lane.lands,
        cut=lane.cut,
        attempt=lane.attempt,
        previous=now((lane.s, lane.state, lane.memory), lane.previous) if member.rules else None,
        num_steps=num_steps,
        num_rejected=num_rejected,
        refused=now(jax.tree.map(jnp.zeros_like, lane.refused), first),
        num_stiff=num_stiff,
        clock_goal=clock_goal,
        steps_goal=steps_goal,
        reason=reason,
    )
    return after, landed | counted


def _at(window: Array, index: Array) -> Array:
    return window[jnp.clip(index, 0, window.shape[0] - 1)]


def _count_stiff(field: AbstractField, lane: Lane, s: Array, made: Any) -> Array:
    """How many looks in a row, this step's included, found the flow stiff.

    An explicit method's error estimate is dominated by the stiffest modes as soon as their product
    with the step is of order one: applying the Jacobian to it once gives the spectral radius.
    What grows is a row or a column of a layer, as modes of a small start do on a plateau.
    """

    def size(weights: Weights) -> Array:
        return jnp.sqrt(squared_norm(weights))

    def look() -> Array:
        state, error = made.state, made.error
        slope, image = jax.jvp(
            lambda weights: field(s, FlowState(weights, state.scaled_time)).weights,
            (state.weights,),
            (error.weights,),
        )
        stable = lane.step * size(image) <= STIFF_PRODUCT * size(error.weights)
        growth = _growth(slope, state.weights)
        stiff = ~stable & (size(image) > GROWTH * growth * size(error.weights))
        return jnp.where(stiff, lane.num_stiff + 1, 0)

    due = lane.num_steps % LOOK_EVERY == LOOK_EVERY - 1
    return jax.lax.cond(due, look, lambda: lane.num_stiff)


def _growth(slope: Weights, weights: Weights) -> Array:
    r"""The largest $\mathrm d\log\lVert r\rVert/\mathrm ds$ of a row or column r of a layer."""

    def largest(slope: Array, leaf: Array) -> Array:
        slope, leaf = jnp.atleast_1d(slope, leaf)
        fastest = []
        for axis in range(leaf.ndim):
            along = tuple(other for other in range(leaf.ndim) if other != axis)
            size = jnp.max(jnp.abs(leaf), along, keepdims=True)  # squares may underflow
            some = jnp.where(size > 0, size, 1.0)
            unit = leaf / some
            squares = jnp.where(size > 0, jnp.sum(unit**2, along, keepdims=True), 1.0)
            fastest.append(jnp.max(jnp.sum(unit * (slope / some), along, keepdims=True) / squares))
        return jnp.max(jnp.stack(fastest))

    rates = jax.tree.leaves(jax.tree.map(largest, slope, weights))
    return jnp.max(jnp.stack(rates))


# ---------------------------------------------------------------------------------------------
# Lanes and buffers
# ---------------------------------------------------------------------------------------------


def _chosen(which: Array, new: Any, old: Any) -> Any:
    """The lanes ``which`` from ``new``, the others from ``old``."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def _row(lane: Lane) -> Rows:
    return Rows(lane.s, lane.state, lane.num_steps, lane.clock_goal, lane.steps_goal)


def _buffer(lane: Lane, rows: int, many: bool) -> Saved:
    def unwritten(leaf: Array) -> Array:
        lanes, shape = (leaf.shape[:1], leaf.shape[1:]) if many else ((), leaf.shape)
        return jnp.zeros((*lanes, rows, *shape), leaf.dtype)

    count = jnp.zeros_like(lane.num_steps)
    return Saved(jax.tree.map(unwritten, _row(lane)), count)


def _store(saved: Saved, lane: Lane, arrived: Array, many: bool) -> Saved:
    """Copy the states of the lanes that have arrived, one after the other, into their buffers."""

    def one(loop: tuple[Saved, Array]) -> tuple[Saved, Array]:
        saved, arrived = loop
        at = (jnp.argmax(arrived),) if many else ()
        index = (*at, saved.count[at])

        def put(rows: Array, values: Array) -> Array:
            return rows.at[index].set(values[at])

        rows = jax.tree.map(put, saved.rows, _row(lane))
        return Saved(rows, saved.count.at[at].add(1)), arrived.at[at].set(False)

    return jax.lax.while_loop(lambda loop: jnp.any(loop[1]), one, (saved, arrived))[0]

r"""Stepping over kinks: what a step did with the wrong gates is mended afterwards.

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
change by in that time, relatively, and a step is taken where that is within the run's tolerance.
In a narrow network, or by a tight tolerance, that is a step just behind its kink; in a wide one,
where a unit is a small part of the field, a step may pass many.

Each neuron's kinks are passed in their order, one in each *turn*; in the next turn the mended
end is the end of a step with the new gates. One hidden layer only.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.piece import NotUniqueError, Piece
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.problem.array import Array, as_array
from gflow.problem.bends import sight, violations
from gflow.problem.network import squared_norm

TURNS = 8
"""Kinks of one neuron in a step, before the step is made shorter."""

HEAVY = 0.1
"""A kink is landed on where its unit's part of the field is more than this part of that of all."""

ALLOWED = 0.3
"""What mending may leave, in units of the tolerance."""

HOPELESS = 30.0
"""Where more than this is left by a rough guess nothing is mended."""

LONGER = 3.0
"""Behind kinks a step is at most so many times longer than the last one."""

PARTS, AIM = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05), 0.1
"""Parts of a refused step that are tried next, and what may be left in them by a guess."""

MANY = 8
"""Kinks in a refused step after which the next one is made shorter beforehand."""

APART = 1e-6
"""Kinks closer than this part of a step are at one place."""

NEWTON = 12
"""Iterations on a cubic."""


class End(NamedTuple):
    """An end of a step in a pattern; speeds are those in the clock."""

    z: Any
    """(n, U), as are the next two."""
    speed: Any
    force: Any
    beyond: Any
    """See ``violations``."""
    theta: Any
    pull: Any
    rate: Any
    """Of the clock."""
    log_risk: Any
    fall: Any
    r"""$-d\log R/ds$."""


class Passed(NamedTuple):
    """A step with its kinks mended."""

    state: FlowState
    norm: float
    """Of what the mending may have left, in units of the tolerance."""
    units: dict[int, float]
    """All units that were decided about, and how long before the end of the step."""
    longest: float
    """Of a next step, whose kinks may be like these."""
    ends: tuple[End, End]
    """What was seen where the step began and, mended, where it ended."""


class Refused(NamedTuple):
    """A step whose kinks cannot be mended."""

    part: float
    """Of the step that may do."""
    first: float
    """The part of the step after which the first kink comes."""
    second: float
    """And the next one."""
    many: bool
    """Whether kinks are so many that a step of this length will not do."""


@eqx.filter_jit
def _end(field: AbstractField, s: Array, state: FlowState) -> End:
    at = sight(field.problem, state.weights)
    log_risk = field.problem.log_risk(state.weights)
    square = squared_norm(at.velocity)
    rate = field.clock.rate(s, log_risk, square)
    beyond = violations(field.problem.network.pattern, at)  # pyright: ignore
    speed, fall = rate * at.speed, rate * square
    return End(at.z, speed, at.force, beyond, at.theta, at.pull, rate, log_risk, fall)


@eqx.filter_jit
def _mended(
    field: AbstractField,
    tolerance: AbstractTolerance,
    s: Array,
    before: FlowState,
    state: FlowState,
    change: Array,
    since: Array,
    ramp: Array,
    ratio: Array,
    curved: Array,
) -> tuple[FlowState, Array]:
    """The mended end of a step, and the norm of what is left.

    Args:
        field: with the gates of the step.
        tolerance: whose norm it is.
        s, before, state: the clock at the end, and the states at both ends.
        change: of the gates, (n, U).
        since: how long ago, of each neuron, (U,).
        ramp: which neurons only left a slide, (U,).
        ratio: the relative change of the jumps in that time.
        curved: likewise of what slides that have ended differ by.
    """
    gates = field.problem.network.pattern.gates  # pyright: ignore

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
    ended = norm(jump(change * jnp.where(ramp, once, 0.0)[None, :]))
    left = ratio * of_later + curved * ended + jnp.where(several, norm(together) / 2, 0.0)
    return after, left


class Events(NamedTuple):
    """What happened first to each of k neurons in a step."""

    neuron: np.ndarray
    since: np.ndarray
    """How long before the end of the step."""
    unit: np.ndarray
    """The unit that crosses its kink, -1 where a slide ends."""
    speed: np.ndarray
    """Of its z there."""
    force: np.ndarray
    """b there."""
    side: np.ndarray
    """Where it goes, 1 or -1; for a slide that ends that of the gates."""
    ratio: np.ndarray
    """How much b and the speed change in that time, relatively."""
    turned: np.ndarray
    """Whether a slide ends since its kink begins to repel."""


class Over:
    """Stepping over the kinks of one step.

    Args:
        piece: where the step was made; its pattern is changed.
        field: of the step.
        tolerance: the run's.
        s: where it began and ended.
        states: the states there.
        start: what was seen where it began, if that is known.
        trust: how much of a rough guess there has been before.
    """

    def __init__(
        self,
        piece: Piece,
        field: AbstractField,
        tolerance: AbstractTolerance,
        s: tuple[float, float],
        states: tuple[FlowState, FlowState],
        start: End | None,
        trust: float,
    ):
        assert piece.rows is not None
        self.piece, self.field, self.tolerance = piece, field, tolerance
        self.s, self.states, self.h = s, states, s[1] - s[0]
        self.rows = piece.rows
        self.squares = np.sum(self.rows**2, 1)
        self.start = self._look(0, states[0]) if start is None else start
        self.end = self._look(1, states[1])
        first = self.end
        self.bend = (np.asarray(first.speed) - self.start.speed) / self.h
        """z'' of the step."""
        self.longest = np.full(piece.num_units, self.h)
        """How long ago the last kink of each neuron may have been that is not passed yet."""
        self.trust, self.guess = trust, 0.0
        self.units: dict[int, float] = {}
        self.flipped: set[int] = set()
        self.times = np.zeros(0)
        """Parts of the step at which first kinks come."""

    def _look(self, which: int, state: FlowState) -> End:
        return jax.device_get(_end(self.field, as_array(np.float64(self.s[which])), state))

    def go(self) -> Passed | Refused:
        """The step with its kinks mended; the pattern is what it was if that cannot be."""
        patterns, state, norm = self.piece.patterns, self.states[1], 0.0
        kept, tried = patterns.kept(), False
        for turn in range(TURNS):
            events = self._events(turn)
            if turn == 0:
                self.first, self.times = events, np.sort(1 - events.since / self.h)
            if len(events.neuron) == 0:
                self.piece.freeze()
                self.trust = self._trusted(norm) if turn > 0 else self.trust
                longer = min(0.9 * max(norm / ALLOWED, 1e-9) ** (-1 / 3), LONGER) * self.h
                return Passed(state, norm, self.units, longer, (self.start, self.end))
            hard = events.turned | self._heavy(events)
            guess = np.inf if np.any(hard) else self._roughly(events)
            if turn == 0:
                self.guess, self.hard = guess, events.since[hard]
            if guess > HOPELESS:
                norm += guess
                break
            tried = True
            try:
                state, left = self._turn(events, state)
            except NotUniqueError:  # which is said where the run has landed on it
                left = np.inf
            norm += left
            if not norm <= ALLOWED:
                break
            self.end = self._look(1, state)
        else:
            norm = np.inf
        if tried:
            patterns.put_back(kept)
            self.piece.freeze()
        ahead = [*self.times.tolist(), np.inf, np.inf]
        return Refused(self._part(norm), ahead[0], ahead[1], len(self.times) > MANY)

    def _part(self, norm: float) -> float:
        """The part of the step after which no more than is allowed is left, by the rough guess."""
        if not np.isfinite(norm):
            # What comes at one time is landed on, and so is what is not to be mended at all.
            until = 1 - np.max(self.hard) / self.h if len(self.hard) else 0.3
            return float(until) if self.times[-1] - self.times[0] > APART else 0.0
        more = norm / max(self.guess, 1e-300)
        for part in PARTS:
            if more * self._roughly(self.first, part) <= AIM:
                return part
        return PARTS[-1]

    def _heavy(self, events: Events) -> np.ndarray:
        """Which units that cross are so much of the field that their kinks are landed on."""
        push = np.abs(self.end.force) * np.sqrt(self.squares)[:, None]
        whole = np.sqrt(np.sum(push**2))
        jump = push.reshape(-1)[events.unit] * (1 - self.piece.place.lower[events.neuron])
        return (events.unit >= 0) & (jump > HEAVY * whole)

    def _trusted(self, norm: float) -> float:
        """How much of the rough guess was there, a little more of late."""
        if self.guess <= 0 or norm <= 0:
            return self.trust
        now = self.trust * min(max(2 * norm / self.guess, 0.1), 10.0)
        return float(min(max(np.sqrt(self.trust * now), 1e-4), 1.0))

    def _roughly(self, events: Events, part: float = 1.0) -> float:
        """What mending a part of the step may leave, in units of the tolerance, by its size."""
        crossing = events.unit >= 0
        since = np.maximum(events.since - (1 - part) * self.h, 0.0)
        push = np.abs(events.force) * np.sqrt(self.squares)[events.unit // self.piece.num_units]
        moved = np.where(crossing, push, 0.0) * float(self.end.rate) * since
        ratio = events.ratio * since / np.where(events.since > 0, events.since, 1.0)
        left = self.trust * moved * np.minimum(ratio + since / self.h / 10, 1.0) ** 2
        leaves = jax.tree.leaves(self.states[1].weights)
        size = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
        return float(np.linalg.norm(left) / (size * float(self.tolerance.rtol)))

    def _turn(self, events: Events, state: FlowState) -> tuple[FlowState, float]:
        """Pass the first kink of each neuron; the mended end, and the norm of what is left."""
        piece, patterns, tree_at = self.piece, self.piece.patterns, eqx.tree_at
        slid = {
            n: patterns.units_in([n]) for n in events.neuron.tolist() if n in patterns.of_neuron
        }
        patterns.open(list(slid), np.asarray(self.end.theta))
        base = patterns.frozen()
        self._decide(events, slid)
        old, new = np.asarray(base.gates), np.asarray(patterns.pattern.gates)
        since, ramp = np.zeros(piece.num_units), np.zeros(piece.num_units, bool)
        since[events.neuron], ramp[events.neuron] = events.since, events.unit < 0
        ratio, curved = (_mean(events, events.unit >= 0), _mean(events, events.unit < 0))
        field = tree_at(lambda f: f.problem.network.pattern, self.field, base)
        mended, left = _mended(
            field,
            self.tolerance,
            as_array(np.float64(self.s[1])),
            self.states[0],
            state,
            as_array(new - old),
            as_array(since),
            as_array(ramp),
            as_array(np.float64(ratio)),
            as_array(np.float64(curved)),
        )
        self.longest[events.neuron] = events.since
        self.field = tree_at(lambda f: f.problem.network.pattern, field, patterns.frozen())
        mended = jax.tree.map(np.asarray, mended)
        weights = piece.put_on_kinks(mended.weights, events.neuron.tolist())
        return FlowState(weights, mended.scaled_time), float(left)

    def _events(self, turn: int) -> Events:
        """The first kink of each neuron that is past one at the end of the step."""
        end, shape = self.end, self.end.z.shape
        slots = self.piece.patterns.slots
        past = np.nonzero(end.beyond[: end.z.size] > 1)[0]
        if self.flipped:
            past = past[~self._at_home(past)]
        points, neurons = np.divmod(past, shape[1])
        z, speed, force = (np.asarray(x)[points, neurons] for x in end[:3])
        side, longest = np.sign(z), self.longest[neurons]
        if turn == 0:
            z0, speed0, force0 = (np.asarray(x)[points, neurons] for x in self.start[:3])
            part, speed = _root(side * z0, side * speed0 * self.h, side * z, side * speed * self.h)
            since, speed = self.h * (1 - part), side * speed / self.h
            force = force0 + part * (force - force0)
            change = np.abs(end.force[points, neurons] - force0) / (np.abs(force) + 1e-300)
        else:
            since, speed = _ago(z, speed, self.bend[points, neurons], longest)
            change = np.zeros(len(past))
        bent = np.abs(self.bend[points, neurons]) * since / (np.abs(speed) + 1e-300)
        ratio = np.minimum(change * since / self.h + bent, 1.0)
        never = np.zeros(len(past), bool)
        found = [neurons, np.minimum(since, longest), past, speed, force, side, ratio, never]
        ended = self._ended(slots, turn)
        joined = [np.concatenate(pair) for pair in zip(found, ended, strict=True)]
        order = np.argsort(-joined[1], kind="stable")
        _, first = np.unique(joined[0][order], return_index=True)
        return Events(*(column[order][np.sort(first)] for column in joined))

    def _at_home(self, past: np.ndarray) -> np.ndarray:
        """Of units past their kinks those that have just crossed and are on their way."""
        on = np.asarray(self.piece.patterns.pattern.on).reshape(-1)[past]
        speed = np.asarray(self.end.speed).reshape(-1)[past]
        return np.isin(past, list(self.flipped)) & ((speed > 0) == on)

    def _ended(self, slots: int, turn: int) -> list[np.ndarray]:
        """Slides that have ended, as columns of ``Events``."""
        end, size = self.end, len(self.end.theta)
        beyond = end.beyond[end.z.size :].reshape(2, size)
        which = np.nonzero(np.max(beyond, 0) > 1)[0]
        neurons, theta = which // slots, np.asarray(end.theta)[which]
        turned, bound = beyond[1][which] > 1, np.where(theta > 1, 1.0, 0.0)
        since = self.longest[neurons]
        if turn == 0:
            over, run = np.abs(theta - bound), np.abs(theta - self.start.theta[which])
            pull, pull0 = np.asarray(end.pull)[which], np.asarray(self.start.pull)[which]
            over, run = np.where(turned, pull, over), np.where(turned, pull - pull0, run)
            since = self.h * np.minimum(over / np.where(run > 0, run, np.inf), 1.0)
        nothing, side = np.zeros(len(which)), np.where(theta > 1, 1.0, -1.0)
        units = np.full(len(which), -1)
        return [neurons, since, units, nothing, nothing, side, since / self.h, turned]

    def _decide(self, events: Events, slid: dict[int, np.ndarray]) -> None:
        """Give the neurons of events their new gates and slides.

        Args:
            events: one for each neuron.
            slid: of each neuron that slid its units that did, which are open now.
        """
        piece, patterns = self.piece, self.piece.patterns
        unit, neuron = events.unit, events.neuron
        points, crossing = unit // piece.num_units, unit >= 0
        sizes = np.array([len(slid.get(n, ())) for n in neuron.tolist()])
        alone = crossing & (sizes == 0) & (piece.num_on_ray[points] == 1)
        ending = ~crossing & (sizes == 1)
        for k in np.nonzero(~alone & ~ending)[0].tolist():
            own = slid.get(int(neuron[k]), np.zeros(0, np.int64))
            met = own
            if crossing[k]:
                same = np.nonzero(piece.ray == piece.ray[points[k]])[0]
                met = np.union1d(own, same * piece.num_units + neuron[k])
            free = set(own.tolist())
            done = piece.decide_neuron(np.asarray(self.end.force), int(neuron[k]), met, free)
            self.units |= dict.fromkeys(done, float(events.since[k]))
            if crossing[k]:
                self.flipped |= done
        left = np.array([slid[int(neuron[k])][0] for k in np.nonzero(ending)[0]], np.int64)
        patterns.gate(left, events.side[ending] > 0)
        self.units |= dict(zip(left.tolist(), events.since[ending].tolist(), strict=True))
        self.units |= dict(zip(unit[alone].tolist(), events.since[alone].tolist(), strict=True))
        # By one-sided speeds, that of the other side being `other`.
        lower, speed, side = piece.place.lower[neuron], events.speed, events.side
        push = events.force * self.squares[points] * float(self.end.rate)
        other = speed + side * (1 - lower) * push
        crosses = alone & (other * side > 0)
        patterns.gate(unit[crosses], side[crosses] > 0)
        self.flipped |= set(unit[crosses].tolist())
        slides = alone & ~crosses
        gate = np.where(side > 0, lower, 1.0) - speed / np.where(push == 0, -np.inf, push)
        theta = np.clip((gate - lower) / (1 - lower), 0.0, 1.0)
        patterns.slide_singly(unit[slides], theta[slides], events.force[slides])


def _mean(events: Events, which: np.ndarray) -> float:
    """The root mean square of the ratios of some events, weighted by what is mended of them."""
    weight = np.where(which, events.since**2, 0.0)
    return np.sqrt(np.sum((weight * events.ratio) ** 2) / max(np.sum(weight**2), 1e-300))


# The cubic through values a and b and slopes c and d at 0 and 1, a <= 0 < b.
def _root(a: Any, c: Any, b: Any, d: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where in [0, 1] cubics of Hermite pass zero, and their slopes there."""
    p, q = 3 * (b - a) - 2 * c - d, c + d - 2 * (b - a)
    low, high = np.zeros_like(b), np.ones_like(b)
    x = np.clip(-a / np.where(b > a, b - a, 1.0), 0.0, 1.0)
    for _ in range(NEWTON):
        value, slope = a + x * (c + x * (p + x * q)), c + x * (2 * p + 3 * x * q)
        low, high = np.where(value < 0, x, low), np.where(value < 0, high, x)
        new = x - value / np.where(slope == 0, 1.0, slope)
        x = np.where((new >= low) & (new <= high), new, (low + high) / 2)
    return x, c + x * (2 * p + 3 * x * q)


def _ago(z: Any, speed: Any, bend: Any, longest: Any) -> tuple[np.ndarray, np.ndarray]:
    """How long ago z was zero that bends like this, at most so long, and its speed there."""
    out, along = np.abs(z), speed * np.sign(z)
    bend = bend * np.sign(z)
    root = np.sqrt(np.maximum(along**2 - 2 * bend * out, 0.0))
    whole = along + root
    since = np.minimum(2 * out / np.where(whole > 0, whole, 1e-300), longest)
    return since, (along - bend * since) * np.sign(z)

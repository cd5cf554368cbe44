r"""Stepping over kinks: what a step did with the wrong gates is mended afterwards.

A step is made in one pattern of gates, ``crossings.py`` finds when units passed their kinks in it,
and ``mending.py`` adds what the right gates would have done since. It is taken where what that
leaves is within the run's tolerance. In a narrow network, or by a tight tolerance, that is a step
just behind its kink; in a wide one, where a unit is a small part of the field, a step may pass
many.

Each neuron's kinks are passed in their order, one in each *turn*; in the next turn the mended
end is the end of a step with the new gates. One hidden layer only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.crossings import Events, how_long_ago, mean_ratio
from gflow.dynamics.kinks.cubic import root_of_cubic
from gflow.dynamics.kinks.mending import End, mended, seen_at
from gflow.dynamics.kinks.piece import NotUniqueError, Piece
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.problem.array import as_array

TURNS = 8
"""Kinks of one neuron in a step, before the step is made shorter."""

HEAVY = 0.1
"""A kink is landed on where its unit's part of the field is more than this part of that of all."""

ALLOWED = 0.3
"""What mending may leave, in units of the tolerance."""

HOPELESS = 30.0
"""Where more than this is left by a rough guess nothing is mended."""

SAFETY, LONGER = 0.8, 3.0
"""Behind kinks a step is this part of what the last ones would allow, and at most so many times
longer than the last. With 0.9 one step in five of 20,000 neurons is refused, with 0.8 one in ten,
and no more are made."""

PARTS, AIM = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05), 0.1
"""Parts of a refused step that are tried next, and what may be left in them by a guess."""

MANY = 8
"""Kinks in a refused step after which the next one is made shorter beforehand."""

APART = 1e-6
"""Kinks closer than this part of a step are at one place."""


class Passed(NamedTuple):
    """A step with its kinks mended."""

    state: FlowState
    memory: Any
    """Of the solver there."""
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


class Over:
    """Stepping over the kinks of one step.

    Args:
        piece: where the step was made; its pattern is changed.
        by: the field of the step, its solver, and the run's tolerance.
        s: where it began and ended.
        states: the states there.
        start: what was seen where it began, if that is known.
        trust: how much of a rough guess there has been before.
        may_end: whether a step may end in a state.
    """

    def __init__(
        self,
        piece: Piece,
        by: tuple[AbstractField, AbstractMethod, AbstractTolerance],
        s: tuple[float, float],
        states: tuple[FlowState, FlowState],
        start: End | None,
        trust: float,
        may_end: Callable[[FlowState], bool],
    ):
        assert piece.rows is not None
        self.piece, (self.field, self.method, self.tolerance) = piece, by
        self.memory: Any = None
        """Of the solver at the end, once that is mended."""
        self.s, self.states, self.h = s, states, s[1] - s[0]
        self.rows = piece.rows
        self.squares = np.sum(self.rows**2, 1)
        self.start = self._look(0, states[0]) if start is None else start
        self.end = self._look(1, states[1])
        self.whole = self.end
        """What was seen where it ended before anything was mended."""
        self.longest = np.full(piece.num_units, self.h)
        """How long ago the last kink of each neuron may have been that is not passed yet."""
        self.trust, self.guess, self.may_end = trust, 0.0, may_end
        self.units: dict[int, float] = {}
        self.flipped: set[int] = set()
        self.times = np.zeros(0)
        """Parts of the step at which first kinks come."""

    def _look(self, which: int, state: FlowState) -> End:
        return jax.device_get(
            seen_at(self.field, as_array(np.float64(self.s[which])), state, few=self.piece.few)
        )

    def go(self) -> Passed | Refused:
        """The step with its kinks mended; the pattern is what it was if that cannot be."""
        patterns, state, norm = self.piece.patterns, self.states[1], 0.0
        kept, tried = patterns.kept(), False
        for turn in range(TURNS):
            events = self._events(turn)
            if turn == 0:
                self.first, self.times = events, np.sort(1 - events.since / self.h)
            if len(events.neuron) == 0:
                if turn > 0 and not self.may_end(state):
                    norm = np.inf
                    break
                self.piece.freeze()
                self.trust = self._trusted(norm) if turn > 0 else self.trust
                longer = min(SAFETY * max(norm / ALLOWED, 1e-9) ** (-1 / 3), LONGER) * self.h
                ends = self.start, self.end
                return Passed(state, self.memory, norm, self.units, longer, ends)
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
            # What comes at one time is landed on, and so is what is not to be mended at all: the
            # step ends halfway between it and the kink before it, and it is the first of the next.
            if self.times[-1] - self.times[0] <= APART:
                return 0.0
            if len(self.hard) == 0:
                return 0.3
            until = 1 - np.max(self.hard) / self.h
            before = self.times[self.times < until - APART]
            return float(before[-1] + until) / 2 if len(before) else 0.0
        more = norm / max(self.guess, 1e-300)
        for part in PARTS:
            if more * self._roughly(self.first, part) <= AIM:
                return part
        return PARTS[-1]

    def _bend(self, points: np.ndarray, neurons: np.ndarray) -> np.ndarray:
        """The second derivative of z of units in the step."""
        ends = (np.asarray(at.speed)[points, neurons] for at in (self.whole, self.start))
        return np.subtract(*ends) / self.h

    def _heavy(self, events: Events) -> np.ndarray:
        """Which units that cross are so much of the field that their kinks are landed on."""
        force = np.asarray(self.end.force)
        whole = np.sqrt(np.einsum("iu,iu->i", force, force) @ self.squares)
        points = events.unit // self.piece.num_units
        push = np.abs(force[points, events.neuron]) * np.sqrt(self.squares)[points]
        jump = push * (1 - self.piece.place.lower[events.neuron])
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
        if slid:  # else the pattern is where it has been put already
            patterns.open(list(slid), np.asarray(self.end.theta))
        base = patterns.frozen()
        self._decide(events, slid)
        since, ramp = np.zeros(piece.num_units), np.zeros(piece.num_units, bool)
        since[events.neuron], ramp[events.neuron] = events.since, events.unit < 0
        ratio, curved = (mean_ratio(events, events.unit >= 0), mean_ratio(events, events.unit < 0))
        after, self.memory, left, seen = mended(
            tree_at(lambda f: f.problem.network.pattern, self.field, base),
            self.method,
            self.tolerance,
            as_array(np.float64(self.s[1])),
            as_array(np.float64(self.h)),
            self.states[0],
            state,
            patterns.frozen(),
            as_array(since),
            as_array(np.argsort(-np.where(ramp, since / 2, since), kind="stable")),
            as_array(ramp),
            as_array(np.float64(ratio)),
            as_array(np.float64(curved)),
            few=piece.few,
        )
        self.longest[events.neuron] = events.since
        self.end, left = jax.device_get((seen, left))
        return after, float(left)

    def _events(self, turn: int) -> Events:
        """The first kink of each neuron that is past one at the end of the step."""
        end, shape = self.end, self.end.z.shape
        slots = self.piece.patterns.slots
        past = np.nonzero(np.asarray(end.past).reshape(-1))[0]
        if self.flipped:
            past = past[~self._at_home(past)]
        points, neurons = np.divmod(past, shape[1])
        z, speed, force = (np.asarray(x)[points, neurons] for x in end[:3])
        side, longest, bend = np.sign(z), self.longest[neurons], self._bend(points, neurons)
        if turn == 0:
            z0, speed0, force0 = (np.asarray(x)[points, neurons] for x in self.start[:3])
            part, speed = root_of_cubic(
                side * z0, side * speed0 * self.h, side * z, side * speed * self.h, np
            )
            since, speed = self.h * (1 - part), side * speed / self.h
            force = force0 + part * (force - force0)
            change = np.abs(end.force[points, neurons] - force0) / (np.abs(force) + 1e-300)
        else:
            since, speed = how_long_ago(z, speed, bend, longest)
            change = np.zeros(len(past))
        bent = np.abs(bend) * since / (np.abs(speed) + 1e-300)
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
        end, beyond = self.end, np.asarray(self.end.ended)
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

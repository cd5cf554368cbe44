"""The kinks of a run: its pattern, what happened at each kink, and what it proves by that."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.mending import End
from gflow.dynamics.kinks.over import Over, Passed, Refused
from gflow.dynamics.kinks.patterns import Slide
from gflow.dynamics.kinks.piece import Piece, StuckError
from gflow.dynamics.march.lane import Lane
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.problem.array import Array, as_array
from gflow.problem.network import AbstractNetwork
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights, squared_norm

CROSSED, SLID, LEFT, STEPPED_OVER = 0, 1, 2, 3
"""What happened to a unit at a kink: it crossed, began to slide, left a slide, or crossed in a step
that was mended."""


class Happened(NamedTuple):
    """One entry of the log of kinks."""

    log_time: float
    log_risk: float
    step: int
    layer: int
    neuron: int
    point: int
    event: int


@eqx.filter_jit
def _balance_drift(network: AbstractNetwork, weights: Weights, start: Weights) -> Array:
    """The largest change of a balance in units of |W|^2, of each of a block of weights."""

    def one(at: Weights) -> Array:
        now, before = network.balances(at), network.balances(start)
        assert now is not None
        assert before is not None
        return jnp.max(jnp.abs(now - before)) / squared_norm(at)

    return jax.vmap(one)(weights)


SAME, STUCK = 1e-13, 50
"""So many kinks in a row within the first part of the clock's value are a circle."""


class Moment(NamedTuple):
    """Where a run stands, as the log of kinks has it."""

    log_time: float
    log_risk: float
    step: int


def moment(clock: AbstractClock, s: Any, state: FlowState, log_risk: Any, step: int) -> Moment:
    """Where a run stands; by its clock, where that knows the time, which t R is round-off for."""
    time = clock.log_time_at(as_array(np.float64(s)))
    if time is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            time = np.log(np.asarray(state.scaled_time)) - float(log_risk)
    return Moment(float(time), float(log_risk), step)


class Kinked:
    """The kinks of one run.

    Args:
        problem: with a network that has kinks.
        weights: the start.
        piece: that it begins in.
    """

    def __init__(self, problem: Problem, weights: Weights, piece: Piece):
        self.problem, self.start, self.piece = problem, weights, piece
        self.log: list[Happened] = []
        self.num_kinks, self.num_patterns, self.num_stepped_over = 0, 1, 0
        self.num_joint = 0
        """Pieces on which units of several layers slide at one point."""
        self.last_s, self.repeated = -1e300, 0
        self.trust = 1.0
        """How much of what a rough guess says is left of mended kinks there is, of late."""
        self.seen: tuple[float, int, End] | None = None
        """What was seen behind the last kinks that were stepped over: at which clock value, in
        which pattern, and what."""

    @classmethod
    def of(cls, problem: Problem, weights: Weights) -> "Kinked | None":
        """The kinks of a run at its start; None for a network that has none that gflow knows."""
        bends = problem.network.kinks(weights, problem.data)
        if bends is None:
            return None
        return cls(problem, weights, Piece(problem, bends, weights, problem.network.branch_side()))

    @property
    def here(self) -> Problem:
        """The problem in the pattern that the run is in."""
        return self.piece.here

    @property
    def num_sliding(self) -> int:
        """How many units slide."""
        return int(np.count_nonzero(self.piece.patterns.pattern.tie))

    def facts(self) -> dict[str, Any]:
        """What a record says of the kinks."""
        over = self.num_stepped_over
        return {
            "kinks": "located" if over == 0 else "located, or mended within the tolerance",
            "num_patterns": self.num_patterns,
            "num_stepped_over": over,
            "num_joint_slides": self.num_joint,
            "homogeneity": self.problem.network.degree(self.start),
            **self._small_start(),
        }

    def _small_start(self) -> dict[str, Any]:
        """What is known of the margin's limit, if the start is small enough."""
        known = self.problem.network.small_start(self.start, self.problem.data)
        if known is None:
            return {}
        return {
            "small_start_slope": known.slope,
            "small_start_margin": known.margin,
            "small_start_obstacles": "; ".join(known.obstacles) or None,
        }

    def at_points(self, weights: Weights, count: int) -> dict[str, np.ndarray]:
        """What a record holds of the kinks at each of some points in this pattern."""
        found = {
            "num_kinks": np.full(count, self.num_kinks),
            "num_sliding": np.full(count, self.num_sliding),
        }
        if self.problem.network.balances(self.start) is not None:
            drift = _balance_drift(self.problem.network, weights, self.start)
            found["balance_drift"] = np.asarray(drift)[:count]
        return found

    def log_of_kinks(self) -> dict[str, np.ndarray]:
        """What happened at the kinks, as variables of a record."""
        if not self.log:
            return {}
        columns = zip(Happened._fields, zip(*self.log, strict=True), strict=True)
        return {f"kink_{name}": np.array(values) for name, values in columns}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds of the kinks: facts, and states by name."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        slides = self.piece.patterns.slides.values()
        facts["slots"] = self.piece.patterns.slots
        facts["slides"] = [
            [slide.units.tolist(), slide.alpha.tolist(), slide.theta] for slide in slides
        ]
        log = np.array([list(entry) for entry in self.log], np.float64)
        log = log.reshape(-1, len(Happened._fields))
        return facts, {"pattern": self.piece.patterns.frozen(), "log_of_kinks": {"": log}}

    def restore(self, facts: dict[str, Any], read: Callable[[str, Any], Any]) -> None:
        """Stand where a snapshot was taken."""
        for name in _FACTS:
            setattr(self, name, facts[name])
        log = read("log_of_kinks", {"": np.zeros(0)})[""]
        self.log = [Happened(*row[:2], *map(int, row[2:])) for row in log.tolist()]
        slides = {
            units[0]: Slide(np.array(units), np.array(alpha), theta)
            for units, alpha, theta in facts["slides"]
        }
        self.piece.patterns.restore(facts["slots"], slides, lambda like: read("pattern", like))
        self.piece.freeze()

    # ---------------------------------------------------------------------------------------------
    # At a kink
    # ---------------------------------------------------------------------------------------------

    def begin(self, weights: Weights) -> None:
        """Decide about units that begin on their kinks."""
        free = self.piece.look(weights).near
        if np.any(free):
            self.piece.settle(weights, np.nonzero(free.reshape(-1))[0], start=True)

    def pass_(self, weights: Weights, s: float, at: Moment) -> Weights:
        """Go past the kink that the weights are at; where to go on from.

        Raises:
            NotUniqueError: where the flow is not unique.
            StuckError: where no way on is found.
        """
        before, seen = self._gates(), self.piece.look(weights)
        past = seen.past.reshape(-1)
        near = seen.near.reshape(-1) & ~before[1].reshape(-1)
        units = np.nonzero(near | past | self.piece.ended(seen.at))[0]
        weights, touched = self.piece.settle(weights, units, start=False)
        self._note(((unit, at) for unit in touched), before, CROSSED)
        self.repeated = self.repeated + 1 if s - self.last_s <= SAME * max(1.0, abs(s)) else 0
        self.last_s = s
        if self.repeated > STUCK:
            raise StuckError(f"{STUCK} kinks in a row at one place")
        return weights

    def over(
        self,
        field: AbstractField,
        method: AbstractMethod,
        tolerance: AbstractTolerance,
        lane: Lane,
        may_end: Callable[[FlowState], bool],
    ) -> Passed | Refused | None:
        """Step over the kinks in the last step of a lane, if the tolerance allows that.

        Args:
            field, method, tolerance, lane: of the run.
            may_end: whether the step may end in a state, its kinks mended.

        Returns:
            None for several hidden layers, where every kink is landed on.
        """
        if self.piece.rows is None:
            return None
        s0, state0, _ = lane.began
        before, ends = self._gates(), (float(s0), float(lane.s))
        if not ends[1] > ends[0]:
            return None
        last, self.seen = self.seen, None
        seen = None
        if last is not None and last[:2] == (ends[0], self.num_patterns):
            seen = last[2]
        states = state0, lane.state
        by = field, method, tolerance
        step = Over(self.piece, by, ends, states, seen, self.trust, may_end)
        found = step.go()
        self.trust = step.trust
        if isinstance(found, Passed) and found.units:
            steps, whole = int(lane.num_steps), ends[1] - ends[0]
            begin, end = (
                moment(field.clock, s, state, look.log_risk, steps)
                for s, state, look in zip(ends, (state0, found.state), found.ends, strict=True)
            )
            units, since = np.array(list(found.units)), np.array(list(found.units.values()))
            order = np.lexsort((units, -since))
            when = _between(begin, end, since[order] / whole)
            count = self.num_kinks
            self._note(zip(units[order].tolist(), when, strict=True), before, STEPPED_OVER)
            self.num_stepped_over += self.num_kinks - count
            self.last_s, self.repeated = ends[1], 0
            self.seen = ends[1], self.num_patterns, found.ends[1]
        return found

    def _gates(self) -> tuple[np.ndarray, np.ndarray]:
        """Which units are above their kinks, and which slide."""
        pattern = self.piece.patterns.frozen()
        return np.asarray(pattern.on), np.asarray(pattern.tie) > 0

    def _note(
        self,
        units: Iterable[tuple[int, Moment]],
        before: tuple[np.ndarray, np.ndarray],
        crossed: int,
    ) -> None:
        """Write down what happened to units since they were as ``before`` has them."""
        (on, slid), (now, slides) = before, self._gates()
        place = self.piece.place
        for unit, at in units:
            point, u = divmod(int(unit), self.piece.num_units)
            if slides[point, u] and not slid[point, u]:
                event = SLID
            elif slid[point, u] and not slides[point, u]:
                event = LEFT
            elif not slides[point, u] and now[point, u] != on[point, u]:
                event = crossed
            else:
                continue
            layer, neuron = int(place.layer[u]), int(place.neuron[u])
            self.log.append(Happened(*at, layer, neuron, point, event))
            self.num_kinks += 1
        self.num_patterns += 1
        self.num_joint += self.piece.joint()


def _between(begin: Moment, end: Moment, back: np.ndarray) -> list[Moment]:
    """The moments at parts of a step, (k,), before its end."""
    with np.errstate(divide="ignore"):
        parts = np.log(back), np.log(1 - back)
    log_time = np.logaddexp(begin.log_time + parts[0], end.log_time + parts[1])
    log_risk = np.full(len(back), end.log_risk)
    if np.isfinite(end.log_risk):
        log_risk += back * (begin.log_risk - end.log_risk)
    return [Moment(*at, end.step) for at in zip(log_time.tolist(), log_risk.tolist(), strict=True)]


_FACTS = (
    "num_joint",
    "num_kinks",
    "num_stepped_over",
    "num_patterns",
    "last_s",
    "repeated",
    "trust",
)

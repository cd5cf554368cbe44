"""The last leg of a flow: split coordinates, beyond what float64 weights can hold."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.drive.drive import AbstractLanes
from gflow.dynamics.drive.events import Event
from gflow.dynamics.drive.recorder import Recorder
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.split.state import SplitState
from gflow.dynamics.stops import AbstractRule, Coordinates
from gflow.problem.array import as_array
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    from gflow.dynamics.drive.flow_run import FlowRun

SLACK = 1e-12
"""Rounding allowed for in a progress that a run has been brought to."""


class SplitLane(AbstractLanes):
    """The place of one flow in split coordinates: they are NumPy's, and go one at a time."""

    def __init__(self) -> None:
        super().__init__(1)

    def seat(self, places: Sequence[int]) -> None:
        self.seats[0].seated = True

    def advance(self, waiting: bool) -> "list[tuple[FlowRun, tuple]]":
        return [(self.seats[0], (None,))]


class OnSplit:
    """A flow in split coordinates.

    Args:
        solver: of split coordinates.
        state: where it stands.
        before: steps of the legs before this one.
    """

    def __init__(self, solver: SlowManifold, state: SplitState, before: int):
        self.solver, self.state, self.before = solver, state, before

    @classmethod
    def of(
        cls,
        solver: SlowManifold,
        problem: Problem,
        weights: tuple[np.ndarray, ...],
        log_time: float,
        imbalance: tuple[np.ndarray, ...],
        num_steps: int,
    ) -> "OnSplit":
        """The flow that goes on from weights, after ``num_steps`` steps."""
        state = solver.start(problem, weights, log_time=log_time, imbalance=imbalance)
        return cls(solver, state, num_steps - state.num_steps)

    @property
    def name(self) -> str:
        """As a record names the solver."""
        return type(self.solver).__name__

    @property
    def weights(self) -> Weights:
        """The weights where the run stands, rounded to float64."""
        return tuple(self.state.weights())

    @property
    def num_steps(self) -> int:
        """Accepted steps so far, those of the legs before this one included."""
        return self.before + self.state.num_steps

    def record(self, recorder: Recorder, clock: AbstractClock) -> None:
        """Record the point, with observables right where those of the rounded weights are not."""
        state = self.state
        columns = {
            **observables(state),
            "log_time": np.float64(state.log_time),
            "num_steps": np.int64(self.num_steps),
            "clock_error": np.float64(0.0),  # the clock is the risk itself
            "clock_value": np.float64(clock.read(state.log_risk, state.log_time)),
            "beyond_hand_over": np.True_,
        }
        recorder.add_one(self.weights, columns)

    def progress(self, rule: AbstractRule) -> float:
        """How far the run is in the coordinate of ``rule``."""
        return self._progress(self.state, rule)

    def advance(self, events: Sequence[Event], max_steps: int) -> Event | End | None:
        """Go on to the first of ``events``: which, or why none was reached; None on the way.

        Args:
            events: the point to record next, and the other stopping rules.
            max_steps: of the run as a whole.
        """
        for event in events:
            if self._met(event):
                return event
        if self.num_steps >= max_steps:
            return Reason.MAX_STEPS.end(steps=max_steps, rule=events[0].rule)
        by_risk = [event for event in events if event.rule.of_risk]
        others = [event for event in events if not event.rule.of_risk]
        end = max((-np.sinh(event.progress) for event in by_risk), default=-1e140)

        def ahead(state: SplitState) -> float:
            return max(self._progress(state, event.rule) - event.progress for event in others)

        longest, pieces = np.inf, events[0].pieces
        if pieces > 1:  # log t is s up to its logarithm
            first = min(math.sinh(e.progress) if e in by_risk else e.progress for e in events)
            longest = max(np.log(first / self.state.minus_log_risk), 1e-3) / pieces
        tries = max(1, min(self.solver.max_steps, max_steps - self.num_steps))
        walked = self.solver.walk(self.state, end, ahead if others else None, longest, tries)
        self.state = walked.state
        if walked.spent:
            return Reason.MAX_STEPS.end(steps=max_steps, rule=events[0].rule)
        for event in events:
            if self._met(event):
                return event
        if walked.arrived:
            return Reason.SPLIT_ENDS.end(log_risk=self.state.log_risk)
        return None

    def _met(self, event: Event) -> bool:
        met = self.progress(event.rule) - event.progress
        return bool(met >= -SLACK * max(1.0, abs(event.progress)))

    def _progress(self, state: SplitState, rule: AbstractRule) -> float:
        small = {}
        if rule.variable is not None:
            small[rule.variable] = np.max(observables(state)[rule.variable], initial=0.0)
        at = Coordinates(
            log_risk=as_array(np.float64(state.log_risk)),
            log_time=as_array(np.float64(state.log_time)),
            num_steps=as_array(np.int64(self.before + state.num_steps)),
            small=small,
        )
        return float(rule.progress(at))

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its state."""
        return {"before": self.before, **self.state.facts()}

    @classmethod
    def restored(
        cls, solver: SlowManifold, state: SplitState, facts: Mapping[str, Any]
    ) -> "OnSplit":
        """The run of a checkpoint."""
        return cls(solver, state, int(facts["before"]))

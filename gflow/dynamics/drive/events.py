"""What a run is to do on its way: record a point, stop, or go on in another way."""

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.stops import AbstractRule, LogRisk, LogTime, progress_of, save_grid
from gflow.problem.risk import Problem, risk_and_slope
from gflow.problem.weights import Weights

NO_STEP_COUNT = int(np.iinfo(np.int64).max)

SAME = 1e-9
"""Clock values so close, relatively, are one: a clock lands on a risk up to the integration error
of the risk itself."""


class Action(enum.Enum):
    """What happens at an event."""

    SAVE = enum.auto()
    """The point is recorded, and the run goes on."""
    STOP = enum.auto()
    """The point is recorded, and the run is over: a stopping rule is met."""
    COMPARE = enum.auto()
    """A second way of going on begins here, to be compared with the first at the hand-over."""
    HAND_OVER = enum.auto()
    """The run goes on with the next solver of its plan."""
    SADDLE = enum.auto()
    """The run goes on if the slope is that of no saddle."""
    WALL = enum.auto()
    """Float64 weights end here."""
    KINK = enum.auto()
    """The network has a kink here, behind which the run goes on in another pattern of gates."""

    @property
    def passes(self) -> bool:
        """Whether a run goes on as it was, so that it need not stop there."""
        return self in (Action.SAVE, Action.COMPARE)

    @property
    def saves(self) -> bool:
        """Whether the point is recorded."""
        return self in (Action.SAVE, Action.STOP)


class Event(NamedTuple):
    """An action where a rule has made some progress, in the terms of a run's clock."""

    rule: AbstractRule
    progress: float
    action: Action
    clock: float
    """The clock's value there, infinite when the clock cannot know it."""
    steps: int
    """The number of steps there, when the rule counts them."""
    pieces: int = 1
    """No step towards it is longer than one of so many equal pieces of the way."""

    @classmethod
    def of(
        cls, rule: AbstractRule, progress: float, action: Action, clock: AbstractClock | None
    ) -> "Event":
        """Where ``rule`` has made this ``progress``; descent has no clock."""
        return cls.each(rule, [progress], action, clock)[0]

    @classmethod
    def each(
        cls,
        rule: AbstractRule,
        progress: Sequence[float],
        action: Action,
        clock: AbstractClock | None,
    ) -> "list[Event]":
        """The same for several values of the progress."""
        at = np.asarray(progress, dtype=np.float64)
        steps, values = rule.steps_at(at), None if clock is None else rule.clock_value(at, clock)
        columns = [
            at.tolist(),
            [math.inf] * len(at) if values is None else values.tolist(),
            [NO_STEP_COUNT] * len(at) if steps is None else steps.tolist(),
        ]
        return [cls(rule, p, action, c, n) for p, c, n in zip(*columns, strict=True)]

    @classmethod
    def at(cls, clock_value: float, pieces: int, clock: AbstractClock) -> "Event":
        """A point to record where the clock has this value."""
        s = np.float64(clock_value)
        log_risk, log_time = clock.log_risk_at(s), clock.log_time_at(s)
        rule = LogRisk(float(log_risk)) if log_risk is not None else None
        if rule is None:
            assert log_time is not None  # a clock follows the one or the other
            rule = LogTime(float(log_time))
        return cls(rule, rule.goal, Action.SAVE, float(s), NO_STEP_COUNT, pieces)

    @property
    def counts(self) -> bool:
        """Whether the rule counts steps."""
        return self.steps < NO_STEP_COUNT

    @property
    def watched(self) -> bool:
        """Whether only looking after each step can tell that the rule is met."""
        return math.isinf(self.clock) and not self.counts


class AtStart(NamedTuple):
    """What is known of a start."""

    log_risk: float
    slope: float
    r"""$|\nabla\log R|$."""

    @classmethod
    def of(cls, problem: Problem, weights: Weights) -> "AtStart":
        log_risk, squared = risk_and_slope(problem, weights)
        return cls(float(log_risk), math.sqrt(float(squared)))


class Course(NamedTuple):
    """All that a run is to do on its way because its caller asks for it."""

    saves: list[Event]
    """Points to record after the start; the last is the leading rule's goal."""
    ends: list[Event]
    """The other stopping rules."""
    end: End | None
    """How the run has ended, if a rule is met at the start."""


def course(
    problem: Problem,
    weights: Weights,
    rules: Sequence[AbstractRule],
    save: int | Sequence[float] | np.ndarray,
    clock: AbstractClock | None,
    at_start: AtStart,
) -> Course:
    """The course of a run from weights at time zero.

    Args:
        problem, weights: where it begins.
        rules: the stopping rules, the leading one first.
        save: the points to record, in the leading rule's coordinate: see ``stops.save_grid``.
        clock: of a flow; None for descent.
        at_start: the risk and the slope there.

    Raises:
        ValueError: when ``save`` does not fit the leading rule.
    """
    lead, *others = rules
    standing = progress_of(rules, problem, weights, at_start.log_risk, 0.0, 0)
    met = [rule for rule, at in zip(rules, standing, strict=True) if at >= rule.goal]
    if met:
        return Course([], [], Reason.REACHED_AT_START.end(rule=met[0]))
    *passed, last = save_grid(lead, standing[0], save)
    saves = Event.each(lead, [*passed, last], Action.SAVE, clock)
    saves[-1] = saves[-1]._replace(action=Action.STOP)
    ends = [Event.of(rule, rule.goal, Action.STOP, clock) for rule in others]
    return Course(saves, ends, None)

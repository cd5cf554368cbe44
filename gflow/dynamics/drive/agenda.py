"""The events ahead of a flow, as the march takes them: clock values, counts of steps, watched."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gflow.dynamics.drive.events import NO_STEP_COUNT, SAME, Event
from gflow.dynamics.march.lane import Goals
from gflow.problem.array import as_array


class Agenda:
    """What a flow is to do on its leg, in the order in which it comes to it.

    Args:
        saves: the points to record that are still ahead, in order.
        others: all other events.
        s: the clock's value where the flow stands.
        max_steps: of the run as a whole.

    Attributes:
        watched: events that neither the clock nor a count foretells: of the saved points the next.
    """

    def __init__(self, saves: Sequence[Event], others: Sequence[Event], s: float, max_steps: int):
        ahead = [*saves, *others]
        self.by_clock = _to_the_first_stop(_by_clock(ahead))
        counted = sorted((event for event in ahead if event.counts), key=lambda event: event.steps)
        self.by_steps = _to_the_first_stop([(event.steps, [event]) for event in counted])
        lead = [event for event in saves[:1] if event.watched]
        self.watched = [*lead, *(event for event in others if event.watched)]
        self.passed, self.from_s, self.max_steps = (0, 0), s, max_steps
        self._goals: Goals | None = None

    def goals(self, window: int) -> Goals:
        """The next goals, one more than the march can save: an attempt knows where it leads."""
        if self._goals is None:
            self._goals = self._ahead(window + 1)
        return self._goals

    def passing(self, clock_goal: int, steps_goal: int) -> list[Event]:
        """The events up to these numbers of goals that were ahead until now."""
        met = [
            *self.by_clock[self.passed[0] : clock_goal],
            *self.by_steps[self.passed[1] : steps_goal],
        ]
        self.passed, self._goals = (clock_goal, steps_goal), None
        return [event for _, events in met for event in events]

    def _ahead(self, size: int) -> Goals:
        first, second = self.passed
        clock = self.by_clock[first : first + size]
        steps = self.by_steps[second : second + size]
        before = [self.by_clock[first - 1][0] if first else self.from_s]
        before += [value for value, _ in clock]
        longest = []
        for start, (value, events) in zip(before, clock, strict=False):
            pieces = max(event.pieces for event in events)
            longest.append((value - start) / pieces if pieces > 1 else math.inf)

        def filled(values: list[Any], nothing: Any) -> Any:
            return as_array(
                np.array(values + [nothing] * (size - len(values)), dtype=type(nothing))
            )

        return Goals(
            clock=filled([value for value, _ in clock], math.inf),
            steps=filled([value for value, _ in steps], NO_STEP_COUNT),
            first=as_array(np.array(self.passed)),
            count=as_array(np.array([len(self.by_clock), len(self.by_steps)])),
            events=as_array(np.array([event.progress for event in self.watched])),
            longest=filled(longest, math.inf),
            max_steps=as_array(np.array(self.max_steps)),
        )


Groups = list[tuple[Any, list[Event]]]
"""Events that happen at one place, with the clock's value or the count of steps there."""


def _by_clock(ahead: Sequence[Event]) -> Groups:
    """Events by the clock's value; what is no saved point joins one that is as good as there."""
    groups: Groups = []
    for event in sorted((e for e in ahead if math.isfinite(e.clock)), key=lambda e: e.clock):
        last, events = groups[-1] if groups else (-math.inf, [])
        close = event.clock - last <= SAME * max(1.0, abs(event.clock))
        saves = event.action.saves and any(each.action.saves for each in events)
        if close and not (saves and event.clock > last):
            groups[-1] = (event.clock if event.action.saves else last, [*events, event])
        else:
            groups.append((event.clock, [event]))
    return groups


def _to_the_first_stop(groups: Groups) -> Groups:
    """The events up to the first at which a run does not simply go on."""
    for i, (_, events) in enumerate(groups):
        if not all(event.action.passes for event in events):
            return groups[: i + 1]
    return groups

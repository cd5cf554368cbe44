"""A flow of a network with kinks: the pieces between them, one after the other."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gflow.dynamics.drive.checkpoint import Snapshot
from gflow.dynamics.drive.events import NO_STEP_COUNT, SAME, Action, Event
from gflow.dynamics.drive.flow_lanes import Report, Stand
from gflow.dynamics.drive.flow_run import FlowRun, Plan
from gflow.dynamics.drive.recorder import Recorder
from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.kinked import Kinked, moment
from gflow.dynamics.kinks.landing import PAST, land_on_kink
from gflow.dynamics.kinks.over import Passed
from gflow.dynamics.kinks.piece import NotUniqueError, StuckError
from gflow.dynamics.march.lane import Lane, gone_on_from
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.reasons import Reason
from gflow.problem.array import Array, as_array
from gflow.problem.risk import risk_and_slope
from gflow.problem.weights import Weights
from gflow.programs import by_size

LEAST_PART = 1e-3
"""Of a step that has met many kinks, to be tried next: the next one may be where the run stands."""

_KINK = Event(PAST, 1.0, Action.KINK, math.inf, NO_STEP_COUNT)
"""The run has passed a kink of its network."""


def flow_run(plan: Plan, recorder: Recorder, *run: Any, **options: Any) -> FlowRun:
    """The run of a flow, piece by piece if its network has kinks that gflow knows.

    Args:
        plan, recorder, *run, **options: as for ``FlowRun``.
    """
    kinked = Kinked.of(plan.field.problem, recorder.start) if plan.methods else None
    if kinked is None:
        return FlowRun(plan, recorder, *run, **options)
    return PiecewiseRun(kinked, plan, recorder, *run, **options)


class PiecewiseRun(FlowRun):
    """A flow that is smooth but for kinks of its network, at which its field changes.

    Args:
        kinked: the kinks, at the start.
        *run, **options: as for ``FlowRun``.
    """

    always = (_KINK,)
    most_rows = 8  # most calls of the march end at a kink soon, and each clears its buffer

    def __init__(self, kinked: Kinked, *run: Any, **options: Any):
        self.kinked = kinked
        super().__init__(*run, **options)

    def _prepare(self) -> None:
        """Decide about units that begin on their kinks, and follow the pattern of the start."""
        if self.end is not None:
            return
        try:
            self.kinked.begin(self._stand.state.weights)
        except NotUniqueError as error:
            self.end = Reason.NOT_UNIQUE.end(why=error)
        except StuckError as error:
            self.end = Reason.STUCK.end(why=error, log_risk=math.nan)
        self._follow_pattern()

    @property
    def widest(self) -> int:
        return 1

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **self.kinked.facts()}

    def log(self) -> Mapping[str, np.ndarray]:
        return self.kinked.log_of_kinks()

    def at_points(self, states: Weights, count: int) -> dict[str, np.ndarray]:
        return self.kinked.at_points(states, count)

    def snapshot(self) -> Snapshot:
        facts, arrays = super().snapshot()
        own, more = self.kinked.snapshot()
        return Snapshot({**facts, "kinked": own}, {**arrays, **more})

    def restore(self, snapshot: Snapshot) -> None:
        self.kinked.restore(snapshot.facts["kinked"], snapshot.read)
        self._follow_pattern()
        super().restore(snapshot)

    def crossed(self) -> list[Event]:
        # A step that has stopped has crossed the kink, if there is nothing else to be crossed.
        alone = all(event is _KINK for event in self.agenda.watched)
        return [_KINK] if alone else super().crossed()

    def _land(self, report: Report) -> None:
        events = self.crossed()
        others = [event for event in events if event is not _KINK]
        landed = self._landed(report.lane, others)
        lane = report.lane if landed is None else landed[0]
        if len(others) < len(events) and self._meets_kinks(report, lane):
            return
        if landed is None:
            self._arm()
        else:
            self._stop_at(report, *landed)

    def _do(self, event: Event, stand: Stand) -> None:
        if event.action is Action.KINK:
            self._pass_kink(stand)
        else:
            super()._do(event, stand)

    def _meets_kinks(self, report: Report, lane: Lane) -> bool:
        """Go past the first kinks in the last step of a lane, or all, or go back before them.

        Returns:
            Whether there were some.
        """
        kinked = self.kinked
        field, tolerance = self.plan.field, self.plan.tolerance
        self.observe()  # what was saved before the kinks is of the pattern before them
        found = kinked.over(field, self.method, tolerance, lane, self._may_end)
        if isinstance(found, Passed):
            if not found.units:
                return False
            report.replace(lane)
            self._go_on_behind(found.state, found.memory, found.ends[1].fall, found.longest)
        elif found is not None and found.second < found.part:
            self._go_back(lane, found.part)
        else:
            at_kink, trials, spent = land_on_kink(field, self.method, lane, few=kinked.piece.few)
            self._count_trials(spent, trials)
            if found is not None and found.many:
                # As much as may be stepped over, or up to the next kink.
                part = max(found.part, min(found.second, 1.0), LEAST_PART)
                longest = part * float(lane.s - lane.began[0])
                next_step = as_array(np.float64(min(float(at_kink.next_step), longest)))
                at_kink = dataclasses.replace(at_kink, next_step=next_step)
            report.replace(at_kink)
            self._act([_KINK], self.stand)
        return True

    def _may_end(self, state: FlowState) -> bool:
        """Whether a mended step may end in a state: no event that is watched for is behind it."""
        events = [event for event in self.agenda.watched if event is not _KINK]
        reached = self._progress_at(state, [event.rule for event in events])
        return not any(
            here > event.progress + SAME * max(1.0, abs(event.progress))
            for event, here in zip(events, reached, strict=True)
        )

    def _follow_pattern(self) -> None:
        field = dataclasses.replace(self.plan.field, problem=self.kinked.here)
        self.plan = self.plan._replace(field=field)

    def _pass_kink(self, stand: Stand) -> None:
        """Go on in the pattern behind the kink where the run stands."""
        kinked, report = self.kinked, self.report
        assert report is not None
        self.observe()
        weights, scaled_time = stand.state
        log_risk = risk_and_slope(self.plan.field.problem, weights)[0]
        at = moment(self.clock, stand.s, stand.state, log_risk, stand.num_steps)
        try:
            weights = kinked.pass_(weights, stand.s, at)
        except NotUniqueError as error:
            self.end = Reason.NOT_UNIQUE.end(why=error)
            return
        except StuckError as error:
            self.end = Reason.STUCK.end(why=error, log_risk=at.log_risk)
            return
        state, lane = FlowState(weights, scaled_time), report.lane
        self._follow_pattern()
        memory, fall = _behind(
            self.plan.field, self.method, lane.s, state, lane.next_step, few=kinked.piece.few
        )
        self._go_on_behind(state, memory, fall)

    def _go_on_behind(
        self, state: FlowState, memory: Any, fall: Any, longest: float = math.inf
    ) -> None:
        r"""Go on behind kinks from a state that stands where the run does.

        Args:
            state, memory: there, of the flow and of the solver.
            fall: there, $-d\log R/ds$.
            longest: of the next step.
        """
        report, steps = self.report, self.stand.num_steps
        assert report is not None
        self._follow_pattern()
        # Far out the shares of the points settle anew behind a kink while log R changes by about
        # 1: a step that leaps over this is refused, however it is shortened, until it does not.
        settles = 1 / float(fall) if fall > 0 else math.inf
        next_step = min(float(report.lane.next_step), longest, settles)
        self._keep_counts(steps)
        report.replace(gone_on_from(report.lane, state, memory, as_array(np.float64(next_step))))
        self._meet()
        # The march, which counts steps, says of a lane that has met a kink only that.
        if self.end is None and steps + self.num_rejected >= self.plan.max_steps:
            self.end = self._out_of_steps()
        self._arm()

    def _go_back(self, lane: Lane, part: float) -> None:
        """Refuse the last step, and try a part of it."""
        s, state, _ = lane.began
        self._keep_counts(int(lane.num_steps) - 1)
        stand = Stand(float(s), state, int(lane.num_steps) - 1)
        self._leave(stand, part * float(lane.s - s))
        self.num_rejected += 1
        if stand.num_steps + self.num_rejected >= self.plan.max_steps:
            self.end = self._out_of_steps()
        self._arm()

    def _keep_counts(self, steps: int) -> None:
        """Keep the solver's counts of what is left: it begins anew after so many steps."""
        self.counts, self.leg_counts = self.counts + np.array(self.leg_counts), (0, 0)
        self.leg_began = steps

    def _meet(self) -> None:
        """Act on the events that are where the run stands, as a kink may be."""
        ahead = [*self.saves[self.done : self.done + 1], *self.ends]
        watched = [event for event in ahead if event.watched]
        reached = self.progress([event.rule for event in watched])
        here = [event for event in ahead if event.clock <= self.stand.s]
        here += [event for event, at in zip(watched, reached, strict=True) if at >= event.progress]
        if here:
            self.record_here()
            self._act(here, self.stand)


@by_size
def _behind(
    field: AbstractField, method: AbstractMethod, s: Array, state: FlowState, step: Array
) -> tuple[Any, Array]:
    r"""A solver's memory before a step, and $-d\log R/ds$."""
    log_risk, _, descent = field.direction(state.weights)
    fall = field.clock.rate(s, log_risk, descent) * descent
    return method.start(field, s, state, step), fall

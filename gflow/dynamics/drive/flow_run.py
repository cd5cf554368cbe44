"""A flow on its way: its plan of legs, and what happens at each event.

A *leg* is one solver until one event: the explicit solver while accuracy limits its step, then
``GaussNewton``, then split coordinates from where float64 weights no longer hold misalignment and
direction error. What a run is to do on its way is a list of events; those ahead are the goals of
the march.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from gflow.dynamics.clocks import AbstractClock, readings
from gflow.dynamics.drive.agenda import Agenda
from gflow.dynamics.drive.checkpoint import Snapshot, identity
from gflow.dynamics.drive.drive import AbstractLanes, widest_for
from gflow.dynamics.drive.events import NO_STEP_COUNT, SAME, Action, AtStart, Course, Event
from gflow.dynamics.drive.flow_lanes import FlowLanes, Report, Stand, at_no_goal, program_of
from gflow.dynamics.drive.hand_over import HandOver
from gflow.dynamics.drive.on_split import OnSplit, SplitLane
from gflow.dynamics.drive.recorder import ROWS, Recorder, filled, rows_for
from gflow.dynamics.drive.standstill import SADDLE, at_level_zero, end_of_risk, why_stalled
from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.kinks.hidden import Hidden
from gflow.dynamics.march.land import Landed, land
from gflow.dynamics.march.lane import Goals, Lane, Member
from gflow.dynamics.march.loop import lanes_at
from gflow.dynamics.march.method import AbstractMethod
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.stops import AbstractRule, LogRisk, anonymous, progress_of
from gflow.problem.array import as_array
from gflow.problem.memo import once_per_object
from gflow.problem.risk import ROUND_OFF, has_few_margins, level_at_zero, risk_and_slope
from gflow.problem.sharding import gathered
from gflow.problem.weights import Weights

LANDINGS = 8
"""Points to save within one step that are landed on in one call."""


class Plan(NamedTuple):
    """How a flow is to be followed."""

    field: AbstractField
    methods: tuple[AbstractMethod, ...]
    """In the order of their use; each but the last until the flow is stiff."""
    split: SlowManifold | None
    """What goes on in split coordinates from the hand-over, if anything."""
    tolerance: AbstractTolerance
    atol: float
    max_steps: int


class FlowRun:
    """A flow from its start to one of its stopping rules.

    Args:
        plan: how it is followed.
        recorder: takes its points.
        rules: the stopping rules, the leading one first.
        way: what it is to do on its way.
        at_start: the risk and the slope at the start.
        compares: whether the two ways of going on are compared before the hand-over.
    """

    name = "gradient flow"
    in_lanes = False
    """Whether it went side by side with others."""
    always: tuple[Event, ...] = ()
    """Events that every step is watched for."""
    most_rows = ROWS
    """Saved states in a call of the march, at most."""
    hidden: Hidden | None = None
    """Kinks that gflow does not know of, if there are some."""

    def __init__(
        self,
        plan: Plan,
        recorder: Recorder,
        rules: tuple[AbstractRule, ...],
        way: Course,
        at_start: AtStart,
        *,
        compares: bool = True,
    ):
        self.plan, self.recorder = plan, recorder
        self.rules, self.done = rules, 0
        self.saves, self.ends, self.end = way
        self._to_save = set(map(id, self.saves))
        self.problem, self.clock = plan.field.problem, plan.field.clock
        weights, log_risk = recorder.start, at_start.log_risk
        self.first_slope = at_start.slope
        loss = self.problem.loss
        self.above_zero = not loss.attained and log_risk > level_at_zero(self.problem) + ROUND_OFF
        self.energy = (log_risk, loss.least_log_risk) if loss.attained else ()
        """The log risk of the start and that of round-off, where the risk may fall to it."""
        self.end_of_risk = end_of_risk(self.problem, weights, rules, self.clock)
        rtol = float(plan.tolerance.rtol)
        self.hand_over = HandOver(plan.split, self.problem, weights, rtol=rtol, compares=compares)
        self.split_run: OnSplit | None = None
        self.used: list[str] = []
        self.counts, self.leg_counts = np.zeros(2, int), (0, 0)
        self.num_rejected = 0
        self.report: Report | None = None
        s = float(self.clock.read(log_risk, -math.inf))
        self._stand = Stand(s, FlowState(weights, as_array(np.zeros(()))), 0)
        self.next_step = math.nan
        self.resumed: Lane | None = None
        """The lane of a checkpoint, or of other lanes, to go on from."""
        self.anew = False
        """Whether the goals have changed."""
        self.agenda = Agenda([], [], 0.0, plan.max_steps)
        self._program: Hashable = None
        self._member: Member | None = None
        self.seated = False
        self.pending: list[tuple[FlowState, np.ndarray, np.ndarray]] = []
        """Points that are recorded but not observed yet: states, clock values and step counts."""
        self._prepare()
        if plan.methods:
            self._begin_leg(0)
        else:
            self._go_on_in(self.hand_over.at_start(self._stand), self._stand)
        self.record_here()
        if self.end is None:
            self._arm()

    # ---------------------------------------------------------------------------------------------
    # What the drive and its caller ask
    # ---------------------------------------------------------------------------------------------

    @property
    def program(self) -> Hashable:
        if self.split_run is not None:
            return "split coordinates"
        if self._program is None:
            self._program = program_of(self.member, self.method, self.watches_stiffness)
        return self._program

    def lanes(self, alike: "Sequence[FlowRun]", width: int) -> AbstractLanes:
        return SplitLane() if self.split_run is not None else FlowLanes(alike, width)

    @property
    def widest(self) -> int:
        alone = self.split_run is not None or self.problem.network.mesh is not None
        return 1 if alone else widest_for(self.recorder.start)

    def fail(self, error: Exception) -> None:
        self.end = Reason.FAILED.end(why=f"{type(error).__name__}: {error}")

    @property
    def part_done(self) -> float:
        return 1.0 if self.end is not None else self.done / len(self.saves)

    @property
    def stand(self) -> Stand:
        """Where the run stands on the weights."""
        return self._stand if self.report is None else self.report.stand

    @property
    def weights(self) -> Weights:
        """The weights where the run stands."""
        return self.stand.state.weights if self.split_run is None else self.split_run.weights

    @property
    def num_steps(self) -> int:
        """Accepted steps so far."""
        return self.stand.num_steps if self.split_run is None else self.split_run.num_steps

    def progress(self, rules: Sequence[AbstractRule]) -> list[float]:
        """How far the run is in the coordinate of each rule."""
        if self.split_run is not None:
            return [self.split_run.progress(rule) for rule in rules]
        return self._progress_at(self.stand.state, rules)

    def _progress_at(self, state: FlowState, rules: Sequence[AbstractRule]) -> list[float]:
        """How far a state on the weights is, where the run stands, in each rule's coordinate."""
        if not rules:
            return []
        (weights, scaled_time), problem = state, self.plan.field.problem
        log_risk, num_steps = risk_and_slope(problem, weights)[0], self.stand.num_steps
        return progress_of(rules, problem, weights, log_risk, scaled_time, num_steps)

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far the run is in the coordinate of ``lead``, and what a bar says beside it."""
        return self.progress([lead])[0], f"{self.num_steps} steps"

    def record_here(self) -> None:
        """Record the point where the run stands."""
        if self.split_run is not None:
            self.observe()
            self.split_run.record(self.recorder, self.clock)
            return
        state = jax.tree.map(lambda leaf: leaf[None], gathered(self.stand.state))
        self.pending.append((state, np.array([self.stand.s]), np.array([self.stand.num_steps])))

    def observe(self) -> None:
        """Observe the points that are recorded, so that the recorder has them."""
        if not self.pending:
            return
        states, s, steps = jax.tree.map(lambda *parts: np.concatenate(parts), *self.pending)
        self.pending, rows = [], rows_for(self.recorder.start)
        for first in range(0, len(s), rows):
            part = slice(first, first + rows)
            block = jax.tree.map(lambda leaf, part=part: filled(leaf[part], rows), states)
            self._add(block, s[part], steps[part])

    def close(self) -> None:
        """Record the last point, if it is not there yet, and observe all."""
        self.observe()
        if self.num_steps > self.recorder.num_steps:
            self.record_here()
            self.observe()

    def facts(self) -> dict[str, Any]:
        """What the record says of the run as a whole."""
        used = [*self.used, *([self.split_run.name] if self.split_run is not None else [])]
        found = {"solver": ", then ".join(used), **self.hand_over.told}
        if self.hidden is not None:
            found |= self.hidden.facts()
        if self.plan.methods:
            evaluations, iterations = self.counts + np.array(self.leg_counts)
            found |= {
                "atol": self.plan.atol,
                "num_rejected": self.num_rejected,
                "num_field_evaluations": int(evaluations),
                "num_newton_iterations": int(iterations),
            }
        return found

    # ---------------------------------------------------------------------------------------------
    # Legs on the weights: what their lanes ask
    # ---------------------------------------------------------------------------------------------

    @property
    def method(self) -> AbstractMethod:
        """The solver of this leg."""
        return self.plan.methods[self.leg]

    @property
    def watches_stiffness(self) -> bool:
        """Whether steps are looked at for that; a method with a patience ends its leg by it."""
        return self._goes_on_if_stiff and self.method.patience is None

    @property
    def _goes_on_if_stiff(self) -> bool:
        """Whether a stiff flow goes to the next leg."""
        return self.leg + 1 < len(self.plan.methods)

    @property
    def _most_steps(self) -> int:
        """Steps to try in all, on this leg."""
        patience, most = self.method.patience, self.plan.max_steps
        if patience is None or not self._goes_on_if_stiff:
            return most
        return min(most, self.leg_began + patience + 2 * len(self.saves))

    @property
    def member(self) -> Member:
        """What a lane follows, but for its goals."""
        if self._member is None:
            rules = tuple(anonymous(event.rule) for event in self.agenda.watched)
            self._member = Member(self.plan.field, self.plan.tolerance, rules, None)
        return self._member

    def standing(self) -> tuple:
        """Where a lane begins: clock value, state, next step and counts of steps."""
        s, (weights, scaled_time), num_steps = self.stand
        state = FlowState(self.problem.network.placed(weights), scaled_time)
        before = np.float64(self.next_step), np.int64(num_steps), np.int64(self.num_rejected)
        return np.float64(s), state, before

    def goals(self, window: int) -> Goals:
        """The next goals, one more than the march can save."""
        return self.agenda.goals(window)

    def take(self, report: Report | None) -> None:
        """What a call of the march has come to; in split coordinates it is the run that goes on."""
        if report is None:
            self._advance_in_split()
            return
        self.report, stand = report, None
        self.leg_counts = self.method.counts(report.tally, report.num_steps - self.leg_began)
        self.num_rejected = report.num_rejected
        rows: list[int] = []
        for row in range(report.num_saved):
            at = report.rows
            events = self.agenda.passing(int(at.clock_goal[row]), int(at.steps_goal[row]))
            if any(event.action.saves for event in events):
                rows.append(row)
            if all(event.action is Action.SAVE for event in events):
                self._count(events)
            else:
                stand = report.row(row)
                self._act(events, stand)
        self._record(report, rows)
        if self.end is not None and stand is not None:
            self._leave(stand)
        elif self.end is None and self.split_run is None and not self.anew:
            match report.reason:
                case Reason.CROSSED:
                    self._land(report)
                case Reason.STIFF:
                    self._next_leg(report)
                case Reason.REFUSED_STEPS:
                    self._stop_short()
                case Reason.OUT_OF_STEPS if self._most_steps < self.plan.max_steps:
                    self._next_leg(report)
                case Reason.OUT_OF_STEPS:
                    self.end = self._out_of_steps()
        if self.end is not None and self.report is not None and report.lanes.many:
            self._leave(self.stand)  # its place is another's now
        if self.end is not None or not report.lanes.many:
            self.observe()

    def interrupt(self) -> None:
        """The lanes are about to close: stand where they left the run."""
        if self.report is not None:
            self._leave(self.report.stand)

    def _leave(self, stand: Stand, next_step: float = math.nan) -> None:
        """Leave the lanes, standing where they brought the run."""
        self._stand, self.next_step, self.report, self.seated = stand, next_step, None, False

    def _change_program(self, report: Report) -> None:
        """Go on in other lanes, which watch other events, from where these have brought the run."""
        self.resumed = at_no_goal(report.lane)
        self._leave(report.stand)

    def _next_leg(self, report: Report) -> None:
        """Go on by the next method."""
        self._leave(report.stand, float(report.lane.next_step))
        self._begin_leg(self.leg + 1)
        self._arm()

    def _begin_leg(self, leg: int) -> None:
        """Begin a leg on the weights."""
        self.leg, self.leg_began = leg, self._stand.num_steps
        self.counts, self.leg_counts = self.counts + np.array(self.leg_counts), (0, 0)
        self.used.append(self.method.name)

    def _record(self, report: Report, rows: list[int]) -> None:
        """Record saved states."""
        if rows:
            rows_of = report.rows
            chosen = rows_of.state, rows_of.s, rows_of.num_steps
            self.pending.append(jax.tree.map(lambda leaf: leaf[rows], chosen))

    def _add(self, states: FlowState, s: np.ndarray, steps: np.ndarray) -> None:
        """Observe a block of states, the first of which count."""
        rows = list(range(len(s)))
        scaled_time = np.asarray(states.scaled_time)[rows]

        def more(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {
                "clock_value": s,
                "num_steps": steps,
                "beyond_hand_over": np.zeros(len(rows), dtype=bool),
                **readings(self.clock, s, scaled_time, found["log_risk"], *self.energy),
                **self.at_points(states.weights, len(rows)),
            }

        if self.hidden is not None:
            self.hidden.see(states.weights, len(rows))
        self.recorder.add(states.weights, rows, more, self.plan.field.problem)

    # ---------------------------------------------------------------------------------------------
    # Events
    # ---------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Act on what is here already, and list what is ahead."""
        while self.end is None and self.split_run is None:
            here = self._first_here(self._turns())
            if here is None:
                break
            self._act([here], self.stand)
        else:
            return
        program, others = self._program, [*self.ends, *self._turns(), *self.always]
        ahead = self.saves[self.done :]
        self.agenda = Agenda(ahead, others, self.stand.s, self._most_steps)
        self._program = self._member = None
        self.anew = self.report is not None
        if self.report is not None and self.program != program:
            self._change_program(self.report)

    def _turns(self) -> list[Event]:
        """Events at which the run may go on in another way, or cannot go on."""
        levels: list[tuple[float, Action]] = []
        if self.above_zero:
            # On separable data the risk has its critical points at R = R(0) only. In a clock that
            # follows the risk a saddle is a branch point, which a solver may jump over unawares.
            levels.append((level_at_zero(self.problem), Action.SADDLE))
        else:
            levels.extend(self.hand_over.levels())
        if self.end_of_risk is not None:
            levels.append((self.end_of_risk[0], Action.WALL))
        return [
            Event(_level(level), math.asinh(-level), action, *self._clock_at(level))
            for level, action in levels
        ]

    def _clock_at(self, log_risk: float) -> tuple[float, int]:
        known = _values_at(self.clock)
        if log_risk not in known:
            value = self.clock.at_log_risk(log_risk)
            known[log_risk] = math.inf if value is None else float(value)
        return known[log_risk], NO_STEP_COUNT

    def _first_here(self, events: Sequence[Event]) -> Event | None:
        """The first of some events at which the run stands, or beyond."""
        watched = [event for event in events if event.watched]
        reached = iter(self.progress([event.rule for event in watched]) if watched else [])
        s = self.stand.s if len(watched) < len(events) else math.nan
        for event in events:
            here, ahead = (next(reached), event.progress) if event.watched else (s, event.clock)
            if here >= ahead - SAME * max(1.0, abs(ahead)):
                return event
        return None

    def at_points(self, states: Weights, count: int) -> dict[str, np.ndarray]:
        """What else is known at the first of a block of states, by name."""
        return {}

    def log(self) -> Mapping[str, np.ndarray]:
        """What happened on the way, as variables of a record."""
        return {}

    def _prepare(self) -> None:
        """What there is to find out before the first leg."""
        self.hidden = Hidden.of(self.problem, self.recorder.start)

    def _act(self, events: Sequence[Event], stand: Stand) -> None:
        """What is to be done at events that happen at one place, saved points first."""
        self._count(events)
        for event in sorted(events, key=lambda event: event.action.value):
            if self.end is not None or self.split_run is not None:
                return
            self._do(event, stand)

    def _do(self, event: Event, stand: Stand) -> None:
        """What is to be done at one event."""
        match event.action:
            case Action.STOP:
                self.end = Reason.REACHED.end(rule=event.rule, steps=stand.num_steps)
            case Action.WALL:
                assert self.end_of_risk is not None
                self.end = self.end_of_risk[1]
            case Action.SADDLE:
                self._at_saddle(stand)
            case Action.COMPARE:
                self.hand_over.compare(stand)
            case Action.HAND_OVER:
                if not self._goes_on_in_split(stand):
                    self._arm()

    def _count(self, events: Sequence[Event]) -> None:
        """Count the saved points among events."""
        self.done += sum(id(event) in self._to_save for event in events)

    def _land(self, report: Report) -> None:
        """Record the points to save that the last step passed, and stop at what else it crossed."""
        lane, crossed = report.lane, self.crossed()
        others = [event for event in crossed if id(event) not in self._to_save]
        passed = self._passed() if len(others) < len(crossed) else []
        saves = [event for event in passed if event.action.passes]
        found = self._landed(lane, [*others, *passed[len(saves) :]])
        self._save_within(lane, saves, math.inf if found is None else float(found[0].s))
        if found is None:
            self._arm()
        else:
            self._stop_at(report, *found)

    def _passed(self) -> list[Event]:
        """The points to save that the last step passed."""
        ahead = self.saves[self.done :]
        (here,) = self.progress([ahead[0].rule])
        return [event for event in ahead if here >= event.progress]

    def _save_within(self, lane: Lane, events: Sequence[Event], until: float) -> None:
        """Record the points of some events in the last step of a lane, before a clock value.

        Each is at the end of a step of its own from where the last one began; the run goes on from
        where it is.
        """
        end = float(lane.s)
        while events:
            part, events = events[: self._landings], events[self._landings :]
            at = self._land_on(lane, part)
            kept = 0
            for s in np.asarray(at.s)[: len(part)].tolist():
                kept += s < until
                if s >= min(until, end):
                    events = []
                    break
            self._count(part[:kept])
            rows = jax.tree.map(lambda leaf, kept=kept: leaf[:kept], gathered((at.states, at.s)))
            self.pending.append((*rows, np.full(kept, int(lane.num_steps) - 1)))

    def crossed(self) -> list[Event]:
        """The watched events that the last step crossed."""
        watched = self.agenda.watched
        reached = self.progress([event.rule for event in watched])
        return [
            event for event, here in zip(watched, reached, strict=True) if here >= event.progress
        ]

    def _landed(self, lane: Lane, events: Sequence[Event]) -> tuple[Lane, Event] | None:
        """The earliest of some events in the last step of a lane, and the lane there."""
        landed = [(self._land_on(lane, [event]).lane, event) for event in events]
        return min(landed, key=lambda each: float(each[0].s), default=None)

    def _land_on(self, lane: Lane, events: Sequence[Event]) -> Landed:
        """Where the last step of a lane comes to some events of one rule, at most ``_landings``."""
        goals = np.full(self._landings, np.inf)
        goals[: len(events)] = [event.progress for event in events]
        field, rule, few = self.plan.field, anonymous(events[0].rule), has_few_margins(self.problem)
        found = land(field, self.method, rule, lane, as_array(goals), few=few)
        self._count_trials(found.spent, found.trials)
        return found

    def _count_trials(self, spent: Any, trials: Any) -> None:
        """Count what so many steps that were tried have added to the solver's tally."""
        self.counts = self.counts + np.array(self.method.counts(spent, int(trials)))

    @property
    def _landings(self) -> int:
        """Events that are landed on in one call."""
        return min(LANDINGS, rows_for(self.recorder.start))

    def _stop_at(self, report: Report, lane: Lane, event: Event) -> None:
        """Act on an event that was landed on, and go on if it is not the end."""
        report.replace(lane)
        self._act([event], self.stand)
        if event.action.saves and self.split_run is None:
            self.record_here()
        if self.end is None and self.split_run is None:
            self._arm()

    def _at_saddle(self, stand: Stand) -> None:
        """End the run at a saddle; elsewhere on its level, go on."""
        slope = math.sqrt(float(risk_and_slope(self.problem, stand.state.weights)[1]))
        if slope > SADDLE * self.first_slope:
            self.above_zero = False
            self._arm()
        else:
            self.end = at_level_zero(self.problem, stand.state.weights, slope)

    def _goes_on_in_split(self, stand: Stand) -> bool:
        """Go on in split coordinates if that can be done, and whether it can."""
        found = self.hand_over.made(stand)
        if found is not None:
            self._go_on_in(found, stand)
        return found is not None

    def _go_on_in(self, split: OnSplit, stand: Stand) -> None:
        """Hand the run over to split coordinates."""
        self.split_run = split
        self._leave(stand)

    def _advance_in_split(self) -> None:
        """Some steps in split coordinates, or up to the next event."""
        assert self.split_run is not None
        ahead = [self.saves[self.done], *self.ends]
        met = self.split_run.advance(ahead, self.plan.max_steps)
        if isinstance(met, End):
            self.end = met
        elif met is not None:
            self._count([met])
            self.record_here()
            if met.action is Action.STOP:
                self.end = Reason.REACHED.end(rule=met.rule, steps=self.num_steps)

    def _stop_short(self) -> None:
        """Shorter steps do not help: go on in split coordinates if that helps, or say why not."""
        stand, rtol = self.stand, float(self.plan.tolerance.rtol)
        end = why_stalled(self.plan.field, stand.state.weights, self.first_slope, rtol)
        if end.status != "precision_lost" or not self._goes_on_in_split(stand):
            self.end = end

    # ---------------------------------------------------------------------------------------------
    # Checkpoints
    # ---------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        """What a flow is, for its checkpoint."""
        recorder, plan = self.recorder, self.plan
        start = FlowState(recorder.start, as_array(np.zeros(())))
        return identity(
            self.problem,
            recorder.start,
            recorder,
            plan.field,
            (np.float64(0.0), start),
            kind="gradient_flow",
            until=[(type(rule).__name__, rule.value) for rule in self.rules],
            save=np.array([event.progress for event in self.saves]),
            clock=self.clock,
            solvers=(*plan.methods, plan.split),
            rtol=plan.tolerance.rtol.item(),
            atol=plan.atol,
            function_space=type(plan.tolerance).__name__,
        )

    def snapshot(self) -> Snapshot:
        """All that the run needs to go on."""
        self.observe()
        splits = {"early": self.hand_over.early, "split_run": self.split_run}
        facts = {name: getattr(self, name) for name in _FACTS} | {
            "counts": self.counts.tolist(),
            "hand_over": self.hand_over.facts(),
            "split_run": self.split_run and self.split_run.facts(),
        }
        arrays: dict[str, Any] = {
            name: run.state for name, run in splits.items() if run is not None
        }
        if self.split_run is None and self.report is not None:
            arrays["lane"] = self.report.lane
        elif self.split_run is None and self.resumed is not None:
            arrays["lane"] = self.resumed
        elif self.split_run is None:  # it has left its lanes, to go on in another way
            s, state, num_steps = self._stand
            arrays["stand"] = {
                "s": np.float64(s),
                "state": state,
                "num_steps": np.int64(num_steps),
                "next_step": np.float64(self.next_step),
            }
        return Snapshot(facts, arrays)

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where a snapshot was taken of a run with the same start."""
        facts, self.pending = snapshot.facts, []
        for name in _FACTS:
            setattr(self, name, facts[name])
        self.counts = np.array(facts["counts"])
        self.hand_over.restore(facts["hand_over"], snapshot.read)
        if (told := facts["split_run"]) is not None:
            self.split_run = self.hand_over.restored("split_run", told, snapshot.read)
        if snapshot.holds("stand"):
            at = snapshot.read("stand", {**_STAND, "state": self._stand.state})
            self._stand = Stand(float(at["s"]), at["state"], int(at["num_steps"]))
            self.next_step = float(at["next_step"])
        if snapshot.holds("lane"):
            self._arm()
            member = dataclasses.replace(self.member, goals=self.goals(1))
            nothing = jax.tree.map(lambda _: None, member)
            like = eqx.filter_eval_shape(lanes_at, member, nothing, self.method, *self.standing())
            lane = snapshot.read("lane", like)
            self._stand = Stand(float(lane.s), lane.state, int(lane.num_steps))
            self.resumed = at_no_goal(lane)
            if int(lane.num_steps + lane.num_rejected) >= self.plan.max_steps:
                self.end = self._out_of_steps()
        if self.split_run is None:
            self._arm()

    def _out_of_steps(self) -> End:
        why = Reason.MAX_STEPS if self.hidden is None else Reason.HIDDEN_KINKS_AND_MAX_STEPS
        return why.end(steps=self.plan.max_steps, rule=self.saves[self.done].rule)


_STAND = {"s": 0.0, "num_steps": 0, "next_step": 0.0}

_FACTS = (
    "leg",
    "leg_began",
    "leg_counts",
    "done",
    "above_zero",
    "num_rejected",
    "used",
)


@once_per_object
def _values_at(clock: AbstractClock) -> dict[float, float]:
    """What a clock shows at log risks that were asked for; an ensemble asks for every member."""
    return {}


_level = functools.lru_cache(LogRisk)
"""Rules that are the same object for the same level."""

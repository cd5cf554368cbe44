"""A flow on its way: on the weights first, in split coordinates from the hand-over on."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffrax
import numpy as np

from gflow.dynamics import checkpoint, clocks
from gflow.dynamics.checkpoint import End
from gflow.dynamics.far import FarRun, hand_over_error
from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.following import Stop
from gflow.dynamics.near import NearRun
from gflow.dynamics.reasons import SADDLE, at_level_zero
from gflow.dynamics.recorder import Recorder
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.targets import Target
from gflow.dynamics.until import AbstractRule, LogRisk
from gflow.problem.network import Weights, as_array
from gflow.problem.observables import imbalance, is_deep_linear
from gflow.problem.risk import ROUND_OFF, Problem, risk_and_slope

Solver = diffrax.AbstractAdaptiveSolver | SlowManifold

ARRIVED = 1e-9
"""The clock lands on a risk up to the integration error of the risk itself."""

UNCERTAIN_MARGIN = 1 / float(np.finfo(np.float64).eps)
"""A margin of this size is uncertain by one: which points share the slope is then no longer known
from float64 weights."""

LARGEST_MARGIN = 1e150
"""The square of a larger one may leave float64's range; polynomial tails come to that."""

COMPARE_AT, HAND_OVER_AT = -1e5, -1e6
"""Log risks at which the run on the weights is compared with the continuation, and handed over.
Further out, float64 weights still carry the flow but not its misalignment and direction error."""


class FlowRun:
    """A flow between two saved points.

    Args:
        problem: what it goes down.
        clock: what it steps in.
        solvers: in the order of their use.
        weights: the start.
        rtol, atol: tolerances of a step.
        max_steps: steps to try in all.
        function_space: whether ``rtol`` is of what the network computes.
    """

    name = "gradient flow"

    def __init__(
        self,
        problem: Problem,
        clock: clocks.AbstractClock,
        solvers: tuple[Solver, ...],
        weights: Weights,
        rtol: float,
        atol: float | None,
        max_steps: int,
        function_space: bool = False,
    ):
        self.problem, self.clock, self.max_steps = problem, clock, max_steps
        self.solvers, self.rtol, self.atol = solvers, rtol, atol
        self.function_space = function_space
        self.imbalance = (
            tuple(map(np.asarray, imbalance(weights))) if is_deep_linear(problem) else ()
        )
        log_risk, squared_slope = risk_and_slope(problem, weights)
        self.first_slope = float(np.sqrt(squared_slope))
        self.above_zero = float(log_risk) > float(problem.log_risk_at_zero()) + ROUND_OFF
        near = tuple(s for s in solvers if not isinstance(s, SlowManifold))
        self.manifold = next((s for s in solvers if isinstance(s, SlowManifold)), None)
        self.handed_over: dict[str, Any] = {}
        self.early: FarRun | None = None
        self.compares = True
        if near:
            self.now: NearRun | FarRun = NearRun(
                problem, clock, near, weights, rtol, atol, function_space
            )
            self.near = self.now
        else:
            assert self.manifold is not None
            self.now = FarRun(self.manifold, problem, weights, -np.inf, self.imbalance)
            self.near = None

    @property
    def weights(self) -> Weights:
        """The weights where the run stands."""
        return self.now.weights

    @property
    def num_steps(self) -> int:
        """Accepted steps so far."""
        return self.now.num_steps

    def progress(self, rules: tuple[AbstractRule, ...]) -> list[float]:
        """How far the run is in the coordinate of each rule."""
        return [self.now.progress(rule) for rule in rules]

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far the run is in the coordinate of ``lead``, and what a bar says beside it."""
        return self.now.progress(lead), f"{self.num_steps} steps"

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on."""
        return {
            "above_zero": self.above_zero,
            "may_hand_over": self.manifold is not None,
            "handed_over": json.dumps(self.handed_over),
            "near": self.near and self.near.state(),
            "early": self.early and self.early.stored(),
            "far": self.now.stored() if isinstance(self.now, FarRun) else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken of a run with the same start."""
        self.above_zero = bool(state["above_zero"])
        self.handed_over = json.loads(str(state["handed_over"]))
        if self.near is not None:
            self.near.restore(state["near"])
        if self.manifold is not None:
            restored = functools.partial(FarRun.restored, self.manifold, self.problem)
            if "early" in state:
                self.early = restored(state["early"])
            if "far" in state:
                self.now = restored(state["far"])
        if not state["may_hand_over"]:
            self.manifold = None

    def save(self, recorder: Recorder) -> None:
        """Record the point where the run stands."""
        far = isinstance(self.now, FarRun)
        values = self.now.values() if isinstance(self.now, FarRun) else None
        recorder.save(
            self.now.weights,
            values,
            beyond_hand_over=far,
            clock_value=self._clock_value(),
            **self.now.scalars(),
        )

    def _clock_value(self) -> float:
        if isinstance(self.now, NearRun):
            return float(self.now.carry.s)
        return self.clock.read(self.now.state.log_risk, self.now.state.log_time)

    def go(self, stops: Sequence[Stop], look: Callable[[], None]) -> AbstractRule | End:
        """Go on to the first of ``stops``: its rule, or why none was reached."""
        met = self.reach([Target.of(rule, at, self.clock) for rule, at in stops], look)
        return met if isinstance(met, End) else met.rule

    def reach(
        self, targets: list[Target], look: Callable[[], None], pieces: int = 1
    ) -> Target | End:
        """Go on to the first of ``targets``, over saddles and the hand-over if they come before.

        No step is longer than one of so many equal ``pieces`` of the way.
        """
        if self.above_zero and isinstance(self.now, NearRun):
            # On separable data the risk has its critical points at R = R(0) only. In a clock that
            # follows the risk a saddle is a branch point, which a solver may jump over unawares.
            level = LogRisk(float(self.problem.log_risk_at_zero()))
            saddle = Target.of(level, level.goal, self.clock)
            met = self._reach_near(self.now, [*targets, saddle], look, pieces)
            if met is not saddle:
                return met
            _, squared_slope = risk_and_slope(self.problem, self.now.weights)
            slope = float(np.sqrt(squared_slope))
            if not slope > SADDLE * self.first_slope:
                return End("stalled", at_level_zero(self.problem, slope))
            self.above_zero = False
        while self.manifold is not None and isinstance(self.now, NearRun):
            compared = self.early is not None or not self.compares
            goal = LogRisk(HAND_OVER_AT if compared else COMPARE_AT)
            step = Target.of(goal, goal.goal, self.clock)
            if not self._arrived(self.now, step):
                met = self._reach_near(self.now, [*targets, step], look, pieces)
                lost = isinstance(met, End) and met.status == "precision_lost"
                if lost and self._continue(self.now, self.manifold, compare=False) is None:
                    break
                if met is not step:
                    return met
            reason = self._continue(self.now, self.manifold, compare=self.compares)
            if reason is not None:
                self.manifold = None
                self.handed_over["hand_over"] = f"not made: {reason}"
        if isinstance(self.now, FarRun):
            return self.now.reach(targets, self.max_steps, look, pieces)
        return self._reach_near(self.now, targets, look, pieces)

    def _arrived(self, near: NearRun, step: Target) -> bool:
        """Whether the run stands at a risk, by its clock where that knows."""
        if math.isfinite(step.clock):
            return float(near.carry.s) >= step.clock * (1 - ARRIVED)
        return near.progress(step.rule) >= step.progress * (1 - ARRIVED)

    def _reach_near(
        self, near: NearRun, targets: list[Target], look: Callable[[], None], pieces: int
    ) -> Target | End:
        """Go on, on the weights, to the first of ``targets`` or to where float64 weights end."""
        rule, reason = self._wall
        wall = Target.of(rule, rule.goal, self.clock)
        met = near.reach([*targets, wall], self.max_steps, look, pieces)
        return met if met is not wall else End("precision_lost", reason)

    @functools.cached_property
    def _wall(self) -> tuple[LogRisk, str]:
        """The risk at which float64 weights end, and why."""
        overflow = float(self.problem.loss.log_value(np.float64(LARGEST_MARGIN)))
        if overflow > -UNCERTAIN_MARGIN:
            return LogRisk(overflow), (
                f"at log R = {overflow:.6g} margins have grown to {LARGEST_MARGIN:.0e}, and their "
                "squares leave float64's range: a flow with a polynomial tail ends here"
            )
        return LogRisk(-UNCERTAIN_MARGIN), (
            f"at log R = {-UNCERTAIN_MARGIN:.2g} the margins of float64 weights are uncertain by "
            "one; the default solver, on data and networks that allow it, goes on in coordinates "
            "that lose nothing"
        )

    def _continue(self, near: NearRun, manifold: SlowManifold, *, compare: bool) -> str | None:
        """Hand over, or at first only ``compare``; says why neither can be done."""
        weights = tuple(map(np.asarray, near.weights))
        reason = manifold.obstacle(self.problem, weights)
        if reason is not None:
            return reason
        log_time = float(near.scalars()["log_time"])
        far = FarRun(manifold, self.problem, weights, log_time, self.imbalance, near.num_steps)
        early = near.progress(LogRisk(HAND_OVER_AT)) < LogRisk(HAND_OVER_AT).goal
        if compare and self.early is None and early:
            self.early = far
            return None
        self.now = far
        self.handed_over = {"hand_over": "made", "hand_over_log_risk": far.state.log_risk}
        if self.early is not None:
            errors = hand_over_error(manifold, self.early.state, far.state, self.rtol)
            self.handed_over |= {f"hand_over_error_{name}": e for name, e in errors.items()}
        return None

    def facts(self) -> dict[str, Any]:
        """What the record says of the run as a whole."""
        used = self.near.used if self.near is not None else []
        if isinstance(self.now, FarRun):
            used = [*used, type(self.now.solver).__name__]
        found: dict[str, Any] = {"solver": ", then ".join(used), **self.handed_over}
        if self.near is not None:
            found |= {"atol": self.near.atol, **self.near.counts()}
        return found

    def identity(
        self, recorder: Recorder, rules: tuple[AbstractRule, ...], grid: np.ndarray
    ) -> dict[str, str]:
        """What the run is, for its checkpoint."""
        return checkpoint.identity(
            self.problem,
            recorder.start,
            recorder,
            FlowField(self.problem, self.clock),
            (np.float64(0.0), FlowState(recorder.start, as_array(np.zeros(())))),
            kind="gradient_flow",
            until=[(type(rule).__name__, rule.value) for rule in rules],
            save=grid,
            clock=self.clock,
            solvers=self.solvers,
            rtol=self.rtol,
            atol=self.atol,
            function_space=self.function_space,
        )

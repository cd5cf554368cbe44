"""The flow in split coordinates: the run beyond what float64 weights can hold."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gflow.dynamics.checkpoint import End
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.slow_manifold import ManifoldError, SlowManifold, difference, geometry
from gflow.dynamics.split.state import SplitState
from gflow.dynamics.targets import Target, out_of_steps
from gflow.dynamics.until import AbstractRule, Coordinates, LogRisk, Steps
from gflow.problem.network import Weights, as_array
from gflow.problem.risk import Problem


class FarRun:
    """A flow on its way in the coordinates of :class:`SlowManifold`."""

    def __init__(
        self,
        solver: SlowManifold,
        problem: Problem,
        weights: Weights,
        log_time: float,
        imbalance: tuple[np.ndarray, ...],
        num_steps: int = 0,
    ):
        self.solver = solver
        self.state: SplitState = solver.start(
            problem, weights, log_time=log_time, imbalance=imbalance
        )
        self.before = num_steps
        self.began = self.state.num_steps

    @property
    def weights(self) -> Weights:
        """The weights where the run stands, rounded to float64."""
        return tuple(self.state.weights())

    @property
    def num_steps(self) -> int:
        """Accepted steps so far, those of the run before this one included."""
        return self._steps(self.state)

    def values(self) -> dict[str, np.ndarray]:
        """The observables, right where those of the rounded weights are not."""
        return observables(self.state)

    def scalars(self) -> dict[str, Any]:
        """What a saved point holds beside its observables; the clock is the risk itself."""
        return {
            "log_time": np.float64(self.state.log_time),
            "num_steps": np.int64(self.num_steps),
            "clock_error": np.float64(0.0),
        }

    def progress(self, rule: AbstractRule) -> float:
        """How far the run is in the coordinate of ``rule``."""
        return self._progress(self.state, rule)

    def stored(self) -> dict[str, Any]:
        """All that the run needs to go on."""
        return {**self.state.stored(), "before": self.before, "began": self.began}

    @classmethod
    def restored(
        cls, solver: SlowManifold, problem: Problem, stored: Mapping[str, Any]
    ) -> "FarRun":
        """The run that stands where ``stored`` was taken."""
        run = cls.__new__(cls)
        run.solver, run.state = solver, SplitState.restored(geometry(problem), stored)
        run.before, run.began = int(stored["before"]), int(stored["began"])
        return run

    def reach(
        self,
        targets: list[Target],
        max_steps: int,
        look: Callable[[], None],
        pieces: int = 1,
    ) -> Target | End:
        """Advance to the first of ``targets`` and say which it was, or why none was reached.

        Now and then ``look`` is called; the run may be stopped there and go on later. No step is
        longer than about one of so many equal ``pieces`` of the way.
        """
        by_risk = [target for target in targets if isinstance(target.rule, LogRisk)]
        by_steps = [target for target in targets if isinstance(target.rule, Steps)]
        others = [target for target in targets if target not in by_risk + by_steps]
        solver = dataclasses.replace(
            self.solver, max_steps=min(self.solver.max_steps, max(1, max_steps - self.num_steps))
        )
        end = max((-np.sinh(target.progress) for target in by_risk), default=-1e140)

        def ahead(state: SplitState) -> float:
            return max(self._progress(state, target.rule) - target.progress for target in others)

        def counted(state: SplitState) -> bool:
            return any(self._steps(state) >= target.steps for target in by_steps)

        def stand(state: SplitState) -> None:
            self.state = state
            look()

        longest = np.inf
        if pieces > 1:  # log t is s up to its logarithm
            ahead_of = [math.sinh(t.progress) if t in by_risk else t.progress for t in targets]
            longest = max(np.log(min(ahead_of) / self.state.minus_log_risk), 1e-3) / pieces
        try:
            if others:
                self.state = solver.reach(
                    self.state, ahead, 0.0, log_risk=end, look=stand, longest=longest
                )
            else:
                self.state = solver.advance_until(self.state, end, counted, stand, longest)
        except ManifoldError as error:
            self.state = error.state
            return out_of_steps(max_steps, targets[0].rule)
        slack = 1e-12
        for target in targets:
            met = self.progress(target.rule) - target.progress
            if met >= -slack * max(1.0, abs(target.progress)):
                return target
        return End("stalled", f"split coordinates end at log R = {self.state.log_risk:.6g}")

    def _steps(self, state: SplitState) -> int:
        return self.before + state.num_steps - self.began

    def _progress(self, state: SplitState, rule: AbstractRule) -> float:
        small = {}
        if rule.variable is not None:
            small[rule.variable] = np.max(observables(state)[rule.variable], initial=0.0)
        at = Coordinates(
            log_risk=as_array(np.float64(state.log_risk)),
            log_time=as_array(np.float64(state.log_time)),
            num_steps=as_array(np.int64(self._steps(state))),
            small=small,
        )
        return float(rule.progress(at))


SHARED = 0.01
"""The observables' error of a run on the weights, in units of its tolerance: of this order, in
``benchmarks/hand_over.py``."""


def hand_over_error(
    solver: SlowManifold, early: SplitState, late: SplitState, rtol: float
) -> dict[str, float]:
    """How far what follows a hand-over may be off.

    The difference of the two ways of integrating between two states of one flow, and what they
    share: the error of the run on the weights that led to both.

    Args:
        solver: of the split coordinates.
        early: split coordinates begun at a state of that run.
        late: split coordinates begun at a later one.
        rtol: the tolerance of that run.

    Returns:
        For each small quantity at ``late`` a relative error, for the log time an absolute one.
    """
    arrived = solver.advance(early, late.log_risk)
    return {name: math.hypot(e, SHARED * rtol) for name, e in difference(arrived, late).items()}

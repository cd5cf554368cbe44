"""The flow on the weights themselves: the run until float64 cannot hold its small quantities."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics import clocks, stepping
from gflow.dynamics.checkpoint import End, carry_of
from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.progress import Pace
from gflow.dynamics.reasons import why_stalled
from gflow.dynamics.stepping import Carry, Limits
from gflow.dynamics.targets import Target, out_of_steps
from gflow.dynamics.tolerance import FunctionTolerance, Tolerance, default_atol
from gflow.dynamics.until import AbstractRule, anonymous
from gflow.problem.network import Array, Weights, as_array
from gflow.problem.risk import Problem, risk_and_slope

ATTEMPTS_AT_FIRST = 64
"""Steps tried in the first call, before their speed is known."""


class NearRun:
    """A flow on its way: the field, the solvers and the carry between two calls of ``advance``."""

    def __init__(
        self,
        problem: Problem,
        clock: clocks.AbstractClock,
        solvers: tuple[diffrax.AbstractAdaptiveSolver, ...],
        weights: Weights,
        rtol: float,
        atol: float | None,
        function_space: bool = False,
    ):
        self.field = FlowField(problem, clock)
        self.solver, *self.stiffer = solvers
        self.used: list[str] = []
        self.explicit_evaluations = self.began_at = 0
        self.pace = Pace(ATTEMPTS_AT_FIRST)
        state = FlowState(weights, as_array(np.zeros(())))
        self.atol = default_atol(state, rtol) if atol is None else float(atol)
        of_weights = Tolerance(as_array(np.float64(rtol)), as_array(np.float64(self.atol)))
        self.tolerance = (
            FunctionTolerance(of_weights.rtol, problem, of_weights)
            if function_space
            else of_weights
        )
        log_risk, squared = (float(value) for value in risk_and_slope(problem, weights))
        self.first_slope = math.sqrt(squared)
        s = clock.read(log_risk, -math.inf)
        self._begin(as_array(np.float64(s)), state)

    def _begin(self, s: Array, state: FlowState, before: Carry | None = None) -> None:
        """Start the current solver at a state, keeping the counts of the one ``before``."""
        carry = stepping.start(self.field, self.solver, self.tolerance, s, state)
        if before is not None:
            carry = eqx.tree_at(
                lambda c: (c.num_steps, c.num_rejected, c.next_step),
                carry,
                (before.num_steps, before.num_rejected, before.next_step),
            )
        self.carry: Carry = carry
        self.used.append(type(self.solver).__name__)

    @property
    def weights(self) -> Weights:
        """The weights where the run stands."""
        return self.carry.state.weights

    @property
    def num_steps(self) -> int:
        """Accepted steps so far."""
        return int(self.carry.num_steps)

    @property
    def num_tried(self) -> int:
        """Steps tried so far."""
        return int(self.carry.num_steps + self.carry.num_rejected)

    def scalars(self) -> dict[str, Any]:
        """What a saved point holds beside the observables of its weights."""
        found, _ = _look(self.field, self.carry, ())
        return dict(found)

    def progress(self, rule: AbstractRule) -> float:
        """How far the run is in the coordinate of ``rule``."""
        _, (progress,) = _look(self.field, self.carry, (anonymous(rule),))
        return float(progress)

    def counts(self) -> dict[str, int]:
        """Rejected steps; field evaluations and Newton iterations of the accepted ones."""
        evaluations = self.explicit_evaluations + self._explicit_evaluations()
        evaluations += int(getattr(self.carry.solver_state, "num_evaluations", 0))
        return {
            "num_rejected": int(self.carry.num_rejected),
            "num_field_evaluations": evaluations,
            "num_newton_iterations": int(getattr(self.carry.solver_state, "num_iterations", 0)),
        }

    def _explicit_evaluations(self) -> int:
        """Of the current solver since it began, if it is an explicit Runge–Kutta method."""
        tableau = getattr(self.solver, "tableau", None)
        explicit = isinstance(self.solver, diffrax.AbstractERK)
        if not (explicit and isinstance(tableau, diffrax.ButcherTableau)):
            return 0
        stages = len(tableau.c) + 1 - int(tableau.fsal)
        return stages * (self.num_steps - self.began_at)

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on."""
        return {
            "carry": self.carry,
            "num_solvers": len(self.used),
            "explicit_evaluations": self.explicit_evaluations,
            "began_at": self.began_at,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken of a run with the same start."""
        while len(self.used) < int(state["num_solvers"]):
            self.solver, *self.stiffer = self.stiffer
            self.used.append(type(self.solver).__name__)
        like = eqx.filter_eval_shape(
            stepping.start,
            self.field,
            self.solver,
            self.tolerance,
            self.carry.s,
            self.carry.state,
        )
        self.carry = carry_of(state["carry"], like)
        self.explicit_evaluations = int(state["explicit_evaluations"])
        self.began_at = int(state["began_at"])

    def reach(
        self,
        targets: list[Target],
        max_steps: int,
        look: Callable[[], None],
        pieces: int = 1,
    ) -> Target | End:
        """Advance to the first of ``targets`` and say which it was, or why none was reached.

        Now and then ``look`` is called; the run may be stopped there and go on later. No step is
        longer than one of so many equal ``pieces`` of the way.
        """
        watched = [target for target in targets if target.watched]
        rules = tuple(anonymous(target.rule) for target in watched)
        s_end = min(target.clock for target in targets)
        steps = min(target.steps for target in targets)
        longest = (s_end - float(self.carry.s)) / pieces if pieces > 1 else math.inf
        while (tried := self.num_tried) < max_steps:
            limits = Limits(
                s_end=as_array(np.float64(s_end)),
                num_steps=as_array(np.int64(steps)),
                goals=tuple(as_array(np.float64(target.progress)) for target in watched),
                attempts=as_array(np.int64(min(self.pace.size, max_steps - tried))),
                longest=as_array(np.float64(longest)),
            )
            began = time.perf_counter()
            reason = self._advance(rules, limits)
            self.pace.took(time.perf_counter() - began)
            match reason:
                case stepping.CROSSED:
                    return self._land_first(watched)
                case stepping.LANDED:
                    return next(target for target in targets if target.clock == s_end)
                case stepping.COUNTED:
                    return next(target for target in targets if target.steps == steps)
                case stepping.STALLED:
                    return self._why_stalled()
            look()
        return out_of_steps(max_steps, targets[0].rule)

    def _advance(self, rules: tuple[AbstractRule, ...], limits: Limits) -> int:
        """Go on until one of ``limits``; where the solver finds the flow stiff, use the next."""
        self.carry, reason = stepping.advance(
            self.field,
            self.solver,
            self.tolerance,
            rules,
            self.carry,
            limits,
            watch_stiffness=bool(self.stiffer),
        )
        if int(reason) == stepping.STIFF:
            self.explicit_evaluations += self._explicit_evaluations()
            self.began_at = self.num_steps
            self.solver, *self.stiffer = self.stiffer
            self._begin(self.carry.s, self.carry.state, self.carry)
        return int(reason)

    def _why_stalled(self) -> End:
        rtol = float(self.tolerance.rtol)
        return why_stalled(self.field.problem, self.weights, self.first_slope, rtol)

    def _land_first(self, watched: list[Target]) -> Target:
        """Land on the earliest of the watched rules that the last step crossed."""
        crossed = [target for target in watched if self.progress(target.rule) >= target.progress]
        landed = [
            stepping.land(
                self.field,
                self.solver,
                anonymous(target.rule),
                self.carry,
                as_array(np.float64(target.progress)),
            )
            for target in crossed
        ]
        first = int(np.argmin([float(carry.s) for carry in landed]))
        self.carry = landed[first]
        return crossed[first]


@eqx.filter_jit
def _look(
    field: FlowField, carry: Carry, rules: tuple[AbstractRule, ...]
) -> tuple[dict[str, Any], list[jax.Array]]:
    at = stepping.observe(field, carry.state, carry.num_steps, rules)
    found: dict[str, Any] = {"log_time": at.log_time, "num_steps": carry.num_steps}
    risk, time = field.clock.log_risk_at(carry.s), field.clock.log_time_at(carry.s)
    if risk is not None:
        found["clock_error"] = jnp.abs(at.log_risk - risk) / jnp.maximum(1.0, jnp.abs(at.log_risk))
    if time is not None:
        error = jnp.abs(at.log_time - time) / jnp.maximum(1.0, jnp.abs(time))
        found["clock_error"] = jnp.where(carry.state.scaled_time > 0, error, 0.0)
        # Where t R underflows, the clock still knows t.
        found["log_time"] = jnp.where(carry.state.scaled_time > 0, at.log_time, time)
    return found, [rule.progress(at) for rule in rules]

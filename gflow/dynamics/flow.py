"""Gradient flow: one call from weights to a record of the whole trajectory."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics import clocks, stepping
from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.gauss_newton import GaussNewton
from gflow.dynamics.progress import ProgressBar
from gflow.dynamics.recorder import Observable, Recorder
from gflow.dynamics.stepping import Carry, Limits, Tolerance
from gflow.dynamics.until import AbstractRule, AnyOf, LogTime, Steps, Time, as_rules, save_grid
from gflow.problem.network import Array, Weights
from gflow.problem.risk import Problem, risk_and_slope

if TYPE_CHECKING:
    import xarray as xr

ATTEMPTS_A_CALL = 2_000
"""Steps tried between two looks of the host: progress moves and Ctrl-C answers this often."""

NO_STEP_COUNT = np.iinfo(np.int64).max


def gradient_flow(
    problem: Problem,
    weights: Weights,
    *,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray = 100,
    observables: Mapping[str, Observable] | None = None,
    progress: bool | None = None,
    keep_weights: bool = False,
    clock: clocks.AbstractClock | None = None,
    solver: diffrax.AbstractAdaptiveSolver | None = None,
    rtol: float = 1e-9,
    atol: float | None = None,
    max_steps: int = 1_000_000,
) -> "xr.Dataset":
    r"""Integrate $\dot W = -\nabla R(W)$ and record what happens on the way.

    Computes in float64 whatever JAX's global setting is, in the log domain, in a clock in which
    the flow is well scaled, so that risks like $e^{-10^6}$ are ordinary requests.

    Args:
        problem: data, network and loss.
        weights: the start: layer matrices from input to output (see ``gflow.init``), or any
            pytree of arrays for a ``gflow.Network``.
        until: a stopping rule, or several joined with ``|``; the first written is the leading one.
        save: how many points to record, both ends counted, evenly spaced in the logarithm of the
            leading rule's coordinate; or an increasing array of values of that coordinate. The
            solver steps onto every one of them.
        observables: further observables, name to function of (problem, weights).
        progress: show a progress bar; None shows it on terminals and in notebooks. It appears
            after two seconds.
        keep_weights: record the weights at every saved point as ``weights_1``, ``weights_2``, …
        clock: what the solver steps in, from ``gflow.clocks``; by default ``LogTime`` if the
            leading rule is a time and ``LogRisk`` otherwise.
        solver: any adaptive diffrax solver. By default gflow chooses: :class:`GaussNewton` where
            its linear algebra costs nothing beside the field, else ``diffrax.Dopri8`` as long as
            accuracy limits its step and ``GaussNewton`` from where stability would.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a weight; by default ``rtol`` times the typical entry of the
            smallest layer that is not zero, at most ``rtol``.
        max_steps: steps to try in all before giving up.

    Returns:
        The record: an ``xarray.Dataset`` with dimension ``point``. ``attrs["status"]`` is
        "reached", or says why the run stopped before its goal ("max_steps", "stalled",
        "interrupted"), and ``attrs["message"]`` explains; everything computed so far is there.

    Raises:
        ValueError: when an argument is malformed, or the gradient vanishes at the start.

    Warns:
        UserWarning: when $R(W(0)) > R(0)$, so that the paper's assumption fails.
    """
    rtol, atol = _tolerances(rtol, atol)
    max_steps = _positive("max_steps", max_steps)
    rules = as_rules(until)
    with jax.enable_x64(True):
        weights = problem.check(weights)
        recorder = Recorder(problem, weights, observables, keep_weights)
        clock = clock or default_clock(rules[0])
        solvers = (solver,) if solver is not None else default_solvers(problem)
        run = _Run(problem, clock, solvers, weights, rtol, atol)
        recorder.save(weights, **run.scalars())
        status, message = _follow(run, recorder, rules, save, progress, max_steps)
        return recorder.record(
            kind="flow",
            status=status,
            message=message,
            until=" | ".join(map(repr, rules)),
            clock=clock.name,
            solver=", then ".join(run.used),
            rtol=rtol,
            atol=float(run.tolerance.atol),
            **run.counts(),
        )


def default_clock(rule: AbstractRule) -> clocks.AbstractClock:
    """The clock that lands on the leading rule's values by itself."""
    return clocks.LogTime() if isinstance(rule, Time | LogTime) else clocks.LogRisk()


SMALL_SYSTEM = 64
"""Up to so many coordinates the implicit solver's dense systems cost less than an explicit
solver's extra evaluations, and one compilation serves the whole run."""


def default_solvers(problem: Problem) -> tuple[diffrax.AbstractAdaptiveSolver, ...]:
    """The solvers of a run, each used until the flow is too stiff for it."""
    small = problem.data.num_points if problem.design is None else min(problem.design.shape)
    if small <= SMALL_SYSTEM:
        return (GaussNewton(),)
    return (diffrax.Dopri8(), GaussNewton())


class _Run:
    """A flow on its way: the field, the solvers and the carry between two calls of ``advance``."""

    def __init__(
        self,
        problem: Problem,
        clock: clocks.AbstractClock,
        solvers: tuple[diffrax.AbstractAdaptiveSolver, ...],
        weights: Weights,
        rtol: float,
        atol: float | None,
    ):
        self.field = FlowField(problem, clock)
        self.solver, *self.stiffer = solvers
        self.used: list[str] = []
        self.explicit_evaluations = self.began_at = 0
        state = FlowState(weights, np.zeros(()))
        atol = stepping.default_atol(state, rtol) if atol is None else atol
        self.tolerance = Tolerance(np.float64(rtol), np.float64(atol))
        s = clock.read(float(risk_and_slope(problem, state.weights)[0]), -math.inf)
        self._begin(np.float64(s), state)

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

    def advance(self, rules: tuple[AbstractRule, ...], limits: Limits) -> int:
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
            self.began_at = int(self.carry.num_steps)
            self.solver, *self.stiffer = self.stiffer
            self._begin(self.carry.s, self.carry.state, self.carry)
        return int(reason)

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
        if not isinstance(self.solver, diffrax.AbstractERK):
            return 0
        tableau = self.solver.tableau
        stages = len(tableau.c) + 1 - int(tableau.fsal)
        return stages * (int(self.carry.num_steps) - self.began_at)

    def scalars(self) -> dict[str, object]:
        """What a saved point holds beside the observables of its weights."""
        found, _ = _look(self.field, self.carry, ())
        return found

    def progress(self, rule: AbstractRule) -> float:
        """How far the run is in the coordinate of ``rule``."""
        _, (progress,) = _look(self.field, self.carry, (rule,))
        return float(progress)


@eqx.filter_jit
def _look(
    field: FlowField, carry: Carry, rules: tuple[AbstractRule, ...]
) -> tuple[dict[str, object], list[jax.Array]]:
    at = stepping.observe(field, carry.state, carry.num_steps, rules)
    found: dict[str, object] = {"log_time": at.log_time, "num_steps": carry.num_steps}
    expected = field.clock.log_risk_at(carry.s)
    if expected is not None:
        found["clock_error"] = jnp.abs(at.log_risk - expected) / jnp.maximum(1.0, -at.log_risk)
    return found, [rule.progress(at) for rule in rules]


class _Target(NamedTuple):
    """Where one rule wants to stop, in the terms of the clock at hand."""

    rule: AbstractRule
    progress: float
    clock: float
    """The clock's value there, infinite when the clock cannot know it."""
    steps: int

    @classmethod
    def of(cls, rule: AbstractRule, progress: float, clock: clocks.AbstractClock) -> "_Target":
        if isinstance(rule, Steps):
            return cls(rule, progress, math.inf, round(math.expm1(progress)))
        value = rule.clock_value(progress, clock)
        return cls(rule, progress, math.inf if value is None else value, NO_STEP_COUNT)

    @property
    def watched(self) -> bool:
        """Whether only looking after each step can tell that the rule is met."""
        return math.isinf(self.clock) and self.steps == NO_STEP_COUNT


def _follow(
    run: _Run,
    recorder: Recorder,
    rules: tuple[AbstractRule, ...],
    save: int | Sequence[float] | np.ndarray,
    progress: bool | None,
    max_steps: int,
) -> tuple[str, str]:
    """Run from saved point to saved point; returns the status and its message."""
    lead, *others = rules
    clock = run.field.clock
    for rule in rules:
        if run.progress(rule) >= rule.goal:
            return "reached", f"{rule!r} is met at the start; nothing was integrated"
    begin = run.progress(lead)
    grid = save_grid(lead, begin, save)
    ends = [_Target.of(rule, rule.goal, clock) for rule in others]
    with ProgressBar("gradient flow", begin, float(grid[-1]), progress) as bar:
        for progress_value in grid:
            targets = [_Target.of(lead, float(progress_value), clock), *ends]
            try:
                met = _reach(run, targets, max_steps, bar)
            except KeyboardInterrupt:
                recorder.save(run.carry.state.weights, **run.scalars())
                return "interrupted", "stopped by the keyboard; what was computed is in the record"
            recorder.save(run.carry.state.weights, **run.scalars())
            if isinstance(met, _Failure):
                return met
            if met.rule is not lead or progress_value == grid[-1]:
                return "reached", f"{met.rule!r} after {int(run.carry.num_steps)} steps"
    raise AssertionError("the last saved point is the leading rule's goal")


class _Failure(NamedTuple):
    status: str
    message: str


def _reach(
    run: _Run, targets: list[_Target], max_steps: int, bar: ProgressBar
) -> _Target | _Failure:
    """Advance to the first of ``targets`` and say which it was, or why none was reached."""
    watched = [target for target in targets if target.watched]
    rules = tuple(target.rule for target in watched)
    s_end = min(target.clock for target in targets)
    steps = min(target.steps for target in targets)
    while (tried := int(run.carry.num_steps + run.carry.num_rejected)) < max_steps:
        limits = Limits(
            s_end=np.float64(s_end),
            num_steps=np.int64(steps),
            goals=tuple(np.float64(target.progress) for target in watched),
            attempts=np.int64(min(ATTEMPTS_A_CALL, max_steps - tried)),
        )
        match run.advance(rules, limits):
            case stepping.CROSSED:
                return _land_first(run, watched)
            case stepping.LANDED:
                return next(target for target in targets if target.clock == s_end)
            case stepping.COUNTED:
                return next(target for target in targets if target.steps == steps)
            case stepping.STALLED:
                return _Failure("stalled", _why_stalled(run))
        bar.update(run.progress(targets[0].rule), f"{int(run.carry.num_steps)} steps")
    return _Failure(
        "max_steps",
        f"{max_steps} steps were tried before {targets[0].rule!r} was reached; raise "
        "`max_steps`, or loosen `rtol`",
    )


def _land_first(run: _Run, watched: list[_Target]) -> _Target:
    """Land on the earliest of the watched rules that the last step crossed."""
    crossed = [target for target in watched if run.progress(target.rule) >= target.progress]
    landed = [
        stepping.land(run.field, run.solver, target.rule, run.carry, np.float64(target.progress))
        for target in crossed
    ]
    first = int(np.argmin([float(carry.s) for carry in landed]))
    run.carry = landed[first]
    return crossed[first]


def _why_stalled(run: _Run) -> str:
    carry = run.carry
    log_risk, squared = risk_and_slope(run.field.problem, carry.state.weights)
    where = f"the step size vanished at log R = {float(log_risk):.6g}"
    at_zero = float(run.field.problem.log_risk_at_zero())
    if float(log_risk) >= at_zero:
        return (
            f"{where}, above log R(0) = {at_zero:.6g}, with |grad log R| = "
            f"{math.sqrt(float(squared)):.2g}: the flow is running into a saddle, which it may "
            "from a start with R(W(0)) > R(0); a time clock (`until=gflow.Time(...)`) shows the "
            "approach"
        )
    return f"{where}: the tolerances are below what float64 can hold there"


def _tolerances(rtol: float, atol: float | None) -> tuple[float, float | None]:
    if not 1e-14 <= rtol < 1:
        raise ValueError(
            f"`rtol` is {rtol}; expected a number from 1e-14, the least that float64 can hold, "
            "to below 1."
        )
    if atol is not None and not 0 < atol < 1:
        raise ValueError(f"`atol` is {atol}; expected a number between 0 and 1, or None.")
    return float(rtol), atol


def _positive(name: str, value: int) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"`{name}` is {value}; expected a positive whole number.")
    return int(value)

r"""Gradient flow: one call from weights to a record of the whole trajectory."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import numpy as np

from gflow.dynamics import clocks
from gflow.dynamics.certify import certify_by, evidence, second_tolerance
from gflow.dynamics.checkpoint import Checkpoint, CheckpointError, End, identity
from gflow.dynamics.far import FarRun, hand_over_error
from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.gauss_newton import GaussNewton
from gflow.dynamics.near import NearRun
from gflow.dynamics.progress import ProgressBar
from gflow.dynamics.recorder import Observable, Recorder
from gflow.dynamics.slow_manifold import SlowManifold
from gflow.dynamics.targets import Failure, Target
from gflow.dynamics.until import (
    AbstractRule,
    AnyOf,
    LogRisk,
    LogTime,
    Time,
    as_rules,
    positive_count,
    save_grid,
)
from gflow.problem.modified import (
    ModifiedEquation,
    ModifiedProblem,
    expect_faded,
    modify,
    why_stopped,
)
from gflow.problem.network import Weights, as_array
from gflow.problem.observables import imbalance, is_deep_linear
from gflow.problem.risk import ROUND_OFF, Problem, risk_and_slope

if TYPE_CHECKING:
    import xarray as xr

Solver = diffrax.AbstractAdaptiveSolver | SlowManifold

SMALL_SYSTEM = 64
"""Up to so many coordinates the implicit solver's dense systems cost less than an explicit
solver's extra evaluations, and one compilation serves the whole run."""

ARRIVED = 1e-9
"""The clock lands on a risk up to the integration error of the risk itself."""

SADDLE = 1e-4
"""A slope that has fallen below this part of the first one, on the level R(0), is that of a saddle:
on which side the flow would leave it is beyond the tolerances."""

UNCERTAIN_MARGIN = 1 / float(np.finfo(np.float64).eps)
"""A margin of this size is uncertain by one: which points share the slope is then no longer known
from float64 weights."""

LARGEST_MARGIN = 1e150
"""The square of a larger one may leave float64's range; polynomial tails come to that."""

COMPARE_AT, HAND_OVER_AT = -1e5, -1e6
"""Log risks at which the run on the weights is compared with the continuation, and handed over.
Further out, float64 weights still carry the flow but not its misalignment and direction error."""


def gradient_flow(
    problem: Problem,
    weights: Weights,
    *,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray = 100,
    observables: Mapping[str, Observable] | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_weights: bool = False,
    clock: clocks.AbstractClock | None = None,
    solver: diffrax.AbstractAdaptiveSolver | None = None,
    modified: ModifiedEquation | None = None,
    rtol: float = 1e-9,
    atol: float | None = None,
    function_space: bool = False,
    max_steps: int = 1_000_000,
    certify: bool = False,
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
        checkpoint: a file that is written every few seconds. After a kill, or Ctrl-C, the same call
            goes on from there, and its record is that of a run that was never stopped, bit for bit
            on the same machine and versions; after the end it returns the record at once. Another
            run's file is refused. With "max_steps" the same call may have a larger ``max_steps``.
        keep_weights: record the weights at every saved point as ``weights_1``, ``weights_2``, …
        clock: what the solver steps in, from ``gflow.clocks``; by default ``LogTime`` if the
            leading rule is a time and ``LogRisk`` otherwise.
        solver: any adaptive diffrax solver, or ``SlowManifold()`` for a start that has separated
            the data. By default gflow chooses: ``GaussNewton`` where
            its linear algebra costs nothing beside the field, else ``diffrax.Dopri8`` as long as
            accuracy limits its step and ``GaussNewton`` from where stability would; beyond
            log R = -1e6 ``SlowManifold``, in whose coordinates nothing small is lost.
        modified: a ``ModifiedEquation`` to integrate instead of $\dot W = -\nabla R$: the flow that
            descent with its learning rate follows, in any clock and by any solver, to any horizon.
            By default ``Dopri8`` comes first: what the equation adds makes ``GaussNewton`` slow to
            compile. Where $R$ times the learning rate is below round-off it is the plain flow.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a weight; by default ``rtol`` times the typical entry of the
            smallest layer that is not zero, at most ``rtol``.
        function_space: let ``rtol`` bound what the error of a step does to what the network
            computes: to the margins and to the end-to-end vector (to the outputs, for a
            ``gflow.Network``), each relative to its size, and to each layer relative to the layer.
            Over a run the errors of its steps add up to a few times that. For starts whose layers
            differ by many orders of magnitude, which one ``atol`` for all weights cannot serve.
        max_steps: steps to try in all before giving up.
        certify: follow the flow a second time, at a tenth of the tolerance, and record the error of
            every observable, as ``margin_error`` that of ``margin`` (see
            ``gflow.dynamics.certify``). It compiles nothing, costs about another run and is not
            part of ``checkpoint``: after a kill it is repeated.

    Returns:
        The record: an ``xarray.Dataset`` with dimension ``point``. ``attrs["status"]`` is
        "reached", or says why the run stopped before its goal ("max_steps", "stalled",
        "precision_lost", "interrupted", "checkpoint_failed"), and ``attrs["message"]`` explains;
        everything computed so far is there.

    Raises:
        ValueError: when an argument is malformed, the gradient vanishes at the start, or
            ``checkpoint`` is damaged or another run's.
        OSError: when ``checkpoint`` cannot be written from the start.

    Warns:
        UserWarning: when $R(W(0)) > R(0)$, so that the paper's assumption fails.
    """
    rtol, atol = _tolerances(rtol, atol, function_space)
    max_steps = positive_count("max_steps", max_steps)
    rules = tuple(rule.on(problem) for rule in as_rules(until))
    with jax.enable_x64(True):
        weights = problem.check(weights)
        recorder = Recorder(problem, weights, observables, keep_weights)
        clock = clock or default_clock(rules[0])
        followed = problem if modified is None else modify(problem, weights, modified)
        if isinstance(followed, ModifiedProblem) and isinstance(solver, SlowManifold):
            expect_faded(followed, weights)

        def new_run(rtol: float, atol: float | None) -> Run:
            chosen = (solver,) if solver else default_solvers(followed, rtol)
            return Run(followed, clock, chosen, weights, rtol, atol, max_steps, function_space)

        run = new_run(rtol, atol)
        path = None if checkpoint is None else Path(checkpoint)
        status, message = _follow(run, recorder, rules, save, progress, path)
        if isinstance(followed, ModifiedProblem) and status in ("stalled", "precision_lost"):
            status, message = why_stopped(problem, followed, run.now.weights) or (status, message)
        facts = {"wall_time": recorder.seconds(), **run.facts()}
        more = evidence(recorder, conserved=modified is None)
        if certify:
            second = second_tolerance(rtol)
            other = new_run(second, atol and atol * second / rtol)
            errors, told = certify_by(other, recorder, second, progress)
            more, facts = more | errors, facts | told
        return recorder.record(
            more,
            kind="flow" if modified is None else "modified flow",
            modified_step=modified and modified.step,
            modified_order=modified and modified.order,
            status=status,
            message=message,
            until=" | ".join(map(repr, rules)),
            clock=clock.name,
            rtol=rtol,
            function_space=function_space,
            **facts,
        )


def default_clock(rule: AbstractRule) -> clocks.AbstractClock:
    """The clock that lands on the leading rule's values by itself."""
    return clocks.LogTime() if isinstance(rule, Time | LogTime) else clocks.LogRisk()


def default_solvers(problem: Problem, rtol: float) -> tuple[Solver, ...]:
    """The solvers that gflow chooses, in the order of their use."""
    far = SlowManifold(rtol=max(rtol, 1e-13))
    coordinates = problem.data.num_points if problem.design is None else min(problem.design.shape)
    if coordinates <= SMALL_SYSTEM and not isinstance(problem, ModifiedProblem):
        return GaussNewton(), far
    return diffrax.Dopri8(), GaussNewton(), far


class Run:
    """The whole run: on the weights first, in split coordinates from the hand-over on."""

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

    def reach(
        self, targets: list[Target], look: Callable[[], None], pieces: int = 1
    ) -> Target | Failure:
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
                return Failure(
                    "stalled",
                    f"the flow runs into a saddle at R = R(0), with |grad log R| = {slope:.2g}, as "
                    "it may from a start with R(W(0)) > R(0); a time clock "
                    "(`until=gflow.Time(...)`) shows the approach",
                )
            self.above_zero = False
        while self.manifold is not None and isinstance(self.now, NearRun):
            compared = self.early is not None or not self.compares
            goal = LogRisk(HAND_OVER_AT if compared else COMPARE_AT)
            step = Target.of(goal, goal.goal, self.clock)
            if not self._arrived(self.now, step):
                met = self._reach_near(self.now, [*targets, step], look, pieces)
                lost = isinstance(met, Failure) and met.status == "precision_lost"
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
    ) -> Target | Failure:
        """Go on, on the weights, to the first of ``targets`` or to where float64 weights end."""
        rule, reason = self._wall
        wall = Target.of(rule, rule.goal, self.clock)
        met = near.reach([*targets, wall], self.max_steps, look, pieces)
        return met if met is not wall else Failure("precision_lost", reason)

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


def _follow(
    run: Run,
    recorder: Recorder,
    rules: tuple[AbstractRule, ...],
    save: int | Sequence[float] | np.ndarray,
    progress: bool | None,
    checkpoint: Path | None,
) -> End:
    """Run from saved point to saved point; returns the status and its message."""
    lead, *others = rules
    run.save(recorder)
    for rule in rules:
        if run.now.progress(rule) >= rule.goal:
            return End("reached", f"{rule!r} is met at the start; nothing was integrated")
    begin = run.now.progress(lead)
    grid = save_grid(lead, begin, save)
    ends = [Target.of(rule, rule.goal, run.clock) for rule in others]
    kept = Checkpoint(checkpoint, lambda: _identity(run, recorder, rules, grid), run, recorder)
    done, end = kept.resume()
    with ProgressBar("gradient flow", begin, float(grid[-1]), progress) as bar:

        def look() -> None:
            if bar.shown:
                bar.update(run.now.progress(lead), f"{run.now.num_steps} steps")
            kept.look(done)

        try:
            while end is None:
                met = run.reach([Target.of(lead, float(grid[done]), run.clock), *ends], look)
                if isinstance(met, Failure) and met.status == "max_steps":
                    kept.flush()  # without the point to come: a larger `max_steps` goes on
                if run.now.num_steps > recorder.num_steps:
                    run.save(recorder)
                if isinstance(met, Failure):
                    end = End(*met)
                elif met.rule is not lead or done == len(grid) - 1:
                    end = End("reached", f"{met.rule!r} after {run.now.num_steps} steps")
                done += 1
                if end is None:
                    look()
                elif end.status != "max_steps":
                    kept.close(done, end)
        except CheckpointError as error:
            end = End("checkpoint_failed", str(error))
        except KeyboardInterrupt:
            end = End("interrupted", "stopped by the keyboard; what was computed is in the record")
            with contextlib.suppress(CheckpointError):
                kept.flush()
        if run.now.num_steps > recorder.num_steps:
            run.save(recorder)
    return end


def _identity(
    run: Run, recorder: Recorder, rules: tuple[AbstractRule, ...], grid: np.ndarray
) -> dict[str, str]:
    """What the run is, for its checkpoint."""
    field = FlowField(run.problem, run.clock)
    return identity(
        run.problem,
        recorder.start,
        recorder,
        field,
        (np.float64(0.0), FlowState(recorder.start, as_array(np.zeros(())))),
        kind="gradient_flow",
        until=[(type(rule).__name__, rule.value) for rule in rules],
        save=grid,
        clock=run.clock,
        solvers=run.solvers,
        rtol=run.rtol,
        atol=run.atol,
        function_space=run.function_space,
    )


def _tolerances(
    rtol: float, atol: float | None, function_space: bool
) -> tuple[float, float | None]:
    if not 1e-14 <= rtol < 1:
        raise ValueError(
            f"`rtol` is {rtol}; expected a number from 1e-14, the least that float64 can hold, "
            "to below 1."
        )
    if atol is not None and function_space:
        raise ValueError(
            f"`atol` is {atol} beside `function_space=True`, in which every error is relative; "
            "expected one or the other."
        )
    if atol is not None and not 0 < atol < 1:
        raise ValueError(f"`atol` is {atol}; expected a number between 0 and 1, or None.")
    return float(rtol), atol

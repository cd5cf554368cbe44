r"""Gradient flow: one call from weights to a record of the whole trajectory."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax
import numpy as np

from gflow.dynamics import clocks
from gflow.dynamics.drive.certify import certificate, evidence, second_tolerance, shorter
from gflow.dynamics.drive.drive import follow
from gflow.dynamics.drive.events import Action, AtStart, Course, Event, course
from gflow.dynamics.drive.flow_run import FlowRun, Plan
from gflow.dynamics.drive.piecewise_run import flow_run
from gflow.dynamics.drive.recorder import Observable, Recorder
from gflow.dynamics.field import AbstractField, FlowField, FlowState
from gflow.dynamics.horizon import PATIENCE, is_near
from gflow.dynamics.march.of_diffrax import method_of
from gflow.dynamics.march.runge_kutta import sharp
from gflow.dynamics.march.tolerance import (
    AbstractTolerance,
    FunctionTolerance,
    Residuals,
    Tolerance,
    default_atol,
)
from gflow.dynamics.modified import ModifiedEquation, modified_field
from gflow.dynamics.radau.gauss_newton import GaussNewton
from gflow.dynamics.reasons import Reason
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.stops import AbstractRule, AnyOf, rules_on
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, expect, flag, number, positive_count
from gflow.problem.array import as_array
from gflow.problem.risk import Problem, level_at_zero
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr

Solver = diffrax.AbstractAdaptiveSolver | SlowManifold


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
            leading rule is a time, or the loss a square, and ``LogRisk`` otherwise.
        solver: any adaptive diffrax solver, or ``SlowManifold()`` for a start that has separated
            the data. By default gflow chooses: ``GaussNewton`` where
            its linear algebra costs nothing beside the field and the flow goes far, else
            ``diffrax.Dopri8`` as long as accuracy limits its step and ``GaussNewton`` from where
            stability would; beyond log R = -1e6 ``SlowManifold``, in whose coordinates nothing
            small is lost.
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
            ``gflow.dynamics.drive.certify``). It compiles nothing, costs about another run and is
            not part of ``checkpoint``: after a kill it is repeated.

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
    options = Options(
        observables, keep_weights, clock, solver, modified, rtol, atol, function_space, max_steps
    )
    check(problem, options)
    certify = bool(flag("certify", certify))
    if certify and clock is not None and not (clock.knows_time or clock.centred):
        raise ValueError(
            f"`certify` is true, and `clock` is {clock.name}, in which two runs have no points in "
            "common; expected a clock of time or of risk."
        )
    with settings.own():
        run = flow_of(problem, weights, until, save, options)
        follow(run, progress=progress, path=checkpoint)
        wall_time, second = run.recorder.seconds(), None
        if certify:
            second = second_run(run, options)
            follow(second, progress=progress)
        more, attrs = told(run, options, second)
        run.recorder.more = run.log
        return run.recorder.record(more, **attrs, wall_time=wall_time)


BY_TIME, BY_RISK = clocks.LogTime(), clocks.LogRisk()
"""The clocks that are chosen by default."""


class Options(NamedTuple):
    """How a flow is followed and what is recorded: arguments of :func:`gradient_flow`."""

    observables: Mapping[str, Observable] | None = None
    keep_weights: bool = False
    clock: clocks.AbstractClock | None = None
    solver: Solver | None = None
    modified: ModifiedEquation | None = None
    rtol: float = 1e-9
    atol: float | None = None
    function_space: bool = False
    max_steps: int = 1_000_000
    many: bool = False
    """Whether others may go beside it, in lanes."""


def check(problem: Problem, options: Options) -> None:
    """Refuse what no start could make right.

    Raises:
        ValueError: that names the argument.
    """
    expect("problem", problem, Problem, A_PROBLEM)
    clock = "a clock, as `gflow.clocks.LogTime()`"
    expect("clock", options.clock, clocks.AbstractClock | None, clock)
    solvers = "an adaptive solver, as `diffrax.Tsit5()` or `gflow.GaussNewton()`"
    expect("solver", options.solver, diffrax.AbstractAdaptiveSolver | SlowManifold | None, solvers)
    equation = "a modified equation, as `gflow.ModifiedEquation(0.1)`"
    expect("modified", options.modified, ModifiedEquation | None, equation)
    flag("function_space", options.function_space)
    positive_count("max_steps", options.max_steps)
    least = "a number from 1e-14, the least that float64 can hold, to below 1"
    number("rtol", options.rtol, least, lambda value: 1e-14 <= value < 1)
    if options.atol is None:
        return
    if options.function_space:
        raise ValueError(
            f"`atol` is {options.atol} beside `function_space=True`, in which every error is "
            "relative; expected one or the other."
        )
    between = "a number between 0 and 1, or None"
    number("atol", options.atol, between, lambda value: 0 < value < 1)


def flow_of(
    problem: Problem,
    weights: Weights,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray,
    options: Options,
) -> FlowRun:
    """A flow at its start, with the first point recorded.

    Raises:
        ValueError: when the weights do not fit the problem, the gradient vanishes there, or the
            points to save are no sensible ones.
    """
    weights = problem.check(weights)
    rules = rules_on(problem, weights, until)
    clock = options.clock or default_clock(rules[0], problem)
    recorder = Recorder(problem, weights, options.observables, options.keep_weights)
    at_start = AtStart.of(problem, weights)
    way = course(problem, weights, rules, save, clock, at_start)
    return flow_run(plan(problem, weights, rules, clock, options), recorder, rules, way, at_start)


def plan(
    problem: Problem,
    weights: Weights,
    rules: Sequence[AbstractRule],
    clock: clocks.AbstractClock,
    options: Options,
) -> Plan:
    """The field, the solvers in the order of their use, and how exact they are to be."""
    field: AbstractField = FlowField(problem, clock)
    if options.modified is not None:
        field = modified_field(problem, clock, options.modified, weights)
    rtol, split = options.rtol, None
    match options.solver:
        case None:
            # Of a risk that is attained, stiffness comes once it nearly is.
            # To a time pieces between kinks are short, and steps limited by accuracy.
            kinked = problem.network.kinks(weights, problem.data) is not None
            explicit = problem.loss.attained or not field.dense or (kinked and clock.knows_time)
            methods = [GaussNewton.suited(problem, weights)]
            if explicit:
                methods = [diffrax.Dopri8(), *methods]
            elif is_near(problem, weights, rules):
                methods = [sharp(diffrax.Dopri8(), rtol, PATIENCE), *methods]
            if not problem.loss.attained:
                split = SlowManifold(rtol=max(rtol, 1e-13))
        case SlowManifold() as split:
            methods = []
            if (why := field.faded(weights)) is not None:
                raise ValueError(
                    "`solver` is SlowManifold, whose coordinates are those of the plain flow; at "
                    f"the start {why}. Leave `solver` out: the default goes on in these "
                    "coordinates from where nothing is added."
                )
        case solver:
            methods = [solver]
    if options.modified is not None and problem.network.kinks(weights, problem.data) is not None:
        raise ValueError(
            "`modified` is given for a network with kinks, at which the derivatives that the "
            "modified equation consists of do not exist; leave it out."
        )
    state = FlowState(weights, as_array(np.zeros(())))
    atol = default_atol(state, rtol) if options.atol is None else float(options.atol)
    least = problem.loss.least_log_risk
    residuals = None
    if math.isfinite(least):
        first = as_array(np.float64(level_at_zero(problem))) if clock.knows_time else None
        residuals = Residuals(problem, as_array(np.float64(least)), first)
    tolerance: AbstractTolerance = Tolerance(
        as_array(np.float64(rtol)), as_array(np.float64(atol)), residuals
    )
    if options.function_space:
        tolerance = FunctionTolerance(tolerance.rtol, problem, tolerance)
    legs = tuple(method_of(solver, rtol, atol).among(options.many) for solver in methods)
    return Plan(field, legs, split, tolerance, atol, options.max_steps)


def second_run(run: FlowRun, options: Options) -> FlowRun:
    """The run that certifies another: at another tolerance, over the same points.

    Between saved points joined by few steps it may be the saved points, or what Newton bears, that
    shorten the steps, whatever the tolerance. There the second run takes shorter ones.
    """
    rtol = second_tolerance(run.plan.tolerance.rtol.item())
    atol = None if options.atol is None else options.atol * rtol / options.rtol
    options = options._replace(rtol=rtol, atol=atol)
    recorder = run.recorder
    taken = np.diff(recorder.column("num_steps")).tolist()
    saves = [
        Event.at(value, shorter(steps), run.clock)
        for value, steps in zip(recorder.column("clock_value")[1:].tolist(), taken, strict=True)
    ]
    saves[-1:] = [last._replace(action=Action.STOP) for last in saves[-1:]]
    again = Recorder(recorder.problem, recorder.start, recorder.extra, keep_weights=False)
    followed = plan(recorder.problem, recorder.start, run.rules, run.clock, options)
    end = None if saves else Reason.REACHED_AT_START.end(rule=run.rules[0])
    at_start = AtStart.of(recorder.problem, recorder.start)
    way = Course(saves, [], end)
    other = flow_run(followed, again, run.rules, way, at_start, compares=False)
    other.name = "certificate"
    return other


def told(
    run: FlowRun, options: Options, second: FlowRun | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a record says of a flow beside the points that were recorded on the way.

    Args:
        run: at its end.
        options: of the flow.
        second: the run that certifies it, at its end, if there is one.

    Returns:
        Variables, and attributes.
    """
    modified, end = options.modified, run.end
    assert end is not None
    variables = evidence(run.recorder, conserved=modified is None)
    attrs = {
        "kind": "flow" if modified is None else "modified flow",
        "modified_step": modified and modified.step,
        "modified_order": modified and modified.order,
        "status": end.status,
        "message": end.message,
        "until": " | ".join(map(repr, run.rules)),
        "clock": run.clock.name,
        "rtol": float(options.rtol),
        "function_space": bool(options.function_space),
        **run.facts(),
    }
    if second is not None:
        errors, facts = certificate(run, second)
        variables, attrs = variables | errors, attrs | facts
    return variables, attrs


def default_clock(rule: AbstractRule, problem: Problem) -> clocks.AbstractClock:
    """The clock that lands on the leading rule's values by itself, unless it may stand still."""
    return BY_TIME if rule.of_time or problem.loss.attained else BY_RISK

r"""Gradient flow: one call from weights to a record of the whole trajectory."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import diffrax
import numpy as np

from gflow.dynamics import clocks
from gflow.dynamics.certify import certify_by, evidence, second_tolerance
from gflow.dynamics.flow_run import FlowRun, Solver
from gflow.dynamics.following import follow
from gflow.dynamics.gauss_newton import GaussNewton
from gflow.dynamics.recorder import Observable, Recorder
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.until import (
    AbstractRule,
    AnyOf,
    LogTime,
    Time,
    as_rules,
)
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, expect, flag, number, positive_count
from gflow.problem.modified import (
    ModifiedEquation,
    ModifiedProblem,
    expect_faded,
    modify,
    why_stopped,
)
from gflow.problem.network import Weights
from gflow.problem.risk import Problem

if TYPE_CHECKING:
    import xarray as xr

SMALL_SYSTEM = 64
"""Up to so many coordinates the implicit solver's dense systems cost less than an explicit
solver's extra evaluations, and one compilation serves the whole run."""


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
    expect("problem", problem, Problem, A_PROBLEM)
    expect("clock", clock, clocks.AbstractClock | None, "a clock, as `gflow.clocks.LogTime()`")
    solvers = "an adaptive solver, as `diffrax.Tsit5()` or `gflow.GaussNewton()`"
    expect("solver", solver, diffrax.AbstractAdaptiveSolver | SlowManifold | None, solvers)
    equation = "a modified equation, as `gflow.ModifiedEquation(0.1)`"
    expect("modified", modified, ModifiedEquation | None, equation)
    function_space = bool(flag("function_space", function_space))
    certify = bool(flag("certify", certify))
    rtol, atol = tolerances(rtol, atol, function_space)
    max_steps = positive_count("max_steps", max_steps)
    with settings.own():
        rules = tuple(rule.on(problem) for rule in as_rules(until))
        weights = problem.check(weights)
        recorder = Recorder(problem, weights, observables, keep_weights)
        clock = clock or default_clock(rules[0])
        followed = problem if modified is None else modify(problem, weights, modified)
        if isinstance(followed, ModifiedProblem) and isinstance(solver, SlowManifold):
            expect_faded(followed, weights)

        def new_run(rtol: float, atol: float | None) -> FlowRun:
            chosen = (solver,) if solver else default_solvers(followed, rtol)
            return FlowRun(followed, clock, chosen, weights, rtol, atol, max_steps, function_space)

        run = new_run(rtol, atol)
        status, message = follow(
            run, recorder, rules, save=save, progress=progress, path=checkpoint
        )
        if isinstance(followed, ModifiedProblem) and status in ("stalled", "precision_lost"):
            status, message = why_stopped(problem, followed, run.weights) or (status, message)
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


def tolerances(rtol: float, atol: float | None, function_space: bool) -> tuple[float, float | None]:
    """The tolerances of a step, checked."""
    least = "a number from 1e-14, the least that float64 can hold, to below 1"
    rtol = number("rtol", rtol, least, lambda value: 1e-14 <= value < 1)
    if atol is not None and function_space:
        raise ValueError(
            f"`atol` is {atol} beside `function_space=True`, in which every error is relative; "
            "expected one or the other."
        )
    if atol is None:
        return rtol, None
    between = "a number between 0 and 1, or None"
    return rtol, number("atol", atol, between, lambda value: 0 < value < 1)

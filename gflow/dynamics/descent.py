"""Gradient descent: one call from weights and an optax optimiser to a record of the run."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import optax

from gflow.dynamics.descending.optimizers import along_gradient, describe
from gflow.dynamics.descending.run import DescentRun
from gflow.dynamics.drive.drive import follow
from gflow.dynamics.drive.events import AtStart, course
from gflow.dynamics.drive.recorder import Observable, Recorder
from gflow.dynamics.stops import AbstractRule, AnyOf, rules_on
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, expect, positive_count, seed_of, shown
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr

PRECISIONS = ("float64", "float32")
"""What descent computes in."""


def gradient_descent(
    problem: Problem,
    weights: Weights,
    optimizer: optax.GradientTransformation,
    *,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray = 100,
    observables: Mapping[str, Observable] | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_weights: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    max_steps: int = 10_000_000,
    precision: Literal["float64", "float32"] = "float64",
) -> "xr.Dataset":
    r"""Descend the risk with any optax optimiser and record what happens on the way.

    Computes in float64 whatever JAX's global setting is, or in float32 on request. The optimiser
    is given $\nabla R$, which underflows with the risk: below $R = 10^{-308}$ nothing moves.
    ``gflow.on_log_risk(optimizer)`` and the rules made with it (`gflow.loss_scaled`,
    `gflow.polyak`, `gflow.loss_line_search`) go on at any risk.

    The time of descent is the sum of its step sizes. For optimisers that treat every weight alone
    the step size is nominal: their answer to a constant gradient of one, so the learning rate of
    ``sgd`` and ``adam``, and $\eta/(1 - m)$ in the long run with momentum $m$. For all others
    (clipping, line searches, Polyak) it is measured along the gradient,
    $-\langle u, \nabla R\rangle/\lVert\nabla R\rVert^2$ for an update $u$; one that points uphill
    counts as zero. ``attrs["step_size"]`` says which.

    Args:
        problem: data, network and loss.
        weights: the start: layer matrices from input to output (see ``gflow.init``), or any
            pytree of arrays for a ``gflow.Network``.
        optimizer: any optax optimiser. Every optax extra argument is provided: ``value``, ``grad``
            and ``value_fn``, and for rules of one's own ``log_risk``, ``log_gradient`` and
            ``log_risk_fn``. Optimisers that differ in numbers only are compiled once.
        until: a stopping rule, or several joined with ``|``; the first written is the leading one.
            Rules are tested at every iterate; `Misalignment` at every 100th, and with mini-batches
            `LogRisk`, which is the risk on all points, once an epoch.
        save: how many points to record, both ends counted, evenly spaced in the logarithm of the
            leading rule's coordinate; or an increasing array of values of that coordinate. The
            first iterate that reaches a value is saved, so one long step may pass several.
        observables: further observables, name to function of (problem, weights).
        progress: show a progress bar; None shows it on terminals and in notebooks. It appears
            after two seconds.
        checkpoint: a file that is written every few seconds. After a kill, or Ctrl-C, the same call
            goes on from there, and its record is that of a run that was never stopped, bit for bit
            on the same machine and versions; after the end it returns the record at once. Another
            run's file is refused. With "max_steps" the same call may have a larger ``max_steps``.
        keep_weights: record the weights at every saved point as ``weights_1``, ``weights_2``, …
        batch_size: points in a mini-batch, drawn without replacement, in a fresh random order each
            epoch; None uses all points in every step. Points left over are left out of the epoch.
            What a record holds is always of all points, evaluated some at a time where they are
            many.
        seed: of the mini-batches.
        max_steps: give up after so many; a `Steps` or `Epochs` rule above it takes precedence.
        precision: of the weights, the data and every step. In "float32" steps of larger networks
            take about half the time; singular values of layers are taken in float64 all the same.

    Returns:
        The record: an ``xarray.Dataset`` with dimension ``point`` and the variables of a flow,
        ``log_step_size``, the step taken last (minus infinity at the start), and with mini-batches
        ``num_epochs``. ``attrs["status"]`` is
        "reached", or says why the run stopped before its goal ("diverged", "stalled", "max_steps",
        "interrupted", "checkpoint_failed"), and ``attrs["message"]`` explains; everything computed
        so far is there, and the last point is finite.

    Raises:
        ValueError: when an argument is malformed, the gradient vanishes at the start, the
            optimiser's step size is negative or not a number, or ``checkpoint`` is damaged or
            another run's.
        OSError: when ``checkpoint`` cannot be written from the start.

    Warns:
        UserWarning: when $R(W(0)) > R(0)$, so that the paper's assumption fails.
    """
    options = Options(observables, keep_weights, batch_size, seed, max_steps, precision)
    check(problem, options)
    with settings.own():
        run = descent_of(problem, weights, optimizer, until, save, options)
        follow(run, progress=progress, path=checkpoint)
        return run.recorder.record(**attributes(run, optimizer, options))


class Options(NamedTuple):
    """How a descent is followed and what is recorded: arguments of :func:`gradient_descent`."""

    observables: Mapping[str, Observable] | None = None
    keep_weights: bool = False
    batch_size: int | None = None
    seed: int = 0
    max_steps: int = 10_000_000
    precision: str = "float64"


def check(problem: Problem, options: Options) -> None:
    """Refuse what no start could make right.

    Raises:
        ValueError: that names the argument.
    """
    expect("problem", problem, Problem, A_PROBLEM)
    positive_count("max_steps", options.max_steps)
    _batch_size(options.batch_size, problem.data.num_points)
    seed_of("seed", options.seed)
    if options.precision not in PRECISIONS:
        raise ValueError(
            f"`precision` is {shown(options.precision)}; expected one of "
            f"{', '.join(map(repr, PRECISIONS))}."
        )


def descent_of(
    problem: Problem,
    weights: Weights,
    optimizer: optax.GradientTransformation,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray,
    options: Options,
) -> DescentRun:
    """A descent at its start, with the first point recorded.

    Raises:
        ValueError: when the weights do not fit the problem, the gradient vanishes there, the
            optimiser does not work, or the points to save are no sensible ones.
    """
    problem = problem.in_precision(options.precision)
    weights = problem.check(weights)
    size = _batch_size(options.batch_size, problem.data.num_points)
    rules = rules_on(problem, weights, until, problem.data.num_points // size if size else 1)
    recorder = Recorder(problem, weights, options.observables, options.keep_weights)
    way = course(problem, weights, rules, save, None, AtStart.of(problem, weights))
    seed, most = seed_of("seed", options.seed), int(options.max_steps)
    return DescentRun(problem, optimizer, size, seed, most, recorder, rules, way)


def attributes(
    run: DescentRun, optimizer: optax.GradientTransformation, options: Options
) -> dict[str, Any]:
    """What a record says of how a descent was followed."""
    assert run.end is not None
    status, message = run.judged(run.end)
    return {
        "kind": "descent",
        "status": status,
        "message": message,
        "until": " | ".join(map(repr, run.rules)),
        "optimizer": describe(optimizer),
        "along_gradient": along_gradient(optimizer),
        "step_size": "nominal" if run.descent.meter.nominal else "measured",
        "precision": options.precision,
        "batch_size": options.batch_size,
        "seed": None if options.batch_size is None else options.seed,
    }


def _batch_size(batch_size: int | None, num_points: int) -> int | None:
    if batch_size is None:
        return None
    batch_size = positive_count("batch_size", batch_size)
    if batch_size > num_points:
        raise ValueError(
            f"`batch_size` is {batch_size}; expected at most {num_points}, the number of points. "
            "Leave it out to use all of them in every step."
        )
    return batch_size

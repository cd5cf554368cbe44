"""Gradient descent: one call from weights and an optax optimiser to a record of the run."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.checkpoint import Checkpoint, CheckpointError, End, carry_of, identity
from gflow.dynamics.iterating import (
    Carry,
    Descent,
    Goals,
    Sampler,
    Watch,
    look,
    misaligning,
    same_weights,
)
from gflow.dynamics.progress import Pace, ProgressBar
from gflow.dynamics.recorder import Observable, Recorder
from gflow.dynamics.step_meter import StepMeter
from gflow.dynamics.step_sizes import describe, with_extra_arguments
from gflow.dynamics.together import advance
from gflow.dynamics.until import (
    AbstractRule,
    AnyOf,
    LogRisk,
    LogTime,
    Steps,
    Time,
    anonymous,
    as_rules,
    positive_count,
    save_grid,
)
from gflow.problem.network import Weights
from gflow.problem.risk import Problem

if TYPE_CHECKING:
    import xarray as xr

STEPS_AT_FIRST = 64
"""Length of the first call, before the speed is known."""

MISALIGNMENT_EVERY = 100
"""Steps between two tests of a `Misalignment` rule, which needs singular vectors."""

STALL_LOOK = 32_768
"""A run is called stalled when no weight has changed between two multiples of so many steps: fixed
ones, so that where it ends does not depend on the machine's speed."""

TIME_SLACK = 1e-12
"""Rounding allowed for in a sum of step sizes that should hit a time."""


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
) -> "xr.Dataset":
    r"""Descend the risk with any optax optimiser and record what happens on the way.

    Computes in float64 whatever JAX's global setting is. The optimiser is given $\nabla R$, which
    underflows with the risk: below $R = 10^{-308}$ nothing moves. ``gflow.on_log_risk(optimizer)``
    and the rules made with it (`gflow.loss_scaled`, `gflow.polyak`, `gflow.loss_line_search`) go
    on at any risk.

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
            ``log_risk_fn``. The same object used twice is compiled once.
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
            epoch; None uses all points in every step.
        seed: of the mini-batches.
        max_steps: give up after so many; a `Steps` rule above it takes precedence.

    Returns:
        The record: an ``xarray.Dataset`` with dimension ``point`` and the variables of a flow, and
        ``log_step_size``, the step taken last (minus infinity at the start). ``attrs["status"]`` is
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
    rules = tuple(rule.on(problem) for rule in as_rules(until))
    max_steps = positive_count("max_steps", max_steps)
    size = _batch_size(batch_size, problem.data.num_points)
    if misaligning(rules, problem):
        raise ValueError(
            f"`until` asks for Misalignment but `problem` has a {type(problem.network).__name__}; "
            "only the layers of a DeepLinear network have one."
        )
    with jax.enable_x64(True):
        weights = problem.check(weights)
        recorder = Recorder(problem, weights, observables, keep_weights)
        run = _Run(problem, weights, optimizer, size, seed)
        recorder.save(weights, **run.scalars())
        path = None if checkpoint is None else Path(checkpoint)
        status, message = _follow(run, recorder, rules, save, progress, max_steps, path)
        return recorder.record(
            kind="descent",
            status=status,
            message=message,
            until=" | ".join(map(repr, rules)),
            optimizer=describe(optimizer),
            step_size="nominal" if run.descent.meter.nominal else "measured",
            batch_size=size,
            seed=None if size is None else seed,
        )


class _Run:
    """A descent on its way: the map and its carry between two calls of ``advance``."""

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        optimizer: optax.GradientTransformation,
        batch_size: int | None,
        seed: int,
    ):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(
                f"`optimizer` is a {type(optimizer).__name__}; expected an optax optimiser such as "
                "optax.sgd(0.1), or one of gflow's rules such as gflow.loss_scaled(0.1)."
            )
        self.descent = Descent(
            problem,
            with_extra_arguments(optimizer),
            StepMeter.of(optimizer, weights),
            None if batch_size is None else Sampler(jax.random.key(seed), batch_size),
        )
        self.seed = None if batch_size is None else seed
        self.carry: Carry = self.descent.start(weights)
        self.rested: Weights = self.carry.weights
        """The weights at the last multiple of ``STALL_LOOK`` steps."""
        self.pace = Pace(STEPS_AT_FIRST)
        self._try_optimizer()

    def _try_optimizer(self) -> None:
        """Trace one step, so that an optimiser that cannot run says so in plain words."""
        descent = self.descent
        try:
            after = jax.eval_shape(descent.step, self.carry)
        except TypeError as error:
            raise ValueError(
                f"`optimizer` cannot make a step: {error}. gradient_descent provides the extra "
                "arguments value, grad, value_fn, log_risk, log_gradient and log_risk_fn."
            ) from error
        if jax.tree.structure(after) != jax.tree.structure(self.carry):
            raise ValueError(
                "`optimizer` changes the structure of its state in a step; expected the structure "
                "that its `init` returns."
            )
        if descent.meter.nominal:
            first = descent.meter.nominal_answer(descent.meter.start())
            if not float(first) <= 0:
                raise ValueError(
                    f"`optimizer` answers a gradient of one by a step of {float(first):g}; "
                    "expected a negative number: learning rates are positive."
                )

    @property
    def weights(self) -> Weights:
        """The weights where the run stands."""
        return self.carry.weights

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on."""
        return {"place": _Place(self.carry, self.rested)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken of a run with the same start."""
        place = carry_of(state["place"], _Place(self.carry, self.rested))
        self.carry, self.rested = place.carry, place.rested

    def scalars(self) -> dict[str, Any]:
        """What a saved point holds beside the observables of its weights."""
        elapsed = self.carry.elapsed
        assert elapsed is not None  # but within `advance`
        return {
            "log_time": elapsed.log_time,
            "num_steps": elapsed.num_steps,
            "log_step_size": elapsed.log_step_size,
        }

    @property
    def num_steps(self) -> int:
        """Steps made so far."""
        return int(self.carry.num_steps)

    def look(self, rules: tuple[AbstractRule, ...]) -> tuple[float, list[float]]:
        """The log risk, and how far the run is in the coordinate of each rule."""
        at = eqx.tree_at(lambda c: c.optimizer_state, self.carry, ())  # not another program
        log_risk, found = look(self.descent.problem, at, tuple(map(anonymous, rules)))
        return float(log_risk), [float(value) for value in found]

    def advance(
        self, watch: Watch, goals: Goals, num_steps: int
    ) -> tuple[np.ndarray, "End | None"]:
        """Go on to ``num_steps`` or to a rule; which are met, and whether the run has to end."""
        before = self.carry
        began = time.perf_counter()
        mark = (self.num_steps // STALL_LOOK + 1) * STALL_LOOK
        limit = jnp.asarray(min(num_steps, self.num_steps + self.pace.size, mark))
        after, hits, sound = advance(self.descent, watch, before, limit, goals)
        hits, sound = np.array(hits), bool(sound)
        full = int(after.num_steps) - self.num_steps == self.pace.size
        self.pace.took(time.perf_counter() - began, full=full)
        if not sound:
            return np.zeros_like(hits), self._last_sound(watch, goals, limit)
        self.carry = after
        end = End("stalled", _why_stalled(self)) if self._stalled(watch, goals) else None
        return hits, end

    def _last_sound(self, watch: Watch, goals: Goals, limit: jax.Array) -> "End":
        """Go to the last iterate that is finite: the same steps again, from where the call began.

        They are the same because every step is a function of the one before.
        """
        watch = dataclasses.replace(watch, careful=True)
        before, sound, broken = self.carry, False, int(limit)
        while not sound and int(before.num_steps) < broken:
            after, _, sound = advance(self.descent, watch, before, limit, goals)
            broken = int(after.num_steps)
            limit = jnp.asarray(broken - 1)
        self.carry = after
        return End("diverged", _why_diverged(self, broken + 1))

    def _stalled(self, watch: Watch, goals: Goals) -> bool:
        """Whether no weight has changed since the last mark, and none does in one step more."""
        if self.num_steps % STALL_LOOK != 0:
            return False
        same = bool(same_weights(self.rested, self.carry.weights))
        self.rested = self.carry.weights
        if not same:
            return False
        # A cycle may have come back to where it was.
        once = jnp.asarray(self.num_steps + 1)
        further, _, _ = advance(self.descent, watch, self.carry, once, goals)
        return bool(same_weights(further.weights, self.carry.weights))


class _Place(eqx.Module):
    """Where a run stands between two calls of ``advance``."""

    carry: Carry
    rested: Weights


def _follow(
    run: _Run,
    recorder: Recorder,
    rules: tuple[AbstractRule, ...],
    save: int | Sequence[float] | np.ndarray,
    progress: bool | None,
    max_steps: int,
    checkpoint: Path | None,
) -> End:
    """Run from saved point to saved point; returns the status and its message."""
    lead, *others = rules
    _, standing = run.look(rules)
    for rule, at in zip(rules, standing, strict=True):
        if at >= rule.goal:
            return End("reached", f"{rule!r} is met at the start; no step was made")
    begin = standing[0]
    grid = save_grid(lead, begin, save)
    kept = Checkpoint(checkpoint, lambda: _identity(run, recorder, rules, grid), run, recorder)
    done, end = kept.resume()
    with ProgressBar("gradient descent", begin, float(grid[-1]), progress) as bar:

        def look() -> None:
            log_risk, (at,) = run.look((lead,))
            bar.update(at, f"{run.num_steps} steps, log R = {log_risk:.6g}")
            kept.look(done)

        def save_point() -> None:
            if run.num_steps > recorder.num_steps:  # a long step passes several points
                recorder.save(run.carry.weights, **run.scalars())

        try:
            while end is None:
                targets = [_Target.of(lead, float(grid[done]))]
                targets += [_Target.of(rule, rule.goal) for rule in others]
                end = _reach(run, targets, max_steps, look)
                if end is not None and end.status == "max_steps":
                    kept.flush()  # without the point to come: a larger `max_steps` goes on
                save_point()
                if end is None:
                    bar.update(float(grid[done]), f"{run.num_steps} steps")
                done += 1
                if end is None and done == len(grid):
                    end = End("reached", f"{lead!r} after {run.num_steps} steps")
                if end is None:
                    kept.look(done)
                elif end.status != "max_steps":
                    kept.close(done, end)
        except CheckpointError as error:
            end = End("checkpoint_failed", str(error))
        except KeyboardInterrupt:
            end = End("interrupted", "stopped by the keyboard; what was computed is in the record")
            with contextlib.suppress(CheckpointError):
                kept.flush()
        save_point()
    return end


def _identity(
    run: _Run, recorder: Recorder, rules: tuple[AbstractRule, ...], grid: np.ndarray
) -> dict[str, str]:
    """What the run is, for its checkpoint."""
    descent = run.descent
    return identity(
        descent.problem,
        recorder.start,
        recorder,
        descent.step,
        (run.carry,),
        kind="gradient_descent",
        until=[(type(rule).__name__, rule.value) for rule in rules],
        save=grid,
        optimizer=describe(descent.optimizer),
        batch_size=descent.sampler and descent.sampler.size,
        seed=run.seed,
    )


class _Target(NamedTuple):
    """Where one rule wants to stop."""

    rule: AbstractRule
    goal: float
    """The rule's progress there."""
    steps: int | None
    """The number of steps there, when the rule counts them."""

    @classmethod
    def of(cls, rule: AbstractRule, goal: float) -> "_Target":
        if isinstance(rule, Steps):
            steps = math.ceil(math.expm1(goal) * (1 - 1e-12) - 1e-9)
            return cls(rule, goal, min(steps, rule.value))
        if isinstance(rule, Time | LogTime):
            goal -= TIME_SLACK * max(1.0, abs(goal))
        return cls(rule, goal, None)


def _reach(
    run: _Run, targets: list[_Target], max_steps: int, look: Callable[[], None]
) -> End | None:
    """Go on to the first of ``targets``: None if it is the leading one, else why the run ends."""
    lead, *others = targets
    watch, goals, watched = _watch(targets, run.descent)
    counts = [target.steps for target in targets if target.steps is not None]
    last = max([max_steps, *(rule.value for rule, *_ in targets if isinstance(rule, Steps))])
    limit = min([last, *counts])
    while True:
        hits, end = run.advance(watch, goals, limit)
        if end is not None:
            return end
        met = [target for target, hit in zip(watched, hits, strict=True) if hit]
        met += [target for target in targets if target.steps == run.num_steps]
        for target in others:
            if target in met:
                return End("reached", f"{target.rule!r} after {run.num_steps} steps")
        if lead in met or (lead.steps is not None and lead.steps < run.num_steps):
            return None
        look()
        if run.num_steps >= last:
            return End(
                "max_steps",
                f"{last} steps were made before {lead.rule!r} was reached; raise `max_steps`, or "
                "take longer steps",
            )


def _watch(targets: list[_Target], descent: Descent) -> tuple[Watch, Goals, list[_Target]]:
    """The rules to ask on the device, their goals, and their targets in the order of answers."""
    sampler = descent.sampler
    groups: dict[str, list[_Target]] = {"cheap": [], "costly": [], "timed": []}
    for target in targets:
        rule = target.rule
        if rule.variable is not None or (sampler is not None and isinstance(rule, LogRisk)):
            groups["costly"].append(target)
        elif isinstance(rule, Time | LogTime) and descent.meter.predictable:
            groups["timed"].append(target)
        elif not isinstance(rule, Steps):
            groups["cheap"].append(target)
    every = 1 if sampler is None else sampler.batches_an_epoch(descent.problem)
    if any(target.rule.variable is not None for target in groups["costly"]):
        every = max(every, MISALIGNMENT_EVERY)
    rules = {key: tuple(anonymous(t.rule) for t in group) for key, group in groups.items()}
    goals = {key: tuple(jnp.asarray(t.goal) for t in group) for key, group in groups.items()}
    order = [target for group in groups.values() for target in group]
    watch = Watch(rules["cheap"], rules["costly"], rules["timed"], every=every)
    return watch, Goals(**goals), order


def _why_diverged(run: _Run, broken: int) -> str:
    if broken == 1:
        return "the optimiser's first update is not finite; check its settings"
    log_risk, _ = run.look(())
    where = f"the weights or margins of step {broken} are not finite; the last point is before it"
    if log_risk < UNDERFLOW and not run.descent.meter.on_log_risk:
        return f"{where}. {_UNDERFLOWN.format(log_risk)}"
    return f"{where}, at log R = {log_risk:.6g}. Take shorter steps"


def _why_stalled(run: _Run) -> str:
    log_risk, _ = run.look(())
    where = f"no weight changed in the last {STALL_LOOK} steps, at log R = {log_risk:.6g}"
    if log_risk < UNDERFLOW and not run.descent.meter.on_log_risk:
        return f"{where}. {_UNDERFLOWN.format(log_risk)}"
    return f"{where}: the steps are below the resolution of float64, or zero"


UNDERFLOW = -650.0
"""Below this log risk products and squares of gradients of R leave the range of float64."""

_UNDERFLOWN = (
    "The gradient of R underflows at log R = {:.6g}: minimise log R instead, with "
    "gflow.on_log_risk(optimizer) or gflow.loss_scaled(rate)"
)


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

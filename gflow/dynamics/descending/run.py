"""A descent on its way, from saved point to saved point."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.descending.lanes import DescentLanes, kind_of
from gflow.dynamics.descending.method import (
    Carry,
    Descent,
    Goals,
    Sampler,
    Watch,
    advance,
    coordinates,
    look,
    same_weights,
)
from gflow.dynamics.descending.optimizers import (
    describe,
    opened,
    with_extra_arguments,
    without_extra_arguments,
)
from gflow.dynamics.descending.step_meter import StepMeter
from gflow.dynamics.drive import checkpoint
from gflow.dynamics.drive.checkpoint import Snapshot
from gflow.dynamics.drive.drive import AbstractLanes, widest_for
from gflow.dynamics.drive.events import Action, Course, Event
from gflow.dynamics.drive.recorder import Recorder
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.stops import AbstractRule, anonymous
from gflow.problem.array import Array
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

MISALIGNMENT_EVERY = 100
"""Steps between two tests of a `Misalignment` rule, which needs singular vectors."""

STALL_LOOK = 32_768
"""A run is called stalled when no weight has changed between two multiples of so many steps: fixed
ones, so that where it ends does not depend on the machine's speed."""

TIME_SLACK = 1e-12
"""Rounding allowed for in a sum of step sizes that should hit a time."""

UNDERFLOW = {"float64": -650.0, "float32": -75.0}
"""Below this log risk products and squares of gradients of R leave the range of the type."""


class DescentRun:
    """A descent from its start to one of its stopping rules.

    Args:
        problem: what it goes down.
        optimizer: any optax optimiser.
        batch_size, seed: of mini-batches, if there are any.
        max_steps: steps to make in all.
        recorder: takes its points.
        rules: the stopping rules, the leading one first.
        way: what it is to do on its way.
    """

    name = "gradient descent"
    in_lanes = seated = False
    """Whether it went side by side with others."""

    def __init__(
        self,
        problem: Problem,
        optimizer: optax.GradientTransformation,
        batch_size: int | None,
        seed: int,
        max_steps: int,
        recorder: Recorder,
        rules: tuple[AbstractRule, ...],
        way: Course,
    ):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(
                f"`optimizer` is a {type(optimizer).__name__}; expected an optax optimiser such as "
                "optax.sgd(0.1), or one of gflow's rules such as gflow.loss_scaled(0.1)."
            )
        sampler = None
        if batch_size is not None:
            sampler = Sampler(jax.random.key(seed), batch_size)
            problem = jax.tree.map(_on_device, problem)  # once, not at every call
        self.descent, self.carry = _started(problem, recorder.start, optimizer, sampler)
        self.seed = None if batch_size is None else seed
        self.recorder, self.rules, self.done = recorder, rules, 0
        self.saves, self.ends, self.end = way
        counts = [event.steps for event in (*self.saves, *self.ends) if event.counts]
        self.last = max([max_steps, *counts])
        self.limit = 0
        self.watch, self.goals, self.watched = _watch([], self.descent)
        self.rested: Weights = self.carry.weights
        """The weights at the last multiple of ``STALL_LOOK`` steps."""
        self._check_first_step()
        self.record_here()
        if self.end is None:
            self._arm()

    def _check_first_step(self) -> None:
        descent = self.descent
        if descent.meter.nominal:
            first = descent.meter.nominal_answer(descent.meter.start())
            if not float(first) <= 0:
                raise ValueError(
                    f"`optimizer` answers a gradient of one by a step of {float(first):g}; "
                    "expected a negative number: learning rates are positive."
                )

    # ---------------------------------------------------------------------------------------------
    # What the drive and its caller ask
    # ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def program(self) -> Hashable:
        if self.descent.sampler is not None or self.watch.costly:
            return id(self)  # under `vmap` each member would draw, or be asked, at every step
        return kind_of((self.descent, self.watch, self.carry, self.goals))

    def lanes(self, alike: "Sequence[DescentRun]", width: int) -> AbstractLanes:
        return DescentLanes(alike, width)

    @property
    def widest(self) -> int:
        return widest_for(self.recorder.start)

    def fail(self, error: Exception) -> None:
        self.end = Reason.FAILED.end(why=f"{type(error).__name__}: {error}")

    @property
    def part_done(self) -> float:
        return 1.0 if self.end is not None else self.done / len(self.saves)

    @property
    def weights(self) -> Weights:
        """The weights where the run stands."""
        return self.carry.weights

    @property
    def num_steps(self) -> int:
        """Steps made so far."""
        return int(self.carry.num_steps)

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far the run is in the coordinate of ``lead``, and what a bar says beside it."""
        sampler = self.descent.sampler
        if sampler is not None and lead.variable is None and not lead.of_risk:
            # The risk is that of all points, many times the work of a step.
            risk = float(self.recorder.last_of("log_risk"))
            here = coordinates(self.carry.num_steps, self.carry.elapsed, jnp.full((), jnp.nan))
            epochs = self.num_steps / sampler.batches_an_epoch(self.descent.problem)
            return float(lead.progress(here)), f"epoch {epochs:.1f}, last saved log R = {risk:.4g}"
        log_risk, (at,) = self._look((lead,))
        return at, f"{self.num_steps} steps, log R = {log_risk:.6g}"

    def progress(self, rules: tuple[AbstractRule, ...]) -> list[float]:
        """How far the run is in the coordinate of each rule."""
        return self._look(rules)[1]

    def _look(self, rules: tuple[AbstractRule, ...]) -> tuple[float, list[float]]:
        """The log risk, and how far the run is in the coordinate of each rule."""
        at = eqx.tree_at(lambda c: c.optimizer_state, self.carry, ())  # not another program
        log_risk, found = look(self.descent.problem, at, tuple(map(anonymous, rules)))
        return float(log_risk), [float(value) for value in found]

    def record_here(self) -> None:
        """Record the point where the run stands."""
        elapsed = self.carry.elapsed
        assert elapsed is not None  # but within `advance`
        names = ("log_time", "num_steps", "log_step_size")
        values = {name: np.asarray(getattr(elapsed, name)) for name in names}
        if (sampler := self.descent.sampler) is not None:
            steps = sampler.batches_an_epoch(self.descent.problem)
            values["num_epochs"] = np.asarray(self.num_steps / steps)
        self.recorder.add_one(self.carry.weights, values)

    def close(self) -> None:
        """Record the last point, if it is not there yet."""
        if self.num_steps > self.recorder.num_steps:
            self.record_here()

    def judged(self, end: End) -> End:
        """The end of the run, with what is to be said of its time."""
        elapsed = self.carry.elapsed
        assert elapsed is not None  # but within `advance`
        if self.num_steps > 0 and float(elapsed.log_time) == -math.inf:
            return Reason.NO_DESCENT.end(steps=self.num_steps)
        if (uphill := int(elapsed.num_uphill)) > 0:
            told = f"; {uphill} of {self.num_steps} steps went uphill and count as no time"
            return End(end.status, end.message + told)
        return end

    def snapshot(self) -> Snapshot:
        """All that the run needs to go on."""
        return Snapshot({"done": self.done}, {"carry": self.carry, "rested": self.rested})

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where a snapshot was taken of a run with the same start."""
        self.done = int(snapshot.facts["done"])
        self.carry = snapshot.read("carry", self.carry)
        self.rested = snapshot.read("rested", self.rested)
        if self.done < len(self.saves):
            self._arm()

    # ---------------------------------------------------------------------------------------------
    # From event to event
    # ---------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Ask for the next saved point, and for the other rules."""
        events = [self.saves[self.done], *self.ends]
        self.watch, self.goals, self.watched = _watch(events, self.descent)

    def request(self, size: int) -> tuple[Descent, Watch, Carry, Array, Goals]:
        """The arguments of ``method.advance`` for the next call, of at most ``size`` steps."""
        before, events = self.num_steps, [self.saves[self.done], *self.ends]
        mark = (before // STALL_LOOK + 1) * STALL_LOOK
        self.limit = min([self.last, before + size, mark, *(event.steps for event in events)])
        return self.descent, self.watch, self.carry, jnp.asarray(self.limit), self.goals

    def take(self, after: Carry, hits: Array, sound: Array) -> None:
        """What a call has come to."""
        if not bool(sound):
            self.end = self._last_sound()
            return
        self.carry = after
        if self._stalled():
            why = self._explained("the steps are below the resolution of float64, or zero")
            self.end = Reason.AT_REST.end(steps=STALL_LOOK, why=why)
            return
        lead, *others = self.saves[self.done], *self.ends
        met = [event for event, hit in zip(self.watched, np.array(hits), strict=True) if hit]
        first = next((event for event in others if self._is_met(event, met)), None)
        if first is None and self._is_met(lead, met):
            first, self.done = lead, self.done + 1
        if first is not None:
            if self.num_steps > self.recorder.num_steps:  # a long step passes several points
                self.record_here()
            if first.action is Action.STOP:
                self.end = Reason.REACHED.end(rule=first.rule, steps=self.num_steps)
            else:
                self._arm()
        elif self.num_steps >= self.last:
            self.end = Reason.MAX_ITERATES.end(steps=self.last, rule=lead.rule)

    def _is_met(self, event: Event, met: list[Event]) -> bool:
        return any(event is each for each in met) or event.steps <= self.num_steps

    def _last_sound(self) -> End:
        """Go to the last iterate that is finite: the same steps again, from where the call began.

        They are the same because every step is a function of the one before.
        """
        watch, limit = dataclasses.replace(self.watch, careful=True), jnp.asarray(self.limit)
        before, sound, broken = self.carry, False, self.limit
        while not sound and int(before.num_steps) < broken:
            after, _, sound = advance(self.descent, watch, before, limit, self.goals)
            broken = int(after.num_steps)
            limit = jnp.asarray(broken - 1)
        self.carry = after
        if broken == 0:
            return Reason.DIVERGED.end(
                why="the optimiser's first update is not finite; check its settings"
            )
        where = (
            f"the weights or margins of step {broken + 1} are not finite; the last point is before"
        )
        return Reason.DIVERGED.end(why=where + self._explained("take shorter steps"))

    def _stalled(self) -> bool:
        """Whether no weight has changed since the last mark, and none does in one step more."""
        if self.num_steps % STALL_LOOK != 0 or self.num_steps == 0:
            return False
        same = bool(same_weights(self.rested, self.carry.weights))
        self.rested = self.carry.weights
        if not same:
            return False
        # A cycle may have come back to where it was.
        once = jnp.asarray(self.num_steps + 1)
        further, _, _ = advance(self.descent, self.watch, self.carry, once, self.goals)
        return bool(same_weights(further.weights, self.carry.weights))

    def _explained(self, usual: str) -> str:
        """With the risk, and its underflow as the reason where it is one."""
        log_risk, _ = self._look(())
        if (
            log_risk < UNDERFLOW[self.descent.problem.precision]
            and not self.descent.meter.on_log_risk
        ):
            usual = (
                "the gradient of R underflows there: minimise log R instead, with "
                "gflow.on_log_risk(optimizer) or gflow.loss_scaled(rate)"
            )
        return f", at log R = {log_risk:.6g}: {usual}"

    def identity(self) -> dict[str, str]:
        """What the run is, for its checkpoint."""
        descent, recorder = self.descent, self.recorder
        return checkpoint.identity(
            descent.problem,
            recorder.start,
            recorder,
            descent.step,
            (self.carry,),
            kind="gradient_descent",
            until=[(type(rule).__name__, rule.value) for rule in self.rules],
            save=np.array([event.progress for event in self.saves]),
            optimizer=describe(descent.optimizer),
            batch_size=descent.sampler and descent.sampler.size,
            seed=self.seed,
        )


def _started(
    problem: Problem,
    weights: Weights,
    optimizer: optax.GradientTransformation,
    sampler: Sampler | None,
) -> tuple[Descent, Carry]:
    """A descent at its start, with the optimiser's numbers as arguments of the program if it can.

    One step is traced, so that an optimiser that cannot run says so in plain words.
    """
    try:
        jax.eval_shape(optimizer.init, weights)
    except Exception as error:  # whatever it is, it is the optimiser's
        raise ValueError(
            f"`optimizer` cannot be started: its `init` raises {type(error).__name__}: {error}. "
            "Expected an optax optimiser of the weights as they are, a pytree of arrays."
        ) from error
    # Whether two answers agree is told in float64, whatever the run computes in.
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=np.float64), weights)
    failures: list[Exception] = []
    forms = (opened, with_extra_arguments, without_extra_arguments)
    for each in (form(optimizer) for form in forms):
        try:
            descent = Descent(problem, each, StepMeter.of(each, wide), sampler)
            carry = descent.start(weights)
            arrays, rest = eqx.partition((descent, carry), eqx.is_array)
            leaves, structure = jax.tree.flatten(rest)
            after = _step.eval_shape(structure, tuple(leaves), arrays)
            break
        except Exception as error:  # whatever it is, it is the optimiser's
            failures.append(error)
    else:
        failure = failures[1]  # of the optimiser as it is
        raise ValueError(
            f"`optimizer` cannot make a step: {type(failure).__name__}: {failure}. "
            "gradient_descent hands it the gradient and the weights, pytrees of arrays of one "
            "structure, and the extra arguments value, grad, value_fn, log_risk, log_gradient and "
            "log_risk_fn; what takes other weights, as the pairs of optax.lookahead, cannot be run."
        ) from failure
    _check_step(carry, after)
    return descent, carry


def _check_step(before: Carry, after: Any) -> None:
    """Raise unless a step leaves the structure of the optimiser's state and all shapes."""
    if jax.tree.structure(after) != jax.tree.structure(before):
        raise ValueError(
            "`optimizer` changes the structure of its state in a step; expected the structure "
            "that its `init` returns."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True)
    for (path, new), old in pairs:
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"`optimizer` makes of {jax.tree_util.keystr(path).lstrip('.')} an array of shape "
                f"{new.shape} and type {new.dtype} in a step; expected {old.shape} and {old.dtype} "
                "as before. Are its numbers scalars?"
            )


@partial(jax.jit, static_argnums=(0, 1))  # for its cache: it is traced once and never run
def _step(structure: Any, leaves: tuple[Any, ...], arrays: Any) -> Carry:
    descent, carry = eqx.combine(arrays, jax.tree.unflatten(structure, leaves))
    return descent.step(carry)


def _watch(events: list[Event], descent: Descent) -> tuple[Watch, Goals, list[Event]]:
    """The rules to ask on the device, their goals, and their events in the order of answers."""
    sampler = descent.sampler
    groups: dict[str, list[Event]] = {"cheap": [], "costly": [], "timed": []}
    for event in events:
        rule = event.rule
        if rule.variable is not None or (sampler is not None and rule.of_risk):
            groups["costly"].append(event)
        elif rule.of_time and descent.meter.predictable:
            groups["timed"].append(event)
        elif not event.counts:
            groups["cheap"].append(event)
    every = 1 if sampler is None else sampler.batches_an_epoch(descent.problem)
    if any(event.rule.variable is not None for event in groups["costly"]):
        every = max(every, MISALIGNMENT_EVERY)
    rules = {key: tuple(anonymous(e.rule) for e in group) for key, group in groups.items()}
    goals = {key: tuple(map(_goal, group)) for key, group in groups.items()}
    order = [event for group in groups.values() for event in group]
    watch = Watch(rules["cheap"], rules["costly"], rules["timed"], every=every)
    return watch, Goals(**goals), order


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if eqx.is_array(leaf) else leaf


def _goal(event: Event) -> Array:
    slack = TIME_SLACK * max(1.0, abs(event.progress)) if event.rule.of_time else 0.0
    return jnp.asarray(event.progress - slack)

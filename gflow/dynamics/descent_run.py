"""A descent on its way, called from saved point to saved point."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics import checkpoint
from gflow.dynamics.checkpoint import End, carry_of
from gflow.dynamics.following import Stop
from gflow.dynamics.iterating import (
    Carry,
    Descent,
    Goals,
    Sampler,
    Watch,
    look,
    same_weights,
)
from gflow.dynamics.optimizers import (
    describe,
    opened,
    with_extra_arguments,
    without_extra_arguments,
)
from gflow.dynamics.progress import Pace
from gflow.dynamics.recorder import Recorder
from gflow.dynamics.step_meter import StepMeter
from gflow.dynamics.together import advance
from gflow.dynamics.until import AbstractRule, LogRisk, LogTime, Steps, Time, anonymous
from gflow.problem.network import Weights
from gflow.problem.risk import Problem

STEPS_AT_FIRST = 64
"""Length of the first call, before the speed is known."""

MISALIGNMENT_EVERY = 100
"""Steps between two tests of a `Misalignment` rule, which needs singular vectors."""

STALL_LOOK = 32_768
"""A run is called stalled when no weight has changed between two multiples of so many steps: fixed
ones, so that where it ends does not depend on the machine's speed."""

TIME_SLACK = 1e-12
"""Rounding allowed for in a sum of step sizes that should hit a time."""

UNDERFLOW = -650.0
"""Below this log risk products and squares of gradients of R leave the range of float64."""


class DescentRun:
    """A descent on its way: the map and its carry between two calls of ``advance``.

    Args:
        problem: what it goes down.
        weights: the start.
        optimizer: any optax optimiser.
        batch_size, seed: of mini-batches, if there are any.
        max_steps: steps to make in all.
    """

    name = "gradient descent"

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        optimizer: optax.GradientTransformation,
        batch_size: int | None,
        seed: int,
        max_steps: int,
    ):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(
                f"`optimizer` is a {type(optimizer).__name__}; expected an optax optimiser such as "
                "optax.sgd(0.1), or one of gflow's rules such as gflow.loss_scaled(0.1)."
            )
        sampler = None if batch_size is None else Sampler(jax.random.key(seed), batch_size)
        self.descent, self.carry = _started(problem, weights, optimizer, sampler)
        self.seed = None if batch_size is None else seed
        self.max_steps = max_steps
        self.rested: Weights = self.carry.weights
        """The weights at the last multiple of ``STALL_LOOK`` steps."""
        self.pace = Pace(STEPS_AT_FIRST)
        self._check_first_step()

    def _check_first_step(self) -> None:
        descent = self.descent
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
        return {"place": Place(self.carry, self.rested)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken of a run with the same start."""
        place = carry_of(state["place"], Place(self.carry, self.rested))
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

    def judged(self, status: str, message: str) -> End:
        """The end of the run, with what is to be said of its time."""
        elapsed = self.carry.elapsed
        assert elapsed is not None  # but within `advance`
        if self.num_steps > 0 and float(elapsed.log_time) == -math.inf:
            return End(
                "stalled",
                f"none of {self.num_steps} steps went downhill, so that no time has passed: the "
                "learning rate is zero or negative",
            )
        if (uphill := int(elapsed.num_uphill)) > 0:
            message += f"; {uphill} of {self.num_steps} steps went uphill and count as no time"
        return End(status, message)

    def save(self, recorder: Recorder) -> None:
        """Record the point where the run stands."""
        recorder.save(self.carry.weights, **self.scalars())

    def progress(self, rules: tuple[AbstractRule, ...]) -> list[float]:
        """How far the run is in the coordinate of each rule."""
        return self._look(rules)[1]

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far the run is in the coordinate of ``lead``, and what a bar says beside it."""
        log_risk, (at,) = self._look((lead,))
        return at, f"{self.num_steps} steps, log R = {log_risk:.6g}"

    def _look(self, rules: tuple[AbstractRule, ...]) -> tuple[float, list[float]]:
        """The log risk, and how far the run is in the coordinate of each rule."""
        at = eqx.tree_at(lambda c: c.optimizer_state, self.carry, ())  # not another program
        log_risk, found = look(self.descent.problem, at, tuple(map(anonymous, rules)))
        return float(log_risk), [float(value) for value in found]

    def go(self, stops: Sequence[Stop], look: Callable[[], None]) -> AbstractRule | End:
        """Go on to the first of ``stops``: its rule, or why none was reached."""
        targets = [StepTarget.of(*stop) for stop in stops]
        lead, *others = targets
        watch, goals, watched = _watch(targets, self.descent)
        counts = [target.steps for target in targets if target.steps is not None]
        last = max(
            [self.max_steps, *(rule.value for rule, *_ in targets if isinstance(rule, Steps))]
        )
        limit = min([last, *counts])
        while True:
            hits, end = self.advance(watch, goals, limit)
            if end is not None:
                return end
            met = [target for target, hit in zip(watched, hits, strict=True) if hit]
            met += [target for target in targets if target.steps == self.num_steps]
            for target in others:
                if target in met:
                    return target.rule
            if lead in met or (lead.steps is not None and lead.steps < self.num_steps):
                return lead.rule
            look()
            if self.num_steps >= last:
                return End(
                    "max_steps",
                    f"{last} steps were made before {lead.rule!r} was reached; raise `max_steps`, "
                    "or take longer steps",
                )

    def advance(self, watch: Watch, goals: Goals, num_steps: int) -> tuple[np.ndarray, End | None]:
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
        end = End("stalled", self._why_stalled()) if self._stalled(watch, goals) else None
        return hits, end

    def _last_sound(self, watch: Watch, goals: Goals, limit: jax.Array) -> End:
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
        return End("diverged", self._why_diverged(broken + 1))

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

    def _why_diverged(self, broken: int) -> str:
        if broken == 1:
            return "the optimiser's first update is not finite; check its settings"
        where = f"the weights or margins of step {broken} are not finite; the last point is before"
        return self._explained(where, "take shorter steps")

    def _why_stalled(self) -> str:
        where = f"no weight changed in the last {STALL_LOOK} steps"
        return self._explained(where, "the steps are below the resolution of float64, or zero")

    def _explained(self, where: str, usual: str) -> str:
        """With the risk, and its underflow as the reason where it is one."""
        log_risk, _ = self._look(())
        if log_risk < UNDERFLOW and not self.descent.meter.on_log_risk:
            usual = (
                "the gradient of R underflows there: minimise log R instead, with "
                "gflow.on_log_risk(optimizer) or gflow.loss_scaled(rate)"
            )
        return f"{where}, at log R = {log_risk:.6g}: {usual}"

    def identity(
        self, recorder: Recorder, rules: tuple[AbstractRule, ...], grid: np.ndarray
    ) -> dict[str, str]:
        """What the run is, for its checkpoint."""
        descent = self.descent
        return checkpoint.identity(
            descent.problem,
            recorder.start,
            recorder,
            descent.step,
            (self.carry,),
            kind="gradient_descent",
            until=[(type(rule).__name__, rule.value) for rule in rules],
            save=grid,
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
    failures: list[Exception] = []
    forms = (opened, with_extra_arguments, without_extra_arguments)
    for each in (form(optimizer) for form in forms):
        try:
            descent = Descent(problem, each, StepMeter.of(each, weights), sampler)
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


class Place(eqx.Module):
    """Where a run stands between two calls of ``advance``."""

    carry: Carry
    rested: Weights


class StepTarget(NamedTuple):
    """Where one rule wants to stop."""

    rule: AbstractRule
    goal: float
    """The rule's progress there."""
    steps: int | None
    """The number of steps there, when the rule counts them."""

    @classmethod
    def of(cls, rule: AbstractRule, goal: float) -> "StepTarget":
        if isinstance(rule, Steps):
            steps = math.ceil(math.expm1(goal) * (1 - 1e-12) - 1e-9)
            return cls(rule, goal, min(steps, rule.value))
        if isinstance(rule, Time | LogTime):
            goal -= TIME_SLACK * max(1.0, abs(goal))
        return cls(rule, goal, None)


def _watch(targets: list[StepTarget], descent: Descent) -> tuple[Watch, Goals, list[StepTarget]]:
    """The rules to ask on the device, their goals, and their targets in the order of answers."""
    sampler = descent.sampler
    groups: dict[str, list[StepTarget]] = {"cheap": [], "costly": [], "timed": []}
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

r"""How long a step of an optimiser is, so that descent has a time, $T = \sum_j \eta_j$.

optax does not say: an optimiser maps gradients to updates. Two definitions cover them all, and both
are $\eta$ for $W \leftarrow W - \eta\,\nabla R$.

*Nominal*, for optimisers that treat every entry of the weights alone, as most do: the update that a
constant gradient of one would get. It is the learning rate of ``sgd``, of a schedule and of
``adam``, and tends to $\eta/(1-m)$ for momentum $m$. It costs nothing.

*Measured*, for the others (clipping, line searches, Polyak, preconditioners): the effective step
along the gradient, $\eta = -\langle u, \nabla R\rangle/\lVert\nabla R\rVert^2$ of an update $u$,
exact whenever $u$ is a multiple of the gradient. An update that points uphill counts as zero.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.descending.optimizers import with_extra_arguments
from gflow.problem.array import Array
from gflow.problem.module import Module
from gflow.problem.weights import Weights, inner_product

SINGLE = float(np.finfo(np.float32).eps)
"""A negative step that is smaller than the time so far by this factor is a zero with round-off."""


class Elapsed(Module):
    """The time of descent so far."""

    num_steps: Array
    log_time: Array
    """Logarithm of the sum of the step sizes, minus infinity at first."""
    lost: Array
    """What rounding has taken from ``log_time`` (Kahan's summation)."""
    log_step_size: Array
    """The step size taken last."""
    num_uphill: Array
    """Steps that counted as zero because they went uphill."""
    meter_state: Any

    # log(T + eta) = log T + log(1 + eta/T), in which either may be larger by any factor. Increments
    # get small and there are many of them: hence Kahan's summation.
    def add(self, step: Array, log_step: Array, meter_state: Any) -> "Elapsed":
        """After one more step; a negative ``step`` went uphill."""
        first = jnp.isneginf(self.log_time)
        base = jnp.where(first, log_step, self.log_time)
        increment = jnp.logaddexp(0.0, log_step - base) - self.lost
        total = base + increment
        lost = (total - base) - increment
        return Elapsed(
            num_steps=self.num_steps + 1,
            log_time=jnp.where(first, log_step, total),
            lost=jnp.where(first, 0.0, lost),
            log_step_size=log_step,
            num_uphill=self.num_uphill + (step < 0).astype(self.num_uphill.dtype),
            meter_state=meter_state,
        )


class StepMeter(Module):
    """Reads the step size of an optimiser's updates."""

    optimizer: optax.GradientTransformationExtraArgs
    """What sees the gradient: the optimiser inside `on_log_risk`, if that is what runs."""
    nominal: bool
    on_log_risk: bool

    @classmethod
    def of(cls, optimizer: optax.GradientTransformation, weights: Weights) -> "StepMeter":
        """The meter for an optimiser; finds out by a trial whether it works entry by entry."""
        rule = getattr(optimizer.update, "__self__", None)
        scaled = bool(getattr(rule, "on_log_risk", False))
        inner: Any = rule.inner if scaled else with_extra_arguments(optimizer)  # pyright: ignore
        return cls(inner, works_entry_by_entry(inner, weights), scaled)

    @property
    def predictable(self) -> bool:
        """Whether the time is a function of the number of steps alone."""
        return self.nominal and not self.on_log_risk

    def start(self) -> Elapsed:
        """No time has passed. The state is that of the optimiser for a single weight."""
        never = jnp.full((), -jnp.inf)
        state = self.optimizer.init(jnp.zeros(())) if self.nominal else ()
        none = jnp.zeros((), jnp.int64)
        return Elapsed(none, never, jnp.zeros(()), never, none, state)

    @property
    def constant(self) -> bool:
        """Whether all steps are equally long: an optimiser without a state."""
        return self.predictable and not jax.tree.leaves(self.optimizer.init(jnp.zeros(())))

    def nominal_step(self, elapsed: Elapsed, log_risk: Array | float = 0.0) -> Elapsed:
        """After the step that a constant gradient of one would get."""
        if self.constant:
            return self._after(elapsed, elapsed.num_steps + 1)
        answer, state = self._answer(elapsed)
        step = -answer
        # Schedules count in float32, and may end a little below the zero that they are to end at.
        is_zero = jnp.log(jnp.abs(step)) < elapsed.log_time + math.log(SINGLE)
        step = jnp.where((step < 0) & is_zero, 0.0, step)
        log_step = jnp.log(jnp.maximum(step, 0.0))
        log_step = log_step - jnp.asarray(log_risk, jnp.float64) if self.on_log_risk else log_step
        return elapsed.add(step, log_step, state)

    def _after(self, elapsed: Elapsed, num_steps: Array) -> Elapsed:
        """After so many steps in all, each of the same length: T is their number times it."""
        answer, state = self._answer(elapsed)
        log_step = jnp.log(jnp.maximum(-answer, 0.0))
        made = num_steps > 0
        return Elapsed(
            num_steps=num_steps,
            log_time=jnp.where(made, jnp.log(jnp.maximum(num_steps, 1)) + log_step, -jnp.inf),
            lost=jnp.zeros(()),
            log_step_size=jnp.where(made, log_step, -jnp.inf),
            num_uphill=jnp.zeros_like(num_steps),
            meter_state=state,
        )

    def nominal_answer(self, elapsed: Elapsed) -> Array:
        """The update that a gradient of one would get; negative for descent."""
        return self._answer(elapsed)[0]

    def _answer(self, elapsed: Elapsed) -> tuple[Array, Any]:
        update, state = self.optimizer.update(jnp.ones(()), elapsed.meter_state, jnp.zeros(()))
        return jnp.asarray(update, jnp.float64), state

    def measured_step(
        self, elapsed: Elapsed, updates: Weights, log_risk: Array, log_gradient: Weights
    ) -> Elapsed:
        r"""After an update at weights with the given $\log R$ and $g = \nabla\log R$."""
        updates = jax.tree.map(lambda u, g: jnp.asarray(u, g.dtype), updates, log_gradient)
        log_risk = jnp.asarray(log_risk, jnp.float64)
        along = jnp.asarray(-inner_product(updates, log_gradient), jnp.float64)
        squared_norm = jnp.asarray(inner_product(log_gradient, log_gradient), jnp.float64)
        stands = squared_norm == 0
        log_rate = jnp.log(jnp.maximum(along, 0.0)) - jnp.log(jnp.where(stands, 1.0, squared_norm))
        log_step = jnp.where(stands, -jnp.inf, log_rate - log_risk)
        return elapsed.add(along, log_step, elapsed.meter_state)

    def predict(
        self,
        elapsed: Elapsed,
        num_steps: Array,
        reached: Callable[[Elapsed], list[Array]] | None = None,
    ) -> Elapsed:
        """Let time pass until ``num_steps`` in all, or until any of ``reached`` is true.

        A loop over scalars, fifty nanoseconds a step: inside the loop over the weights the same
        operations would each be a kernel of their own and cost more than a step of a small network.
        Equal steps are counted.
        """
        if reached is None and self.constant:
            return self._after(elapsed, num_steps)
        stop = reached or (lambda at: [])
        return jax.lax.while_loop(
            lambda at: (at.num_steps < num_steps) & ~jnp.any(jnp.array([False, *stop(at)])),
            lambda at: self.nominal_step(at),  # JAX hashes it, and the method holds arrays
            elapsed,
        )


def works_entry_by_entry(optimizer: optax.GradientTransformation, weights: Weights) -> bool:
    """Whether each entry's update is a function of its own gradients, and of them alone.

    Tried on a few random gradients of either sign, from tiny to huge: one entry of every array,
    given to the optimiser by itself, must get the update that it gets among all the others, and at
    weight zero, where the nominal step is asked for, the same as at its own weight. What no
    gradient would get, as by decay of the weights, is taken off first. An optimiser that cannot be
    run like this, or that does not move, is taken not to.
    """
    leaves = jax.tree.leaves(weights)
    if sum(np.size(leaf) for leaf in leaves) < 2:
        return False
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1e-8, 1e8, -1.0, -1e-8, -1e8])
    gradients = jax.tree.map(
        lambda leaf: (
            scales.reshape(-1, *[1] * np.ndim(leaf))
            * np.abs(rng.normal(size=(len(scales), *np.shape(leaf))))
        ),
        weights,
    )
    try:
        trials = (np.asarray(result) for result in _trial(optimizer, weights, gradients))
        among, alone, gain, at_zero, decay = trials
    except Exception:
        # Whatever an unknown optimiser raises when it is given less than it needs.
        return False
    if among.shape != alone.shape:  # numbers of its own that are no scalars
        return False
    same = np.allclose(among, alone, rtol=1e-9, atol=0.0)
    lost = 1e-14 * np.abs(decay)  # by taking the decay off
    same &= bool(np.all(np.abs(gain - at_zero) <= 1e-9 * np.abs(gain) + lost))
    return bool(same and np.all(np.isfinite(among)) and np.any(among != 0))


def _many(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Array, Any]]:
    """The optimiser's `update` of many weights, each by itself."""
    update: Any = optimizer.update
    return jax.vmap(update)


@eqx.filter_jit
def _trial(
    optimizer: optax.GradientTransformation, weights: Weights, gradients: Weights
) -> tuple[Array, ...]:
    """The last entry of each array's updates, (trials, arrays).

    Among the others; alone; that less what no gradient gets; the same at weight zero; what no
    gradient gets.
    """

    def last_entries(tree: Weights) -> Array:
        return jnp.stack([jnp.ravel(leaf)[-1] for leaf in jax.tree.leaves(tree)])

    entries = last_entries(weights)

    def trial(states: tuple[Any, Any], gradient: Weights) -> tuple[tuple[Any, Any], Any]:
        updates, state = optimizer.update(gradient, states[0], weights)
        own, update = last_entries(gradient), _many(optimizer)
        answers, lone = update(own, states[1], entries)
        none, zero = jnp.zeros_like(own), jnp.zeros_like(entries)
        idle, _ = update(none, states[1], entries)
        at_zero = update(own, states[1], zero)[0] - update(none, states[1], zero)[0]
        return (state, lone), (last_entries(updates), answers, answers - idle, at_zero, idle)

    start = optimizer.init(weights), jax.vmap(optimizer.init)(entries)
    _, results = jax.lax.scan(trial, start, gradients)
    return results

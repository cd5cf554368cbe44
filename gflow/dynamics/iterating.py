r"""The loop of descent on the device: many steps a call, stopping exactly where it should.

Every step evaluates the margins and the gradient at the current iterate, asks the stopping rules,
and only then moves. An iterate that meets a rule is therefore the first one that does and the last
one computed. What an optimiser does not use costs nothing: XLA drops it, and with it the risk
itself when only its gradient is asked for.

Two gradients are on offer. $\nabla R = \frac1n\sum_i \ell'(q_i)\nabla q_i$ is what optimisers
expect, and underflows with the risk; $g = \nabla\log R$ with $\log R$ never does, and is for the
rules that can use it (`gflow.on_log_risk`).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from gflow.dynamics.step_meter import StepMeter
from gflow.dynamics.until import AbstractRule, Coordinates
from gflow.problem.network import Array, DeepLinear, Weights
from gflow.problem.observables import largest_misalignment
from gflow.problem.risk import Problem


class Carry(eqx.Module):
    """Everything descent needs to go on; a pytree of arrays."""

    weights: Weights
    optimizer_state: Any
    meter_state: Any
    num_steps: Array
    log_time: Array
    """Logarithm of the sum of the step sizes, minus infinity at first."""
    lost: Array
    """What rounding has taken from ``log_time`` (Kahan's summation)."""
    log_step_size: Array
    """The step size taken last."""
    order: Array | None
    """The order in which this epoch visits the points, for mini-batches."""


class Sampler(eqx.Module):
    """Mini-batches without replacement: each epoch cuts a fresh random order into batches.

    Points left over at the end of an epoch are left out of it. The batches are a function of the
    seed and the step alone.
    """

    key: Array
    size: int

    def batches_an_epoch(self, problem: Problem) -> int:
        return problem.data.inputs.shape[0] // self.size

    def order(self, problem: Problem, num_steps: Array, order: Array) -> Array:
        """The order of the epoch that the next step belongs to."""
        count = self.batches_an_epoch(problem)

        def shuffled() -> Array:
            key = jax.random.fold_in(self.key, num_steps // count)
            return jax.random.permutation(key, order.shape[0]).astype(order.dtype)

        return jax.lax.cond(num_steps % count == 0, shuffled, lambda: order)

    def batch(self, problem: Problem, num_steps: Array, order: Array) -> Problem:
        """The problem on the points of the next step."""
        begin = (num_steps % self.batches_an_epoch(problem)) * self.size
        chosen = jax.lax.dynamic_slice(order, (begin,), (self.size,))
        if problem.design is not None:  # the data enter through the design alone
            return eqx.tree_at(lambda p: p.design, problem, jnp.asarray(problem.design)[chosen])
        points = (jnp.asarray(leaf)[chosen] for leaf in (problem.data.inputs, problem.data.labels))
        return eqx.tree_at(lambda p: (p.data.inputs, p.data.labels), problem, tuple(points))


class Descent(eqx.Module):
    """One step of descent: the problem, the optimiser, and how both are sampled and measured."""

    problem: Problem
    optimizer: optax.GradientTransformationExtraArgs
    meter: StepMeter
    sampler: Sampler | None

    def start(self, weights: Weights) -> Carry:
        """The carry before the first step."""
        weights = jax.tree.map(jnp.asarray, weights)
        nothing = jnp.full((), -jnp.inf)
        carry = Carry(
            weights=weights,
            optimizer_state=self.optimizer.init(weights),
            meter_state=self.meter.init(),
            num_steps=jnp.zeros((), jnp.int64),
            log_time=nothing,
            lost=jnp.zeros(()),
            log_step_size=nothing,
            order=None if self.sampler is None else jnp.arange(self.problem.data.inputs.shape[0]),
        )
        # No weak types: the first call would be compiled for them, and the second without.
        return jax.tree.map(_strong, carry)

    def evaluate(self, carry: Carry) -> tuple["Evaluation", Carry]:
        """Margins, risk and gradients at the current iterate, on its mini-batch if there is one."""
        problem = self.problem
        if self.sampler is not None:
            order = self.sampler.order(problem, carry.num_steps, carry.order)
            problem = self.sampler.batch(problem, carry.num_steps, order)
            carry = eqx.tree_at(lambda c: c.order, carry, order)
        coordinates, pull = problem.network.pullback(carry.weights, problem.data)
        margins = problem.spread(coordinates)
        losses = problem.loss_slopes(margins)
        slopes = jnp.exp(problem.loss.log_slope(margins)) / margins.shape[0]
        found = Evaluation(
            problem=problem,
            sound=jnp.all(jnp.isfinite(margins)),
            log_risk=losses.log_risk,
            log_gradient=pull(-problem.gather(losses.slopes))[0],
            gradient=pull(-problem.gather(slopes))[0],
        )
        return found, carry

    def move(self, carry: Carry, at: "Evaluation", go: Array) -> Carry:
        """The next iterate if ``go``, else the same again."""
        updates, optimizer_state = self.optimizer.update(
            at.gradient, carry.optimizer_state, carry.weights, **at.extra_arguments()
        )
        log_step, meter_state = self.meter.log_step_size(
            carry.meter_state, updates, at.log_risk, at.log_gradient
        )
        log_time, lost = _add(carry.log_time, carry.lost, log_step)
        moved = (
            optax.apply_updates(carry.weights, updates),
            optimizer_state,
            meter_state,
            carry.num_steps + 1,
            log_time,
            lost,
            log_step,
        )
        *stayed, order = (getattr(carry, field) for field in carry.__dataclass_fields__)
        kept = jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, tuple(stayed))
        return Carry(*kept, order)


class Evaluation(NamedTuple):
    """What is known at an iterate before it moves."""

    problem: Problem
    sound: Array
    """Whether all margins are finite."""
    log_risk: Array
    log_gradient: Weights
    gradient: Weights

    def extra_arguments(self) -> dict[str, Any]:
        """The extra arguments: optax's own names for $R$, ours for the log domain."""
        problem = self.problem

        # Searches of optax insist that the function accept all other extra arguments.
        def risk(
            weights: Any, log_risk: Any = None, log_gradient: Any = None, log_risk_fn: Any = None
        ) -> Array:
            return jnp.exp(problem.log_risk(weights))

        return {
            "value": jnp.exp(self.log_risk),
            "grad": self.gradient,
            "value_fn": risk,
            "log_risk": self.log_risk,
            "log_gradient": self.log_gradient,
            "log_risk_fn": lambda weights: problem.log_risk(weights),
        }


class Watch(eqx.Module):
    """The stopping rules to ask, split by what they cost."""

    cheap: tuple[AbstractRule, ...]
    """Asked at every iterate."""
    costly: tuple[AbstractRule, ...]
    """Asked at every ``every``-th: they need singular values, or the risk on all points."""
    every: int

    def hits(
        self, descent: Descent, carry: Carry, at: Evaluation, goals: tuple[Array, ...]
    ) -> Array:
        """Which rules are met, the cheap ones first."""
        met = [
            rule.progress(self._coordinates(carry, at.log_risk)) >= goal
            for rule, goal in zip(self.cheap, goals, strict=False)
        ]
        if self.costly:
            due = carry.num_steps % self.every == 0
            late = jax.lax.cond(
                due,
                lambda: jnp.stack(
                    [
                        progress >= goal
                        for progress, goal in zip(
                            self.costly_progress(descent, carry),
                            goals[len(self.cheap) :],
                            strict=True,
                        )
                    ]
                ),
                lambda: jnp.zeros(len(self.costly), bool),
            )
            met.extend(late)
        return jnp.array(met, dtype=bool)

    def costly_progress(self, descent: Descent, carry: Carry) -> list[Array]:
        """The progress of the costly rules."""
        needed = any(rule.needs_misalignment for rule in self.costly)
        at = self._coordinates(
            carry,
            descent.problem.log_risk(carry.weights),
            largest_misalignment(carry.weights) if needed else None,
        )
        return [rule.progress(at) for rule in self.costly]

    @staticmethod
    def _coordinates(
        carry: Carry, log_risk: Array, misalignment: Array | None = None
    ) -> Coordinates:
        unknown = jnp.full_like(log_risk, jnp.nan)
        return Coordinates(
            log_risk=log_risk,
            log_time=carry.log_time,
            num_steps=carry.num_steps,
            misalignment=unknown if misalignment is None else misalignment,
        )


@eqx.filter_jit
def advance(
    descent: Descent, watch: Watch, carry: Carry, num_steps: Array, goals: tuple[Array, ...]
) -> tuple[Carry, Array, Array]:
    """Step until ``num_steps`` in all, a rule that is met, or an iterate that is not finite.

    Returns:
        The carry, which rules are met there (the cheap ones first), and whether the iterate is
        finite.
    """

    def attempt(loop: tuple[Carry, Array, Array]) -> tuple[Carry, Array, Array]:
        at, carry = descent.evaluate(loop[0])
        hits = watch.hits(descent, carry, at, goals)
        go = at.sound & ~jnp.any(hits)
        return descent.move(carry, at, go), hits, at.sound

    carry, hits, sound = jax.lax.while_loop(
        lambda loop: (loop[0].num_steps < num_steps) & loop[2] & ~jnp.any(loop[1]),
        attempt,
        (carry, jnp.zeros(len(goals), bool), jnp.array(True)),
    )
    # The last iterate has not been looked at when the count ended the loop.
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(carry.weights)]
    margins = jnp.isfinite(descent.problem.margins(carry.weights))
    return carry, hits, sound & jnp.all(jnp.stack(leaves)) & jnp.all(margins)


@eqx.filter_jit
def look(
    problem: Problem,
    weights: Weights,
    log_time: Array,
    num_steps: Array,
    rules: tuple[AbstractRule, ...],
) -> tuple[Array, list[Array]]:
    r"""$\log R$ on all points, and the progress of rules, at an iterate."""
    log_risk = problem.log_risk(weights)
    at = Coordinates(
        log_risk=log_risk,
        log_time=log_time,
        num_steps=num_steps,
        misalignment=largest_misalignment(weights)
        if any(rule.needs_misalignment for rule in rules)
        else jnp.full_like(log_risk, jnp.nan),
    )
    return log_risk, [rule.progress(at) for rule in rules]


@eqx.filter_jit
def same_weights(a: Carry, b: Carry) -> Array:
    """Whether two iterates are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True)
    return jnp.all(jnp.stack([jnp.array_equal(x, y) for x, y in pairs]))


def misaligning(rules: tuple[AbstractRule, ...], problem: Problem) -> bool:
    """Whether some rule asks for singular vectors that the network does not have."""
    return any(rule.needs_misalignment for rule in rules) and not isinstance(
        problem.network, DeepLinear
    )


def _strong(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype) if leaf.weak_type else leaf


# log(T + eta) = log T + log(1 + eta/T), in which either may be larger by any factor. Increments get
# small and there are many of them: hence Kahan's summation.
def _add(log_time: Array, lost: Array, log_step: Array) -> tuple[Array, Array]:
    first = jnp.isneginf(log_time)
    base = jnp.where(first, log_step, log_time)
    increment = jnp.logaddexp(0.0, log_step - base) - lost
    total = base + increment
    lost = (total - base) - increment
    return jnp.where(first, log_step, total), jnp.where(first, 0.0, lost)

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
    num_steps: Array
    elapsed: Elapsed | None
    """The time so far; None in a loop that does not need it."""
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
        carry = Carry(
            weights=weights,
            optimizer_state=self.optimizer.init(weights),
            num_steps=jnp.zeros((), jnp.int64),
            elapsed=self.meter.start(),
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

    def move(self, carry: Carry, at: "Evaluation") -> Carry:
        """The next iterate."""
        updates, optimizer_state = self.optimizer.update(
            at.gradient, carry.optimizer_state, carry.weights, **at.extra_arguments()
        )
        elapsed = carry.elapsed
        if elapsed is not None and self.meter.nominal:
            elapsed = self.meter.nominal_step(elapsed, at.log_risk)
        elif elapsed is not None:
            elapsed = self.meter.measured_step(elapsed, updates, at.log_risk, at.log_gradient)
        return Carry(
            weights=optax.apply_updates(carry.weights, updates),
            optimizer_state=optimizer_state,
            num_steps=carry.num_steps + 1,
            elapsed=elapsed,
            order=carry.order,
        )


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
    """What to ask of the iterates, split by what it costs."""

    cheap: tuple[AbstractRule, ...] = ()
    """Asked at every iterate."""
    costly: tuple[AbstractRule, ...] = ()
    """Asked at every ``every``-th: they need singular values, or the risk on all points."""
    timed: tuple[AbstractRule, ...] = ()
    """Rules on the time, where the time can be told beforehand."""
    every: int = 1
    careful: bool = False
    """Ask at every iterate whether it is finite. Otherwise only at the end: what is not finite
    stays so."""

    @property
    def rules(self) -> tuple[AbstractRule, ...]:
        """All rules, in the order of the answers."""
        return (*self.cheap, *self.costly, *self.timed)

    def asks(self) -> bool:
        """Whether an iterate is asked anything before it moves."""
        return bool(self.cheap or self.costly or self.careful)

    def hits(
        self, descent: Descent, carry: Carry, at: Evaluation, goals: tuple[Array, ...]
    ) -> Array:
        """Which of the cheap and the costly rules are met, and at last whether to stop anyhow."""
        here = coordinates(carry, at.log_risk)
        met = [
            rule.progress(here) >= goal for rule, goal in zip(self.cheap, goals, strict=False)
        ]
        if self.costly:

            def late() -> list[Array]:
                here = look_around(descent.problem, carry, self.costly)
                rest = zip(self.costly, goals[len(self.cheap) :], strict=False)
                return [rule.progress(here) >= goal for rule, goal in rest]

            due = carry.num_steps % self.every == 0
            met.extend(jax.lax.cond(due, late, lambda: [jnp.array(False)] * len(self.costly)))
        return jnp.array([*met, ~at.sound if self.careful else False])


@eqx.filter_jit
def advance(
    descent: Descent, watch: Watch, carry: Carry, num_steps: Array, goals: tuple[Array, ...]
) -> tuple[Carry, Array, Array]:
    """Step until ``num_steps`` in all, a rule that is met, or an iterate that is not finite.

    Returns:
        The carry, which rules are met there, and whether the iterate is finite. If it is not, and
        the watch was not careful, it is not the first.
    """
    meter, elapsed = descent.meter, carry.elapsed
    if meter.predictable:
        # The clock is run ahead to where the time rules stop, and again to where the weights did.
        carry = eqx.tree_at(lambda c: c.elapsed, carry, None)
        late = goals[len(watch.cheap) + len(watch.costly) :]
        values = tuple(_log_time_at(rule, goal) for rule, goal in zip(watch.timed, late, strict=True))
        ahead = meter.predict(elapsed, num_steps, values)
        num_steps = ahead.num_steps

    def attempt(loop: tuple[Carry, Array]) -> tuple[Carry, Array]:
        at, carry = descent.evaluate(loop[0])
        if not watch.asks():
            return descent.move(carry, at), loop[1]
        hits = watch.hits(descent, carry, at, goals)
        go = ~jnp.any(hits)
        moved, order = descent.move(carry, at), carry.order
        moved, stays = (eqx.tree_at(lambda c: c.order, c, None) for c in (moved, carry))
        kept = jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, stays)
        return eqx.tree_at(lambda c: c.order, kept, order, is_leaf=lambda x: x is None), hits

    asked = len(watch.cheap) + len(watch.costly) + 1
    carry, hits = jax.lax.while_loop(
        lambda loop: (loop[0].num_steps < num_steps) & ~jnp.any(loop[1]),
        attempt,
        (carry, jnp.zeros(asked, bool)),
    )
    hits = hits[:-1]
    if meter.predictable:
        elapsed = meter.predict(elapsed, carry.num_steps)
        carry = eqx.tree_at(lambda c: c.elapsed, carry, elapsed, is_leaf=lambda x: x is None)
        due = [elapsed.log_time >= value for value in values]
        hits = jnp.concatenate([hits, jnp.array(due, dtype=bool)])
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(carry.weights)]
    margins = jnp.isfinite(descent.problem.margins(carry.weights))
    return carry, hits, jnp.all(jnp.stack(leaves)) & jnp.all(margins)


def _log_time_at(rule: AbstractRule, goal: Array) -> Array:
    raise NotImplementedError


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

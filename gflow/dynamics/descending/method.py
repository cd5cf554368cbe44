r"""The loop of descent on the device: many steps a call, stopping exactly where it should.

Every step evaluates the margins and the gradient at the current iterate, asks the stopping rules,
and only then moves. An iterate that meets a rule is therefore the first one that does and the last
one computed.

It is also the loop that one would write by hand, and as fast. What an optimiser does not use XLA
drops, the risk itself when only its gradient is asked for. Rules that count steps, or a time that
depends on the number of steps alone, are never asked. A rule on the risk is asked where the slopes
allow that it is met: $\log\ell$ costs three times the rest of a step of a small network, but
$R \ge \frac1{cn}\sum_i -\ell'(q_i)$ is at hand (``decay_bound``). On a CPU every further kernel
costs as much as a small layer, which is why time is kept apart where that can be done.

Two gradients are on offer. $\nabla R = \frac1n\sum_i \ell'(q_i)\nabla q_i$ is what optimisers
expect, and underflows with the risk; $g = \nabla\log R$ with $\log R$ never does, and is for the
rules that can use it (`gflow.on_log_risk`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from gflow.dynamics.descending.step_meter import Elapsed, StepMeter
from gflow.dynamics.stops import AbstractRule, Coordinates, watched
from gflow.problem.array import Array
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights, inner_product

BOUND_SLACK = 1e-9
"""Rounding allowed for in the bound on log R: the rule may be asked too often, never too late."""


class Carry(Module):
    """Everything descent needs to go on; a pytree of arrays."""

    weights: Weights
    optimizer_state: Any
    num_steps: Array
    elapsed: Elapsed | None
    """The time so far; None in a loop that does not need it."""
    order: Array | None
    """The order in which this epoch visits the points, for mini-batches."""


class Sampler(Module):
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
            parts = problem.design.chosen(chosen), problem.loss.chosen(chosen)
            return eqx.tree_at(lambda p: (p.design, p.loss), problem, parts)
        parts = problem.data.chosen(chosen), problem.loss.chosen(chosen)
        return eqx.tree_at(lambda p: (p.data, p.loss), problem, parts)


class Descent(Module):
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
        if self.sampler is not None and carry.order is not None:
            order = self.sampler.order(problem, carry.num_steps, carry.order)
            problem = self.sampler.batch(problem, carry.num_steps, order)
            carry = eqx.tree_at(lambda c: c.order, carry, order)
        coordinates, pull = problem.network.pullback(carry.weights, problem.data)
        margins = problem.spread(coordinates)
        losses = problem.loss.terms(margins)
        slopes = problem.loss.risk_slopes(margins)
        found = Evaluation(
            problem=problem,
            margins=margins,
            sound=sound(carry.weights, margins),
            slope=jnp.sum(slopes),
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

    def sound(self, carry: Carry) -> Array:
        """Whether an iterate is (see `sound`); with mini-batches by the next of them alone."""
        if self.sampler is not None:
            return self.evaluate(carry)[0].sound
        return sound(carry.weights, self.problem.margins(carry.weights))

    def step(self, carry: Carry) -> Carry:
        """The iterate after one step."""
        at, carry = self.evaluate(carry)
        return self.move(carry, at)


class Evaluation(NamedTuple):
    """What is known at an iterate before it moves."""

    problem: Problem
    margins: Array
    sound: Array
    """Whether weights and margins are (see `sound`)."""
    slope: Array
    r"""$\frac1n\sum_i -\ell'(q_i)$."""
    log_risk: Array
    log_gradient: Weights
    gradient: Weights

    @property
    def least_log_risk(self) -> Array:
        r"""What $\log R$ is not below."""
        return jnp.log(self.slope / self.problem.loss.decay_bound) - BOUND_SLACK

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


class Watch(Module):
    """The stopping rules, split by what they cost."""

    cheap: tuple[AbstractRule, ...] = ()
    """Asked at every iterate."""
    costly: tuple[AbstractRule, ...] = ()
    """Asked at every ``every``-th: they need singular values, or the risk on all points."""
    timed: tuple[AbstractRule, ...] = ()
    """Rules on a time that can be told beforehand."""
    every: int = 1
    careful: bool = False
    """Stop at the first iterate that is not finite. Otherwise it is noticed at the end of a call,
    for what is not finite stays so."""

    def hits(self, descent: Descent, carry: Carry, at: Evaluation, goals: "Goals") -> Array:
        """Which cheap and costly rules are met, and at last whether to stop for another reason."""

        def told(log_risk: Array) -> list[Array]:
            here = coordinates(carry.num_steps, carry.elapsed, log_risk)
            return _met(self.cheap, here, goals.cheap)

        if carry.elapsed is None and all(rule.of_risk for rule in self.cheap):
            met = jax.lax.cond(
                jnp.any(jnp.array([False, *told(at.least_log_risk)])),
                lambda: told(at.problem.loss.terms(at.margins).log_risk),
                lambda: [jnp.array(False)] * len(self.cheap),
            )
        else:  # the time needs log R as well
            met = told(at.log_risk)
        if self.costly:

            def late() -> list[Array]:
                here = look_around(descent.problem, carry, self.costly)
                return _met(self.costly, here, goals.costly)

            due = carry.num_steps % self.every == 0
            met += jax.lax.cond(due, late, lambda: [jnp.array(False)] * len(self.costly))
        return jnp.array([*met, ~at.sound if self.careful else jnp.array(False)])


class Goals(NamedTuple):
    """The progress at which each rule of a watch is met."""

    cheap: tuple[Array, ...] = ()
    costly: tuple[Array, ...] = ()
    timed: tuple[Array, ...] = ()


@eqx.filter_jit
def advance(
    descent: Descent, watch: Watch, carry: Carry, num_steps: Array, goals: Goals
) -> tuple[Carry, Array, Array]:
    """Step until ``num_steps`` in all, a rule that is met, or an iterate that is not finite.

    Returns:
        The carry; which rules are met there, in the order cheap, costly, timed; and whether the
        iterate is finite. If it is not, and the watch is not careful, it need not be the first.
    """
    meter, elapsed = descent.meter, carry.elapsed
    asks = bool(watch.cheap or watch.costly or watch.careful)
    if meter.predictable and elapsed is not None:
        # The clock runs ahead to where a rule on the time stops it, and once more to where the
        # weights have stopped.
        carry = _with_elapsed(carry, None)
        if watch.timed:
            num_steps = meter.predict(
                elapsed, num_steps, lambda ahead: _timed(watch, ahead, goals)
            ).num_steps

    def attempt(loop: tuple[Carry, Array]) -> tuple[Carry, Array]:
        at, carry = descent.evaluate(loop[0])
        moved = descent.move(carry, at)
        if not asks:
            return moved, loop[1]
        hits = watch.hits(descent, carry, at, goals)
        go = ~jnp.any(hits)
        chosen = jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, carry)
        # The order belongs to the epoch whether or not the step is made, and may be long.
        return eqx.tree_at(lambda c: c.order, chosen, carry.order, is_leaf=_is_none), hits

    asked = len(watch.cheap) + len(watch.costly) + 1
    carry, hits = jax.lax.while_loop(
        lambda loop: (loop[0].num_steps < num_steps) & (~jnp.any(loop[1]) if asks else True),
        attempt,
        (carry, jnp.zeros(asked, bool)),
    )
    hits = hits[:-1]
    if meter.predictable and elapsed is not None:
        elapsed = meter.predict(elapsed, carry.num_steps)
        carry = _with_elapsed(carry, elapsed)
        hits = jnp.concatenate([hits, jnp.array(_timed(watch, elapsed, goals), dtype=bool)])
    return carry, hits, descent.sound(carry)


def sound(weights: Weights, margins: Array) -> Array:
    """Whether weights and margins have finite norms, so that everything observed of them is."""
    return jnp.isfinite(inner_product(weights, weights)) & jnp.isfinite(jnp.dot(margins, margins))


@eqx.filter_jit
def look(
    problem: Problem, carry: Carry, rules: tuple[AbstractRule, ...]
) -> tuple[Array, list[Array]]:
    r"""$\log R$ on all points, and the progress of rules, at the current iterate."""
    here = look_around(problem, carry, rules)
    return here.log_risk, [rule.progress(here) for rule in rules]


def look_around(problem: Problem, carry: Carry, rules: tuple[AbstractRule, ...]) -> Coordinates:
    """The coordinates of an iterate, with all that the rules need."""
    return coordinates(
        carry.num_steps,
        carry.elapsed,
        problem.log_risk(carry.weights),
        watched(rules, problem, carry.weights),
    )


def coordinates(
    num_steps: Array,
    elapsed: Elapsed | None,
    log_risk: Array,
    small: Mapping[str, Array] | None = None,
) -> Coordinates:
    """What rules look at, in float64; NaN for what is not known."""
    log_risk = jnp.asarray(log_risk, jnp.float64)
    unknown = jnp.full_like(log_risk, jnp.nan)
    return Coordinates(
        log_risk=log_risk,
        log_time=unknown if elapsed is None else elapsed.log_time,
        num_steps=num_steps,
        small=small or {},
    )


@eqx.filter_jit
def same_weights(a: Weights, b: Weights) -> Array:
    """Whether two iterates are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.all(jnp.stack([jnp.array_equal(x, y) for x, y in pairs]))


def _met(
    rules: tuple[AbstractRule, ...], here: Coordinates, goals: tuple[Array, ...]
) -> list[Array]:
    return [rule.progress(here) >= goal for rule, goal in zip(rules, goals, strict=True)]


def _timed(watch: Watch, elapsed: Elapsed, goals: Goals) -> list[Array]:
    here = coordinates(elapsed.num_steps, elapsed, jnp.full((), jnp.nan))
    return _met(watch.timed, here, goals.timed)


def _with_elapsed(carry: Carry, elapsed: Elapsed | None) -> Carry:
    return eqx.tree_at(lambda c: c.elapsed, carry, elapsed, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _strong(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    weak = getattr(leaf, "weak_type", False)  # random keys are arrays without the attribute
    return jax.lax.convert_element_type(leaf, leaf.dtype) if weak else leaf

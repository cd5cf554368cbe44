"""How large the error of a step is: in the weights, or in what the network computes."""

import abc

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import FlowState
from gflow.problem.array import Array
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

ROUND_OFF_SEEN = 1 / 8
"""Of the round-off that is allowed for, so much is met in fact."""

LOOSEST = 0.1
"""No monitor is held to less, so that it stays stable."""

TINY = float(np.finfo(np.float64).tiny)
"""The least absolute tolerance: what is smaller XLA takes for zero."""


class AbstractTolerance(Module):
    """An error norm: a step of norm at most one is accepted.

    Attributes:
        rtol: relative error of a step that counts as one.
    """

    rtol: Array

    @abc.abstractmethod
    def norm(self, error: FlowState, before: FlowState, after: FlowState) -> Array:
        """The norm of the error of the step from ``before`` to ``after``."""

    @property
    @abc.abstractmethod
    def at_start(self) -> "Tolerance":
        """The norm that the first step's length is found by."""


class Tolerance(AbstractTolerance):
    """The error norm on weights: a step of norm at most one is accepted.

    Weights: root mean square of ``error / (atol + rtol max(|before|, |after|))``. The scaled time
    $u$ becomes small without being unimportant and is held to ``rtol`` alone, but for risks that
    fall to round-off.
    """

    atol: Array
    of_residuals: "Residuals | None" = None

    def norm(self, error: FlowState, before: FlowState, after: FlowState) -> Array:
        def scaled(e: Array, a: Array, b: Array) -> Array:
            return jnp.sum((e / (self.atol + self.rtol * jnp.maximum(abs(a), abs(b)))) ** 2)

        leaves = jax.tree.leaves(jax.tree.map(scaled, error[0], before[0], after[0]))
        size = sum(leaf.size for leaf in jax.tree.leaves(before.weights))
        weights = jnp.sqrt(sum(leaves) / size)
        return jnp.maximum(weights, self.norm_of_time(error, before, after))

    def norm_of_time(self, error: FlowState, before: FlowState, after: FlowState) -> Array:
        """That of the scaled time."""
        u = jnp.maximum(abs(before.scaled_time), abs(after.scaled_time))
        if self.of_residuals is None:
            return abs(error.scaled_time) / (self.rtol * u + jnp.finfo(u.dtype).tiny)
        more, lost = self.of_residuals.allowed(self.rtol, after.weights)
        allowed = (self.rtol + more) * u + jnp.finfo(u.dtype).tiny
        return jnp.where(lost, 0.0, abs(error.scaled_time) / allowed)

    @property
    def at_start(self) -> "Tolerance":
        return self


class Residuals(Module):
    r"""How well u can be known where the risk is a mean of squares that tend to zero.

    Of a risk at which residuals are round-off, $R_*$, they are known to $(R_*/R)^{1/2}$ of
    themselves, and u with them. A clock that knows the time does not need u, which is then a
    monitor: it is held to what weights within ``rtol`` make of it, $(R_0/R)^{1/2}$ times as much,
    R_0 the risk of zero outputs.
    """

    problem: Problem
    least: Array
    r"""$\log R_*$."""
    first: Array | None
    r"""$\log R_0$; None where the clock follows the risk."""

    def allowed(self, rtol: Array, weights: Weights) -> tuple[Array, Array]:
        """What is allowed of u beyond ``rtol``, relatively, and whether nothing is known of it."""
        log_risk = self.problem.log_risk(weights)
        lost = jnp.exp((self.least - log_risk) / 2)
        found = ROUND_OFF_SEEN * lost
        if self.first is not None:
            found = found + jnp.minimum(rtol * jnp.exp((self.first - log_risk) / 2), LOOSEST)
        return found, lost >= 1


class FunctionTolerance(AbstractTolerance):
    r"""The error norm on what the network computes, for any scale of its layers.

    The error $e$ of a step is pushed through the network, $\delta c = \partial c/\partial W\,e$
    (for deep linear networks $c = w$, the end-to-end vector) and on to the margins,
    $\delta q = A\,\delta c$, by one jvp. The norm is the largest of
    $\lVert\delta c\rVert/\lVert c\rVert$, $\lVert\delta q\rVert/\lVert q\rVert$ and, so that what
    the function does not show yet is kept too, each layer's $\lVert e_k\rVert/\lVert W_k\rVert$, in
    units of ``rtol``, each size the larger of before and after the step.
    """

    problem: Problem
    of_weights: Tolerance

    def norm(self, error: FlowState, before: FlowState, after: FlowState) -> Array:
        problem = self.problem

        def coordinates(weights: Weights) -> Array:
            return problem.network.coordinates(weights, problem.data)

        first, pushed = jax.jvp(coordinates, (after.weights,), (error.weights,))
        other = coordinates(before.weights)
        tests = [(pushed, other, first)]
        tests += [(problem.spread(pushed), problem.spread(other), problem.spread(first))]
        layers = (jax.tree.leaves(state.weights) for state in (error, before, after))
        tests += zip(*layers, strict=True)
        norms = [self._relative(*test) for test in tests]
        time = self.of_weights.norm_of_time(error, before, after)
        return jnp.maximum(jnp.max(jnp.stack(norms)), time)

    @property
    def at_start(self) -> Tolerance:
        return self.of_weights

    def _relative(self, error: Array, before: Array, after: Array) -> Array:
        size = jnp.sqrt(jnp.maximum(jnp.sum(before**2), jnp.sum(after**2)))
        return jnp.sqrt(jnp.sum(error**2)) / (self.rtol * size + jnp.finfo(size.dtype).tiny)


def default_atol(state: FlowState, rtol: float) -> float:
    """``rtol`` times the typical entry of the smallest layer that is not zero, at most one.

    A start near the saddle at zero is then resolved as well as one of order one.
    """
    sizes = [_typical(np.asarray(leaf)) for leaf in jax.tree.leaves(state.weights)]
    return max(rtol * min([1.0, *(size for size in sizes if size > 0)]), TINY)


def _typical(leaf: np.ndarray) -> float:
    """The root mean square, also of entries whose squares underflow."""
    largest = float(np.max(np.abs(leaf), initial=0.0))
    return largest * float(np.sqrt(np.mean(np.square(leaf / largest)))) if largest > 0 else 0.0

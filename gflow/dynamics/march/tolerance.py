"""How large the error of a step is: in the weights, or in what the network computes."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import FlowState
from gflow.problem.network import Array, Weights
from gflow.problem.risk import Problem


class AbstractTolerance(eqx.Module):
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
    $u$ becomes small without being unimportant and is held to ``rtol`` alone.
    """

    atol: Array

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
        return abs(error.scaled_time) / (self.rtol * u + jnp.finfo(u.dtype).tiny)

    @property
    def at_start(self) -> "Tolerance":
        return self


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
    sizes = [float(np.sqrt(np.mean(np.square(leaf)))) for leaf in jax.tree.leaves(state.weights)]
    return rtol * min([1.0, *(size for size in sizes if size > 0)])

"""The kinks of a network of one's own: each ``gflow.relu`` in its program, in their order."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem import settings
from gflow.problem.abstract_data import AbstractData
from gflow.problem.array import Array
from gflow.problem.bends import AbstractBends, Place
from gflow.problem.kinks import holds, is_kink, replay, traced
from gflow.problem.weights import Weights


class TracedBends(AbstractBends):
    """The kinks that a traced ``apply`` has; the units of a point are in the order of the calls."""

    apply: Callable[[Any, Array], Array] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)
    """The number of units in each call."""
    slopes: tuple[float, ...] = eqx.field(static=True)

    def place(self) -> Place:
        layer = np.repeat(np.arange(1, len(self.sizes) + 1), self.sizes)
        neuron = np.concatenate([np.arange(size) for size in self.sizes])
        return Place(layer, neuron, np.repeat(self.slopes, self.sizes))

    def evaluate(
        self, weights: Weights, data: AbstractData, gates: Array, shifts: Array | None
    ) -> tuple[Array, Array]:
        points = jnp.asarray(data.points)
        program = traced(self.apply, weights, points[0])

        def one(x: Array, gates: Array, shifts: Array) -> tuple[Any, Array]:
            met: list[Array] = []

            def meet(_: Any, operands: list[Any]) -> Array:
                (z,) = operands
                first = sum(each.size for each in met)
                met.append(z.reshape(-1))
                part = slice(first, first + z.size)
                return gates[part].reshape(z.shape) * z + shifts[part].reshape(z.shape)

            leaves = [*jax.tree.leaves(weights), x]
            (out,) = replay(program, leaves, is_kink, meet)
            return out, jnp.concatenate(met)

        shifts = jnp.zeros_like(gates) if shifts is None else shifts
        outputs, z = jax.vmap(one)(points, gates, shifts)
        return data.margins_of(outputs), z


def bends_of(
    apply: Callable[[Any, Array], Array], weights: Weights, data: AbstractData
) -> TracedBends | None:
    """The kinks of ``apply``; None if there are none that gflow knows of.

    Raises:
        ValueError: when one is inside a loop or a branch.
    """
    with settings.callers():
        program = traced(apply, weights, data.points[0])
    if not holds(program.jaxpr, is_kink):
        return None
    sizes: list[int] = []
    slopes: list[float] = []

    def meet(equation: Any, operands: list[Any]) -> Array:
        (z,) = operands
        sizes.append(int(np.prod(z.shape)))
        slopes.append(equation.params["slope"])
        return z

    def run(*leaves: Any) -> list[Any]:
        return replay(program, list(leaves), is_kink, meet)

    jax.eval_shape(run, *jax.tree.leaves(weights), data.points[0])
    return TracedBends(apply, tuple(sizes), tuple(slopes))

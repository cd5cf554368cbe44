r"""The vector field of gradient flow in a clock, with physical time as an extra state.

Physical time overflows, so the state carries $u = tR$ instead. From
$dt/ds = \mu/R$ and $d\log R/ds = -\mu\lVert g\rVert^2$,

$$\frac{dW}{ds} = -\mu\,g, \qquad \frac{du}{ds} = \mu\,(1 - u\lVert g\rVert^2), \qquad
\log t = \log u - \log R,$$

linear in $u$, which relaxes to $1/\lVert g\rVert^2$ and never leaves float64's range.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gflow.dynamics.clocks import AbstractClock
from gflow.problem.network import Array, Weights
from gflow.problem.risk import Problem


class FlowState(NamedTuple):
    """What the solver integrates: all weights, and $u = tR$."""

    weights: Weights
    scaled_time: Array


class FlowField(eqx.Module):
    """The field of gradient flow: ``diffrax.ODETerm(FlowField(problem, clock))`` is its term.

    A solver that exploits the problem's structure finds it here, as ``terms.vector_field``.
    """

    problem: Problem
    clock: AbstractClock

    def __call__(self, s: ArrayLike, state: FlowState, args: Any = None) -> FlowState:
        log_risk, gradient, squared_norm = self.problem.log_risk_gradient_and_norm(state.weights)
        rate = self.clock.rate(jnp.asarray(s), log_risk, squared_norm)
        return FlowState(
            weights=jax.tree.map(lambda g: -rate * g, gradient),
            scaled_time=rate * (1 - state.scaled_time * squared_norm),
        )

    def log_time(self, state: FlowState) -> Array:
        r"""$\log t = \log u - \log R$; minus infinity at the start."""
        return jnp.log(state.scaled_time) - self.problem.log_risk(state.weights)

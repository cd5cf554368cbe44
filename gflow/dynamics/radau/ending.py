"""The end of a step: the new state, and its error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import FlowState
from gflow.dynamics.radau.batching import solve, solve_differentiably
from gflow.dynamics.radau.newton import failed
from gflow.dynamics.radau.spectral import Systems
from gflow.dynamics.radau.stages import Attempt, Balance, Solution, Stages
from gflow.dynamics.radau.tableau import Radau, decay_rates, left_of_residuals, radau
from gflow.problem.array import Array, total
from gflow.problem.weights import combined, move, shaped

ROUND_OFF = 8 * float(np.finfo(np.float64).eps)
"""That of log R, as a part of the largest margin."""


def error_of_weights(stages: int, h: Array, last: Attempt) -> tuple[list[Array], Array]:
    """Last Legendre coefficient of the derivative, times its decay, its stiff part damped.

    And the rate of that decay.
    """
    tableau, frame = radau(stages), last.frame
    tail = tableau.legendre[-1]
    parts = [
        squares_of_coefficients(tableau, left, right / scale)
        for left, right, scale in zip(*last.derivatives, frame.scales, strict=True)
    ]
    third, second, final = jnp.sqrt(jnp.abs(total(parts)))
    damping, projected = h * tableau.damping, frame.project(jnp.tensordot(tail, last.inner, 1))
    if isinstance(last.stiffness, Systems):
        z = damping * last.stiffness.damped(damping, projected)
    else:
        stiff = jnp.eye(frame.gram.order) + damping * last.stiffness @ frame.gram.matrix
        z = damping * solve(stiff, last.stiffness @ projected)
    pulled = frame.pull(z, last.derivatives.rights)
    rate = jnp.minimum(jnp.maximum(*decay_rates(final, second, third)), 1.0)
    scale = h * rate ** (stages - 1)
    error = [
        scale * (combined(jnp.asarray(tail), left, right) - a.T @ back)
        for left, right, a, back in zip(*last.derivatives, frame.lefts, pulled, strict=True)
    ]
    return error, rate


class End(NamedTuple):
    """A step at its end."""

    state: FlowState
    error: FlowState
    """Infinite where Newton's iteration failed; the state is then that of the start."""
    time_slopes: Array
    round_off: Array
    """What of the scaled time's error may be that of log R, as its margins are rounded."""


def end(
    stages: int,
    tolerance: float,
    h: Array,
    before: FlowState,
    log_risk: Array,
    solution: Solution,
    error: tuple[list[Array], Array],
    at: Stages | Balance,
) -> End:
    """The new state and its error, from the solution of a step's equations.

    Args:
        stages, tolerance: of the solver.
        h: the step.
        before: the state that it starts from.
        log_risk: there.
        solution: derivatives and offsets at the stages.
        error: of the weights, and the rate at which its coefficients decay.
        at: the field at the solution.
    """
    p, tableau = stages, radau(stages)
    errors, of_weights = error
    matrix = h * tableau.matrix
    decay = at.rate * at.squared_norm
    system = jnp.eye(p) + matrix * decay[None, :]
    u = solve_differentiably(system, before.scaled_time + matrix @ at.rate)
    time_slopes = jnp.asarray(np.linalg.inv(tableau.matrix)) @ (u - before.scaled_time) / h
    *_, third, second, final = jnp.abs(tableau.legendre @ time_slopes)
    # Coefficients of one number pass through zero, where those before seem to rise: of two looks
    # the lower is its own, and it decays no faster than the weights along whose path it is found.
    own = jnp.minimum(*decay_rates(final, second, third))
    rate = jnp.minimum(jnp.maximum(of_weights, own), 1.0)
    beyond = final * rate ** jnp.arange(1, p + 1, dtype=rate.dtype)
    tail = h * beyond @ left_of_residuals(h * decay)
    balance = at.log_risk[-1] - log_risk + matrix[-1] @ decay
    from_balance = 10 * jnp.abs(u[-1]) / jnp.hypot(1.0, log_risk)
    time_error = jnp.maximum(tail, from_balance * jnp.abs(balance))
    round_off = from_balance * ROUND_OFF * jnp.max(jnp.abs(solution.offsets))
    given_up = failed(solution.newton_error, tolerance)
    # Time does not run backwards: u is at least what the risk has left of it. With an even number
    # of stages a step that is long beside 1/decay, as to a risk's round-off, can lead below zero.
    fallen = before.scaled_time * jnp.exp(jnp.minimum(at.log_risk[-1] - log_risk, 0.0))
    scaled_time = jnp.fmax(u[-1], fallen)  # the other one where the risk is zero
    after = FlowState(move(before.weights, solution.derivatives, matrix[-1]), scaled_time)
    after = jax.tree.map(lambda new, old: jnp.where(given_up, old, new), after, before)
    off = FlowState(shaped(errors, before.weights), jax.lax.stop_gradient(time_error))
    off = jax.tree.map(lambda e: jnp.where(given_up, jnp.inf, e), off)
    return End(after, off, time_slopes, jax.lax.stop_gradient(round_off))


# The coefficients of L_j^T R_j, from those of L and of R. Of the matrices themselves the last ones
# are what is left of numbers larger by the inverse of their size, and squares of that are round-off
# from the root of the machine's precision on: half of the digits of a smooth step.
def squares_of_coefficients(tableau: Radau, left: Array, right: Array) -> Array:
    """Squared norms of the last three Legendre coefficients of products, (J, r, a) by (J, r, b)."""
    num, rank, _ = left.shape

    def products(factors: Array) -> Array:
        own = jnp.asarray(tableau.legendre) @ factors.reshape(num, -1)
        own = own.reshape(num * rank, -1)
        return (own @ own.T).reshape(num, rank, num, rank).transpose(0, 2, 1, 3).reshape(num**2, -1)

    both = (products(left) @ products(right).T).reshape((num,) * 4)
    return jnp.einsum("kac,abcd,kbd->k", tableau.couplings, both, tableau.couplings)

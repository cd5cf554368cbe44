r"""Observables of deep linear networks on targets.

$W = W_L \cdots W_1$ tends to a matrix of finite size, mode by mode: each singular value in its own
time. What is measured is therefore its singular values and those of the layers, and how far it is
from the least-squares solution of least norm,

$$W^+ = Y^\top (X^+)^\top, \qquad \lVert W - W^+\rVert_F/\lVert W^+\rVert_F.$$
"""

import jax.numpy as jnp

from gflow.problem.array import Array, as_array
from gflow.problem.conserved import Kept, drift, kept
from gflow.problem.module import Module
from gflow.problem.network import Weights, end_to_end, squared_norm
from gflow.problem.regression import Regression
from gflow.problem.risk import Problem


class TargetReference(Module):
    """What observables are measured against: the start, and the solution of least norm."""

    conserved: tuple[Kept, ...]
    """What is kept of the conserved matrices of the start."""
    solution: Array
    """$W^+$, shape (K, d)."""

    @classmethod
    def of(cls, data: Regression, weights: Weights) -> "TargetReference":
        """The reference of a run."""
        return cls(kept(weights), as_array(data.least_squares()))


def of_targets(problem: Problem, weights: Weights, reference: TargetReference) -> dict[str, Array]:
    """Every observable that a record of a deep linear network on targets holds, by name."""
    num, w = problem.data.num_outputs, end_to_end(weights)
    matrix = jnp.reshape(w, reference.solution.shape)
    layers = [leading_values(layer, num) for layer in weights]
    apart = jnp.sqrt(jnp.sum((matrix - reference.solution) ** 2))
    return {
        "log_risk": problem.log_risk(weights),
        "norm": jnp.sqrt(squared_norm(weights)),
        "end_to_end_values": leading_values(matrix, num),
        "singular_values": jnp.stack(layers),
        "solution_distance": apart / jnp.sqrt(jnp.sum(reference.solution**2)),
        "frobenius_norm": jnp.stack([jnp.sqrt(jnp.sum(layer**2)) for layer in weights]),
        "spectral_norm": jnp.stack([values[0] for values in layers]),
        "imbalance_drift": drift(weights, reference.conserved),
        "end_to_end": w,
    }


def leading_values(matrix: Array, count: int) -> Array:
    """The ``count`` largest singular values; of a smaller matrix the others are zero."""
    values = jnp.linalg.svd(jnp.asarray(matrix), compute_uv=False)[:count]
    return jnp.pad(values, (0, count - values.shape[0]))

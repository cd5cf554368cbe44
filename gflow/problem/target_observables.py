r"""Observables of deep linear networks on targets.

$W = W_L \cdots W_1$ tends to a matrix of finite size, mode by mode, each in its own time: a *mode*
is a singular value of $W$ as the data see it, $WB^\top$ (``AbstractTargets.seen_through``). What is
measured is how strong modes are, how many are learnt, how many singular values matter,

$$\operatorname{erank}(W) = \exp\Bigl(-\sum_i p_i\log p_i\Bigr), \qquad
p_i = \frac{\sigma_i}{\sum_j\sigma_j}$$

(Roy and Vetterli, EUSIPCO 2007; for matrix factorisation Arora et al., arXiv 1905.13655), whether
neighbouring layers share their singular vectors, and how far W is from solutions that are known.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.abstract_targets import AbstractTargets
from gflow.problem.arguments import numbers_of
from gflow.problem.array import Array, as_array
from gflow.problem.conserved import Kept, drift, kept
from gflow.problem.deep_linear import end_to_end
from gflow.problem.module import Module
from gflow.problem.nuclear import least_nuclear
from gflow.problem.risk import Problem
from gflow.problem.singular import leading
from gflow.problem.weights import Weights, squared_norm

FAINT = 200.0
"""A mode counts as begun from this part of its target on, in `modes_learnt`."""

BEYOND = 0.01
"""Part of `modes_learnt` that a mode adds between half of its target and all of it."""


class TargetReference(Module):
    """What observables are measured against: the start, and solutions that are known."""

    conserved: tuple[Kept, ...]
    """What is kept of the conserved matrices of the start."""
    solution: Array
    """$W^+$, of least Frobenius norm, shape (K, d)."""
    nuclear: Array | None
    """That of least nuclear norm; None where it is the same."""
    modes: "Modes"

    @classmethod
    def of(cls, data: AbstractTargets, weights: Weights) -> "TargetReference":
        """The reference of a run."""
        least = least_nuclear(data)
        return cls(
            kept(weights),
            as_array(data.least_squares()),
            None if least is None else as_array(least.matrix),
            Modes.of(data),
        )


class Modes(Module):
    """What is needed to see the modes of an end-to-end matrix."""

    through: Array
    """B, shape (r, d)."""
    targets: Array
    """What they tend to, falling, K of them; zero beyond the rank."""

    @classmethod
    def of(cls, data: AbstractTargets) -> "Modes":
        """The modes of data."""
        return cls(as_array(data.seen_through()), as_array(padded_targets(data)))

    def strengths(self, matrix: Array) -> Array:
        r"""The singular values of $WB^\top$ of W, (K, d): K of them, falling."""
        values = jnp.linalg.svd(matrix @ self.through.T, compute_uv=False)
        return leading(values, self.targets.shape[0])

    # A run lands where this has a value n: it must go on growing there.
    def learnt(self, strengths: Array) -> Array:
        r"""How many modes, in their order, have half of their target or more.

        Between n - 1 and n it grows as the last learnt mode goes on to its target, by `BEYOND`, and
        then with the logarithm of the next one, from 1/200 of its target.
        """
        half = jnp.where(self.targets > 0, self.targets / 2, jnp.inf)
        relative = jnp.maximum(strengths / half, 1e-300)
        begun = jnp.clip(1 + jnp.log(relative) / jnp.log(FAINT / 2), 0.0, 1.0)
        done = jnp.cumprod(jnp.where(relative >= 1, 1.0, 0.0))
        one = jnp.ones((1,), done.dtype)
        following = jnp.concatenate([one, done[:-1]]) - done
        last = done - jnp.concatenate([done[1:], 0 * one])
        beyond = jnp.sum(last * (jnp.minimum(relative, 2.0) - 1))
        share = jnp.where(done[0] > 0, BEYOND, 0.0)
        return jnp.sum(done) + share * beyond + (1 - share) * jnp.sum(following * begun)


def padded_targets(data: AbstractTargets) -> np.ndarray:
    """`mode_targets`, K of them: zero beyond the rank."""
    sizes = data.mode_targets()
    sizes = np.where(sizes > 1e-14 * max(sizes.max(initial=0.0), 1e-300), sizes, 0.0)
    return np.pad(sizes, (0, data.num_outputs - len(sizes)))


def of_targets(problem: Problem, weights: Weights, reference: TargetReference) -> dict[str, Array]:
    """Every observable that a record of a deep linear network on targets holds, by name."""
    num, w = problem.data.num_outputs, end_to_end(weights)
    matrix = jnp.reshape(w, reference.solution.shape)
    of_layers = [jnp.linalg.svd(jnp.asarray(layer), compute_uv=False) for layer in weights]
    of_product = jnp.linalg.svd(matrix, compute_uv=False)
    modes = reference.modes.strengths(matrix)
    pairs = [gram_misalignment(a, b) for a, b in pairwise(weights)]
    found = {
        "log_risk": problem.log_risk(weights),
        "norm": jnp.sqrt(squared_norm(weights)),
        "end_to_end_values": leading(of_product, num),
        "mode_values": modes,
        "modes_learnt": reference.modes.learnt(modes),
        "effective_rank": effective_rank(of_product),
        "nuclear_norm": jnp.sum(of_product),
        "singular_values": jnp.stack([leading(values, num) for values in of_layers]),
        "layer_effective_rank": jnp.stack([effective_rank(values) for values in of_layers]),
        "gram_misalignment": jnp.stack(pairs) if pairs else jnp.zeros((0,), w.dtype),
        "solution_distance": _distance(matrix, reference.solution),
        "frobenius_norm": jnp.stack([jnp.sqrt(jnp.sum(layer**2)) for layer in weights]),
        "spectral_norm": jnp.stack([values[0] for values in of_layers]),
        "imbalance_drift": drift(weights, reference.conserved),
        "end_to_end": w,
    }
    if reference.nuclear is not None:
        found["nuclear_distance"] = _distance(matrix, reference.nuclear)
    return found


def effective_rank(values: Array) -> Array:
    r"""$\exp(-\sum_i p_i\log p_i)$ of singular values, $p$ their shares; 0 for all zero."""
    total = jnp.sum(values)
    share = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)))
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


def gram_misalignment(before: Array, after: Array) -> Array:
    r"""$1 - \cos$ of the angle between $W_kW_k^\top$ and $W_{k+1}^\top W_{k+1}$.

    Zero where the layers share singular vectors and the ratios of singular values, as balanced ones
    do: half the squared distance of the normalised matrices, without cancellation.
    """
    left, right = _unit(before @ before.T), _unit(after.T @ after)
    return jnp.sum((left - right) ** 2) / 2


def _unit(matrix: Array) -> Array:
    largest = jnp.max(jnp.abs(matrix))  # squares of small layers' products underflow
    scaled = matrix / jnp.where(largest > 0, largest, 1.0)
    size = jnp.sqrt(jnp.sum(scaled**2))
    return scaled / jnp.where(size > 0, size, 1.0)


def _distance(matrix: Array, solution: Array) -> Array:
    return jnp.sqrt(jnp.sum((matrix - solution) ** 2)) / jnp.sqrt(jnp.sum(solution**2))


# -------------------------------------------------------------------------------------------------
# On request: made for ``observables=``
# -------------------------------------------------------------------------------------------------

Observable = Callable[[Problem, Weights], Array]


def mode_strengths(left: Any, right: Any) -> Observable:
    r"""The observable $u_i^\top W v_i$ of the end-to-end matrix in a basis of one's own.

    Args:
        left: the $u_i$ as columns, shape (K, modes).
        right: the $v_i$ as columns, shape (d, modes).

    Returns:
        A function for ``observables={"strengths": ...}``; its values have shape (modes,).

    Raises:
        ValueError: when they are no matrices of as many columns.
    """
    u, v = numbers_of("left", left), numbers_of("right", right)
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
        raise ValueError(
            f"`left` has shape {u.shape} and `right` {v.shape}; expected (K, modes) and "
            "(d, modes), a mode a column."
        )

    return _Strengths(as_array(u), as_array(v))


def distance_to(matrix: Any) -> Observable:
    r"""The observable $\lVert W - M\rVert_F/\lVert M\rVert_F$ of the end-to-end matrix.

    Args:
        matrix: $M$, shape (K, d), not zero.

    Raises:
        ValueError: when it is zero or no matrix.
    """
    reference = np.atleast_2d(numbers_of("matrix", matrix))
    if reference.ndim != 2 or not np.any(reference) or not np.all(np.isfinite(reference)):
        raise ValueError(
            f"`matrix` has shape {reference.shape}; expected (K, d), finite and not zero."
        )

    return _DistanceTo(as_array(reference))


def kernel_movement(start: Weights) -> Observable:
    r"""The observable $\lVert K - K_0\rVert_F/\lVert K_0\rVert_F$ of the tangent kernel.

    $K = JJ^\top$, $J = \partial q/\partial W$ the derivatives of all margins, of targets of all
    outputs: (margins, margins), formed in full at every saved point.

    Args:
        start: the weights of $K_0$.
    """
    return _KernelMovement(jax.tree.map(as_array, start))


# Modules, whose arrays are no constants of a program: another basis or start compiles nothing.


class _Strengths(Module):
    left: Array
    right: Array

    def __call__(self, problem: Problem, weights: Weights) -> Array:
        shape = self.left.shape[0], self.right.shape[0]
        w = jnp.reshape(end_to_end(_layers(problem, weights)), shape)
        return jnp.sum(self.left * (w @ self.right), axis=0)


class _DistanceTo(Module):
    matrix: Array

    def __call__(self, problem: Problem, weights: Weights) -> Array:
        w = jnp.reshape(end_to_end(_layers(problem, weights)), self.matrix.shape)
        return _distance(w, self.matrix)


class _KernelMovement(Module):
    start: Weights

    def __call__(self, problem: Problem, weights: Weights) -> Array:
        return _distance(self.kernel(problem, weights), self.kernel(problem, self.start))

    def kernel(self, problem: Problem, weights: Weights) -> Array:
        jacobian = jax.jacrev(problem.margins)(jax.tree.map(jnp.asarray, weights))
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)]
        return jnp.sum(jnp.stack([row @ row.T for row in rows]), axis=0)


def _layers(problem: Problem, weights: Weights) -> Weights:
    layers = problem.network.layers(weights)
    if layers is None:
        raise ValueError("the network is no product of matrices, and has no end-to-end matrix.")
    return layers

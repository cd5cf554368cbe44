r"""The conserved matrices $D_k = W_{k+1}^\top W_{k+1} - W_k W_k^\top$: their drift, and Lemma 2.

Of narrow layers the matrices are formed. Of wide ones the change of $D_k$ is seen by what it does
to a few fixed vectors: products of layers with thin blocks, in time proportional to the weights.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from gflow.problem.array import Array, as_array
from gflow.problem.module import Module
from gflow.problem.singular import EXACT, norm_of, spectral_norm
from gflow.problem.weights import Weights

FORMED = 128
"""Width between two layers up to which their matrix is formed: in 0.5 ms, as long as a sketch."""

PROBES, DIRECTIONS = 48, 16
"""Vectors on which the change of a larger matrix is seen, and directions of its range that are
told apart. The norm of a change of rank up to the second number is exact; of one with a tail it is
right to some per cent."""


def imbalance(weights: Weights) -> tuple[Array, ...]:
    r"""The conserved matrices $D_k = W_{k+1}^\top W_{k+1} - W_k W_k^\top$, k = 1 … L-1."""
    return tuple(b.T @ b - a @ a.T for a, b in pairwise(weights))


def imbalance_drift(weights: Weights, start: Sequence[Array]) -> Array:
    r"""The largest change $\lVert D_k - D_k(0)\rVert_F$, relative to $\max_k\lVert W_k\rVert_F^2$.

    Zero for the exact flow, and for one layer.

    Args:
        weights: the layers.
        start: the matrices $D_k(0)$.
    """
    return drift(weights, tuple(Kept(None, matrix) for matrix in start))


class Kept(Module):
    """What is kept of a conserved matrix at the start, to see its change."""

    probes: Array | None
    """Vectors, shape (width, ``PROBES``); None where the matrix itself is kept."""
    image: Array
    """The products of the matrix with them, or the matrix."""

    @classmethod
    def of(cls, lower: Array, upper: Array) -> "Kept":
        """Of two neighbouring layers at the start."""
        width = np.shape(lower)[0]
        if width <= FORMED:
            (matrix,) = imbalance((lower, upper))
            return cls(None, as_array(np.asarray(matrix)))
        probes = as_array(np.random.default_rng(0).standard_normal((width, PROBES)))
        return cls(probes, as_array(np.asarray(_times(lower, upper, probes))))

    def squared_change(self, lower: Array, upper: Array) -> Array:
        r"""$\lVert D - D(0)\rVert_F^2$ of the two layers later."""
        if self.probes is None:
            (matrix,) = imbalance((lower, upper))
            return jnp.sum((matrix - self.image) ** 2)
        return _squared_norm_seen(self.probes, _times(lower, upper, self.probes) - self.image)


def kept(weights: Weights) -> tuple[Kept, ...]:
    """What is kept of each conserved matrix of the start."""
    return tuple(Kept.of(a, b) for a, b in pairwise(weights))


def drift(weights: Weights, start: tuple[Kept, ...]) -> Array:
    """:func:`imbalance_drift`, from what is kept of the start."""
    changes = [
        before.squared_change(a, b) for before, (a, b) in zip(start, pairwise(weights), strict=True)
    ]
    if not changes:
        return jnp.zeros((), weights[0].dtype)
    largest = jnp.max(jnp.stack([jnp.sum(matrix**2) for matrix in weights]))
    return jnp.sqrt(jnp.max(jnp.stack(changes))) / largest


def _times(lower: Array, upper: Array, vectors: Array) -> Array:
    """The product of a conserved matrix with vectors."""
    return upper.T @ (upper @ vectors) - lower @ (lower.T @ vectors)


# M is symmetric, and M P is known for P with independent normal entries. With Q an orthonormal
# basis of the range of M P_1, the first r columns, and C the least-squares solution of
# C (Q^T P_2) = Q^T M P_2 from the p others, which Q does not know,
#
#     M = Q C Q^T + N,    N P_2 = M P_2 - Q C Q^T P_2 = E,
#
# and |E|_F^2/p estimates |N|_F^2. (Tropp, Yurtsever, Udell, Cevher, SIAM J. Matrix Anal. Appl. 38,
# 1454 (2017), for Q and C.) Of E the part within Q has lost the r degrees of freedom of the fit.
# Where M has rank r or less, E vanishes.
def _squared_norm_seen(probes: Array, seen: Array) -> Array:
    """The squared Frobenius norm of a symmetric matrix from its products with the probes."""
    size = jnp.max(jnp.abs(seen))
    unit = jnp.where(size == 0, 1.0, size)
    seen = seen / unit  # squares of a change near round-off
    first, others = seen[:, :DIRECTIONS], seen[:, DIRECTIONS:]
    values, vectors = jnp.linalg.eigh(first.T @ first)
    there = values > 1e-12 * values[-1]
    scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, values, 1.0)), 0.0)
    basis = first @ (vectors * scale[None])
    against, inside = basis.T @ probes[:, DIRECTIONS:], basis.T @ others
    gram = against @ against.T + jnp.diag(jnp.where(there, 0.0, 1.0))
    within = jnp.linalg.solve(gram, against @ inside.T).T
    error = others - basis @ (within @ against)
    left_in = basis.T @ error
    outside = error - basis @ left_in
    number = PROBES - DIRECTIONS
    rest = jnp.sum(outside**2) / number + jnp.sum(left_in**2) / (number - DIRECTIONS)
    return (jnp.sum(within**2) + rest) * unit**2


def lemma_constant(start: Weights) -> float:
    r"""The $D$ of Ji and Telgarsky's Lemma 2, of the initial weights.

    $D = \max_k\lVert W_k\rVert_F^2 - \lVert W_L\rVert_F^2 + \sum_k\lVert D_k\rVert_2$, zero for
    balanced layers: $\lVert W_k\rVert_F^2 - \lVert W_k\rVert_2^2 \le D$ at all times.
    """
    norms = [float(np.sum(np.square(matrix))) for matrix in start]
    spread = [_imbalance_norm(a, b) for a, b in pairwise(start)]
    return max(norms) - norms[-1] + sum(spread)


def lemma_slacks(
    start: Weights,
    frobenius: np.ndarray,
    spectral: np.ndarray,
    rank_one_gap: np.ndarray,
    misalignment: np.ndarray,
    spectral_at_start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""What Ji and Telgarsky's Lemma 2 leaves at each point, never negative along the flow.

    (i) $D - (\lVert W_k\rVert_F^2 - \lVert W_k\rVert_2^2)$, and (ii)
    $D + \lVert W_{k+1}(0)\rVert_2^2 + \lVert W_k(0)\rVert_2^2
    - (1 - \langle v_{k+1}, u_k\rangle^2)\lVert W_{k+1}\rVert_2^2$, NaN in a tie.

    Args:
        start: the initial weights.
        frobenius, spectral, rank_one_gap: along the run, shape (points, layers).
        misalignment: shape (points, layers - 1).
        spectral_at_start: the spectral norms of the start, shape (layers,), where they are known.

    Returns:
        (points, layers) and (points, layers - 1).
    """
    constant = lemma_constant(start)
    with np.errstate(invalid="ignore"):
        tails = np.where(frobenius > 0, rank_one_gap * frobenius * (frobenius + spectral), 0.0)
    if spectral_at_start is None:
        spectral_at_start = np.array([spectral_norm(np.asarray(matrix)) for matrix in start])
    squares = spectral_at_start**2
    turned = misalignment * (2 - misalignment) * spectral[:, 1:] ** 2
    return constant - tails, constant + squares[1:] + squares[:-1] - turned


def _imbalance_norm(lower: Array, upper: Array) -> float:
    r"""$\lVert D_k\rVert_2$ of two neighbouring layers."""
    before: Any = np.asarray(lower)
    after: Any = np.asarray(upper)

    def times(vectors: Any) -> Any:
        return _times(before, after, vectors)

    width = before.shape[0]
    if width**2 <= EXACT:
        return float(np.linalg.norm(times(np.eye(width)), 2))
    return norm_of(times, width)

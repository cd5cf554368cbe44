"""Radau IIA collocation methods of any order, through Legendre polynomials on the step."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import legendre

from gflow.problem.array import Array


class Radau(NamedTuple):
    """The Radau IIA method with p stages."""

    nodes: np.ndarray
    matrix: np.ndarray
    legendre: np.ndarray
    """From values at the nodes to coefficients of Legendre polynomials on the step."""
    eigenvalues: np.ndarray
    """Of the matrix, one of each conjugate pair."""
    vectors: np.ndarray
    """Eigenvectors, those of pairs doubled: a real vector is the real part of their sum."""
    dual: np.ndarray
    couplings: np.ndarray
    """What the product of the Legendre polynomials a and b, taken at the nodes, has of the last
    three: shape (3, p, p), zero where a + b is less than their degree."""

    @property
    def damping(self) -> float:
        """The smallest modulus of an eigenvalue."""
        return float(np.min(np.abs(self.eigenvalues)))

    def solve(self, block: Array, rhs: Array) -> Array:
        """``(I + kron(matrix, block))^-1 rhs``: one solve of complex order m per eigenvalue."""
        block, rhs = (jax.lax.complex(x, jnp.zeros_like(x)) for x in (block, rhs))
        shifted = (
            jnp.eye(*block.shape, dtype=block.dtype)[None]
            + self.eigenvalues[:, None, None] * block[None]
        )
        solution = jnp.linalg.solve(shifted, (self.dual @ rhs)[:, :, None])
        return jnp.real(self.vectors @ solution[:, :, 0])


@cache
def radau(stages: int) -> Radau:
    """Nodes are the zeros of :math:`P_p - P_{p-1}`; the matrix integrates the interpolant."""
    series = np.zeros(stages + 1)
    series[-2:] = -1.0, 1.0
    x = np.sort(np.real(legendre.legroots(series)))
    for _ in range(3):
        x = x - legendre.legval(x, series) / legendre.legval(x, legendre.legder(series))
    x[-1] = 1.0
    values = legendre.legvander(x, stages - 1)
    transform = np.linalg.solve(values, np.eye(stages))
    integrals = [legendre.legval(x, legendre.legint(e, lbnd=-1)) / 2 for e in np.eye(stages)]
    matrix = np.stack(integrals, axis=1) @ transform
    eigenvalues, vectors = np.linalg.eig(matrix)
    dual = np.linalg.inv(vectors)
    half = np.imag(eigenvalues) >= 0
    weight = np.where(np.imag(eigenvalues) > 0, 2, 1)
    couplings = np.einsum("kj,ja,jb->kab", transform[-3:], values, values)
    degree = np.arange(stages)
    together = degree[:, None] + degree
    return Radau(
        nodes=(x + 1) / 2,
        matrix=matrix,
        legendre=transform,
        eigenvalues=eigenvalues[half],
        vectors=(vectors * weight)[:, half],
        dual=dual[half],
        couplings=np.where(together < degree[-3:, None, None], 0.0, couplings),
    )


def legendre_values(x: Array, count: int) -> Array:
    """Legendre polynomials of degree below ``count`` at 2x - 1, on a new leading axis."""
    values = [jnp.ones_like(x), 2 * x - 1]
    for k in range(2, count):
        values.append(((2 * k - 1) * values[1] * values[-1] - (k - 1) * values[-2]) / k)
    return jnp.stack(values[:count])


def decay_rates(final: Array, second: Array, third: Array) -> tuple[Array, Array]:
    """Two looks at the rate at which the last three coefficients, sizes, decay."""
    tiny = jnp.finfo(final.dtype).tiny
    return final / (second + tiny), jnp.sqrt(final / (third + tiny))


# On 4p Gauss points of the step, since the exponential may fall within a part of it.
@cache
def _residuals(stages: int) -> tuple[np.ndarray, np.ndarray]:
    """From a rate at the nodes to its integrals from points to the end; the residuals, weighted."""
    x, weights = legendre.leggauss(4 * stages)
    tableau = radau(stages)
    integrals = [legendre.legint(e, lbnd=1) for e in np.eye(stages)]
    ahead = -np.stack([legendre.legval(x, each) for each in integrals], axis=1) / 2
    here, there = (legendre.legvander(y, 2 * stages - 1) for y in (x, 2 * tableau.nodes - 1))
    interpolated = here[:, :stages] @ tableau.legendre @ there[:, stages:]
    residuals = weights[:, None] / 2 * (here[:, stages:] - interpolated)
    return ahead @ tableau.legendre, residuals.T


def left_of_residuals(decay: Array) -> Array:
    r"""What the end of a step sees of residuals, by a linear equation's decay on the way, sizes.

    Collocation leaves of $P_k$ in the right-hand side of $u' = f - \lambda u$ what its interpolant
    at the nodes lacks, and of that the end has $\int_0^1 (P_k - I P_k)\,e^{-\int_s^1 \lambda}ds$.

    Args:
        decay: $h\lambda$ at the p nodes.

    Returns:
        Shape (p,), of $P_p, \dots, P_{2p-1}$.
    """
    ahead, residuals = _residuals(decay.shape[0])
    return jnp.abs(jnp.asarray(residuals) @ jnp.exp(-jnp.asarray(ahead) @ decay))

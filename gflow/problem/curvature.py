r"""The curvature of the risk: extreme eigenvalues of its Hessian, matrix-free, in the log domain.

The Hessian of $R$ underflows with $R$. With $\psi(W) = \nabla R(W)/R(W_0)$, whose value at $W_0$ is
$g = \nabla\log R$,

$$\frac{\nabla^2 R(W_0)}{R(W_0)} = \psi'(W_0)$$

never does, and one Jacobian-vector product of $\psi$ multiplies a vector by it. Sharpness is
$S = \lambda_{\max}(\nabla^2 R)$; descent with learning rate $\eta$ on a quadratic of that sharpness
is stable for $\eta S < 2$ (Cohen et al., arXiv 2103.00065).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gflow.problem.array import Array
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

Slope = Callable[[Weights], tuple[Array, Weights, Array]]
r"""$\log R$, $\nabla\log R$ and its squared norm, as ``Problem.log_risk_gradient_and_norm``."""

DENSE = 64
"""Number of weights up to which the whole matrix is formed and its eigenvalues are exact."""

ITERATIONS = 40
"""Lanczos iterations beyond. The Hessian of a deep linear network has few large eigenvalues."""

BREAKDOWN = 1e-12
"""A new Lanczos vector so small, relative to the matrix, lies in the span of the old ones."""


class Curvature(NamedTuple):
    r"""The extreme eigenvalues of $\nabla^2R/R$; $\lambda = R\,\cdot$ those of $\nabla^2R$."""

    log_risk: Array
    least: Array
    greatest: Array
    error: Array
    """Within so much of each of the two there is an eigenvalue: the larger of the residuals of
    their Ritz vectors, zero where the matrix is formed."""


def relative_gradient(slope: Slope, log_risk: Array) -> Callable[[Weights], Weights]:
    r"""The function $\psi(W) = \nabla R(W)/R_0$, for $\log R_0$ given."""

    def psi(at: Weights) -> Weights:
        there, gradient, _ = slope(at)
        factor = jnp.exp(there - log_risk)
        return jax.tree.map(lambda leaf: factor * leaf, gradient)

    return psi


@eqx.filter_jit
def curvature(problem: Problem, weights: Weights) -> Curvature:
    r"""The least and the greatest eigenvalue of $\nabla^2R/R$ at the weights.

    Exact up to 64 weights. Beyond, by Lanczos with a fixed start: both are approached from within
    the spectrum.
    """
    log_risk, _, product = relative_hessian(problem, weights)
    return Curvature(log_risk, *ends_of_spectrum(product, weights))


def relative_hessian(
    problem: Problem, weights: Weights
) -> tuple[Array, Weights, Callable[[Weights], Weights]]:
    r"""$\log R$, $g = \nabla\log R$ and the product with $\nabla^2R/R$, at the weights."""
    weights = jax.tree.map(jnp.asarray, weights)
    log_risk = problem.log_risk(weights)
    psi = relative_gradient(problem.log_risk_gradient_and_norm, log_risk)
    return log_risk, *jax.linearize(psi, weights)


def ends_of_spectrum(
    product: Callable[[Weights], Weights], weights: Weights
) -> tuple[Array, Array, Array]:
    """The least and the greatest eigenvalue of a symmetric map of weights, and their error."""
    flat, shaped = ravel_pytree(jax.tree.map(jnp.asarray, weights))

    def multiply(vector: Array) -> Array:
        return ravel_pytree(product(shaped(vector)))[0]

    return extreme_eigenvalues(multiply, flat.size, flat.dtype)


def sharpness(problem: Problem, weights: Weights) -> Array:
    r"""The sharpness $S = \lambda_{\max}(\nabla^2 R)$; underflows with the risk.

    For ``observables={"sharpness": gflow.observables.sharpness}``. In a general network it may be
    negative.

    >>> import gflow, numpy as np
    >>> problem = gflow.Problem(gflow.Dataset([[0.6, 0.8]], [1]), loss=gflow.Exponential())
    >>> float(sharpness(problem, (np.zeros((1, 2)),)))  # l''(0) |z|^2
    1.0
    """
    found = curvature(problem, weights)
    return jnp.exp(found.log_risk) * found.greatest


def log_sharpness(problem: Problem, weights: Weights) -> Array:
    r"""$\log\lambda_{\max}(\nabla^2 R)$, at any risk; minus infinity where nothing curves upwards.

    With ``log_time`` of a record, $S t = \exp(\log S + \log t)$; with ``log_step_size`` likewise
    $\eta S$. Never minus infinity for a deep linear network off its saddles: the trace of
    $\nabla^2R$ is that of its Gauss–Newton part.
    """
    found = curvature(problem, weights)
    return found.log_risk + jnp.log(jnp.maximum(found.greatest, 0.0))


def sharpness_error(problem: Problem, weights: Weights) -> Array:
    r"""How far `sharpness` may be from an eigenvalue of $\nabla^2 R$; zero up to 64 weights.

    The residual $\lVert Av - \theta v\rVert$ of the Ritz vector. The error of a simple eigenvalue
    is of its square over the distance to the next one.
    """
    found = curvature(problem, weights)
    return jnp.exp(found.log_risk) * found.error


def extreme_eigenvalues(
    multiply: Callable[[Array], Array], size: int, dtype: jnp.dtype
) -> tuple[Array, Array, Array]:
    """The least and greatest eigenvalue of a symmetric matrix given by its products.

    The third number is the larger residual of their eigenvectors, zero where the matrix is formed.

    >>> import numpy as np
    >>> matrix = np.diag(np.arange(-3.0, 300.0))
    >>> with jax.enable_x64(True):
    ...     *ends, error = extreme_eigenvalues(lambda v: matrix @ v, 303, np.dtype(float))
    >>> [round(float(end)) for end in ends], abs(float(ends[1]) - 299) < float(error)
    ([-3, 299], True)
    """
    if size <= DENSE:
        matrix = jax.vmap(multiply)(jnp.eye(size, dtype=dtype))
        values = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)
        return values[0], values[-1], jnp.zeros_like(values[0])
    diagonal, beside = _tridiagonal(multiply, size, dtype)
    projected = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(projected)
    residuals = jnp.abs(beside[-1] * vectors[-1])  # A V s - theta V s = b_m s_m q_{m+1}
    return values[0], values[-1], jnp.maximum(residuals[0], residuals[-1])


# Lanczos: with q_0 of norm one, A q_j = b_{j-1} q_{j-1} + a_j q_j + b_j q_{j+1}; the tridiagonal
# matrix of a and b has Ritz values within the spectrum of A, the extreme ones near its ends. Every
# new vector is made orthogonal to all before it, twice, so that no value appears twice. Where the
# Krylov space is exhausted b_j vanishes; what follows decouples, and its diagonal is set to a_0, a
# Rayleigh quotient, which is never extreme.
def _tridiagonal(
    multiply: Callable[[Array], Array], size: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    steps = min(ITERATIONS, size)
    first = jax.random.normal(jax.random.key(0), (size,), dtype)
    basis = jnp.zeros((steps + 1, size), dtype).at[0].set(first / jnp.linalg.norm(first))

    def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, diagonal, beside = state
        vector = multiply(basis[j])
        scale = jnp.linalg.norm(vector)
        here = basis[j] @ vector
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        norm = jnp.linalg.norm(vector)
        alive = norm > BREAKDOWN * scale
        ended = jnp.all(basis[j] == 0)
        diagonal = diagonal.at[j].set(jnp.where(ended, diagonal[0], here))
        beside = beside.at[j].set(jnp.where(alive, norm, 0.0))
        following = jnp.where(alive, vector / jnp.where(alive, norm, 1.0), 0.0)
        return basis.at[j + 1].set(following), diagonal, beside

    nothing = jnp.zeros((steps,), dtype)
    _, diagonal, beside = jax.lax.fori_loop(0, steps, step, (basis, nothing, nothing))
    return diagonal, beside

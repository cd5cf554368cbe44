r"""The leading singular triple of a matrix, in time proportional to its entries.

Of a small matrix LAPACK decomposes all. Of a larger one a block Krylov method finds the leading
triple by products with thin blocks: at width 512 in a hundredth of the time, and without LAPACK's
threads, which on a busy machine wait for each other most of the time. What it finds is taken only
if its residuals prove it to be a singular triple.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.array import Array
from gflow.problem.one_thread import one_thread

EXACT = 48 * 48
"""Entries up to which all of a matrix is decomposed. Up to there that takes 0.4 ms, like the other
way, and OpenBLAS does it in one thread: it shares products of n x n matrices out from n = 51."""

THIN = 8
"""Rows or columns up to which the same holds of any matrix: LAPACK reduces it to a square one."""

BLOCK, COLUMNS, KEPT = 2, 24, 8
"""Vectors in a block, two so that a tie is seen; in the basis; and kept of it when it is full.
Blocks of 4 and 8 take a tenth and a quarter fewer products, of more columns: as long, or longer."""

ITERATIONS = 1000
"""Products with the matrix and its transpose, at most. A Gaussian matrix, whose singular values are
dense near the largest, takes 70 at width 512; a layer near rank one takes 3."""

LOOK_EVERY = 3
"""Products between two looks at what the basis holds."""

CONVERGED, PROVEN = 4, 512
"""Residuals at which the iteration ends, and of what is taken, relative to the largest singular
value and the resolution of the numbers. At width 1024 rounding leaves 5, as in a decomposition."""

OF_VALUE = 1e-9
"""Residual at which the iteration ends where only the value is asked for, relative."""

TIED = 8
"""Difference of the two largest singular values below which their vectors are undefined, in the
same unit."""

Multiply = Callable[[Array], Array]


class Singular(NamedTuple):
    """The leading singular triple of a matrix and the squared norm of the rest."""

    value: Array
    left: Array
    right: Array
    tail: Array
    r"""$\sum_{j\ge2}\sigma_j^2 = \lVert W\rVert_F^2 - \lVert W\rVert_2^2$."""


def singular(matrix: Array) -> Singular:
    r"""The leading singular triple; its sign makes the largest entry of ``right`` positive.

    The vectors are NaN where they are undefined: for a zero matrix, and where the two largest
    singular values agree to round-off. ``tail`` is the sum of the squares of the others, or
    $\lVert W - \sigma u v^\top\rVert_F^2$: never a difference of norms.
    """
    matrix = jnp.asarray(matrix)
    if 1 in matrix.shape:
        value, left, right, tail, defined = _of_vector(matrix)
    elif not _iterates(matrix):
        value, left, right, tail, defined = _decomposed(matrix)
    else:
        value, left, right, tail, defined = _iterated(matrix)
    sign = jnp.sign(right[jnp.argmax(jnp.abs(right))])
    sign = jnp.where(defined, sign, jnp.nan)
    return Singular(value, sign * left, sign * right, tail)


def _iterates(matrix: Array) -> bool:
    """Whether the Krylov method finds the triple sooner than a decomposition."""
    return np.size(matrix) > EXACT and min(np.shape(matrix)) > THIN


def _resolution(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def singulars(matrices: tuple[Array, ...]) -> list[Singular]:
    """The leading singular triple of each matrix.

    Those of one shape that are iterated on share a loop, so that a deep network compiles it once.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, matrix in enumerate(matrices):
        alike.setdefault(np.shape(matrix) if _iterates(matrix) else (k,), []).append(k)
    found: dict[int, Singular] = {}
    for members in alike.values():
        if len(members) == 1:
            found[members[0]] = singular(matrices[members[0]])
            continue
        together = jax.lax.map(singular, jnp.stack([jnp.asarray(matrices[k]) for k in members]))
        for place, k in enumerate(members):
            found[k] = Singular(*(leaf[place] for leaf in together))
    return [found[k] for k in range(len(matrices))]


def leading(values: Array, count: int) -> Array:
    """The first ``count`` singular values; of a smaller matrix the others are zero."""
    return jnp.pad(values[:count], (0, max(0, count - values.shape[0])))


def norm_of(times: Callable[[np.ndarray], np.ndarray], size: int) -> float:
    r"""$\lVert A\rVert_2$ of a symmetric matrix given by its products with vectors, on the host.

    By ARPACK: it is found once a run, for which a program of ours would take longer to compile.
    Its error is of the square of the residual over the gap: half the digits are enough of that.

    Args:
        times: from a vector to its product with the matrix.
        size: of the vectors.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator: Any = LinearOperator  # which the checker takes for its own constructor's
    begin = np.random.default_rng(0).standard_normal(size)
    first = float(np.linalg.norm(times(begin)))
    if first == 0 or not math.isfinite(first):  # of which ARPACK makes an error
        return first
    tolerance: Any = OF_VALUE  # whose type the checker takes from its default, 0
    matrix = operator((size, size), matvec=times, dtype=np.float64)
    with one_thread():
        values = eigsh(
            matrix, 1, which="LM", v0=begin, ncv=COLUMNS, tol=tolerance, return_eigenvectors=False
        )
    return float(abs(values[0]))


def spectral_norm(matrix: np.ndarray) -> float:
    r"""$\lVert W\rVert_2$ of a matrix, on the host."""
    if min(np.shape(matrix)) ** 2 <= EXACT:
        return float(np.linalg.norm(matrix, 2))
    largest = float(np.max(np.abs(matrix)))
    if largest == 0 or not math.isfinite(largest):
        return largest
    a = matrix / largest  # squares are to be finite
    a = a if a.shape[0] >= a.shape[1] else a.T
    return largest * math.sqrt(norm_of(lambda vector: a.T @ (a @ vector), a.shape[1]))


def both_ways(matrix: Array) -> tuple[Multiply, Multiply]:
    """The products of a matrix and of its transpose with two vectors, the rows of (2, n).

    A product with one vector is several times faster on a CPU if it runs along rows in memory: the
    transpose is written down.
    """
    down, across = jax.lax.optimization_barrier((matrix, matrix.T))

    def product(matrix: Array) -> Multiply:
        return lambda vectors: jnp.stack([matrix @ vectors[k] for k in range(BLOCK)])

    return product(down), product(across)


Found = tuple[Array, Array, Array, Array, Array]
"""The value, the two vectors, the squared norm of the rest, and whether the vectors are defined."""


def _of_vector(matrix: Array) -> Found:
    """Of a single row or column."""
    value = jnp.sqrt(jnp.sum(matrix**2))
    along = matrix.reshape(-1) / jnp.where(value == 0, 1.0, value)
    one = jnp.ones((1,), matrix.dtype)
    left, right = (one, along) if matrix.shape[0] == 1 else (along, one)
    return value, left, right, jnp.zeros_like(value), value > 0


def _decomposed(matrix: Array) -> Found:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return s[0], u[:, 0], vt[0], jnp.sum(s[1:] ** 2), _apart(s[0], s[1])


def _iterated(matrix: Array) -> Found:
    """By the Krylov method; decomposed where the residuals do not prove what it found."""
    # On the shorter side the basis is smaller.
    wide = matrix.shape[0] < matrix.shape[1]
    a = matrix.T if wide else matrix
    largest = jnp.max(jnp.abs(a))
    scale = 1 / jnp.where(largest == 0, 1.0, largest)  # squares are to be finite
    apply, adjoint = both_ways(scale * a)
    near = _krylov(apply, adjoint, a.shape, a.dtype)

    def normalised(vector: Array) -> tuple[Array, Array]:
        size = jnp.sqrt(jnp.sum(vector**2))
        return vector / jnp.where(size == 0, 1.0, size), size

    # u along W v, then sigma v = W^T u: what is left to be small is W v - sigma u.
    left, _ = normalised(a @ near.right)
    right, value = normalised(adjoint(jnp.stack([left] * BLOCK))[0] / scale)
    tail = jnp.sum((a - jnp.outer(value * left, right)) ** 2)
    residual = jnp.sqrt(jnp.sum((a @ right - value * left) ** 2))
    proven = residual <= PROVEN * _resolution(a.dtype) * value
    hopeless = ~jnp.isfinite(value)  # not by decomposing it either
    sides = (right, left) if wide else (left, right)
    found = value, *sides, tail, near.apart & (value > 0)
    return jax.lax.cond(proven | hopeless, lambda: found, lambda: _decomposed(matrix))


class _Near(NamedTuple):
    """What the Krylov method comes to."""

    value: Array
    right: Array
    apart: Array
    """Whether the second largest singular value differs from the largest."""


# Block Lanczos on A^T A, restarted with its best vectors (Wu and Simon, SIAM J. Matrix Anal. Appl.
# 22, 602 (2000)). With an orthonormal basis V whose last block is V_j, and F, of orthonormal
# columns orthogonal to V,
#
#     A^T A V = V H + F R E_j^T,   H = (A V)^T (A V),
#
# so that an eigenpair (theta^2, y) of H has the residual |A^T u - theta v| = |R^T y_j|/theta with
# v = V y, u = A V y/theta, y_j its last entries: it costs no product. The basis is continued by F;
# when it is full, its eigenvectors of the largest values are a basis of which the same holds. Where
# the space is exhausted F vanishes, and columns of zeros change nothing. Every new block is made
# orthogonal to the basis twice: rounding would else bring back what has converged.
def _krylov(apply: Multiply, adjoint: Multiply, shape: tuple[int, ...], dtype: jnp.dtype) -> _Near:
    rows, columns = shape
    eps = _resolution(dtype)

    def off(basis: Array, block: Array) -> Array:
        """The part of a block of rows that is orthogonal to the basis."""
        return block - (block @ basis.T) @ basis

    def unit(basis: Array, block: Array) -> tuple[Array, Array]:
        """Rows F and a matrix R with ``block`` = (a part in the span of the basis) + R F."""
        size = jnp.sqrt(jnp.sum(block**2, axis=1))
        block = off(basis, off(basis, block))
        found: list[Array] = []
        triangle = jnp.zeros((BLOCK, BLOCK), dtype)
        for k in range(BLOCK):
            vector = block[k]
            for j, other in enumerate(found * 2):
                part = jnp.dot(other, vector)
                vector = vector - part * other
                triangle = triangle.at[k, j % k].add(part)
            norm = jnp.sqrt(jnp.sum(vector**2))
            alive = norm > 100 * eps * size[k]
            found.append(jnp.where(alive, vector / jnp.where(alive, norm, 1.0), 0.0))
            triangle = triangle.at[k, k].set(jnp.where(alive, norm, 0.0))
        # Once more for what differences have left.
        return off(basis, jnp.stack(found)), triangle

    def go_on(loop: tuple) -> Array:
        *_, tries, values, residuals, _ = loop
        return (tries < ITERATIONS) & ~_done(values, residuals, CONVERGED * eps * values[0])

    def ritz(loop: tuple) -> tuple:
        """The best of the basis, which is cut back to it if it is full."""
        basis, images, triangle, place, tries, *_ = loop
        squares, vectors = jnp.linalg.eigh(images @ images.T)
        squares, vectors = squares[::-1], vectors[:, ::-1].T
        values = jnp.sqrt(jnp.maximum(squares[:BLOCK], 0.0))
        last = jax.lax.dynamic_slice(vectors, (0, place - BLOCK), (BLOCK, BLOCK))
        residuals = jnp.sqrt(jnp.sum((last @ triangle) ** 2, axis=1))
        residuals = residuals / jnp.where(values == 0, 1.0, values)
        best = vectors[0] @ basis[:COLUMNS]

        def cut() -> tuple:
            kept = jnp.where((jnp.arange(COLUMNS) < KEPT)[:, None], vectors, 0.0)
            following = basis[COLUMNS:]
            shorter = jnp.zeros_like(basis).at[:COLUMNS].set(kept @ basis[:COLUMNS])
            shorter = shorter.at[KEPT : KEPT + BLOCK].set(following)
            return shorter, kept @ images, jnp.full_like(place, KEPT)

        basis, images, place = jax.lax.cond(place >= COLUMNS, cut, lambda: (basis, images, place))
        return basis, images, triangle, place, tries, values, residuals, best

    def extend(loop: tuple) -> tuple:
        basis, images, _, place, tries, *rest = loop
        image = apply(jax.lax.dynamic_slice(basis, (place, 0), (BLOCK, columns)))
        images = jax.lax.dynamic_update_slice(images, image, (place, 0))
        following, triangle = unit(basis, adjoint(image))
        place = place + BLOCK
        basis = jax.lax.dynamic_update_slice(basis, following, (place, 0))
        loop = basis, images, triangle, place, tries + 1, *rest
        looks = (place >= COLUMNS) | (tries % LOOK_EVERY == LOOK_EVERY - 1)
        return jax.lax.cond(looks, ritz, lambda same: same, loop)

    none = jnp.zeros((), jnp.int_)
    basis = jnp.zeros((COLUMNS + BLOCK, columns), dtype)
    basis = basis.at[:BLOCK].set(unit(basis, _spread(columns, dtype))[0])
    images = jnp.zeros((COLUMNS, rows), dtype)
    values = jnp.zeros((BLOCK,), dtype)
    begin = basis, images, jnp.zeros((BLOCK, BLOCK), dtype), none, none
    begin = *begin, values, values + jnp.inf, basis[0]
    *_, values, _, best = jax.lax.while_loop(go_on, extend, begin)
    return _Near(values[0], best, _apart(values[0], values[1]))


def _done(values: Array, residuals: Array, near: Array) -> Array:
    """Whether the largest value has converged, and the second is seen to be another or is too."""
    second = _apart(values[0], values[1] + residuals[1]) | (residuals[1] <= near)
    return (residuals[0] <= near) & second | ~jnp.isfinite(values[0])


def _apart(first: Array, second: Array) -> Array:
    """Whether two singular values are not a tie."""
    return first - second > TIED * _resolution(first.dtype) * first


def _spread(size: int, dtype: jnp.dtype) -> Array:
    """A block that is orthogonal to nothing in particular, always the same."""
    # Phases that grow quadratically at an irrational rate are spread evenly, and look random.
    numbers = jnp.arange(1, size * BLOCK + 1, dtype=dtype)
    return jnp.sin(numbers**2 * ((5**0.5 - 1) / 2)).reshape(BLOCK, size)

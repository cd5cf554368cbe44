r"""Matrix sensing: values of linear measurements of a matrix.

The network's end-to-end matrix $W$, (K, d), is seen through $n$ numbers $\langle M_i, W\rangle =
\operatorname{tr}(M_i^\top W)$, which are to be the values given. Entries are such measurements
(``gflow.datasets.completion``), and so are a point's outputs: with $M_i = e_k x^\top$ this is
regression.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from gflow.problem.abstract_targets import AbstractTargets, without_round_off
from gflow.problem.arguments import numbers_of, shown
from gflow.problem.array import Array, as_array
from gflow.problem.data import check_finite, frozen
from gflow.problem.design import Rows


class Sensing(AbstractTargets):
    r"""Measurements $y_i = \langle M_i, W\rangle$ of a matrix $W \in \mathbb{R}^{K\times d}$.

    A pytree whose leaves are the two arrays, which are NumPy, float64 and read-only. A
    ``gflow.Network`` for such data is ``apply(weights, matrix)`` with a matrix of shape (K, d) and
    one number for it.

    Args:
        matrices: shape (n, K, d), one matrix a measurement; (n, d) for networks of one output.
        values: one number a measurement, shape (n,).
        name: used in tables, titles and records.

    Raises:
        ValueError: if the arrays do not fit each other, are empty, or hold NaN or infinity.

    >>> data = Sensing([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]], [2.0, 0.5])
    >>> data.num_points, data.num_outputs, data.dim
    (2, 2, 2)
    >>> data.least_squares().round(12).tolist()
    [[1.0, 0.5], [0.0, 1.0]]
    """

    matrices: Float[np.ndarray, "points outputs dim"]
    values: Float[np.ndarray, " points"]
    name: str = eqx.field(static=True)

    def __init__(
        self,
        matrices: ArrayLike | Sequence,
        values: ArrayLike | Sequence,
        *,
        name: str = "data",
    ):
        matrices = numbers_of("matrices", matrices, booleans=True)
        values = numbers_of("values", values)
        if matrices.ndim == 2:
            matrices = matrices[:, None, :]
        _check(matrices, values)
        self.matrices = frozen(matrices)
        self.values = frozen(values)
        self.name = str(name)

    @property
    def inputs(self) -> np.ndarray | Array:  # traced inside jit
        return self.matrices

    @property
    def answers(self) -> np.ndarray | Array:
        return self.values

    @property
    def output_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def num_outputs(self) -> int:
        return self.matrices.shape[1]

    @property
    def dim(self) -> int:
        return self.matrices.shape[2]

    @property
    def rows_in_words(self) -> str:
        rows = self.num_outputs
        return f"{rows} row{'s' * (rows > 1)}, as the matrices of the measurements have"

    @property
    def num_margins(self) -> int:
        return self.num_points

    def margins_of(self, outputs: Array) -> Array:
        return outputs

    def design(self) -> Rows:
        return Rows(as_array(self._flat), self.num_outputs)

    def chosen(self, points: Array) -> "Sensing":
        leaves = tuple(jnp.asarray(leaf)[points] for leaf in (self.matrices, self.values))
        return eqx.tree_at(lambda data: (data.matrices, data.values), self, leaves)

    def least_squares(self) -> np.ndarray:
        """The matrix of least Frobenius norm among those of least squares, shape (K, d)."""
        found = np.linalg.lstsq(self._flat, self.values, rcond=None)[0]
        return found.reshape(self.matrices.shape[1:])

    def least_sum_of_squares(self, rank: int) -> float:
        r"""The least $\sum_i(\langle M_i, W\rangle - y_i)^2$ of matrices of any rank.

        What a binding rank adds is not known: to find it is hard in general.
        """
        u = without_round_off(self._flat)[0]
        return float(np.sum((self.values - u @ (u.T @ self.values)) ** 2))

    def seen_through(self) -> np.ndarray:
        """The identity."""
        return np.eye(self.dim)

    @property
    def is_regression(self) -> bool:
        return False

    def gram(self) -> np.ndarray:
        return self._flat.T @ self._flat / self.num_points

    def mode_targets(self) -> np.ndarray:
        """The singular values of `least_squares`: a scale, for which matrix is found is open."""
        return np.linalg.svd(self.least_squares(), compute_uv=False)

    def as_measurements(self) -> tuple[np.ndarray, np.ndarray]:
        return self.matrices, self.values

    @property
    def _flat(self) -> np.ndarray:
        return self.matrices.reshape(self.num_points, -1)

    def __repr__(self) -> str:
        if not isinstance(self.matrices, np.ndarray):  # inside a transformation
            return f"Sensing(name={self.name!r}, matrices={self.matrices}, values={self.values})"
        return (
            f"Sensing({self.name!r}: {self.num_points} measurements of a matrix of shape "
            f"({self.num_outputs}, {self.dim}))"
        )


def _check(matrices: np.ndarray, values: np.ndarray) -> None:
    if matrices.ndim != 3 or 0 in matrices.shape:
        raise ValueError(
            f"`matrices` has shape {matrices.shape}; expected (measurements, K, d), a matrix a "
            "measurement, or (measurements, d) for one output. One measurement is matrix[None]."
        )
    if values.ndim != 1 or len(values) != len(matrices):
        raise ValueError(
            f"`values` has shape {shown(values.shape)} and there are {len(matrices)} `matrices`; "
            f"expected one number a measurement, shape ({len(matrices)},)."
        )
    check_finite("matrices", matrices)
    check_finite("values", values)
    empty = np.flatnonzero(~np.any(matrices, axis=(1, 2)))
    if empty.size:
        raise ValueError(
            f"`matrices[{empty[0]}]` is zero, which measures nothing; expected an entry that is "
            "not. Leave the measurement out."
        )

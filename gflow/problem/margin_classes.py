r"""Margins of several classes, as those of vectors.

The matrices $z_{ik} = (e_{y_i} - e_k)\,x_i^\top$ do not see a multiple of $(1, \dots, 1)^\top$ in
the outputs. In the contrasts $C = P W$, with $W = P^\top C$ and the same singular values, there are
K - 1 rows instead of K, and columns that vanish for every point are left out.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from gflow.problem.design import contrasts, differences_in_contrasts


class Contrasted:
    """The data of K classes in contrasts, scaled by a power of two to entries of order one.

    Args:
        inputs: shape (points, d).
        classes: whole numbers, shape (points,).
        num_classes: K.
    """

    def __init__(self, inputs: np.ndarray, classes: np.ndarray, num_classes: int):
        self.columns = np.flatnonzero(inputs.any(axis=0))
        """Those that do not vanish."""
        self.dim = inputs.shape[1]
        self.exponent = int(np.frexp(np.abs(inputs).max())[1])
        self.inputs = np.ldexp(inputs[:, self.columns], -self.exponent)
        self.contrasts = contrasts(num_classes)
        self.differences = differences_in_contrasts(num_classes)[classes]

    @classmethod
    def of(cls, data: Any) -> "Contrasted":
        """Of a data set with classes."""
        return cls(np.asarray(data.inputs), data.classes, data.num_classes)

    @property
    def shape(self) -> tuple[int, int]:
        """Of C."""
        return self.differences.shape[2], len(self.columns)

    @property
    def rows(self) -> Float[np.ndarray, "margins entries"]:
        """All $z_{ik}$, flattened."""
        products = self.differences[:, :, :, None] * self.inputs[:, None, None, :]
        return products.reshape(-1, self.shape[0] * self.shape[1])

    def some(self, numbers: np.ndarray) -> Float[np.ndarray, "margins contrasts dim"]:
        """Some of them, not flattened."""
        point, other = np.divmod(numbers, self.differences.shape[1])
        return self.differences[point, other][:, :, None] * self.inputs[point][:, None, :]

    def margins(self, matrix: np.ndarray) -> np.ndarray:
        """Of C, all of them."""
        return np.einsum("nkq,nq->nk", self.differences, self.inputs @ matrix.T).ravel()

    def magnitudes(self, matrix: np.ndarray) -> np.ndarray:
        """The sums of the sizes of the terms of margins."""
        sizes = np.abs(self.inputs) @ np.abs(matrix).T
        return np.einsum("nkq,nq->nk", np.abs(self.differences), sizes).ravel()

    def gather(self, weights: np.ndarray) -> np.ndarray:
        """The sum of $p_{ik}z_{ik}$."""
        at_points = np.einsum(
            "nkq,nk->nq", self.differences, weights.reshape(self.differences.shape[:2])
        )
        return at_points.T @ self.inputs

    def gather_sizes(self, weights: np.ndarray) -> np.ndarray:
        """The same of sizes."""
        rows = np.abs(weights).reshape(self.differences.shape[:2])
        return np.einsum("nkq,nk->nq", np.abs(self.differences), rows).T @ np.abs(self.inputs)

    def gram(self, weights: np.ndarray) -> np.ndarray:
        r"""$\sum h_{ik}z_{ik}z_{ik}^\top$, flattened, of order $(K - 1)d$."""
        q, d = self.shape
        rows = weights.reshape(self.differences.shape[:2])
        blocks = np.matmul(self.differences.mT * rows[:, None, :], self.differences)
        found = np.empty((q, d, q, d))
        for a in range(q):
            for b in range(a, q):
                found[a, :, b] = (self.inputs * blocks[:, a, b, None]).T @ self.inputs
                found[b, :, a] = found[a, :, b]
        return found.reshape(q * d, q * d)

    def of_outputs(self, matrix: np.ndarray) -> np.ndarray:
        """W of C, shape (K, d)."""
        full = np.zeros((self.contrasts.shape[1], self.dim))
        full[:, self.columns] = self.contrasts.T @ matrix
        return full

    def of_contrasts(self, matrix: np.ndarray) -> np.ndarray:
        """C of W."""
        return self.contrasts @ matrix[:, self.columns]

r"""How the margins of a data set follow from a network's coordinates: $q = A\,c$.

$A$ is known through four products, so that it may have a structure worth using. One output:
a row $z_i = y_i x_i$ a point. Several classes: with the outputs $f(x) \in \mathbb R^K$ there are
$K - 1$ margins a point,

$$m_{ik} = f_{y_i}(x_i) - f_k(x_i), \qquad k \ne y_i,$$

in the order of the points and, for each, of the classes. They do not see a number that is added
to all outputs, so that coordinates are *contrasts* of the outputs: $P f$ with the $K - 1$
orthonormal rows of $P$ across $(1, \dots, 1)$. Of targets the outputs are the margins, and of a
linear network the end-to-end matrix the coordinates.
"""

from abc import abstractmethod
from functools import cache

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gflow.problem.array import Array, as_array
from gflow.problem.module import Module


class AbstractDesign(Module):
    """The matrix $A$ of shape (margins, m)."""

    @property
    @abstractmethod
    def matrix(self) -> Array:
        """$A$ itself."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The numbers of margins and of coordinates."""

    @abstractmethod
    def spread(self, coordinates: Array) -> Array:
        """$A c$, along the last axis."""

    @abstractmethod
    def gather(self, slopes: Array) -> Array:
        r"""$A^\top s$, along the last axis."""

    @abstractmethod
    def gram_of_diagonal(self, entries: Array) -> Array:
        r"""$A^\top \operatorname{diag}(h) A$, shape (m, m), for $h$ of shape (margins,)."""

    @abstractmethod
    def gram_of_blocks(self, blocks: Array) -> Array:
        r"""$A^\top H A$ for a block diagonal $H$, blocks of shape (points, k, k)."""

    @abstractmethod
    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        r"""Cotangents that :meth:`gather` spans, and A in their terms.

        Returns:
            Of each of the contrasts the same cotangents, those of the first one, shape (count, m);
            and the matrix in coordinates along all of them, (margins, contrasts · count), None for
            the identity. There are never more than margins.
        """

    @abstractmethod
    def chosen(self, points: Array) -> "AbstractDesign":
        """That of some of the points, by their numbers."""

    def rows_at(self, margins: Array) -> Array:
        """Some rows of A, by their r numbers, shape (r, m)."""
        return self.matrix[margins]

    def among(self, margins: Array) -> "AbstractDesign":
        """That of some margins, by their numbers, in the same coordinates."""
        return Some(self.rows_at(margins))


class Rows(AbstractDesign):
    """Any matrix: for one output the signed inputs, for K the measured matrices, each flattened."""

    rows: Array
    num_outputs: int = eqx.field(static=True, default=1)

    @property
    def matrix(self) -> Array:
        return self.rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape  # pyright: ignore[reportReturnType]

    def spread(self, coordinates: Array) -> Array:
        return coordinates @ self.rows.T

    def gather(self, slopes: Array) -> Array:
        return slopes @ self.rows

    def gram_of_diagonal(self, entries: Array) -> Array:
        return self.rows.T @ (entries[:, None] * self.rows)

    def gram_of_blocks(self, blocks: Array) -> Array:
        rows = jnp.reshape(self.rows, (*blocks.shape[:2], -1))
        return jnp.einsum("nia,nij,njb->ab", rows, blocks, rows, optimize="optimal")

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        if self.num_outputs > 1:  # matrices have nothing in common that fewer axes could use
            width = self.shape[1] // self.num_outputs
            return jnp.pad(jnp.eye(width), ((0, 0), (0, self.shape[1] - width))), self
        if self.shape[0] < self.shape[1]:
            return jnp.asarray(self.rows), None
        return jnp.eye(self.shape[1]), self

    def chosen(self, points: Array) -> "Rows":
        return Rows(jnp.asarray(self.rows)[points], self.num_outputs)


class Some(Rows):
    """Rows of another matrix, whose axes serve."""

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        return jnp.eye(self.shape[1]), self


# Coordinates are a matrix C, (K - 1, d), flattened: the contrasts of the end-to-end matrix. With
# D_i = (e_{y_i} - e_k)_{k != y_i} P^T, (K - 1, K - 1), the margins of point i are D_i C x_i, and
#   A^T H A = sum_i (D_i^T H_i D_i) (x) (x_i x_i^T),
# symmetric in the contrasts and in the features: one matrix product for all pairs of either.
class ClassDesign(AbstractDesign):
    """Several classes, for networks that are linear.

    With fewer points than features the outputs at the points, C X^T, are fewer coordinates: in
    these the inputs are the identity, which None stands for.
    """

    differences: Array
    """$D_i$, shape (points, K - 1, K - 1)."""
    inputs: Array | None
    """Shape (points, d)."""

    @classmethod
    def of(cls, inputs: Array, classes: np.ndarray, num_classes: int) -> "ClassDesign":
        """The design of inputs (points, d) with their classes, whole numbers (points,)."""
        differences = differences_of(num_classes)[classes] @ contrasts(num_classes).T
        return cls(as_array(differences), inputs)

    @property
    def matrix(self) -> Array:
        return self.spread(jnp.eye(self.shape[1])).T

    @property
    def shape(self) -> tuple[int, int]:
        points, others, contrasts = self.differences.shape
        return points * others, contrasts * self._width

    @property
    def _width(self) -> int:
        """The number of columns of C."""
        return self.differences.shape[0] if self.inputs is None else self.inputs.shape[1]

    def spread(self, coordinates: Array) -> Array:
        before = coordinates.shape[:-1]
        c = coordinates.reshape(-1, self.differences.shape[2], self._width)
        outputs = c if self.inputs is None else c @ self.inputs.T
        margins = jnp.einsum("nkq,bqn->bnk", self.differences, outputs)
        return margins.reshape(*before, -1)

    def gather(self, slopes: Array) -> Array:
        before = slopes.shape[:-1]
        s = slopes.reshape(-1, *self.differences.shape[:2])
        outputs = jnp.einsum("nkq,bnk->bqn", self.differences, s)
        c = outputs if self.inputs is None else outputs @ self.inputs
        return c.reshape(*before, -1)

    def gram_of_diagonal(self, entries: Array) -> Array:
        d = jnp.asarray(self.differences)
        scaled = entries.reshape(d.shape[:2])[:, :, None] * d
        return self._gram(jnp.einsum("nka,nkb->nab", d, scaled))

    def gram_of_blocks(self, blocks: Array) -> Array:
        d = jnp.asarray(self.differences)
        return self._gram(jnp.einsum("nka,nkb->nab", d, jnp.einsum("nkl,nlb->nkb", blocks, d)))

    def _gram(self, blocks: Array) -> Array:
        """From the blocks in the contrasts, (points, K - 1, K - 1)."""
        points, q, _ = blocks.shape
        m = q * self._width
        if self.inputs is None:
            same = jnp.eye(points, dtype=bool)
            spread = jnp.where(same, blocks.transpose(1, 2, 0)[:, :, :, None], 0.0)
            return spread.transpose(0, 2, 1, 3).reshape(m, m)
        inputs, width = jnp.asarray(self.inputs), self._width
        first, second, pair = _symmetric(q)
        pairs = blocks[:, first, second]
        if width < q * (q + 1):  # one product for all: the smaller array is of pairs of features
            one, other, place = _symmetric(width)
            found = pairs.T @ (inputs[:, one] * inputs[:, other])
            return found[pair[:, None, :, None], place[None, :, None, :]].reshape(m, m)
        scaled = (pairs[:, :, None] * inputs[:, None, :]).reshape(points, -1)
        found = (scaled.T @ inputs).reshape(len(first), width, width)
        return found[pair].transpose(0, 2, 1, 3).reshape(m, m)

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        q = self.differences.shape[2]
        few = self.inputs is not None and self.inputs.shape[0] < self.inputs.shape[1]
        columns = jnp.asarray(self.inputs) if few else jnp.eye(self._width)
        first = jnp.pad(columns, ((0, 0), (0, (q - 1) * columns.shape[1])))
        return first, ClassDesign(self.differences, None) if few else self

    def rows_at(self, margins: Array) -> Array:
        d = jnp.asarray(self.differences)
        point = margins // d.shape[1]
        left = d.reshape(-1, d.shape[2])[margins]
        width = self._width
        right = jnp.eye(width)[point] if self.inputs is None else jnp.asarray(self.inputs)[point]
        return (left[:, :, None] * right[:, None, :]).reshape(len(margins), -1)

    def chosen(self, points: Array) -> "ClassDesign":
        inputs = None if self.inputs is None else jnp.asarray(self.inputs)[points]
        return ClassDesign(jnp.asarray(self.differences)[points], inputs)


def _symmetric(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries a <= b of a symmetric matrix: rows, columns, and where each entry is found."""
    first, second = np.triu_indices(size)
    place = np.zeros((size, size), dtype=np.intp)
    place[first, second] = place[second, first] = np.arange(len(first))
    return first, second, place


# With C = W, (K, d), and the outputs of point i next to each other, A = X (x) I up to the order of
# the coordinates, c = (C_11, C_12, ...): margin (i, k) is sum_a X_ia C_ka.
class OutputDesign(AbstractDesign):
    """The outputs of linear networks at the points, which are their own margins.

    With fewer points than features the outputs at the points are fewer coordinates: in these the
    inputs are the identity.
    """

    inputs: Array
    """Shape (points, d)."""
    num_outputs: int = eqx.field(static=True)

    @property
    def matrix(self) -> Array:
        return self.spread(jnp.eye(self.shape[1])).T

    @property
    def shape(self) -> tuple[int, int]:
        points, width = self.inputs.shape
        return points * self.num_outputs, self.num_outputs * width

    def spread(self, coordinates: Array) -> Array:
        c = coordinates.reshape(*coordinates.shape[:-1], self.num_outputs, -1)
        outputs = jnp.swapaxes(c @ self.inputs.T, -1, -2)
        return outputs.reshape(*coordinates.shape[:-1], -1)

    def gather(self, slopes: Array) -> Array:
        s = slopes.reshape(*slopes.shape[:-1], -1, self.num_outputs)
        return (jnp.swapaxes(s, -1, -2) @ self.inputs).reshape(*slopes.shape[:-1], -1)

    def gram_of_diagonal(self, entries: Array) -> Array:
        x, same = jnp.asarray(self.inputs), jnp.eye(self.num_outputs, dtype=bool)
        of_each = jnp.einsum("na,nk,nb->kab", x, entries.reshape(-1, self.num_outputs), x)
        spread = jnp.where(same[:, None, :, None], of_each[:, :, None, :], 0.0)
        return spread.reshape(self.shape[1], self.shape[1])

    def gram_of_blocks(self, blocks: Array) -> Array:
        x = jnp.asarray(self.inputs)
        found = jnp.einsum("na,nkl,nb->kalb", x, blocks, x, optimize="optimal")
        return found.reshape(self.shape[1], self.shape[1])

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        points, width = self.inputs.shape
        x = jnp.asarray(self.inputs)
        columns = x if points < width else jnp.eye(width)
        first = jnp.pad(columns, ((0, 0), (0, (self.num_outputs - 1) * width)))
        if points < width:
            return first, OutputDesign(jnp.eye(points), self.num_outputs)
        return first, self

    def chosen(self, points: Array) -> "OutputDesign":
        return OutputDesign(jnp.asarray(self.inputs)[points], self.num_outputs)


@cache
def contrasts(num_classes: int) -> np.ndarray:
    r"""Orthonormal rows across $(1, \dots, 1)$, shape (K - 1, K); for two classes (1, -1)/√2.

    Helmert's: row k sets class k + 1 against the mean of those before it.

    >>> contrasts(3).round(3).tolist()
    [[0.707, -0.707, 0.0], [0.408, 0.408, -0.816]]
    """
    k = np.arange(1, num_classes)
    rows = np.tril(np.ones((num_classes - 1, num_classes)))
    rows[k - 1, k] = -k
    found = rows / np.sqrt(k * (k + 1.0))[:, None]
    found.flags.writeable = False
    return found


@cache
def differences_of(num_classes: int) -> np.ndarray:
    r"""$e_y - e_k$ for each class y and every other k in order, shape (K, K - 1, K).

    >>> differences_of(3)[1].tolist()
    [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
    """
    eye = np.eye(num_classes)
    rows = [[eye[y] - eye[k] for k in range(num_classes) if k != y] for y in range(num_classes)]
    found = np.array(rows)
    found.flags.writeable = False
    return found


@cache
def others_of(num_classes: int) -> np.ndarray:
    """For each class the other ones in order, shape (K, K - 1).

    >>> others_of(3).tolist()
    [[1, 2], [0, 2], [0, 1]]
    """
    found = np.array([[k for k in range(num_classes) if k != y] for y in range(num_classes)])
    found.flags.writeable = False
    return found

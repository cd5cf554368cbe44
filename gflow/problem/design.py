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

from gflow.problem.array import Array
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

    def gram_of_diagonal(self, entries: Array) -> Array:
        r"""$A^\top \operatorname{diag}(h) A$, shape (m, m), for $h$ of shape (margins,)."""
        return self.matrix.T @ (entries[:, None] * self.matrix)

    def gram_of_blocks(self, blocks: Array) -> Array:
        r"""$A^\top H A$ for a block diagonal $H$, blocks of shape (points, k, k)."""
        rows = jnp.reshape(self.matrix, (*blocks.shape[:2], -1))
        return jnp.einsum("nia,nij,njb->ab", rows, blocks, rows, optimize="optimal")

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

    def among(self, margins: Array) -> "Products":
        """That of some margins, by their numbers, in the same coordinates."""
        return Products.of(self.matrix[margins])


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

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        if self.num_outputs > 1:  # matrices have nothing in common that fewer axes could use
            width = self.shape[1] // self.num_outputs
            return jnp.pad(jnp.eye(width), ((0, 0), (0, self.shape[1] - width))), self
        if self.shape[0] < self.shape[1]:
            return jnp.asarray(self.rows), None
        return jnp.eye(self.shape[1]), self

    def chosen(self, points: Array) -> "Rows":
        return Rows(jnp.asarray(self.rows)[points], self.num_outputs)


class Products(AbstractDesign):
    r"""Rows $l_i \otimes r_i$, some of those of another design, whose axes serve."""

    left: Array
    """Shape (rows, q)."""
    right: Array
    """Shape (rows, d)."""

    @classmethod
    def of(cls, rows: Array) -> "Products":
        """Any rows, of which nothing is known: q = 1."""
        return cls(jnp.ones((len(rows), 1), rows.dtype), rows)

    @property
    def squares(self) -> Array:
        """Squared norms of the rows."""
        return jnp.sum(self.left**2, 1) * jnp.sum(self.right**2, 1)

    def scaled(self, factors: Array) -> "Products":
        """Rows times factors, one for each or one for all."""
        return Products(self.left * jnp.reshape(factors, (-1, 1)), self.right)

    @property
    def matrix(self) -> Array:
        return (self.left[:, :, None] * self.right[:, None, :]).reshape(len(self.left), -1)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), self.left.shape[1] * self.right.shape[1]

    def spread(self, coordinates: Array) -> Array:
        c = coordinates.reshape(*coordinates.shape[:-1], self.left.shape[1], -1)
        return jnp.sum((c @ self.right.T) * self._turned(c.ndim), -2)

    def gather(self, slopes: Array) -> Array:
        found = (slopes[..., None, :] * self._turned(slopes.ndim + 1)) @ self.right
        return found.reshape(*slopes.shape[:-1], -1)

    def _turned(self, ndim: int) -> Array:
        """The left factors, with leading axes, shape (1, ..., q, rows)."""
        return jnp.expand_dims(self.left.T, tuple(range(ndim - 2)))

    def axes(self) -> "tuple[Array, AbstractDesign | None]":
        count, width = self.right.shape[1], self.shape[1]
        return jnp.pad(jnp.eye(count), ((0, 0), (0, width - count))), self

    def among(self, margins: Array) -> "Products":
        return Products(self.left[margins], self.right[margins])

    def chosen(self, points: Array) -> "Products":
        return self.among(points)


# Coordinates are a matrix C, (K - 1, d), flattened: the contrasts of the end-to-end matrix, whose
# rows are those of P^T C. With D_i = (e_{y_i} - e_k)_{k != y_i} P^T, (K - 1, K - 1), the margins of
# point i are D_i C x_i, and
#   A^T H A = sum_i (D_i^T H_i D_i) (x) (x_i x_i^T),
# symmetric in the contrasts and in the features: one matrix product for all pairs of either.
class ClassDesign(AbstractDesign):
    """Several classes, for networks that are linear.

    With fewer points than features the outputs at the points, C X^T, are fewer coordinates: in
    these the inputs are the identity, which None stands for.
    """

    classes: Array
    """Whole numbers, shape (points,)."""
    inputs: Array | None
    """Shape (points, d)."""
    num_classes: int = eqx.field(static=True)

    @property
    def matrix(self) -> Array:
        return self.spread(jnp.eye(self.shape[1])).T

    @property
    def shape(self) -> tuple[int, int]:
        others = self.num_classes - 1
        return len(self.classes) * others, others * self._width

    @property
    def _width(self) -> int:
        """The number of columns of C."""
        return len(self.classes) if self.inputs is None else self.inputs.shape[1]

    def spread(self, coordinates: Array) -> Array:
        c = coordinates.reshape(-1, self.num_classes - 1, self._width)
        across = jnp.asarray(contrasts(self.num_classes), c.dtype)
        of_features = jnp.einsum("qk,bqd->bkd", across, c)
        outputs = of_features if self.inputs is None else of_features @ self.inputs.T
        margins = margins_of_outputs(jnp.swapaxes(outputs, 1, 2), self.classes)
        return margins.reshape(*coordinates.shape[:-1], -1)

    def gather(self, slopes: Array) -> Array:
        s = slopes.reshape(-1, len(self.classes), self.num_classes - 1)
        outputs = jnp.swapaxes(_to_outputs(s, self.classes), 1, 2)
        of_features = outputs if self.inputs is None else outputs @ self.inputs
        across = jnp.asarray(contrasts(self.num_classes), s.dtype)
        c = jnp.einsum("qk,bkd->bqd", across, of_features)
        return c.reshape(*slopes.shape[:-1], -1)

    def gram_of_diagonal(self, entries: Array) -> Array:
        rows = entries.reshape(len(self.classes), -1)
        return self.gram_of_blocks(
            rows[:, :, None] * jnp.eye(rows.shape[1], dtype=rows.dtype)[None]
        )

    def gram_of_blocks(self, blocks: Array) -> Array:
        across = jnp.asarray(contrasts(self.num_classes).T, blocks.dtype)
        for _ in range(2):  # each of two axes, the last one when it is its turn
            blocks = jnp.swapaxes(_to_outputs(blocks, self.classes[:, None]) @ across, 1, 2)
        return self._gram(blocks)

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
        others = self.num_classes - 1
        few = self.inputs is not None and self.inputs.shape[0] < self.inputs.shape[1]
        columns = jnp.asarray(self.inputs) if few else jnp.eye(self._width)
        first = jnp.pad(columns, ((0, 0), (0, (others - 1) * columns.shape[1])))
        return first, ClassDesign(self.classes, None, self.num_classes) if few else self

    def among(self, margins: Array) -> "Products":
        point, other = jnp.divmod(margins, self.num_classes - 1)
        table = differences_in_contrasts(self.num_classes)
        left = jnp.asarray(table)[jnp.asarray(self.classes)[point], other]
        width = self._width
        right = jnp.eye(width)[point] if self.inputs is None else jnp.asarray(self.inputs)[point]
        return Products(left, right)

    def chosen(self, points: Array) -> "ClassDesign":
        inputs = None if self.inputs is None else jnp.asarray(self.inputs)[points]
        return ClassDesign(jnp.asarray(self.classes)[points], inputs, self.num_classes)


def margins_of_outputs(outputs: Array, classes: Array) -> Array:
    """The output of a point's own class less each of the others, in their order.

    Args:
        outputs: shape (..., points, K).
        classes: whole numbers, shape (points,).

    Returns:
        Shape (..., points, K - 1).
    """
    before = (1,) * (outputs.ndim - 2)
    own, k = jnp.asarray(classes).reshape(*before, -1, 1), jnp.arange(outputs.shape[-1] - 1)
    first = k.reshape(*before, 1, -1) < own
    others = jnp.where(first, outputs[..., :-1], outputs[..., 1:])
    return jnp.take_along_axis(outputs, own, -1) - others


def _to_outputs(slopes: Array, classes: Array) -> Array:
    """The transpose of :func:`margins_of_outputs`, from (..., points, K - 1) to (..., points, K).

    Classes have as many axes as slopes, but for the last one and leading ones.
    """
    known = jnp.concatenate([-slopes, jnp.sum(slopes, -1, keepdims=True)], -1)
    places = jnp.asarray(places_of(known.shape[-1]))[classes]
    places = places.reshape((1,) * (known.ndim - places.ndim) + places.shape)
    return jnp.take_along_axis(known, places, -1)


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
def differences_in_contrasts(num_classes: int) -> np.ndarray:
    r"""$D_y = (e_y - e_k)_{k \ne y} P^\top$ of each class, shape (K, K - 1, K - 1).

    >>> differences_in_contrasts(2).round(3).tolist()
    [[[1.414]], [[-1.414]]]
    """
    found = differences_of(num_classes) @ contrasts(num_classes).T
    found.flags.writeable = False
    return found


@cache
def places_of(num_classes: int) -> np.ndarray:
    """Where each class is among the others of a class, which is itself behind them, shape (K, K).

    >>> places_of(3).tolist()
    [[2, 0, 1], [0, 2, 1], [0, 1, 2]]
    """
    k = np.arange(num_classes)
    own, each = k[:, None], k[None, :]
    found = np.where(each == own, num_classes - 1, each - (each > own))
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

r"""Regression: inputs and targets, one number or several a point.

The margins of such data are the outputs $f(x_i)$ themselves, of K outputs those of the first point,
then those of the second, and so on: what a loss makes of their distance to the targets is its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from gflow.problem import tables
from gflow.problem.abstract_targets import AbstractTargets, without_round_off
from gflow.problem.arguments import file_path, flag, numbers_of, shown
from gflow.problem.array import Array, as_array
from gflow.problem.data import (
    check_finite,
    check_inputs,
    frozen,
    largest_norm,
    with_constant,
)
from gflow.problem.design import OutputDesign
from gflow.problem.files import arrays, by_suffix
from gflow.problem.memo import once_per_object


class Regression(AbstractTargets):
    r"""Points $x_i \in \mathbb{R}^d$ with targets $y_i \in \mathbb{R}^K$.

    A pytree whose leaves are the two arrays, which are NumPy, float64 and read-only. There is no
    bias: add a constant feature where one is wanted.

    Args:
        inputs: one row a point. Lists and arrays of any real type are converted.
        targets: one number a point, shape (points,), for networks of one output; or a row of K.
        name: used in tables, titles and records.

    Raises:
        ValueError: if the arrays do not fit each other, are empty, or hold NaN or infinity.

    >>> data = Regression([[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0, 3.0], [0.0, 1.0, 1.0]])
    >>> data.num_points, data.dim, data.num_outputs
    (2, 2, 3)
    """

    inputs: Float[np.ndarray, "points dim"]
    targets: Float[np.ndarray, "*points_and_outputs"]
    name: str = eqx.field(static=True)

    def __init__(
        self,
        inputs: ArrayLike | Sequence,
        targets: ArrayLike | Sequence,
        *,
        name: str = "data",
    ):
        inputs = numbers_of("inputs", inputs, booleans=True)
        targets = numbers_of("targets", targets)
        check_inputs(inputs)
        _check_targets(targets, len(inputs))
        self.inputs = frozen(inputs)
        self.targets = frozen(targets)
        self.name = str(name)

    @property
    def answers(self) -> np.ndarray:
        return self.targets

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.targets.shape[1:]

    @property
    def rows_in_words(self) -> str:
        several = f"{self.num_outputs} rows, an output for each column of the targets"
        return several if self.num_outputs > 1 else "one row, for the one target of a point"

    @property
    def num_margins(self) -> int:
        return self.num_points * self.num_outputs

    def margins_of(self, outputs: Array) -> Array:
        return jnp.reshape(outputs, (-1,))

    def design(self) -> OutputDesign:
        return OutputDesign(as_array(self.inputs), self.num_outputs)

    def chosen(self, points: Array) -> "Regression":
        leaves = tuple(jnp.asarray(leaf)[points] for leaf in (self.inputs, self.targets))
        return eqx.tree_at(lambda data: (data.inputs, data.targets), self, leaves)

    def with_bias(self, value: float = 1.0) -> "Regression":
        """The same data with one more feature, last, that is `value` for every point."""
        return Regression(with_constant(self.inputs, value), self.targets, name=self.name)

    def prepared(self, bias: float | None, scale: bool) -> "Regression":
        if scale:
            raise ValueError(
                "`scale` is true, and the data have targets, whose flow it would change; expected "
                "false. Divide the inputs yourself where that is meant."
            )
        return self if bias is None else self.with_bias(bias)

    def least_squares(self) -> np.ndarray:
        r"""The linear map $W$ of least norm among those of least squares, shape (K, d).

        $W = Y^\top (X^+)^\top$, from a singular value decomposition of X.
        """
        targets = self.targets.reshape(self.num_points, -1)
        return np.linalg.lstsq(self.inputs, targets, rcond=None)[0].T

    def least_sum_of_squares(self, rank: int) -> float:
        r"""The least $\lVert XW^\top - Y\rVert_F^2$ of maps of a rank.

        With the projection $Z = X X^+ Y$ of the targets $\lVert XW^\top - Y\rVert^2 =
        \lVert XW^\top - Z\rVert^2 + \lVert Z - Y\rVert^2$, and $XW^\top$ may be any matrix of the
        rank with columns in the range of X: that of Eckart and Young (Izenman, Journal of
        Multivariate Analysis 5, 1975).
        """
        y = self.targets.reshape(self.num_points, -1)
        u = self._range[0]
        inside = u.T @ y
        beyond = np.linalg.svd(inside, compute_uv=False)[rank:]
        return float(np.sum((y - u @ inside) ** 2) + np.sum(beyond**2))

    def seen_through(self) -> np.ndarray:
        r"""$B = SV^\top/\sqrt n$ of $X = USV^\top$.

        $XW^\top/\sqrt n$ and $WB^\top$ have the same singular values, and of inputs with
        $X^\top X = nI$ they are those of W.
        """
        _, s, vt = self._range
        return s[:, None] * vt / np.sqrt(self.num_points)

    @property
    def is_regression(self) -> bool:
        return True

    def gram(self) -> np.ndarray:
        return np.kron(np.eye(self.num_outputs), self.inputs.T @ self.inputs) / self.num_points

    def mode_targets(self) -> np.ndarray:
        r"""The singular values of $U^\top Y/\sqrt n$: of the targets as far as inputs reach."""
        y = self.targets.reshape(self.num_points, -1)
        inside = self._range[0].T @ y / np.sqrt(self.num_points)
        return np.linalg.svd(inside, compute_uv=False)

    @property
    def _range(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The singular value decomposition of X, without what is round-off."""
        return _range_of(self)

    def __repr__(self) -> str:
        if not isinstance(self.inputs, np.ndarray):  # inside a transformation
            return f"Regression(name={self.name!r}, inputs={self.inputs}, targets={self.targets})"
        return (
            f"Regression({self.name!r}: {self.num_points} points, {self.dim} features, "
            f"{self.num_outputs} target{'s' * (self.num_outputs > 1)}, "
            f"max |x| = {largest_norm(self.inputs):.4g})"
        )

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> "Regression":
        """Read a file by its suffix.

        `.csv`, `.tsv` and `.txt` are text tables, see `from_csv`; `.npz` see `from_npz`.

        Args:
            path: the file.
            **options: keyword arguments of the reader.
        """
        instead = "Regression(inputs, targets)"
        return by_suffix(path, cls.from_csv, cls.from_npz, instead, **options)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        target_columns: int | str | Sequence[int | str] = -1,
        delimiter: str = ",",
        header: bool | None = None,
        name: str | None = None,
    ) -> "Regression":
        """Read a text table: one line a point, some columns targets, every other one a feature.

        What is skipped, and how a header is told from a point, is said at `Dataset.from_csv`.

        Args:
            path: the file, in UTF-8.
            target_columns: the column of the targets, by its name in the header or its position
                (counted from 0; negative from the end); or several, for networks of so many
                outputs, in the order given.
            delimiter: what separates the columns.
            header: whether the first line names the columns. By default it is looked at.
            name: the name of the data; the name of the file without its suffix unless given.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is malformed, with the line and the column.
        """
        path = file_path("path", path)
        header = flag("header", header, none=True)
        one = isinstance(target_columns, int | str)
        wanted = [target_columns] if one else list(target_columns)
        if not wanted:
            raise ValueError("`target_columns` is empty; expected one column at least.")
        table = tables.read(path, delimiter, header=header, label_column=wanted[0])
        columns = [tables.position(table, each, "target_columns") for each in wanted]
        if len(set(columns)) < len(columns):
            raise ValueError(
                f"`target_columns` is {shown(target_columns)}, which names a column twice; "
                "expected different ones."
            )
        told = header is not None
        features = [
            each for each in tables.features(table, min(columns), told=told) if each not in columns
        ]
        if not features:
            raise ValueError(
                f"{path}: every column is a target; expected at least one more. Is {delimiter!r} "
                "the right `delimiter`?"
            )
        targets = tables.numbers(table, columns)
        inputs = tables.numbers(table, features)
        told_name = path.stem if name is None else name
        return cls(inputs, targets[:, 0] if one else targets, name=told_name)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        *,
        inputs: str = "inputs",
        targets: str = "targets",
        name: str | None = None,
    ) -> "Regression":
        """Read two arrays of an NPZ file.

        Args:
            path: the file.
            inputs: the key of the (points, features) array.
            targets: the key of the (points,) or (points, K) array.
            name: the name of the data; the name of the file without its suffix unless given.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not an NPZ file, lacks a key, or does not hold plain numbers.
        """
        path = file_path("path", path)
        values, wanted = arrays(path, {"inputs": inputs, "targets": targets})
        return cls(values, wanted, name=path.stem if name is None else name)


@once_per_object  # a run asks for it half a dozen times
def _range_of(data: Regression) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return without_round_off(data.inputs)


def _check_targets(targets: np.ndarray, num_points: int) -> None:
    if targets.ndim not in (1, 2) or 0 in targets.shape:
        raise ValueError(
            f"`targets` has shape {targets.shape}; expected ({num_points},), one number a row of "
            f"`inputs`, or ({num_points}, K), K numbers. Flatten what a point has: "
            "targets.reshape(len(targets), -1)."
        )
    if len(targets) != num_points:
        hint = (
            "Is it transposed?"
            if targets.shape[-1] == num_points
            else "The rows of `inputs` are the points."
        )
        raise ValueError(
            f"`targets` has shape {shown(targets.shape)} and `inputs` has {num_points} rows; "
            f"expected as many rows. {hint}"
        )
    check_finite("targets", targets)

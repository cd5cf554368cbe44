r"""Classification data: inputs and labels, in {-1, +1} or of several classes, and their products.

All that a linear network sees of a data set are its signed inputs $z_i = y_i x_i$: the margin of a
predictor $w$ at point $i$ is $q_i = \langle w, z_i\rangle$. Of K classes they are the matrices
$z_{ik} = (e_{y_i} - e_k)\,x_i^\top$, $k \ne y_i$, with the margins
$m_{ik} = \langle W, z_{ik}\rangle = f_{y_i}(x_i) - f_k(x_i)$ of $f(x) = W x$. There is no bias;
`Dataset.with_bias` adds a constant feature where one is wanted.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from gflow.problem import tables
from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import (
    expect_unmasked,
    file_path,
    flag,
    is_number,
    numbers_of,
    shown,
    whole,
)
from gflow.problem.array import Array, as_array
from gflow.problem.cells import is_missing
from gflow.problem.design import (
    AbstractDesign,
    ClassDesign,
    Rows,
    contrasts,
    differences_of,
    margins_of_outputs,
)
from gflow.problem.files import arrays, by_suffix
from gflow.problem.max_margin import MaxMargin, max_margin

ALIKE = 1e-12
"""How far entries of a Gram matrix that are the same may differ, relative to the largest."""

# The max-margin solutions found so far, by the identity of the data set, for as long as it lives.
# An attribute would not do: equinox counts whatever a module holds into its tree structure, and
# solving would make every compiled function compile again. The arrays are read-only, so no entry
# goes stale.
_SOLUTIONS: dict[int, MaxMargin] = {}


class Dataset(AbstractData):
    r"""Points $x_i \in \mathbb{R}^d$ with labels $y_i \in \{-1, +1\}$, or classes $0 \dots K-1$.

    A pytree whose leaves are the two arrays, which are NumPy, float64 and read-only.

    Args:
        inputs: one row a point. Lists and arrays of any real type are converted. Points may have
            any shape, as images do, (points, channels, rows, columns): they are kept as rows, and
            handed to a ``gflow.Network`` in their own shape, ``point_shape``.
        labels: one number a row, -1 or +1, or a class, 0 to K - 1, each of which has points.
        num_classes: the number K of classes. It may be left out for labels -1 and +1, and where
            more than two whole numbers from 0 on occur.
        name: used in tables, titles and records.

    Raises:
        ValueError: if the arrays do not fit each other, are empty, hold NaN or infinity, or a label
            is not -1 or +1, or no class.

    >>> data = Dataset([[0.5, 0.1], [-0.2, 0.9]], [1, -1])
    >>> data.signed_inputs.tolist()
    [[0.5, 0.1], [0.2, -0.9]]
    """

    inputs: Float[np.ndarray, "points dim"]
    labels: Float[np.ndarray, " points"]
    name: str = eqx.field(static=True)
    num_classes: int | None = eqx.field(static=True)
    """K; None for labels -1 and +1."""
    point_shape: tuple[int, ...] = eqx.field(static=True)
    """The shape of one point as it was given: (d,), or that of an image."""

    def __init__(
        self,
        inputs: ArrayLike | Sequence,
        labels: ArrayLike | Sequence,
        *,
        num_classes: int | None = None,
        name: str = "data",
    ):
        inputs = numbers_of("inputs", inputs, booleans=True)
        labels = _labels(labels, num_classes)
        self.point_shape = inputs.shape[1:]
        if inputs.ndim > 2 and 0 not in inputs.shape:
            inputs = inputs.reshape(len(inputs), -1)
        check_inputs(inputs)
        self.num_classes = _check_labels(labels, len(inputs), num_classes)
        self.inputs = frozen(inputs)
        self.labels = frozen(labels)
        self.name = str(name)

    # -- what one asks of it ------------------------------------------------------------------

    @property
    def signed_inputs(self) -> Float[np.ndarray | Array, "points dim"]:
        r"""The products $z_i = y_i x_i$, one row a point.

        Of K classes the products $z_{ik}$, flattened, shape (points · (K - 1), K · d): of each
        point those with the other classes in order.
        """
        if self.num_classes is None:
            return self.labels[:, None] * self.inputs
        signs = differences_of(self.num_classes)[self.classes]
        products = signs[:, :, :, None] * np.asarray(self.inputs)[:, None, None, :]
        return products.reshape(-1, self.num_classes * self.dim)

    @property
    def points(self) -> np.ndarray | Array:
        """The points in their own shape, (points, *point_shape)."""
        return self.inputs.reshape(-1, *self.point_shape)

    @property
    def classes(self) -> Int[np.ndarray, " points"]:
        """The labels as whole numbers: the classes, of labels -1 and +1 themselves."""
        return np.asarray(self.labels).astype(np.intp)

    @property
    def offers(self) -> frozenset[str]:
        own = ("one output",) if self.num_classes is None else ("classes", "outputs")
        return frozenset({"margins", *own})

    @property
    def kind(self) -> str:
        return "labels -1, +1" if self.num_classes is None else f"{self.num_classes} classes"

    @property
    def answers(self) -> np.ndarray | Array:
        return self.labels

    @property
    def output_shape(self) -> tuple[int, ...]:
        """() for labels -1 and +1, else one output a class, (K,)."""
        return () if self.num_classes is None else (self.num_classes,)

    @property
    def rows_in_words(self) -> str:
        if self.num_classes is not None:
            return f"{self.num_classes} rows, an output for each class of the data"
        return (
            "one row: labels -1 and +1 need one output. For several outputs the data have classes: "
            "Dataset(inputs, labels, num_classes=K)"
        )

    @property
    def rows(self) -> np.ndarray | None:
        """Contrasts of the outputs; None for labels -1 and +1."""
        return None if self.num_classes is None else contrasts(self.num_classes)

    @property
    def num_margins(self) -> int:
        """The number of margins: the points, times K - 1 for K classes."""
        return self.num_points * (self.num_outputs - 1 or 1)

    def design(self) -> AbstractDesign:
        if self.num_classes is None:
            return Rows(as_array(self.signed_inputs))
        return ClassDesign(as_array(self.classes), as_array(self.inputs), self.num_classes)

    def chosen(self, points: Array) -> "Dataset":
        leaves = tuple(jnp.asarray(leaf)[points] for leaf in (self.inputs, self.labels))
        return eqx.tree_at(lambda data: (data.inputs, data.labels), self, leaves)

    def margins_of(self, outputs: Array) -> Array:
        """The margins of a network's outputs at the points; pure JAX.

        Args:
            outputs: shape (points,), of K classes (points, K).

        Returns:
            Shape (points,), of K classes (points · (K - 1),).
        """
        if self.num_classes is None:
            return outputs * self.labels
        return margins_of_outputs(outputs, jnp.asarray(self.labels).astype(int)).reshape(-1)

    @property
    def separable(self) -> bool:
        r"""Whether some $w$ has $\langle w, z_i\rangle > 0$ for every $i$.

        Whether that is proven: `max_margin()` has the certificate, a direction with a positive
        margin. Its `inseparable` tells whether there is none.
        """
        return self.max_margin().separable

    @property
    def classes_alike(self) -> bool:
        r"""Whether there is one point a class, all of one length and at one angle to each other.

        Then $\langle x_i, x_j\rangle = a\delta_{ij} + b$, $a > 0$, and each permutation of the
        classes is an isometry of the inputs.
        """
        if self.num_classes is None or self.num_points != self.num_classes:
            return False
        gram = np.asarray(self.inputs) @ np.asarray(self.inputs).T
        b = gram[0, 1]
        a, size = gram[0, 0] - b, np.abs(gram).max()
        alike = np.abs(gram - a * np.eye(len(gram)) - b).max() <= ALIKE * size
        return bool(alike and a > ALIKE * size)

    def max_margin(self) -> MaxMargin:
        """The hard-margin direction through the origin; solved once and kept."""
        key = id(self)
        if key not in _SOLUTIONS:
            _SOLUTIONS[key] = max_margin(self)
            weakref.finalize(self, _SOLUTIONS.pop, key, None).atexit = False
        return _SOLUTIONS[key]

    # -- what one makes of it -----------------------------------------------------------------

    def scaled(self) -> "Dataset":
        r"""The same data divided by one number so that $\max_i \lVert x_i\rVert = 1$.

        The max-margin direction stays, the margin is divided by the same number. Data that are all
        zero stay as they are.
        """
        largest = np.abs(self.inputs).max()
        if largest == 0.0:
            return self
        inputs = self.inputs / largest  # first, so that squares neither overflow nor underflow
        inputs = inputs / np.linalg.norm(inputs, axis=1).max()
        excess = np.linalg.norm(inputs, axis=1).max()
        return self._with((inputs / max(excess, 1.0)).reshape(-1, *self.point_shape))

    def with_bias(self, value: float = 1.0) -> "Dataset":
        """The same data with one more feature, last, that is `value` for every point.

        Raises:
            ValueError: when ``value`` is no finite number but zero, or points have a shape of their
                own, to which no feature can be added.
        """
        if len(self.point_shape) > 1:
            raise ValueError(
                f"`data` has points of shape {self.point_shape}; expected rows of features, to "
                "which one can be added. Flatten them: inputs.reshape(len(inputs), -1)."
            )
        return self._with(with_constant(self.inputs, value))

    def prepared(self, bias: float | None, scale: bool) -> "Dataset":
        data = self if bias is None else self.with_bias(bias)
        return data.scaled() if scale else data

    def _with(self, inputs: np.ndarray) -> "Dataset":
        return Dataset(inputs, self.labels, num_classes=self.num_classes, name=self.name)

    def __repr__(self) -> str:
        if not isinstance(self.inputs, np.ndarray):  # inside a transformation
            return f"Dataset(name={self.name!r}, inputs={self.inputs}, labels={self.labels})"
        if self.num_classes is None:
            positive = int((self.labels > 0).sum())
            labels = f"{positive} positive, {self.num_points - positive} negative"
        else:
            fewest = int(np.bincount(self.classes).min())
            labels = f"{self.num_classes} classes of at least {fewest}"
        largest = largest_norm(self.inputs)
        solution = _SOLUTIONS.get(id(self))
        known = "" if solution is None else f", {solution.summary}"
        shape = "" if len(self.point_shape) == 1 else f" of shape {self.point_shape}"
        return (
            f"Dataset({self.name!r}: {self.num_points} points ({labels}), {self.dim} features"
            f"{shape}, "
            f"max |x| = {largest:.4g}{known})"
        )

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> "Dataset":
        """Read a file by its suffix.

        `.csv`, `.tsv` and `.txt` are text tables, see `from_csv`; `.npz` see `from_npz`.

        Args:
            path: the file.
            **options: keyword arguments of the reader.
        """
        return by_suffix(path, cls.from_csv, cls.from_npz, "Dataset(inputs, labels)", **options)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        label_column: int | str = -1,
        positive: str | float | None = None,
        negative: str | float | Sequence[str | float] | None = None,
        classes: bool | Sequence[str | float] = False,
        delimiter: str = ",",
        header: bool | None = None,
        name: str | None = None,
    ) -> "Dataset":
        """Read a text table: one line a point, one column the label, every other column a feature.

        Empty lines and lines that start with `#` are skipped, and so are first columns without a
        name that number the rows, as pandas' `to_csv` and R's `write.csv` write them.

        Args:
            path: the file, in UTF-8.
            label_column: the column of the labels, by its name in the header or its position
                (counted from 0; negative from the end).
            positive: the label that becomes +1. Without it the labels must be -1 and +1 already.
            negative: the label that becomes -1, or several, needed where there are more than two
                labels; points with other labels are left out.
            classes: whether the labels are classes, numbered in their order, as numbers if all are
                such and else as text; or the labels themselves in an order of one's own: points
                with others are left out.
            delimiter: what separates the columns.
            header: whether the first line names the columns. By default it is looked at: it does if
                it has a word above a column of numbers, and no fraction and no label beside it, or
                no number at all; where it cannot be told, as for the names 0, 1, 2 that pandas
                gives above whole numbers, there is an error that asks.
            name: the name of the data set; the name of the file without its suffix unless given.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is malformed, with the line and the column.
        """
        path = file_path("path", path)
        header = flag("header", header, none=True)
        wanted = tables.wanted(positive, negative, classes)
        table = tables.read(
            path, delimiter, header=header, label_column=label_column, wanted=wanted
        )
        column = tables.position(table, label_column)
        features = tables.features(table, column, told=header is not None)
        if not features:
            raise ValueError(
                f"{path}: it has one column, the labels; expected at least one more. Is "
                f"{delimiter!r} the right `delimiter`?"
            )
        told = path.stem if name is None else name
        if classes is not False:
            if positive is not None or negative is not None:
                raise ValueError(
                    "`classes` is given beside `positive` or `negative`; expected the one for "
                    "several classes or the others for two."
                )
            labels, chosen, count = tables.numbered(table, column, classes)
            inputs = tables.numbers(table.only(chosen), features)
            return cls(inputs, labels[chosen], num_classes=count, name=told)
        labels, chosen = tables.signs(table, column, positive, negative)
        inputs = tables.numbers(table.only(chosen), features)
        return cls(inputs, labels[chosen], name=told)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        *,
        inputs: str = "inputs",
        labels: str = "labels",
        positive: str | float | None = None,
        negative: str | float | Sequence[str | float] | None = None,
        name: str | None = None,
    ) -> "Dataset":
        """Read two arrays of an NPZ file.

        Args:
            path: the file.
            inputs: the key of the (points, features) array.
            labels: the key of the (points,) array.
            positive, negative: as for `from_csv`.
            name: the name of the data set; the name of the file without its suffix unless given.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not an NPZ file, lacks a key, or does not hold plain numbers.
        """
        path = file_path("path", path)
        values, signs = arrays(path, {"inputs": inputs, "labels": labels})
        if positive is not None or negative is not None:
            signs, chosen = _classes(path, labels, signs, positive, negative)
            values = values[chosen] if np.shape(values)[:1] == chosen.shape else values
            signs = signs[chosen]
        return cls(values, signs, name=path.stem if name is None else name)


def labelled(data: AbstractData) -> Dataset:
    """``data``, which have labels.

    Raises:
        ValueError: when they have targets.
    """
    if isinstance(data, Dataset):
        return data
    raise ValueError(
        f"`data` have {data.kind}; expected labels: gflow.Dataset(inputs, labels). What was asked "
        "for is of margins."
    )


# -------------------------------------------------------------------------------------------------
# Checks
# -------------------------------------------------------------------------------------------------


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only copy in float64."""
    array = np.array(array, dtype=np.float64, order="C")
    array.flags.writeable = False
    return array


def with_constant(inputs: np.ndarray, value: float) -> np.ndarray:
    """Inputs with one more feature, last, that is ``value`` for every point."""
    if not (is_number(value) and np.isfinite(value) and value != 0.0):
        raise ValueError(f"`value` is {shown(value)}; expected a finite number other than zero.")
    return np.concatenate([inputs, np.full((len(inputs), 1), float(value))], axis=1)


def largest_norm(inputs: np.ndarray) -> float:
    """The largest norm of a row, whose square may be beyond float64's range."""
    largest = float(np.abs(inputs).max())
    if largest == 0.0:
        return 0.0
    return largest * float(np.linalg.norm(inputs / largest, axis=1).max())


def _classes(
    path: Path, key: str, labels: np.ndarray, positive: Any, negative: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of an NPZ file as -1 and +1, and which points have one that is asked for."""
    if labels.ndim != 1:
        raise ValueError(
            f"{path}: {key!r} has shape {labels.shape}; expected one label a point, (points,)."
        )
    named = {str(each) for each in (positive, *tables.several(negative))}
    if labels.dtype.kind in "US":
        labels = labels.astype(str)
        gaps = [k for k, v in enumerate(labels) if is_missing(v) and v not in named]
    else:
        gaps = np.flatnonzero(np.isnan(labels)) if labels.dtype.kind == "f" else []
    if len(gaps):
        raise ValueError(
            f"{path}: `{key}[{gaps[0]}]` is {labels[gaps[0]].item()!r}, no label ({len(gaps)} "
            "such entries); expected one at every point. Drop the points without a label."
        )
    return tables.two_classes(labels, positive, negative)


def _labels(values: Any, num_classes: Any) -> np.ndarray:
    """Labels as numbers, with the conversion of what are none."""
    expect_unmasked("labels", values)
    try:
        array = np.asarray(values)
    except Exception:
        return numbers_of("labels", values)  # says what is wrong
    kinds = {type(each) for each in array.flat} if array.dtype == object else {array.dtype.type}
    words = any(issubclass(kind, str | bytes) for kind in kinds)
    gaps = [k for k, each in enumerate(array.flat) if words and not isinstance(each, str | bytes)]
    if gaps and array.ndim == 1:
        raise ValueError(
            f"`labels[{gaps[0]}]` is {shown(array[gaps[0]])}; expected a label at every point. "
            "Drop the points without one."
        )
    if array.size and all(issubclass(kind, bool | np.bool_) for kind in kinds):
        if num_classes is not None:
            return array.astype(np.float64)
        raise ValueError("`labels` are booleans; expected -1 and +1. Convert: 2.0 * labels - 1.0")
    if words and (num_classes is not None or len(np.unique(array.astype(str))) > 2):
        raise ValueError(
            f"`labels` has the type {array.dtype}; expected classes as whole numbers from 0 on. "
            "Convert: names, labels = np.unique(labels, return_inverse=True)."
        )
    if words:
        last = np.unique(array.astype(str))[-1]
        raise ValueError(
            f"`labels` has the type {array.dtype}; expected real numbers, -1 and +1. Convert: "
            f"np.where(np.asarray(labels) == {str(last)!r}, 1.0, -1.0), after points without a "
            "label are dropped."
        )
    return numbers_of("labels", values)


def check_inputs(inputs: np.ndarray) -> None:
    """Raise a ValueError unless the inputs are finite points with features."""
    if inputs.ndim != 2:
        hint = "Flatten each point: inputs.reshape(len(inputs), -1)."
        if inputs.ndim == 1:
            hint = "One point is inputs[None, :]; points with one feature are inputs[:, None]."
        raise ValueError(
            f"`inputs` has shape {inputs.shape}; expected two dimensions, (points, features). "
            f"{hint}"
        )
    if 0 in inputs.shape:
        raise ValueError(
            f"`inputs` has shape {inputs.shape}; expected at least one point and one feature."
        )
    check_finite("inputs", inputs)


def _check_labels(labels: np.ndarray, num_points: int, num_classes: Any) -> int | None:
    """The number of classes, None for labels -1 and +1."""
    if labels.ndim != 1:
        hint = "Use labels.ravel()." if labels.size == num_points else "One label, not a row of K."
        raise ValueError(
            f"`labels` has shape {labels.shape}; expected one dimension, ({num_points},): one "
            f"label a row of `inputs`. {hint}"
        )
    if len(labels) != num_points:
        raise ValueError(
            f"`labels` has {len(labels)} entries and `inputs` has {num_points} rows; expected as "
            "many. The rows of `inputs` are the points: is it transposed?"
        )
    check_finite("labels", labels)
    values = np.unique(labels)
    from_zero = np.array_equal(values, np.arange(len(values)))
    if num_classes is None:
        if len(values) > 2 and from_zero:
            return len(values)
        wrong = np.flatnonzero(np.abs(labels) != 1.0)
        if wrong.size:
            raise ValueError(
                f"`labels[{wrong[0]}]` is {labels[wrong[0]]:g}; expected -1 or +1. "
                f"{_label_hint(values)}"
            )
        return None
    if not whole(num_classes) or num_classes < 2:
        raise ValueError(
            f"`num_classes` is {shown(num_classes)}; expected a whole number of at least 2."
        )
    num_classes = int(num_classes)
    wrong = np.flatnonzero((labels != np.round(labels)) | (labels < 0) | (labels >= num_classes))
    if wrong.size:
        way = (
            "np.where(labels > 0, 1, 0), or leave `num_classes` out for one output"
            if np.array_equal(values, [-1.0, 1.0])
            else "names, labels = np.unique(labels, return_inverse=True)"
        )
        raise ValueError(
            f"`labels[{wrong[0]}]` is {labels[wrong[0]]:g}; expected a class, 0 to "
            f"{num_classes - 1}, for `num_classes` {num_classes}. Convert: {way}."
        )
    empty = np.flatnonzero(np.bincount(labels.astype(np.intp), minlength=num_classes) == 0)
    if empty.size:
        raise ValueError(
            f"`labels` has no point of class {empty[0]}; expected one at least of every class, 0 "
            f"to {num_classes - 1}. Renumber those that occur: names, labels = np.unique(labels, "
            "return_inverse=True)."
        )
    return num_classes


def _label_hint(values: np.ndarray) -> str:
    shown = ", ".join(f"{v:g}" for v in values[:6]) + (", ..." if len(values) > 6 else "")
    if len(values) == 2:
        low, high = values
        if (low, high) == (0.0, 1.0):
            return (
                "Convert labels in {0, 1}: 2 * labels - 1, for one output; or say `num_classes=2`, "
                "for two"
            )
        return f"They take the two values {shown}. Convert: np.where(labels == {high:g}, 1.0, -1.0)"
    if len(values) > 2 and np.array_equal(values, np.round(values)):
        return (
            f"They take the {len(values)} values {shown}: number the classes from 0 on, names, "
            "labels = np.unique(labels, return_inverse=True); or set one against the rest: "
            f"np.where(labels == {values[0]:g}, 1.0, -1.0)"
        )
    return f"They take the {'value' if len(values) == 1 else 'values'} {shown}."


def check_finite(argument: str, array: np.ndarray) -> None:
    """Raise a ValueError that names the first entry that is not finite, if one is not."""
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(str(int(i)) for i in bad[0])
        more = f" ({len(bad)} such entries)" if len(bad) > 1 else ""
        raise ValueError(
            f"`{argument}[{place}]` is {array[tuple(bad[0])]}; expected finite numbers{more}. "
            "Drop or impute the points concerned."
        )

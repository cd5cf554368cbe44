r"""Regression: inputs and targets, one number or several a point.

The margins of such data are the outputs $f(x_i)$ themselves, of K outputs those of the first point,
then those of the second, and so on: what a loss makes of their distance to the targets is its own.
"""

from collections.abc import Sequence
from typing import NoReturn

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import numbers_of, shown
from gflow.problem.array import Array, as_array
from gflow.problem.data import check_finite, check_inputs, frozen, largest_norm
from gflow.problem.design import OutputDesign


class Regression(AbstractData):
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
    def offers(self) -> frozenset[str]:
        return frozenset({"targets", "outputs"})

    @property
    def kind(self) -> str:
        return "targets"

    @property
    def answers(self) -> np.ndarray:
        return self.targets

    @property
    def num_classes(self) -> None:
        return None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.targets.shape[1:]

    @property
    def rows_in_words(self) -> str:
        several = f"{self.num_outputs} rows, an output for each column of the targets"
        return several if self.num_outputs > 1 else "one row, for the one target of a point"

    @property
    def rows(self) -> np.ndarray | None:
        return None if self.num_outputs == 1 else np.eye(self.num_outputs)

    @property
    def num_margins(self) -> int:
        return self.num_points * self.num_outputs

    def margins_of(self, outputs: Array) -> Array:
        return jnp.reshape(outputs, (-1,))

    def design(self) -> OutputDesign:
        return OutputDesign(as_array(self.inputs), self.num_outputs)

    def max_margin(self) -> NoReturn:
        raise ValueError(
            "`data` have targets, which no direction separates; a maximum margin is of data with "
            "labels: gflow.Dataset(inputs, labels)."
        )

    def chosen(self, points: Array) -> "Regression":
        leaves = tuple(jnp.asarray(leaf)[points] for leaf in (self.inputs, self.targets))
        return eqx.tree_at(lambda data: (data.inputs, data.targets), self, leaves)

    def least_squares(self) -> np.ndarray:
        r"""The linear map $W$ of least norm among those of least squares, shape (K, d).

        $W = Y^\top (X^+)^\top$, from a singular value decomposition of X.
        """
        targets = self.targets.reshape(self.num_points, -1)
        return np.linalg.lstsq(self.inputs, targets, rcond=None)[0].T

    def __repr__(self) -> str:
        if not isinstance(self.inputs, np.ndarray):  # inside a transformation
            return f"Regression(name={self.name!r}, inputs={self.inputs}, targets={self.targets})"
        return (
            f"Regression({self.name!r}: {self.num_points} points, {self.dim} features, "
            f"{self.num_outputs} target{'s' * (self.num_outputs > 1)}, "
            f"max |x| = {largest_norm(self.inputs):.4g})"
        )


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

r"""What a problem asks of its data: points, and what is to be predicted at each of them.

A risk is a function of *margins* (``design.py``): of labels and classes differences of the outputs
that are to be positive, of targets the outputs themselves. Which kind of data there is nobody asks;
data say what they *offer*, and what needs something else is refused in one place
(``Problem.expect_needs``).
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np

from gflow.problem.array import Array
from gflow.problem.design import AbstractDesign
from gflow.problem.module import Module

if TYPE_CHECKING:
    from gflow.problem.max_margin import MaxMargin


class AbstractData(Module):
    """Points $x_i$, one row of ``inputs`` each, with an answer for each."""

    inputs: eqx.AbstractVar[Any]
    name: eqx.AbstractVar[str]
    num_classes: eqx.AbstractVar[int | None]
    """The number K of classes; None for labels -1 and +1, and for targets."""

    @property
    def points(self) -> Any:
        """The points in their own shape, as a network takes them, numbered on the first axis."""
        return self.inputs

    @property
    @abstractmethod
    def offers(self) -> frozenset[str]:
        """What may be asked of the data.

        Some of "one output" (labels -1 and +1), "classes", "margins" (either of them), "targets",
        and "outputs" (classes or targets, of which networks have several outputs).
        """

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the answers are, in words."""

    @property
    @abstractmethod
    def answers(self) -> Any:
        """Labels, classes or targets, the points on the first axis."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """The shape of a network's output at a point: () or (K,)."""

    @property
    @abstractmethod
    def rows_in_words(self) -> str:
        """How many rows the last layer of a linear network has, and why."""

    @property
    @abstractmethod
    def rows(self) -> np.ndarray | None:
        """What margins see of the outputs, rows in R^K, shape (q, K); None for one output."""

    @property
    @abstractmethod
    def num_margins(self) -> int:
        """The number of margins."""

    @abstractmethod
    def margins_of(self, outputs: Array) -> Array:
        """The margins of a network's outputs at the points, (points, *output_shape); pure JAX."""

    @abstractmethod
    def design(self) -> AbstractDesign:
        r"""From the coordinates of a linear network, ``rows`` $W_L \cdots W_1$, to the margins."""

    @abstractmethod
    def max_margin(self) -> "MaxMargin":
        """The hard-margin direction through the origin.

        Raises:
            ValueError: when the data have none.
        """

    @abstractmethod
    def chosen(self, points: Array) -> "AbstractData":
        """Some of the points, by their numbers; pure JAX."""

    def prepared(self, bias: float | None, scale: bool) -> "AbstractData":
        """The data with a constant feature ``bias``, if one is given, and in the unit ball.

        Raises:
            ValueError: when such data have neither.
        """
        if bias is None and not scale:
            return self
        raise ValueError(
            f"`{'scale' if bias is None else 'bias'}` is not for data with {self.kind} of this "
            "kind; leave it out."
        )

    @property
    def num_outputs(self) -> int:
        """The outputs that a network needs."""
        return self.output_shape[0] if self.output_shape else 1

    @property
    def num_points(self) -> int:
        """The number of points, $n$."""
        return self.inputs.shape[0]

    @property
    def dim(self) -> int:
        """The number of features, $d$, which are kept as a row."""
        return self.inputs.shape[1]

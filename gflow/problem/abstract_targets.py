r"""What data with targets have in common: linear maps that fit them best.

Outputs of a linear network are linear in its end-to-end matrix, $f = A \operatorname{vec}(W)$, so
that the square loss is a least-squares problem in $W$. What is known of its solutions in closed
form is here asked of the data: the one of least norm, and how little of the targets maps of a rank
leave over.
"""

from abc import abstractmethod
from typing import NoReturn

import numpy as np

from gflow.problem.abstract_data import AbstractData


class AbstractTargets(AbstractData):
    """Points with numbers that a network's outputs are to take."""

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"targets", "outputs"})

    @property
    def num_classes(self) -> None:
        return None

    @abstractmethod
    def least_squares(self) -> np.ndarray:
        """The linear map $W$ of least norm among those of least squares, shape (K, d)."""

    @abstractmethod
    def least_sum_of_squares(self, rank: int) -> float:
        r"""A bound $\sum\lVert f - y\rVert^2$ from below for linear maps of a rank.

        It is met by some map, unless the rank binds and no closed form is known.
        """

    def max_margin(self) -> NoReturn:
        raise ValueError(
            "`data` have targets, which no direction separates; a maximum margin is of data with "
            "labels: gflow.Dataset(inputs, labels)."
        )

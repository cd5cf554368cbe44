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

    @abstractmethod
    def seen_through(self) -> np.ndarray:
        r"""The matrix $B$, shape (r, d), through which the data see $W$, as $WB^\top$.

        Its singular values are the strengths of the *modes*: what the data ask of each is
        `mode_targets`, and a saddle of the risk has learnt the first of them and no other.
        """

    @abstractmethod
    def mode_targets(self) -> np.ndarray:
        """What the strengths of the modes tend to, falling, shape (min(K, r),)."""

    def as_measurements(self) -> tuple[np.ndarray, np.ndarray] | None:
        r"""Matrices $M_i$ and values with $\langle M_i, W\rangle = y_i$.

        None where `least_squares` is of least norm in every unitarily invariant norm.
        """
        return None

    def max_margin(self) -> NoReturn:
        raise ValueError(
            "`data` have targets, which no direction separates; a maximum margin is of data with "
            "labels: gflow.Dataset(inputs, labels)."
        )

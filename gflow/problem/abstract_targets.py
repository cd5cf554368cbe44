r"""What data with targets have in common: linear maps that fit them best.

Outputs of a linear network are linear in its end-to-end matrix, $f = A \operatorname{vec}(W)$, so
that the square loss is a least-squares problem in $W$. What is known of its solutions in closed
form is here asked of the data: the one of least norm, and how little of the targets maps of a rank
leave over.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from gflow.problem.abstract_data import AbstractData

WHITE = 1e-12
"""Relative deviation from a multiple of the identity that is round-off."""

LARGEST_GRAM = 256
"""Entries of W up to which rates are worked out: in some milliseconds."""


class AbstractTargets(AbstractData):
    """Points with numbers that a network's outputs are to take."""

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"targets", "outputs"})

    @property
    def kind(self) -> str:
        return "targets"

    @property
    def num_classes(self) -> None:
        return None

    @property
    def rows(self) -> np.ndarray | None:
        return None if self.num_outputs == 1 else np.eye(self.num_outputs)

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

    @abstractmethod
    def gram(self) -> np.ndarray:
        r"""$A^\top A/n$ of the outputs $A\operatorname{vec}(W)$, shape (Kd, Kd)."""

    @property
    def whitened(self) -> float | None:
        r"""The c of $B^\top B = cI$, where inputs are white; None where they are not."""
        through = self.seen_through()
        square = through.T @ through
        scale = float(np.trace(square)) / len(square)
        white = np.max(np.abs(square - scale * np.eye(len(square)))) <= WHITE * scale
        return scale if white and self.is_regression else None

    @property
    @abstractmethod
    def is_regression(self) -> bool:
        r"""Whether the risk is $\frac12\lVert WB^\top - C\rVert_F^2$ and a number."""

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


def without_round_off(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition U, S, V^T of what is not round-off of a matrix."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    there = s > s[0] * max(matrix.shape) * np.finfo(np.float64).eps
    return u[:, there], s[there], vt[there]


def slowest_rate(data: AbstractTargets, weights: Sequence[np.ndarray]) -> float | None:
    r"""The slowest exponential rate at which residuals of a deep linear network vanish.

    Near weights at rest $\operatorname{vec}\dot W = -T\,\frac{A^\top A}{n}\operatorname{vec}(W -
    W_\infty)$ with the tangent kernel $T = \sum_k a_ka_k^\top \otimes b_k^\top b_k$ of
    $a_k = W_L\cdots W_{k+1}$, $b_k = W_{k-1}\cdots W_1$: its eigenvalues, but for what the data do
    not see. The risk falls at twice this rate or faster.

    Returns:
        The rate in the time of $\dot W = -\nabla R$; None for large matrices.
    """
    if data.num_outputs * data.dim > LARGEST_GRAM:
        return None
    befores, afters = [np.eye(data.dim)], [np.eye(data.num_outputs)]
    for before, after in zip(weights[:-1], weights[:0:-1], strict=True):
        befores.append(before @ befores[-1])
        afters.append(afters[-1] @ after)
    pairs = zip(afters[::-1], befores, strict=True)
    kernel = sum(np.kron(a @ a.T, b.T @ b) for a, b in pairs)
    values, vectors = np.linalg.eigh(data.gram())
    seen = values > values[-1] * WHITE
    root = vectors[:, seen] * np.sqrt(values[seen])
    return float(np.linalg.eigvalsh(root.T @ kernel @ root)[0])


def targets_of(data: AbstractData) -> AbstractTargets:
    """``data``, which have targets.

    Raises:
        ValueError: when they have labels.
    """
    if isinstance(data, AbstractTargets):
        return data
    raise ValueError(
        f"`data` have {data.kind}; expected targets: gflow.Regression(inputs, targets)."
    )

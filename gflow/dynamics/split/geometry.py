"""A data set seen from its maximum-margin direction."""

import numpy as np

from gflow.problem.data import Dataset

RANK_TOLERANCE = 1e-9
"""Singular values of the data below this, relative to the largest, count as zero."""


class Geometry:
    r"""A separable data set seen from its maximum-margin direction.

    Attributes:
        direction: $\bar u$, shape (d,), polished to round-off.
        margin: $\gamma$.
        gaps: $\delta_i = \langle z_i, \bar u\rangle/\gamma - 1$, exactly 0 on the support.
        support: indices of the points on the margin.
        basis: (d, r) orthonormal: $\bar u$, then the span of the differences of support vectors,
            then the rest of the data's span.
        num_tangent: dimension of the span of the differences of support vectors.
        across: (n, r - 1) coordinates of $z_i$ across $\bar u$, exactly 0 where they vanish.
    """

    def __init__(self, data: Dataset):
        solution = data.max_margin()
        if not solution.separable:
            raise ValueError(
                f"There is no slow manifold without a maximum margin: {solution.verdict}."
            )
        points = np.asarray(data.signed_inputs)
        on = np.zeros(len(points), dtype=bool)
        on[solution.support] = True
        # The least-norm solution of <w, z_i> = 1 on the support polishes the direction.
        scaled = np.linalg.lstsq(points[on], np.ones(on.sum()), rcond=1e-12)[0]
        gaps = np.maximum(points @ scaled - 1, 0.0)
        self.margin = float(1 / np.linalg.norm(scaled))
        self.direction = scaled * self.margin
        self.gaps = np.where(on, 0.0, gaps)
        self.support = np.flatnonzero(on)
        self.num_points, self.dim = points.shape
        size = float(np.linalg.norm(points, 2))
        basis = self.direction[:, None]
        tangent = _complete(basis, points[on] - np.outer(points[on] @ self.direction, basis), size)
        self.num_tangent = tangent.shape[1]
        basis = np.hstack([basis, tangent])
        self.basis = np.hstack([basis, _complete(basis, points, size)])
        self.across = points @ self.basis[:, 1:]
        self.across[np.ix_(on, np.arange(self.num_tangent, self.across.shape[1]))] = 0.0


def _complete(basis: np.ndarray, rows: np.ndarray, size: float) -> np.ndarray:
    """An orthonormal basis of the span of ``rows``, orthogonal to ``basis``."""
    rows = rows - (rows @ basis) @ basis.T
    _, values, vt = np.linalg.svd(rows, full_matrices=False)
    new = vt[values > RANK_TOLERANCE * size].T
    return np.linalg.qr(new - basis @ (basis.T @ new))[0]

r"""The matrix of least nuclear norm among those that meet linear measurements, certified.

$$\min\{\lVert W\rVert_* : \mathcal A W = y\} = \max\{y^\top\lambda :
\lVert\mathcal A^\top\lambda\rVert_2 \le 1\}, \qquad (\mathcal AW)_i = \langle M_i, W\rangle.$$

Any W that meets the measurements bounds the optimum from above, and any $\lambda$, divided by the
spectral norm of $\mathcal A^\top\lambda$, from below, whatever found them. They are found by
Douglas and Rachford's splitting into the two steps that have closed forms: the projection onto the
measurements, and the soft threshold of singular values (Cai, Candès and Shen, SIAM J. Optim. 20,
1956 (2010)). The residual of the latter is a subgradient, from which $\lambda$ is read.

Of regression no search is needed: projecting the rows of W onto the span of the inputs changes no
output and raises no singular value, so that $W^+$ is least in every unitarily invariant norm.
"""

from typing import NamedTuple

import numpy as np

from gflow.problem.abstract_targets import AbstractTargets, without_round_off
from gflow.problem.memo import once_per_object

GAP = 1e-10
"""Relative gap at which the search ends."""

ITERATIONS, LOOK_EVERY = 20_000, 50


class Nuclear(NamedTuple):
    """A matrix of small nuclear norm, and proof of how far from the least it is."""

    matrix: np.ndarray
    """Meets the measurements to round-off, in the least-squares sense."""
    norm: float
    """Its nuclear norm."""
    lower: float
    """No matrix that meets them has a smaller one."""


@once_per_object  # an ensemble asks for every member
def least_nuclear(data: AbstractTargets) -> Nuclear | None:
    """The least nuclear norm of data; None where `least_squares` has it."""
    flat = data.as_measurements()
    return None if flat is None else search(*flat)


def search(matrices: np.ndarray, values: np.ndarray) -> Nuclear:
    """The same of measurements.

    Args:
        matrices: $M_i$, shape (n, K, d).
        values: $y$, shape (n,); where no matrix meets them their projection is met.
    """
    shape = matrices.shape[1:]
    u, s, q = without_round_off(matrices.reshape(len(matrices), -1))
    b = (u.T @ values) / s  # in orthonormal measurements Q the values are b: Q W = b
    scale = float(np.linalg.norm(b))
    if scale == 0.0:
        return Nuclear(np.zeros(shape), 0.0, 0.0)

    def met(w: np.ndarray) -> np.ndarray:
        return w - q.T @ (q @ w - b)

    least = (q.T @ b).reshape(shape)
    step = float(np.mean(np.linalg.svd(least, compute_uv=False)))  # threshold of the typical size
    best = Nuclear(least, _nuclear(least), 0.0)
    z = q.T @ b
    for k in range(1, ITERATIONS + 1):
        left, sizes, right = np.linalg.svd(z.reshape(shape), full_matrices=False)
        low = ((left * np.maximum(sizes - step, 0.0)) @ right).ravel()
        subgradient = (z - low) / step
        z = z + met(2 * low - z) - low
        if k % LOOK_EVERY == 0:
            matrix = met(low).reshape(shape)
            dual = q @ subgradient
            bound = np.linalg.norm((q.T @ dual).reshape(shape), 2)
            lower = float(b @ dual) / max(1.0, float(bound))
            norm = _nuclear(matrix)
            if norm <= best.norm:
                best = best._replace(matrix=matrix, norm=norm)
            best = best._replace(lower=max(best.lower, lower))
            if best.norm - best.lower <= GAP * best.norm:
                break
    return best


def _nuclear(matrix: np.ndarray) -> float:
    return float(np.sum(np.linalg.svd(matrix, compute_uv=False)))

r"""Margins of several classes, as those of vectors.

The matrices $z_{ik} = (e_{y_i} - e_k)\,x_i^\top$ do not see a multiple of $(1, \dots, 1)^\top$ in
the outputs. In the contrasts $C = P W$, with $W = P^\top C$ and the same Frobenius norm, there are
K - 1 rows instead of K, and columns that vanish for every point are left out.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from gflow.problem.compensated import Pair
from gflow.problem.design import contrasts


def across_outputs(
    solve: Callable[[np.ndarray], tuple[Pair | None, Pair]],
    z: Float[np.ndarray, "margins entries"],
    num_classes: int,
) -> tuple[Pair | None, Pair]:
    """What ``solve`` finds in contrasts, in terms of the outputs.

    Args:
        solve: from vectors to a predictor, or None, and weights.
        z: the matrices $z_{ik}$, flattened, one a row.
        num_classes: K.
    """
    p = contrasts(num_classes)
    shaped = z.reshape(len(z), num_classes, -1)
    seen = np.flatnonzero(shaped.any(axis=(0, 1)))
    if not seen.size:
        return None, Pair.scattered(len(z), np.zeros(1, int), Pair.of(np.ones(1)))
    across = np.einsum("qk,nkd->nqd", p, shaped[:, :, seen], optimize=True)
    w, weights = solve(across.reshape(len(z), -1))
    if w is None:
        return None, weights
    full = np.zeros((2, num_classes, shaped.shape[2]))
    for part, found in zip(full, w, strict=True):
        part[:, seen] = p.T @ found.reshape(num_classes - 1, -1)
    return Pair(full[0].ravel(), full[1].ravel()), weights

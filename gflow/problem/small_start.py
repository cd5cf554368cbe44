r"""The margin that a network of two layers and a kink tends to from a small start, where known.

Two theorems, for $f(x) = \sum_j a_j\phi(\langle w_j, x\rangle)$, $\phi(z) = \max(z, \kappa z)$,
and losses with an exponential tail, as $\min_i y_if(x_i)/\lVert\theta\rVert^2$:

1. **ReLU, orthogonally separable data** (Phuong and Lampert, "The inductive bias of ReLU networks
   on orthogonally separable data", ICLR 2021): inner products within a class are positive, between
   the classes at most zero. The neurons of each sign go to the max-margin direction of their class
   $\hat w_\pm$ alone. With $\gamma_\pm$ the margins of the classes and $c_\pm$ the strengths of
   both groups, all margins equal where $c_\pm\gamma_\pm$ does, and
   $\lVert\theta\rVert^2 = 2(c_+ + c_-)$ for balanced neurons:
   $$\frac{1}{2(1/\gamma_+ + 1/\gamma_-)}.$$
2. **Leaky ReLU, symmetric data** (Lyu, Li, Wang and Arora, "Gradient descent on two-layer nets:
   margin maximization and simplicity bias", NeurIPS 2021, arXiv 2110.13905): with each point x of
   label y there is -x of label -y. Both groups go to the max-margin direction of all data,
   $\pm\bar u$ with equal strengths c, so that
   $f(x) = c(1 + \kappa)\langle\bar u, x\rangle$, $\lVert\theta\rVert^2 = 4c$:
   $$(1 + \kappa)\gamma/4.$$
"""

from typing import NamedTuple

import numpy as np

from gflow.problem.data import Dataset, max_margin
from gflow.problem.kinks import checked_slope
from gflow.problem.memo import once_per_object

SMALL = 0.01
r"""A start is small where $\lVert\theta\rVert^2\max_i\lVert x_i\rVert/2$, a bound of all outputs,
is at most this. How small it has to be depends on the data, and the theorems do not say it."""

SQUARE = 1e-12
"""Cosines up to this are those of right angles."""

BLOCK = 256
"""Points whose cosines with all others are looked at together."""

BALANCED = 1e-6
r"""How much smaller than $\lVert w_j\rVert$ the output weight of a balanced neuron may be."""


class SmallStart(NamedTuple):
    """What is known of the margin in the limit."""

    slope: float
    margin: float | None
    """None where an assumption about the data fails."""
    obstacles: tuple[str, ...]
    """The assumptions that fail."""


def small_start_margin(data: Dataset, slope: float = 0.0) -> float:
    r"""The limit of $\min_i y_if(x_i)/\lVert\theta\rVert^2$ of two layers from a small start.

    For ReLU (``slope=0``) on orthogonally separable data $1/(2(1/\gamma_+ + 1/\gamma_-))$, with the
    margins of each class alone; for leaky ReLU, $0 < \kappa < 1$, on separable data symmetric
    under $(x, y) \to (-x, -y)$ it is $(1 + \kappa)\gamma/4$.

    Args:
        data: with labels -1 and +1.
        slope: $\kappa$, that of the activation where z < 0.

    Raises:
        ValueError: when the data are not what the theorem for this slope assumes.

    >>> import gflow
    >>> data = gflow.Dataset([[1.0, 0.0], [-2.0, 0.0]], [1, -1])
    >>> round(small_start_margin(data), 12)
    0.333333333333

    References:
        Phuong and Lampert, ICLR 2021; Lyu, Li, Wang and Arora, arXiv 2110.13905.
    """
    if not isinstance(data, Dataset) or data.num_classes is not None:
        raise ValueError(
            "`data` is not a Dataset with labels -1 and +1; expected one, of which alone the "
            "theorems speak."
        )
    slope = checked_slope(slope)
    obstacle = _obstacle(data, slope)
    if obstacle is not None:
        raise ValueError(
            f"`data` and `slope` = {slope:g} are of no theorem: {obstacle}. Expected ReLU on "
            "orthogonally separable data, or a slope in (0, 1) on separable symmetric data."
        )
    return _margin(data, slope)


def of_two_layers(data: Dataset, slope: float, inner: np.ndarray, outer: np.ndarray) -> SmallStart:
    """The limit for a network of one output without biases that starts at these weights.

    Args:
        data: with labels -1 and +1.
        slope: of the activation where z < 0.
        inner: the neurons' weights, shape (m, d).
        outer: their output weights, shape (m,).
    """
    of_data = _obstacle(data, slope)
    found = [] if of_data is None else [of_data]
    size = float(np.sum(inner**2) + np.sum(outer**2)) / 2
    reach = size * float(np.max(np.linalg.norm(data.inputs, axis=1)))
    if reach > SMALL:
        found.append(f"the start is not small: outputs may be {reach:.2g} there, above {SMALL:g}")
    labels = [label for label in (-1, 1) if np.any(np.asarray(data.labels) == label)]
    if slope == 0.0:
        if np.any(np.abs(outer) < (1 - BALANCED) * np.linalg.norm(inner, axis=1)):
            found.append("the start is not balanced: output weights are smaller than their neurons")
        on = inner @ np.asarray(data.inputs).T > 0
        alive = [np.any(on[outer * y > 0][:, np.asarray(data.labels) == y]) for y in labels]
    else:
        alive = [bool(np.any(outer * y > 0)) for y in labels]
    if not all(alive):
        found.append("a class has no neuron of its sign that is on at one of its points")
    return SmallStart(slope, None if of_data else _margin(data, slope), tuple(found))


def _obstacle(data: Dataset, slope: float) -> str | None:
    """The assumption about the data that fails."""
    if slope == 0.0:
        return _not_orthogonally_separable(data)
    if slope < 0.0:
        return f"the slope {slope:g} is negative, of which no theorem speaks"
    return _not_symmetric(data)


@once_per_object
def _not_orthogonally_separable(data: Dataset) -> str | None:
    x, y = np.asarray(data.inputs), np.asarray(data.labels)
    size = np.linalg.norm(x, axis=1)
    if np.any(size == 0.0):
        return f"point {int(np.argmin(size))} is zero"
    units = x / size[:, None]
    for first in range(0, len(x), BLOCK):  # most data fail at once, and the table may be large
        cosines = units[first : first + BLOCK] @ units.T
        same = y[first : first + BLOCK, None] == y
        wrong = np.argwhere(np.where(same, cosines <= SQUARE, cosines > SQUARE))
        if len(wrong):
            i, k = map(int, wrong[0])
            where = "of one class" if same[i, k] else "of both classes"
            return (
                f"the data are not orthogonally separable: points {first + i} and {k} {where} have "
                f"the cosine {cosines[i, k]:.3g}"
            )
    return None


@once_per_object
def _not_symmetric(data: Dataset) -> str | None:
    rows = np.concatenate([data.inputs, np.asarray(data.labels)[:, None]], axis=1) + 0.0
    mirrored = -rows + 0.0  # no zero of either has a sign
    if np.any(rows[np.lexsort(rows.T)] != mirrored[np.lexsort(mirrored.T)]):
        return "the data are not symmetric under (x, y) -> (-x, -y)"
    return None if data.max_margin().separable else "the data are not separable"


def _margin(data: Dataset, slope: float) -> float:
    if slope != 0.0:
        return (1 + slope) * data.max_margin().margin / 4
    return _of_orthogonally_separable(data)


@once_per_object
def _of_orthogonally_separable(data: Dataset) -> float:
    x, y = np.asarray(data.inputs), np.asarray(data.labels)
    margins = [max_margin(y[y == label, None] * x[y == label]).margin for label in np.unique(y)]
    return 1 / (2 * sum(1 / margin for margin in margins))

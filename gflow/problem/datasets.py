r"""Data sets to study: generated ones of known margin, and the real ones in scikit-learn.

Public as `gflow.datasets`. Every function returns a `Dataset`, but `completion` a `Sensing`; the
generated ones and the real ones are scaled so that $\lVert x_i\rVert \le 1$, except `one_datum` and
`completion`, which are as given. Pictures are in ``images.py``.
"""

import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from gflow.problem import settings
from gflow.problem.arguments import between, numbers_of, seed_of, shown, whole
from gflow.problem.data import Dataset
from gflow.problem.images import (
    cifar10 as cifar10,
    digit_images as digit_images,
    images as images,
    images_from_npz as images_from_npz,
    mnist_5k as mnist_5k,
    photographs as photographs,
)
from gflow.problem.sensing import Sensing

# -------------------------------------------------------------------------------------------------
# Generated
# -------------------------------------------------------------------------------------------------


@settings.own()
def separable(n: int = 100, d: int = 2, margin: float = 0.1, seed: int = 0) -> Dataset:
    r"""Random data in the unit ball whose max margin is `margin` by construction, up to rounding.

    With a random unit vector $\bar u$, every $z_i = \langle z_i,\bar u\rangle\bar u + t_i$ with
    $t_i \perp \bar u$. The first $\min(n, d)$ points have $\langle z_i,\bar u\rangle = \gamma$ and
    $\sum_i p_i t_i = 0$ for unequal weights $p_i > 0$, so that $\sum_i p_i z_i = \gamma\bar u$
    certifies that no direction has a larger margin; all others lie beyond. Labels are random. The
    points on the margin span $\mathbb{R}^d$ if $n \ge d$, and their weights differ, so directions
    converge at the rate of generic data rather than that of symmetric data.

    Args:
        n: the number of points.
        d: the dimension.
        margin: $\gamma$, between 0 and 1.
        seed: of the generator.

    >>> data = separable(n=50, d=3, margin=0.25, seed=1)
    >>> round(data.max_margin().margin, 12)
    0.25
    """
    for name, value in (("n", n), ("d", d)):
        if not whole(value) or value < 1:
            raise ValueError(f"`{name}` is {shown(value)}; expected at least 1, a whole number.")
    n, d = int(n), int(d)
    inside = "a number between 0 and 1: the points are in the unit ball"
    margin = between("margin", margin, 0.0, 1.0, inside)
    generator = np.random.default_rng(seed_of("seed", seed))
    direction = _unit(generator.normal(size=d))
    carriers = min(n, d)
    weights = np.linspace(1.0, 2.5, carriers) * generator.uniform(0.9, 1.1, size=carriers)
    # The carriers across the direction: any, and a last one that balances them; with one point,
    # none.
    across = _in_ball(generator, carriers, direction)
    across[-1] = -(weights[:-1] @ across[:-1]) / weights[-1]
    room = 0.999 * np.sqrt((1.0 - margin) * (1.0 + margin))
    if carriers > 1:  # none so close to the direction that its slack across it is tiny
        across *= room * generator.uniform(0.6, 1.0) / np.linalg.norm(across, axis=1).max()
    # The others: beyond the margin, uniform in the slice of the ball at that height.
    heights = margin + (1.0 - margin) * generator.beta(1.2, 2.5, size=n - carriers)
    beyond = _in_ball(generator, n - carriers, direction)
    beyond *= 0.999 * np.sqrt((1.0 - heights) * (1.0 + heights))[:, None]
    z = np.concatenate([across, beyond])
    z += np.outer(np.concatenate([np.full(carriers, margin), heights]), direction)
    labels = generator.choice([-1.0, 1.0], size=n)
    order = generator.permutation(n)
    name = f"separable (n={n}, d={d}, margin={margin:g}, seed={seed})"
    return Dataset((labels[:, None] * z)[order], labels[order], name=name)


@settings.own()
def two_point(a: float = 0.8, b: float = 0.5, multiplicities: tuple[int, int] = (3, 1)) -> Dataset:
    r"""Copies of $z = (a, b)$ and $z = (a, -b)$: the smallest data with the generic rate.

    The max-margin direction is $(1, 0)$ and the margin $a$. Unequal multiplicities $m_1 \ne m_2$
    keep the flow from $w$ at a bounded distance from the max-margin line, $\ln(m_1/m_2)/(2b)$, so
    the direction error falls like $1/\log t$; with equal ones it falls like a power of $t$.

    Args:
        a: the margin, positive.
        b: the coordinate across, positive.
        multiplicities: the numbers of copies; the second point is labelled -1.
    """
    a, b = (
        between(name, value, 0.0, np.inf, "a positive number")
        for name, value in (("a", a), ("b", b))
    )
    counts = multiplicities if isinstance(multiplicities, tuple | list) else ()
    if len(counts) != 2 or not all(whole(count) and count >= 1 for count in counts):
        raise ValueError(
            f"`multiplicities` is {shown(multiplicities)}; expected two numbers from 1 on."
        )
    first, second = map(int, counts)
    inputs = [[a, b]] * first + [[-a, b]] * second
    return Dataset(inputs, [1.0] * first + [-1.0] * second, name=f"two-point ({first}:{second})")


@settings.own()
def one_datum(z: Sequence[float] = (1.0, 0.9, 0.3)) -> Dataset:
    r"""A single point with the label +1.

    The default tells norms apart: the direction of the largest margin is $z/\lVert z\rVert$ for
    norm 2, $(1, 1, 1)$ for norm infinity and $(1, 0, 0)$ for norm 1.
    """
    return Dataset(numbers_of("z", z)[None, :], [1.0], name="one datum")


@settings.own()
def completion(
    matrix: Sequence | np.ndarray, observed: Sequence | np.ndarray | None = None
) -> Sensing:
    r"""Some entries of a matrix, of which the others are to be found.

    The measurements are $\langle e_ie_j^\top, W\rangle = W_{ij}$ for the entries that are observed,
    row by row. What is not observed leaves no trace in the data; a flow from a small start chooses
    it by itself.

    Args:
        matrix: shape (K, d); entries that are not observed may be anything, NaN included.
        observed: true where an entry is, shape (K, d). By default wherever ``matrix`` is not NaN.

    Raises:
        ValueError: when nothing is observed, or an observed entry is no finite number.

    Warns:
        UserWarning: for rows and columns of which nothing is observed: nothing is known of them,
            and a flow from a small start leaves them small.

    >>> completion([[1.0, np.nan], [np.nan, 2.0]])
    Sensing('completion (2 of 2 x 2)': 2 measurements of a matrix of shape (2, 2))
    """
    matrix = numbers_of("matrix", matrix)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"`matrix` has shape {matrix.shape}; expected two dimensions, (outputs, inputs)."
        )
    mask = ~np.isnan(matrix) if observed is None else np.asarray(observed)
    if mask.shape != matrix.shape or mask.dtype != np.bool_:
        got = f"has shape {mask.shape} and the type {mask.dtype}"
        raise ValueError(
            f"`observed` {got}; expected true or false for every entry, shape {matrix.shape}."
        )
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("`observed` has no entry that is true; expected one at least.")
    bad = ~np.isfinite(matrix[mask])
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"`matrix[{rows[first]}, {columns[first]}]` is {matrix[mask][first]}, and it is "
            "observed; expected a finite number."
        )
    for what, seen in (("row", mask.any(axis=1)), ("column", mask.any(axis=0))):
        unseen = np.flatnonzero(~seen).tolist()
        if unseen:
            many = len(unseen) > 1
            warnings.warn(
                f"nothing is observed in {what}{'s' * many} {', '.join(map(str, unseen))} of "
                f"`matrix`: the data say nothing of {'them' if many else 'it'}, and a flow from "
                f"a small start leaves {'them' if many else 'it'} small.",
                UserWarning,
                stacklevel=3,
            )
    matrices = np.zeros((len(rows), *matrix.shape))
    matrices[np.arange(len(rows)), rows, columns] = 1.0
    name = f"completion ({len(rows)} of {matrix.shape[0]} x {matrix.shape[1]})"
    return Sensing(matrices, matrix[mask], name=name)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _in_ball(generator: np.random.Generator, n: int, normal: np.ndarray) -> np.ndarray:
    """Uniform in the unit ball of the hyperplane through zero across `normal`."""
    d = len(normal)
    if d == 1:
        return np.zeros((n, 1))
    points = generator.normal(size=(n, d))
    for _ in range(2):  # twice: the second time removes the rounding of the first
        points -= np.outer(points @ normal, normal)
    radii = generator.uniform(size=n) ** (1.0 / (d - 1))
    return points * (radii / np.linalg.norm(points, axis=1))[:, None]


# -------------------------------------------------------------------------------------------------
# Real
# -------------------------------------------------------------------------------------------------


@settings.own()
def digits(first: int = 3, second: int = 5, *, bias: float | None = None) -> Dataset:
    """Handwritten digits, 8 by 8 pixels in [0, 1]; every pair is separable through the origin.

    Args:
        first: the digit labelled +1.
        second: the digit labelled -1.
        bias: the value of a constant feature, in units of a pixel; none unless given.
    """
    inputs, classes = _read("load_digits")
    return _pair("digits", inputs / 16.0, classes, first, second, False, bias)


@settings.own()
def iris(
    first: int = 0, second: int = 1, *, standardise: bool = False, bias: float | None = None
) -> Dataset:
    """Iris flowers, 4 lengths in cm; class 0 is separable from 1 and from 2, 1 and 2 are not.

    Args:
        first: the class labelled +1: 0 setosa, 1 versicolor, 2 virginica.
        second: the class labelled -1.
        standardise: whether each feature is shifted and divided to mean 0 and variance 1.
        bias: the value of a constant feature, in the units of the others; none unless given.
    """
    inputs, classes = _read("load_iris")
    return _pair("iris", inputs, classes, first, second, standardise, bias)


@settings.own()
def wine(
    first: int = 0, second: int = 1, *, standardise: bool = True, bias: float | None = None
) -> Dataset:
    """Chemical analyses of wine from three cultivars, 13 features; every pair is separable.

    Args:
        first: the cultivar labelled +1: 0, 1 or 2.
        second: the cultivar labelled -1.
        standardise: whether each feature is shifted and divided to mean 0 and variance 1.
        bias: the value of a constant feature, in the units of the others; none unless given.
    """
    inputs, classes = _read("load_wine")
    return _pair("wine", inputs, classes, first, second, standardise, bias)


@settings.own()
def breast_cancer(*, standardise: bool = True, bias: float | None = 1.0) -> Dataset:
    r"""Breast tumours, 30 features, benign +1 and malignant -1: the hard case.

    Separable with a bias, by a margin of $6.8\cdot10^{-5}$ at $\lVert x\rVert\le1$. Standardised
    and without a bias it is not separable through the origin.

    Args:
        standardise: whether each feature is shifted and divided to mean 0 and variance 1.
        bias: the value of a constant feature, in the units of the others; None for none.
    """
    inputs, classes = _read("load_breast_cancer")
    return _pair("breast cancer", inputs, classes, 1, 0, standardise, bias)


@settings.own()
def digits_all(*, bias: float | None = None) -> Dataset:
    """All ten handwritten digits as classes, 1,797 points; separable through the origin.

    Args:
        bias: the value of a constant feature, in units of a pixel; none unless given.
    """
    inputs, classes = _read("load_digits")
    return _all("digits", inputs / 16.0, classes, False, bias)


@settings.own()
def iris_all(*, standardise: bool = False, bias: float | None = None) -> Dataset:
    """All three iris species as classes, 150 points; not separable.

    Args:
        standardise: whether each feature is shifted and divided to mean 0 and variance 1.
        bias: the value of a constant feature, in the units of the others; none unless given.
    """
    inputs, classes = _read("load_iris")
    return _all("iris", inputs, classes, standardise, bias)


@settings.own()
def wine_all(*, standardise: bool = True, bias: float | None = None) -> Dataset:
    """All three wine cultivars as classes, 178 points.

    Args:
        standardise: whether each feature is shifted and divided to mean 0 and variance 1.
        bias: the value of a constant feature, in the units of the others; none unless given.
    """
    inputs, classes = _read("load_wine")
    return _all("wine", inputs, classes, standardise, bias)


def _all(
    name: str, inputs: np.ndarray, classes: np.ndarray, standardise: bool, bias: float | None
) -> Dataset:
    """All classes, in the unit ball."""
    inputs = _standardised(inputs) if standardise else inputs
    label = name if bias is None else f"{name}, with bias"
    data = Dataset(inputs, classes, num_classes=int(classes.max()) + 1, name=label)
    return (data if bias is None else data.with_bias(bias)).scaled()


def _standardised(inputs: np.ndarray) -> np.ndarray:
    spread = inputs.std(axis=0)
    return (inputs - inputs.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)


def _read(loader: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes as scikit-learn carries them; imported here because it takes seconds."""
    import sklearn.datasets

    inputs, classes = getattr(sklearn.datasets, loader)(return_X_y=True)
    return np.asarray(inputs, dtype=np.float64), np.asarray(classes)


def _pair(
    name: str,
    inputs: np.ndarray,
    classes: np.ndarray,
    first: int,
    second: int,
    standardise: bool,
    bias: float | None,
) -> Dataset:
    """Two classes as a binary problem, in the unit ball."""
    for argument, value in (("first", first), ("second", second)):
        if not whole(value) or value not in classes:
            raise ValueError(
                f"`{argument}` is {shown(value)}; expected a class of {name}, 0 to {classes.max()}."
            )
    if first == second:
        raise ValueError(f"`first` and `second` are both {first}; expected two classes.")
    chosen = (classes == first) | (classes == second)
    inputs, labels = inputs[chosen], np.where(classes[chosen] == first, 1.0, -1.0)
    inputs = _standardised(inputs) if standardise else inputs
    label = name if classes.max() == 1 else f"{name} {first} against {second}"
    data = Dataset(inputs, labels, name=label if bias is None else f"{label}, with bias")
    return (data if bias is None else data.with_bias(bias)).scaled()


# -------------------------------------------------------------------------------------------------
# By name
# -------------------------------------------------------------------------------------------------

_NAMED: dict[str, Callable[[], Dataset]] = {
    "separable": separable,
    "two-point": two_point,
    "one-datum": one_datum,
    "breast-cancer": breast_cancer,
    "breast-cancer-without-bias": lambda: breast_cancer(bias=None),
    "digits": digits_all,
    "iris": iris_all,
    "wine": wine_all,
}
_PAIRS: dict[str, Callable[[int, int], Dataset]] = {"digits": digits, "iris": iris, "wine": wine}


@settings.own()
def load(name: str) -> Dataset:
    """A data set by its name, with the defaults of its function.

    Args:
        name: `separable`, `two-point`, `one-datum`, `breast-cancer`, `breast-cancer-without-bias`,
            `digits`, `iris` or `wine` with all their classes, or two of them, as in `digits-3-5`.

    Raises:
        ValueError: for any other name; the message lists the known ones.

    >>> load("digits-3-5").num_points
    365
    """
    if name in _NAMED:
        return _NAMED[name]()
    match = re.fullmatch(r"([a-z]+)-(\d)-(\d)", str(name))
    if match and match[1] in _PAIRS:
        return _PAIRS[match[1]](int(match[2]), int(match[3]))
    known = [*_NAMED, *(f"{family}-A-B" for family in _PAIRS)]
    raise ValueError(
        f"`name` is {name!r}; expected one of {', '.join(known)}, where A and B are two different "
        "classes: 0 to 9 for digits, 0 to 2 for iris and wine."
    )

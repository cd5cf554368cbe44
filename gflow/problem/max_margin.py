r"""The hard-margin direction through the origin, with bounds that prove it.

For signed inputs $z_i$ and a norm with dual norm $\lVert\cdot\rVert_*$ the two problems

$$\gamma = \max_{\lVert w\rVert \le 1}\, \min_i \langle w, z_i\rangle
       = \min_{p \ge 0,\ \sum p_i = 1}\, \Big\lVert \sum_i p_i z_i \Big\rVert_*$$

have the same value. So any $w$ bounds $\gamma$ from below and any $p$ from above, whatever found
them, and the bounds reported here are evaluated from $w$ and $p$ alone, in twice the working
precision, with the remaining rounding error on the safe side.

Data are separable through the origin exactly when $\gamma > 0$. If they are not, some convex
combination of the $z_i$ is zero, and its weights $p$ are the certificate (Farkas).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from gflow.problem import settings
from gflow.problem.arguments import expect_unmasked, numbers_of
from gflow.problem.compensated import Pair
from gflow.problem.margin_bounds import lower_bound, norm_of, upper_bound
from gflow.problem.module import Module
from gflow.problem.one_thread import one_thread

if TYPE_CHECKING:
    from gflow.problem.margin_classes import Contrasted


@runtime_checkable
class HasSignedInputs(Protocol):
    """A data set, as far as its margin is concerned."""

    @property
    def signed_inputs(self) -> Float[np.ndarray | Array, "points dim"]:
        """The products $y_i x_i$."""
        ...


class MaxMargin(Module):
    r"""The solution of a max-margin problem, or the proof that there is none.

    The bounds hold for the data as given. They refer to $w$ and $p$ with 32 digits; rounding them
    to float64, as `direction` and `dual` are, changes the margin by about $10^{-16}\max\lVert
    z_i\rVert$, which matters where the margin is below 1e-4 of that.
    """

    direction: Float[np.ndarray, "..."]
    r"""The maximiser $\bar u$, of unit norm, shape (d,), of K classes (K, d); NaN where no
    separating direction was found."""
    margin: float
    r"""$\min_i \langle\bar u, z_i\rangle$, or zero where no separating direction was found."""
    margin_lower: float
    r"""A proven lower bound of $\gamma$; zero if no separating direction was found."""
    margin_upper: float
    r"""A proven upper bound of $\gamma$."""
    dual: Float[np.ndarray, " points"]
    r"""The weights $p$: non-negative, sum one. For norm 2, $\sum_i p_i z_i = \gamma\bar u$; for
    data that are not separable, $\sum_i p_i z_i = 0$. Of K classes one for each margin $m_{ik}$."""
    support: Int[np.ndarray, " support"]
    r"""Indices of all points on the margin, of K classes of all margins that are smallest, also
    those with $p_i = 0$; for data that are not separable, those with $p_i > 0$."""
    norm: float | str = eqx.field(static=True)
    """The norm of the direction: 1, 2, infinity or "nuclear"."""
    inseparable: bool = eqx.field(static=True, default=False)
    r"""Whether no direction separates the data beyond their round-off, whatever units their columns
    and rows are in. If neither this nor `separable` holds it is not known."""

    @property
    def separable(self) -> bool:
        r"""Whether $\gamma > 0$ is proven. If not, $\gamma$ is at most `margin_upper`."""
        return self.margin_lower > 0.0

    @property
    def certificate(self) -> Float[np.ndarray, " entries"]:
        """What proves the verdict: `direction` if separable, else `dual`."""
        return self.direction if self.separable else self.dual

    @property
    def duality_gap(self) -> float:
        """`margin_upper - margin_lower`, certified."""
        return self.margin_upper - self.margin_lower

    @property
    def relative_gap(self) -> float:
        """The duality gap relative to `margin_upper`: one if nothing is known, zero if all is."""
        return self.duality_gap / self.margin_upper if self.margin_upper > 0.0 else 0.0

    @property
    def verdict(self) -> str:
        """Whether the data are separable through the origin, in a sentence."""
        if self.separable:
            return "the data are separable"
        if self.inseparable:
            return "the data are not separable, so that the risk has a positive infimum"
        return (
            "it is not known whether the data are separable: none was proven of directions, and "
            f"the margin is at most {self.margin_upper:.2g}"
        )

    @property
    def summary(self) -> str:
        """The verdict in a few words."""
        if self.separable:
            return f"max margin {self.margin:.6g} (certified to {self.relative_gap:.0e})"
        known = "" if self.inseparable else "not known whether separable: "
        return f"{known}no direction separates by more than {self.margin_upper:.2g}"

    def __repr__(self) -> str:
        if not isinstance(self.dual, np.ndarray):  # inside a transformation
            return f"MaxMargin(norm={self.norm}, traced)"
        named = self.norm if isinstance(self.norm, str) else f"{self.norm:g}"
        of = "points" if self.direction.ndim == 1 else "margins"
        points = f"{len(self.support)} of {len(self.dual)} {of}"
        if self.separable:
            return (
                f"MaxMargin(norm {named}: margin {self.margin:.15g}, proven within "
                f"[{self.margin_lower:.17g}, {self.margin_upper:.17g}], relative gap "
                f"{self.relative_gap:.1e}; support: {points})"
            )
        known = "not separable" if self.inseparable else "not known whether separable"
        return (
            f"MaxMargin(norm {named}: {known}; no direction through the origin separates the "
            f"data by more than {self.margin_upper:.3g}, proven by {points} whose weighted mean "
            "has that norm)"
        )


@settings.own()
@one_thread()
def max_margin(
    data: HasSignedInputs | Float[np.ndarray, "points dim"], *, norm: float | str = 2
) -> MaxMargin:
    r"""Find the direction of the largest margin through the origin.

    $$\max_{\lVert w\rVert\le1}\min_i\langle w, z_i\rangle$$

    For norm 2 this is the hard-margin support vector machine without bias. Of K classes $w$ is the
    matrix $W$, flattened, and $z_{ik} = (e_{y_i} - e_k)\,x_i^\top$: for norm 2, the Frobenius norm,
    Crammer and Singer's machine without bias.

    Args:
        data: a data set, a problem, or its signed inputs $z_i = y_i x_i$, one row a point.
        norm: of the direction $w$, not of the data: 2, 1 or `inf`; or "nuclear", the sum of the
            singular values of $W$, which is norm 2 where there is one output.

    Returns:
        The direction, the dual weights and proven bounds of the margin.

    Raises:
        ValueError: if `norm` is another number, or `data` is not a table of finite numbers.

    >>> solution = max_margin(np.array([[3.0, 4.0]]))
    >>> solution.direction.round(12).tolist(), round(solution.margin, 12)
    ([0.6, 0.8], 5.0)
    >>> max_margin(np.array([[1.0, 0.0], [-1.0, 0.0]])).separable
    False
    """
    # Imported here because SciPy's solvers are slow to import.
    from gflow.problem.margin_euclidean import euclidean
    from gflow.problem.margin_polyhedral import polyhedral
    from gflow.problem.margin_units import in_equal_units

    z = _signed_inputs(data)
    if isinstance(norm, bool) or norm not in (1, 2, math.inf, "nuclear"):
        raise ValueError(f'`norm` is {norm!r}; expected 2, 1, math.inf or "nuclear".')
    # Entries of order one; by a power of two, so that scaling is exact.
    given, exponent = z, math.frexp(float(np.abs(z).max()))[1]
    scale = math.ldexp(1.0, exponent)
    z = np.ldexp(z, -exponent)
    several = _with_classes(data)
    if several is None:
        w, p = euclidean(z)
    else:
        w, p = _across_outputs(euclidean, several)
    solution = _certified(z, w, p, 2.0, scale)
    hopeless = False
    if not solution.separable:
        told = in_equal_units(given)
        hopeless = told.hopeless
        if told.w is not None or upper_bound(z, told.p, 2.0) < upper_bound(z, p, 2.0):
            w, p = told.w, told.p
        solution = _certified(z, w, p, 2.0, scale, hopeless)
    num_classes = None if several is None else several.contrasts.shape[1]
    if norm == 2 or (norm == "nuclear" and several is None):
        return _shaped(solution, num_classes)
    if norm == "nuclear":
        assert several is not None
        return _nuclear(several, _shaped(solution, num_classes))
    # Separability does not depend on the norm.
    if w is not None and solution.separable:
        w, p = polyhedral(z, float(norm), w)
    return _shaped(_certified(z, w, p, float(norm), scale, hopeless), num_classes)


def _with_classes(data: Any) -> "Contrasted | None":
    """The data in contrasts, if they have classes."""
    from gflow.problem.margin_classes import Contrasted

    data = getattr(data, "data", data)  # of a problem
    return None if getattr(data, "num_classes", None) is None else Contrasted.of(data)


def _across_outputs(
    solve: Callable[[np.ndarray], tuple[Pair | None, Pair]], data: "Contrasted"
) -> tuple[Pair | None, Pair]:
    """What ``solve`` finds in contrasts, in terms of the outputs."""
    w, weights = solve(data.rows)
    if w is None:
        return None, weights
    high, low = (data.of_outputs(part.reshape(data.shape)).ravel() for part in w)
    return Pair(high, low), weights


def _nuclear(data: "Contrasted", euclidean: MaxMargin) -> MaxMargin:
    """The solution in the nuclear norm, from that in the Frobenius norm."""
    from gflow.problem.margin_nuclear import nuclear

    if not euclidean.separable:
        return dataclasses.replace(euclidean, norm="nuclear")
    start = data.of_contrasts(np.asarray(euclidean.direction))
    found = nuclear(data, start, np.asarray(euclidean.dual))
    scale, margins = math.ldexp(1.0, data.exponent), data.margins(found.matrix)
    return MaxMargin(
        direction=data.of_outputs(found.matrix),
        margin=float(margins.min()) * scale,
        margin_lower=found.lower * scale,
        margin_upper=found.upper * scale,
        dual=found.weights,
        support=np.flatnonzero(margins - margins.min() <= max(found.upper - found.lower, 1e-9)),
        norm="nuclear",
    )


def _shaped(solution: MaxMargin, num_classes: int | None) -> MaxMargin:
    """With the direction as a matrix, if there are classes."""
    if num_classes is None:
        return solution
    direction = np.reshape(solution.direction, (num_classes, -1))
    return dataclasses.replace(solution, direction=direction)


def _certified(
    z: np.ndarray, w: Pair | None, p: Pair, norm: float, scale: float, hopeless: bool = False
) -> MaxMargin:
    """Everything there is to say about the problem that is `scale` times `z`, from `w` and `p`."""
    upper = upper_bound(z, p, norm)
    dual = p.high / p.high.sum()
    if w is not None:
        achieved, lower, support = lower_bound(z, w, norm)
        if lower > 0.0:
            direction = w.high / norm_of(w.high, norm)
            return MaxMargin(
                direction=direction / norm_of(direction, norm),
                margin=achieved * scale,
                margin_lower=lower * scale,
                margin_upper=max(upper, achieved) * scale,
                dual=dual,
                support=support,
                norm=norm,
            )
    return MaxMargin(
        direction=np.full(z.shape[1], np.nan),
        margin=0.0,
        margin_lower=0.0,
        margin_upper=upper * scale,
        dual=dual,
        support=np.flatnonzero(dual > 0.0),
        norm=norm,
        inseparable=hopeless,
    )


def _signed_inputs(data: Any) -> np.ndarray:
    of = getattr(data, "data", data)  # of a problem, and of an array its memory
    held = next((each for each in (data, of) if hasattr(each, "signed_inputs")), None)
    if held is None and hasattr(of, "max_margin"):
        of.max_margin()  # says why there is none
    given = data if held is None else held.signed_inputs
    expect_unmasked("data", given)
    z = np.asarray(given)
    if z.dtype.kind in "O":
        z = numbers_of("data", given)
    if z.dtype.kind not in "fiu" or z.ndim != 2 or 0 in z.shape:
        raise ValueError(
            f"`data` has shape {z.shape} and type {z.dtype}; expected a `Dataset`, or its signed "
            "inputs y_i x_i as a table of numbers with one row a point."
        )
    bad = np.argwhere(~np.isfinite(z))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(f"`data[{row}, {column}]` is {z[row, column]}; expected finite numbers.")
    return z.astype(np.float64)

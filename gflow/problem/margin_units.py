r"""Data in equal units: whether they are separable does not depend on the scale of their columns.

Nor does it on that of their rows: for positive diagonal $D_r$, $D_c$ some $w$ has $Zw > 0$ exactly
when some $v = D_c^{-1}w$ has $D_rZD_cv > 0$. Powers of two that bring the largest entry of every
row and column near one change no digit, and what is hidden by units then is not hidden any more.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gflow.problem.compensated import EPSILON, Pair
from gflow.problem.margin_bounds import lower_bound, upper_bound
from gflow.problem.margin_euclidean import active_set, euclidean

ROUND_OFF = 8 * EPSILON
"""A margin below this, of rows and columns of size one, is within what rounding does to them."""

STEPS = 16
"""Steps from equal units back to those of the data."""


class Verdict(NamedTuple):
    """What equal units tell of the data."""

    w: Pair | None
    """A direction that separates them, in their own units; None if none was found."""
    p: Pair
    """Weights of the points, in the points' own units."""
    hopeless: bool
    """Whether no direction separates data in equal units beyond round-off."""


def in_equal_units(z: Float[np.ndarray, "points dim"]) -> Verdict:
    """Judge data in equal units.

    Args:
        z: signed inputs, of which no solver found that they are separable.
    """
    rows, columns = _exponents(z)
    equal = _scaled(z, rows, columns, 1.0)
    if not np.array_equal(np.ldexp(equal, -(rows[:, None] + columns)), z):
        equal = z  # entries so far apart that some would underflow
        rows, columns = np.zeros_like(rows), np.zeros_like(columns)
    w, p = euclidean(equal)
    separates = w is not None and lower_bound(equal, w, 2.0)[1] > 0.0
    if not separates or w is None:
        largest = float(np.linalg.norm(equal, axis=1).max())
        hopeless = upper_bound(equal, p, 2.0) <= ROUND_OFF * largest
        return Verdict(None, _times(p, rows), hopeless)
    return Verdict(*_back(z, rows, columns, _times(w, columns), _times(p, rows)), False)


def _back(
    z: np.ndarray, rows: np.ndarray, columns: np.ndarray, w: Pair, p: Pair
) -> tuple[Pair, Pair]:
    """The best direction and weights on the way from equal units to those of the data.

    The support of the best direction moves little when units do, so the active-set method finds
    each from the last, as far as 32 digits allow.
    """
    best_lower, best_upper = lower_bound(z, w, 2.0)[1], upper_bound(z, p, 2.0)
    support = np.flatnonzero(p.high > 0.0)
    for part in np.linspace(1.0, 0.0, STEPS + 1):
        near = _scaled(z, rows, columns, part)
        found, support, a = active_set(near, support)
        if found is None or not lower_bound(near, found, 2.0)[1] > 0.0:
            break
        own_rows, own_columns = (np.rint(part * each).astype(int) for each in (rows, columns))
        moved = _times(found, own_columns)
        weights = _times(Pair.scattered(len(z), support, a), own_rows)
        lower, upper = lower_bound(z, moved, 2.0)[1], upper_bound(z, weights, 2.0)
        if lower > best_lower:
            w, best_lower = moved, lower
        if upper < best_upper:
            p, best_upper = weights, upper
    return w, p


def _exponents(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Powers of two by which rows and columns get largest entries between a half and one."""
    exponents = np.where(z != 0.0, np.frexp(z)[1], -np.inf)
    rows, columns = np.zeros(len(z)), np.zeros(z.shape[1])
    for _ in range(5):
        for axis, scale in ((0, columns), (1, rows)):
            largest = (exponents + rows[:, None] + columns).max(axis=axis)
            scale -= np.where(np.isfinite(largest), largest, 0.0)
    return rows.astype(int), columns.astype(int)


def _scaled(z: np.ndarray, rows: np.ndarray, columns: np.ndarray, part: float) -> np.ndarray:
    """The data in units this part of the way from their own to equal ones, entries up to one."""
    moved = np.rint(part * rows).astype(int)[:, None] + np.rint(part * columns).astype(int)
    largest = int(np.max(np.where(z != 0.0, np.frexp(z)[1] + moved, -(10**6))))
    return np.ldexp(z, moved - largest)


def _times(pair: Pair, exponents: np.ndarray) -> Pair:
    """A pair times powers of two, its largest entry near one."""
    largest = int(np.max(np.where(pair.high != 0.0, np.frexp(pair.high)[1] + exponents, -(10**6))))
    return Pair(*(np.ldexp(each, exponents - largest) for each in (pair.high, pair.low)))

r"""Does a saved quantity tend to its limit? A verdict that makes sense at any horizon.

A theorem says $Q \to 0$; a record ends. Let $x$ be the logarithm of the coordinate in which the
theory states rates ($-\log R$ for directions, $t$ for the risk), so that a power law is a
straight line of $\log Q$. Look at the last *decade* of the coordinate, from the largest $Q$ in it
on, and take three values $Q_1, Q_2, Q_3$ at its ends and its middle in $x$. For
$Q = c + b\,e^{-ax}$ they determine the limit (Aitken):

$$c = Q_3 - \frac{(Q_3 - Q_2)^2}{Q_3 - 2Q_2 + Q_1}.$$

A law with $c = 0$ gives zero exactly, one that levels off gives its level. $Q$ *tends to zero*
when $Q_3 < Q_2 < Q_1$ and $c \le Q_3/2$: at least half of what is left goes away on extrapolation.
A decrease that speeds up counts as $c \le 0$. A fall by $e^{20}$ and more whose halves differ by a
tenth counts too: three values cannot tell it from a level that is reached just there.

Before its asymptotic regime a quantity may rest or rise for a while. One whose rate is known is
then given the benefit of it: if over the last decade it fell at least as fast as the rate says, and
to a value *near* the limit, it respects the theory's envelope and counts as tending to zero.
"""

import math
from typing import NamedTuple

import numpy as np

DECADE = math.log(10.0)

LEAST_STRETCH = math.log(2.0)
"""The coordinate has to double before anything is extrapolated."""

LARGEST_LIMIT = 0.5
"""Part of the last value that the extrapolated limit may be."""

MANY, CURVED = 10.0, 0.1
"""Powers of e in the second half of a fall that are many, and the part of them by which the halves
may differ then: over so far an exponent that changes a little looks like a level."""

LARGEST_EXPONENT = 300.0
"""Ratios of saved values beyond $e^{300}$ are taken for this, which decides the same."""


class Trend(NamedTuple):
    """What a record shows about a quantity that should tend to zero."""

    tends: bool | None
    """None when the record is too short to tell."""
    exponent: float
    r"""$a$ of $Q \sim e^{-ax}$ over the last decade; NaN where it was not measured."""
    limit: float
    """Extrapolated limit as a part of the last value; at most 1, negative beyond the target."""
    reason: str


def trend(
    x: np.ndarray,
    deviation: np.ndarray,
    *,
    floor: float = 0.0,
    rate: float = math.inf,
    near: float = 0.0,
) -> Trend:
    r"""Judge whether ``deviation`` tends to zero as ``x`` grows.

    Args:
        x: logarithm of the coordinate; points where it is not finite or does not grow are left out.
        deviation: the quantity; only what follows its last change of sign is looked at.
        floor: values at most this are zero for the record at hand.
        rate: the exponent of the theory's envelope, positive.
        near: values at most this are near the limit, so that the envelope may decide.

    >>> x = np.linspace(0.0, 5.0, 50)
    >>> trend(x, np.exp(-0.5 * x)).tends
    True
    >>> trend(x, 0.1 + np.exp(-0.5 * x)).tends
    False
    """
    with np.errstate(divide="ignore"):
        log_size = np.log(np.abs(deviation))
    log_floor, log_near = (math.log(value) if value > 0 else -math.inf for value in (floor, near))
    found = log_trend(x, log_size, signs=np.sign(deviation), log_floor=log_floor)
    if found.tends is False and found.exponent >= rate and _last(log_size) <= log_near:
        return found._replace(
            tends=True, reason="over the last decade it fell as fast as the theory says, and more"
        )
    return found


def log_trend(
    x: np.ndarray,
    log_size: np.ndarray,
    *,
    signs: np.ndarray | None = None,
    log_floor: float = -math.inf,
    span: float = DECADE,
) -> Trend:
    """As :func:`trend`, for a quantity given by its logarithm, which may be below underflow."""
    known = np.isfinite(x) & ~np.isnan(log_size)
    if not np.any(known):
        return Trend(None, math.nan, math.nan, "it is undefined at every saved point")
    if log_size[known][-1] <= log_floor:
        return Trend(True, math.nan, 0.0, "it is at its limit to the accuracy of the record")
    known &= np.isfinite(log_size) & _grows(np.where(known, x, -np.inf))
    x, y = x[known], log_size[known]
    if signs is not None and len(x):
        changes = np.nonzero(np.diff(signs[known]))[0]
        if len(changes):
            x, y = x[changes[-1] + 1 :], y[changes[-1] + 1 :]
    if len(x) < 3:
        return Trend(None, math.nan, math.nan, f"{_count(len(x))} cannot show a trend")
    first = min(int(np.searchsorted(x, x[-1] - span - 1e-9)), len(x) - 3)
    x, y = x[first:], y[first:]
    if x[-1] - x[0] < LEAST_STRETCH:
        return Trend(None, math.nan, math.nan, "the saved stretch is too short to show a trend")
    top = int(np.argmax(y))
    x, y = x[top:], y[top:]
    if x[-1] - x[0] < LEAST_STRETCH:
        return Trend(False, math.nan, math.nan, "it has not begun to fall")
    y1, y2, y3 = np.interp([x[0], (x[0] + x[-1]) / 2, x[-1]], x, y)
    exponent = float((y1 - y3) / (x[-1] - x[0]))
    limit = _limit(float(y1 - y3), float(y2 - y3))
    if y3 >= y2:
        return Trend(False, exponent, 1.0, "it has stopped falling")
    straight = abs((y1 - y2) - (y2 - y3)) <= CURVED * (y2 - y3)
    tends = bool(limit <= LARGEST_LIMIT or (straight and y2 - y3 >= MANY))
    part = "below zero" if limit < 0 else f"at {limit:.0%} of its last value"
    return Trend(tends, exponent, limit, f"its extrapolated limit lies {part}")


def stays_bounded(x: np.ndarray, product: np.ndarray) -> Trend:
    """Judge whether a positive ``product`` stays bounded: it levels off, or does not grow.

    At the end of the last decade of the coordinate it is at most 1 % above what it was in the first
    half, or its growth in the second half is at most half of that in the first; unbounded growth,
    even logarithmic, keeps its pace.
    """
    known = np.isfinite(x) & np.isfinite(product)
    known &= _grows(np.where(known, x, -np.inf))
    x, product = x[known], product[known]
    if len(x) < 3:
        return Trend(None, math.nan, math.nan, f"{_count(len(x))} cannot show a trend")
    first = min(int(np.searchsorted(x, x[-1] - DECADE - 1e-9)), len(x) - 3)
    x, product = x[first:], product[first:]
    if x[-1] - x[0] < LEAST_STRETCH:
        return Trend(None, math.nan, math.nan, "the saved stretch is too short to show a trend")
    middle = (x[0] + x[-1]) / 2
    p1, p2, p3 = np.interp([x[0], middle, x[-1]], x, product)
    before = max(float(np.max(product[x <= middle])), float(p2))
    bounded = bool(p3 <= 1.01 * before or p3 - p2 <= (p2 - p1) / 2)
    reason = "it levels off" if bounded else "it keeps growing"
    return Trend(bounded, math.nan, math.nan, reason)


def _limit(from_first: float, from_middle: float) -> float:
    """Aitken's limit over the last value, from the logarithms of Q1/Q3 and Q2/Q3."""
    first, middle = (math.exp(min(value, LARGEST_EXPONENT)) for value in (from_first, from_middle))
    bend = first - 2 * middle + 1
    return 1 - (middle - 1) ** 2 / bend if bend > 0 else -math.inf


def _grows(x: np.ndarray) -> np.ndarray:
    """Where ``x`` exceeds all that came before it, by more than rounding."""
    before = np.concatenate([[-np.inf], np.maximum.accumulate(x)[:-1]])
    return (x > -np.inf) & (x > np.where(np.isfinite(before), before + 1e-12, -np.inf))


def _last(values: np.ndarray) -> float:
    return float(values[~np.isnan(values)][-1])


def _count(points: int) -> str:
    return "one saved point" if points == 1 else f"{points} saved points"

r"""Integrals and inverses in the log domain, for the closed forms.

Every closed form for a margin loss is a quadrature: physical time is the integral of an explicit
positive function of the position, $t = \int e^{h(x)}\,dx$. Its antiderivative is exponential
integral, 1F1 or 2F1, which overflow, have poles in their parameters, and lose all digits in the
difference $F(x) - F(x_0)$. The integral itself has none of these troubles when it is written from
its upper end down,

$$\log t = h(x) + \log \int_0^{x - x_0} e^{-[h(x) - h(x - y)]}\,dy,$$

with $h(x) - h(x-y)$ in a form without cancellation. It is done here to the last digits.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from gflow.problem.logarithms import Values as Values, log_expm1 as log_expm1

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
# A panel is done when halving it changes the whole integral by less than round-off.
_PANEL_TOLERANCE = 2e-16
_MAX_HALVINGS = 60


def softplus(x: Values) -> Values:
    r"""$\log(1 + e^x)$, without overflow."""
    return np.logaddexp(0.0, x)


def log_integral(
    drop: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rate: Float[np.ndarray, " m"],
    length: Float[np.ndarray, " m"],
) -> Float[np.ndarray, " m"]:
    r"""$\log \int_0^{\ell_i} e^{-\mathrm{drop}_i(y)}\,dy$ for many $i$ at once.

    Gauss-Legendre on panels that grow geometrically from $y = 0$, halved where that still changes
    the result.

    Args:
        drop: `drop(i, y)` for indices `i` of shape `(k, 1)` and `y` of shape `(k, nodes)`;
            zero at `y = 0`.
        rate: the slope of `drop` at zero, which sets the width of the first panel.
        length: upper limits, at least zero; an empty range gives $-\infty$.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first = np.minimum(length, 1.0 / np.abs(rate))
        # Edges at 0, 1, 2, 4, ..., 128 times the first panel, where the integrand is down by about
        # e^-100, then much further apart; cut off at `length`. Zero widths are dropped below.
        doublings = np.log2(length / first)
        most = int(np.max(np.where(np.isfinite(doublings), doublings, 0.0), initial=0.0)) + 1
        powers = np.concatenate([np.arange(8.0), np.arange(16.0, most, 16.0)])
        edges = first[:, None] * np.exp2(np.minimum(powers, doublings[:, None]))
        edges = np.minimum(np.where(np.isnan(edges), 0.0, edges), length[:, None])
        edges = np.concatenate([np.zeros((len(length), 1)), edges, length[:, None]], axis=1)

    def panels(i, left, right):
        half = 0.5 * (right - left)
        y = left[:, None] + half[:, None] * (1.0 + _NODES)
        with np.errstate(divide="ignore", over="ignore"):
            values = -drop(i[:, None], y)
            top = np.max(values, axis=1)
            top = np.where(np.isfinite(top), top, 0.0)
            return top + np.log(half * (np.exp(values - top[:, None]) @ _WEIGHTS))

    owner = np.repeat(np.arange(len(length)), edges.shape[1] - 1)
    left, right = edges[:, :-1].ravel(), edges[:, 1:].ravel()
    used = right > left
    owner, left, right = owner[used], left[used], right[used]
    total = np.full(len(length), -np.inf)  # of the panels that are done
    whole = panels(owner, left, right)
    for _ in range(_MAX_HALVINGS):
        if owner.size == 0:
            break
        middle = 0.5 * (left + right)
        lower, upper = panels(owner, left, middle), panels(owner, middle, right)
        halves = np.logaddexp(lower, upper)
        estimate = total.copy()
        np.logaddexp.at(estimate, owner, halves)
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.abs(np.expm1(whole - halves)) * np.exp(halves - estimate[owner])
            width = (right - left) / np.abs(right)
        # Nodes closer than the spacing of float64 cannot tell more; NaN (0 of 0) is done as well.
        again = (change > _PANEL_TOLERANCE) & (np.abs(whole - halves) > 4e-16) & (width > 1e-14)
        np.logaddexp.at(total, owner[~again], halves[~again])
        owner = np.tile(owner[again], 2)
        left, right = (
            np.concatenate([left[again], middle[again]]),
            np.concatenate([middle[again], right[again]]),
        )
        whole = np.concatenate([lower[again], upper[again]])
    np.logaddexp.at(total, owner, whole)
    return total


def invert(
    function: Callable[[np.ndarray], np.ndarray],
    target: Float[np.ndarray, " m"],
    lower: Float[np.ndarray, " m"] | float,
    upper: Float[np.ndarray, " m"] | float,
) -> Float[np.ndarray, " m"]:
    """Where an increasing function takes given values, between bounds, to the last digits.

    A target that lies outside the bracket by round-off gives the bound.
    """
    from scipy.optimize.elementwise import find_root

    largest = np.finfo(np.float64).max / 4

    def excess(x, goal):
        # Functions here may grow like e^x: asinh makes them nearly straight, so that few steps
        # are needed; next to the root, its linearisation keeps every digit.
        value = np.nan_to_num(function(x), nan=largest, posinf=largest, neginf=-largest)
        value = np.clip(value, -largest, largest)
        near = np.abs(value - goal) < 1e-3 * np.maximum(1.0, np.abs(goal))
        far = np.arcsinh(value) - np.arcsinh(goal)
        return np.where(near, (value - goal) / np.hypot(1.0, goal), far)

    target = np.clip(target, -largest, largest)
    lower, upper = np.broadcast_to(lower, target.shape), np.broadcast_to(upper, target.shape)
    at_lower, at_upper = excess(lower, target) >= 0.0, excess(upper, target) <= 0.0
    solution = np.where(at_lower, lower, upper)
    inside = ~(at_lower | at_upper)
    if np.any(inside):
        root = find_root(excess, (lower[inside], upper[inside]), args=(target[inside],))
        solution[inside] = root.x
    return solution


def upper_bracket(
    function: Callable[[np.ndarray], np.ndarray],
    target: Float[np.ndarray, " m"],
    lower: float,
) -> Float[np.ndarray, " m"]:
    """A point beyond which an increasing, unbounded function exceeds each target, by doubling."""
    upper = np.full(target.shape, lower + 1.0)
    for exponent in range(1, 1024):
        with np.errstate(invalid="ignore", over="ignore"):
            short = function(upper) < target
        if not np.any(short):
            break
        upper = np.where(short, lower + 2.0**exponent, upper)
    return upper

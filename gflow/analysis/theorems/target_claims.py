r"""The claims about the square loss of deep linear networks.

1. **Convergence.** Near weights at rest residuals obey a linear equation, whose slowest rate
   $\lambda$ follows from the last weights (``slowest_rate`` in ``abstract_targets.py``): the risk
   falls like $e^{-2\lambda t}$ or faster. Judged where the risk has fallen a long way and is not
   round-off yet.
2. **Saddles.** From a balanced start whose modes are those of the solution, on white inputs, every
   mode obeys its own equation, and is half learnt at the time of ``gflow.exact.saddle_times``. It
   must lie between the saved points on both sides of the crossing.
3. **Nuclear norm.** What meets the measurements has at least the certified least one. How near to
   it the flow comes depends on depth and start: two layers from a vanishing start were conjectured
   to attain it (Gunasekar et al., arXiv 1705.09280), which holds for commuting measurements and not
   in general (Li, Luo and Lyu, arXiv 2012.09839); the value is that of the record.
"""

import math

import numpy as np

from gflow.analysis import exact
from gflow.analysis.saddles import around, saddles
from gflow.analysis.theorems.claims import Claim, claim
from gflow.analysis.theorems.facts import Facts

SAXE = "Saxe, McClelland and Ganguli, arXiv 1312.6120"

FALLEN, ABOVE = 12.0, 8.0
"""Log risks that the risk must have fallen by, and be above round-off, for its rate to be told."""

ALIGNED = 1e-9
"""Relative entries off the modes, and imbalance, of a start that is aligned and balanced."""


def convergence_rate(facts: Facts) -> Claim:
    """The risk falls at twice the slowest rate of the last weights, or faster."""
    attrs = facts.record.attrs
    rate, obstacles = float(attrs.get("slowest_rate", math.nan)), []
    if "least_log_risk" in attrs:
        obstacles.append("no linear map fits, and the excess of the risk is a difference")
    if math.isnan(rate):
        obstacles.append("the end-to-end matrix is too large for its rates to be worked out")
    low = float(attrs.get("round_off_log_risk", -math.inf)) + ABOVE
    high = float(attrs.get("log_risk_of_zero", math.inf)) - FALLEN
    late = np.flatnonzero((facts.log_risk < high) & (facts.log_risk > low))
    times = np.exp(facts["log_time"])
    value = math.nan
    if len(late) >= 2:
        first, last = late[-2:]
        value = float((facts.log_risk[first] - facts.log_risk[last]) / (times[last] - times[first]))
    # What the weights still move by changes the rate by as much.
    off = math.exp(facts.log_risk[late[-2]] / 2 - high / 2 - FALLEN / 2) if len(late) > 1 else 0.0
    return claim(
        "exponential convergence",
        "-d log R/dt tends to twice a rate of the tangent kernel at rest, or more",
        f"{SAXE}; the rates: linearisation at rest",
        "-d log R/dt",
        value,
        f">= {2 * rate:.4g}, twice the slowest rate",
        bool(value >= 2 * rate * (1 - 0.01 - 10 * off)) if math.isfinite(value) else None,
        "between the last two saved points above round-off"
        if math.isfinite(value)
        else "too few saved points have a small risk above round-off",
        [*obstacles, *facts.step_obstacles],
    )


def saddle_times(facts: Facts) -> Claim:
    """Modes of an aligned, balanced start are learnt at the times of the closed form."""
    predicted, obstacle = _predicted(facts)
    obstacles = [obstacle] if obstacle else []
    value, good, count = math.nan, True, 0
    if predicted is not None:
        found = [row.log_passed for row in saddles(facts.record) if math.isfinite(row.log_passed)]
        count = len(found)
        off = np.expm1(np.array(found) - predicted[:count])
        value = float(np.max(np.abs(off), initial=0.0)) if count else math.nan
        good = all(
            low * (1 - 1e-6) <= math.exp(time) <= high * (1 + 1e-6)
            for (low, high), time in zip(around(facts.record, count), predicted, strict=False)
        )
    return claim(
        "saddles are left in time",
        "mode r of a balanced, aligned start is half learnt at (1/2s) log(s/u - 1) for two layers",
        SAXE,
        "largest relative difference, interpolated",
        value,
        "the time between the saved points around it",
        good if count else None,
        f"compared for {count} mode{'s' * (count != 1)}" if count else "no mode is learnt",
        [*obstacles, *facts.step_obstacles],
    )


def nuclear_norm(facts: Facts) -> Claim:
    """The nuclear norm of what meets the measurements is at least the certified least one."""
    attrs = facts.record.attrs
    bound = float(attrs.get("nuclear_norm_bound", math.nan))
    obstacles = []
    if math.isnan(bound):
        obstacles.append("of regression the solution of least norm has the least nuclear norm too")
    met = facts.log_risk[-1] < float(attrs.get("log_risk_of_zero", math.nan)) - 2 * FALLEN
    value = float(facts["nuclear_norm"][-1]) / bound
    return claim(
        "nuclear norm is above the least",
        "|W|_* >= y^T lambda for any |A^T lambda|_2 <= 1, of any W that meets the measurements",
        "duality; Recht, Fazel and Parrilo, SIAM Review 52, 471 (2010)",
        "|W|_* over the certified least",
        value,
        ">= 1",
        bool(value >= 1 - 1e-4) if met else None,
        "at the last saved point" if met else "the measurements are not met yet",
        obstacles,
    )


def _predicted(facts: Facts) -> tuple[np.ndarray | None, str]:
    """Log t at which each mode is half learnt, in order; or why there is no closed form."""
    attrs = facts.record.attrs
    if "whitened" not in attrs:
        return None, "the inputs are not white"
    solution = np.atleast_2d(facts["least_norm_solution"])
    left, sizes, right = np.linalg.svd(solution, full_matrices=False)
    there = sizes > ALIGNED * sizes[0]
    left, sizes, right = left[:, there], sizes[there], right[there]
    product = facts.start[0]
    for before, after in zip(facts.start[:-1], facts.start[1:], strict=True):
        off = np.linalg.norm(after.T @ after - before @ before.T)
        if off > ALIGNED * np.linalg.norm(before) ** 2:
            return None, "the start is not balanced"
        product = after @ product
    modes = left.T @ product @ right.T
    strengths = np.diag(modes)
    aside = np.linalg.norm(left.T @ product - strengths[:, None] * right)
    if aside > ALIGNED * np.linalg.norm(product):
        return None, "the start is not aligned with the solution"
    if not np.all((strengths > 0) & (strengths < sizes / 2)):
        return None, "a mode is not between zero and half of its target at the start"
    times = exact.saddle_times(sizes, strengths, depth=facts.depth) / float(attrs["whitened"])
    return np.log(np.maximum.accumulate(times)), ""

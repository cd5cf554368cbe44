r"""Plateaus of the square loss: when each is reached and left, its rank and its risk.

A deep linear network that starts small learns the modes of its data one after the other (Saxe,
McClelland and Ganguli, arXiv 1312.6120; Jacot et al., arXiv 2106.15933). Between two of them it
stands near a saddle: a map of rank r whose risk falls in no direction of that rank. Plateau r lies
between the times at which modes r and r + 1 have half of what they tend to.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from gflow.analysis.table import Table
from gflow.problem import settings

if TYPE_CHECKING:
    import xarray as xr

NEAR = 0.01
"""A plateau lasts while the risk is within this part of the step above, or below, of its level."""


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A plateau of the risk.

    Attributes:
        rank: how many modes are learnt: of the end-to-end matrix there.
        log_risk: its level, where the risk changes least with log t; NaN without a saved point.
        log_reached: log t at which the risk has come near the level; minus infinity of the first.
        log_left: log t at which it leaves it; infinite of the one that the record ends on.
        log_passed: log t at which the mode that ends the plateau has half of its target; infinite
            of the last one.
        effective_rank: of the end-to-end matrix at the level.
    """

    rank: int
    log_risk: float
    log_reached: float
    log_left: float
    log_passed: float
    effective_rank: float


class Plateaus(Table[Plateau]):
    """The plateaus of a record, in order: prints aligned, iterates over its rows."""

    header = ("rank", "log R", "reached, log t", "left, log t", "passed, log t", "effective rank")

    def cells(self, row: Plateau) -> tuple[str, ...]:
        numbers = row.log_risk, row.log_reached, row.log_left, row.log_passed
        return str(row.rank), *(f"{value:.6g}" for value in numbers), f"{row.effective_rank:.4f}"

    @property
    def summary(self) -> str:
        """One line: how many saddles were passed."""
        passed = sum(math.isfinite(row.log_passed) for row in self.rows)
        return f"{passed} saddle{'s' * (passed != 1)} passed, the first at the origin"


@settings.own()
def saddles(record: "xr.Dataset") -> Plateaus:
    r"""The plateaus of a flow or descent of the square loss.

    Between saved points ``log_passed`` is interpolated as two layers learn, $\log(u/(s - u))$
    linear in t, and the other times linearly in log t: save enough points of a time, or stop at
    ``Saddle(n)``, which lands on ``log_passed`` itself.

    Args:
        record: of a deep linear network on targets.

    Returns:
        A table of the plateaus, the one at the start and the one at the end included.

    Raises:
        ValueError: when the record is another one.
    """
    if "mode_values" not in record or record["mode_values"].dims != ("point", "value"):
        raise ValueError(
            "`record` has no `mode_values` along `point`; expected one of a deep linear network on "
            "targets, of a single run."
        )
    strengths = np.asarray(record["mode_values"].values)
    targets = np.asarray(record["mode_targets"].values)
    log_time, log_risk = record["log_time"].values, record["log_risk"].values
    effective = record["effective_rank"].values
    known = np.isfinite(log_risk)
    halves = np.where(targets > 0, targets / 2, np.inf)
    count = int(np.sum(np.cumprod(np.any(strengths >= halves, axis=0))))
    passed = [_passed(strengths[:, n], targets[n], log_time) for n in range(count)]
    edges = [-math.inf, *np.maximum.accumulate(passed), math.inf]
    levels = [
        _flattest(log_time, log_risk, known & (log_time >= edges[n]) & (log_time <= edges[n + 1]))
        for n in range(count + 1)
    ]
    rows = []
    for n, at in enumerate(levels):
        level = math.nan if at is None else float(log_risk[at])
        reached, left = -math.inf, math.inf
        if at is not None and n > 0:
            reached = _crossing(log_time, log_risk, _between(level, levels[n - 1], log_risk), at)
        if at is not None and n < count:
            left = _crossing(log_time, log_risk, _between(level, levels[n + 1], log_risk), at)
        erank = math.nan if at is None else float(effective[at])
        rows.append(Plateau(n, level, reached, left, float(edges[n + 1]), erank))
    title = f"{record.attrs.get('kind', 'run')} on {record.attrs.get('dataset', 'data')}"
    return Plateaus(rows, title)


def _passed(strength: np.ndarray, target: float, log_time: np.ndarray) -> float:
    """Log t at which a mode has half of its target, first."""
    after = int(np.argmax(strength >= target / 2))
    if after == 0:
        return float(log_time[0])
    u, t = strength[after - 1 : after + 1] / target, np.exp(log_time[after - 1 : after + 1])
    if not np.all((u > 0) & (u < 1) & np.isfinite(t)) or t[0] == t[1]:
        return float(log_time[after])
    x = np.log(u / (1 - u))
    with np.errstate(divide="ignore"):
        return float(np.log(t[0] - x[0] * (t[1] - t[0]) / (x[1] - x[0])))


def _flattest(log_time: np.ndarray, log_risk: np.ndarray, inside: np.ndarray) -> int | None:
    """The point among some where the risk changes least with log t; the start and the end count."""
    at = np.flatnonzero(inside)
    if not len(at):
        return None
    if at[0] == 0:
        return 0
    if at[-1] == len(log_risk) - 1:
        return int(at[-1])
    slopes = np.abs(np.gradient(log_risk[at], log_time[at])) if len(at) > 1 else np.zeros(1)
    return int(at[np.argmin(slopes)])


def _between(level: float, other: int | None, log_risk: np.ndarray) -> float:
    """The log risk that ends a plateau on the side of another."""
    if other is None:
        return level
    return level + math.log1p(NEAR * math.expm1(float(log_risk[other]) - level))


def _crossing(log_time: np.ndarray, log_risk: np.ndarray, goal: float, at: int) -> float:
    """Log t at which the risk, which falls, is at a goal, on its side of a point."""
    points = range(at, 0, -1) if goal > log_risk[at] else range(at + 1, len(log_risk))
    for k in points:
        before, after = log_risk[k - 1], log_risk[k]
        if after <= goal <= before:
            if not np.isfinite(log_time[k - 1]) or before == after:
                return float(log_time[k])
            share = (before - goal) / (before - after)
            return float(log_time[k - 1] + share * (log_time[k] - log_time[k - 1]))
    return float(log_time[at])


def around(record: "xr.Dataset", count: int) -> list[tuple[float, float]]:
    """The times of the saved points before and after each of the first modes is half learnt."""
    strengths, targets = record["mode_values"].values, record["mode_targets"].values
    times = np.exp(record["log_time"].values)
    found = []
    for n in range(count):
        after = int(np.argmax(strengths[:, n] >= targets[n] / 2))
        found.append((float(times[max(after - 1, 0)]), float(times[after])))
    return found

"""The statements about limits and rates, one function a claim, judged by their trend."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gflow.analysis.theorems.claims import LYU_LI, PAPER, SOUDRY, Claim, claim
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.trend import DECADE, Trend, log_trend, stays_bounded, trend
from gflow.quantities import quantity

LINEAR_FLOOR = quantity("direction_error").zero
"""Direction errors and margin gaps below this are zero: the solver's tolerance."""

NEAR = 0.1
"""Direction errors and relative margin gaps up to which the envelope 1/s may speak for the limit:
while points beyond the support still pull, the direction rests or turns back for a while."""

COSINE_FLOOR = 1e-12
"""One minus the direction's alignment with v_1 is a difference of numbers near one."""

TIME_LAW_FLOOR = 1e-2
"""The law of time counts as reached when it holds to one per cent, or to twice its next order: the
product is 1 + (2 - 2/L)/s + smaller terms."""

LAST_TIME = 1e10
"""The s beyond which float64's log t, of size s, no longer tells R t to 1e-5."""

LONGEST_STEP = 1e-2
"""Relative decrease of the risk in one step up to which descent's time is comparable with t."""


def risk_vanishes(facts: Facts) -> Claim:
    r"""$R \to 0$, in time."""
    log_time = facts["log_time"]
    span = max(DECADE, abs(float(log_time[-1])) / 2) if np.isfinite(log_time[-1]) else DECADE
    found = log_trend(log_time, facts.log_risk, span=span)
    return limit_claim(
        "risk vanishes",
        "R(W(t)) -> 0",
        PAPER,
        "log R",
        float(facts.log_risk[-1]),
        "R -> 0",
        found,
        facts.obstacles,
        coordinate="t",
        early=facts.before_separation,
    )


def norms_grow(facts: Facts) -> Claim:
    r"""Every layer grows without bound; judged by $1/\lVert W_k\rVert_F$."""
    smallest = np.min(facts["frobenius_norm"], axis=1)
    with np.errstate(divide="ignore"):
        found = log_trend(facts.log_s, -np.log(smallest))
    return limit_claim(
        "every norm grows",
        "|W_k|_F -> infinity for every layer",
        PAPER,
        "smallest |W_k|_F",
        float(smallest[-1]),
        "1/|W_k|_F -> 0",
        found,
        facts.obstacles,
        law=-1 / facts.depth if facts.exponential_tail else None,
        early=facts.before_alignment,
    )


class Vanishing(NamedTuple):
    """The statement that a variable of the record tends to zero, of layers and pairs the worst."""

    name: str
    statement: str
    quantity: str
    variable: str
    """Of the record."""
    from_one: bool = False
    """Whether it is one minus the variable that tends to zero."""
    in_margins: bool = False
    """Whether it is judged in units of the maximum margin."""
    exponent: float | None = None
    """L times the exponent of s in the law. None for statements about the direction: they need an
    exponential tail, and have an envelope, 1/s, in place of a law."""


VANISHING = (
    Vanishing(
        "layers become rank one",
        "|W_k/|W_k|_F - u_k v_k^T|_F -> 0 for every layer",
        "largest 1 - |W_k|_2/|W_k|_F",
        "rank_one_gap",
        exponent=-2,
    ),
    Vanishing(
        "layers align",
        "|<v_{k+1}, u_k>| -> 1 for neighbouring layers",
        "largest 1 - |<v_{k+1}, u_k>|",
        "misalignment",
        exponent=-4,
    ),
    Vanishing(  # and no norm is lost in the product
        "product follows v_1",
        "|<w / prod_k |W_k|_F, v_1>| -> 1",
        "1 - |<w/prod|W_k|_F, v_1>|",
        "direction_alignment",
        from_one=True,
        exponent=-2,
    ),
    Vanishing(
        "direction is max margin",
        "w/|w| -> the maximum-margin direction",
        "|w/|w| - u|",
        "direction_error",
    ),
    Vanishing(
        "margin is maximal",
        "min_i <w, z_i>/|w| -> the maximum margin",
        "max margin - margin",
        "margin_gap",
        in_margins=True,
    ),
)


def vanishes(facts: Facts, row: Vanishing) -> Claim:
    """One such statement."""
    values = facts[row.variable].reshape(len(facts.s), -1)
    values = _largest(1 - values if row.from_one else values)
    floor = quantity(row.variable).zero or COSINE_FLOOR
    unit = facts.max_margin if row.in_margins else 1.0
    if row.exponent is None:
        found = trend(facts.log_s, values / unit, floor=floor, rate=1.0, near=NEAR)
        obstacles, law, early = facts.tail_obstacles, None, facts.before_asymptotics
    else:
        found = trend(facts.log_s, values / unit, floor=floor)
        obstacles, early = [*facts.one_layer, *facts.obstacles], facts.before_alignment
        law = row.exponent / facts.depth if facts.exponential_tail else None
    value = float(values[-1])
    return limit_claim(
        row.name,
        row.statement,
        PAPER,
        row.quantity,
        value,
        "0",
        found,
        obstacles,
        law=law,
        early=early,
    )


def towards_one(facts: Facts, ratio: np.ndarray, last: int, floor: float) -> Trend:
    """Whether the two sides of a law of time, in ratio, come together.

    Args:
        facts: of the record.
        ratio: at each saved point.
        last: the last point with a time.
        floor: how far from one the ratio is at most where the law is met.
    """
    if facts.s[last] > LAST_TIME:
        return Trend(None, math.nan, math.nan, f"no saved point has s up to {LAST_TIME:g}")
    if abs(float(ratio[last]) - 1) <= floor:
        return Trend(True, math.nan, 0.0, f"it is within {floor:.2g} of one")
    return trend(facts.log_s[: last + 1], (ratio - 1)[: last + 1])


def time_law(facts: Facts) -> Claim:
    """Risk, time and norm are tied by one law with all its constants."""
    depth = max(facts.depth, 1)
    norm = np.linalg.norm(facts["end_to_end"], axis=1)
    last = last_with_time(facts)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_slope = math.log(depth) + 2 * np.log(facts.max_margin) + (2 - 2 / depth) * np.log(norm)
        ratio = np.exp(facts.log_risk + log_slope + facts["log_time"])
    obstacles = [*facts.tail_obstacles, *time_obstacles(facts, last)]
    floor = max(TIME_LAW_FLOOR, 2 * (2 - 2 / depth) / max(float(facts.s[last]), 1.0))
    found = towards_one(facts, ratio, last, floor)
    return limit_claim(
        "law of time",
        "R L gamma^2 t |w|^(2 - 2/L) -> 1, the constants of R ~ 1/(t (log t)^(2 - 2/L))",
        f"{LYU_LI}; the constants are gflow's",
        "R L gamma^2 t |w|^(2-2/L)",
        float(ratio[last]),
        "1",
        found,
        obstacles,
        early=facts.before_asymptotics,
    )


def last_with_time(facts: Facts) -> int:
    """The last saved point at which log t says more than log R.

    log t + log R is a difference of numbers of size s: in float64 nothing is left of it far out.
    """
    resolved = np.flatnonzero(~(facts.s > LAST_TIME))
    return int(resolved[-1]) if len(resolved) else 0


def time_obstacles(facts: Facts, at: int) -> list[str]:
    r"""Why descent's sum of step sizes is not the flow's time.

    $\lVert\nabla R\rVert^2 = R^2 L\gamma^2\lVert w\rVert^{2-2/L}$ to leading order.
    """
    if not (facts.is_descent and "log_step_size" in facts.record):
        return []
    depth = max(facts.depth, 1)
    norm = float(np.linalg.norm(facts["end_to_end"][at]))
    log_slope = math.log(depth * facts.max_margin**2) + (2 - 2 / depth) * math.log(
        max(norm, 1e-300)
    )
    if facts["log_step_size"][at] + facts.log_risk[at] + log_slope <= math.log(LONGEST_STEP):
        return []
    return [
        f"a step changes log R by more than {LONGEST_STEP:g}, so that the sum of step sizes is not "
        "the flow's time"
    ]


def direction_rate(facts: Facts) -> Claim:
    """The direction's error is bounded by its rate."""
    power = 1 / max(facts.depth, 1)
    error = facts["direction_error"]
    product = error * np.where(facts.s > 0, facts.s, np.nan) ** power
    if error[-1] <= LINEAR_FLOOR:
        found = Trend(True, math.nan, math.nan, "the direction is exact to the record's accuracy")
    else:
        found = stays_bounded(facts.log_s, product)
    observed, reason = in_time(found, facts.before_asymptotics)
    name = "s" if facts.depth == 1 else f"s^(1/{facts.depth})"
    return claim(
        "direction's rate",
        "|w/|w| - u| = O(1/log t) for one layer; for L layers at least O((log t)^(-1/L)), and "
        "O(1/log t) where the support vectors span the data",
        SOUDRY if facts.depth == 1 else f"{SOUDRY}, for one layer; for more gflow's",
        f"|w/|w| - u| {name}",
        float(product[-1]),
        "bounded",
        observed,
        reason,
        facts.tail_obstacles,
    )


def limit_claim(
    name: str,
    statement: str,
    source: str,
    quantity: str,
    value: float,
    target: str,
    found: Trend,
    obstacles: Sequence[str],
    *,
    law: float | None = None,
    coordinate: str = "s",
    early: str | None,
) -> Claim:
    """A claim judged by its trend; where it is too ``early`` to deny it, it is not applicable."""
    text = f"-> {target}" if "->" not in target else target
    if math.isfinite(found.exponent):
        text += f", like {coordinate}^{-found.exponent:.2f}"
        if law is not None:
            text += f" (law {coordinate}^{law:.2f})"
    observed, reason = in_time(found, early)
    return claim(name, statement, source, quantity, value, text, observed, reason, obstacles)


def in_time(found: Trend, early: str | None) -> tuple[bool | None, str]:
    """What was found, and why; where it is too ``early`` to deny a limit, nothing was."""
    if found.tends is False and early is not None:
        return None, f"{found.reason}, but {early}"
    return found.tends, found.reason


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest over layers or pairs of what is defined, at every point; NaN where nothing is."""
    if values.shape[1] == 0:
        return np.full(len(values), np.nan)
    largest = np.max(np.where(np.isnan(values), -np.inf, values), axis=1)
    return np.where(largest > -np.inf, largest, np.nan)

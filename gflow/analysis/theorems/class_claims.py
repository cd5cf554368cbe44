r"""The statements about several classes, held against a record.

What Ji and Telgarsky prove for one output carries over in part; ``docs/classes.md`` says which. The
statements here are those of K outputs: rank K - 1 in the place of rank one, subspaces in that of
singular vectors, two conserved quantities, and a norm of the limit that depends on the depth.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gflow.analysis.theorems.claims import LYU_LI, PAPER, SOUDRY, Claim, claim
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.limit_claims import (
    LAST_TIME,
    NEAR,
    TIME_LAW_FLOOR,
    last_with_time,
    limit_claim,
    towards_one,
)
from gflow.analysis.theorems.trend import DECADE, LEAST_STRETCH, trend
from gflow.problem.class_observables import class_slacks, imbalance_norms
from gflow.quantities import quantity

OURS = "gflow; see docs/classes.md"

MARGIN_FLOOR = 1e-9
"""Relative gaps between a margin and its bound below this are the solver's tolerance."""

SHARE_NOISE = 10.0
"""Relative error of a bound made of shares, in round-offs of s."""

PROVEN = 0.02
"""Relative gaps between a margin and its bound up to this count where they fall: modes that are not
of the limit leave the bound like a small power of s, 0.24 on a problem of six classes whose margin
was within 1e-5 of the optimum."""

RESTS = 0.5
"""Part of the law's exponent, 1/L, below which a singular value does not grow with the others."""


def ranks_fall(facts: Facts) -> Claim:
    """Every layer's rank falls to K - 1."""
    values = np.max(facts["rank_residual"], axis=1)
    return limit_claim(
        "layers become rank K - 1",
        "|(sigma_i(W_k))_{i >= K}| / |W_k|_F -> 0 for every layer",
        OURS,
        "largest residual",
        float(values[-1]),
        "0",
        trend(facts.log_s, values, floor=quantity("rank_residual").zero),
        [*facts.one_layer, *facts.obstacles],
        law=-1 / facts.depth if facts.exponential_tail else None,
        early=facts.before_alignment,
    )


def subspaces_align(facts: Facts) -> Claim:
    r"""The leading subspaces of neighbouring layers align, if all of their directions grow.

    From three layers on limits of lower rank compete with those of rank K - 1, and of directions
    that do not grow nothing is said: by Davis and Kahan's theorem the angle is at most
    $\lVert D_k\rVert_2/(\sigma_{K-1}^2 - \sigma_K^2)$.
    """
    values = np.full(len(facts.s), math.nan)
    if facts.depth > 1:
        values = np.max(facts["subspace_misalignment"], axis=1)
    return limit_claim(
        "subspaces align",
        "the leading K - 1 left vectors of W_k and right vectors of W_{k+1} span the same space",
        OURS,
        "largest 1 - cos",
        float(values[-1]),
        "0",
        trend(facts.log_s, values, floor=quantity("subspace_misalignment").zero),
        [*facts.one_layer, *facts.obstacles, *_of_lower_rank(facts)],
        law=-4 / facts.depth if facts.exponential_tail else None,
        early=facts.before_alignment,
    )


def _rank(facts: Facts) -> int:
    """The number of leading directions of the layers, as the observables count them."""
    widths = [int(width) for width in np.ravel(facts.record.attrs["widths"])]
    return min([int(facts.record.attrs["num_classes"]) - 1, *widths])


def _of_lower_rank(facts: Facts) -> list[str]:
    """Why the last of the leading directions is not one of the limit."""
    rank = _rank(facts)
    last = np.min(facts["singular_values"][:, :, rank - 1], axis=1)
    late = np.isfinite(facts.log_s) & (facts.log_s >= facts.log_s[-1] - DECADE) & (last > 0)
    if np.count_nonzero(late) < 2 or np.ptp(facts.log_s[late]) < LEAST_STRETCH:
        return []
    x, y = facts.log_s[late], np.log(last[late])
    exponent = float((y[-1] - y[0]) / (x[-1] - x[0]))
    if exponent > RESTS / facts.depth:
        return []
    return [
        f"the layers tend to a rank below {rank}: singular value {rank} of one grows like "
        f"s^{exponent:.2f}, the largest like s^{1 / facts.depth:.2f}"
    ]


def outputs_conserved(facts: Facts) -> Claim:
    """The sum of the outputs' rows does not change."""
    value = float(np.max(facts["output_sum_drift"]))
    return claim(
        "sum of outputs is conserved",
        "1^T W_L does not change: slopes of a softmax sum to zero over the classes",
        OURS,
        "largest relative drift",
        value,
        f"<= {facts.flow_drift:g}, of |W_L|_F",
        value <= facts.flow_drift,
        "compared at every saved point",
        facts.step_obstacles,
    )


def lemma_rank(facts: Facts) -> Claim:
    """Lemma 2 for K outputs: the K-th singular value is bounded at all times."""
    rank, _ = _slacks(facts)
    return _slack(
        facts,
        "Lemma 2: rank K - 1",
        "sigma_K(W_k)^2 <= |1^T W_L(0)|^2/K + sum_{j>=k} |D_j|_2 at every time",
        rank,
    )


def lemma_values(facts: Facts) -> Claim:
    """Lemma 2 for K outputs: neighbouring layers have nearly the same singular values."""
    _, values = _slacks(facts)
    return _slack(
        facts,
        "Lemma 2: singular values",
        "|sigma_i(W_{k+1})^2 - sigma_i(W_k)^2| <= |D_k|_2 at every time",
        values,
        facts.one_layer,
    )


def lemma_subspaces(facts: Facts) -> Claim:
    r"""Lemma 2 for K outputs: the angle of leading subspaces is bounded at all times.

    Davis and Kahan's sine theorem for $W_{k+1}^\top W_{k+1} = W_kW_k^\top + D_k$, in both orders.
    """
    rank, slack = _rank(facts), np.empty((len(facts.s), 0))
    if facts.depth > 1:
        apart = facts["subspace_misalignment"]
        squares = facts["singular_values"] ** 2
        leading, following = squares[:, :, rank - 1], squares[:, :, rank]
        gap = np.maximum(
            leading[:, 1:] - following[:, :-1], leading[:, :-1] - following[:, 1:]
        ).clip(0.0)
        sine = np.sqrt(apart * (2 - apart))  # undefined where directions are
        norms = imbalance_norms(tuple(facts.start)) + facts.budget[:, None]
        slack = np.where(np.isnan(sine), np.inf, norms - gap * sine)
    return _slack(
        facts,
        "Lemma 2: subspaces",
        "sin(angle of the leading K - 1 directions) <= |D_k|_2/(sigma_{K-1}^2 - sigma_K^2)",
        slack,
        facts.one_layer,
    )


def _slacks(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    start = tuple(facts.start)
    rank, values = class_slacks(start, facts["singular_values"])
    # Every |D_k|_2 may have grown by descent's budget.
    budget = facts.budget[:, None]
    return rank + facts.depth * budget, values + budget


def _slack(
    facts: Facts, name: str, statement: str, slack: np.ndarray, trivial: list[str] | None = None
) -> Claim:
    smallest = np.min(slack, axis=1, initial=np.inf) + facts.allowance
    at = int(np.argmin(smallest))
    known = slack.shape[1] > 0
    value = float(np.min(slack[at])) if known else math.nan
    return claim(
        name,
        statement + (", |D_k| enlarged by descent's budget" if facts.is_descent else ""),
        f"{PAPER}, for one output; for K {OURS}",
        "smallest slack",
        value,
        ">= 0 at every saved point",
        bool(smallest[at] >= 0) if known else None,
        "compared at every saved point",
        [*(trivial or []), *facts.budget_obstacles],
    )


class Norm(NamedTuple):
    """In which norm a network of some depth maximises the margin."""

    name: str
    margin: str
    bound: str
    source: str


NORMS = {
    1: Norm("Frobenius", "margin", "margin_bound", SOUDRY),
    2: Norm("nuclear", "nuclear_margin", "nuclear_margin_bound", OURS),
}
"""By the depth. Beyond two layers the quasi-norm is not convex, and no bound meets the margin."""


def by_shares(facts: Facts, judge: Callable[[Facts], Claim]) -> Claim:
    """A claim about the shares of points in the slope, judged where float64 has them.

    Shares are told from differences of margins, of size s, to some hundred times the round-off of
    s: at s = 1e12 to 0.02.
    """
    last = last_with_time(facts)
    if last == len(facts.s) - 1:
        return judge(facts)
    found = judge(Facts(facts.record.isel(point=slice(last + 1))))
    told = f"judged up to s = {facts.s[last]:.4g}: beyond {LAST_TIME:g} shares are round-off"
    return dataclasses.replace(found, why=f"{found.why}; {told}")


def limit_norm(facts: Facts) -> Claim:
    """The margin tends to the largest one in the norm that belongs to the depth.

    With the run's own shares p, of this point or an earlier one, any margin in that norm is at most
    the dual norm of A(p), so that the two of them meeting proves that both are optimal.
    """
    norm = NORMS.get(facts.depth)
    if norm is None:
        least, most = _brackets(facts)
        return claim(
            "margin is maximal in its norm",
            f"min m_ik/|W| -> the largest, in the Schatten-2/{facts.depth} quasi-norm",
            OURS,
            "margin in the quasi-norm",
            float(facts["schatten_margin"][-1]),
            f"the largest lies in [{least:.6g}, {most:.6g}]",
            None,
            "the quasi-norm is not convex, so that no bound meets the margin; the KKT conditions "
            f"are what the theory states, epsilon = {float(facts['kkt_residual'][-1]):.3g}",
            facts.tail_obstacles,
        )
    gap = 1 - facts[norm.margin] / np.fmin.accumulate(facts[norm.bound])
    noise = SHARE_NOISE * float(np.finfo(float).eps * facts.s[-1])
    found = trend(facts.log_s, gap, floor=max(MARGIN_FLOOR, noise), rate=1.0, near=NEAR)
    if found.tends is False and found.exponent > 0 and 0 <= gap[-1] <= PROVEN:
        reason = f"the margin is proven to {gap[-1]:.2g} of the largest one, and the gap falls"
        found = found._replace(tends=True, reason=reason)
    return limit_claim(
        "margin is maximal in its norm",
        f"min m_ik/|W| -> the largest, in the {norm.name} norm; bounded by the run's own shares",
        norm.source,
        "relative gap to the bound",
        float(gap[-1]) if facts["min_margin"][-1] > 0 else math.nan,
        "0",
        found,
        facts.tail_obstacles,
        early=facts.before_asymptotics,
    )


def _brackets(facts: Facts) -> tuple[float, float]:
    r"""Between what the largest margin lies in the quasi-norm of three or more layers.

    With $p = 2/L < 1$ and rank r, $\lVert W\rVert_* \le \lVert W\rVert_p \le
    r^{L/2 - 1}\lVert W\rVert_*$: at most the nuclear norm's bound, by the shares of any saved
    point; at least what the record has, and $r^{1-L/2}$ of its largest margin in the nuclear norm.
    """
    shrink = float(_rank(facts)) ** (1 - facts.depth / 2)
    least = np.nanmax([facts["schatten_margin"], shrink * facts["nuclear_margin"]])
    return float(least), float(np.nanmin(facts["nuclear_margin_bound"]))


def classes_collapse(facts: Facts) -> Claim:
    r"""Of classes that are alike one and two layers make a simplex: K - 1 equal singular values.

    With $X^\top X = aI + b11^\top$ and $P = I - 11^\top/K$ equal shares have
    $A = PX^\top/(K-1)$, whose singular values are equal, so that any largest margin in the nuclear
    norm is that of some $W = SA$, S symmetric and positive on $1^\perp$. All shares are positive:
    all margins are equal, $S_{ii} - S_{ki} = c$ for $k \ne i$, and by symmetry $S = cP$. In the
    Frobenius norm the solution is unique, and as symmetric as the data.
    """
    classes, values = int(facts.record.attrs["num_classes"]), facts["end_to_end_values"]
    count = min(classes - 1, values.shape[1])
    apart = (values[:, 0] - values[:, count - 1]) / values[:, 0]
    told = (
        "classes collapse",
        "K classes alike: sigma_{K-1}/sigma_1 of W_L...W_1 -> 1 for one and two layers",
        OURS,
        "1 - sigma_{K-1}/sigma_1",
        float(apart[-1]),
    )
    obstacles = []
    if classes == 2:
        obstacles.append("two classes have one direction, for which this is trivial")
    if not facts.classes_alike:
        obstacles.append("the classes are not one point each, all at one angle to each other")
    elif _rank(facts) < classes - 1:
        obstacles.append(f"a layer is narrower than the {classes - 1} directions of a simplex")
    if facts.depth > 2 and not obstacles:
        return claim(*told, "-> 0, or a code of lower rank", None, _undecided(facts, values[-1]))
    found = trend(facts.log_s, apart, floor=MARGIN_FLOOR, rate=1.0, near=NEAR)
    obstacles += facts.tail_obstacles
    return limit_claim(*told, "0", found, obstacles, early=facts.before_asymptotics)


def _undecided(facts: Facts, values: np.ndarray) -> str:
    r"""Why nothing is said of three and more layers, and what the record shows.

    Of margin one a simplex has K - 1 singular values 1, a regular polygon two of cK/2,
    $c = 1/(1 - \cos 2\pi/K)$, both over $\sqrt a$.
    """
    classes, power = int(facts.record.attrs["num_classes"]), 2 / facts.depth
    polygon = 2 * (classes / 2 / (1 - math.cos(2 * math.pi / classes))) ** power
    directions = float(np.sum(values) ** 2 / np.sum(values**2))
    least = "the simplex" if polygon >= classes - 1 else "a regular polygon"
    return (
        f"no theorem says which KKT point {facts.depth} layers reach; {least} is the smaller one "
        f"in their quasi-norm, sum sigma^(2/{facts.depth}) = {polygon:.4g} for a polygon and "
        f"{classes - 1} for a simplex, and the record has {directions:.2f} directions"
    )


def time_law(facts: Facts) -> Claim:
    r"""Risk, time and norm are tied by one law, of every homogeneous network.

    To leading order $t = 1/(R\lVert\nabla\log R\rVert^2)$ and
    $Ls = \lVert\theta\rVert\,\lVert\nabla\log R\rVert\cos\beta$, $\beta$ between weights and
    slope: the law's left side is $\cos^2\beta$, one where the direction has settled.
    """
    last = last_with_time(facts)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_size = 2 * np.log(facts.depth * facts.s / facts["norm"])
        ratio = np.exp(facts.log_risk + facts["log_time"] + log_size)
    floor = max(
        TIME_LAW_FLOOR,
        2 * (2 + math.log(int(facts.record.attrs["num_points"]))) / max(float(facts.s[last]), 1.0),
    )
    found = towards_one(facts, ratio, last, floor)
    early = facts.before_asymptotics
    square = _square_cosine(facts, last)
    if early is None and abs(float(ratio[last]) - square) <= floor:
        early = f"the direction has not settled: cos^2 of weights and slope is {square:.4g} too"
    return limit_claim(
        "law of time",
        "R t L^2 s^2/|W|^2 -> 1, |W| the norm of all weights",
        f"{LYU_LI}; the constant is gflow's",
        "R t L^2 s^2/|W|^2",
        float(ratio[last]),
        "1",
        found,
        facts.tail_obstacles
        if not facts.is_descent
        else [*facts.tail_obstacles, "descent's sum of step sizes is not the flow's time"],
        early=early,
    )


def _square_cosine(facts: Facts, at: int) -> float:
    """Of the angle between weights and slope, from Lyu and Li's epsilon; of separated data."""
    if not facts["min_margin"][at] > 0:
        return math.nan
    scaled = facts["norm"][at] / facts["min_margin"][at] ** (1 / facts.depth)
    return float((1 - (facts["kkt_residual"][at] / scaled) ** 2 / 2) ** 2)

r"""Rates with their constants: Lyu and Li's of loss and norm, Soudry's vector, the KKT conditions.

With $T = t$ for the flow and the sum of step sizes for descent. The constants of Lyu and Li's
$\Theta$ are those of deep linear networks, which reach the global maximum margin. Soudry's vector:
for one layer $w(t) = \hat w\log t + \tilde w + o(1)$ with $\hat w = \bar u/\gamma$ and

$$\frac1n\,e^{-\langle \tilde w, z_i\rangle} = \alpha_i, \qquad
\hat w = \sum_{i\in S}\alpha_i z_i,$$

With the limiting
weights $p^*$ of ``gflow.analysis.laws``, $\alpha = p^*/\gamma^2$, so that
$\langle\tilde w, z_i\rangle = -\log(n p^*_i/\gamma^2)$ on the support.
"""

import math

import numpy as np

from gflow.analysis.law_constants import limits_of_record
from gflow.analysis.theorems.claims import LYU_LI, SOUDRY, Claim, claim
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.limit_claims import (
    LINEAR_FLOOR,
    NEAR,
    TIME_LAW_FLOOR,
    in_time,
    last_with_time,
    limit_claim,
    time_obstacles,
)
from gflow.analysis.theorems.trend import stays_bounded, trend

KKT_NOISE = 1e-9
"""KKT residuals below this, relative to the scaled weights, are the solver's tolerance; of classes
those below the round-off of margins, where the run stays on the weights."""

SLOW = 100.0
"""Rates with corrections in log log T/log T are not denied before s is so many log n."""


def kkt_residual(facts: Facts) -> Claim:
    r"""$\varepsilon \to 0$."""
    return _kkt(
        facts,
        "kkt_residual",
        "KKT: residual",
        "epsilon = |W~ - sum_i lambda_i grad q_i(W~)| -> 0, W~ = W/min_i q_i^(1/L)",
        "epsilon",
        None,
    )


def kkt_slackness(facts: Facts) -> Claim:
    r"""$\delta \to 0$.

    With $p_i \le 2e^{-(q_i - q_{\min})}$ the normalised slopes and
    $\lVert\sum_i p_i\nabla q_i\rVert \ge L q_{\min}/\lVert W\rVert$,
    $\delta \le 2\lVert\tilde W\rVert^2/(eL\,q_{\min})$ at every time; below that it may rise.
    """
    return _kkt(
        facts,
        "kkt_slackness",
        "KKT: slackness",
        "delta = max_i lambda_i (q_i(W~) - 1) -> 0: only points on the margin pull",
        "delta",
        -1.0,
    )


def _kkt(
    facts: Facts, variable: str, name: str, statement: str, quantity: str, law: float | None
) -> Claim:
    if variable not in facts.record:  # it is newer than some records
        values = np.full(len(facts.s), math.nan)
    else:
        values = facts[variable]
    known = np.isfinite(values)
    noise = max(KKT_NOISE, float(np.finfo(float).eps * facts.s[-1]) if facts.of_classes else 0.0)
    found = trend(facts.log_s, values, floor=noise * max(1.0, _scaled_size(facts)))
    if found.tends is False and variable == "kkt_slackness" and values[-1] <= _slackest(facts):
        found = found._replace(
            tends=True, reason="it is below 2 |W~|^2/(e L min q), which tends to zero"
        )
    return limit_claim(
        name,
        statement,
        LYU_LI,
        quantity,
        float(values[-1]),
        "0",
        found,
        facts.tail_obstacles
        if np.any(known)
        else [*facts.tail_obstacles, "the data are separated at no saved point"],
        law=law,
        early=_too_early(facts) or _far_off(facts),
    )


def _scaled_size(facts: Facts) -> float:
    r"""$\lVert\tilde W\rVert$ in the limit."""
    return math.sqrt(facts.depth) * facts.max_margin ** (-1 / facts.depth)


def _slackest(facts: Facts) -> float:
    r"""The bound on $\delta$ at the last saved point."""
    smallest = float(facts["margin"][-1] * np.linalg.norm(facts["end_to_end"][-1]))
    squared = float(np.sum(facts["frobenius_norm"][-1] ** 2)) / smallest ** (2 / facts.depth)
    return 2 * squared / (math.e * facts.depth * smallest)


def _far_off(facts: Facts) -> str | None:
    """Why the KKT conditions cannot be denied yet: the direction is still another one."""
    if facts.of_classes:
        return (
            "no rate is known for several outputs, whose singular values may go on changing like "
            "a small power of s or its logarithm, so that a slow approach denies nothing"
        )
    error = float(facts["direction_error"][-1])
    if error <= NEAR:
        return None
    return f"it is too early to tell: the direction is still off by {error:.2g}, above {NEAR:g}"


def loss_rate(facts: Facts) -> Claim:
    r"""$\mathcal L = \Theta(1/(T(\log T)^{2-2/L}))$, with its constant."""
    depth, last = facts.depth, last_with_time(facts)
    log_time = facts["log_time"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_slope = math.log(depth) + 2 / depth * np.log(facts.max_margin)
        log_slope = log_slope + (2 - 2 / depth) * np.log(np.where(log_time > 0, log_time, np.nan))
        ratio = np.exp(facts.log_risk + log_time + log_slope)
    return _ratio(
        facts,
        "rate of the loss",
        "R = Theta(1/(T (log T)^(2 - 2/L))); the constant is 1/(L gamma^(2/L))",
        "R L gamma^(2/L) T (log T)^(2-2/L)",
        ratio,
        last,
        LYU_LI,
    )


def norm_rate(facts: Facts) -> Claim:
    r"""$\lVert W_k\rVert_F = \Theta((\log T)^{1/L})$, with its constant."""
    depth = facts.depth
    log_time = facts["log_time"]
    with np.errstate(divide="ignore", invalid="ignore"):
        law = (np.where(log_time > 0, log_time, np.nan) / facts.max_margin) ** (1 / depth)
        ratios = facts["frobenius_norm"] / law[:, None]
    last = len(log_time) - 1
    worst = int(np.argmax(np.abs(np.nan_to_num(ratios[last], nan=1.0) - 1)))
    return _ratio(
        facts,
        "rate of the norms",
        "|W_k|_F = Theta((log T)^(1/L)); the constant is gamma^(-1/L)",
        "|W_k|_F (gamma/log T)^(1/L), worst k",
        ratios[:, worst],
        last,
        LYU_LI,
    )


def _ratio(
    facts: Facts,
    name: str,
    statement: str,
    quantity: str,
    ratio: np.ndarray,
    last: int,
    source: str,
) -> Claim:
    """A ratio that tends to one, slowly: its next order is log log T/log T."""
    return limit_claim(
        name,
        statement,
        f"{source}; the constants are gflow's",
        quantity,
        float(ratio[last]),
        "1",
        trend(facts.log_s[: last + 1], (ratio - 1)[: last + 1], floor=TIME_LAW_FLOOR),
        [*facts.tail_obstacles, *time_obstacles(facts, last)],
        early=_too_early(facts),
    )


def _too_early(facts: Facts) -> str | None:
    """Why a rate whose next order is log log T/log T cannot be denied yet."""
    late = SLOW * max(1.0, math.log(int(facts.record.attrs["num_points"])))
    if facts.s[-1] >= late:
        return None
    return (
        f"it is too early to tell: s = {facts.s[-1]:.4g} is below {late:.4g}, {SLOW:g} log n, and "
        "the next order is log log T/log T"
    )


def residual_vector(facts: Facts) -> Claim:
    r"""$w - \hat w\log T \to \tilde w$ for one layer."""
    obstacles = list(facts.tail_obstacles)
    if facts.depth > 1:
        obstacles.insert(0, "it is a statement about one layer")
    last = last_with_time(facts)
    apart = np.full(len(facts.s), math.nan)
    if not obstacles:
        try:
            apart = np.linalg.norm(_residual(facts) - limit_vector(facts), axis=1)
        except ValueError as error:
            obstacles.append(str(error))
        if not math.isfinite(apart[last]):
            obstacles.append("time has not begun")
    size = float(np.linalg.norm(facts["end_to_end"][last]))
    floor = max(LINEAR_FLOOR, 1e2 * facts.rtol) * max(size, 1.0)
    obstacles += time_obstacles(facts, last) if facts.depth == 1 else []
    return limit_claim(
        "residual vector",
        "w - (u/gamma) log T -> w~ with exp(-<w~, z_i>)/n = alpha_i, u/gamma = sum_S alpha_i z_i",
        SOUDRY,
        "|w - (u/gamma) log T - w~|",
        float(apart[last]),
        "0",
        trend(facts.log_s[: last + 1], apart[: last + 1], floor=floor),
        obstacles,
        early=facts.before_asymptotics,
    )


def _residual(facts: Facts) -> np.ndarray:
    toward = facts.direction / facts.max_margin
    with np.errstate(invalid="ignore"):  # log t starts at minus infinity
        return facts["end_to_end"] - facts["log_time"][:, None] * toward


def limit_vector(facts: Facts) -> np.ndarray:
    r"""Soudry's $\tilde w$ from the support vectors of a record.

    Raises:
        ValueError: when the support does not determine it.
    """
    law = limits_of_record(facts.record)
    if np.any(np.abs(law.free) > LINEAR_FLOOR):
        raise ValueError("the support vectors do not span the data, so that w~ depends on the path")
    if law.degenerate:
        raise ValueError("; ".join(law.degenerate))
    values = -np.log(law.num_points * law.dual / law.margin**2)
    return np.linalg.lstsq(facts["support_vectors"], values, rcond=1e-12)[0]


def margin_rate(facts: Facts) -> Claim:
    """The margin's gap is O(1/log T) for one layer."""
    gap = facts["margin_gap"]
    with np.errstate(invalid="ignore"):
        product = gap * np.where(facts.s > 0, facts.s, np.nan)
    found = stays_bounded(facts.log_s, product)
    if gap[-1] <= LINEAR_FLOOR * facts.max_margin:
        found = found._replace(tends=True, reason="the margin is exact to the record's accuracy")
    observed, reason = in_time(found, facts.before_asymptotics)
    spans = [] if facts.depth == 1 else ["it is a statement about one layer"]
    return claim(
        "margin's rate",
        "max margin - margin = O(1/log T)",
        SOUDRY,
        "(max margin - margin) s",
        float(product[-1]),
        "bounded",
        observed,
        reason,
        [*spans, *facts.tail_obstacles],
    )

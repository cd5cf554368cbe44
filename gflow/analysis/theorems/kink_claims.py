r"""The claims about networks with kinks, whose flow is located.

1. **Balance.** $\lVert W_k[j,:]\rVert^2 - \lVert W_{k+1}[:,j]\rVert^2$ of each neuron is conserved
   (Du, Hu and Lee, arXiv 1806.00900), through kinks and along them: a certificate of all of it.
2. **KKT.** For homogeneous networks Lyu and Li's residual tends to zero (arXiv 1906.05890). At
   saved points where $-\log R$ has grown tenfold it must have fallen.
3. **Law of time.** With $\lambda = -\log R$, degree L and the margin
   $\gamma = \min_iq_i/\lVert W\rVert^L$: where the weights point along $-\nabla R$,
   $\lVert\nabla\log R\rVert = L\lambda/\lVert W\rVert$, so that
   $$t\,R\,L^2\gamma^{2/L}\lambda^{2-2/L} \to 1,$$
   Lyu and Li's theorem 4.3 with its constant. Corrections are of order $1/\log$ of the terms in it.
4. **Margin from a small start.** Of two layers, ReLU on orthogonally separable data or leaky ReLU
   on symmetric data, the limit of $\gamma$ is known: ``gflow.problem.small_start`` has both.
   Corrections are of order $\log n/\lambda$: the relative distance has to be below twice that,
   or to vanish by its trend.
"""

import math
from math import nan
from typing import NamedTuple

import numpy as np

from gflow.analysis.theorems.claims import LYU_LI, Claim, claim
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.limit_claims import limit_claim
from gflow.analysis.theorems.trend import Trend, trend

DU = "Du, Hu and Lee, arXiv 1806.00900"

BALANCED = 1e-8
"""Relative drift that the flow may have, or ten times its tolerance."""

FAR, NEAR = 100.0, 10.0
"""Laws are judged where -log R is above the first; the deviation of the law of time may be so many
times log(-log R) / -log R."""


class Theorem(NamedTuple):
    """What is known of the margin from a small start."""

    statement: str
    source: str


OF_RELU = Theorem(
    "ReLU, orthogonally separable data: min_i q_i/|W|^2 -> 1/(2(1/gamma_+ + 1/gamma_-)), of the "
    "maximum margins of each class alone",
    "Phuong and Lampert, ICLR 2021",
)
OF_LEAKY = Theorem(
    "leaky ReLU, symmetric data: min_i q_i/|W|^2 -> (1 + slope) gamma/4, of the linear rule",
    "Lyu, Li, Wang and Arora, arXiv 2110.13905",
)


def balance(facts: Facts) -> Claim:
    """The balance of every neuron is conserved."""
    drift, allowed = float(np.max(facts["balance_drift"])), max(BALANCED, 10 * facts.rtol)
    return claim(
        "neurons stay balanced",
        "|W_k[j,:]|^2 - |W_k+1[:,j]|^2 of each neuron is conserved, through kinks and along them",
        DU,
        "largest change / |W|^2",
        drift,
        f"<= {allowed:.2g}",
        drift <= allowed,
        "the largest of all neurons and saved points",
        [],
    )


def kkt(facts: Facts) -> Claim:
    """The KKT residual tends to zero."""
    values = facts["kkt_residual"]
    late = np.flatnonzero(np.isfinite(values) & (facts.s > 0))
    value, falls = nan, None
    if len(late) and facts.s[late[-1]] >= FAR:
        earlier = late[facts.s[late] <= facts.s[late[-1]] / 10]
        value = float(values[late[-1]])
        if len(earlier):
            falls = bool(value < values[earlier[-1]])
    return claim(
        "KKT: residual",
        "epsilon = |W~ - sum_i lambda_i grad q_i(W~)| -> 0, W~ = W/min_i q_i^(1/L)",
        LYU_LI,
        "epsilon",
        value,
        "falling",
        falls,
        f"against the saved point where -log R was ten times smaller, from {FAR:g} on",
        facts.tail_obstacles,
    )


def time_law(facts: Facts) -> Claim:
    """The time, by the risk, with its constant."""
    degree, late = float(facts.record.attrs.get("homogeneity", nan)), facts.s >= FAR
    value, allowed, holds = nan, nan, None
    if late[-1] and math.isfinite(degree):
        s, margin = facts.s[-1], facts["margin"][-1]
        log_u = facts["log_time"][-1] + facts.log_risk[-1]
        found = log_u + 2 * math.log(degree) + 2 / degree * math.log(margin)
        found += (2 - 2 / degree) * math.log(s)
        value, allowed = abs(found), NEAR * math.log(s) / s
        holds = bool(value <= allowed)
    return claim(
        "law of time",
        "t R L^2 gamma^(2/L) (-log R)^(2 - 2/L) -> 1, gamma = min_i q_i/|W|^L",
        f"{LYU_LI}, theorem 4.3; the constant: where W points along -grad R",
        "|log of it|",
        value,
        f"<= {allowed:.2g}",
        holds,
        f"at the last saved point, from -log R = {FAR:g} on",
        facts.tail_obstacles,
    )


def small_start(facts: Facts) -> Claim:
    """The margin tends to that which the theorem for this slope says."""
    attrs = facts.record.attrs
    slope, limit = float(attrs["small_start_slope"]), float(attrs.get("small_start_margin", nan))
    theorem = OF_RELU if slope == 0.0 else OF_LEAKY
    gap, far = 1 - facts["margin"] / limit, bool(facts.s[-1] >= FAR)
    allowed = 2 * math.log(max(2, int(attrs["num_points"]))) / max(float(facts.s[-1]), 1.0)
    if not far:
        found = Trend(None, nan, nan, f"it is too early to tell: s is below {FAR:g}")
    elif abs(gap[-1]) <= allowed:
        found = Trend(True, nan, nan, f"it is within {allowed:.2g} of the limit, 2 log n/s")
    else:
        found = trend(facts.log_s, gap)
    obstacles = list(facts.tail_obstacles)
    if "small_start_obstacles" in attrs:
        obstacles.append(str(attrs["small_start_obstacles"]))
    return limit_claim(
        "margin from a small start",
        theorem.statement,
        theorem.source,
        "margin / limit - 1",
        float(-gap[-1]),
        "0",
        found,
        obstacles,
        early=facts.before_asymptotics,
    )


def of_kinks(facts: Facts) -> list[Claim]:
    """All of them that a record has the variables for."""
    rows = [balance(facts)] if "balance_drift" in facts.record else []
    if "kkt_residual" in facts.record and not facts.is_descent:
        rows += [kkt(facts), time_law(facts)]
    if "small_start_slope" in facts.record.attrs and not facts.is_descent:
        rows.append(small_start(facts))
    return rows

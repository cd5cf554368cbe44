"""The statements that hold at every time, one function a claim, checked at every saved point."""

import math
from itertools import pairwise

import numpy as np

from gflow.analysis.theorems.claims import LYU_LI, PAPER, Claim, claim
from gflow.analysis.theorems.facts import FLOW_DRIFT, ROUND_OFF, Facts

SMOOTHED_MARGIN_DROP = 1e-8
"""Relative decrease of the smoothed margin between saved points that is the solver's error."""


def risk_decreases(facts: Facts) -> Claim:
    """The risk never rises."""
    rises = np.diff(facts.log_risk) / np.maximum(1.0, np.abs(facts.log_risk[1:]))
    value = float(np.max(rises, initial=-math.inf)) if len(rises) else math.nan
    return claim(
        "risk decreases",
        "dR/dt = -|grad R|^2 <= 0 along the flow; descent with small enough steps too",
        PAPER,
        "largest relative change of log R",
        value,
        "<= 0 between saved points",
        None if not len(rises) else value <= ROUND_OFF,
        "there is one saved point" if not len(rises) else "compared at every saved point",
        facts.step_obstacles,
    )


def margin_bound(facts: Facts) -> Claim:
    """No margin is above the certified bound."""
    bound = float(facts.record.attrs.get("margin_upper_bound", math.nan))
    value = float(np.nanmax(facts["margin"])) if np.any(~np.isnan(facts["margin"])) else math.nan
    known = math.isfinite(bound) and math.isfinite(value)
    return claim(
        "margin below its bound",
        "no direction has a margin above the certified upper bound",
        "duality",
        "largest margin",
        value,
        f"<= {bound:.10g}",
        value <= bound + 1e-14 * max(1.0, abs(bound)) if known else None,
        "compared at every saved point" if known else "the record has no bound",
    )


def smoothed_margin(facts: Facts) -> Claim:
    r"""The smoothed margin never falls once the summed loss is below $\ell(0)$."""
    below = facts.log_total < facts.log_risk_at_zero
    values = facts["smoothed_margin"]
    # Lyu and Li's proof needs -q l'(q)/l(q) to grow for q > 0, as it does for all three losses, and
    # every margin to be positive, which the level ensures.
    pairs = below[:-1] & below[1:]
    growth = (np.diff(values) / np.abs(values[1:]))[pairs]
    known = len(growth) > 0
    value = float(np.min(growth)) if known else math.nan
    small = ", proved for small steps only" if facts.is_descent else ""
    return claim(
        "smoothed margin grows",
        "l^-1(sum l(q_i)) / prod_k |W_k|_F never decreases once sum l(q_i) < l(0)" + small,
        LYU_LI,
        "smallest relative growth",
        value,
        ">= 0 between saved points",
        value >= -SMOOTHED_MARGIN_DROP if known else None,
        "compared wherever the summed loss is below l(0)"
        if known
        else "no two saved points have a summed loss below l(0)",
        facts.step_obstacles,
    )


def imbalance(facts: Facts) -> Claim:
    """The imbalance is conserved by the flow, and drifts within its budget in descent."""
    relative = facts["imbalance_drift"]
    if not facts.is_descent:
        value = float(np.nanmax(relative))
        return claim(
            "imbalance is conserved",
            "W_{k+1}^T W_{k+1} - W_k W_k^T does not change along the flow",
            PAPER,
            "largest relative drift",
            value,
            f"<= {FLOW_DRIFT:g}, of max |W_k|_F^2",
            value <= FLOW_DRIFT,
            "a drift is the solver's error: tighten `rtol`"
            if value > FLOW_DRIFT
            else "compared at every saved point",
            facts.one_layer,
        )
    drift = relative * facts.largest_square
    part = drift / (facts.budget + facts.allowance)
    at = int(np.nanargmax(part))
    holds = bool(part[at] <= 1)
    return claim(
        "imbalance drifts little",
        "|W_{k+1}^T W_{k+1} - W_k W_k^T| changes by at most sum eta^2 |grad R|^2 under descent",
        PAPER,
        "drift",
        float(drift[at]),
        f"<= {facts.budget[at]:.4g}, the error budget",
        holds,
        "compared at every saved point"
        if holds
        else "some step breaks the descent inequality, or steps vary between saved points",
        [*facts.one_layer, *facts.budget_obstacles],
    )


def lemma_rank_one(facts: Facts) -> Claim:
    """Lemma 2 (i): how far a layer may be from rank one."""
    bound = facts.constant + 2 * facts.budget
    slack = bound - np.max(facts.tails, axis=1)
    return _slack_claim(
        "Lemma 2: rank one",
        "|W_k|_F^2 - |W_k|_2^2 <= D at every time",
        facts,
        slack,
        2,
    )


def lemma_alignment(facts: Facts) -> Claim:
    """Lemma 2 (ii): how far neighbouring layers may be from aligned."""
    if facts.depth == 1:
        slack = np.full(len(facts.log_risk), math.nan)
    else:
        squares = [float(np.linalg.norm(matrix, 2)) ** 2 for matrix in facts.start]
        constants = np.array([a + b for a, b in pairwise(squares)]) + facts.constant
        gap = facts["misalignment"]
        lost = gap * (2 - gap) * facts["spectral_norm"][:, 1:] ** 2
        # Undefined singular vectors (a zero layer, a tie) have nothing to compare.
        slack = np.min(
            np.where(np.isnan(lost), np.inf, constants - lost) + 3 * facts.budget[:, None], axis=1
        )
    return _slack_claim(
        "Lemma 2: alignment",
        "(1 - <v_{k+1}, u_k>^2) |W_{k+1}|_2^2 <= D + |W_{k+1}(0)|_2^2 + |W_k(0)|_2^2 at every time",
        facts,
        slack,
        3,
    )


def _slack_claim(name: str, statement: str, facts: Facts, slack: np.ndarray, times: int) -> Claim:
    if np.all(np.isnan(slack)):
        worst_at, holds = 0, None
    else:
        worst_at = int(np.nanargmin(slack + facts.allowance))
        holds = bool(slack[worst_at] + facts.allowance[worst_at] >= 0)
    enlarged = f", D enlarged by {times} budgets" if facts.is_descent else ""
    budget = f" and the error budget at most {facts.budget[-1]:.4g}" if facts.is_descent else ""
    return claim(
        name,
        statement + enlarged,
        PAPER,
        "smallest slack",
        float(slack[worst_at]),
        ">= 0 at every saved point",
        holds,
        f"D = {facts.constant:.4g}{budget}",
        [*facts.one_layer, *facts.budget_obstacles],
    )

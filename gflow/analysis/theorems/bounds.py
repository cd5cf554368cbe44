"""The statements that hold at every time, one function a claim, checked at every saved point."""

import math

import numpy as np

from gflow.analysis.theorems.claims import LYU_LI, PAPER, Claim, claim
from gflow.analysis.theorems.facts import ROUND_OFF, Facts

SMOOTHED_MARGIN_DROP = 1e-8
"""Relative decrease of the smoothed margin between saved points that is the solver's error, or ten
times its tolerance."""

ENERGY_DEFECT = 1e-7
"""Largest defect of the energy identity that is the solver's error, or a thousand tolerances."""

LARGEST_HULL = 7
"""Convex hulls are formed up to this dimension."""


def risk_decreases(facts: Facts) -> Claim:
    """The risk never rises."""
    # Where residuals are round-off the risk is too.
    seen = np.maximum(facts.log_risk, float(facts.record.attrs.get("round_off_log_risk", -np.inf)))
    rises = np.diff(seen) / np.maximum(1.0, np.abs(seen[1:]))
    value = float(np.max(rises, initial=-math.inf)) if len(rises) else math.nan
    return claim(
        "risk decreases",
        "dR/dt = -|grad R|^2 <= 0 along the flow; descent with small enough steps too",
        PAPER,
        "largest relative change of log R",
        value,
        f"<= {ROUND_OFF if 0 < value <= ROUND_OFF else 0:g} between saved points",
        None if not len(rises) else value <= ROUND_OFF,
        "there is one saved point" if not len(rises) else "compared at every saved point",
        facts.step_obstacles,
    )


def energy_identity(facts: Facts) -> Claim:
    r"""$\log R(0) - \log R = \int\mu\lVert\nabla\log R\rVert^2 ds$ along the flow."""
    known = "clock_error" in facts.record
    value = float(np.max(facts["clock_error"])) if known else math.nan
    allowed = max(ENERGY_DEFECT, 1e3 * facts.rtol)
    return claim(
        "energy identity",
        "R(0) - R(t) = int |grad R|^2 along the flow, in the log domain",
        PAPER,
        "largest relative defect",
        value,
        f"<= {allowed:.2g}, the solver's error",
        value <= allowed if known else None,
        "log R by the weights and by the clock, compared at every saved point"
        if known
        else "the record has no clock to compare with",
        ["descent has the inequality of its steps instead"] if facts.is_descent else [],
    )


def lemma_pull(facts: Facts) -> Claim:
    """Lemmas 3 and 4: what is off the best direction is pulled back wherever it is large."""
    obstacles = list(facts.tail_obstacles)
    alpha, reason = least_pull(facts) if not obstacles else (math.nan, "")
    if reason:
        obstacles.append(reason)
    if "perpendicular_cosine" not in facts.record:
        obstacles.append("the record has no such cosine")
    radius = facts.pull_radius / alpha
    if math.isnan(facts.pull_radius):
        obstacles.append(f"the lemma is about exponential and logistic loss, not {facts.loss}")
    w, direction = facts["end_to_end"], facts.direction
    along = w @ direction
    size = np.linalg.norm(w - along[:, None] * direction, axis=1)
    applies = (along >= 0) & (size > radius)
    value = math.nan
    if np.any(applies) and "perpendicular_cosine" in facts.record:
        value = float(np.min(facts["perpendicular_cosine"][applies]))
    if not np.any(applies) and not obstacles:
        obstacles.append(
            f"|P w| stays at most {np.max(size):.3g}, within the radius {radius:.3g} of Lemma 4, "
            f"with alpha = {alpha:.3g} > 0 of Lemma 3"
        )
    return claim(
        "Lemma 4: pull",
        "<P w, grad R(w)> >= 0 where <w, u> >= 0 and |P w| > (1 + ln n)/alpha (exponential) or "
        "2n/(e alpha) (logistic); P off u, alpha = min max_S <xi, z_i> > 0 over unit xi off u "
        "(Lemma 3)",
        PAPER,
        "smallest cosine",
        value,
        ">= 0 where it applies",
        value >= -ROUND_OFF if math.isfinite(value) else None,
        f"at {np.count_nonzero(applies)} saved points, with alpha = {alpha:.3g}, radius "
        f"{radius:.3g}",
        obstacles,
    )


def least_pull(facts: Facts) -> tuple[float, str]:
    r"""Lemma 3's $\alpha = \min_{|\xi|=1,\ \xi\perp\bar u}\max_{i\in S}\langle\xi, z_i\rangle$.

    The radius of the largest ball around zero in the convex hull of the support vectors off
    $\bar u$: for a simplex the least of its barycentric weights of zero over their gradients.

    Returns:
        $\alpha$ and "", or NaN and why it is not known.
    """
    if "support_vectors" not in facts.record:
        return math.nan, "the record has no support vectors"
    points = facts["support_vectors"]
    points = points - np.outer(points @ facts.direction, facts.direction)
    _, sizes, basis = np.linalg.svd(points, full_matrices=False)
    rank = int(np.sum(sizes > 1e-10 * max(float(sizes[0]), 1e-300))) if len(sizes) else 0
    if rank < points.shape[1] - 1:
        return math.nan, "the support vectors do not span R^d, as Lemma 3 assumes"
    if rank == 0:
        return math.nan, "in one dimension nothing is off the direction"
    points = points @ basis[:rank].T
    if rank == 1:
        return float(min(points.max(), -points.min())), ""
    if len(points) == rank + 1:
        system = np.linalg.inv(np.vstack([points.T, np.ones(len(points))]))
        # Row i holds the gradient of the i-th barycentric coordinate and its value at zero.
        return float(np.min(system[:, -1] / np.linalg.norm(system[:, :-1], axis=1))), ""
    if rank > LARGEST_HULL:
        return math.nan, f"alpha of {len(points)} points in {rank} dimensions is not worked out"
    from scipy.spatial import ConvexHull, QhullError

    try:
        hull = ConvexHull(points)
    except QhullError as error:
        return math.nan, f"the hull of the support vectors is degenerate ({error})"
    return float(np.min(-hull.equations[:, -1])), ""


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
    grows = value >= -max(SMOOTHED_MARGIN_DROP, 10 * facts.rtol) if known else None
    if not known:
        reason = "no two saved points have a summed loss below l(0)"
    elif facts.is_descent and not grows:  # a record does not tell whether steps are small
        grows, reason = None, "it falls, which with steps that are not small it may"
    else:
        reason = "compared wherever the summed loss is below l(0)"
    return claim(
        "smoothed margin grows",
        "l^-1(sum l(q_i)) / prod_k |W_k|_F never decreases once sum l(q_i) < l(0)" + small,
        LYU_LI,
        "smallest relative growth",
        value,
        ">= 0 between saved points",
        grows,
        reason,
        facts.step_obstacles,
    )


def imbalance(facts: Facts) -> Claim:
    """The imbalance is conserved by the flow, and drifts within its budget in descent."""
    relative = facts["imbalance_drift"]
    if not facts.is_descent:
        # Near a saddle the layers shrink, and what has been lost to rounding before does not.
        largest = np.maximum.accumulate(facts.largest_square)
        part = facts.largest_square / np.where(largest > 0, largest, 1.0)
        value = float(np.nanmax(relative * part))
        return claim(
            "imbalance is conserved",
            "W_{k+1}^T W_{k+1} - W_k W_k^T does not change along the flow",
            PAPER,
            "largest relative drift",
            value,
            f"<= {facts.flow_drift:g}, of max |W_k|_F^2",
            value <= facts.flow_drift,
            "a drift is the solver's error: tighten `rtol`"
            if value > facts.flow_drift
            else "compared at every saved point",
            facts.one_layer,
        )
    drift = relative * facts.largest_square
    part = drift / (facts.budget + facts.allowance)
    at = int(np.nanargmax(part))
    holds = bool(part[at] <= 1)
    if holds:
        reason = "compared at every saved point"
    elif facts.varying_steps:
        reason = "the step size varies between saved points, so that the budget is not known"
    else:
        reason = "some step breaks the descent inequality"
    return claim(
        "imbalance drifts little",
        "|W_{k+1}^T W_{k+1} - W_k W_k^T| changes by at most sum eta^2 |grad R|^2 under descent",
        PAPER,
        "drift",
        float(drift[at]),
        f"<= {facts.budget[at]:.4g}, the error budget",
        holds or (None if facts.varying_steps else False),
        reason,
        [*facts.one_layer, *facts.budget_obstacles],
    )


def lemma_rank_one(facts: Facts) -> Claim:
    """Lemma 2 (i): how far a layer may be from rank one."""
    slack = np.min(facts.slacks[0], axis=1) + 2 * facts.budget
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
        # Undefined singular vectors (a zero layer, a tie) have nothing to compare.
        defined = np.where(np.isnan(facts.slacks[1]), np.inf, facts.slacks[1])
        slack = np.min(defined, axis=1) + 3 * facts.budget
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

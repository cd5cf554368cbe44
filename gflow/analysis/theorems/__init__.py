r"""The statements about gradient flow and descent on separable data, held against a record.

Sources, cited by content since their numbering differs between versions: Ji and Telgarsky (arXiv
1810.02032), Lyu and Li (1906.05890), Soudry et al. (1710.10345). With $s = -\log R$, widths
$d_0 … d_L$, $\gamma$ the maximum margin and $\bar u$ its direction:

1. Limits ($R \to 0$, $\lVert W_k\rVert_F \to \infty$, rank one, alignment, $w \parallel v_1$,
   $w \parallel \bar u$, the margin, the law of time) are judged by their trend over the last
   decade of $s$ (of $t$ for the risk) as ``gflow.analysis.trend`` says: the distance to the limit
   falls, and extrapolates to at most half of its last value; or it is below what the record
   resolves. For the direction and the margin, which may rest on the way, it is also enough that
   they are within 10 % and fell at least like $1/s$ over that decade; for the law of time, that it
   is met to within one per cent or twice its next order $(2 - 2/L)/s$.
   Statements about every layer are judged by the worst layer at each point. "holds" is evidence at
   the record's horizon, not proof; "fails" says that the record speaks against the limit. It is
   said only once every margin must be positive, $\sum_i \ell(q_i) < \ell(0)$, and for direction,
   margin and rates once $s \ge 10 \log n$; before, such a claim is not applicable: too early.
2. Statements that hold at every time (monotone risk, imbalance, Lemma 2, smoothed margin, margin
   below its bound) are checked at every saved point, up to the stated allowance for round-off and
   the solver's error.
3. A claim is not applicable when one of its assumptions fails; its value is given all the same.
   $R(W(0)) \le R(0)$ may be met late: the flow is autonomous, so any point with $R \le R(0)$ is
   an admissible start (there $\nabla R \ne 0$ by convexity unless $R = R(0)$).

4. The sharp laws give limits their rates and constants; how they are judged, and predicted from
   the record's own weights and support vectors, is in ``gflow.analysis.theorems.sharp``. They
   are rows of a flow only: descent does not conserve the matrices that fix the constants.

Of networks with kinks see ``gflow.analysis.theorems.kink_claims``.

Of several classes the statements are others: ``gflow.analysis.theorems.class_claims``; of targets
``gflow.analysis.theorems.target_claims``.

What Lemma 2 becomes for descent is derived in ``gflow.analysis.theorems.facts``.
"""

from typing import TYPE_CHECKING

import numpy as np

from gflow.analysis.theorems import bounds, class_claims, limit_claims, rates, target_claims
from gflow.analysis.theorems.claims import Claim as Claim, Claims as Claims
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.kink_claims import of_kinks
from gflow.analysis.theorems.sharp import sharp_laws
from gflow.problem import settings

if TYPE_CHECKING:
    import xarray as xr


@settings.own()
def verify(record: "xr.Dataset") -> Claims:
    r"""Hold every claim of the theory against a record of flow or descent.

    The criteria are at the top of ``gflow.analysis.theorems``.

    Args:
        record: what ``gradient_flow``, ``gradient_descent`` or ``gflow.load`` returned, or any part
            of it along ``point``.

    Returns:
        A table: print it, show it in a notebook, iterate over its rows, or look one up by name,
        ``verify(record)["layers align"].holds``. Each row has ``value``, what it is held against,
        a ``verdict`` ("holds", "fails" or "not applicable") and why.

    Raises:
        ValueError: when ``record`` is not a gflow record or has no saved point.
    """
    facts = Facts(_checked(record))
    rows = [bounds.risk_decreases(facts), bounds.energy_identity(facts)]
    located = "num_kinks" in facts.record
    if facts.of_targets:
        rows += of_kinks(facts) if located else []
        return Claims(rows + _of_targets(facts), facts.title)
    rows.append(limit_claims.risk_vanishes(facts))
    if facts.of_classes:
        rows += of_kinks(facts) if located else []
        return Claims(rows + _of_classes(facts), facts.title)
    if facts.deep_linear:
        rows += [
            limit_claims.norms_grow(facts),
            *(limit_claims.vanishes(facts, row) for row in limit_claims.VANISHING),
            bounds.margin_bound(facts),
            bounds.imbalance(facts),
            bounds.lemma_rank_one(facts),
            bounds.lemma_alignment(facts),
            bounds.lemma_pull(facts),
        ]
    if "smoothed_margin" in facts.record:
        rows.append(bounds.smoothed_margin(facts))
    if located:
        rows += of_kinks(facts)
    if facts.deep_linear:
        rows += [
            rates.kkt_residual(facts),
            rates.kkt_slackness(facts),
            rates.loss_rate(facts),
            rates.norm_rate(facts),
            limit_claims.time_law(facts),
            limit_claims.direction_rate(facts),
            rates.margin_rate(facts),
            rates.residual_vector(facts),
        ]
        if not facts.is_descent:
            rows += sharp_laws(facts)
    return Claims(rows, facts.title)


def _of_targets(facts: Facts) -> list[Claim]:
    """The claims about targets."""
    if not facts.deep_linear:
        return []
    return [
        bounds.imbalance(facts),
        target_claims.convergence_rate(facts),
        target_claims.saddle_times(facts),
        target_claims.nuclear_norm(facts),
    ]


def _of_classes(facts: Facts) -> list[Claim]:
    """The claims about several classes."""
    rows = []
    if facts.deep_linear:
        rows += [
            limit_claims.norms_grow(facts),
            class_claims.ranks_fall(facts),
            class_claims.subspaces_align(facts),
            class_claims.by_shares(facts, class_claims.limit_norm),
            class_claims.classes_collapse(facts),
            bounds.margin_bound(facts),
            bounds.imbalance(facts),
            class_claims.outputs_conserved(facts),
            class_claims.lemma_rank(facts),
            class_claims.lemma_values(facts),
            class_claims.lemma_subspaces(facts),
        ]
    if "smoothed_margin" in facts.record:
        rows.append(bounds.smoothed_margin(facts))
    if facts.deep_linear:
        rows += [
            class_claims.by_shares(facts, rates.kkt_residual),
            class_claims.by_shares(facts, rates.kkt_slackness),
            class_claims.time_law(facts),
        ]
    return rows


def _checked(record: "xr.Dataset") -> "xr.Dataset":
    attrs = getattr(record, "attrs", None)
    if not isinstance(attrs, dict) or "log_risk" not in record or "kind" not in attrs:
        raise ValueError(
            f"`record` is a {type(record).__name__} without the variables of a gflow record; "
            "expected what `gflow.gradient_flow`, `gflow.gradient_descent` or `gflow.load` returns."
        )
    if record["log_risk"].dims != ("point",) or record.sizes["point"] == 0:
        raise ValueError(
            "`record` has no dimension `point` or no saved point; expected at least one. Select "
            "points with a slice or a list, `record.isel(point=[-1])`, not with a number."
        )
    finite = np.isfinite(record["log_risk"].values)
    if not np.any(finite):
        raise ValueError(
            "`record` has no saved point with a finite risk; there is nothing to verify."
        )
    return record.isel(point=finite)

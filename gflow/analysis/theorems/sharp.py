r"""The asymptotic laws with their constants, held against the last saved point of a flow.

The law of time is held against the last point at which $\log t$, of size s, has digits left.

Prediction: the conserved matrices of the record's first weights, the vectors between the layers
from its last weights, the support vectors from its data (``gflow.analysis.laws``). The laws are
series in $\varepsilon = \max_k\lVert D_k\rVert_2/\lVert w\rVert^{2/L}$ of which the first two terms
are known, so that a law *holds* when it deviates by at most $10\,\varepsilon^{3/2}$, relative to
the largest of the layers, the digits that the solver's tolerance leaves, and for the direction
ten times the square of its own next-order term. Before $\varepsilon$ is small, or while a point
off the margin may have weight, it is too early to deny a law.
"""

import math
from collections.abc import Sequence

import numpy as np

from gflow.analysis.law_constants import limits_of_record
from gflow.analysis.laws import Limits
from gflow.analysis.theorems.claims import Claim, claim
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.limit_claims import LAST_TIME

SOURCE = "gflow, docs/asymptotics.md"

DIGITS = 1e-4
"""What a law may miss at any horizon, for tolerances up to 1e-8; $10^4$ tolerances for others."""

SMALL = 0.03
r"""The $\varepsilon$ up to which a deviation speaks against a law."""

NEXT = 10.0
"""The terms left out of a law are at most so many times their power of the small parameter."""

RESOLUTION = 1e-14
"""Absolute error of a direction error or an angle read off float64 weights."""

LEAST = {"rank_one_gap": 1e-8, "misalignment": 1e-20}
"""Parts of the largest over the layers: less is lost in the rounding and the drift of the conserved
matrices, of whose entries the small ones are differences."""


def sharp_laws(facts: Facts) -> list[Claim]:
    """Every law with its constant, as a row; not applicable to descent, which has no such D."""
    laws = _Laws(facts)
    return [
        laws.row(
            "rank one",
            "1 - |W_k|_2/|W_k|_F = r_k s^(-2/L) gamma^(2/L)/2 + ..., r_k = -sum_{j>=k} tr D_j - "
            "<u_j, D_j u_j>",
            "rank_one_gap",
            facts.one_layer,
        ),
        laws.row(
            "alignment",
            "1 - |<v_{k+1}, u_k>| = |(I - u_k u_k^T) D_k u_k|^2 (gamma/s)^(4/L)/2 + ...",
            "misalignment",
            facts.one_layer,
        ),
        laws.row(
            "direction",
            "|w/|w| - u| = gamma |b*|/s + ..., b* = argmin sum_S exp(-<b, z_i>) over the support; "
            "of order s^(-1/L) where the support does not span the data",
            "direction_error",
        ),
        laws.row(
            "norms",
            "|W_k|_2^2 = |w|^(2/L) + a_k + ..., a_{k+1} - a_k = <u_k, D_k u_k>, sum a_k = 0",
            "spectral_norm",
        ),
        laws.row(
            "time",
            "log t = s - log(gamma^2 |w|^2/|W_1|_2^2 + m^2 sum_{k>1} |W_k|_2^-2) + (2 - 2/L)/s",
            "log_time",
        ),
    ]


class _Laws:
    """The laws of one record and what keeps them from being applied."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.law: Limits | None = None
        self.obstacles = list(facts.tail_obstacles)
        if not facts.exponential_tail:
            return
        if facts.s[-1] < 1:
            self.obstacles.append("log R is above -1 at the last saved point")
            return
        try:
            self.law = limits_of_record(facts.record)
        except ValueError as error:
            self.obstacles.append(str(error))

    def row(self, name: str, statement: str, variable: str, trivial: Sequence[str] = ()) -> Claim:
        """One law against the last saved point that shows it."""
        obstacles = [*trivial, *self.obstacles]
        value, bound, observed, reason = math.nan, math.nan, None, "it has no prediction"
        if self.law is not None and not trivial:
            at = self._last(variable)
            if at is None:
                reason = f"no saved point with s up to {LAST_TIME:g}, where log t has digits left"
            else:
                point = _Point(self.facts, self.law, at)
                obstacles += point.degenerate(variable)
                value, bound = point.deviation(variable)
                observed, reason = point.verdict(value, bound)
        return claim(
            f"sharp law: {name}",
            statement,
            SOURCE,
            "|found - law|" if variable == "log_time" else "largest |found/law - 1|",
            value,
            f"<= {bound:.2g}" if math.isfinite(bound) else "the law",
            observed,
            reason,
            obstacles,
        )

    def _last(self, variable: str) -> int | None:
        s = self.facts.s
        if variable != "log_time":
            return len(s) - 1
        shown = np.flatnonzero((s >= 1) & (s <= LAST_TIME))
        return int(shown[-1]) if len(shown) else None


class _Point:
    """The laws and the record at one saved point."""

    def __init__(self, facts: Facts, law: Limits, at: int):
        self.facts, self.law, self.at = facts, law, at
        self.s = float(facts.s[at])
        self.predicted = law.predict(-self.s)

    def deviation(self, variable: str) -> tuple[float, float]:
        """How far the record is from the law and may be, where that is most of what it may be.

        Relative deviations; of the log time the absolute one.
        """
        found = np.atleast_1d(self.facts[variable][self.at])
        law = np.atleast_1d(self.predicted[variable])
        size = np.ones(1) if variable == "log_time" else np.maximum(np.abs(found), np.abs(law))
        if not np.all(np.isfinite(size)) or not np.any(size > 0):
            return math.nan, math.nan
        part = size / np.max(size)  # of the largest over the layers, or the pairs
        there = part > LEAST.get(variable, 0.0)
        value = np.abs(found - law)[there] / size[there]
        # An angle is the square root of a misalignment.
        bound = self._bound(variable, part[there] ** (0.5 if variable == "misalignment" else 1.0))
        worst = int(np.argmax(value / bound))
        return float(value[worst]), float(bound[worst])

    def _bound(self, variable: str, part: np.ndarray) -> np.ndarray:
        """What the terms left out of a law, tolerances and float64 make of each component."""
        rtol = float(self.facts.record.attrs.get("rtol", 0.0))
        small = NEXT * self.law.expansion(-self.s) ** 1.5
        allowed = max(DIGITS, 1e4 * rtol) + (small + 1e3 * rtol) / part
        if variable == "log_time":
            return allowed + NEXT / self.s**2
        if variable == "direction_error":
            w = self.law.product(-self.s)
            moved = np.linalg.norm(w.tangent - self.law.tangent)
            size = np.hypot(np.linalg.norm(w.tangent), np.linalg.norm(w.outside))
            allowed = allowed + NEXT * float(moved / max(size, 1e-300)) ** 2
        if not self._split() and variable in ("direction_error", "misalignment"):
            size = float(np.max(np.atleast_1d(self.predicted[variable])))
            angle = size if variable == "direction_error" else math.sqrt(2 * size)
            allowed = allowed + 2 * RESOLUTION / (part * max(angle, 1e-300))
        return allowed

    def verdict(self, value: float, bound: float) -> tuple[bool | None, str]:
        """Whether the law is met, and why."""
        if not math.isfinite(bound) or math.isnan(value):
            return None, "it is undefined at the last saved point"
        if value <= bound:
            return True, "compared with its next order"
        early = self._early()
        return (False, "compared with its next order") if early is None else (None, early)

    def degenerate(self, variable: str) -> list[str]:
        """Why a law says nothing about this flow."""
        if variable == "rank_one_gap" and not np.any(self.law.rank_one):
            return ["the start is balanced, so that every layer has rank one at all times"]
        if variable == "misalignment" and not np.any(self.predicted[variable]):
            return ["every D_k u_k is along u_k, so that neighbouring layers are always aligned"]
        if variable == "direction_error":
            if self.law.direction_error <= 1e-12:
                return ["b* = 0, as for symmetric data, so that the error is of higher order"]
            return list(self.law.degenerate)
        return []

    def _split(self) -> bool:
        record = self.facts.record
        return "beyond_hand_over" in record and bool(record["beyond_hand_over"].values[self.at])

    def _early(self) -> str | None:
        small = self.law.expansion(-self.s)
        if self.facts.before_asymptotics is not None:
            return self.facts.before_asymptotics
        if not small <= SMALL:
            return f"it is too early to tell: |D_k| is {small:.2g} of |w|^(2/L), above {SMALL:g}"
        if self.s < self.law.settled_from:
            return (
                "it is too early to tell: a point off the margin may have weight up to "
                f"s = {self.law.settled_from:.2g}"
            )
        return None

"""Claims: what a statement says, what a record shows, and whether the two agree."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gflow.analysis.table import Table

Verdict = Literal["holds", "fails", "not applicable"]

PAPER = "Ji and Telgarsky, arXiv 1810.02032"
LYU_LI = "Lyu and Li, arXiv 1906.05890"
SOUDRY = "Soudry et al., arXiv 1710.10345"

WIDTH = 100
"""Columns that the explanations are wrapped to."""


@dataclass(frozen=True)
class Claim:
    """One statement, held against one record.

    Attributes:
        name: a few words, unique in its table.
        statement: the statement as its source has it.
        source: where it is stated.
        quantity: what ``value`` is.
        value: the number that decides, at the last saved point or the worst one.
        bound_text: the bound or the trend it is held against.
        verdict: "holds", "fails" or "not applicable".
        why: what decided; for "not applicable" the assumption that fails.
    """

    name: str
    statement: str
    source: str
    quantity: str
    value: float
    bound_text: str
    verdict: Verdict
    why: str

    @property
    def holds(self) -> bool | None:
        """True or False, None where the claim is not applicable."""
        return {"holds": True, "fails": False, "not applicable": None}[self.verdict]

    @property
    def value_text(self) -> str:
        """The quantity and its value."""
        return f"{self.quantity} = {_number(self.value)}"


class Claims(Table[Claim]):
    """A table of claims: prints aligned, iterates over its rows, ``claims["name"]`` finds one."""

    header = ("claim", "value", "held against", "verdict")
    aside = ("why",)
    colours: ClassVar = {"holds": "#2a7d2a", "fails": "#b3261e", "not applicable": "#777777"}

    def cells(self, row: Claim) -> tuple[str, ...]:
        return row.name, row.value_text, row.bound_text, row.verdict, row.why

    def tip(self, row: Claim) -> str:
        return f"{row.statement} ({row.source})"

    @property
    def failed(self) -> "Claims":
        """The applicable claims that do not hold."""
        return Claims([row for row in self.rows if row.verdict == "fails"], self.title)

    @property
    def summary(self) -> str:
        """One line: how many of the applicable claims hold."""
        counted = [row for row in self.rows if row.verdict != "not applicable"]
        holding = sum(row.verdict == "holds" for row in counted)
        left = len(self.rows) - len(counted)
        more = f"; {left} not applicable" if left else ""
        return f"{holding} of {len(counted)} applicable claims hold{more}"

    @property
    def notes(self) -> list[str]:
        """What does not hold, and why."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.verdict != "holds":
                reasons.setdefault((row.verdict, row.why), []).append(row.name)
        return [
            textwrap.fill(
                f"{verdict}: {', '.join(names)}. Why: {why}.", WIDTH, subsequent_indent="    "
            )
            for (verdict, why), names in reasons.items()
        ]


def claim(
    name: str,
    statement: str,
    source: str,
    quantity: str,
    value: float,
    bound_text: str,
    observed: bool | None,
    reason: str,
    obstacles: Sequence[str] = (),
) -> Claim:
    """Put the observation and the assumptions together to a verdict."""
    verdict: Verdict
    if obstacles:
        verdict, why = "not applicable", "; ".join(obstacles)
        if observed:
            why += " (the record shows it all the same)"
    elif observed is None:
        verdict, why = "not applicable", reason
    else:
        verdict, why = ("holds" if observed else "fails"), reason
    return Claim(name, statement, source, quantity, value, bound_text, verdict, why)


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4g}"

"""Claims: what a statement says, what a record shows, and whether the two agree."""

import html
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

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


class Claims(Sequence[Claim]):
    """A table of claims: prints aligned, iterates over its rows, ``claims["name"]`` finds one."""

    def __init__(self, rows: Sequence[Claim], title: str = ""):
        self.rows = tuple(rows)
        self.title = title

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int | str) -> Claim: ...
    @overload
    def __getitem__(self, index: slice) -> "Claims": ...
    def __getitem__(self, index: int | str | slice) -> "Claim | Claims":
        if isinstance(index, slice):
            return Claims(self.rows[index], self.title)
        if isinstance(index, str):
            for row in self.rows:
                if row.name == index:
                    return row
            names = ", ".join(repr(row.name) for row in self.rows)
            raise KeyError(f"{index!r}; the claims are {names}")
        return self.rows[index]

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

    def __str__(self) -> str:
        table = [("claim", "value", "held against", "verdict")]
        table += [(r.name, r.value_text, r.bound_text, r.verdict) for r in self.rows]
        sizes = [max(len(cells[column]) for cells in table) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True)).rstrip()
            for cells in table
        ]
        lines.insert(1, "  ".join("-" * size for size in sizes))
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.verdict != "holds":
                reasons.setdefault((row.verdict, row.why), []).append(row.name)
        notes = [
            textwrap.fill(
                f"{verdict}: {', '.join(names)}. Why: {why}.", WIDTH, subsequent_indent="    "
            )
            for (verdict, why), names in reasons.items()
        ]
        head = [self.title, ""] if self.title else []
        return "\n".join([*head, *lines, "", self.summary, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colours = {"holds": "#2a7d2a", "fails": "#b3261e", "not applicable": "#777777"}
        rows = []
        for row in self.rows:
            cells = [row.name, row.value_text, row.bound_text]
            tip = html.escape(f"{row.statement} ({row.source})", quote=True)
            body = "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in cells)
            rows.append(
                f"<tr title='{tip}'>{body}<td style='text-align:left;color:{colours[row.verdict]}'>"
                f"{row.verdict}</td><td style='text-align:left'>{html.escape(row.why)}</td></tr>"
            )
        head = "".join(
            f"<th style='text-align:left'>{name}</th>"
            for name in ("claim", "value", "held against", "verdict", "why")
        )
        return (
            f"<table><caption>{html.escape(self.title)}<br>{self.summary}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


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

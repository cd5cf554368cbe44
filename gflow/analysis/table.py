"""Tables of results: rows that print aligned, as HTML in a notebook, and as Markdown."""

import abc
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar, overload

Row = TypeVar("Row")


class Table(Sequence[Row], Generic[Row]):
    """Rows of one kind: prints aligned, iterates over them, ``table["name"]`` finds one.

    A slice is a table again. A kind of table says its columns; what it may leave out is empty here.

    Attributes:
        header: the names of the columns.
        aside: the names of further columns, which only a notebook has room for.
        colours: of cells that hold just this text, in a notebook.
    """

    header: ClassVar[tuple[str, ...]]
    aside: ClassVar[tuple[str, ...]] = ()
    colours: ClassVar[Mapping[str, str]] = {}

    def __init__(self, rows: Sequence[Row], title: str = ""):
        self.rows = tuple(rows)
        self.title = title

    @abc.abstractmethod
    def cells(self, row: Row) -> Sequence[str]:
        """The texts of a row, one for each of ``header`` and ``aside``; the first is its name."""

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """One line that sums up."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines that explain, below the summary."""
        return ()

    def tip(self, row: Row) -> str:
        """What a notebook shows of a row under the mouse."""
        return ""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int | str) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Table[Row]": ...
    def __getitem__(self, index: int | str | slice) -> "Row | Table[Row]":
        if isinstance(index, slice):
            return type(self)(self.rows[index], self.title)
        if isinstance(index, str):
            named = {self.cells(row)[0]: row for row in self.rows}
            if index not in named:
                raise KeyError(f"{index!r}; the rows are {', '.join(map(repr, named))}")
            return named[index]
        return self.rows[index]

    def __str__(self) -> str:
        table = aligned(self.header, [self.cells(row)[: len(self.header)] for row in self.rows])
        head = [self.title, ""] if self.title else []
        return "\n".join([*head, table, "", self.summary, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th style='text-align:left'>{html.escape(name)}</th>"
            for name in (*self.header, *self.aside)
        )
        body = "".join(
            f"<tr title='{html.escape(self.tip(row), quote=True)}'>"
            f"{''.join(map(self._html_cell, self.cells(row)))}</tr>"
            for row in self.rows
        )
        caption = "<br>".join(html.escape(line) for line in (self.title, self.summary) if line)
        return (
            f"<table><caption>{caption}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _html_cell(self, text: str) -> str:
        colour = f";color:{self.colours[text]}" if text in self.colours else ""
        return f"<td style='text-align:left{colour}'>{html.escape(text)}</td>"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, columns aligned.

    >>> print(aligned(["claim", "holds"], [["risk decreases", "yes"]]))
    claim           holds
    --------------  -----
    risk decreases  yes
    """
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    dashes = ["-" * size for size in sizes]
    return "\n".join(line(cells, sizes) for cells in (header, dashes, *rows))


def line(cells: Sequence[str], sizes: Sequence[int]) -> str:
    """One line of such a table, its columns at least so wide."""
    return "  ".join(map(str.ljust, cells, sizes)).rstrip()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table in Markdown.

    >>> print(markdown(["claim", "value"], [["layers align", "|<v, u>|"]]))
    | claim | value |
    |---|---|
    | layers align | \|<v, u>\| |
    """

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([row(header), "|" + "---|" * len(header), *map(row, rows)])

"""Text tables of points: reading them, and saying where they are malformed."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped


class Table(NamedTuple):
    """The cells of a text table and where they stand in the file."""

    path: Path
    header: list[str] | None
    rows: list[list[str]]
    lines: list[int]
    """The line of the file that each row ends on, from 1."""

    def place(self, row: int, column: int) -> str:
        """Where a cell is, in words."""
        name = "" if self.header is None else f" ({self.header[column]!r})"
        return f"{self.path}, line {self.lines[row]}, column {column + 1}{name}"


def read(path: Path, delimiter: str) -> Table:
    """Read a table whose rows all have as many cells as its first.

    A first line without any number is the header; empty lines and lines starting with `#` are
    skipped.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    if len(delimiter) != 1:
        raise ValueError(f"`delimiter` is {delimiter!r}; expected one character.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                cells = [cell.strip() for cell in row]
                if not any(cells) or cells[0].startswith("#"):
                    continue
                rows.append(cells)
                lines.append(reader.line_num)
                if len(cells) != len(rows[0]):
                    raise ValueError(
                        f"{path}, line {lines[-1]}: it has {len(cells)} columns; expected "
                        f"{len(rows[0])}, as in line {lines[0]}. Is {delimiter!r} the right "
                        "`delimiter`?"
                    )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: byte {error.object[error.start]:#04x} is "
                "not UTF-8 text. Is it a text file?"
            ) from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}.") from error
    header = None
    if rows and not any(_is_number(cell) for cell in rows[0]):
        header, rows, lines = rows[0], rows[1:], lines[1:]
    if not rows:
        found = "nothing" if header is None else "only a header"
        raise ValueError(f"{path}: it holds {found}; expected one line a point.")
    return Table(path, header, rows, lines)


def position(table: Table, column: int | str) -> int:
    """The position of the label column, from its name or a position that may count from the end."""
    width = len(table.rows[0])
    if isinstance(column, str):
        if table.header is None:
            raise ValueError(
                f"`label_column` is {column!r} and {table.path} has no header line; expected a "
                f"position from 0 to {width - 1}."
            )
        if table.header.count(column) != 1:
            problem = "occurs more than once" if column in table.header else "does not occur"
            raise ValueError(
                f"`label_column` is {column!r}, which {problem} in the header of {table.path}; it "
                f"has {', '.join(map(repr, table.header))}."
            )
        return table.header.index(column)
    if not -width <= column < width:
        raise ValueError(
            f"`label_column` is {column}; expected a position from {-width} to {width - 1}: "
            f"{table.path} has {width} columns."
        )
    return column % width


def numbers(table: Table, columns: list[int]) -> Float[np.ndarray, "rows columns"]:
    """The given columns, all of which must be finite numbers."""
    text = [[row[j] for j in columns] for row in table.rows]
    try:
        values = np.array(text, dtype=np.float64)
    except ValueError:
        values = None
    if values is not None and np.isfinite(values).all():
        return values
    for i, row in enumerate(text):
        for j, cell in zip(columns, row, strict=True):
            if not (_is_number(cell) and np.isfinite(float(cell))):
                raise ValueError(
                    f"{table.place(i, j)}: got {cell!r}, expected a finite number. Encode or drop "
                    "a column of words; drop or impute a point with gaps."
                )
    return np.array([[float(cell) for cell in row] for row in text])


def signs(table: Table, column: int, positive: str | float | None) -> Float[np.ndarray, " rows"]:
    """The labels of a column: +1 where it is `positive`, else -1; without that, as they are."""
    labels = [row[column] for row in table.rows]
    if positive is not None:
        if all(_is_number(label) for label in labels) and _is_number(str(positive)):
            return one_against_rest(np.array([float(v) for v in labels]), float(positive))
        return one_against_rest(np.array(labels), str(positive))
    for i, label in enumerate(labels):
        if not (_is_number(label) and abs(float(label)) == 1.0):
            values = sorted(set(labels))
            shown = ", ".join(map(repr, values[:6])) + (", ..." if len(values) > 6 else "")
            raise ValueError(
                f"{table.place(i, column)}: the label is {label!r}, expected -1 or +1. The labels "
                f"are {shown}: say which one is +1, for example `positive={values[-1]!r}`, or "
                "choose another `label_column`."
            )
    return np.array([float(label) for label in labels])


def one_against_rest(
    labels: Shaped[np.ndarray, " points"], positive: str | float
) -> Float[np.ndarray, " points"]:
    """+1 where the label is `positive`, -1 elsewhere; both must occur."""
    hits = np.asarray(labels == positive)
    if hits.shape != labels.shape or not hits.any() or hits.all():
        values = np.unique(labels)
        shown = ", ".join(repr(v.item()) for v in values[:8]) + (", ..." if len(values) > 8 else "")
        raise ValueError(
            f"`positive` is {positive!r}; expected one of several labels. The labels are {shown}."
        )
    return np.where(hits, 1.0, -1.0)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

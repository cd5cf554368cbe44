"""Which cells of a text table are data: its header, its row numbers, and what is missing."""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

MISSING = {
    *("", "?", ".", "na", "n/a", "nan", "-nan", "null", "none", "nat", "<na>"),
    *("#n/a", "#n/a n/a", "#na", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
}
"""What tables have, in small letters, where there is no value: as pandas reads them, and UCI's
question mark and SAS's point."""

COUNTED = 5
"""Rows from which on a column that counts them is no accident."""

UNNAMED = re.compile(r"|Unnamed: ?\d+(\.\d+)*|\.\.\.\d+")
"""Names that row numbers have when they are written, or written again, without one."""

NUMBERING = re.compile(
    r"X(\.\d+)?|(?i:index|id|row|row_?(id|names?|numbers?)|level_0|no\.?|nr\.?|obs)"
)
"""Names of columns that number the rows, if they count them."""

Rows = Sequence[Sequence[str]]


class UnsureError(ValueError):
    """It cannot be told from the cells; the message says what of."""


def is_number(cell: str) -> bool:
    """Whether a cell is a number, NaN and infinity included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value."""
    return cell.lower() in MISSING


def has_header(rows: Rows, column: int | str, wanted: Collection[str] | None) -> bool:
    """Whether the first row names the columns.

    It does if one of its cells is a word above numbers, and no other a fraction or a label, or if
    none is a number. It may if its
    numbers run on as names do (0, 1, 2 as pandas counts columns, or 2019, 2020), and does then if
    the one above the labels can be no label and there are fractions below.

    Args:
        rows: the cells, all rows of one length.
        column: of the labels, by name or position.
        wanted: the labels that a point may have, as far as they are told; None for any number.

    Raises:
        UnsureError: when the first row may be either.
    """
    first, rest = rows[0], rows[1:]
    width = len(first)
    if column in first:
        return True
    if width == 1:
        return not is_number(first[0])
    label = column % width if isinstance(column, int) and -width <= column < width else width - 1
    columns = [[row[j] for row in rest if not is_missing(row[j])] for j in range(width)]
    of_numbers = [bool(cells) and all(map(is_number, cells)) for cells in columns]
    words = [not is_number(cell) and not is_missing(cell) for cell in first]
    values = [cell for cell in first if is_number(cell) and not is_missing(cell)]
    above, labels = first[label], set(columns[label])
    seen = _is_among(above, labels) or _is_among(above, wanted or ())
    if any(word and numbers for word, numbers in zip(words, of_numbers, strict=True)):
        if seen or any(float(value) < 0 or not float(value).is_integer() for value in values):
            raise UnsureError("has a word above numbers, and a number or label that is no name")
        return True
    features = [j for j in range(width) if j != label]
    if not any(is_number(first[j]) and not is_missing(first[j]) for j in features):
        if any(words[j] for j in features) or not rest:
            return not any(is_number(cell) for cell in values) and not (seen and rest)
        if words[label] and not seen:
            raise UnsureError("has no value in it but the last, which is no label further down")
        return False
    if not rest or any(words[j] for j in features) or is_missing(above):
        return False
    broken = _have_fractions(columns) and not _have_fractions([values])
    if not _runs_on(values, broken):
        if is_number(above) and labels and not any(map(is_number, labels)) and not seen:
            raise UnsureError("has a number where all other labels are words")
        return False
    if words[label]:
        if seen or len(labels) < 2:
            return False
        raise UnsureError("may be names of columns, or a point whose label no other point has")
    if seen or (of_numbers[label] and (wanted is None or not broken)):
        raise UnsureError("may be names of columns, or a point")
    return True


def row_numbers(rows: Rows, header: Sequence[str] | None, label: int, *, told: bool) -> list[int]:
    """The columns that number the rows, as pandas' `to_csv` and R's `write.csv` add them.

    They come first and have no name. Columns that count the rows under a name, or without a header,
    may be features.

    Args:
        rows: the cells without the header.
        header: the names of the columns, if there are any.
        label: the position of the labels.
        told: whether the caller said what the first row is, and so that the rest is data.

    Raises:
        UnsureError: when a column may be either.
    """
    found: list[int] = []
    width = len(rows[0])
    for j in range(width - 1):
        name = None if header is None else header[j]
        cells = [row[j] for row in rows]
        unnamed = name is not None and UNNAMED.fullmatch(name)
        if j == label:
            if unnamed and _counts(cells):
                raise UnsureError(
                    f"column {j + 1} has no name and numbers the rows, and is to hold the labels. "
                    "Choose another `label_column`"
                )
            break
        if unnamed:
            if not all(cell.isdecimal() for cell in cells) or len(set(cells)) < len(cells):
                raise UnsureError(
                    f"column {j + 1} has no name and does not number the rows. Give it a name if "
                    "it is a feature"
                )
            if width == 2 + len(found):
                raise UnsureError(
                    f"column {j + 1} has no name and numbers the rows, and there is no other one "
                    "but the labels. Give it a name if it is a feature"
                )
            found.append(j)
            continue
        numbering = name is None or NUMBERING.fullmatch(name)
        if j == 0 and numbering and width > 2 and not told and _counts(cells):
            raise UnsureError(
                f"column 1{f' ({name!r})' if name else ''} counts the rows. If it is a feature say "
                f"`header={name is not None}`"
            )
        break
    return found


def _counts(cells: Sequence[str]) -> bool:
    """Whether cells are 0, 1, 2, … or 1, 2, 3, …, and not by accident."""
    numbers = [int(cell) if cell.isdecimal() else -1 for cell in cells]
    return len(cells) >= COUNTED and any(
        numbers == list(range(begin, begin + len(cells))) for begin in (0, 1)
    )


def _have_fractions(columns: Rows) -> bool:
    """Whether a number among cells is written with a point."""
    return any("." in cell for cells in columns for cell in cells if is_number(cell))


def _is_among(cell: str, labels: Collection[str]) -> bool:
    if is_number(cell):
        return float(cell) in {float(label) for label in labels if is_number(label)}
    return cell in labels


def _runs_on(cells: Sequence[str], broken: bool) -> bool:
    """Whether whole numbers go up by equal steps: by ones, or three of them, or above fractions."""
    values = [float(cell) for cell in cells]
    if len(values) < 2 or any(value < 0 or not value.is_integer() for value in values):
        return False
    steps = {after - before for before, after in pairwise(values)}
    if len(steps) != 1 or min(steps) <= 0:
        return False
    return steps == {1.0} or len(values) > 2 or broken

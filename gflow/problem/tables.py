"""Text tables of points: reading them, and saying where they are malformed."""

import csv
import re
from collections.abc import Collection, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from gflow.problem.arguments import shown, whole
from gflow.problem.cells import UnsureError, has_header, is_missing, is_number, row_numbers

Label = str | float

LIBSVM = re.compile(r"\d+:[+-]?[\d.]+([eE][+-]?\d+)?")
IS_LIBSVM = (
    "it looks like libsvm's format. Read it by sklearn.datasets.load_svmlight_file and call "
    "Dataset(inputs.toarray(), labels)."
)

DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)


class Table(NamedTuple):
    """The cells of a text table and where they stand in the file."""

    path: Path
    header: list[str] | None
    rows: list[list[str]]
    lines: list[int]
    """The line of the file that each row ends on, from 1."""

    def only(self, chosen: np.ndarray) -> "Table":
        """Some of the rows."""
        at = np.flatnonzero(chosen)
        rows, lines = [self.rows[i] for i in at], [self.lines[i] for i in at]
        return self._replace(rows=rows, lines=lines)

    def place(self, row: int, column: int) -> str:
        """Where a cell is, in words."""
        name = "" if self.header is None else f" ({self.header[column]!r})"
        return f"{self.path}, line {self.lines[row]}, column {column + 1}{name}"


def read(
    path: Path,
    delimiter: str,
    *,
    header: bool | None = None,
    label_column: int | str = -1,
    wanted: Collection[str] | None = None,
) -> Table:
    """Read a table whose rows all have as many cells as its first.

    Empty lines and lines starting with `#` are skipped.

    Args:
        path: the file.
        delimiter: between cells.
        header: whether the first line names the columns; None looks (see `cells.has_header`).
        label_column: of `Dataset.from_csv`.
        wanted: the labels that a point may have; None for any number. By both it is seen whether
            the first line does.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '\r\n"':
        raise ValueError(
            f"`delimiter` is {shown(delimiter)}; expected one character, such as ',' or '\\t'."
        )
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                cells = [cell.strip() for cell in row]
                if not any(cells) or cells[0].startswith("#"):
                    continue
                rows.append(cells)
                lines.append(reader.line_num)
                if cells[0].lower().startswith(("@relation", "@attribute")):
                    raise ValueError(
                        f"{path}: it is an ARFF file. Read it by scipy.io.arff.loadarff and call "
                        "Dataset(inputs, labels)."
                    )
                if len(rows) == 1 and _is_libsvm(delimiter.join(cells)):
                    raise ValueError(f"{path}, line {lines[0]}: {IS_LIBSVM}")
                if len(cells) != len(rows[0]):
                    raise ValueError(
                        f"{path}, line {lines[-1]}: it has {len(cells)} columns; expected "
                        f"{len(rows[0])}, as in line {lines[0]}. "
                        + _why_uneven(rows[0], cells, delimiter)
                    )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: byte {error.object[error.start]:#04x} is "
                "not UTF-8 text. Is it a text file?"
            ) from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}.") from error
    if not rows:
        raise ValueError(f"{path}: it holds nothing; expected one line a point.")
    try:
        named = has_header(rows, label_column, wanted) if header is None else header
    except UnsureError as error:
        raise ValueError(
            f"{path}, line {lines[0]}: {delimiter.join(rows[0])[:80]!r} {error}. Say which: "
            "`header=True` or `header=False`."
        ) from error
    names = None
    if named:
        names, rows, lines = rows[0], rows[1:], lines[1:]
    if not rows:
        raise ValueError(f"{path}: it holds only a header; expected one line a point.")
    return Table(path, names, rows, lines)


def _is_libsvm(line: str) -> bool:
    """Whether a line is a label and numbered values, as ``1 3:0.5 7:2``."""
    label, *values = line.split() or [""]
    return bool(values) and is_number(label) and all(map(LIBSVM.fullmatch, values))


def _why_uneven(first: list[str], cells: list[str], delimiter: str) -> str:
    """What may be the reason for rows of unequal length."""
    if len(cells) == len(first) + 1 > 2 and not any(map(is_number, first)):
        return (
            "R's write.table leaves the name of its row numbers out: write the table with "
            "row.names=FALSE."
        )
    return f"Is {delimiter!r} the right `delimiter`?"


def features(table: Table, label: int, *, told: bool) -> list[int]:
    """The columns that are features: all but the labels and the numbers of rows.

    Args:
        table: the cells.
        label: the position of the labels.
        told: whether the caller said whether there is a header.
    """
    try:
        without = {label, *row_numbers(table.rows, table.header, label, told=told)}
    except UnsureError as error:
        raise ValueError(
            f"{table.path}: {error}; if it is not, leave it out of the file (pandas: index=False, "
            "R: row.names=FALSE)."
        ) from error
    return [j for j in range(len(table.rows[0])) if j not in without]


def position(table: Table, column: int | str, argument: str = "label_column") -> int:
    """The position of a column, from its name or a position that may count from the end."""
    width = len(table.rows[0])
    if not isinstance(column, str) and not whole(column):
        raise ValueError(
            f"`{argument}` is {shown(column)}; expected a name in the header, or a position from "
            f"{-width} to {width - 1}."
        )
    if isinstance(column, str):
        if table.header is None:
            raise ValueError(
                f"`{argument}` is {column!r} and {table.path} has no header line; expected a "
                f"position from 0 to {width - 1}."
            )
        if table.header.count(column) != 1:
            problem = "occurs more than once" if column in table.header else "does not occur"
            raise ValueError(
                f"`{argument}` is {column!r}, which {problem} in the header of {table.path}; it "
                f"has {', '.join(map(repr, table.header))}."
            )
        return table.header.index(column)
    if not -width <= column < width:
        raise ValueError(
            f"`{argument}` is {column}; expected a position from {-width} to {width - 1}: "
            f"{table.path} has {width} columns."
        )
    return int(column) % width


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
            if not (is_number(cell) and np.isfinite(float(cell))):
                raise ValueError(
                    f"{table.place(i, j)}: got {cell!r}, expected a finite number. {_hint(cell)}"
                )
    return np.array([[float(cell) for cell in row] for row in text])


def _hint(cell: str) -> str:
    """What to do with a cell that is no number."""
    if DECIMAL_COMMA.fullmatch(cell):
        return "It has a decimal comma; write numbers with a point, as pandas' decimal='.'."
    if is_missing(cell):
        return "Drop or impute a point with gaps."
    return "Encode or drop a column of words; drop or impute a point with gaps."


def labels(table: Table, column: int, named: Container[str] = ()) -> list[str]:
    """The labels of a column, every one of which is there.

    Args:
        table: the cells.
        column: the position of the labels.
        named: what is a label although it stands for a missing value elsewhere.

    Raises:
        ValueError: that names line and column of a label that is missing.
    """
    found = [row[column] for row in table.rows]
    gaps = [i for i, label in enumerate(found) if is_missing(label) and label not in named]
    if len(gaps) == len(found):
        raise ValueError(
            f"{table.place(0, column)}: the column of labels is empty. Does every line end with a "
            "delimiter? Choose another `label_column`."
        )
    if gaps:
        raise ValueError(
            f"{table.place(gaps[0], column)}: the label is missing, {found[gaps[0]]!r}"
            f"{_more(len(gaps))}; expected one at every point. Drop the points without a label."
        )
    return found


def signs(
    table: Table,
    column: int,
    positive: str | float | None,
    negative: Label | Sequence[Label] | None = None,
) -> tuple[Float[np.ndarray, " rows"], np.ndarray]:
    """The labels of a column as -1 and +1, and which points have one of them.

    Args:
        table: the cells.
        column: the position of the labels.
        positive, negative: as of `Dataset.from_csv`.
    """
    named = {str(each) for each in (positive, *several(negative)) if each is not None}
    found = labels(table, column, named)
    if positive is not None or negative is not None:
        if all(is_number(label) for label in (*found, *named)):
            return two_classes(np.array([float(v) for v in found]), positive, negative)
        return two_classes(np.array(found), positive, negative)
    for i, label in enumerate(found):
        if not (is_number(label) and abs(float(label)) == 1.0):
            values = sorted(set(found))
            shown = ", ".join(map(repr, values[:6])) + (", ..." if len(values) > 6 else "")
            raise ValueError(
                f"{table.place(i, column)}: the label is {label!r}, expected -1 or +1. The labels "
                f"are {shown}: say which one is +1, for example `positive={values[-1]!r}`, set "
                "`classes` to true if each is a class, or choose another `label_column`."
            )
    return np.array([float(label) for label in found]), np.ones(len(found), dtype=bool)


def wanted(
    positive: Label | None,
    negative: Label | Sequence[Label] | None,
    classes: bool | Sequence[Label],
) -> set[str] | None:
    """The labels that are asked for, of which None is any: arguments of `Dataset.from_csv`."""
    if classes is True:
        return None
    named = [*several(None if classes is False else classes), positive, *several(negative)]
    return {str(each) for each in named if each is not None} or {"-1", "1"}


def numbered(
    table: Table, column: int, classes: bool | Sequence[Label]
) -> tuple[Float[np.ndarray, " rows"], np.ndarray, int]:
    """The labels of a column as classes from 0 on, which points have one, and how many there are.

    Args:
        table: the cells.
        column: the position of the labels.
        classes: true for all that occur, in order, or the labels in the order wanted.

    Raises:
        ValueError: when `classes` has fewer than two labels, or one twice or that does not occur;
            or is true, and the labels are one, or not whole numbers alone or words alone.
    """
    if isinstance(classes, set | frozenset | dict):
        raise ValueError(
            f"`classes` is a {type(classes).__name__}; expected True, or a list of labels, whose "
            "order is that of the classes."
        )
    given = [] if isinstance(classes, bool) else [str(each) for each in several(classes)]
    found = labels(table, column, set(given))
    values: list[Any] = list(found)
    if all(is_number(label) for label in (*found, *given)):
        values, given = [float(label) for label in found], [float(label) for label in given]
    known = sorted(set(values))
    order = known if isinstance(classes, bool) else given
    shown = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    if isinstance(classes, bool):
        _check_kind(table, column, found)
    if len(known) < 2:
        raise ValueError(
            f"{table.place(0, column)}: every label is {found[0]!r}; expected two classes at "
            "least. Choose another `label_column`."
        )
    if len(order) < 2 or len(set(order)) < len(order) or not set(order) <= set(known):
        raise ValueError(
            f"`classes` is {classes!r}; expected True, or at least two different ones of the "
            f"labels, which are {shown}."
        )
    number = {label: float(k) for k, label in enumerate(order)}
    numbers = np.array([number.get(label, np.nan) for label in values])
    return numbers, ~np.isnan(numbers), len(order)


def _check_kind(table: Table, column: int, found: list[str]) -> None:
    """Raise a ValueError unless labels are all whole numbers or all words."""
    numeric = [is_number(label) for label in found]
    if any(numeric) and not all(numeric):
        odd = numeric.index(numeric.count(True) < len(numeric) / 2)
        raise ValueError(
            f"{table.place(odd, column)}: the label is {found[odd]!r}, where most are "
            f"{'words' if numeric[odd] else 'numbers'}; expected whole numbers alone, or words "
            "alone. If it is a class of its own, list the labels: `classes=[...]`."
        )
    for i, label in enumerate(found if all(numeric) else ()):
        if not float(label).is_integer():
            raise ValueError(
                f"{table.place(i, column)}: the label is {label!r}, no whole number. If it is a "
                "class, list the labels: `classes=[...]`; numbers to be predicted are read by "
                "gflow.Regression.from_csv."
            )


def two_classes(
    values: Shaped[np.ndarray, " points"],
    positive: Label | None,
    negative: Label | Sequence[Label] | None = None,
) -> tuple[Float[np.ndarray, " points"], np.ndarray]:
    """Labels as -1 and +1, and which points have one of the labels that are asked for.

    Args:
        values: the labels, none of which is missing.
        positive: the label that becomes +1.
        negative: the label, or labels, that become -1; None stands for the only other one.

    Raises:
        ValueError: when a label that is asked for does not occur, or another one does and it is not
            said which of them is -1.
    """
    known = [value.item() for value in np.unique(values)]
    shown_values = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    told = f"The labels are {shown_values}."
    of_numbers = values.dtype.kind in "fiub"
    if positive is None:
        raise ValueError(f"`negative` is {negative!r} without `positive`, the label of +1. {told}")

    def hits(name: str, label: Any) -> np.ndarray:
        found = np.asarray(values == (label if of_numbers else str(label)))
        if found.shape != values.shape or not found.any() or found.all():
            raise ValueError(f"`{name}` is {label!r}; expected one of several labels. {told}")
        return found

    if of_numbers:  # numbers may be given as text, as they are in a file
        positive, negative = _as_number(positive), _each_as_number(negative)
    plus = hits("positive", positive)
    others = [value for value in known if value != (positive if of_numbers else str(positive))]
    if negative is None and len(others) > 1:
        raise ValueError(
            f"`positive` is {positive!r}, and there are {len(others)} other labels: "
            f"{', '.join(map(repr, others[:8]))}{', ...' if len(others) > 8 else ''}. Say which of "
            f"them is -1: `negative={others[0]!r}`, which leaves points with other labels out, or "
            f"a list of labels."
        )
    minus = ~plus if negative is None else np.zeros_like(plus)
    for label in several(negative):
        minus |= hits("negative", label)
    if np.any(plus & minus):
        raise ValueError(f"`positive` and `negative` are both {positive!r}; expected two labels.")
    return np.where(plus, 1.0, -1.0), plus | minus


def several(labels: Any) -> list[Any]:
    """Labels as a list: none, one or several."""
    if labels is None:
        return []
    return list(labels) if isinstance(labels, list | tuple | set | range | np.ndarray) else [labels]


def _as_number(label: Any) -> Any:
    return float(label) if isinstance(label, str) and is_number(label) else label


def _each_as_number(labels: Any) -> Any:
    return None if labels is None else [_as_number(each) for each in several(labels)]


def _more(count: int) -> str:
    return f" ({count} such lines)" if count > 1 else ""

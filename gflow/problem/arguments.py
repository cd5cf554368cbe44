"""Wrong arguments, in plain words."""

import math
import numbers
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

A_PROBLEM = "a problem, as `gflow.Problem(data, loss=gflow.Logistic())`"


def expect(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raise unless an argument is of a kind.

    Args:
        name: of the argument.
        value: what it got.
        kind: a type, or several, as for ``isinstance``.
        expected: in words, what to give instead.

    Raises:
        ValueError: that names all of them.
    """
    if not isinstance(value, kind):
        what = "the class" if isinstance(value, type) else "a"
        kind = value if isinstance(value, type) else type(value)
        raise ValueError(f"`{name}` is {what} {kind.__name__}; expected {expected}.")


def positive_count(name: str, value: Any, least: int = 1) -> int:
    """``value`` of an argument that counts something, or a ValueError that names it."""
    if not whole(value) or value < least:
        what = "positive whole number" if least == 1 else f"whole number from {least} on"
        raise ValueError(f"`{name}` is {shown(value)}; expected a {what}.")
    return int(value)


def number(
    name: str,
    value: Any,
    expected: str = "a finite number",
    allowed: Callable[[float], bool] = math.isfinite,
) -> float:
    """``value`` of an argument as a number, or a ValueError that names it.

    Args:
        name: of the argument.
        value: what it got.
        expected: in words, what to give instead.
        allowed: which numbers are.
    """
    if not is_number(value) or not allowed(float(value)):
        raise ValueError(f"`{name}` is {shown(value)}; expected {expected}.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """``value`` of an argument as a positive number, or a ValueError that names it."""
    return number(name, value, "a positive finite number", lambda v: 0 < v < math.inf)


def between(
    name: str, value: Any, low: float, high: float, expected: str, *, ends: bool = False
) -> float:
    """``value`` of an argument as a number between two, or a ValueError that names it.

    Args:
        name: of the argument.
        value: what it got.
        low, high: the two.
        expected: in words, what to give instead.
        ends: whether ``low`` is allowed.
    """
    return number(name, value, expected, lambda v: low < v < high or (ends and v == low))


def seed_of(name: str, value: Any) -> int:
    """``value`` of an argument that seeds random numbers, or a ValueError that names it."""
    if not whole(value) or value < 0:
        raise ValueError(
            f"`{name}` is {shown(value)}; expected a whole number of at least 0, such as 0."
        )
    return int(value)


def flag(name: str, value: Any, *, none: bool = False) -> bool | None:
    """``value`` of an argument that is true or false, or with ``none`` None."""
    if none and value is None:
        return None
    if not isinstance(value, bool | np.bool_):
        raise ValueError(
            f"`{name}` is {shown(value)}; expected {'None, ' if none else ''}True or False."
        )
    return bool(value)


def file_path(name: str, value: Any) -> Path:
    """``value`` of an argument that names a file, or a ValueError that names it."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ValueError(
            f"`{name}` is {shown(value)}; expected the path of a file, text or a `pathlib.Path`."
        )
    if not os.fspath(value):
        raise ValueError(f"`{name}` is empty; expected the path of a file.")
    return Path(value)


def numbers_of(name: str, value: Any, *, booleans: bool = False) -> np.ndarray:
    """``value`` of an argument as an array of float64, or a ValueError that names it.

    What is masked or missing has no value, and text is not read as numbers. Objects that are
    numbers, as pandas' nullable ones, fractions and decimals, are.

    Args:
        name: of the argument.
        value: what it got.
        booleans: whether true and false may stand for one and zero.
    """
    if hasattr(value, "toarray") and not hasattr(value, "__array__"):
        raise ValueError(
            f"`{name}` is a sparse {type(value).__name__}; expected a dense array: "
            f"{name}.toarray()."
        )
    expect_unmasked(name, value)
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object with a protocol of its own raises
        raise ValueError(
            f"`{name}` is not a table: {error}. Expected rows of equal length."
        ) from error
    if array.dtype.kind == "O":
        return _from_objects(name, array, booleans)
    kind = "f" if array.dtype.names is None and _is_float(array.dtype) else array.dtype.kind
    if kind not in ("fiub" if booleans else "fiu"):
        raise ValueError(
            f"`{name}` has the type {array.dtype}; expected real numbers.{_way_out(array)}"
        )
    return array.astype(np.float64)


def expect_unmasked(name: str, value: Any) -> None:
    """Raise where an array, or one in a list of them, has masked entries."""
    if isinstance(value, list | tuple):
        for k, each in enumerate(value):
            if isinstance(each, list | tuple | np.ma.MaskedArray):
                expect_unmasked(f"{name}[{k}]", each)
    elif np.ma.is_masked(value):
        mask = np.ma.getmaskarray(value)
        raise ValueError(
            f"`{_entry(name, np.argwhere(mask)[0])}` is masked{_more(int(mask.sum()))}; expected "
            "values everywhere. Drop the points concerned, or fill them: array.filled(value)."
        )


def _from_objects(name: str, array: np.ndarray, booleans: bool) -> np.ndarray:
    found = np.empty(array.shape)
    for place, each in np.ndenumerate(array):
        plain = is_number(each) or isinstance(each, Decimal)
        plain |= booleans and isinstance(each, bool | np.bool_)
        if not plain:
            missing = each is None or str(each) in ("<NA>", "NaT")
            what = "missing" if missing else shown(each)
            way = "Drop or impute the points concerned." if missing else _way_out(array).strip()
            raise ValueError(
                f"`{_entry(name, place)}` is {what}, in an array of objects; expected real "
                f"numbers. {way}".rstrip()
            )
        found[place] = float(each)
    return found


def _way_out(array: np.ndarray) -> str:
    """How to make numbers of what is not numbers."""
    if array.dtype.names is not None:
        return " Make a table of its columns: np.column_stack([a[n] for n in a.dtype.names])."
    words = array.dtype.kind in "US" or any(isinstance(each, str) for each in array.flat)
    return (
        " Numbers that are written out are converted by np.asarray(values, dtype=float)."
        if words
        else ""
    )


def _is_float(kind: np.dtype) -> bool:
    """Whether a type is of floating-point numbers, those beside NumPy's included."""
    return kind.kind == "f" or (kind.kind == "V" and np.can_cast(kind, np.float64, "safe"))


def _entry(name: str, place: Any) -> str:
    return f"{name}[{', '.join(str(int(i)) for i in place)}]" if len(place) else name


def _more(count: int) -> str:
    return f" ({count} such entries)" if count > 1 else ""


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, of whatever type, arrays without axes included."""
    if isinstance(value, bool | np.bool_) or value is np.ma.masked:
        return False
    if isinstance(value, numbers.Real):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("f", "i", "u") and np.ndim(value) == 0


def whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of whatever type."""
    return is_number(value) and float(value).is_integer()


def shown(value: Any) -> str:
    """What an argument got, in words that are not long."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "dtype") and np.ndim(value) > 0:
        return f"an array of shape {np.shape(value)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"

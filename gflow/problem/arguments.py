"""Wrong arguments, in plain words."""

import math
import numbers
import os
from collections.abc import Callable
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


def positive_count(name: str, value: Any) -> int:
    """``value`` of an argument that counts something, or a ValueError that names it."""
    if not whole(value) or value < 1:
        raise ValueError(f"`{name}` is {shown(value)}; expected a positive whole number.")
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


def numbers_of(name: str, value: Any) -> np.ndarray:
    """``value`` of an argument as an array of float64, or a ValueError that names it.

    What is masked has no value, and text is not read as numbers.
    """
    if np.ma.is_masked(value):
        first = tuple(int(i) for i in np.argwhere(np.ma.getmaskarray(value))[0])
        count = int(np.ma.getmaskarray(value).sum())
        place = ", ".join(map(str, first))
        raise ValueError(
            f"`{name}[{place}]` is masked ({count} such entries); expected values everywhere. "
            "Drop the points concerned, or fill them: `array.filled(value)`."
        )
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{name}` is not an array: {error}. Expected numbers, in rows of equal length."
        ) from error
    if array.dtype.kind == "b" or not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise ValueError(f"`{name}` has the type {array.dtype}; expected real numbers.")
    return array.astype(np.float64)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, of whatever type, arrays without axes included."""
    if isinstance(value, bool | np.bool_):
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

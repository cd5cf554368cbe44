"""Wrong arguments, in plain words."""

import numbers
from typing import Any

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
        raise ValueError(f"`{name}` is {value!r}; expected a positive whole number.")
    return int(value)


def whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of whatever type."""
    return isinstance(value, numbers.Real) and float(value).is_integer()

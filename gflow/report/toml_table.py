"""A table of a TOML file, in which a key that nobody knows is an error."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

REQUIRED = object()
"""The default of a key that must be there."""

_KINDS = {
    float: "a number",
    int: "a whole number",
    str: "text in quotes",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}


class TomlTable:
    """A table of a TOML file that knows which of its keys were asked for.

    Args:
        values: the table.
        where: its name in messages, such as "[flow]"; empty for the whole file.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = dict(values)
        self.where = where
        self.known: dict[str, None] = {}

    def names(self) -> list[str]:
        """The keys of the file, in its order."""
        return list(self.values)

    def get(self, key: str, kind: type, default: Any) -> Any:
        """The value of a key, checked to be of a kind; ``default`` if it is not there."""
        self.known[key] = None
        if key not in self.values:
            if default is REQUIRED:
                raise ValueError(f"{self._path(key)} is missing.")
            return default
        value = self.values[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        # In Python, not in TOML, true is a whole number.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(
                f"{self._path(key)} is {value!r}; expected {_KINDS.get(kind, kind.__name__)}."
            )
        return value

    def table(self, key: str, default: Any) -> Any:
        """A table inside this one, or None if the default is None and it is not there."""
        where = f"[{key}]" if not self.where else f"{self.where} {key}"
        value = self.get(key, dict, default)
        return None if value is None else TomlTable(value, where)

    def rest(self, options: Mapping[str, Any] | tuple[str, ...]) -> dict[str, Any]:
        """The keys among ``options`` that are there: keyword arguments of a function."""
        for key in options:
            self.known[key] = None
        return {key: self.values[key] for key in options if key in self.values}

    def done(self) -> None:
        """Raise if a key is there that nobody asked for."""
        for key in self.values:
            if key not in self.known:
                place = f" in {self.where}" if self.where else ""
                raise ValueError(f"unknown key `{key}`{place}; {_suggest(key, self.known)}")

    def _path(self, key: str) -> str:
        return f"{self.where} {key}" if self.where else f"[{key}]"


def choose(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of a mapping, or an error that lists its keys."""
    if name not in known:
        raise ValueError(f"{what} is {name!r}; {_suggest(name, known)}")
    return known[name]


def _suggest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"expected one of {', '.join(known)}.{hint}"

"""Which names a record has, and which a caller may add.

A name that a record may have is taken in every record, whatever kind it is: a name of one's own
means the same in a flow, a descent, an ensemble and a sweep.
"""

import re
import unicodedata
from collections.abc import Container, Iterable, Mapping
from typing import Any

from gflow.quantities import DIMENSIONS, QUANTITIES

ALSO = ("support_points",)
"""Further variables and dimensions of records."""

SETTINGS = ("loss", "dataset", "optimizer", "rtol", "atol", "solver")
"""What a run is given. An axis may have such a name, and the run's own words are then under
``NAME_used``."""

PER_MEMBER: dict[str, type] = {
    **dict.fromkeys(SETTINGS, str),
    "rtol": float,
    "atol": float,
    "status": str,
    "message": str,
    "wall_time": float,
    "max_margin": float,
    "margin_upper_bound": float,
    "next_margin_gap": float,
    "num_rejected": int,
    "num_newton_iterations": int,
    "start_sha256": str,
    "in_lanes": bool,
    "admissible": bool,
    "grid_index": int,
}
"""Facts that are attributes of one run and variables of many, and their types."""

MOST_AXES = 9
"""More axes than an observable has."""

_WEIGHTS = re.compile(r"(initial_|final_)?weights_\d+(_\d+)?")

LONGEST = 200
"""Bytes of a name: netCDF takes 256, and ``NAME_error`` and ``NAME_0`` are made of it."""


def is_taken(name: str) -> bool:
    """Whether some record has a variable, coordinate or dimension of this name."""
    of_quantities = name in QUANTITIES or name.removesuffix("_error") in QUANTITIES
    taken = of_quantities or name in (*DIMENSIONS, *ALSO, *PER_MEMBER)
    return taken or _WEIGHTS.fullmatch(name) is not None


def check_names(
    argument: str,
    names: Iterable[Any],
    *,
    beside: Iterable[str] = (),
    allowed: Container[str] = (),
) -> None:
    """Raise unless a caller may add variables, coordinates or dimensions of these names.

    Args:
        argument: that they are keys of.
        names: what the caller wants.
        beside: further names of this record that are not free.
        allowed: names that are free although records use them.

    Raises:
        ValueError: that says what is wrong with which.
    """
    beside = set(beside)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"`{argument}` has the key {name!r}; expected text: it is the name under which the "
                "record holds the values."
            )
        where = f"`{argument}[{name!r}]`"
        if (is_taken(name) and name not in allowed) or name in beside:
            raise ValueError(
                f"{where} has a name of the record's own; expected one that the record does not "
                f"use already, such as {f'my_{name}'!r}."
            )
        fault = fault_of(name)
        if fault:
            raise ValueError(
                f"{where} has a name that {fault}, which the file of a record cannot hold; "
                f"expected one such as {_legal(name)!r}."
            )


def made_from(name: str, num_axes: int) -> set[str]:
    """The names that a record makes of one: of its error, and of the axes it has beside points."""
    return {f"{name}_error", *(f"{name}_{axis}" for axis in range(num_axes))}


def all_names(observables: Any) -> set[str]:
    """The names that observables of unknown shape, a mapping, may take in a record."""
    names = map(str, observables) if isinstance(observables, Mapping) else ()
    return {each for name in names for each in (name, *made_from(name, MOST_AXES))}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of several mappings, none of which may hide another.

    Raises:
        ValueError: when two have the same name.

    >>> merged({"a": 1}, {"b": 2})
    {'a': 1, 'b': 2}
    """
    found: dict[str, Any] = {}
    for part in parts:
        twice = sorted(found.keys() & part.keys())
        if twice:
            raise ValueError(f"a record would have {', '.join(map(repr, twice))} twice.")
        found |= part
    return found


def fault_of(name: Any) -> str | None:
    """Why a netCDF file cannot hold a name as it is."""
    if not isinstance(name, str):
        return "is no text"
    if not name:
        return "is empty"
    if "/" in name:
        return "has a '/'"
    if name != name.strip():
        return "begins or ends with a blank"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        return "has a control character"
    if not (name[0].isalnum() or name[0] == "_" or ord(name[0]) > 127):
        return f"begins with {name[0]!r}"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's normal form C"
    if len(name.encode()) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None


def _legal(name: str) -> str:
    """A name like it that is legal."""
    name = unicodedata.normalize("NFC", name.encode(errors="ignore").decode())
    name = re.sub(r"\W+", "_", name)[:40].strip("_")
    return name if name and not is_taken(name) and fault_of(name) is None else "my_observable"

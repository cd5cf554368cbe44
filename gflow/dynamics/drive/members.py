"""From what single members gave to one record with a dimension ``member``."""

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gflow import record
from gflow.dynamics.reasons import Reason
from gflow.names import PER_MEMBER, merged
from gflow.quantities import quantity
from gflow.record import Variable

if TYPE_CHECKING:
    import xarray as xr


class Member(NamedTuple):
    """What a record is made of."""

    variables: Mapping[str, Variable]
    attrs: Mapping[str, Any]

    @classmethod
    def of(cls, one: "xr.Dataset") -> "Member":
        """The contents of a record."""
        found = {
            str(name): (tuple(map(str, one[name].dims)), one[name].values, one[name].attrs)
            for name in (*one.data_vars, *(["support"] if "support" in one else []))
        }
        return cls(found, one.attrs)


def joined(
    members: Sequence[Member | BaseException],
    *,
    more: Mapping[str, Any],
    coordinates: Mapping[str, Any],
    **attrs: Any,
) -> "xr.Dataset":
    """One record of all members.

    Args:
        members: what each gave; an exception instead of one that could not be followed, that
            of Ctrl-C where nobody came to it.
        more: further variables, one value a member.
        coordinates: further coordinates, one value a member.
        **attrs: further attributes.
    """
    whole = [one for one in members if not isinstance(one, BaseException)]
    names = dict.fromkeys(name for one in whole for name in one.variables)
    found: dict[str, Variable] = {}
    for name in names:
        column = [None if isinstance(m, BaseException) else m.variables.get(name) for m in members]
        there = [variable for variable in column if variable is not None]
        if quantity(name).of_data and _all_equal([values for _, values, _ in there]):
            found[name] = there[0]
        elif name == "support":  # a dimension cannot have values that differ
            dims, values, told = padded(column)
            found["support_points"] = (dims, values, told)
        else:
            found[name] = padded(column)
    facts: dict[str, Variable] = {}
    for name, kind in PER_MEMBER.items():
        values = [_told(one, name) for one in members]
        if any(value is not None for value in values):
            unknown = "" if kind is str else np.nan
            typed = [unknown if value is None else kind(value) for value in values]
            under = f"{name}_used" if name in coordinates else name
            facts[under] = (("member",), np.array(typed), {"long_name": name})
    for name, values in more.items():
        facts[name] = (("member",), np.asarray(values), {"long_name": name})
    found = merged(found, facts)
    merged(found, coordinates)
    common = agreed([one.attrs for one in whole], but=PER_MEMBER)
    one = record.assemble(found, {**common, "num_members": len(members), **attrs})
    return one.assign_coords({name: ("member", list(each)) for name, each in coordinates.items()})


def agreed(attrs: Sequence[Mapping[str, Any]], *, but: Container[str]) -> dict[str, Any]:
    """The attributes on which all records agree, ``but`` for some."""
    return {
        key: value
        for key, value in (attrs[0].items() if attrs else ())
        if key not in but
        and all(key in each and np.array_equal(each[key], value) for each in attrs)
    }


def padded(column: Sequence[Variable | None]) -> Variable:
    """Values stacked on an axis ``member``, filled up where a member has none or fewer."""
    there = [(i, variable) for i, variable in enumerate(column) if variable is not None]
    dims, _, told = there[0][1]
    parts = [(np.array([i]), np.asarray(values)[None]) for i, (_, values, _) in there]
    return ("member", *dims), filled(parts, len(column)), dict(told)


def filled(parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Values in ``count`` places along the first axis.

    Where nothing is known numbers are NaN, text is empty and booleans are false. Where nothing is
    missing the type of the values is kept.

    Args:
        parts: places, and as many values on a leading axis; other axes may differ in length.
        count: how many places there are.
    """
    sizes = tuple(map(max, zip(*(values.shape[1:] for _, values in parts), strict=True)))
    kind = parts[0][1].dtype
    whole = all(values.shape[1:] == sizes for _, values in parts)
    whole &= sum(len(where) for where, _ in parts) == count
    if kind.kind in "OUST":
        kind = np.dtype(object)
    elif not (whole or kind.kind == "b"):
        kind = np.dtype(np.float64)
    return laid_out(parts, (count, *sizes), kind)


def laid_out(
    parts: Sequence[tuple[Any, np.ndarray]], shape: tuple[int, ...], kind: np.dtype
) -> np.ndarray:
    """Values at their places along the first axis, and at the beginning of all others.

    Elsewhere numbers are NaN, whole ones zero, text is empty and booleans are false.
    """
    unknown = {"f": np.nan, "O": "", "U": ""}.get(kind.kind, 0)
    out = np.full(shape, unknown, kind)
    for where, values in parts:
        out[(where, *map(slice, values.shape[1:]))] = values
    return out


def none_done(found: "xr.Dataset") -> bool:
    """Whether Ctrl-C came before any member was done."""
    ends = set(np.ravel(found["status"].values).tolist())
    return "interrupted" in ends and ends <= {"interrupted", "refused", "failed"}


def _told(one: Member | BaseException, name: str) -> Any:
    if isinstance(one, BaseException):
        if isinstance(one, KeyboardInterrupt):
            end = Reason.NOT_STARTED.end()
        elif isinstance(one, ValueError):
            end = Reason.REFUSED.end(why=one)
        else:
            end = Reason.FAILED.end(why=f"{type(one).__name__}: {one}")
        return end._asdict().get(name)
    return one.attrs.get(name)


def _all_equal(values: Sequence[np.ndarray]) -> bool:
    return all(each is values[0] or np.array_equal(each, values[0]) for each in values)

"""What a record says first: its type, a Dataset that prints one line before all else."""

import html
import math
from typing import Any

import numpy as np
import xarray as xr

from gflow.quantities import QUANTITIES, Kind, quantity
from gflow.record import CERTIFIED


class Record(xr.Dataset):
    """An ``xarray.Dataset`` whose text and HTML begin with the record's headline.

    And an observable that is not there says of which problems it is. Nothing else differs: it is
    selected, computed with, saved and plotted as any Dataset is. A subclass, since xarray has no
    other way to print a line first; in a file of its own, since importing xarray is slow.
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError as error:
            row = QUANTITIES.get(key) if isinstance(key, str) else None
            if row is None or not row.needs:
                raise
            raise KeyError(
                f"The record has no {key!r} ({row.meaning}), which is recorded of problems with "
                f"{', '.join(row.needs)}."
            ) from error

    def __repr__(self) -> str:
        return _above(headline(self), super().__repr__())

    def _repr_html_(self) -> str:
        line = headline(self)
        above = f"<div><strong>{html.escape(line)}</strong></div>" if line else ""
        return above + super()._repr_html_()


def headline(record: xr.Dataset) -> str:
    """One line: how far, how exact, at what cost; empty for what is no single trajectory.

    "log R = -1e+06, 9 digits certain, 174 steps, 0.2 s": the digits are the fewest of any certified
    observable at the last saved point.
    """
    if "log_risk" not in record or record["log_risk"].dims != ("point",):
        return ""
    if record.sizes["point"] == 0:
        return ""
    parts = [f"log R = {float(record['log_risk'][-1]):.6g}"]
    exactness = _exactness(record)
    if exactness:
        parts.append(exactness)
    if "num_steps" in record:
        parts.append(f"{int(record['num_steps'][-1])} steps")
    if "wall_time" in record.attrs:
        parts.append(f"{float(record.attrs['wall_time']):.2g} s")
    status = record.attrs.get("status", "reached")
    return ", ".join(parts if status == "reached" else [*parts, str(status)])


def digits(record: xr.Dataset) -> dict[str, float]:
    """Certain decimal digits of each certified observable at the last saved point.

    Minus the decimal logarithm of the relative error of its worst component, of vectors of that of
    the norm; of logarithms relative to one where they are smaller. What is zero to the record's
    resolution, or undefined, is left out.
    """
    found = {}
    for name in certified(record):
        row = quantity(name)
        value = row.size(np.atleast_1d(record[name].values[-1]))
        error = np.atleast_1d(record[f"{name}_error"].values[-1])
        if row.kind is Kind.VECTOR:
            value, error = value[..., :1], np.linalg.norm(error, axis=-1, keepdims=True)
        known = np.isfinite(value) & np.isfinite(error) & (value > 0)
        known &= ~((error > value / 10) & (value < row.zero))
        if np.any(known):
            with np.errstate(divide="ignore"):
                worst = np.max(error[known] / value[known])
                found[name] = float(max(0.0, -np.log10(worst))) if worst > 0 else math.inf
    return found


def certified(record: xr.Dataset) -> list[str]:
    """The observables that come with an error estimate."""
    named = [name for name in CERTIFIED if name in record]
    more = [str(name) for name in record.data_vars if name not in named]
    return [name for name in (*named, *more) if f"{name}_error" in record]


def _exactness(record: xr.Dataset) -> str:
    if record.attrs.get("kind") == "descent":
        return ""
    if "certificate" in record.attrs:
        fewest = min(digits(record).values(), default=math.inf)
        if math.isfinite(fewest):  # at the start, which is given, they all are
            return f"{math.floor(fewest)} digits certain"
    if "imbalance_drift" in record and record.sizes.get("layer", 0) > 1:
        drift = float(record["imbalance_drift"].values[-1])
        return f"imbalance kept to {drift:.0e}"
    return ""


def _above(line: str, text: str) -> str:
    return f"{line}\n{text}" if line else text


def as_record(data: Any) -> Record:
    """A Dataset as a record."""
    return Record(data.data_vars, data.coords, data.attrs)

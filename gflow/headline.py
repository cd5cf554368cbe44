"""What a record says first: its type, a Dataset that prints one line before all else."""

import html
import math
from typing import Any

import numpy as np
import xarray as xr

from gflow.variables import CERTIFIED

ZERO = {
    "misalignment": 1e-14,
    "rank_one_gap": 1e-14,
    "direction_error": 1e-9,
    "margin_gap": 1e-9,
    "rank_one_residual": 1e-9,
}
"""Quantities that tend to zero, and the size below which one without a single certain digit is zero
to the record's resolution, as misalignment is for balanced layers."""


class Record(xr.Dataset):
    """An ``xarray.Dataset`` whose text and HTML begin with the record's headline.

    Nothing else differs: it is selected, computed with, saved and plotted as any Dataset is.
    """

    __slots__ = ()

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

    Minus the decimal logarithm of the relative error of its worst component, of the vector for
    ``end_to_end`` and of ``max(1, |log t|)`` for ``log_time``. What is zero to the record's
    resolution, or undefined, is left out.
    """
    found = {}
    for name in certified(record):
        value = np.abs(np.atleast_1d(record[name].values[-1]))
        error = np.atleast_1d(record[f"{name}_error"].values[-1])
        if name == "end_to_end":
            value, error = (
                np.atleast_1d(np.linalg.norm(value)),
                np.atleast_1d(np.linalg.norm(error)),
            )
        if name == "log_time":
            value = np.maximum(value, 1.0)
        known = np.isfinite(value) & np.isfinite(error) & (value > 0)
        known &= ~((error > value / 10) & (value < ZERO.get(name, 0.0)))
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

"""Many trajectories in one picture: an ensemble's median and band, descent with its flow."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from gflow.problem import settings
from gflow.quantities import quantity
from gflow.report.plot.curves import (
    LINES,
    curve,
    entry_name,
    has_curves,
    labelled,
    say,
    x_values,
)
from gflow.report.plot.style import axes_of, color_of, finish, long_scale, symbol

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from gflow.report.plot.curves import Records

GRID = 200
"""Places at which members, each with saved points of its own, are read."""


@settings.own()
def ensemble(
    records: "Records",
    variable: str = "direction_error",
    x: str = "log_risk",
    *,
    within: float = 0.8,
    ax: "Axes | None" = None,
) -> "Axes":
    """An ensemble's median, in the band that holds this part of its members at each place.

    Members are read between their saved points, and where at least half of them are. Of layers or
    pairs each has its own colour and every ensemble its dashes; else each ensemble has a colour.

    Args:
        records: what ``gflow.ensemble`` returns, one or several.
        variable: an observable of the records.
        x: "log_time", "log_risk" or "num_steps".
        within: the part of the members in the band, between 0 and 1.
        ax: where to draw.
    """
    if not 0 < within < 1:
        raise ValueError(f"`within` is {within}; expected a part of the members, between 0 and 1.")
    ax = axes_of(ax)
    shown = labelled(records)
    linear = not quantity(variable).decades
    families = {}
    for index, (label, record) in enumerate(shown.items()):
        if "member" not in record.dims:
            raise ValueError(
                f"{label!r} of `records` has no dimension `member`; expected what "
                "`gflow.ensemble` returns."
            )
        if variable not in record:
            raise ValueError(f"`variable` is {variable!r}, which {label!r} of `records` lacks.")
        dims = [dim for dim in record[variable].dims if dim in ("layer", "pair")]
        for entry in record[dims[0]].values.tolist() if dims else [None]:
            table = record if entry is None else record.sel({dims[0]: entry})
            at, low, middle, high = _band(table, variable, x, within, linear)
            color = color_of(index if entry is None else entry - 1)
            line = "-" if entry is None else LINES[index % len(LINES)]
            style = {"color": color, "linestyle": line, "linewidth": 1.2}
            if not curve(ax, at, middle, positive=not linear, label="_", **style):
                continue
            ax.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
            families[entry] = color
        if len(shown) > 1:
            solid = families.keys() <= {None}
            look = color_of(index) if solid else "0.35"
            ax.plot([], [], color=look, linestyle="-" if solid else LINES[index % 4], label=label)
    for entry, color in families.items():
        if entry is not None:
            ax.plot([], [], color=color, label=entry_name(entry))
    if not has_curves(ax):
        say(ax, "no member to show")
    if linear:
        long_scale(ax, "y")
    else:
        ax.set_yscale("log")
    return finish(ax, x, symbol(variable))


def _band(record: "xr.Dataset", variable: str, x: str, within: float, linear: bool) -> np.ndarray:
    """A common grid, and at each of its places three quantiles over the members; shape (4, …)."""
    rows = []
    for member in range(record.sizes["member"]):
        one = record.isel(member=member)
        at, values = x_values(one, x), np.asarray(one[variable].values, dtype=np.float64)
        known = np.isfinite(at) & np.isfinite(values) & (linear | (values > 0))
        # Even on the axis: linear to one, then logarithmic.
        at, values = np.arcsinh(at[known]), values[known] if linear else np.log(values[known])
        if len(at) > 1:
            rows.append((at, values))
    if not rows:
        return np.zeros((4, 0))
    grid = np.linspace(min(at[0] for at, _ in rows), max(at[-1] for at, _ in rows), GRID)
    table = np.array([np.interp(grid, *row, left=np.nan, right=np.nan) for row in rows])
    there = np.isfinite(table).sum(axis=0) >= max(1, record.sizes["member"] / 2)
    tail = (1 - within) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of places where no member is
        lines = np.nanquantile(table, [tail, 0.5, 1 - tail], axis=0)
    lines = np.where(there, lines if linear else np.exp(lines), np.nan)
    return np.vstack([np.sinh(grid), lines])


@settings.own()
def gaps(
    compared: "Records", variable: str = "direction_gap", *, ax: "Axes | None" = None
) -> "Axes":
    r"""Flow beside descent: a gap between them, above the band of the flow's own error.

    Args:
        compared: what ``gflow.compare`` returns, one or several.
        variable: one of its gaps; of layers or pairs the largest is drawn.
        ax: where to draw.
    """
    shown = labelled(compared)
    ax = axes_of(ax)
    x = "log_time"
    for index, (label, found) in enumerate(shown.items()):
        if variable not in found:
            names = [str(name) for name in found.data_vars if str(name).endswith("_gap")]
            raise ValueError(f"`variable` is {variable!r}; expected one of {', '.join(names)}.")
        x = "log_time" if "log_time" in found.coords else "log_risk"
        at = x_values(found, x)
        values = np.abs(found[variable].values).reshape(len(at), -1).max(axis=1)
        error = found[f"{variable}_error"].values.reshape(len(at), -1).max(axis=1)
        named = label if len(shown) > 1 else "_"
        curve(ax, at, values, positive=True, color=color_of(index), linewidth=1.2, label=named)
        ax.fill_between(at, 0, error, color=color_of(index), alpha=0.18, linewidth=0)
    if has_curves(ax):
        ax.set_yscale("log")
    name = variable.removesuffix("_gap").replace("_", " ")
    return finish(ax, x, f"{name}, descent minus flow")

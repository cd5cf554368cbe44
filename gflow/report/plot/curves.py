"""Curves of records: their labels, their styles, one curve a record or one an entry."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.report.plot.style import FONT, X_AXES, color_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    Records = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset]

LINES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))


def labelled(records: "Records") -> "dict[str, xr.Dataset]":
    """The records by label; a record without one is called by its kind and depth."""
    import xarray as xr

    if isinstance(records, xr.Dataset):
        return {own_label(records): records}
    if not isinstance(records, Iterable) or isinstance(records, str):
        raise ValueError(
            f"`records` is a {type(records).__name__}; expected records of trajectories "
            "(xarray.Dataset), one, several, or a mapping from label to record."
        )
    several = records.values() if isinstance(records, Mapping) else records
    named: dict[str, Any] = {}
    for record in several:
        if not isinstance(record, xr.Dataset):
            raise ValueError(
                f"`records` holds a {type(record).__name__}; expected records of trajectories "
                "(xarray.Dataset), one, several, or a mapping from label to record."
            )
        label, number = own_label(record), 2
        while label in named:
            label, number = f"{own_label(record)} ({number})", number + 1
        named[label] = record
    if not named:
        raise ValueError("`records` is empty; expected at least one record.")
    if isinstance(records, Mapping):
        return {str(label): record for label, record in records.items()}
    return named


def own_label(record: "xr.Dataset") -> str:
    """What a record is called that is given no label."""
    kind = record.attrs.get("kind", "run")
    if "layer" not in record.sizes:
        return str(kind)
    depth = record.sizes["layer"]
    return f"{kind}, {depth} layer{'s' if depth > 1 else ''}"


def styles_of(records: "Iterable[xr.Dataset]") -> list[dict[str, Any]]:
    """Flows as lines, descent dashed with markers: the two often lie on top of each other."""
    flows, descents, styles = 0, 0, []
    for record in records:
        if record.attrs.get("kind") == "descent":
            marker = {"marker": "os^D"[descents % 4], "markersize": 3, "markevery": 0.14}
            fill = {"markerfacecolor": "white", "markeredgewidth": 0.8}
            styles.append({"linestyle": LINES[1], "linewidth": 0.9, **marker, **fill})
            descents += 1
        else:
            lines = (LINES[0], *LINES[2:])
            styles.append({"linestyle": lines[flows % 3], "linewidth": 1.2})
            flows += 1
    return styles


def draw_lines(
    ax: "Axes", records: "Records", x: str, variable: str, positive: bool = False
) -> None:
    """One curve a record: colours by record, dashes for descent."""
    shown = labelled(records)
    styles = styles_of(shown.values())
    for index, (label, record) in enumerate(shown.items()):
        if variable not in record:
            continue
        style = styles[index]
        if record.attrs.get("kind") != "descent":
            style = {**style, "linestyle": "-"}  # the colour tells flows apart
        curve(
            ax,
            x_values(record, x),
            record[variable].values,
            positive,
            color=color_of(index),
            **style,
            label=label if len(shown) > 1 else "_",
        )
    if not has_curves(ax):
        say(ax, "undefined for these data")


def draw_families(
    ax: "Axes",
    records: "Records",
    x: str,
    dim: str,
    values: "Callable[[xr.Dataset], xr.DataArray | None]",
    name: Callable[[int], str],
    positive: bool = False,
) -> None:
    """One curve for each entry of ``dim`` and record: colours by entry, dashes by record.

    ``values`` of a record that has none is None.
    """
    shown = labelled(records)
    styles = styles_of(shown.values())
    drawn: dict[int, None] = {}
    for record, style in zip(shown.values(), styles, strict=True):
        table = values(record) if dim in record.sizes else None
        if table is None:
            continue
        for position, number in enumerate(record[dim].values.tolist()):
            color = color_of(number - 1)
            if curve(
                ax,
                x_values(record, x),
                table.isel({dim: position}).values,
                positive,
                color=color,
                label="_",
                **style,
            ):
                drawn[number] = None
    # Two columns: what the colours mean, and what the dashes mean.
    rows = max(len(drawn), len(shown)) if len(shown) > 1 else 0
    for number in sorted(drawn):
        ax.plot([], [], color=color_of(number - 1), label=name(number))
    for _ in range(rows - len(drawn)):
        ax.plot([], [], color="none", label=" ")
    if len(shown) > 1 and drawn:
        for label, style in zip(shown, styles, strict=True):
            ax.plot([], [], color="0.35", label=label, **style)
        for _ in range(rows - len(shown)):
            ax.plot([], [], color="none", label=" ")
    if not drawn:
        say(ax, f"no {dim}s to show")


def curve(ax: "Axes", x: np.ndarray, y: np.ndarray, positive: bool, **style: Any) -> "bool":
    """Draw what is finite (and positive, for a logarithmic axis); whether anything was."""
    keep = np.isfinite(x) & np.isfinite(y)
    if positive:
        keep &= y > 0
    if not keep.any():
        return False
    if keep.sum() == 1:
        style = {**style, "marker": "o", "markersize": 3, "markevery": None}
    ax.plot(x[keep], y[keep], **style)
    return True


def x_values(record: "xr.Dataset", x: str) -> np.ndarray:
    """The horizontal coordinate of every saved point; the risk is turned to grow."""
    if x not in X_AXES:
        raise ValueError(f"`x` is {x!r}; expected one of {', '.join(map(repr, X_AXES))}.")
    values = np.asarray(record[x].values, dtype=np.float64)
    return -values if x == "log_risk" else values


def has_curves(ax: "Axes") -> bool:
    """Whether anything with data was drawn."""
    return any(np.size(line.get_xdata()) for line in ax.get_lines())


def say(ax: "Axes", why: str) -> None:
    """Write in the middle why there is nothing to show."""
    middle = {"ha": "center", "va": "center", "transform": ax.transAxes}
    ax.text(0.5, 0.5, why, fontsize=FONT, color="0.4", **middle)


def entry_name(number: int) -> str:
    """What a layer or a pair is called in a legend."""
    return f"$k={number}$"

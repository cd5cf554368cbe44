r"""Figures of trajectories (public as ``gflow.plot``): one figure a function, axes returned.

Every function takes one record, a sequence of records, or a mapping from label to record. Flow is
a line, descent is dashed with markers; colours are those of Okabe and Ito, which colour-blind
readers can tell apart. Sizes are those of one column of a paper.

Axes whose values run from about zero to $10^4$ or $10^{16}$ ($\log t$, $-\log R$, steps) are
linear up to one and logarithmic beyond.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gflow.problem.data import Dataset

    Records = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset]

COLUMN = (3.4, 2.6)
"""The size of one figure in inches: one column of a paper."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, its yellow left out as too pale for a line on white."""

_FONT, _SMALL = 8, 7

_X_AXES = {
    "log_time": r"$\log\,t$",
    "log_risk": r"$-\log\,R$   (the risk falls to the right)",
    "num_steps": "step",
}


def summary(records: "Records", x: str = "log_time") -> np.ndarray:
    """Six panels: risk, norms, margin, direction error, alignment and rank one.

    Returns:
        The axes, shape (2, 3).
    """
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(2, 3, figsize=(10.2, 5.2), layout="constrained")
    panels = (risk, norms, margin, direction_error, alignment, rank_one)
    for panel, ax in zip(panels, axes.flat, strict=True):
        # Against itself the risk is a straight line; time says more.
        panel(records, x="log_time" if panel is risk and x == "log_risk" else x, ax=ax)
    return axes


def risk(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The logarithm of the risk, $\log R$; slope -1 in $\log t$ is $R = c/t$."""
    ax = _axes(ax)
    _draw_lines(ax, records, x, "log_risk")
    _long_scale(ax, "y")
    return _finish(ax, x, r"$\log\,R$")


def margin(
    records: "Records", x: str = "log_time", *, gap: bool = False, ax: "Axes | None" = None
) -> "Axes":
    r"""The normalised margin $\min_i q_i/\lVert w\rVert$ below the maximum margin $\gamma$.

    Args:
        records: one record or several.
        x: "log_time", "log_risk" or "num_steps".
        gap: draw $\gamma - \min_i q_i/\lVert w\rVert$ on a logarithmic axis instead.
        ax: where to draw.
    """
    ax = _axes(ax)
    if gap:
        _draw_lines(ax, records, x, "margin_gap", positive=True)
        if _has_curves(ax):
            ax.set_yscale("log")
        return _finish(ax, x, r"$\gamma - \min_i q_i/\|w\|$")
    shown = _labelled(records)
    _draw_lines(ax, records, x, "margin")
    for best in sorted({record.attrs.get("max_margin", np.nan) for record in shown.values()}):
        if np.isfinite(best):
            ax.axhline(best, color="black", linewidth=0.8, linestyle=":", label=r"$\gamma$")
    return _finish(ax, x, r"$\min_i q_i/\|w\|$")


def direction_error(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The distance of the end-to-end direction from the max-margin one."""
    ax = _axes(ax)
    _draw_lines(ax, records, x, "direction_error", positive=True)
    if _has_curves(ax):
        ax.set_yscale("log")
    return _finish(ax, x, r"$\|w/\|w\| - \bar u\|$")


def alignment(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The misalignment $1 - |\langle v_{k+1}, u_k\rangle|$ of every pair of neighbours."""
    ax = _axes(ax)
    _draw_families(
        ax, records, x, "pair", lambda record: record["misalignment"], _pair_name, positive=True
    )
    if _has_curves(ax):
        ax.set_yscale("log")
    return _finish(ax, x, r"$1 - |\langle v_{k+1},\, u_k\rangle|$")


def rank_one(
    records: "Records", x: str = "log_risk", *, gap: bool = False, ax: "Axes | None" = None
) -> "Axes":
    r"""Figure 1b of the paper: $\lVert W_k\rVert_2/\lVert W_k\rVert_F$ of every layer.

    Args:
        records: one record or several.
        x: "log_time", "log_risk" or "num_steps".
        gap: draw one minus the ratio on a logarithmic axis instead.
        ax: where to draw.
    """
    ax = _axes(ax)

    def values(record: "xr.Dataset") -> "xr.DataArray":
        return record["rank_one_gap"] if gap else 1 - record["rank_one_gap"]

    # The last layer, and any with one row or column, has rank one by its shape.
    _draw_families(ax, records, x, "layer", values, _layer_name, positive=gap)
    if gap and _has_curves(ax):
        ax.set_yscale("log")
    if not gap:
        ax.axhline(1.0, color="black", linewidth=0.6, linestyle=":", zorder=0)
    label = r"\|W_k\|_2/\|W_k\|_F"
    return _finish(ax, x, rf"$1 - {label}$" if gap else rf"${label}$")


def norms(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The Frobenius norm $\lVert W_k\rVert_F$ of every layer."""
    ax = _axes(ax)
    _draw_families(ax, records, x, "layer", lambda record: record["frobenius_norm"], _layer_name)
    ax.set_yscale("log")
    return _finish(ax, x, r"$\|W_k\|_F$")


def decision_lines(
    data: "Dataset",
    records: "Records",
    *,
    num_lines: int = 6,
    colorbar: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Figure 1a of the paper: the line $\langle w, x\rangle = 0$ turns to the max-margin one.

    Each record's line is drawn at several of its saved points, coloured by $\log t$; the first
    record solid, the next dashed. The max-margin line is black, in a grey strip of the width
    $2\gamma$ that no point enters.

    Args:
        data: two-dimensional data, which the records were computed from.
        records: one record or several.
        num_lines: lines a record, more of them where it turns; the last saved point always.
        colorbar: whether to draw the scale of the colours.
        ax: where to draw.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, SymLogNorm

    if data.dim != 2:
        raise ValueError(f"`data` has {data.dim} features; decision lines are drawn in two.")
    shown = _labelled(records)
    ax = _axes(ax, (3.4, 3.1))
    _draw_data(ax, data)
    reach = 1.06 * float(np.abs(data.inputs).max())
    solution = data.max_margin()
    if solution.separable:
        _draw_margin(ax, solution.direction, solution.margin, 2 * reach)
    picks = {label: _turning_points(record, num_lines) for label, record in shown.items()}
    times = np.concatenate(
        [record["log_time"].values[picks[label]] for label, record in shown.items()]
    )
    norm = SymLogNorm(linthresh=1.0, linscale=1.0, vmin=times.min(), vmax=times.max())
    # Without its pale end, which would vanish on white.
    colormap = ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1.0, 256)))
    for (label, record), style in zip(shown.items(), cycle(_LINES), strict=False):
        for place, index in enumerate(picks[label]):
            ax.plot(
                *_line_through_origin(record["end_to_end"].values[index], 2 * reach),
                color=colormap(norm(float(record["log_time"].values[index]))),
                linestyle=style,
                linewidth=1.2,
                zorder=2 + place / 100,
                label="_",
            )
        if len(shown) > 1:
            ax.plot([], [], color=colormap(0.6), linestyle=style, linewidth=1.2, label=label)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel(r"$x_1$", fontsize=_FONT)
    ax.set_ylabel(r"$x_2$", fontsize=_FONT)
    ax.locator_params(nbins=5)
    ax.tick_params(which="both", labelsize=_SMALL)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3 if len(labels) > 4 else 2,
        fontsize=_SMALL - 0.5,
        frameon=False,
        handlelength=1.9,
        columnspacing=1.0,
        labelspacing=0.3,
    )
    if colorbar:
        scale = ax.figure.colorbar(ScalarMappable(norm, colormap), ax=ax, shrink=0.8, pad=0.02)
        scale.set_label(r"$\log\,t$", fontsize=_FONT)
        scale.ax.tick_params(which="both", labelsize=_SMALL)
        _long_ticks(scale.ax.yaxis, times.min(), times.max())
    return ax


# -------------------------------------------------------------------------------------------------
# Curves
# -------------------------------------------------------------------------------------------------


def _labelled(records: "Records") -> "dict[str, xr.Dataset]":
    """The records by label; a record without one is called by its kind and depth."""
    import xarray as xr

    if isinstance(records, xr.Dataset):
        return {_own_label(records): records}
    if isinstance(records, Mapping):
        return {str(label): record for label, record in records.items()}
    named: dict[str, Any] = {}
    for record in records:
        if not isinstance(record, xr.Dataset):
            raise ValueError(
                f"`records` holds a {type(record).__name__}; expected records of trajectories "
                "(xarray.Dataset), one, several, or a mapping from label to record."
            )
        label, number = _own_label(record), 2
        while label in named:
            label, number = f"{_own_label(record)} ({number})", number + 1
        named[label] = record
    if not named:
        raise ValueError("`records` is empty; expected at least one record.")
    return named


def _own_label(record: "xr.Dataset") -> str:
    kind = record.attrs.get("kind", "run")
    if "layer" not in record.sizes:
        return str(kind)
    depth = record.sizes["layer"]
    return f"{kind}, {depth} layer{'s' if depth > 1 else ''}"


_LINES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))


def _styles(records: "Iterable[xr.Dataset]") -> list[dict[str, Any]]:
    """Flows as lines, descent dashed with markers: the two often lie on top of each other."""
    flows, descents, styles = 0, 0, []
    for record in records:
        if record.attrs.get("kind") == "descent":
            marker = {"marker": "os^D"[descents % 4], "markersize": 3, "markevery": 0.14}
            fill = {"markerfacecolor": "white", "markeredgewidth": 0.8}
            styles.append({"linestyle": _LINES[1], "linewidth": 0.9, **marker, **fill})
            descents += 1
        else:
            lines = (_LINES[0], *_LINES[2:])
            styles.append({"linestyle": lines[flows % 3], "linewidth": 1.2})
            flows += 1
    return styles


def _draw_lines(
    ax: "Axes", records: "Records", x: str, variable: str, positive: bool = False
) -> None:
    """One curve a record: colours by record, dashes for descent."""
    shown = _labelled(records)
    styles = _styles(shown.values())
    for index, (label, record) in enumerate(shown.items()):
        if variable not in record:
            continue
        style = styles[index]
        if record.attrs.get("kind") != "descent":
            style = {**style, "linestyle": "-"}  # the colour tells flows apart
        _curve(
            ax,
            _x_values(record, x),
            record[variable].values,
            positive,
            color=COLORS[index % len(COLORS)],
            **style,
            label=label if len(shown) > 1 else "_",
        )
    if not _has_curves(ax):
        _say_nothing_to_show(ax, "undefined: the data are not separable")


def _draw_families(
    ax: "Axes",
    records: "Records",
    x: str,
    dim: str,
    values: "Callable[[xr.Dataset], xr.DataArray]",
    name: Callable[[int], str],
    positive: bool = False,
) -> None:
    """One curve for each entry of ``dim`` and record: colours by entry, dashes by record."""
    shown = _labelled(records)
    styles = _styles(shown.values())
    drawn: dict[int, None] = {}
    for record, style in zip(shown.values(), styles, strict=True):
        if dim not in record.sizes:
            continue
        table = values(record)
        for position, number in enumerate(record[dim].values.tolist()):
            color = COLORS[(number - 1) % len(COLORS)]
            if _curve(
                ax,
                _x_values(record, x),
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
        ax.plot([], [], color=COLORS[(number - 1) % len(COLORS)], label=name(number))
    for _ in range(rows - len(drawn)):
        ax.plot([], [], color="none", label=" ")
    if len(shown) > 1 and drawn:
        for label, style in zip(shown, styles, strict=True):
            ax.plot([], [], color="0.35", label=label, **style)
        for _ in range(rows - len(shown)):
            ax.plot([], [], color="none", label=" ")
    if not drawn:
        _say_nothing_to_show(ax, f"no {dim}s to show")


def _say_nothing_to_show(ax: "Axes", why: str) -> None:
    middle = {"ha": "center", "va": "center", "transform": ax.transAxes}
    ax.text(0.5, 0.5, why, fontsize=_FONT, color="0.4", **middle)


def _curve(ax: "Axes", x: np.ndarray, y: np.ndarray, positive: bool, **style: Any) -> "bool":
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


def _has_curves(ax: "Axes") -> bool:
    return any(np.size(line.get_xdata()) for line in ax.get_lines())


def _x_values(record: "xr.Dataset", x: str) -> np.ndarray:
    if x not in _X_AXES:
        raise ValueError(f"`x` is {x!r}; expected one of {', '.join(map(repr, _X_AXES))}.")
    values = np.asarray(record[x].values, dtype=np.float64)
    return -values if x == "log_risk" else values


def _layer_name(number: int) -> str:
    return f"$k={number}$"


def _pair_name(number: int) -> str:
    return f"$k={number}$"


# -------------------------------------------------------------------------------------------------
# Data
# -------------------------------------------------------------------------------------------------


def _draw_data(ax: "Axes", data: "Dataset") -> None:
    for label, color, marker in ((1, COLORS[0], "o"), (-1, COLORS[1], "X")):
        points = np.asarray(data.inputs)[np.asarray(data.labels) == label]
        ax.scatter(
            *points.T,
            s=13,
            color=color,
            marker=marker,
            edgecolors="white",
            linewidths=0.3,
            zorder=4,
            label=f"$y = {label:+d}$",
        )


def _draw_margin(ax: "Axes", direction: np.ndarray, margin: float, length: float) -> None:
    """The max-margin line, and the strip of points closer to it than the margin."""
    x, y = _line_through_origin(direction, length)
    shift = margin * direction
    corners = np.array(
        [
            [x[0] + shift[0], y[0] + shift[1]],
            [x[1] + shift[0], y[1] + shift[1]],
            [x[1] - shift[0], y[1] - shift[1]],
            [x[0] - shift[0], y[0] - shift[1]],
        ]
    )
    ax.fill(*corners.T, color="0.92", zorder=0)
    ax.plot(x, y, color="black", linewidth=2.6, zorder=1, label="max margin")


def _turning_points(record: "xr.Dataset", count: int) -> np.ndarray:
    """Indices of saved points after the start, denser where the end-to-end vector turns."""
    w = record["end_to_end"].values[1:]
    angle = np.unwrap(np.arctan2(w[:, 1], w[:, 0]))
    # The square root of the angle turned: late, small turns are to be seen too.
    turned = np.concatenate([[0.0], np.cumsum(np.sqrt(np.abs(np.diff(angle))))])
    found = np.searchsorted(turned, np.linspace(0.0, turned[-1], count))
    return 1 + np.unique(np.append(np.minimum(found, len(w) - 1), len(w) - 1))


def _line_through_origin(normal: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    along = np.array([-normal[1], normal[0]]) / np.linalg.norm(normal)
    ends = np.array([-length, length])
    return ends * along[0], ends * along[1]


# -------------------------------------------------------------------------------------------------
# Axes
# -------------------------------------------------------------------------------------------------


def _axes(ax: "Axes | None", size: tuple[float, float] = COLUMN) -> "Axes":
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _finish(ax: "Axes", x: str, y_label: str) -> "Axes":
    """Scales, labels and legend that all curves share."""
    _long_scale(ax, "x")
    ax.set_xlabel(_X_AXES[x], fontsize=_FONT)
    ax.set_ylabel(y_label, fontsize=_FONT)
    ax.tick_params(which="both", labelsize=_SMALL)
    _no_minor_labels(ax)
    ax.grid(True, linewidth=0.3, color="0.85")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, title=None)
    return ax


def _legend(ax: "Axes", title: str | None) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(
            handles,
            labels,
            title=title,
            fontsize=_SMALL - 0.5,
            ncols=2 if len(labels) > 5 else 1,
            framealpha=0.85,
            edgecolor="0.85",
            handlelength=1.9,
            columnspacing=1.0,
            labelspacing=0.3,
            borderpad=0.3,
        )


def _long_scale(ax: "Axes", which: str) -> None:
    """Linear up to one and logarithmic beyond, where the values span more than linear shows."""
    lines = [line for line in ax.get_lines() if line.get_transform() == ax.transData]
    values = [np.asarray(getattr(line, f"get_{which}data")(), dtype=np.float64) for line in lines]
    values = np.concatenate([np.zeros(0), *values])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return
    low, high = float(values.min()), float(values.max())
    if max(abs(low), abs(high)) <= 50:
        return
    axis = getattr(ax, f"{which}axis")
    getattr(ax, f"set_{which}scale")("symlog", linthresh=1.0, linscale=0.4)
    getattr(ax, f"set_{which}lim")(*_padded(low, high))
    _long_ticks(axis, low, high)


def _no_minor_labels(ax: "Axes") -> None:
    """Label only powers of ten where a logarithmic axis shows two of them or more."""
    from matplotlib.ticker import NullFormatter

    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and np.floor(np.log10(high)) > np.ceil(np.log10(low)):
        ax.yaxis.set_minor_formatter(NullFormatter())


def _padded(low: float, high: float) -> tuple[float, float]:
    """Limits a little outside, in the coordinate that looks even on the axis."""
    a, b = np.arcsinh(low), np.arcsinh(high)
    room = 0.03 * (b - a)
    return float(np.sinh(a - room)), float(np.sinh(b + room))


def _long_ticks(axis: Any, low: float, high: float) -> None:
    """At most about six labelled powers of ten a side, and zero."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = int(np.floor(np.log10(1.01 * max(abs(low), abs(high), 1.0))))
    stride = max(1, int(np.ceil(decades / 5)))
    powers = [10.0**k for k in range(0, decades + 1, stride)]
    ticks = [-p for p in reversed(powers)] + [0.0] + powers
    slack = 1e-2 * np.abs(np.array([low, high]))
    inside = [tick for tick in ticks if low - slack[0] <= tick <= high + slack[1]]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power_label))


def _power_label(value: float, _: object = None) -> str:
    size = abs(value)
    if size < 100:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    sign = "-" if value < 0 else ""
    return rf"${sign}10^{{{round(np.log10(size))}}}$"


def save_figure(axes: Any, path: Any, *, dpi: int = 200) -> "Figure":
    """Write the figure that ``axes`` belong to, and close it."""
    import matplotlib.pyplot as plt

    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return figure

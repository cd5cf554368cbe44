"""The picture of two-dimensional data: points, max-margin line, decision lines through time."""

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.problem import settings
from gflow.report.plot.curves import LINES, labelled
from gflow.report.plot.style import COLORS, FONT, SMALL, axes_of, long_ticks

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes

    from gflow.problem.data import Dataset
    from gflow.report.plot.curves import Records


@settings.own()
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

    shown = labelled(records)
    ax, reach = _picture(data, ax)
    picks = {label: _turning_points(record, num_lines) for label, record in shown.items()}
    times = np.concatenate(
        [record["log_time"].values[picks[label]] for label, record in shown.items()]
    )
    norm = SymLogNorm(linthresh=1.0, linscale=1.0, vmin=times.min(), vmax=times.max())
    # Without its pale end, which would vanish on white.
    colormap = ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1.0, 256)))
    for (label, record), style in zip(shown.items(), cycle(LINES), strict=False):
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
    _legend_above(ax)
    if colorbar:
        scale = ax.figure.colorbar(ScalarMappable(norm, colormap), ax=ax, shrink=0.8, pad=0.02)
        scale.set_label(r"$\log\,t$", fontsize=FONT)
        scale.ax.tick_params(which="both", labelsize=SMALL)
        long_ticks(scale.ax.yaxis, times.min(), times.max())
    return ax


def _picture(data: "Dataset", ax: "Axes | None" = None) -> "tuple[Axes, float]":
    """The points and their max-margin line; the axes, and how far they reach."""
    if data.dim != 2:
        raise ValueError(f"`data` has {data.dim} features; decision lines are drawn in two.")
    ax = axes_of(ax, (3.4, 3.1))
    draw_points(ax, data)
    reach = 1.06 * float(np.abs(data.inputs).max())
    solution = data.max_margin()
    if solution.separable:
        _draw_margin(ax, solution.direction, solution.margin, 2 * reach)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel(r"$x_1$", fontsize=FONT)
    ax.set_ylabel(r"$x_2$", fontsize=FONT)
    ax.locator_params(nbins=5)
    ax.tick_params(which="both", labelsize=SMALL)
    return ax, reach


def _legend_above(ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3 if len(labels) > 4 else 2,
        fontsize=SMALL - 0.5,
        frameon=False,
        handlelength=1.9,
        columnspacing=1.0,
        labelspacing=0.3,
    )


def draw_points(ax: "Axes", data: "Dataset") -> None:
    """The first two features of data with labels -1 and +1."""
    for label, color, marker in ((1, COLORS[0], "o"), (-1, COLORS[1], "X")):
        points = np.asarray(data.inputs)[np.asarray(data.labels) == label, :2]
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


@settings.own()
def animation(
    data: "Dataset",
    records: "Records",
    *,
    num_frames: int = 60,
    interval: int = 80,
) -> "FuncAnimation":
    r"""Figure 1a in motion: decision lines turn to the max-margin line, and leave their traces.

    ``gflow.plot.animation(data, flow).save("flow.gif")`` writes it; in a notebook show
    ``HTML(animation.to_jshtml())``.

    Args:
        data: two-dimensional data, which the records were computed from.
        records: one record or several; each frame shows the same share of every record's turn.
        num_frames: frames, more of them where the first record turns.
        interval: milliseconds a frame.
    """
    from matplotlib.animation import FuncAnimation

    if num_frames < 2:
        raise ValueError(f"`num_frames` is {num_frames}; expected at least 2.")
    shown = labelled(records)
    ax, reach = _picture(data)
    picks = {label: _frames(record, num_frames) for label, record in shown.items()}
    lines = []
    for index, label in enumerate(shown):
        style = {"color": COLORS[2 + index % (len(COLORS) - 2)], "zorder": 3}
        trace = ax.plot([], [], linewidth=0.5, alpha=0.35, label="_", **style)[0]
        line = ax.plot([], [], linewidth=1.8, linestyle=LINES[index % len(LINES)], **style)[0]
        line.set_label(label if len(shown) > 1 else "_")
        lines.append((line, trace))
    _legend_above(ax)
    back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    told = ax.text(0.02, 0.02, "", transform=ax.transAxes, fontsize=SMALL, bbox=back, zorder=5)

    def draw(frame: int) -> list[Any]:
        for (line, trace), (label, record) in zip(lines, shown.items(), strict=True):
            past = [
                np.column_stack(_line_through_origin(w, 2 * reach))
                for w in record["end_to_end"].values[picks[label][: frame + 1]]
            ]
            line.set_data(*past[-1].T)
            # One line for all traces, broken between them.
            broken = np.full((1, 2), np.nan)
            trace.set_data(*np.concatenate([part for each in past for part in (each, broken)]).T)
        at = next(iter(shown.values())).isel(point=picks[next(iter(shown))][frame])
        told.set_text(
            rf"$\log\,t = {float(at.log_time):.3g}$,  $\log\,R = {float(at.log_risk):.3g}$"
        )
        return [told, *(each for pair in lines for each in pair)]

    figure = ax.get_figure(root=True)
    assert figure is not None  # of axes that were just made
    return FuncAnimation(figure, draw, frames=num_frames, interval=interval, blit=True)


def _frames(record: "xr.Dataset", count: int) -> np.ndarray:
    """So many saved points after the start, in the order of time, repeated where there are few."""
    picks = _turning_points(record, count)
    return picks[np.linspace(0, len(picks) - 1, count).round().astype(int)]

"""Networks with kinks: where their neurons switch, and when their units did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.analysis.kinks import kinks
from gflow.problem import settings
from gflow.report.plot.curves import say, x_values
from gflow.report.plot.plane import draw_points
from gflow.report.plot.style import COLORS, FONT, SMALL, axes_of, color_of, finish

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from gflow.problem.data import Dataset

MANY = 30
"""So many rows are named; more are numbered only."""

LARGEST, LEAST = 60.0, 3.0
"""Areas of the dots of neurons, in square points."""

ARROW = 0.3
"""Length of the longest neuron with a constant feature, as a part of the picture's half width."""

MARKS = (("crossed", "|", 0), ("left", "x", 1), ("stepped over", ".", 5))
"""Words of the log that are marks, what marks them, and the number of their colour."""


@settings.own()
def neurons(
    data: "Dataset", record: "xr.Dataset", *, points: Sequence[int] = (0, -1)
) -> np.ndarray:
    r"""The neurons of a network of one hidden layer in the plane, and where each of them switches.

    Each neuron is a dot at its weights, in units of the largest, on the side where it is on, with
    the line $\langle w_j, x\rangle = 0$ where it switches. With a constant third feature that line
    does not pass through the origin; the weights begin at its nearest point then. The area of a dot
    is that of its output weight, its colour the sign (of several outputs, which one is largest).

    Args:
        data: of two features, or of two and a constant one, which the record was computed from.
        record: of two matrices, with weights: ``keep_weights=True``.
        points: the saved points to draw, one panel each.

    Returns:
        The axes, one each of the ``points``.

    Raises:
        ValueError: when data or record are others, or a point is not saved.
    """
    import matplotlib.pyplot as plt

    inner, outer = _two_matrices(record)
    inputs = np.asarray(data.inputs)
    constant = float(inputs[0, -1]) if data.dim == 3 and np.ptp(inputs[:, -1]) == 0.0 else 0.0
    if data.dim != inner.shape[2] or (data.dim != 2 and constant == 0.0):
        raise ValueError(
            f"`data` has {data.dim} features and `record` neurons of {inner.shape[2]} weights; "
            "expected two of both, or three of which the last feature is constant."
        )
    count = len(inner)
    if not len(points) or not all(-count <= at < count for at in points):
        raise ValueError(f"`points` is {points}; expected numbers of the {count} saved points.")
    panels = plt.subplots(
        1, len(points), figsize=(2.5 * len(points), 2.7), layout="constrained", squeeze=False
    )[1][0]
    reach = 1.2 * float(np.abs(inputs[:, :2]).max())
    for ax, at in zip(panels, points, strict=True):
        if "one output" in data.offers:  # labels -1 and +1
            draw_points(ax, data)
        else:
            ax.scatter(*inputs[:, :2].T, s=13, color="0.6", zorder=4)
        _draw_neurons(ax, inner[at], outer[at], constant, reach)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_title(_where(record, at), fontsize=FONT)
        ax.set_xlabel(r"$x_1$", fontsize=FONT)
        ax.locator_params(nbins=5)
        ax.tick_params(which="both", labelsize=SMALL)
    panels[0].set_ylabel(r"$x_2$", fontsize=FONT)
    return panels


def _two_matrices(record: "xr.Dataset") -> tuple[np.ndarray, np.ndarray]:
    names = [name for name in record.data_vars if str(name).startswith("weights_")]
    if not names:
        raise ValueError("`record` holds no weights; make it with `keep_weights=True`.")
    shapes = [record[name].shape for name in names]
    if sorted(map(str, names)) != ["weights_1", "weights_2"] or any(len(s) != 3 for s in shapes):
        raise ValueError(
            f"`record` has weights of shapes {shapes}, saved points first; expected two matrices, "
            "of the neurons and of the outputs. Give the data a constant feature instead of biases."
        )
    return record["weights_1"].values, record["weights_2"].values


def _draw_neurons(
    ax: "Axes", inner: np.ndarray, outer: np.ndarray, constant: float, reach: float
) -> None:
    flat, shift = inner[:, :2], inner[:, 2:].sum(axis=1) * constant
    size, weight = np.linalg.norm(flat, axis=1), np.linalg.norm(outer, axis=0)
    if outer.shape[0] == 1:
        colors = [COLORS[0 if a > 0 else 1] for a in outer[0]]
    else:
        colors = [color_of(int(k)) for k in np.argmax(np.abs(outer), axis=0)]
    longest = (ARROW if constant else 0.9) * reach / max(float(size.max()), 1e-300)
    areas = LEAST + LARGEST * weight / max(float(weight.max()), 1e-300)
    for v, b, norm, area, color in zip(flat, shift, size, areas, colors, strict=True):
        if norm == 0.0:
            continue
        foot = -b * v / norm**2
        tip = foot + v * longest
        ax.axline(foot, foot + np.array([-v[1], v[0]]) / norm, lw=0.5, color=color, zorder=2)
        ax.plot(*np.stack([foot, tip], axis=1), lw=0.7, color=color, alpha=0.6, zorder=3)
        ax.scatter(*tip, s=area, color=color, edgecolors="black", linewidths=0.4, zorder=5)


def _where(record: "xr.Dataset", at: int) -> str:
    log_time, log_risk = float(record["log_time"][at]), float(record["log_risk"][at])
    when = r"$t$ = 0" if np.isneginf(log_time) else rf"$\log\,t$ = {log_time:.3g}"
    return rf"{when},  $\log\,R$ = {log_risk:.3g}".replace("-", "\N{MINUS SIGN}")


@settings.own()
def patterns(record: "xr.Dataset", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""When each unit, a neuron at a point of the data, crossed its kink, slid along it and left.

    One row a unit that met its kink, in the order in which they first did; a bar where it slides.

    Args:
        record: of a flow of a network whose kinks gflow knows.
        x: "log_time", "log_risk" or "num_steps".
        ax: where to draw.

    Raises:
        ValueError: when the record has no log of kinks.
    """
    log, saved = kinks(record), x_values(record, x)
    ax, finite = axes_of(ax), saved[np.isfinite(saved)]
    name = "step" if x == "num_steps" else x
    at = np.asarray(log[name].values, dtype=np.float64)
    at = -at if x == "log_risk" else at
    if not len(at):
        say(ax, "no unit met its kink")
        return finish(ax, x, "unit")
    units = list(zip(*(log[part].values.tolist() for part in _UNIT), strict=True))
    rows = {unit: row for row, unit in enumerate(dict.fromkeys(units))}
    seen = at[np.isfinite(at)]
    first, last = min([*finite, *seen]), max([*finite, *seen])
    at = np.clip(at, first, last)  # what begins on its kink does so at log t = -inf
    row = np.array([rows[unit] for unit in units])
    events = log["event"].values
    bars = _slides(at, row, events, last)
    if len(bars):
        broken = np.array([[[a, r], [b, r], [np.nan, np.nan]] for r, a, b in bars]).reshape(-1, 2)
        width: Any = {"linewidth": max(1.0, min(4.0, 130.0 / len(rows)))}
        style = {"color": COLORS[2], "alpha": 0.55, "solid_capstyle": "butt", **width}
        ax.plot(*broken.T, label="slides", **style)
    for word, marker, color in MARKS:
        its = events == word
        if np.any(its):
            style = {"marker": marker, "markersize": 4, "linestyle": "none"}
            ax.plot(at[its], row[its], color=color_of(color), label=word, **style)
    several = len({unit[0] for unit in rows}) > 1
    if len(rows) <= MANY:
        names = [
            (f"layer {layer:g}, " if several else "") + f"neuron {neuron:g}, point {point:g}"
            for layer, neuron, point in rows
        ]
        ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.3, -0.7)
    finish(ax, x, "unit")
    if len(rows) <= MANY:
        ax.tick_params(axis="y", labelsize=min(float(SMALL), 150.0 / len(rows)))
    return ax


_UNIT = ("layer", "neuron", "point")


def _slides(
    at: np.ndarray, row: np.ndarray, events: np.ndarray, last: float
) -> list[tuple[int, float, float]]:
    """The row of each slide, where it begins and where it ends."""
    begun: dict[int, float] = {}
    found = []
    for here, unit, event in zip(at.tolist(), row.tolist(), events.tolist(), strict=True):
        if event == "slid":
            begun.setdefault(unit, here)
        elif unit in begun:
            found.append((unit, begun.pop(unit), here))
    return found + [(unit, here, last) for unit, here in begun.items()]

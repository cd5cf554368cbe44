"""What all figures share: sizes, colours, fonts, and axes that show many decades."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.problem.arguments import file_path, shown
from gflow.quantities import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = (3.4, 2.6)
"""The size of one figure in inches: one column of a paper."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, its yellow left out as too pale for a line on white."""

FONT, SMALL = 8, 7

X_AXES = {
    "log_time": quantity("log_time").symbol,
    "log_risk": r"$-\log\,R$   (the risk falls to the right)",
    "num_steps": "step",
}


def symbol(name: str) -> str:
    """How the paper writes a variable, or else its name."""
    return quantity(name).symbol or name


def color_of(number: int) -> str:
    """The colour of the entry of this number, counted from zero."""
    return COLORS[number % len(COLORS)]


def axes_of(ax: "Axes | None", size: tuple[float, float] = COLUMN) -> "Axes":
    """The axes given, or new ones."""
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    hint = " Choose one of them, as `axes[0]`." if isinstance(ax, np.ndarray | list | tuple) else ""
    if not isinstance(ax, Axes):
        raise ValueError(f"`ax` is a {type(ax).__name__}; expected one Axes of matplotlib.{hint}")
    return ax


def finish(ax: "Axes", x: str, y_label: str) -> "Axes":
    """Scales, labels and legend that all curves against time, risk or steps share."""
    long_scale(ax, "x")
    label_axes(ax, X_AXES[x], y_label)
    legend(ax)
    return ax


def label_axes(ax: "Axes", x_label: str, y_label: str) -> None:
    """Labels, ticks and grid."""
    ax.set_xlabel(x_label, fontsize=FONT)
    ax.set_ylabel(y_label, fontsize=FONT)
    ax.tick_params(which="both", labelsize=SMALL)
    no_minor_labels(ax)
    ax.grid(True, linewidth=0.3, color="0.85")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend(ax: "Axes", loc: Any = "best") -> None:
    """A small legend, in two columns when long."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(
            handles,
            labels,
            loc=loc,
            fontsize=SMALL - 0.5,
            ncols=2 if len(labels) > 5 else 1,
            framealpha=0.85,
            edgecolor="0.85",
            handlelength=1.9,
            columnspacing=1.0,
            labelspacing=0.3,
            borderpad=0.3,
        )


def long_scale(ax: "Axes", which: str) -> None:
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
    getattr(ax, f"set_{which}lim")(*padded(low, high))
    long_ticks(axis, low, high)


def no_minor_labels(ax: "Axes") -> None:
    """Label only powers of ten where a logarithmic axis shows two of them or more."""
    from matplotlib.ticker import NullFormatter

    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and np.floor(np.log10(high)) > np.ceil(np.log10(low)):
        ax.yaxis.set_minor_formatter(NullFormatter())


def padded(low: float, high: float) -> tuple[float, float]:
    """Limits a little outside, in the coordinate that looks even on the axis."""
    a, b = np.arcsinh(low), np.arcsinh(high)
    room = 0.03 * (b - a)
    return float(np.sinh(a - room)), float(np.sinh(b + room))


def long_ticks(axis: Any, low: float, high: float) -> None:
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
    axis.set_major_formatter(FuncFormatter(power_label))


def power_label(value: float, _: object = None) -> str:
    """A number below a hundred as it is, a power of ten as such."""
    size = abs(value)
    if size < 100:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    sign = "-" if value < 0 else ""
    return rf"${sign}10^{{{round(np.log10(size))}}}$"


def save_figure(axes: Any, path: Any, *, dpi: int = 200) -> "Figure":
    """Write the figure that ``axes`` belong to, and close it."""
    import matplotlib.pyplot as plt

    first: Any = next(iter(np.ravel(axes)), None)
    if not hasattr(first, "figure"):
        raise ValueError(
            f"`axes` is {shown(axes)}; expected what a function of gflow.plot returns."
        )
    figure = first.figure
    path = file_path("path", path)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return figure

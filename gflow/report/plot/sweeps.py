"""Figures of sweeps: a quantity over two parameters."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.problem import settings
from gflow.quantities import DIMENSIONS
from gflow.report.plot.style import FONT, SMALL

if TYPE_CHECKING:
    import xarray as xr

SPAN = 1e8
"""What colours show at most of a positive quantity: less than the largest over this is dark."""


def swept(record: "xr.Dataset") -> list[str]:
    """The parameters of a sweep that take several numbers, as its dimensions."""
    return [
        str(dim)
        for dim in record.dims
        if dim not in DIMENSIONS and dim in record.coords and record.sizes[dim] > 1
    ]


@settings.own()
def phase_diagram(
    record: "xr.Dataset",
    variable: str = "misalignment",
    *,
    x: str | None = None,
    y: str | None = None,
    panel: str | None = None,
    at: int = -1,
) -> Any:
    r"""A quantity at the end of a sweep's trajectories over two of its parameters, as colours.

    The largest over layers or pairs, the median over all other parameters, such as seeds. Colours
    are logarithmic for what is positive and spans more than a decade. A cell is crossed out where
    no trajectory gives a value, and in each the number is written.

    Args:
        record: what ``gflow.sweep`` returned.
        variable: which quantity.
        x, y: the parameters across and up; by default the second and the first of the grid, other
            than ``seed``.
        panel: the parameter of which each value has a panel, or None; by default the third.
        at: the saved point.

    Returns:
        The axes, one a panel.

    Raises:
        ValueError: when the record has no such variable, or fewer than two parameters.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    if variable not in record or "point" not in record[variable].dims:
        raise ValueError(
            f"`variable` is {variable!r}; expected one along trajectories, such as 'misalignment'."
        )
    named = sorted(swept(record), key=lambda name: name == "seed")
    for given in (x, y, panel):
        if given is not None and given not in named:
            raise ValueError(f"`record` has no parameter {given!r}; it has {named}.")
    free = [name for name in named if name not in (x, y, panel)]
    defaults = x is None and y is None
    y = y or (free.pop(0) if free else None)
    x = x or (free.pop(0) if free else None)
    if x is None or y is None:
        raise ValueError(f"`record` varies in {named}; expected two parameters or more.")
    if panel is None and defaults and free and free[0] != "seed":
        panel = free[0]

    values = record[variable].isel(point=at)
    values = values.max([dim for dim in values.dims if dim in DIMENSIONS])
    values = values.median([dim for dim in values.dims if dim not in (x, y, panel)])
    panels = [values] if panel is None else [values.sel({panel: v}) for v in record[panel].values]
    known = values.values[np.isfinite(values.values)]
    low, high = (float(np.min(known)), float(np.max(known))) if known.size else (0.0, 1.0)
    logarithmic = low > 0 and high > 10 * low
    norm = LogNorm(max(low, high / SPAN), high) if logarithmic else Normalize(low, high)

    width, height = max(1.5, 0.6 * record.sizes[x]), max(1.1, 0.34 * record.sizes[y])
    fig, axes = plt.subplots(
        1,
        len(panels),
        squeeze=False,
        sharey=True,
        figsize=(len(panels) * width + 1.5, height + 0.9),
        layout="constrained",
    )
    for ax, shown in zip(axes[0], panels, strict=True):
        grid = shown.transpose(y, x).values
        image = ax.imshow(
            np.ma.masked_invalid(grid), norm=norm, cmap="cividis", origin="lower", aspect="auto"
        )
        _write(ax, grid, norm)
        for axis, name in ((ax.xaxis, x), (ax.yaxis, y)):
            labels = [_label(value) for value in record[name].values]
            axis.set_ticks(range(len(labels)), labels)
            axis.set_tick_params(length=0, labelsize=SMALL)
        ax.set_xlabel(x, fontsize=FONT)
        if panel is not None:
            ax.set_title(f"{panel} = {_label(shown[panel].values)}", fontsize=FONT)
    axes[0, 0].set_ylabel(y, fontsize=FONT)
    over = [name for name in named if name not in (x, y, panel)]
    label = variable.replace("_", " ") + (f",\nmedian over {', '.join(over)}" if over else "")
    bar = fig.colorbar(image, ax=axes, aspect=12)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=SMALL)
    return axes[0]


def _write(ax: Any, grid: np.ndarray, norm: Any) -> None:
    """The number in each cell, in a colour that stands out."""
    for (row, column), value in np.ndenumerate(grid):
        if not np.isfinite(value):
            ax.text(column, row, "x", ha="center", va="center", color="0.5")
            continue
        dark = norm(max(value, norm.vmin)) < 0.6
        text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
        text = f"{value:.3g}" if 0.01 <= abs(value) < 1000 or value == 0 else text
        color = "white" if dark else "black"
        ax.text(column, row, text, ha="center", va="center", color=color, fontsize=SMALL - 1)


def _label(value: Any) -> str:
    return f"{value:g}" if np.issubdtype(np.asarray(value).dtype, np.number) else str(value)

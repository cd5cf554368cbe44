"""What layers and their product are made of: singular values through time."""

from typing import TYPE_CHECKING

import numpy as np

from gflow.problem import settings
from gflow.report.plot.curves import curve, entry_name, x_values
from gflow.report.plot.style import axes_of, color_of, finish

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

RESOLVED = 1e-15
"""Singular values below so much of the largest are round-off of float64 weights."""


@settings.own()
def singular_values(
    record: "xr.Dataset", x: str = "log_risk", *, layer: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    r"""Every singular value $\sigma_j(W_k)$: the first grows, the others stay: rank one.

    The first of each layer is a thick line, the others are thin; colours tell layers apart. Values
    that float64 weights do not resolve are left out.

    Args:
        record: one record with its weights: ``keep_weights=True``.
        x: "log_time", "log_risk" or "num_steps".
        layer: this layer alone, counted from 1 at the input.
        ax: where to draw.

    Raises:
        ValueError: when the record has no weights or not this layer.
    """
    names = [name for name in record.data_vars if str(name).startswith("weights_")]
    if not names:
        raise ValueError("`record` holds no weights; make it with `keep_weights=True`.")
    layers = range(1, len(names) + 1) if layer is None else [layer]
    if layer is not None and not 1 <= layer <= len(names):
        raise ValueError(f"`layer` is {layer}; expected 1 to {len(names)}.")
    ax = axes_of(ax)
    for k in layers:
        found = np.linalg.svd(record[f"weights_{k}"].values, compute_uv=False)
        found = np.where(found > RESOLVED * found[:, :1], found, np.nan)
        for j, values in enumerate(found.T):
            curve(
                ax,
                x_values(record, x),
                values,
                positive=True,
                color=color_of(k - 1),
                linewidth=1.6 if j == 0 else 0.7,
                label=entry_name(k) if j == 0 else "_",
            )
    ax.set_yscale("log")
    return finish(ax, x, r"$\sigma_j(W_k)$")


@settings.own()
def modes(
    record: "xr.Dataset",
    x: str = "log_time",
    *,
    sources: "np.ndarray | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""The singular values of $W_L \cdots W_1$: how modes are learnt one after the other.

    Args:
        record: one record of several outputs.
        x: "log_time", "log_risk" or "num_steps".
        sources: values to which they tend, such as those of the target, as dotted lines.
        ax: where to draw.

    Raises:
        ValueError: when the record has no such values.
    """
    if "end_to_end_values" not in record:
        raise ValueError(
            "`record` has no singular values of the end-to-end matrix; expected one of a deep "
            "linear network on targets or classes."
        )
    ax = axes_of(ax)
    for j, values in enumerate(record["end_to_end_values"].values.T):
        style = {"color": color_of(j), "linewidth": 1.2, "label": f"{j + 1}"}
        curve(ax, x_values(record, x), values, positive=False, **style)
    for value in np.ravel([] if sources is None else sources):
        ax.axhline(value, color="0.5", linewidth=0.6, linestyle=":")
    return finish(ax, x, r"$\sigma_j(W_L \cdots W_1)$")

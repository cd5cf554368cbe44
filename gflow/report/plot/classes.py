"""Pictures of several classes: regions in the plane, singular values against the risk."""

from typing import TYPE_CHECKING

import numpy as np

from gflow.problem import settings
from gflow.report.plot.style import COLORS, FONT, SMALL, axes_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from gflow.problem.data import Dataset

PIXELS = 400
"""A side of the picture of regions."""


@settings.own()
def decision_regions(
    data: "Dataset", record: "xr.Dataset", *, point: int = -1, ax: "Axes | None" = None
) -> "Axes":
    r"""Figure 1a of the paper for several classes: the regions $\arg\max_k (Wx)_k$.

    The black lines are the borders of the regions of the largest margin in the Frobenius norm,
    to which one layer tends; where they and the regions differ depth has changed the limit.

    Args:
        data: two-dimensional data with classes, which the record was computed from.
        record: of a deep linear network.
        point: the saved point to draw.
        ax: where to draw.

    Raises:
        ValueError: when the data are not two-dimensional or have no classes.
    """
    if data.dim != 2 or data.num_classes is None:
        raise ValueError(
            f"`data` has {data.dim} features and num_classes = {data.num_classes}; regions are "
            "drawn of two features and several classes."
        )
    ax = axes_of(ax, (3.4, 3.1))
    inputs = np.asarray(data.inputs)
    reach = 1.06 * float(np.abs(inputs).max())
    side = np.linspace(-reach, reach, PIXELS)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    colors = [COLORS[k % len(COLORS)] for k in range(data.num_classes)]
    shown = np.argmax(grid @ record["end_to_end"].values[point].T, axis=-1)
    levels = np.arange(data.num_classes + 1) - 0.5
    ax.contourf(side, side, shown, levels=levels, colors=colors, alpha=0.25)
    solution = data.max_margin()
    if solution.separable:
        best = np.argmax(grid @ np.asarray(solution.direction).T, axis=-1)
        for k in range(data.num_classes):
            ax.contour(side, side, best == k, levels=[0.5], colors="black", linewidths=0.7)
    for k, color in enumerate(colors):
        points = inputs[data.classes == k]
        ax.scatter(*points.T, s=13, color=color, edgecolors="white", linewidths=0.3, label=f"{k}")
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel(r"$x_1$", fontsize=FONT)
    ax.set_ylabel(r"$x_2$", fontsize=FONT)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.legend(fontsize=SMALL, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


@settings.own()
def spectra(record: "xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    r"""Figure 1b of the paper for several classes: $\sigma_i(W_k)/\sigma_1(W_k)$ against the risk.

    A colour a layer; the value number K, which tends to zero, is dashed.

    Args:
        record: of a deep linear network on classes.
        ax: where to draw.

    Raises:
        ValueError: when the record has no singular values.
    """
    if "singular_values" not in record:
        raise ValueError("`record` has no singular values; expected one of data with classes.")
    ax = axes_of(ax, (3.4, 2.5))
    s, values = -record["log_risk"].values, record["singular_values"].values
    known = s > 0
    for k in range(values.shape[1]):
        relative = values[known, k] / values[known, k, :1]
        for i in range(1, values.shape[2]):
            if np.any(relative[:, i] > 0):
                ax.loglog(
                    s[known],
                    relative[:, i],
                    color=COLORS[k % len(COLORS)],
                    linestyle="--" if i == values.shape[2] - 1 else "-",
                    linewidth=1.2,
                    label=f"layer {k + 1}" if i == 1 else "_",
                )
    ax.set_xlabel(r"$-\log\,R$", fontsize=FONT)
    ax.set_ylabel(r"$\sigma_i(W_k)/\sigma_1(W_k)$", fontsize=FONT)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.legend(fontsize=SMALL, frameon=False)
    return ax

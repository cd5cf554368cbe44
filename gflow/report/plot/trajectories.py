"""The observables of trajectories, each against time, risk or steps."""

from typing import TYPE_CHECKING

import numpy as np

from gflow.problem import settings
from gflow.report.plot.curves import draw_families, draw_lines, entry_name, has_curves, labelled
from gflow.report.plot.style import axes_of, finish, long_scale, symbol

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from gflow.report.plot.curves import Records


@settings.own()
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


@settings.own()
def risk(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The logarithm of the risk, $\log R$; slope -1 in $\log t$ is $R = c/t$."""
    ax = axes_of(ax)
    draw_lines(ax, records, x, "log_risk")
    long_scale(ax, "y")
    return finish(ax, x, symbol("log_risk"))


@settings.own()
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
    ax = axes_of(ax)
    if gap:
        draw_lines(ax, records, x, "margin_gap", positive=True)
        if has_curves(ax):
            ax.set_yscale("log")
        return finish(ax, x, symbol("margin_gap"))
    shown = labelled(records)
    draw_lines(ax, records, x, "margin")
    for best in sorted({record.attrs.get("max_margin", np.nan) for record in shown.values()}):
        if np.isfinite(best):
            ax.axhline(best, color="black", linewidth=0.8, linestyle=":", label=r"$\gamma$")
    return finish(ax, x, symbol("margin"))


@settings.own()
def direction_error(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The distance of the end-to-end direction from the max-margin one."""
    ax = axes_of(ax)
    draw_lines(ax, records, x, "direction_error", positive=True)
    if has_curves(ax):
        ax.set_yscale("log")
    return finish(ax, x, symbol("direction_error"))


@settings.own()
def alignment(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The misalignment $1 - |\langle v_{k+1}, u_k\rangle|$ of every pair of neighbours.

    Of several classes that of the leading subspaces.
    """
    ax = axes_of(ax)

    def values(record: "xr.Dataset") -> "xr.DataArray | None":
        named = [n for n in ("misalignment", "subspace_misalignment") if n in record]
        return record[named[0]] if named else None

    draw_families(ax, records, x, "pair", values, entry_name, positive=True)
    if has_curves(ax):
        ax.set_yscale("log")
    return finish(ax, x, symbol("misalignment"))


@settings.own()
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
    ax = axes_of(ax)

    def values(record: "xr.Dataset") -> "xr.DataArray | None":
        if "rank_one_gap" in record:
            return record["rank_one_gap"] if gap else 1 - record["rank_one_gap"]
        if gap or "spectral_norm" not in record:  # several outputs: the rank is not one
            return None
        return record["spectral_norm"] / record["frobenius_norm"]

    # The last layer, and any with one row or column, has rank one by its shape.
    draw_families(ax, records, x, "layer", values, entry_name, positive=gap)
    if gap and has_curves(ax):
        ax.set_yscale("log")
    if not gap:
        ax.axhline(1.0, color="black", linewidth=0.6, linestyle=":", zorder=0)
    return finish(ax, x, symbol("rank_one_gap") if gap else r"$\|W_k\|_2/\|W_k\|_F$")


@settings.own()
def norms(records: "Records", x: str = "log_time", *, ax: "Axes | None" = None) -> "Axes":
    r"""The Frobenius norm $\lVert W_k\rVert_F$ of every layer."""
    ax = axes_of(ax)
    draw_families(ax, records, x, "layer", lambda record: record["frobenius_norm"], entry_name)
    ax.set_yscale("log")
    return finish(ax, x, symbol("frobenius_norm"))

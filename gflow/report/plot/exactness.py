"""How exact a record is: certificates, orders of convergence, and the laws that it meets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gflow.problem import settings
from gflow.report.plot.curves import curve, entry_name, has_curves, say, x_values
from gflow.report.plot.style import (
    FONT,
    SMALL,
    axes_of,
    color_of,
    finish,
    label_axes,
    legend,
    symbol,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from gflow.analysis.laws import Limits

LAWS = ("misalignment", "rank_one_gap", "direction_error")


@settings.own()
def certificate(
    record: "xr.Dataset",
    variables: Sequence[str] = ("direction_error", "rank_one_gap", "misalignment"),
    x: str = "log_risk",
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Observables above the bands of their own estimated errors: what is signal, what is noise.

    A solid line is an observable, of layers or pairs the smallest; the band of its colour, dashed
    at the top, is everything below its estimated error, of layers or pairs the largest. A line
    above its band has at least one digit for each decade between them.

    Args:
        record: a flow with its certificate: ``certify=True``.
        variables: names of certified variables.
        x: "log_time", "log_risk" or "num_steps".
        ax: where to draw.

    Raises:
        ValueError: when the record has no error estimate of a variable.
    """
    lacking = [name for name in variables if f"{name}_error" not in record]
    if lacking:
        raise ValueError(
            f"`record` has no error estimate of {', '.join(map(repr, lacking))}; make it with "
            "`certify=True`."
        )
    ax = axes_of(ax)
    at = x_values(record, x)
    floor = np.inf
    bands = []
    for index, name in enumerate(variables):
        values = np.abs(record[name].values).reshape(len(at), -1)
        error = record[f"{name}_error"].values.reshape(len(at), -1)
        # The last layer has rank one by its shape: it has no gap, and no error.
        shown = (values > 0).any(axis=0)
        if not shown.any():
            continue
        value, bound = values[:, shown].min(axis=1), error[:, shown].max(axis=1)
        style = {"color": color_of(index), "linewidth": 1.2}
        curve(ax, at, value, positive=True, label=symbol(name), **style)
        curve(ax, at, bound, positive=True, **(style | {"linewidth": 0.7}), linestyle="--")
        positive = np.where(bound > 0, bound, np.nan)
        bands.append((positive, color_of(index)))
        floor = min(floor, np.nanmin(positive, initial=np.inf))
    if not has_curves(ax):
        say(ax, "nothing above zero to show")
        return finish(ax, x, "observable, and its error")
    ax.set_yscale("log")
    for bound, color in bands:
        ax.fill_between(at, floor / 10, bound, color=color, alpha=0.15, linewidth=0)
    ax.set_ylim(bottom=floor / 3)
    return finish(ax, x, "observable, and its error (bands)")


@settings.own()
def orders(found: "xr.Dataset", *, ax: "Axes | None" = None) -> "Axes":
    r"""The ladder: how the gaps between descent and its models shrink with the learning rate.

    Args:
        found: what ``gflow.ladder`` returns.
        ax: where to draw.
    """
    from matplotlib.ticker import NullLocator

    if not {"gap", "richardson_gap"} <= set(found.data_vars):
        raise ValueError(
            f"`found` has {', '.join(map(str, found.data_vars))}; expected what `gflow.ladder` "
            "returns."
        )
    ax = axes_of(ax)
    rate = found["learning_rate"].values
    models = {str(model): found.sel(model=model) for model in found["model"].values}
    curves = {name: (each["gap"].values, float(each["order"])) for name, each in models.items()}
    curves["Richardson"] = (found["richardson_gap"].values, float(found["richardson_order"]))
    for index, (name, (gap, order)) in enumerate(curves.items()):
        told = f"{name}: order {order:.2f}" if np.isfinite(order) else name
        style = {"color": color_of(index), "marker": "osD^"[index % 4], "markersize": 3.5}
        line = "--" if name == "Richardson" else "-"
        curve(ax, rate, gap, positive=True, linewidth=1.0, linestyle=line, label=told, **style)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(rate, labels=[f"{each:.3g}" for each in rate], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(bottom=ax.get_ylim()[0] / 30)  # room for the legend
    floor = float(found.attrs.get("floor", 0.0))
    if floor > ax.get_ylim()[0]:
        ax.axhspan(ax.get_ylim()[0], floor, color="0.92", linewidth=0, zorder=0)
    label_axes(ax, r"learning rate $\eta$", r"$\|W_{\mathrm{descent}} - W_{\mathrm{model}}\|$")
    legend(ax, loc="lower right")
    return ax


@settings.own()
def asymptotes(
    record: "xr.Dataset", limits: "Limits", variables: Sequence[str] = LAWS
) -> np.ndarray:
    r"""A flow on its way to the limits, beside the laws that start and data predict for it.

    Dots are the record's saved points, lines the laws with their next-order term; where a run
    continues in split coordinates the ground is shaded.

    Args:
        record: a flow, best far out: ``until=gflow.LogRisk(-1e16)``.
        limits: ``gflow.exact.limits`` of the same problem and start.
        variables: names that ``limits.predict`` knows.

    Returns:
        The axes, one below the other, shape (variables,).
    """
    import matplotlib.pyplot as plt

    s = -record["log_risk"].values
    late = s > 1
    if not late.any():
        raise ValueError("`record` ends above log R = -1, where no law has begun to hold.")
    s, shown = s[late], record.isel(point=late)
    laws = [limits.predict(-each) for each in s]
    lacking = [name for name in variables if name not in laws[0] or name not in record]
    if lacking:
        raise ValueError(f"`variables` has {lacking}; expected some of {sorted(laws[0])}.")
    _, axes = plt.subplots(
        len(variables),
        1,
        figsize=(3.4, 0.6 + 1.7 * len(variables)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for name, ax in zip(variables, axes[:, 0], strict=True):
        values = shown[name].values.reshape(len(s), -1)
        law = np.array([each[name] for each in laws]).reshape(len(s), -1)
        numbered = values.shape[1] > 1
        for k, (found, told) in enumerate(zip(values.T, law.T, strict=True)):
            dots = {"linestyle": "", "marker": ".", "markersize": 3.5, "color": color_of(k)}
            label = entry_name(k + 1) if numbered else "flow"
            if not curve(ax, s, found, positive=True, label=label, **dots):
                continue  # the last layer has rank one by its shape
            curve(ax, s, told, positive=True, color=color_of(k), linewidth=0.8, label="_")
        ax.plot([], [], color="0.35", linewidth=0.8, label="law")
        ax.set(xscale="log", yscale="log")
        if "beyond_hand_over" in shown and (far := shown["beyond_hand_over"].values > 0).any():
            ax.axvspan(s[far][0], s[-1], color="0.94", linewidth=0, zorder=0)
        ax.set_ylabel(symbol(name), fontsize=FONT)
        ax.tick_params(which="both", labelsize=SMALL)
        ax.spines[["top", "right"]].set_visible(False)
        legend(ax)
    axes[-1, 0].set_xlabel(r"$-\log\,R$", fontsize=FONT)
    return axes[:, 0]

r"""Dense layers of a network of any kind along training: the paper's last figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.problem import settings
from gflow.report.plot.style import FONT, color_of, label_axes, legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

X_LABELS = {"num_epochs": "epoch", "time": "time $t$"}


@settings.own()
def dense_layers(
    runs: "Mapping[str, xr.Dataset | Sequence[xr.Dataset]]",
    x: str = "num_epochs",
    *,
    together: bool = False,
) -> np.ndarray:
    r"""Risk, $\lVert W_k\rVert_2/\lVert W_k\rVert_F$ and alignment of the dense layers.

    Each line is the mean of the runs of a name, in a band from the least to the largest of them.
    Dotted lines are the least that the ratios can be, $1/\sqrt{\min(\text{rows, columns})}$; with K
    classes a dashed one is $1/\sqrt{K-1}$, the ratio of a layer with K - 1 equal singular values
    and no others.

    Args:
        runs: title to records, of which several differ in their seed only and have the same saved
            points.
        x: "num_epochs", or "time", which flows have too.
        together: draw all in one column, with other dashes for each name.

    Returns:
        The axes, shape (3, columns), from the risk down to alignment.

    Raises:
        ValueError: when a record has no dense layers or lacks the coordinate, or those of a name
            differ in their saved points.
    """
    import matplotlib.pyplot as plt

    if x not in X_LABELS:
        raise ValueError(f"`x` is {x!r}; expected one of {', '.join(map(repr, X_LABELS))}.")
    groups = {title: _checked(title, group, x) for title, group in runs.items()}
    columns = 1 if together else len(groups)
    figure, axes = plt.subplots(
        3,
        columns,
        figsize=(3.4 * columns, 6.4),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    del figure
    for index, (title, group) in enumerate(groups.items()):
        column = axes[:, 0 if together else index]
        line = ("-", "--", ":")[index % 3] if together else "-"
        _draw(column, group, x, line)
        if not together:
            column[0].set_title(title, fontsize=FONT)
        else:
            column[0].plot([], [], color="0.35", linestyle=line, label=title)
    for place, column in enumerate(axes.T):
        column[0].set_yscale("log")
        for ax, label in zip(column, ("risk", r"$\|W_k\|_2/\|W_k\|_F$", _ALIGNMENT), strict=True):
            label_axes(ax, "", "" if place else label)
            legend(ax)
        column[1].set_ylim(0, 1.02)
        column[2].set_ylim(0, 1.02)
        column[2].set_xlabel(X_LABELS[x], fontsize=FONT)
    return axes


_ALIGNMENT = r"$|\langle v_{k+1}, u_k\rangle|$"


def _draw(column: Any, group: "Sequence[xr.Dataset]", x: str, line: str) -> None:
    at, first = _coordinate(group[0], x), group[0]
    risk, ratio, alignment = column
    _band(risk, at, [np.exp(each["log_risk"].values) for each in group], "0.15", line, "")
    for k in range(first.sizes["layer"]):
        values = [ratios(each)[:, k] for each in group]
        _band(ratio, at, values, color_of(k), line, f"layer {k + 1}")
        ratio.axhline(
            float(first["least_ratio"][k]), color=color_of(k), linewidth=0.7, linestyle=":"
        )
    classes = int(first.attrs.get("num_classes", 0))
    if classes > 2:
        ratio.axhline((classes - 1) ** -0.5, color="0.5", linewidth=0.7, linestyle="--")
    for k in range(first.sizes.get("pair", 0)):
        values = [each["alignment"].values[:, k] for each in group]
        _band(alignment, at, values, color_of(k), line, f"layers {k + 1}, {k + 2}")


def ratios(record: "xr.Dataset") -> np.ndarray:
    r"""$\lVert W_k\rVert_2/\lVert W_k\rVert_F$, shape (points, layers)."""
    return (record["spectral_norm"] / record["frobenius_norm"]).values


def _band(
    ax: "Axes", at: np.ndarray, values: Sequence[np.ndarray], color: str, line: str, label: str
) -> None:
    table = np.stack(values)
    known = label and not any(each.get_label() == label for each in ax.get_lines())
    shown = label if known else "_"
    ax.plot(at, table.mean(axis=0), line, color=color, linewidth=1.2, label=shown)
    if len(table) > 1:
        ax.fill_between(at, table.min(0), table.max(0), color=color, alpha=0.2, linewidth=0)


def _coordinate(record: "xr.Dataset", x: str) -> np.ndarray:
    return np.exp(record["log_time"].values) if x == "time" else record[x].values


def _checked(
    title: str, group: "xr.Dataset | Sequence[xr.Dataset]", x: str
) -> "Sequence[xr.Dataset]":
    records: Any = [group] if hasattr(group, "data_vars") else list(group)
    source = "log_time" if x == "time" else x
    for record in records:
        for name in ("least_ratio", source):
            if name not in record:
                raise ValueError(
                    f"`runs[{title!r}]` has a record without `{name}`; expected one of a network "
                    "with dense layers beside others"
                    + (", by descent with mini-batches." if name == "num_epochs" else ".")
                )
        here, there = _coordinate(record, x), _coordinate(records[0], x)
        if here.shape != there.shape or not np.allclose(here, there):
            raise ValueError(
                f"`runs[{title!r}]` has records with other saved points than the first; expected "
                "runs that differ in their seed only."
            )
    return records

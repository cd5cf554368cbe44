"""What do the limits look like over sixteen decades of -log R, and do the asymptotes meet them?

The planar flow of `hand_over.py` to log R = -1e16 on a grid of risks, with each law drawn beside
it: its leading term, a straight line from the constant that `gflow.exact.limits` predicts from
start and data, and its first two terms. One column wide.

    python benchmarks/sixteen_decades.py [--quick] [--out FOLDER]
"""

import numpy as np
from common import Report, begin, parser
from hand_over import planar
from peers import PALETTE

import gflow

END = 1e16
PANELS = (
    ("misalignment", r"$1 - |\langle v_{k+1}, u_k\rangle|$", "pair"),
    ("rank_one_gap", r"$1 - \|W_k\|_2/\|W_k\|_F$", "layer"),
    ("margin_gap", r"$\gamma - \min_i q_i/\|w\|$", ""),
)


def leading(law, name, s):
    """The leading term of a law, one column a layer or pair."""
    s = np.asarray(s)[:, None]
    if name == "misalignment":
        return law.misalignment * s ** (-4 / law.depth)
    if name == "rank_one_gap":
        return law.rank_one_gap[:-1] * s ** (-2 / law.depth)
    # min q = s - log n + log sum_S exp(lowest - bracket): what is left at leading order.
    w = law.product(-1e100)
    return np.atleast_1d(-w.lowest * law.margin) / s


def figure(record, law):
    import matplotlib.pyplot as plt

    s = -record["log_risk"].values
    shown = s > 1
    fig, axes = plt.subplots(3, 1, figsize=(3.4, 5.6), sharex=True, layout="constrained")
    for ax, (name, label, kind) in zip(axes, PANELS, strict=True):
        values = record[name].values.reshape(len(s), -1)
        values = values[:, :-1] if name == "rank_one_gap" else values
        line = leading(law, name, s[shown])
        for k in range(values.shape[1]):
            which = f"{kind} {k + 1}" if kind else "flow"
            ax.loglog(s[shown], values[shown, k], ".", ms=3, color=PALETTE[k], label=which)
            ax.loglog(s[shown], line[:, k], color=PALETTE[k], lw=0.8)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, loc="lower left")
        if "beyond_hand_over" in record:
            far = record["beyond_hand_over"].values.astype(bool)
            if far.any():
                ax.axvspan(s[far][0], s[-1], color="0.93", lw=0)
    axes[-1].set_xlabel(r"$-\log\,R$ (shaded: split coordinates)", fontsize=8)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    problem, start = planar()
    law = gflow.exact.limits(problem, start)
    # The hand-over risks lie between the points of the grid.
    points = 18 if options.quick else 66
    saved = -np.geomspace(1.1, END, points)
    record = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-END), save=saved)
    rows = []
    for i, log_risk in enumerate(record["log_risk"].values):
        if log_risk > -1e3:
            continue
        predicted = law.predict(log_risk)
        row = {"log_risk": float(log_risk)}
        for name, _, _ in PANELS:
            found = np.atleast_1d(record[name].values[i])
            there = found != 0
            deviation = np.abs(np.atleast_1d(predicted[name]) / np.where(there, found, 1) - 1)[
                there
            ]
            row[name] = float(np.max(deviation, initial=0))
        rows.append(row)
    for row in rows[:: max(1, len(rows) // 12)]:
        print(f"{row['log_risk']:.1e} " + " ".join(f"{row[name]:.1e}" for name, _, _ in PANELS))
    report.write(
        figure(record, law),
        status=record.attrs["status"],
        deviation_from_two_terms=rows,
        rank_one_gap=list(law.rank_one_gap),
        misalignment=list(law.misalignment),
        direction_error=law.direction_error,
    )


if __name__ == "__main__":
    main()

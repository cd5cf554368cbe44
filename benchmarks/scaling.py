"""How does the cost of a flow grow with width, depth, number of points and dimension?

One of the four grows at a time, from widths 20, 64, 64, 64, 1 and 200 points; exponential loss,
`GaussNewton` alone at rtol 1e-6, from the start to log R = -1e4. What a step costs is the least
time of several over the number of steps tried; the slope is that of the last doublings.

    python benchmarks/scaling.py [--quick] [--out FOLDER]
"""

import functools

import common
import numpy as np

import gflow

WIDTH, DEPTH, POINTS, DIM = 64, 4, 200, 20
SIZES = {
    "width": (16, 64, 256, 1024),
    "depth": (2, 4, 8, 16),
    "points": (50, 200, 2_000, 20_000),
    "dimension": (4, 16, 64, 256),
}
GOAL, RTOL = -1e4, 1e-6
QUICK = {"points": 100, "dimension": 2}
"""In the quick run, whose larger network is that of `work_precision.py`."""


def measure(what, size, repeats, base=()):
    sizes = {"width": WIDTH, "depth": DEPTH, "points": POINTS, "dimension": DIM}
    sizes |= {**dict(base), what: size}
    widths = (sizes["dimension"], *[sizes["width"]] * (sizes["depth"] - 1), 1)
    work = common.task(widths, n=sizes["points"])
    walk = functools.partial(common.walk, work, gflow.GaussNewton(), GOAL, RTOL, limit=60.0)
    times, runs = common.timed({"": walk}, repeats=repeats, budget=8.0)
    run = runs[""]
    tried = run.num_steps + run.num_rejected
    return {
        "what": what,
        "size": size,
        "weights": work.num_weights,
        "finished": run.finished,
        "log_risk": run.log_risk,
        "seconds": times[""].least,
        "steps": tried,
        "step_us": 1e6 * times[""].least / tried,
    }


def slope(rows):
    """D log(time of a step) / d log(size) between the two largest sizes."""
    a, b = rows[-2:]
    return np.log(b["step_us"] / a["step_us"]) / np.log(b["size"] / a["size"])


def figure(found):
    import matplotlib.pyplot as plt
    from peers import PALETTE

    fig, axes = plt.subplots(
        1, len(found), figsize=(10.5, 3.0), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (what, rows), color in zip(axes[0], found.items(), PALETTE, strict=False):
        size = np.array([row["size"] for row in rows], dtype=np.float64)
        step = [row["step_us"] for row in rows]
        ax.loglog(size, step, "o-", color=color)
        ax.loglog(size[-2:], step[-1] * size[-2:] / size[-1], ":", color="0.4", label="slope 1")
        ax.set_xlabel(what if what != "points" else "number of points")
        ax.set_title(f"last slope {slope(rows):.2f}", fontsize=9)
        ax.set_xticks(size, [f"{each:g}" for each in size])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("microseconds a step")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return fig


def main():
    options = common.begin(common.parser(__doc__))
    report = common.Report(__file__, options)
    found = {}
    how = (2, QUICK) if options.quick else (5,)
    for what, sizes in {"width": (5, 10)}.items() if options.quick else SIZES.items():
        found[what] = [measure(what, size, *how) for size in sizes]
        columns = "what:s size:d weights:d finished: seconds:.4f steps:d step_us:.0f"
        common.table(found[what], columns)
    slopes = {what: slope(rows) for what, rows in found.items()}
    print("last slopes:", {what: round(float(each), 2) for what, each in slopes.items()})
    report.write(figure(found), goal=GOAL, rows=found, last_slopes=slopes)


if __name__ == "__main__":
    main()

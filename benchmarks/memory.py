"""Does the memory of a flow grow with its number of steps, or faster than its number of weights?

Each run has a process of its own, which tells the greatest amount of memory that it has held. Up to
1e6 steps: the same flow with an explicit method. Up to 8e3 weights: the whole call of gflow beside
implicit peers that hold a matrix of weights times weights, to log R = -2 (their own time matters
little here); gflow alone goes on to 2e5 weights.

    python benchmarks/memory.py [--quick] [--out FOLDER]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import diffrax
import reach
from common import Report, begin, parser, table, task
from rivals import peak_memory

import gflow

STEPS = (1_000, 10_000, 100_000, 1_000_000)
WIDTHS = (10, 20, 40, 60, 320)
DENSE = ("Kvaerno5, gflow's clock", "Radau, gflow's clock")
MOST_DENSE, LIMIT = 60, 100.0
"""The largest width, and the seconds, of a peer with a dense matrix."""


def peak(steps: int) -> dict:
    """One process: so many steps, and the memory that it took."""
    data = gflow.datasets.separable(n=50, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.gaussian((2, 10, 1), seed=0)
    flow = gflow.gradient_flow(
        problem,
        gflow.init.admissible(start, problem),
        until=gflow.Steps(steps),
        save=100,
        solver=diffrax.Tsit5(),
        max_steps=10 * steps,
    )
    return {
        "steps": int(flow.num_steps[-1]),
        "log_risk": float(flow.log_risk[-1]),
        "status": flow.attrs["status"],
        "wall_s": flow.attrs["wall_time"],
        "peak_mib": peak_memory(),
    }


def beside_weights(width: int, names: tuple[str, ...], quick: bool) -> list[dict]:
    """Peak memory of each method on four layers of one width."""
    work = task((2 if quick else 12, width, width, width, 1))  # two: the programs of `reach.py`
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        reach.pose(work, reach.reference(work, (-2,), quick=quick), (-2,), path)
        for name in names:
            found = reach.theirs(name, path, LIMIT, sys.executable)
            done = found["rows"][0] if found["rows"] else {}
            row = {"width": width, "weights": work.num_weights, "method": name}
            why = found.get("unable") or found.get("ended")
            rows.append(row | {"peak_mib": done.get("peak_mib"), "why": why})
    return rows


def growth_per_weight(rows: list[dict], name: str) -> float | None:
    """Bytes a weight between the smallest and the largest run of a method."""
    done = [row for row in rows if row["method"] == name and row["peak_mib"] is not None]
    more = done[-1]["weights"] - done[0]["weights"] if done else 0
    return 2**20 * (done[-1]["peak_mib"] - done[0]["peak_mib"]) / more if more else None


def figure(rows: list[dict]):
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator
    from peers import PALETTE

    fig, ax = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    for name, color, marker in zip(("gflow", *DENSE), PALETTE, "osD", strict=False):
        done = [row for row in rows if row["method"] == name and row["peak_mib"] is not None]
        x, y = [row["weights"] for row in done], [row["peak_mib"] for row in done]
        ax.loglog(x, y, marker=marker, color=color, label=name.removesuffix(reach.LENT))
    ticks = (400, 600, 1000, 1500)
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("weights")
    ax.set_ylabel("peak memory of the process, MiB")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    return fig


def main():
    if sys.argv[1:2] == ["--session"]:
        print(json.dumps(peak(int(sys.argv[2]))))
        return
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    rows = []
    for steps in STEPS[:1] if options.quick else STEPS:
        command = [sys.executable, __file__, "--session", str(steps)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(told))
        table(rows[-1:], "steps:d log_risk:.4g status:s wall_s:.2f peak_mib:.1f")
    growth = rows[-1]["peak_mib"] / rows[0]["peak_mib"] - 1
    sizes: list[dict] = []
    for width in WIDTHS[:1] if options.quick else WIDTHS:
        peers = () if options.quick else DENSE
        names = ("gflow", *peers) if width <= MOST_DENSE else ("gflow",)
        sizes += beside_weights(width, names, options.quick)
    table(sizes, "width:d weights:d method:s peak_mib:.0f why:s")
    per_weight = {name: growth_per_weight(sizes, name) for name in ("gflow", *DENSE)}
    print("bytes a weight:", per_weight)
    report.write(
        figure(sizes), rows=rows, growth=growth, weights=sizes, bytes_per_weight=per_weight
    )


if __name__ == "__main__":
    main()

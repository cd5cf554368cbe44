"""Does the memory of a flow grow with its number of steps? Peak memory up to 1e6 explicit steps.

Each horizon has a process of its own, which integrates the same flow with an explicit method and
asks the system for the greatest amount of memory that it has held.

    python benchmarks/memory.py [--quick] [--out FOLDER]
"""

import json
import resource
import subprocess
import sys

import diffrax
from common import Report, begin, parser, table

import gflow

STEPS = (1_000, 10_000, 100_000, 1_000_000)


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
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    if sys.argv[1:2] == ["--session"]:
        print(json.dumps(peak(int(sys.argv[2]))))
        return
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    rows = []
    for steps in STEPS[:2] if options.quick else STEPS:
        command = [sys.executable, __file__, "--session", str(steps)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(told))
        table(rows[-1:], "steps:d log_risk:.4g status:s wall_s:.2f peak_mib:.1f")
    growth = rows[-1]["peak_mib"] / rows[0]["peak_mib"] - 1
    report.write(None, rows=rows, growth=growth)


if __name__ == "__main__":
    main()

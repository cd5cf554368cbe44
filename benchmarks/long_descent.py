"""Is a run of ten million steps small to keep, alive on the screen, and safe from Ctrl-C?

Four layers of width 10, plain descent. The record holds the saved points only; the progress bar is
read from standard error; then the same run again, interrupted by SIGINT (what Ctrl-C sends) on the
way: the record has what was done, and its points are those of the whole run.

    python benchmarks/long_descent.py [--quick] [--out FOLDER]
"""

import contextlib
import io
import re
import resource
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import optax
from common import Report, begin, parser

import gflow

STEPS = 10_000_000
POINTS = 200


class Screen(io.StringIO):
    """A terminal, as far as a progress bar can tell."""

    def isatty(self):
        return True


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    steps = STEPS // 20 if options.quick else STEPS
    data = gflow.datasets.separable(n=100, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.admissible(gflow.init.gaussian((2, 10, 10, 10, 1), seed=0), problem)
    optimizer = optax.sgd(0.1)

    def run(steps=steps):
        return gflow.gradient_descent(
            problem, weights, optimizer, until=gflow.Steps(steps), save=POINTS
        )

    run(1000)  # compiled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    screen, began = Screen(), time.perf_counter()
    with contextlib.redirect_stderr(screen):
        whole = run()
    took = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shown = [int(each) for each in re.findall(r"(\d+)%\|", screen.getvalue())]
    with tempfile.TemporaryDirectory() as folder:
        size = gflow.save(whole, Path(folder) / "run.nc").stat().st_size

    signal.setitimer(signal.ITIMER_REAL, 0.4 * took)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    began = time.perf_counter()
    part = run()
    late = time.perf_counter() - began - 0.4 * took
    kept = part.sizes["point"] - 1  # the last is where it was stopped
    same = all(
        np.array_equal(part[name].values[:kept], whole[name].values[:kept])
        for name in ("num_steps", "log_risk", "end_to_end")
    )
    found = {
        "steps": int(whole.num_steps[-1]),
        "status": whole.attrs["status"],
        "seconds": took,
        "step_us": 1e6 * took / steps,
        "points": whole.sizes["point"],
        "memory_in_record_kb": whole.nbytes / 1e3,
        "file_kb": size / 1e3,
        "memory_grown_kb": grown,
        "bar_positions": len(set(shown)),
        "interrupted": {
            "status": part.attrs["status"],
            "steps": int(part.num_steps[-1]),
            "seconds_until_returned": late,
            "points_equal_to_the_whole_run": same,
        },
    }
    for key, value in found.items():
        print(f"{key}: {value}")
    report.write(**found)


if __name__ == "__main__":
    main()

"""A sweep of 600 trajectories, killed twice: how long, and what does it show?

Depth {2, 3, 4, 6, 8} x scale {0.01, 0.1, 1} x imbalance {0, 1} x 20 seeds, width 10, 20 points, to
log R = -1e4. The start is (1 - imbalance) times a balanced network plus imbalance times a Gaussian
one, so that 0 conserves zero and 1 what chance gives. The sweep runs in processes of its own: two
are killed (SIGKILL) once a third and two thirds of the groups are there, the last one finishes.
The time counts all three, compilation and set-up included.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Report, begin, parser

import gflow

GRID = {
    "depth": [2, 3, 4, 6, 8],
    "scale": [0.01, 0.1, 1.0],
    "imbalance": [0, 1],
    "seed": range(20),
}
QUICK = {"depth": [2, 3], "scale": [0.1, 1.0], "imbalance": [0, 1], "seed": range(2)}


def start(depth: int, scale: float, imbalance: float, seed: int) -> tuple:
    """The problem and the start at a point of the grid."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    widths = (2, *[10] * (depth - 1), 1)
    balanced = gflow.init.balanced(widths, scale=scale, seed=seed)
    random = gflow.init.gaussian(widths, scale=scale, seed=seed)
    mixed = [(1 - imbalance) * b + imbalance * r for b, r in zip(balanced, random, strict=True)]
    return problem, gflow.init.admissible(mixed, problem)


def follow(folder: str, quick: bool, groups: int) -> "object":
    """The sweep, or what is missing of it."""
    import jax

    return gflow.sweep(
        start,
        QUICK if quick else GRID,
        until=gflow.LogRisk(-100 if quick else -1e4),
        save=10,
        folder=folder,
        group_size=groups,
        devices=jax.devices() * 2,
    )


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--folder", type=Path, help="of the groups, by default a new one")
    found.add_argument("--follow", action="store_true", help="only follow what is missing")
    found.add_argument("--group-size", type=int, default=60)
    options = begin(found)
    size = 4 if options.quick else options.group_size
    if options.follow:
        follow(str(options.folder), options.quick, size)
        return
    report = Report(__file__, options)
    folder = options.folder or Path(tempfile.mkdtemp()) / "groups"
    total = int(np.prod([len(each) for each in (QUICK if options.quick else GRID).values()]))
    command = [sys.executable, __file__, "--follow", "--folder", str(folder)]
    command += ["--group-size", str(size), *(["--quick"] if options.quick else [])]
    warm = (folder.parent / "compiled").exists()
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    began, parts = time.perf_counter(), []
    for part in (1 / 3, 2 / 3, None):
        process = subprocess.Popen(command, env={**os.environ, **cache})
        while process.poll() is None:
            there = len(list(folder.glob("group-*.nc")))
            if part is not None and there * size >= part * total:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        process.wait()
        there = len(list(folder.glob("group-*.nc")))
        parts.append({"seconds": time.perf_counter() - began, "groups": there})
        print(parts[-1], "killed" if process.returncode else "done", flush=True)
        assert part is not None or process.returncode == 0
    took = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)

    result = follow(str(folder), options.quick, size)
    ends = result.status.values.ravel().tolist()
    counts = {end: ends.count(end) for end in set(ends)}
    lanes = int(result.in_lanes.sum())
    drift = float(result.imbalance_drift.max())
    print(f"{total} runs in {took:.1f} s: {counts}, {lanes} in lanes, largest drift {drift:.1e}")
    axes = gflow.plot.phase_diagram(result, x="scale", y="depth", panel="imbalance")
    report.write(
        axes[0].figure,
        seconds=took,
        programs_were_compiled_before=warm,
        processor_seconds=used.ru_utime + used.ru_stime,
        parts=parts,
        runs=total,
        statuses=counts,
        in_lanes=lanes,
        largest_drift=drift,
        largest_clock_error=float(result.clock_error.max()),
    )


if __name__ == "__main__":
    main()

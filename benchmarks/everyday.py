"""The everyday run: how long for a first result, for saved points, for a wide layer, when busy?

Ratios, each of two calls in one run of this script. Warm calls in processor time, all threads
together, the least of several that take turns: 100 saved points over 2 on the way to log R = -1e4,
and to a misalignment, which no clock foretells;
the default call to -10, whole records, over diffrax's Tsit5 that saves 100 states of the same flow
in physical time and observes nothing, at the tolerance of all tables and at one that makes its last
weights as exact; 20 points over 2 at width 512. Fresh processes, nothing compiled and all of it
read from a cache, import included: to log R = -10, over Tsit5's with 100 states. Then wall time at
width 256 to -1e4 beside two processes that never rest, over that alone. Width 4096, with
``--wide``, takes a minute.

    python benchmarks/everyday.py [--quick] [--wide] [--out FOLDER]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import reach
import saving

import gflow

TARGETS = {
    "100 points over 2, to -1e4": 1.5,
    "default call over Tsit5's 100 states": 10,
    "fresh process, nothing cached, over Tsit5's": 1.6,
    "fresh process, cached, s": 2.0,
    "width 512, 20 points over 2": 1.5,
    "width 256 beside two busy processes, wall": 3.0,
    "(2, 4096, 4096, 1) to -10, 2 points, s": 40.0,
}
SPIN = [sys.executable, "-c", "while True: pass"]
# dask is not installed with gflow; where it is, xarray imports it, for half a second.
FRESH = """
import sys, time
sys.path.insert(0, {folder!r})
sys.modules["dask"] = None
import saving
saving.{call}({path!r})()
print(time.process_time())
"""


def wide(width):
    """Two hidden layers of one width."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.gaussian((2, width, width, 1), seed=0)
    return problem, gflow.init.admissible(start, problem)


def flow(problem, weights, until, save=100):
    """A whole call, as a user makes it."""
    return gflow.gradient_flow(problem, weights, until=until, save=save, progress=False)


def fresh(call, path, cache=None):
    """Processor time of a new process, import included."""
    code = FRESH.format(folder=str(Path(__file__).parent), call=call, path=str(path))
    # Imports are compiled once, as for a user, not by every process.
    out = "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "PYTHONDONTWRITEBYTECODE"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(out)}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.splitlines()[-1])


def beside(number, call):
    """Wall time of a call beside so many processes that never rest."""
    others = [subprocess.Popen(SPIN) for _ in range(number)]
    try:
        return min(common.seconds(call)[0] for _ in range(3))
    finally:
        for other in others:
            other.kill()
            other.wait()


def compared(what, first, second, times, unit="s of processor"):
    """A row: two times and their ratio."""
    a, b = times
    row = {"figure": what, "first": first, "first_s": a, "second": second, "second_s": b}
    return row | {"ratio": a / b, "target": TARGETS.get(what), "unit": unit}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--wide", action="store_true", help="width 4096 too")
    options = common.begin(parser)
    report = common.Report(__file__, options)
    repeats = 2 if options.quick else 7
    work = common.task(reach.WIDTHS)
    problem, weights = work.field.problem, work.weights
    rows = []
    far, near = gflow.LogRisk(-1e3 if options.quick else -1e4), gflow.LogRisk(-10)
    calls = {save: lambda save=save: flow(problem, weights, far, save) for save in (100, 2)}
    took, _ = common.timed(calls, repeats=repeats)
    what = "100 points over 2, to -1e4"
    rows.append(compared(what, "save=100", "save=2", (took[100].cpu, took[2].cpu)))
    until = gflow.Misalignment(1e-2 if options.quick else 1e-3)
    calls = {save: lambda save=save: flow(problem, weights, until, save) for save in (100, 2)}
    took, _ = common.timed(calls, repeats=repeats)
    what = f"100 points over 2, until={until}"
    rows.append(compared(what, "save=100", "save=2", (took[100].cpu, took[2].cpu)))
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "problem.npz", Path(folder) / "cache"
        reach.pose(work, reach.reference(work, (-10,), quick=True), (-10,), path)
        contestants = {"gflow": saving.ours(path), "Tsit5": saving.tsit5(path)}
        took, _ = common.timed(contestants, repeats=repeats)
        times = took["gflow"].cpu, took["Tsit5"].cpu
        what = "default call over Tsit5's 100 states"
        rows.append(compared(what, "gflow, save=100", "Tsit5, 100 states", times))
        exact = [states[-1] for states in saving.tsit5(path, 1e-13)()]
        record = contestants["gflow"]()
        found = [record[f"final_weights_{k}"].values for k in range(1, len(exact) + 1)]
        error = saving.off(found, exact)
        for rtol in (1e-9, 1e-10, 1e-11, 1e-12):
            peer = saving.tsit5(path, rtol)
            if saving.off([states[-1] for states in peer()], exact) <= error:
                break
        took, _ = common.timed({"gflow": contestants["gflow"], "Tsit5": peer}, repeats=repeats)
        what, times = f"the same at an error of {error:.0e}", (took["gflow"].cpu, took["Tsit5"].cpu)
        rows.append(compared(what, "gflow, save=100", f"Tsit5, rtol {rtol:g}", times))
        if not options.quick:
            for call in ("ours", "tsit5"):
                fresh(call, path)  # Python's own compilation
            cold = [min(fresh(call, path) for _ in range(2)) for call in ("ours", "tsit5")]
            what = "fresh process, nothing cached, over Tsit5's"
            rows.append(compared(what, "gflow", "Tsit5", cold))
            for call in ("ours", "tsit5"):
                fresh(call, path, cache)
            warm = [min(fresh(call, path, cache) for _ in range(2)) for call in ("ours", "tsit5")]
            what = "fresh process, cached, s"
            rows.append(compared(what, "gflow, cached", "one second", (warm[0], 1.0)))
            what = "fresh process, cached, over Tsit5's"
            rows.append(compared(what, "gflow, cached", "Tsit5, cached", warm))
    width = 64 if options.quick else 512
    problem, weights = wide(width)
    calls = {save: lambda save=save: flow(problem, weights, near, save) for save in (20, 2)}
    took, _ = common.timed(calls, repeats=min(repeats, 3))
    what = "width 512, 20 points over 2"
    rows.append(compared(what, "save=20", "save=2", (took[20].cpu, took[2].cpu)))
    problem, weights = wide(64 if options.quick else 256)
    flow(problem, weights, far)
    quiet, busy = (beside(number, lambda: flow(problem, weights, far)) for number in (0, 2))
    what = "width 256 beside two busy processes, wall"
    rows.append(compared(what, "beside two", "alone", (busy, quiet), "s"))
    if options.wide:
        problem, weights = wide(4096)
        spent = time.process_time()
        flow(problem, weights, near, 2)
        what = "(2, 4096, 4096, 1) to -10, 2 points, s"
        spent = time.process_time() - spent
        rows.append(compared(what, "first call, save=2", "one second", (spent, 1.0)))
    common.table(
        rows, "figure:s first:s first_s:.3f second:s second_s:.3f ratio:.2f target:g unit:s"
    )
    if options.quick:
        print("quick: to -1e3, and at width 64")
    report.write(None, rows=rows)


if __name__ == "__main__":
    main()

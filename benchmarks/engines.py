"""What do sweeps on an engine cost: a killed worker, many short runs, results beyond memory?

1. The 600 trajectories of `phase_diagram.py` by dask with two workers on this machine, one of which
   is killed (SIGKILL) on the way. Beside it the same sweep in one process: this one, whose result
   is compared bit for bit, and a fresh one with two threads, whose time is, its start included as
   that of the workers is. Compiled programs come from a folder.
2. Many short trajectories, two layers of width 3 to log R = -10, by two workers: the memory of the
   process that runs the sweep, how long until the first group is there, and what a trajectory
   takes beside those of `ensemble` in one process, starts included: processor time beside one
   thread of lanes, whose helpers have the second core too, wall time beside two.
3. A sweep of several gigabytes on disk (one group, copied), opened lazily and reduced by
   `.mean("seed")` in a process of its own: time and peak memory, beside the same from zarr.

    python benchmarks/engines.py [--quick] [--part PART] [--count N] [--out FOLDER]
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
import phase_diagram
from common import Report, begin, parser
from distributed import Client, LocalCluster

import gflow
from gflow.report import groups
from gflow.report.grid import Axis, Grid

SHORT = gflow.LogRisk(-10)


def short(seed):
    """A trajectory that takes some milliseconds, of many."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.gaussian((2, 3, 1), scale=0.5, seed=seed)
    return problem, gflow.init.admissible(weights, problem)


@contextlib.contextmanager
def two_workers():
    """A scheduler and two workers on loopback."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def memory():
    """The peak of this process since it was told to forget it, in megabytes (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak():
    """Count the peak of memory from here."""
    Path("/proc/self/clear_refs").write_text("5")


# -------------------------------------------------------------------------------------------------
# A worker that is killed
# -------------------------------------------------------------------------------------------------


def killed(folder, quick):
    grid = phase_diagram.QUICK if quick else phase_diagram.GRID
    given = {
        "until": gflow.LogRisk(-100 if quick else -1e4),
        "save": 10,
        "group_size": 4 if quick else 60,
    }
    gflow.cache_programs(folder / "programs")
    alone = gflow.sweep(phase_diagram.start, grid, folder=folder / "alone", **given)
    gflow.sweep(phase_diagram.start, grid, devices=jax.devices() * 2, **given)
    command = [sys.executable, phase_diagram.__file__, "--follow", "--group-size"]
    command += [str(given["group_size"]), "--folder", str(folder / "threads")]
    cached = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    began = time.perf_counter()
    subprocess.run([*command, *(["--quick"] if quick else [])], check=True, env=cached)
    took = time.perf_counter() - began
    began = time.perf_counter()
    with two_workers() as client:
        victim = next(iter(client.run(os.getpid).values()))
        found, there = {}, folder / "engine"

        def kill():
            while len(list(there.glob("group-*.nc"))) < (2 if quick else 5):
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        engine = client.get_executor()
        swept = gflow.sweep(phase_diagram.start, grid, folder=there, executor=engine, **given)
        found["seconds"] = time.perf_counter() - began
        found["worker_killed"] = victim not in client.run(os.getpid).values()
    same = [name for name in alone.data_vars if not _equal(alone[name].values, swept[name].values)]
    return {
        "runs": int(alone.status.size),
        "seconds_with_two_threads": took,
        **found,
        "ratio": found["seconds"] / took,
        "variables_that_differ": same,
    }


def _equal(a, b):
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


# -------------------------------------------------------------------------------------------------
# Many short ones
# -------------------------------------------------------------------------------------------------


def many(folder, quick, count):
    count, few = (2_000, 500) if quick else (count, 4_000)
    gflow.cache_programs(folder / "programs")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(by_workers, folder, count).result()
    here = {
        "ensemble_one_thread": _in_one_process(few),
        "ensemble_two_threads": _in_one_process(few, devices=jax.devices() * 2),
    }
    workers, alone, both = found["workers"], *here.values()
    return {
        **found,
        **here,
        "throughput_for_each_processor_second": alone["processor_milliseconds_a_run"]
        / workers["processor_milliseconds_a_run"],
        "throughput_for_each_second_on_two_cores": both["milliseconds_a_run"]
        / workers["milliseconds_a_run"],
    }


def _in_one_process(count, **how):
    """Time of a run in an ensemble of this process, its start included, as workers make theirs."""

    def go(seeds):
        starts = [short(seed) for seed in seeds]
        batch = tuple(np.stack(layers) for layers in zip(*(w for _, w in starts), strict=True))
        gflow.ensemble(starts[0][0], batch, until=SHORT, save=5, **how)

    go(range(128))
    began, spent = time.perf_counter(), time.process_time()
    go(range(count))
    return _a_run(count, time.perf_counter() - began, time.process_time() - spent)


def _a_run(count, seconds, processor):
    return {
        "milliseconds_a_run": 1e3 * seconds / count,
        "processor_milliseconds_a_run": 1e3 * processor / count,
    }


def by_workers(folder, count):
    """A sweep by two workers, driven from a process that has done nothing else."""
    gflow.cache_programs(folder / "programs")
    marks = [mark for mark in (20_000, 50_000) if mark < count] + [count]
    there, seen = folder / "many", {}
    given = {"until": SHORT, "save": 5}
    with two_workers() as client:
        engine = client.get_executor()
        gflow.sweep(short, {"seed": range(256)}, folder=folder / "warm", executor=engine, **given)

        def watch():
            done = 0
            while done < count:
                time.sleep(0.05)
                done = 128 * len(list(there.glob("group-*.nc")))
                if done and "first_group" not in seen:
                    seen["first_group"] = time.perf_counter() - began
                for mark in marks:
                    if done >= mark and mark not in seen:
                        seen[mark] = memory()

        forget_peak()
        before, own = memory(), time.process_time()
        spent = sum(client.run(time.process_time).values())
        began = time.perf_counter()
        watcher = threading.Thread(target=watch)
        watcher.start()
        found = gflow.sweep(
            short, {"seed": range(count)}, folder=there, lazy=True, executor=engine, **given
        )
        took = time.perf_counter() - began
        spent = sum(client.run(time.process_time).values()) - spent
        own = time.process_time() - own
        watcher.join()
    return {
        "runs": count,
        "seconds": took,
        "seconds_to_first_group": seen["first_group"],
        "driver_megabytes_before": before,
        "driver_megabytes_more_at_most": {mark: seen[mark] - before for mark in marks},
        "driver_and_scheduler_processor_milliseconds_a_run": 1e3 * own / count,
        "on_disk_megabytes": _size(there) / 2**20,
        "workers": _a_run(count, took, spent),
        "reached": int((found.status == "reached").sum()),
    }


def _size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# -------------------------------------------------------------------------------------------------
# Larger than memory
# -------------------------------------------------------------------------------------------------

REDUCE = """
import json, pathlib, re, sys, time
import gflow, xarray as xr
began = time.perf_counter()
kind, path = sys.argv[1:]
found = gflow.load(path, lazy=True) if kind == "folder" else xr.open_zarr(path)
opened = time.perf_counter() - began
size = sum(v.size * v.dtype.itemsize for v in found.data_vars.values())
three = "log_risk", "misalignment", "margin"
means = {name: found[name].mean("seed").compute() for name in three}
one = {"opened": opened, "reduced": time.perf_counter() - began - opened}
began = time.perf_counter()
for name in found.data_vars:
    if found[name].dtype.kind == "f" and "seed" in found[name].dims:
        found[name].mean("seed").compute()
one["all_reduced"] = time.perf_counter() - began
one["gigabytes"] = size / 2**30
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
one["peak_megabytes"] = int(peak) / 1024
one["mean"] = float(means["log_risk"].isel(point=-1).mean())
print(json.dumps(one))
"""


def larger(folder, quick):
    copies, saves = (4, 50) if quick else (150, 500)
    small, whole = folder / "one", folder / "large"

    def start(seed):
        return phase_diagram.start(4, 1.0, 1.0, seed)

    given = {"until": gflow.LogRisk(-100), "save": saves, "folder": small}
    gflow.sweep(start, {"seed": range(128)}, **given)
    one = groups.Folder.found(small)
    seeds = list(range(128 * copies))
    grid = Grid({"seed": Axis(seeds, seeds)}, [128])
    kept = groups.Folder(whole, grid, "copies of one group")
    for block in grid:
        shutil.copy(small / one.grid.block(0).name, whole / block.name)
    kept.complete(one.summary)
    rows = {"folder": {"on_disk_megabytes": _size(whole) / 2**20}}
    rows["folder"] |= _reduced("folder", whole)
    try:
        import zarr  # noqa: F401
    except ModuleNotFoundError:
        return rows
    began = time.perf_counter()
    lazy = gflow.load(whole, lazy=True)
    numbers = lazy[[name for name in lazy.data_vars if lazy[name].dtype.kind in "fib"]]
    numbers.to_zarr(folder / "large.zarr", consolidated=False)
    rows["zarr"] = {
        "seconds_to_write": time.perf_counter() - began,
        "on_disk_megabytes": _size(folder / "large.zarr") / 2**20,
        **_reduced("zarr", folder / "large.zarr"),
    }
    return rows


def _reduced(kind, path):
    made = subprocess.run(
        [sys.executable, "-c", REDUCE, kind, str(path)], check=True, capture_output=True, text=True
    )
    return json.loads(made.stdout.splitlines()[-1])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--part", choices=("killed", "larger", "many"), help="this one alone")
    arguments.add_argument("--count", type=int, default=100_000, help="of short trajectories")
    options = begin(arguments)
    report = Report(__file__, options)
    # Workers are to read what this process writes.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {part.__name__: part for part in (killed, larger, many)}
        for part in [parts[options.part]] if options.part else parts.values():
            more = (options.count,) if part is many else ()
            found[part.__name__] = part(folder, options.quick, *more)
            print(part.__name__, json.dumps(found[part.__name__], indent=1), flush=True)
    assert not found.get("killed", {}).get("variables_that_differ")
    report.write(None, **found)


if __name__ == "__main__":
    main()

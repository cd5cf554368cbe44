"""Does a run survive kill -9? Twenty kills at random moments, the records compared bit for bit.

A flow (explicit steps, so that it is long) and a descent with mini-batches and Adam run with a
checkpoint in processes of their own, each killed at a random moment after it began to compute; the
same call then goes on. When a run has ended its record is compared with that of one that was never
stopped, every variable and attribute but times. Also shown: the age of the file at the kill
(right after a restart that of the file it found, so the time of the new process's set-up too).

    python benchmarks/kill.py [--quick] [--out FOLDER]
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffrax
import numpy as np
import optax
from common import Report, begin, parser, table

import gflow

VERBS = ("flow", "descent")


def run(verb: str, checkpoint: Path | None):
    """A run of some ten seconds."""
    data = gflow.datasets.separable(n=50, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.admissible(gflow.init.gaussian((2, 10, 10, 10, 1), seed=0), problem)
    if verb == "flow":
        return gflow.gradient_flow(
            problem,
            start,
            until=gflow.LogRisk(-3e4),
            save=30,
            solver=diffrax.Tsit5(),
            checkpoint=checkpoint,
            keep_weights=True,
        )
    return gflow.gradient_descent(
        problem,
        start,
        optax.adam(1e-4),
        until=gflow.Steps(1_500_000),
        save=30,
        batch_size=20,
        checkpoint=checkpoint,
        keep_weights=True,
    )


def session(verb: str, checkpoint: Path, record: Path) -> None:
    """One process: the call, and its record."""
    print("begun", flush=True)
    gflow.save(run(verb, checkpoint), record)


def differing(record, other) -> list[str]:
    """Variables and attributes that are not the same bit for bit."""
    names = [
        name
        for name in record.variables
        if record[name].values.tobytes() != other[name].values.tobytes()  # NaN equals itself too
    ]
    times = {"wall_time", "certificate_wall_time"}
    names += [
        name
        for name in set(record.attrs) - times
        if not np.array_equal(record.attrs[name], other.attrs[name])
    ]
    return names


def kill_one(verb: str, path: Path, record: Path, after: float) -> dict | None:
    """Begin or continue a run and kill it; None when it has ended before."""
    command = [sys.executable, __file__, "--session", verb, str(path), str(record)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(path.parent / "compiled")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        killed_at = time.time()
        process.wait()
        if not path.exists():
            return {"verb": verb, "after_s": after, "steps_kept": 0, "file_age_s": after}
        with np.load(path) as file:  # whole, whatever the moment
            kept = int(file["points/num_steps"][-1])
        return {
            "verb": verb,
            "after_s": after,
            "steps_kept": kept,
            "file_age_s": killed_at - path.stat().st_mtime,
        }
    finally:
        process.stdout.close()
    assert process.returncode == 0
    return None


def main():
    if sys.argv[1:2] == ["--session"]:
        verb, path, record = sys.argv[2:]
        session(verb, Path(path), Path(record))
        return
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    chance = random.Random(0)
    kills = 2 if options.quick else 10
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for verb in VERBS:
            whole = Path(folder) / f"{verb}-whole.nc"
            command = [sys.executable, __file__, "--session", verb, str(whole) + ".npz", str(whole)]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            took = time.perf_counter() - began
            mine: list[dict] = []
            while len(mine) < kills:
                path = Path(folder) / f"{verb}-{len(runs)}.npz"
                record = path.with_suffix(".nc")
                while not record.exists():
                    after = chance.uniform(0.0, took) if len(mine) < kills else 1e3
                    found = kill_one(verb, path, record, after)
                    mine += [] if found is None else [found]
                names = differing(gflow.load(record), gflow.load(whole))
                runs.append({"verb": verb, "differing": names})
                print(f"{verb}: {len(mine)} kills, differing: {names or 'nothing'}", flush=True)
            rows += mine
        strays = len(list(Path(folder).glob(".*.part")))
    table(rows, "verb:s after_s:.2f steps_kept:d file_age_s:.2f")
    report.write(
        None,
        rows=rows,
        runs=runs,
        identical=not any(one["differing"] for one in runs),
        strays=strays,
    )


if __name__ == "__main__":
    main()

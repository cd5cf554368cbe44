"""What does a GPU give, and where does a processor do as well?

Each row is the same call in two processes, one that sees the GPU and one that sees the CPU alone:
seconds of the first call, compilation included, and of the second, and how far the results differ.
One small flow, (2,10,10,10,1) to log R = -1e4 with 100 points; two wide layers to -10 with 2 and
with 20 points; a million points in ten dimensions, four layers of width 10, to -3; ensembles of
(2,10,10,10,1) from scale 0.01 to 3 to -1e4; as many descents with as many rates; ten digits,
(64,32,32,10), to -10; and XOR with 20 ReLU neurons to -100. Without a GPU the CPU is measured
alone.

    python benchmarks/accelerator.py [--quick] [--only ROW ...] [--out FOLDER]
"""

import json
import os
import subprocess
import sys

import common
import jax
import numpy as np
import optax
from ensembles import members
from everyday import wide
from large_problems import points

import gflow

QUIET = {"progress": False}


def small(size):
    """One run of (2,10,10,10,1), as by default."""
    problem, starts, _ = members(1)
    until = gflow.LogRisk(-1e4)
    return lambda: gflow.gradient_flow(problem, starts[0], until=until, save=size, **QUIET)


def layers(width, save):
    """Two layers of a width, to log R = -10."""
    problem, start = wide(width)
    until = gflow.LogRisk(-10)
    return lambda: gflow.gradient_flow(problem, start, until=until, save=save, **QUIET)


def many(count, save=2):
    """An ensemble, in lanes as wide as it is on a GPU."""
    problem, starts, _ = members(count)
    stacked = tuple(np.stack(layer) for layer in zip(*starts, strict=True))
    lanes = {} if jax.default_backend() == "cpu" else {"lanes": count}
    until = gflow.LogRisk(-1e4)
    return lambda: gflow.ensemble(problem, stacked, until=until, save=save, **lanes, **QUIET)


def descents(count, save=2):
    """As many descents with as many rates."""
    problem, starts, _ = members(1)
    stacked = tuple(np.repeat(layer[None], count, 0) for layer in starts[0])
    rates = [optax.sgd(rate) for rate in np.geomspace(0.01, 0.3, count)]
    until = gflow.Steps(10_000)
    return lambda: gflow.ensemble(
        problem, stacked, optimizer=rates, until=until, save=save, lanes=count, **QUIET
    )


def cloud(count):
    """Many points of one problem."""
    problem, start, until = points(count, False)
    return lambda: gflow.gradient_flow(problem, start, until=until, save=2, **QUIET)


def digits(log_risk):
    """All ten digits."""
    data = gflow.datasets.digits_all()
    problem = gflow.Problem(data, loss=gflow.CrossEntropy())
    start = gflow.init.gaussian((64, 32, 32, 10), scale=0.3, seed=0)
    until = gflow.LogRisk(log_risk)
    return lambda: gflow.gradient_flow(problem, start, until=until, save=2, **QUIET)


def xor(log_risk):
    """A flow with kinks."""
    from kinks import LABELS, X, drawn

    problem = gflow.Problem(gflow.Dataset(X, LABELS), network=gflow.MLP())
    until = gflow.LogRisk(log_risk)
    return lambda: gflow.gradient_flow(problem, drawn(20, 3), until=until, save=2, **QUIET)


ROWS = {
    "small": lambda: small(100),
    "width 1024, 2 points": lambda: layers(1024, 2),
    "width 1024, 20 points": lambda: layers(1024, 20),
    "width 2048, 2 points": lambda: layers(2048, 2),
    "width 4096, 2 points": lambda: layers(4096, 2),
    "width 4096, 20 points": lambda: layers(4096, 20),
    "1e6 points": lambda: cloud(1_000_000),
    "ensemble of 256": lambda: many(256),
    "ensemble of 1024": lambda: many(1024),
    "256 descents": lambda: descents(256),
    "ten digits": lambda: digits(-10.0),
    "XOR": lambda: xor(-100.0),
}
QUICK = {"small": lambda: small(3), "width 64, 2 points": lambda: layers(64, 2)}


def session(name):
    """One process: the row, twice."""
    call = {**ROWS, **QUICK}[name]()
    took, records = zip(*(common.seconds(call) for _ in range(2)), strict=True)
    found = records[-1]
    last = found.isel(point=-1)
    return {
        "row": name,
        "device": jax.devices()[0].device_kind,
        "first_s": took[0],
        "warm_s": took[1],
        "steps": int(np.max(last.num_steps)),
        "status": found.attrs.get("status") or ", ".join(sorted(set(found.status.values))),
        "reached": [float(x) for x in np.ravel(last.log_risk)[:8]],
        "log_time": [float(x) for x in np.ravel(last.log_time)[:8]] if "log_time" in last else [],
    }


def run(name, platform):
    """The same in a process of its own, which sees this platform alone; None where it fails."""
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    command = [sys.executable, __file__, "--session", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print(f"{name} on {platform} fails: exit code {done.returncode}", flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    common.table([found], "row:s device:s first_s:.2f warm_s:.3f steps:d status:s")
    sys.stdout.flush()
    return found


def apart(one, other):
    """The largest relative difference of two rows' ends."""
    pairs = ((np.array(one[key]), np.array(other[key])) for key in ("reached", "log_time"))
    return max(float(np.max(np.abs(a - b) / np.abs(b), initial=0.0)) for a, b in pairs)


def main():
    if sys.argv[1:2] == ["--session"]:
        print(json.dumps(session(sys.argv[2])))
        return
    arguments = common.parser(__doc__)
    arguments.add_argument("--only", nargs="+", metavar="ROW", help="these rows")
    arguments.add_argument("--platforms", nargs="+", help="by default the GPU, if any, and the CPU")
    options = common.begin(arguments)
    report = common.Report(__file__, options)
    platforms = options.platforms or sorted({jax.default_backend(), "cpu"}, reverse=True)
    platforms = ["cuda,cpu" if platform == "gpu" else platform for platform in platforms]
    rows = []
    for name in options.only or (QUICK if options.quick else ROWS):
        found = [each for each in (run(name, platform) for platform in platforms) if each]
        if len(found) == 2:
            found[0]["apart"] = apart(*found)
            found[0]["times_faster"] = found[1]["warm_s"] / found[0]["warm_s"]
            print(f"{name}: {found[0]['times_faster']:.2f} times faster; {found[0]['apart']:.1e}")
        rows += found
        report.write(None, rows=rows)  # what there is, should the machine be taken away


if __name__ == "__main__":
    main()

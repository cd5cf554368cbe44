"""Do large single problems run in bounded memory? A million points, and layers of width 4096.

Each run is a process of its own, which tells its wall and processor time, compilation included, and
the greatest amount of memory that it has held. A million points in 10 dimensions, four layers of
width 10, to log R = -3: on one device, and spread by `Problem.sharded` over two virtual ones and
over those of two processes (memory is that of one of them), whose end-to-end vectors are compared.
Then two hidden layers of width 2048 and of 4096 to log R = -10, with both ends saved.

    python benchmarks/large_problems.py [--quick] [--out FOLDER]
"""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from common import Report, begin, parser, table
from rivals import peak_memory

import gflow

POINTS, WIDTHS = 1_000_000, (2048, 4096)
NAMES = ("points, one device", "points, two devices", "points, two processes", "width")


def points(count: int, sharded: bool) -> tuple[gflow.Problem, tuple, gflow.LogRisk]:
    """Many points in ten dimensions."""
    data = gflow.datasets.separable(n=count, d=10, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.admissible(gflow.init.gaussian((10, 10, 10, 10, 1), seed=0), problem)
    return problem.sharded(jax.devices()) if sharded else problem, start, gflow.LogRisk(-3)


def wide(width: int) -> tuple[gflow.Problem, tuple, gflow.LogRisk]:
    """Three layers of one width."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.gaussian((2, width, width, 1), seed=0)
    return problem, gflow.init.admissible(start, problem), gflow.LogRisk(-10)


def session(name: str, size: int) -> dict:
    """One process: the run, and what it took."""
    problem, start, until = wide(size) if name == "width" else points(size, name in NAMES[1:3])
    wall, cpu = time.perf_counter(), time.process_time()
    record = gflow.gradient_flow(problem, start, until=until, save=2, progress=False)
    return {
        "what": name,
        "size": size,
        "status": record.attrs["status"],
        "steps": int(record.num_steps[-1]),
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": peak_memory(),
        "end_to_end": record.end_to_end.values[-1].tolist(),
    }


def run(name: str, size: int) -> dict:
    """The same in a process of its own, with two virtual devices where they are asked for."""
    command = [sys.executable, __file__, "--session", name, str(size)]
    flags = "--xla_force_host_platform_device_count=2" if name == NAMES[1] else ""
    environment = {**os.environ, "XLA_FLAGS": flags}
    if name == NAMES[2]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"localhost:{free.getsockname()[1]}")
        other = subprocess.Popen([*command, "1"], stdout=subprocess.DEVNULL, env=environment)
        command.append("0")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    if name == NAMES[2]:
        other.wait()
    table([found], "what:s size:d status:s steps:d wall_s:.1f cpu_s:.1f peak_mib:.0f")
    return found


def main() -> None:
    if sys.argv[1:2] == ["--session"]:
        if len(sys.argv) > 4:
            jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5]))
        print(json.dumps(session(sys.argv[2], int(sys.argv[3]))))
        return
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    count, widths = (10_000, (64,)) if options.quick else (POINTS, WIDTHS)
    rows = [run(name, count) for name in NAMES[:3]]
    first, *others = (np.array(each["end_to_end"]) for each in rows)
    apart = float(max(np.linalg.norm(first - other) for other in others) / np.linalg.norm(first))
    print(f"two devices differ from one by {apart:.1e} of the end-to-end vector")
    rows += [run("width", width) for width in widths]
    for row in rows:
        del row["end_to_end"]
    report.write(None, rows=rows, difference_between_devices=apart)


if __name__ == "__main__":
    main()

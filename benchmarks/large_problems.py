"""Do large single problems run in bounded memory? A million points, and layers of width 4096.

Each run is a process of its own, which tells its wall and processor time, compilation included, and
the greatest amount of memory that it has held. A million points in 10 dimensions, four layers of
width 10, to log R = -3: on one device, and spread by `Problem.sharded` over two virtual ones and
over those of two processes (memory is that of one of them), whose end-to-end vectors are compared.
Then two hidden layers of width 2048 and of 4096 to log R = -10, with both ends saved: on one
device, and the weights spread over two virtual devices and over those of two processes. What the
largest program needs on a device is told beside: its arguments, results and temporary arrays.

    python benchmarks/large_problems.py [--quick] [--only NAME] [--widths N] [--out FOLDER]
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
WHERE = ("one device", "two devices", "two processes")
NAMES = tuple(f"{what}, {where}" for what in ("points", "width") for where in WHERE)


def points(count: int, sharded: bool) -> tuple[gflow.Problem, tuple, gflow.LogRisk]:
    """Many points in ten dimensions."""
    data = gflow.datasets.separable(n=count, d=10, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.admissible(gflow.init.gaussian((10, 10, 10, 10, 1), seed=0), problem)
    return problem.sharded(jax.devices()) if sharded else problem, start, gflow.LogRisk(-3)


def wide(width: int, sharded: bool) -> tuple[gflow.Problem, tuple, gflow.LogRisk]:
    """Three layers of one width."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.gaussian((2, width, width, 1), seed=0)
    start = gflow.init.admissible(start, problem)
    if sharded:
        problem = problem.sharded(jax.devices(), points=False, weights=True)
    return problem, start, gflow.LogRisk(-10)


def largest_program() -> float:
    """What the largest of the compiled programs needs on each of its devices, in MiB."""
    kept = [each.get_compiled_memory_stats() for each in jax.devices()[0].client.live_executables()]
    sizes = (
        each.argument_size_in_bytes
        + each.output_size_in_bytes
        + each.temp_size_in_bytes
        - each.alias_size_in_bytes
        for each in kept
    )
    return max(sizes) / 2**20


def session(name: str, size: int) -> dict:
    """One process: the run, and what it took."""
    what, where = name.split(", ")
    problem, start, until = {"width": wide, "points": points}[what](size, where != WHERE[0])
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
        "device_mib": largest_program(),
        "end_to_end": record.end_to_end.values[-1].tolist(),
    }


def run(name: str, size: int) -> dict:
    """The same in a process of its own, with two virtual devices where they are asked for."""
    command = [sys.executable, __file__, "--session", name, str(size)]
    where = name.split(", ")[1]
    flags = "--xla_force_host_platform_device_count=2" if where == WHERE[1] else ""
    environment = {**os.environ, "XLA_FLAGS": flags}
    if where == WHERE[2]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"localhost:{free.getsockname()[1]}")
        other = subprocess.Popen([*command, "1"], stdout=subprocess.DEVNULL, env=environment)
        command.append("0")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    if where == WHERE[2]:
        other.wait()
    table(
        [found], "what:s size:d status:s steps:d wall_s:.1f cpu_s:.1f peak_mib:.0f device_mib:.0f"
    )
    return found


def main() -> None:
    if sys.argv[1:2] == ["--session"]:
        if len(sys.argv) > 4:
            jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5]))
        print(json.dumps(session(sys.argv[2], int(sys.argv[3]))))
        return
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="these rows")
    arguments.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = begin(arguments)
    report = Report(__file__, options)
    count, widths = (10_000, (64,)) if options.quick else (POINTS, options.widths)
    sizes = {"points": (count,), "width": widths}
    rows = [run(name, size) for name in options.only for size in sizes[name.split(", ")[0]]]
    apart = {}
    for row in rows:
        key = f"{row['what'].split(', ')[0]} {row['size']}"
        vector = np.array(row.pop("end_to_end"))
        first, most = apart.setdefault(key, (vector, 0.0))
        off = float(np.linalg.norm(vector - first) / np.linalg.norm(first))
        apart[key] = first, max(most, off)
    for key, (_, most) in apart.items():
        print(f"{key}: end-to-end vectors differ by {most:.1e} of their size")
    report.write(None, rows=rows, difference={key: most for key, (_, most) in apart.items()})


if __name__ == "__main__":
    main()

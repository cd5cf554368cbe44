"""What does one wait for before the first result? Import, compilation, first and second calls.

Each line is measured in fresh processes, the least and the median of several: what `import gflow`
adds to the import of JAX, diffrax, optax; the first and the second flow; the same for bare diffrax
and SciPy in physical time to log R = -10, which compile less or nothing and are done sooner.

    python benchmarks/start_up.py [--quick] [--out FOLDER]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import reach

REPEATS = 3
BASE = "import jax, diffrax, optax"
IMPORTS = {"jax, diffrax, optax": BASE, "gflow": "import gflow"}
CALLS = ("gflow", "diffrax Tsit5", "SciPy DOP853")
CALL = """
import json, sys, time
sys.path.insert(0, {folder!r})
import rivals
problem, targets = rivals.read({path!r})
took = []
began = time.perf_counter()
_, run = rivals.PEERS[{name!r}](problem)
for _ in range(3):
    run(targets[0])
    took.append(time.perf_counter() - began)
    began = time.perf_counter()
print(json.dumps(took))
"""


def fresh(code):
    """Seconds of a new process, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, done.stdout


def imports(repeats):
    rows = []
    bare = statistics.median(fresh("pass")[0] for _ in range(repeats))
    for name, code in IMPORTS.items():
        if repeats > 1:
            fresh(code)  # once, to have its files in memory
        took = [fresh(code)[0] - bare for _ in range(repeats)]
        rows.append({"what": name, "least": min(took), "median": statistics.median(took)})
    rows.append({"what": "gflow's own share"} | {
        key: rows[1][key] - rows[0][key] for key in ("least", "median")
    })  # fmt: skip
    return rows


def calls(names, path, repeats):
    rows = []
    for name in names:
        code = CALL.format(folder=str(Path(__file__).parent), path=str(path), name=name)
        runs = []
        for _ in range(repeats):
            whole, told = fresh(code)
            first, *later = json.loads(told.splitlines()[-1])
            runs.append((whole, first, min(later)))
        whole, first, warm = (min(each) for each in zip(*runs, strict=True))
        rows.append({"what": name, "process_s": whole, "first_call_s": first, "warm_s": warm})
    return rows


def main():
    options = common.begin(common.parser(__doc__))
    report = common.Report(__file__, options)
    repeats = 1 if options.quick else REPEATS
    found = imports(repeats)
    common.table(found, "what:s least:.2f median:.2f")
    work = common.task(reach.WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        reach.pose(work, reach.reference(work, (-10,), quick=options.quick), (-10,), path)
        rows = calls(CALLS[-1:] if options.quick else CALLS, path, repeats)
    print(
        "To log R = -10, each in a process of its own; import and compilation are in the first call"
    )
    common.table(rows, "what:s process_s:.2f first_call_s:.2f warm_s:.4f")
    report.write(None, imports=found, calls=rows)


if __name__ == "__main__":
    main()

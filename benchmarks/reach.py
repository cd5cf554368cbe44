"""How far does each method get in so many seconds? Wall time against reached log R, and memory.

A network of widths 2, 10, 10, 10, 1 on 100 points with exponential loss, from one random start.
Each peer of `rivals.py` runs in a process of its own, in this script's process group, from the
start to one target after the other, each in a call of its own: warm, the least of up to five. A run
that takes longer than the limit ends the peer. Methods in physical time are told the time of each
target (from a reference of 7 stages at rtol 1e-11); those in gflow's clock are lent its field, its
logarithms and its clock, which are not theirs. gflow makes its whole call at its defaults, a
tolerance of 1e-9 and 100 saved points with every observable at each, which nobody else saves (the
column ``save``; `everyday.py` has a peer that saves as many); its solver alone, at the tolerance of
the peers, returns final weights as they do. Ratios hold peers as they come against the whole call,
and those lent its clock against the solver alone.

    python benchmarks/reach.py [--quick] [--limit SECONDS] [--only NAME] [--out FOLDER]

``--only`` renews some peers, and gflow, in an earlier result. The environment variable TORCH_PYTHON
names an interpreter that has torchdiffeq and torchode, if this one has not.
"""

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import numpy as np
import rivals

import gflow

WIDTHS = (2, 10, 10, 10, 1)
TARGETS = (-2, -5, -10, -20, -50, -100, -200, -500, -700, -1e3, -2e3, -5e3, -1e4)
NEED_TORCH = ("torchdiffeq dopri5", "torchdiffeq dopri8", "torchode Tsit5", "Lyu and Li's descent")
QUICK_PEERS = ("SciPy DOP853",)
OURS = "gflow", "gflow's solver alone"
LENT = ", gflow's clock"
START_UP = 300.0
"""Seconds a peer may take to import, compile and run to the first target."""


def reference(work, targets, *, quick=False):
    """The flow at every target, to ten digits; ``quick`` saves a compilation, costs a digit."""
    exact = {"rtol": 1e-11, "solver": gflow.GaussNewton(stages=7, tolerance=1e-14)}
    return gflow.gradient_flow(
        work.field.problem,
        work.weights,
        until=gflow.LogRisk(targets[-1]),
        save=np.array(targets, dtype=np.float64),
        progress=False,
        **({} if quick else exact),
    )


def pose(work, flow, targets, path):
    """Write what a peer must know."""
    at = flow.isel(point=[int(np.abs(flow.log_risk.values - r).argmin()) for r in targets])
    w = at.end_to_end.values
    np.savez(
        path,
        signed_inputs=np.asarray(work.field.problem.data.signed_inputs),
        depth=len(work.weights),
        **{f"weights_{k}": np.asarray(matrix) for k, matrix in enumerate(work.weights)},
        log_risks=np.array(targets, dtype=np.float64),
        log_times=at.log_time.values,
        scaled_times=np.exp(at.log_time.values + at.log_risk.values),
        end_to_end=w / np.linalg.norm(w, axis=1, keepdims=True),
    )


def ours(name, path):
    """Gflow in this process, as `rivals.py` would run it."""
    problem, targets = rivals.read(path)
    settings, run = rivals.PEERS[name](problem)
    first, _ = common.seconds(lambda: run(targets[0]))
    rows = [rivals.measured(run, target, problem.z) for target in targets]
    return {"method": name, "settings": settings, "first_call_s": first, "rows": rows}


def theirs(name, path, limit, python):
    """A peer in a process of its own, stopped at the first target that takes too long."""
    script = Path(__file__).with_name("rivals.py")
    process = subprocess.Popen(
        [python, str(script), name, str(path)],
        # Their matrices are small: threads of BLAS would cost them time.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def listen():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    # Both pipes are emptied, or a talkative peer would wait for ever.
    listeners = (listen, lambda: errors.append(process.stderr.read()))
    threads = [threading.Thread(target=each, daemon=True) for each in listeners]
    for thread in threads:
        thread.start()
    found = {"method": name, "rows": []}
    # A target is measured up to five times: in a second, or once if it takes longer.
    allowed, began, target = START_UP, time.perf_counter(), None
    try:
        while True:
            line = lines.get(timeout=max(0.1, began + allowed - time.perf_counter()))
            if line is None:
                break
            told = json.loads(line)
            if "begins" in told:
                target, allowed, began = told["begins"], limit + 1.0, time.perf_counter()
            elif "seconds" in told:
                found["rows"].append(told)
            else:
                found |= told
    except queue.Empty:
        process.kill()
        where = "the first call" if target is None else f"log R = {target:g}"
        found["ended"] = f"{where} takes more than {limit if target is not None else allowed:g} s"
    process.wait()
    for thread in threads:
        thread.join()
    process.stdout.close()
    process.stderr.close()
    if "done" not in found and not {"ended", "unable", "missing"} & found.keys():
        found["unable"] = f"it dies with code {process.returncode}: {''.join(errors)[-300:]}"
    return found


def with_earlier(contestants, report, names):
    """Peers that were not asked for, as an earlier result has them, in the order of `rivals`."""
    found = {each["method"]: each for each in contestants}
    earlier = report.folder / f"{report.name}.json" if report.folder else None
    if earlier is not None and earlier.exists():
        document = json.loads(earlier.read_text())
        if document["quick"] == report.document["quick"]:
            found = {each["method"]: each for each in document["contestants"]} | found
            report.document |= {"command": document["command"], "renewed": sorted(names)}
    return [found[name] for name in rivals.PEERS if name in found]


def judged(found, goal, ours):
    """What the README's table says of one method; ``ours`` is what its time is held against."""
    rows = {row["log_risk"]: row for row in found["rows"]}
    last = rows.get(min(rows, default=None), {})
    seconds = {target: row["seconds"] for target, row in rows.items()}
    why = found.get("missing") or found.get("unable") or found.get("ended") or "done"
    return {
        "method": found["method"],
        "save": rivals.SAVED if found["method"] == OURS[0] else 1,
        "settings": found.get("settings"),
        "reached": last.get("log_risk"),
        "seconds_there": last.get("seconds"),
        "direction_gap": last.get("direction_gap"),
        "to_-10": seconds.get(-10),
        "to_-100": seconds.get(-100),
        "to_goal": seconds.get(goal),
        "times_ours": seconds[goal] / ours if goal in seconds else None,
        "peak_mib": last.get("peak_mib"),
        "first_call_s": found.get("first_call_s"),
        "why": why,
    }


def figure(contestants):
    import matplotlib.pyplot as plt
    from peers import PALETTE

    fig, axes = plt.subplots(
        1, 2, figsize=(9.6, 4.6), layout="constrained", sharex=True, sharey=True
    )
    lent = [LENT in each["method"] or each["method"] == OURS[1] for each in contestants]
    for ax, wanted, title in zip(
        axes,
        (False, True),
        (
            "as they come: physical time (to the dotted line), or descent",
            "lent gflow's logarithms and clock",
        ),
        strict=True,
    ):
        shown = [c for c, own in zip(contestants, lent, strict=True) if own == wanted and c["rows"]]
        for index, each in enumerate(shown):
            x = [-row["log_risk"] for row in each["rows"]]
            y = [row["seconds"] for row in each["rows"]]
            own = each["method"].startswith("gflow")
            ax.loglog(
                x,
                y,
                color="black" if own else PALETTE[(index - 1) % len(PALETTE)],
                marker="o^sDvPX*<>hd"[index % 12],
                markersize=4,
                linestyle="-" if own or index <= len(PALETTE) else "--",
                linewidth=2 if own else 1,
                label=each["method"].removesuffix(LENT),
            )
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("$-\\log\\,R$ reached")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, frameon=False)
    axes[0].axvline(745, color="0.6", linestyle=":", linewidth=1)
    axes[0].set_ylabel("seconds from the start, warm")
    return fig


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a run may take")
    parser.add_argument("--only", help="peers whose name holds this")
    options = common.begin(parser)
    report = common.Report(__file__, options)
    targets = TARGETS[:5] if options.quick else TARGETS
    limit = min(options.limit, 5.0) if options.quick else options.limit
    names = QUICK_PEERS if options.quick else tuple(rivals.PEERS)
    names = [n for n in names if n not in OURS and (options.only or "") in n]
    torch = os.environ.get("TORCH_PYTHON", sys.executable)
    work = common.task(WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        pose(work, reference(work, targets, quick=options.quick), targets, path)
        contestants = [ours(name, path) for name in (OURS[:1] if options.quick else OURS)]
        for name in names:
            python = torch if name in NEED_TORCH else sys.executable
            contestants.append(theirs(name, path, limit, python))
            last = judged(contestants[-1], targets[-1], math.nan)
            print(f"{name}: to log R = {last['reached']}; {last['why']}", flush=True)
    if options.only:
        contestants = with_earlier(contestants, report, names)
    # The whole call for peers as they come, the solver alone for those lent its clock.
    mine = [each["rows"][-1]["seconds"] for each in contestants if each["method"] in OURS]
    rows = [
        judged(each, targets[-1], mine[-1 if LENT in each["method"] else 0]) for each in contestants
    ]
    columns = (
        "method:s save:d reached:g seconds_there:.4f direction_gap:.1e to_-10:.4f to_-100:.4f "
        "to_goal:.3f times_ours:.1f first_call_s:.1f peak_mib:.0f why:s"
    )
    common.table(rows, columns)
    start = float(work.field.problem.log_risk(work.weights))
    report.write(
        figure(contestants),
        widths=WIDTHS,
        log_risk_at_start=start,
        goal=targets[-1],
        limit_s=limit,
        contestants=contestants,
        summary=rows,
    )


if __name__ == "__main__":
    main()

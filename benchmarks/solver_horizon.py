"""How does the cost of a flow grow with its horizon, for GaussNewton and for an explicit method?

A network of widths 2, 10, 10, 10, 1 with exponential loss is followed to log R = -1e2 … -1e8: by
the solver alone, from the start to one target; by the whole call of `gradient_flow` with 20 saved
points; and, to -1e5, by Dopri8 in the same clock. Digits are those of the worst observable at the
end, against 7 stages at rtol 1e-13. The first call is made in a fresh process.

    python benchmarks/solver_horizon.py [--quick] [--tag TAG] [--out FOLDER]
"""

import argparse
import functools
import json
import subprocess
import sys
import time

import common
import diffrax

import gflow

WIDTHS = (2, 10, 10, 10, 1)
RTOLS = (1e-5, 1e-6, 1e-8)
RTOL = 1e-6
"""For the curve over horizons and for Dopri8."""

FIRST_CALL = 2
"""First calls measured, each in a process of its own."""


def whole_call(work, log_risk):
    return gflow.gradient_flow(
        work.field.problem,
        work.weights,
        until=gflow.LogRisk(log_risk),
        save=20,
        progress=False,
    )


def accuracy(work, observer, goals, quick):
    """Digits and counts for every horizon and tolerance; the references and their own error."""
    rows, references = [], {}
    for goal in goals:
        reference = references[goal] = common.reference_run(work, goal, quick=quick)
        solver = gflow.GaussNewton() if quick else gflow.GaussNewton(stages=9, tolerance=1e-14)
        other = common.walk(work, solver, goal, 1e-12)
        uncertainty = common.errors(observer(other.state), observer(reference.state))
        for rtol in RTOLS:
            run = common.walk(work, gflow.GaussNewton(), goal, rtol)
            errors = common.errors(observer(run.state), observer(reference.state))
            rows.append(
                {
                    "log_risk": goal,
                    "rtol": rtol,
                    "steps": run.num_steps,
                    "rejected": run.num_rejected,
                    "newton": run.num_iterations,
                    "digits": common.digits(common.worst(errors)),
                    "reference_digits": common.digits(common.worst(uncertainty)),
                    "direction_error_digits": common.digits(errors["direction_error"]),
                    "drift": observer.drift(run.state),
                    "errors": errors,
                    "reference_errors": uncertainty,
                }
            )
    return rows, references


def alone(work, goal, rtol):
    return functools.partial(common.walk, work, gflow.GaussNewton(), goal, rtol)


def first_call(goal):
    """What a new process waits for: run by this script in a process of its own."""
    work = common.task(WIDTHS)
    took, _ = common.seconds(lambda: whole_call(work, goal).attrs["status"])
    print(json.dumps({"first_call_s": took}))


def fresh_process(goal):
    began = time.perf_counter()
    command = [sys.executable, __file__, f"--first-call={goal}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall = time.perf_counter() - began
    return {**json.loads(output.splitlines()[-1]), "whole_process_s": wall}


def against_dopri8(work, observer, goals, references, quick):
    """Both at one tolerance in turns."""
    rows = []
    for goal in goals:
        calls = {
            "GaussNewton": alone(work, goal, RTOL),
            "Dopri8": functools.partial(common.walk, work, diffrax.Dopri8(), goal, RTOL),
        }
        few = quick or goal <= -1e5
        times, runs = common.timed(calls, repeats=1 if few else 3, warm=len(rows) > 0 and few)
        exact = references.get(goal) or common.reference_run(work, goal, quick=quick)
        digits = {n: common.digits(observer.worst(r.state, exact.state)) for n, r in runs.items()}
        rows.append(
            {
                "log_risk": goal,
                **times["Dopri8"]._asdict(),
                "steps": runs["Dopri8"].num_steps,
                "digits": digits["Dopri8"],
                "our_median": times["GaussNewton"].median,
                "our_digits": digits["GaussNewton"],
                "ratio": times["Dopri8"].median / times["GaussNewton"].median,
                "cpu_ratio": times["Dopri8"].cpu / times["GaussNewton"].cpu,
            }
        )
    print(f"Dopri8 in the same clock, rtol {RTOL:g}; ratio: its time over that of GaussNewton")
    columns = (
        "log_risk:g median:.4f steps:d digits:.1f our_median:.4f our_digits:.1f ratio:.1f "
        "cpu_ratio:.1f"
    )
    common.table(rows, columns)
    return rows


def whole_calls(work, observer, references, repeats):
    """`gradient_flow` at its defaults, its last point against the references."""
    calls = {goal: functools.partial(whole_call, work, goal) for goal in references}
    times, found = common.timed(calls, repeats=repeats)
    rows = []
    for goal, timing in times.items():
        last = found[goal].isel(point=-1)
        values = {name: last[name].values for name in last.data_vars}
        errors = common.errors(values, observer(references[goal].state))
        rows.append(
            {
                "log_risk": goal,
                **timing._asdict(),
                "status": last.attrs["status"],
                "solver": last.attrs["solver"],
                "steps": int(last["num_steps"]),
                "newton": int(last.attrs["num_newton_iterations"]),
                "digits": common.digits(common.worst(errors)),
                "drift": float(last["imbalance_drift"]),
                "errors": errors,
            }
        )
    print("The whole call of gradient_flow, 20 saved points, rtol 1e-9, warm")
    columns = (
        "log_risk:g median:.3f least:.3f cpu:.3f steps:d newton:d digits:.1f drift:.1e solver:s"
    )
    common.table(rows, columns)
    return rows


def figure(curve, explicit, record):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for label, rows, color, marker in (
        (f"GaussNewton, rtol {RTOL:g}", curve, "#0072B2", "o"),
        (f"Dopri8, rtol {RTOL:g}", explicit, "#D55E00", "s"),
        ("gradient_flow, 20 saved points, rtol 1e-9", record, "#009E73", "^"),
    ):
        x, y = [-row["log_risk"] for row in rows], [row["median"] for row in rows]
        if rows:
            ax.loglog(x, y, color=color, marker=marker, label=label)
    ax.set_xlabel("$-\\log\\,R$ at the end")
    ax.set_ylabel("seconds, warm")
    ax.set_title(f"widths {', '.join(map(str, WIDTHS))}, exponential loss", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return fig


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--first-call", type=float, help=argparse.SUPPRESS)
    options = common.begin(parser)
    if options.first_call:
        return first_call(options.first_call)
    report, quick = common.Report(__file__, options), options.quick
    repeats = 3 if quick else 9
    work = common.task(WIDTHS)
    observer = common.Observer(work)

    goals = (-1e4, -1e6, -1e8)
    rows, references = accuracy(work, observer, goals[:2] if quick else goals, quick)
    calls = {
        f"{r['log_risk']:g} {r['rtol']:g}": alone(work, r["log_risk"], r["rtol"]) for r in rows
    }
    times, _ = common.timed(calls, repeats=repeats, warm=True)
    for row, timing in zip(rows, times.values(), strict=True):
        row |= timing._asdict()
    print("The solver alone, warm")
    columns = (
        "log_risk:g rtol:g median:.4f least:.4f cpu:.4f steps:d rejected:d newton:d "
        "digits:.1f reference_digits:.1f direction_error_digits:.1f drift:.1e"
    )
    common.table(rows, columns)

    # The curve over the horizon, everything in turns; Dopri8 to where it takes seconds.
    far = [-(10.0**k) for k in range(2, 7 if quick else 9)]
    times, _ = common.timed({str(g): alone(work, g, RTOL) for g in far}, repeats=repeats, warm=True)
    curve = [{"log_risk": g, **t._asdict()} for g, t in zip(far, times.values(), strict=True)]
    near = [-1e4] if quick else [goal for goal in far if goal >= -1e5]
    explicit = against_dopri8(work, observer, near, references, quick)

    record, first = [], []
    if not quick:
        record = whole_calls(work, observer, references, 7)
        first = [fresh_process(-1e6) for _ in range(FIRST_CALL)]
        print(f"First call to log R = -1e6 in a fresh process: {first}")
    at = {(row["log_risk"], row["rtol"]): row["cpu"] for row in rows}
    growth = {f"rtol {rtol:g}": at[min(references), rtol] / at[-1e4, rtol] for rtol in RTOLS}
    print(f"Growth of the processor time from log R = -1e4 to {min(references):g}: {growth}")
    report.write(
        figure(curve, explicit, record),
        alone=rows,
        horizons=curve,
        explicit=explicit,
        gradient_flow=record,
        first_call=first,
        growth=growth,
    )
    return None


if __name__ == "__main__":
    main()

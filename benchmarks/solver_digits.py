"""What does a flow to log R = -1e6 cost on real data, and does it reach what the theory says?

Handwritten digits 0 against 1 and 3 against 5, all points, d = 64; four layers of width 64,
logistic loss; the whole warm call of `gradient_flow` with 100 saved points, and every claim of
`verify`. `threaded_s` is that call when BLAS uses every core for its small problems.

    python benchmarks/solver_digits.py [--quick] [--tag TAG] [--out FOLDER]
"""

import functools
import os
import time

import common
from threadpoolctl import threadpool_limits

import gflow

PAIRS = ((0, 1), (3, 5))
WIDTHS = (64, 64, 64, 64, 1)


def measure(pair, goal, saved, repeats):
    data = gflow.datasets.digits(*pair)
    work = common.task(WIDTHS, data=data, loss=gflow.Logistic())
    problem = work.field.problem
    call = functools.partial(
        gflow.gradient_flow,
        problem,
        work.weights,
        until=gflow.LogRisk(goal),
        save=saved,
        progress=False,
    )
    first, _ = common.seconds(call)
    alone = functools.partial(common.walk, work, gflow.GaussNewton(), goal, 1e-8)
    times, found = common.timed({"call": call, "alone": alone}, repeats=repeats, budget=40)
    with threadpool_limits(os.cpu_count(), user_api="blas"):
        threaded, _ = common.timed({"call": call}, repeats=min(3, repeats), budget=20, warm=True)
    record, run = found["call"], found["alone"]
    began = time.perf_counter()
    claims = gflow.verify(record)
    verifying = time.perf_counter() - began
    last, best = record.isel(point=-1), data.max_margin().margin
    verdicts = {claim.name: claim.verdict for claim in claims}
    return {
        "data": data.name,
        "points": data.num_points,
        "log_risk": float(last["log_risk"]),
        "status": record.attrs["status"],
        "solver": record.attrs["solver"],
        "median": times["call"].median,
        "least": times["call"].least,
        "cpu": times["call"].cpu,
        "threaded_s": threaded["call"].median,
        "first_call_s": first,
        "alone_s": times["alone"].median,
        "alone_steps": run.num_steps,
        "alone_newton": run.num_iterations,
        "steps": int(last["num_steps"]),
        "smallest_alignment": float(last["alignment"].min()),
        "max_margin": best,
        "margin_over_best": float(last["margin"]) / best,
        "largest_drift": float(record["imbalance_drift"].max()),
        "verify_s": verifying,
        "claims_held": sum(verdict == "holds" for verdict in verdicts.values()),
        "claims_failed": [name for name, verdict in verdicts.items() if verdict == "fails"],
        "claims_silent": [
            name for name, verdict in verdicts.items() if verdict not in ("holds", "fails")
        ],
    }


def figure(rows):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    for k, (key, label, color) in enumerate(
        (
            ("alone_s", "the solver alone", "#0072B2"),
            ("median", "gradient_flow, 100 points", "#009E73"),
            ("first_call_s", "its first call", "#E69F00"),
        )
    ):
        at = [j + 0.25 * (k - 1) for j in range(len(rows))]
        bars = ax.bar(at, [row[key] for row in rows], 0.24, color=color, label=label)
        ax.bar_label(bars, fmt="%.2f", fontsize=7)
    ax.set_xticks(range(len(rows)), [row["data"] for row in rows])
    ax.set_ylabel("seconds to $\\log\\,R=-10^6$")
    ax.legend(fontsize=8)
    return fig


def main():
    options = common.begin(common.parser(__doc__))
    report = common.Report(__file__, options)
    pairs, *how = (PAIRS[:1], -1e4, 20, 1) if options.quick else (PAIRS, -1e6, 100, 5)
    rows = [measure(pair, *how) for pair in pairs]
    columns = (
        "data:s points:d log_risk:g status:s median:.2f least:.2f cpu:.2f threaded_s:.2f "
        "first_call_s:.1f alone_s:.2f alone_steps:d smallest_alignment:.8f "
        "margin_over_best:.8f largest_drift:.1e claims_held:d"
    )
    common.table(rows, columns)
    for row in rows:
        print(
            f"{row['data']}: {row['solver']}; fails: {row['claims_failed']}; "
            f"not applicable: {row['claims_silent']}"
        )
    report.write(figure(rows), rows=rows)


if __name__ == "__main__":
    main()

"""What does a correct digit cost? Wall time against achieved error, ours and the alternatives.

A network of widths 2, 10, 10, 10, 1 with exponential loss, in the clock of the risk, to log R =
-1e4 and, for the implicit methods, -1e6. The error is that of the worst observable at the end,
against 7 stages at rtol 1e-13; what Dopri8 at rtol 1e-13 says of that reference is reported too.
diffrax's methods run in gflow's loop with its error norm; Kvaerno5 with the root finder it comes
with, and with that one's mistake corrected. SciPy's have the exact compiled Jacobian. A run that is
not done within the limit is left out, and listed.

    python benchmarks/work_precision.py [--quick] [--limit SECONDS] [--tag TAG] [--out FOLDER]
"""

import functools

import common
import diffrax
import numpy as np
import peers

import gflow

WIDTHS = (2, 10, 10, 10, 1)
ACCURACIES = (1e-4, 1e-6, 1e-8)


def contestants(quick):
    """Name: (solver at a tolerance, tolerances)."""
    ours = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10)
    theirs = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
    found = {
        f"GaussNewton, {p} stages": (lambda rtol, p=p: gflow.GaussNewton(stages=p), ours)
        for p in (3, 5, 7)
    } | {
        "Dopri8": (lambda rtol: diffrax.Dopri8(), theirs),
        "Kvaerno5, as shipped": (functools.partial(peers.kvaerno5, fixed=False), theirs),
        "Kvaerno5, better root finder": (functools.partial(peers.kvaerno5, fixed=True), theirs),
        "SciPy LSODA": (None, (*theirs, 1e-11, 1e-12)),
        "SciPy Radau": (None, (*theirs, 1e-11, 1e-12)),
    }
    if quick:
        keep = {"GaussNewton, 5 stages": 2, "SciPy LSODA": 1}
        found = {name: (found[name][0], found[name][1][2 : 2 + n]) for name, n in keep.items()}
    return found


def curve(work, observer, reference, goal, name, entry, repeats, limit, peer):
    """Rows of one method, from loose to tight, until a run does not finish."""
    make, rtols = entry
    rows = []
    for rtol in rtols:
        if make is None:
            scaled_time = float(reference.state.scaled_time)
            call = functools.partial(
                peer.walk, name.split()[1], goal, rtol, scaled_time=scaled_time, limit=limit
            )
        else:
            call = functools.partial(
                common.walk, work, make(rtol), goal, rtol, limit=limit, chunk=500
            )
            if not rows:
                common.walk(work, make(rtol), goal, rtol, limit=0.0, chunk=500)  # compile
        runs = [call()]
        while len(runs) < repeats and runs[-1].seconds < limit / 10:
            runs.append(call())
        run = runs[-1]
        rows.append(
            {
                "method": name,
                "goal": goal,
                "rtol": rtol,
                "seconds": float(np.median([each.seconds for each in runs])),
                "cpu": min(each.cpu for each in runs),
                "finished": run.finished,
                "log_risk": run.log_risk,
                "steps": run.num_steps,
                "rejected": run.num_rejected,
                "error": observer.worst(run.state, reference.state) if run.finished else None,
            }
        )
        if not run.finished:
            break
    return rows


def panel(work, observer, goal, entries, repeats, limit, quick):
    reference = common.reference_run(work, goal, quick=quick)
    peer = peers.Peer(work)
    peer.compile()
    rows = []
    for name, entry in entries.items():
        rows += curve(work, observer, reference, goal, name, entry, repeats, limit, peer)
        print(f"{name} to {goal:g}: done", flush=True)
    columns = (
        "method:s rtol:g seconds:.4f cpu:.4f error:.1e steps:d rejected:d finished: log_risk:.5g"
    )
    common.table(rows, columns)
    at = [
        {"method": name}
        | {
            f"{accuracy:g}": peers.time_at(
                [(r["error"], r["seconds"]) for r in rows if r["method"] == name and r["finished"]],
                accuracy,
            )
            for accuracy in ACCURACIES
        }
        for name in entries
    ]
    print(f"Seconds to log R = {goal:g} at an achieved error")
    common.table(at, " ".join(["method:s", *(f"{accuracy:g}:.4f" for accuracy in ACCURACIES)]))
    return {"goal": goal, "rows": rows, "seconds_at_error": at}, reference


def figure(panels):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.2 * len(panels), 4.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for ax, found in zip(axes[0], panels, strict=True):
        for name, color in peers.COLORS.items():
            rows = [r for r in found["rows"] if r["method"] == name and r["finished"]]
            if not rows:
                continue
            ours = name.startswith("GaussNewton")
            ax.loglog(
                [max(r["error"], 1e-15) for r in rows],
                [r["seconds"] for r in rows],
                color=color,
                marker=peers.MARKERS[name],
                markersize=5,
                label=name,
                linestyle="-" if ours else "--",
                linewidth=1.8 if ours else 1.2,
            )
        ax.invert_xaxis()
        ax.set_xlabel("error of the worst observable (better to the right)")
        ax.set_title(f"to $\\log\\,R=-10^{{{round(np.log10(-found['goal']))}}}$", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds, warm")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a run may take")
    options = common.begin(parser)
    report = common.Report(__file__, options)
    repeats, limit = (1, 3.0) if options.quick else (5, options.limit)
    work = common.task(WIDTHS)
    observer = common.Observer(work)
    entries = contestants(options.quick)
    first, reference = panel(work, observer, -1e4, entries, repeats, limit, options.quick)
    panels, check = [first], None
    if not options.quick:
        exact = common.walk(work, diffrax.Dopri8(), -1e4, 1e-13)
        check = common.errors(observer(exact.state), observer(reference.state))
        print(f"Dopri8 at rtol 1e-13 differs from the reference by {common.worst(check):.1e}")
        implicit = {name: entry for name, entry in entries.items() if name != "Dopri8"}
        panels.append(panel(work, observer, -1e6, implicit, repeats, limit, False)[0])
    report.write(figure(panels), limit_s=limit, panels=panels, reference_check=check)


if __name__ == "__main__":
    main()

"""How much faster is GaussNewton than SciPy's LSODA and Radau at equal achieved accuracy?

All integrate the same field in the same clock to log R = -1e6, SciPy's methods with the compiled
field and its exact compiled Jacobian, stopped at a time limit. Each runs at several tolerances;
times are compared at the same error of the worst observable, measured against 7 stages at rtol
1e-13. Two networks with exponential loss, of 230 and about 8,000 weights.

    python benchmarks/solver_peers.py [--quick] [--limit SECONDS] [--tag TAG] [--out FOLDER]
"""

import functools
import time

import common
import numpy as np
import peers
from scipy.linalg import lu_factor

import gflow

SMALL, LARGE = (2, 10, 10, 10, 1), (12, 60, 60, 60, 1)
GOAL = -1e6
ERRORS = (1e-4, 1e-6, 1e-8)
"""Achieved errors at which times are compared."""


def ours(work, observer, reference, rtols, repeats):
    rows = []
    for rtol in rtols:
        call = functools.partial(common.walk, work, gflow.GaussNewton(), GOAL, rtol)
        times, runs = common.timed({"walk": call}, repeats=repeats)
        run = runs["walk"]
        rows.append(
            {
                "method": "GaussNewton",
                "rtol": rtol,
                "seconds": times["walk"].median,
                "cpu": times["walk"].cpu,
                "finished": run.finished,
                "log_risk": run.log_risk,
                "steps": run.num_steps,
                "error": observer.worst(run.state, reference.state),
                "drift": observer.drift(run.state),
            }
        )
    return rows


def theirs(work, observer, reference, rtols, repeats, limit):
    rows = []
    peer = peers.Peer(work)
    peer.compile()
    small = float(reference.state.scaled_time)
    for method in ("LSODA", "Radau"):
        for rtol in rtols:
            runs = []
            for _ in range(repeats):
                runs.append(peer.walk(method, GOAL, rtol, scaled_time=small, limit=limit))
                if runs[-1].seconds > limit / 3:
                    break
            run = runs[-1]
            rows.append(
                {
                    "method": method,
                    "rtol": rtol,
                    "seconds": float(np.median([each.seconds for each in runs])),
                    "cpu": min(each.cpu for each in runs),
                    "finished": run.finished,
                    "log_risk": run.log_risk,
                    "steps": run.num_steps,
                    "error": observer.worst(run.state, reference.state) if run.finished else None,
                    "drift": observer.drift(run.state),
                }
            )
            print("  ", rows[-1], flush=True)
            if not run.finished:
                break  # nor will it at a tighter tolerance
    return rows


def ratios(rows):
    """Times at equal errors; a peer that did not finish counts with the limit as lower bound."""
    found = []
    points = {
        method: [
            (r["error"], r["seconds"]) for r in rows if r["method"] == method and r["finished"]
        ]
        for method in ("GaussNewton", "LSODA", "Radau")
    }
    for error in ERRORS:
        mine = peers.time_at(points["GaussNewton"], error)
        for method in ("LSODA", "Radau"):
            peer = peers.time_at(points[method], error)
            spent = [r["seconds"] for r in rows if r["method"] == method and not r["finished"]]
            bound = peer is None and bool(spent)
            wall = max(spent) if bound else peer
            found.append(
                {
                    "error": error,
                    "method": method,
                    "seconds": wall,
                    "our_seconds": mine,
                    "at_least": bound,
                    "ratio": None if wall is None or mine is None else wall / mine,
                }
            )
    return found


def dense_step(work):
    """What a step of any dense implicit method costs here at least: one Jacobian, one LU."""
    peer = peers.Peer(work)
    peer.compile()
    s, y = np.float64(work.s_start), peer.start
    jacobian, matrix = common.seconds(lambda: peer.jacobian(s, y))
    began = time.perf_counter()
    lu_factor(np.eye(y.size) - 0.1 * np.asarray(matrix))
    return {"jacobian_s": jacobian, "real_lu_s": time.perf_counter() - began}


def compare(widths, rtols, peer_rtols, repeats, limit, quick):
    work = common.task(widths)
    observer = common.Observer(work)
    reference = common.reference_run(work, GOAL, quick=quick)
    rows = ours(work, observer, reference, rtols, repeats)
    rows += theirs(work, observer, reference, peer_rtols, repeats, limit)
    found = {
        "widths": widths,
        "weights": work.num_weights,
        "limit_s": limit,
        "rows": rows,
        "ratios": ratios(rows),
        "dense": dense_step(work),
    }
    print(f"widths {widths}, {work.num_weights} weights; limit {limit:g} s; {found['dense']}")
    columns = (
        "method:s rtol:g seconds:.4f cpu:.4f finished: log_risk:.6g steps:d error:.1e drift:.1e"
    )
    common.table(rows, columns)
    columns = "error:g method:s seconds:.4f our_seconds:.4f ratio:.1f at_least:"
    common.table(found["ratios"], columns)
    return found


def figure(found):
    import matplotlib.pyplot as plt

    size = (4.2 * len(found), 3.6)
    fig, axes = plt.subplots(
        1, len(found), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    styles = {
        "GaussNewton": "GaussNewton, 5 stages",
        "LSODA": "SciPy LSODA",
        "Radau": "SciPy Radau",
    }
    for ax, each in zip(axes[0], found, strict=True):
        for method, key in styles.items():
            rows = [r for r in each["rows"] if r["method"] == method]
            done = [r for r in rows if r["finished"]]
            style = {"color": peers.COLORS[key], "marker": peers.MARKERS[key]}
            if done:
                ax.loglog(
                    [r["error"] for r in done], [r["seconds"] for r in done], label=method, **style
                )
            else:
                limit = rows[-1]["seconds"]
                text = f"{method}: at $-\\log R$ = {-rows[-1]['log_risk']:.2g} after {limit:.0f} s"
                ax.axhline(limit, color=style["color"], linestyle=":", label=text)
        ax.set_title(f"{each['weights']:,} weights, $\\log\\,R=-10^6$", fontsize=10)
        ax.set_xlabel("error of the worst observable")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0, 0].set_ylabel("seconds")
    return fig


def main():
    parser = common.parser(__doc__)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds a run of a peer may take"
    )
    options = common.begin(parser)
    report = common.Report(__file__, options)
    if options.quick:
        found = [compare(SMALL, (1e-4, 1e-6), (1e-5, 1e-7), 1, 4.0, True)]
    else:
        tight = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
        found = [
            compare(SMALL, tight, (1e-4, 1e-6, 1e-8, 1e-10, 1e-11), 3, options.limit / 2, False),
            compare(LARGE, tight, (1e-4, 1e-6), 1, options.limit, False),
        ]
    report.write(figure(found), goal=GOAL, problems=found)


if __name__ == "__main__":
    main()

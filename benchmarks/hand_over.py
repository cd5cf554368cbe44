"""Does it matter where a flow leaves float64 weights, and does the record tell the error?

A flow is followed on its weights to log R = -1e8 (planar data, widths 2, 10, 10, 10, 1) or -1e6
(digits 3 against 5) at rtol 1e-13, the reference; and at the default tolerance to several hand-over
points, from each of which split coordinates go on to the same risk. Shown against the hand-over
point: the largest relative error of a small quantity there that the reference's float64 weights
resolve, and the estimate that a record would carry: the difference of the two ways of going on
between a tenth of that risk and it, and a share of the tolerance. Before, the planar flow to -1e16:
warm time and constants, against those predicted from the start.

    python benchmarks/hand_over.py [--quick] [--out FOLDER]
"""

import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
from common import Report, begin, parser, seconds, table

import gflow
from gflow.dynamics.drive.hand_over import hand_over_error
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.slow_manifold import difference

WIDTHS = (2, 10, 10, 10, 1)
QUANTITIES = ("direction_error", "misalignment", "rank_one_gap", "frobenius_norm")
RESOLVED = 1e-9
"""Relative resolution that a quantity of the reference must have to take part."""

EXACT = {"solver": gflow.GaussNewton(stages=9, tolerance=1e-14), "rtol": 1e-13}
DEFAULT = {"solver": gflow.GaussNewton(), "rtol": 1e-9}


class Case(NamedTuple):
    """A flow, the risks at which it is handed over, and the risk where the errors are read."""

    name: str
    problem: gflow.Problem
    start: tuple[np.ndarray, ...]
    hand_overs: tuple[float, ...]
    end: float


def planar():
    """Uniform points in a square beside a random line through the origin; a Gaussian start."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=2)
    normal /= np.linalg.norm(normal)
    inputs = []
    while len(inputs) < 100:
        x = rng.uniform(-1, 1, size=2) / np.sqrt(2)
        if abs(x @ normal) > 0.1:
            inputs.append(x)
    data = gflow.Dataset(inputs, np.sign(np.array(inputs) @ normal), name="planar")
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    start = tuple(
        np.asarray(jax.random.normal(key, (after, before))) / np.sqrt(before)
        for key, before, after in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    )
    return gflow.Problem(data, loss=gflow.Exponential()), start


def digits():
    """Handwritten 3 against 5, 64 features."""
    data = gflow.datasets.digits(3, 5)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.gaussian((data.dim, 10, 10, 1), seed=0)
    return problem, gflow.init.admissible(start, problem)


def states(case, how):
    """The flow on its weights, in split coordinates at every hand-over, a tenth of it, the end."""
    tenths = [h / 10 for h in case.hand_overs]
    risks = sorted({*tenths, *case.hand_overs, case.end}, key=lambda r: -r)
    # Not exactly where a record is handed over by default.
    record = gflow.gradient_flow(
        case.problem,
        case.start,
        until=gflow.LogRisk(case.end),
        save=risks,
        keep_weights=True,
        **how,
    )
    imbalance = [np.asarray(d) for d in gflow.observables.imbalance(case.start)]
    found = {}
    for i, risk in enumerate(risks, start=record.sizes["point"] - len(risks)):
        weights = tuple(record[f"weights_{k + 1}"].values[i] for k in range(record.sizes["layer"]))
        found[risk] = gflow.SlowManifold().start(
            case.problem,
            weights,
            log_time=float(record["log_time"][i]),
            imbalance=imbalance,
        )
    return found


def measure(case):
    """Error and estimate for every hand-over point."""
    reference = states(case, EXACT)[case.end]
    near = states(case, DEFAULT)
    solver = gflow.SlowManifold()
    # An angle between float64 vectors is known to one unit in the last place of them.
    angle = float(observables(reference)["direction_error"])
    resolved = np.finfo(float).eps / angle < RESOLVED
    compared = [name for name in QUANTITIES if resolved or name != "direction_error"]
    rows: list[dict[str, Any]] = []
    for risk in case.hand_overs:
        error = difference(solver.advance(near[risk], case.end), reference)
        estimate = hand_over_error(solver, near[risk / 10], near[risk], DEFAULT["rtol"])
        rows.append(
            {
                "case": case.name,
                "hand_over": risk,
                "error": max(error[name] for name in compared),
                "estimate": max(estimate[name] for name in compared),
                "compared": compared,
                "errors": error,
                "estimates": estimate,
            }
        )
    weights_alone = difference(near[case.end], reference)
    rows.append(
        {
            "case": case.name,
            "hand_over": case.end,
            "error": max(weights_alone[name] for name in compared),
            "estimate": None,
            "compared": compared,
            "errors": weights_alone,
            "estimates": None,
        }
    )
    return rows


def constants(problem, start, repeats):
    """The planar flow to -1e16: warm time, constants on the way, constants predicted."""
    law = gflow.exact.limits(problem, start)

    def run():
        return gflow.gradient_flow(
            problem, start, until=gflow.LogRisk(-1e16), save=2, progress=False
        )

    run()
    times = [seconds(run)[0] for _ in range(repeats)]
    saved = -np.array([1e8, 1e10, 1e12, 1e14, 1e16])
    record = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-1e16), save=saved)
    rows = []
    for point in record.isel(point=slice(-len(saved), None)).point:
        here = record.sel(point=point)
        s = -float(here.log_risk)
        rows.append(
            {
                "s": s,
                "rank_one": [float(x) for x in here.rank_one_gap.values[:-1] * np.sqrt(s)],
                "misalignment": [float(x) for x in here.misalignment.values * s],
                "direction": float(here.direction_error) * s,
            }
        )
    for row in rows:
        shown = ", ".join(f"{x:.7f}" for x in row["rank_one"])
        print(f"-{row['s']:.0e}: rank one {shown}; direction {row['direction']:.7f}")
    shown = ", ".join(f"{x:.7f}" for x in law.rank_one_gap[:-1])
    print(f"predicted: rank one {shown}; direction {law.direction_error:.7f}")
    print(f"to -1e16, warm: median {statistics.median(times):.3f} s, least {min(times):.3f} s\n")
    return {
        "warm_s": times,
        "constants": rows,
        "predicted_rank_one": list(law.rank_one_gap[:-1]),
        "predicted_misalignment": list(law.misalignment),
        "predicted_direction": law.direction_error,
    }


def figure(rows):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["case"] for row in rows))
    fig, axes = plt.subplots(
        1, len(names), figsize=(3.4 * len(names), 3.1), layout="constrained", squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["case"] == name]
        made = [row for row in mine if row["estimate"] is not None]
        x = [-row["hand_over"] for row in made]
        ax.loglog(
            x, [row["error"] for row in made], "o-", color="#0072B2", label="error at the end"
        )
        ax.loglog(
            x, [row["estimate"] for row in made], "s--", color="#D55E00", label="record's estimate"
        )
        ax.axhline(mine[-1]["error"], color="0.5", lw=0.8, label="no hand-over")
        top = max(row["error"] for row in made)
        ax.loglog(x, [top * x[0] / each for each in x], ":", color="black", label="slope $-1$")
        ax.set_title(
            f"{name}, read at $10^{{{round(np.log10(-mine[-1]['hand_over']))}}}$", fontsize=9
        )
        ax.set_xlabel(r"hand-over at $-\log\,R$")
    axes[0, 0].set_ylabel("largest relative error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    problem, start = planar()
    found = constants(problem, start, 3 if options.quick else 7)
    cases = [Case("planar", problem, start, (-1e3, -1e4, -1.01e6), -1e8)]
    if not options.quick:
        cases.append(Case("digits 3 against 5", *digits(), (-1e3, -1e4, -1.01e5), -1.01e6))
    rows = [row for case in cases for row in measure(case)]
    table(rows, "case:s hand_over:.2e error:.2e estimate:.2e")
    report.write(figure(rows), planar=found, rows=rows)


if __name__ == "__main__":
    main()

"""Do the asymptotic laws meet the flow? Their constants, from start and data, on 100 problems.

Random problems of depth 2 to 6, dimension 2 to 20, up to 500 points, three initialisations, two
losses, half of the data with as many support vectors as dimensions. Each law with its next order,
as `gflow.exact.limits(problem, start).predict` gives it, is compared with the trajectory at
log R = -1e12, and `gflow.verify` judges the record. A problem whose laws hold late or not at all
says why. The time law is compared at -1e8: at -1e12 the last digit of log t in float64 is 1e-4.

    python benchmarks/asymptotic_laws.py [--problems 100] [--first 0] [--quick] [--out FOLDER]
"""

import time

import jax
import numpy as np
from common import Report, begin, parser

import gflow

HORIZON = 1e12
FOUR_DIGITS = 1e-4
LEAST = {"misalignment": 1e-22, "rank_one_gap": 1e-10}
"""Parts of the largest over the layers: what is smaller is lost in the rounding of the start's
conserved matrices, of which rank one is a difference."""

LAWS = ("rank_one_gap", "misalignment", "direction_error", "spectral_norm", "margin_gap")
INITIALISATIONS = {
    "gaussian": gflow.init.gaussian,
    "orthogonal": gflow.init.orthogonal,
    "zero first": gflow.init.zero_first,
}
LOSSES = (gflow.Exponential(), gflow.Logistic())
SAVED = -np.array([1e2, 1e3, 1e4, 1e7, 1e8, 1e10, HORIZON])


def by_random_plane(n, d, rng):
    """Uniform points labelled by a random plane through the origin, with a gap."""
    normal = rng.normal(size=d)
    normal /= np.linalg.norm(normal)
    x = rng.uniform(-1, 1, size=(4 * n, d)) / np.sqrt(d)
    x = x[np.abs(x @ normal) > 0.05][:n]
    return gflow.Dataset(x, np.sign(x @ normal), name="random plane")


def draw(number):
    """A random problem and its start."""
    rng = np.random.default_rng(number)
    depth, d = int(rng.integers(2, 7)), int(rng.integers(2, 21))
    n = round(float(np.exp(rng.uniform(np.log(2 * d), np.log(500)))))
    if number % 2:
        data = by_random_plane(n, d, rng)
    else:
        data = gflow.datasets.separable(n=n, d=d, margin=float(rng.uniform(0.05, 0.3)), seed=number)
    widths = (d, *(int(w) for w in rng.integers(2, 13, size=depth - 1)), 1)
    name = list(INITIALISATIONS)[number % 3]
    problem = gflow.Problem(data, loss=LOSSES[number // 2 % 2])
    start = INITIALISATIONS[name](widths, seed=number)
    return problem, gflow.init.admissible(start, problem), name


def relative(predicted, found, least):
    """The largest relative deviation where the law is not zero."""
    predicted, found = np.atleast_1d(predicted), np.atleast_1d(found)
    scale = np.maximum(np.abs(predicted), np.abs(found))
    there = (predicted != 0) & (scale > least * np.max(scale, initial=0))
    return float(np.max((np.abs(predicted - found) / np.where(there, scale, 1))[there], initial=0))


def where_zero(predicted, found):
    """The largest value where the law says that it is zero at all times."""
    predicted, found = np.atleast_1d(predicted), np.atleast_1d(found)
    return float(np.max(np.abs(found)[predicted == 0], initial=0))


def compare(number):
    problem, start, name = draw(number)
    began = time.perf_counter()
    law = gflow.exact.limits(problem, start)
    middle = time.perf_counter()
    record = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-HORIZON), save=SAVED)
    after = time.perf_counter()
    claims = gflow.verify(record)
    row = {
        "number": number,
        "widths": [int(w) for w in record.attrs["widths"]],
        "points": problem.data.num_points,
        "data": problem.data.name,
        "initialisation": name,
        "loss": repr(problem.loss),
        "support": len(law.support),
        "direction_exponent": law.direction_exponent,
        "settled_from": law.settled_from,
        "degenerate": list(law.degenerate),
        "status": record.attrs["status"],
        "hand_over": record.attrs.get("hand_over", ""),
        "seconds": [middle - began, after - middle],
        "claims": {c.name: [c.verdict, c.value] for c in claims if c.name.startswith("sharp law")},
        "failed_claims": [c.name for c in claims.failed],
        "deviation": {},
    }
    for i, log_risk in enumerate(record["log_risk"].values):
        if log_risk > -50:
            continue
        predicted = law.predict(log_risk)
        found = {
            key: relative(predicted[key], record[key].values[i], LEAST.get(key, 0)) for key in LAWS
        }
        found["log_time"] = abs(float(predicted["log_time"] - record["log_time"].values[i]))
        found["expansion"] = law.expansion(log_risk)
        found["rank_one_where_zero"], found["misalignment_where_zero"] = (
            where_zero(predicted[key], record[key].values[i]) for key in LAWS[:2]
        )
        row["deviation"][f"{log_risk:.0e}"] = found
    last = row["deviation"][f"{-HORIZON:.0e}"]
    row["worst"] = max(last[key] for key in LAWS)
    row["time"] = row["deviation"]["-1e+08"]["log_time"]
    row["agrees"] = row["worst"] < FOUR_DIGITS and row["time"] < FOUR_DIGITS
    row["agreeing_laws"] = [key for key in LAWS if last[key] < FOUR_DIGITS]
    return row


def describe(row):
    widths = "-".join(map(str, row["widths"]))
    verdict = "agrees" if row["agrees"] else "degenerate" if row["degenerate"] else "DISAGREES"
    last = row["deviation"][f"{-HORIZON:.0e}"]
    numbers = " ".join(f"{last[key]:8.1e}" for key in LAWS)
    return (
        f"{row['number']:3d} {widths:24s} n={row['points']:3d} S={row['support']:2d} "
        f"{row['initialisation']:10s} {row['loss'][:3]} {numbers} {row['time']:8.1e}  {verdict}"
    )


def main():
    options = parser(__doc__)
    options.add_argument("--problems", type=int, default=100)
    options.add_argument("--first", type=int, default=0)
    arguments = begin(options)
    report = Report(__file__, arguments)
    problems = 3 if arguments.quick else arguments.problems
    rows = []
    print(" " * 56 + " ".join(f"{key[:8]:>8s}" for key in LAWS) + "     time")
    for number in range(arguments.first, arguments.first + problems):
        rows.append(compare(number))
        print(describe(rows[-1]), flush=True)
        for reason in [] if rows[-1]["agrees"] else rows[-1]["degenerate"]:
            print(f"      {reason}")
        for name in rows[-1]["failed_claims"]:
            print(f"      fails: {name}")
        jax.clear_caches()  # every problem has shapes of its own
    agree = sum(row["agrees"] for row in rows)
    reported = sum(bool(row["degenerate"]) and not row["agrees"] for row in rows)
    summary = {
        "problems": len(rows),
        "agree_to_four_digits": agree,
        "degenerate_with_reason": reported,
        "disagree": len(rows) - agree - reported,
        "median_worst_deviation": float(np.median([row["worst"] for row in rows])),
        "failed_claims": sum(len(row["failed_claims"]) for row in rows),
    }
    for key, value in summary.items():
        print(f"{key}: {value:.3g}")
    report.write(summary=summary, rows=rows)


if __name__ == "__main__":
    main()

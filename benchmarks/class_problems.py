"""Does `verify` hold on 100 random problems of several classes, and if not, why?

Two to ten classes, one to five layers, up to 300 points in 2 to 16 dimensions, cross-entropy and
the pairwise exponential loss, Gaussian and orthogonal starts: clusters about random centres, or
points that random linear maps classify with a gap. Each flow goes to log R = -1e4, is judged by
`gflow.verify`, and its margin is held against a certified optimum in the norm of its depth.
Problems of one shape share their programs.

    python benchmarks/class_problems.py [--problems 100] [--first 0] [--horizon -1e4] [--quick]
                                        [--out FOLDER]
"""

import collections
import time

import numpy as np
from common import Report, begin, parser

import gflow

HORIZON = -1e4
SEEDS = 5
"""Problems of a shape."""

NORMS = {1: (2, "margin"), 2: ("nuclear", "nuclear_margin")}
"""By the depth: of `max_margin`, and the variable of a record."""


def shape(number):
    """Classes, depth, points, features and hidden widths of a problem, the same for five."""
    rng = np.random.default_rng(number // SEEDS)
    depth, classes = 1 + number // SEEDS % 5, int(rng.integers(2, 11))
    features = int(rng.integers(2, 17))
    points = round(float(np.exp(rng.uniform(np.log(3 * classes), np.log(300)))))
    hidden = tuple(int(w) for w in rng.integers(classes, 2 * classes + 1, size=depth - 1))
    return points, (features, *hidden, classes)


def clusters(points, features, classes, rng):
    """About random centres, close enough to be separable through the origin."""
    labels = np.arange(points) % classes
    centres = rng.normal(size=(classes, features))
    centres /= np.linalg.norm(centres, axis=1)[:, None]
    noise = rng.normal(size=(points, features)) / np.sqrt(features)
    for size in 0.5 ** np.arange(1, 12):
        inputs = centres[labels] + size * noise
        data = gflow.Dataset(inputs, labels, num_classes=classes, name="clusters").scaled()
        if data.separable:
            return data
    raise RuntimeError("no separable clusters")


def by_linear_map(points, features, classes, rng):
    """Uniform directions, classified by a random matrix with a gap; every class occurs."""
    matrix = rng.normal(size=(classes, features))
    inputs = rng.normal(size=(200 * points, features))
    inputs /= np.linalg.norm(inputs, axis=1)[:, None]
    outputs = np.sort(inputs @ matrix.T, axis=1)
    labels = np.argmax(inputs @ matrix.T, axis=1)
    kept = np.flatnonzero(outputs[:, -1] - outputs[:, -2] > 0.1)
    firsts = [kept[labels[kept] == c][:1] for c in range(classes)]
    chosen = np.unique(np.concatenate([*firsts, kept[: points - classes]]))
    found, numbers = np.unique(labels[chosen], return_inverse=True)
    if len(found) < classes or len(chosen) < points - classes:
        return clusters(points, features, classes, rng)
    rest = np.setdiff1d(kept, chosen)[: points - len(chosen)]
    chosen = np.concatenate([chosen, rest])
    numbers = labels[chosen]
    return gflow.Dataset(inputs[chosen], numbers, num_classes=classes, name="linear map")


def draw(number):
    """A random problem and its start."""
    points, widths = shape(number)
    rng = np.random.default_rng(1000 + number)
    make = by_linear_map if number % 2 else clusters
    data = make(points, widths[0], widths[-1], rng)
    # One loss for all problems of a shape: they share their programs.
    loss = gflow.PairwiseExponential() if number // SEEDS % 3 == 2 else gflow.CrossEntropy()
    problem = gflow.Problem(data, loss=loss)
    start = (gflow.init.orthogonal if number % 3 == 2 else gflow.init.gaussian)(widths, seed=number)
    return problem, gflow.init.admissible(start, problem)


def judge(number, horizon):
    """One problem: what `verify` says, and how far its margin is from the certified optimum."""
    problem, start = draw(number)
    began = time.process_time()
    record = gflow.gradient_flow(
        problem, start, until=gflow.LogRisk(horizon), save=60, progress=False
    )
    seconds = time.process_time() - began
    claims = gflow.verify(record)
    row = {
        "number": number,
        "widths": [int(w) for w in record.attrs["widths"]],
        "points": problem.data.num_points,
        "data": problem.data.name,
        "loss": problem.loss.name,
        "status": record.attrs["status"],
        "log_risk": float(record.log_risk[-1]),
        "num_steps": int(record.num_steps[-1]),
        "cpu_s": seconds,
        "drift": float(record.imbalance_drift.max()),
        "fails": {c.name: f"{c.value_text}; {c.why}" for c in claims if c.holds is False},
        "open": {c.name: f"{c.value_text}; {c.why}" for c in claims if c.holds is None},
        "holds": sum(c.holds is True for c in claims),
    }
    if (known := NORMS.get(len(start))) is not None:
        norm, variable = known
        best = gflow.max_margin(problem.data, norm=norm)
        row["certified_gap"] = best.relative_gap
        row["missing"] = 1 - float(record[variable][-1]) / best.margin
    return row


def main():
    found = parser(__doc__)
    found.add_argument("--problems", type=int, default=100)
    found.add_argument("--first", type=int, default=0)
    found.add_argument("--horizon", type=float, default=HORIZON, help="log R to follow it to")
    options = begin(found)
    report = Report(__file__, options)
    numbers = range(options.first, options.first + (2 if options.quick else options.problems))
    rows = []
    for number in numbers:
        row = judge(number, -100.0 if options.quick else options.horizon)
        rows.append(row)
        print(
            f"{number:3d} {row['widths']} n={row['points']} {row['data']}, {row['loss']}: "
            f"{row['holds']} hold, {row['status']} after {row['num_steps']} steps, "
            f"{row['cpu_s']:.1f} s"
            + (f", missing {row['missing']:.1e}" if "missing" in row else ""),
            flush=True,
        )
        for name, why in row["fails"].items():
            print(f"      FAILS {name}: {why}", flush=True)
    reasons = collections.Counter(name for row in rows for name in row["fails"])
    still_open = collections.Counter(name for row in rows for name in row["open"])
    clean = sum(not row["fails"] for row in rows)
    print(f"\nall applicable claims hold on {clean} of {len(rows)} problems", dict(reasons))
    print("not applicable:", dict(still_open))
    report.write(None, problems=rows, clean=clean, fails=dict(reasons), open=dict(still_open))


if __name__ == "__main__":
    main()

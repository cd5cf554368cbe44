"""Does normalised descent approach the max-margin direction at the rate and constant of theory?

One layer, exponential loss, the points (a, b) three times and (a, -b) once. Loss-scaled descent
moves w_1 by exactly rate a in each step and w_2 tends to w_2* = log(3)/(2b), so that the distance
of its direction from (1, 0) times the steps tends to w_2*/(rate a) = 1.3733. Beside it a constant
step, 1/log(steps), and the rule rate/(sqrt(k) R) of Nacson et al.

    python benchmarks/normalised_descent.py [--quick] [--out FOLDER]
"""

import math

import numpy as np
import optax
from common import Report, begin, parser

import gflow

A, B, RATE = 0.8, 0.5, 1.0
LIMIT = math.log(3) / (2 * B * RATE * A)
WITHIN = 1e-3
RULES = {
    "constant step": lambda: optax.sgd(RATE),
    "rate / (sqrt(k) R)": lambda: gflow.loss_scaled(RATE, power=0.5),
    "rate / R (normalised)": lambda: gflow.loss_scaled(RATE),
}


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    problem = gflow.Problem(gflow.datasets.two_point(A, B), loss=gflow.Exponential())
    steps = 10_000 if options.quick else 1_000_000
    runs = {}
    for name, rule in RULES.items():
        record = gflow.gradient_descent(
            problem, (np.array([[0.3, -0.4]]),), rule(), until=gflow.Steps(steps), save=40
        )
        runs[name] = {
            "steps": record.num_steps.values[1:],
            "direction_error": record.direction_error.values[1:],
            "log_risk": record.log_risk.values[1:],
        }
    last = runs["rate / R (normalised)"]
    found = last["direction_error"] * last["steps"]
    miss = found / LIMIT - 1
    verdict = "holds" if abs(miss[-1]) < WITHIN else "MISSES"
    print(
        f"direction error times steps {found[-1]:.6f}, theory {LIMIT:.6f}: {miss[-1]:.1e} {verdict}"
    )
    report.write(figure(runs), limit=LIMIT, found=float(found[-1]), relative_miss=miss, runs=runs)


def figure(runs):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for (name, run), color in zip(runs.items(), ("#D55E00", "#009E73", "#0072B2"), strict=True):
        ax.loglog(run["steps"], run["direction_error"], color=color, label=name)
    steps = runs["constant step"]["steps"]
    ax.loglog(steps, LIMIT / steps, "k:", label=f"{LIMIT:.4f} / steps, theory")
    ax.set(xlabel="steps", ylabel="|w/|w| - max-margin direction|")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    main()

"""Does every optimiser end at the max margin of its own geometry, and how fast?

One layer, exponential loss. Descent goes to the maximum margin in the 2-norm, sign descent and Adam
(epsilon to 0, decaying rate) to that in the infinity norm, greedy coordinate descent to that in the
1-norm (Gunasekar et al., arXiv 1802.08246; Zhang et al., arXiv 2406.10650; Fan et al., arXiv
2502.04664). On the one datum (1, 0.9, 0.3), whose three directions all differ, and on random data;
each margin against the certified one of `gflow.max_margin`.

    python benchmarks/geometries.py [--quick] [--out FOLDER]
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, parser, table

import gflow


def decaying(rate):
    return lambda step: rate / jnp.sqrt(1.0 + step)


def greedy_coordinate(schedule):
    """Steepest descent in the 1-norm: only the largest entry of the gradient moves, by the rate."""

    def update(gradient, state, params=None, **extra):
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradient)]))
        rate = schedule(state)
        moved = jax.tree.map(
            lambda g: jnp.where(jnp.abs(g) == largest, -rate * jnp.sign(g), 0.0), gradient
        )
        return moved, state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


OPTIMISERS = {
    "descent, rate / R": (2, lambda: gflow.loss_scaled(0.5)),
    "sign descent": (math.inf, lambda: gflow.on_log_risk(optax.sign_sgd(decaying(0.5)))),
    "Adam": (math.inf, lambda: optax.adam(decaying(0.1), b1=0.9, b2=0.99, eps=1e-150)),
    "coordinate descent": (1, lambda: gflow.on_log_risk(greedy_coordinate(decaying(0.5)))),
}
"""Name: (norm of its margin, optimiser)."""

WITHIN = 0.02
"""Of its own margin, relative, at the end; every other geometry's optimum is farther."""


def measure(data, steps):
    problem = gflow.Problem(data, loss=gflow.Exponential())
    z = data.signed_inputs
    solutions = {norm: gflow.max_margin(data, norm=norm) for norm in (1, 2, math.inf)}
    rows = []
    for name, (norm, optimizer) in OPTIMISERS.items():
        record = gflow.gradient_descent(
            problem,
            (np.linspace(0.0, 1.0, data.dim)[None],),
            optimizer(),
            until=gflow.Steps(steps),
            save=40,
        )
        w = record.end_to_end.values[1:]
        gaps = {
            p: 1 - (w @ z.T).min(axis=1) / np.linalg.norm(w, p, axis=1) / solutions[p].margin
            for p in solutions
        }
        k, own = record.num_steps.values[1:], gaps[norm]
        late = (k > k[-1] / 100) & (own > 1e-14)
        rows.append(
            {
                "data": data.name,
                "optimiser": name,
                "norm": "infinity" if norm == math.inf else str(norm),
                "status": record.attrs["status"],
                "log_risk": float(record.log_risk[-1]),
                **{f"gap_{p:g}": float(gap[-1]) for p, gap in gaps.items()},
                "exponent": float(np.polyfit(np.log(k[late]), np.log(own[late]), 1)[0])
                if late.sum() > 2
                else None,
                "holds": bool(own[-1] < WITHIN and min(gaps, key=lambda p: gaps[p][-1]) == norm),
                "steps": k,
                "own_gap": own,
            }
        )
    return rows


def figure(rows):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["data"] for row in rows))
    fig, axes = plt.subplots(1, len(names), figsize=(9, 3.8), layout="constrained", sharey=True)
    colors = dict(zip(OPTIMISERS, ("#0072B2", "#D55E00", "#CC79A7", "#009E73"), strict=True))
    for ax, name in zip(axes, names, strict=True):
        for row in rows:
            if row["data"] == name:
                shown = row["own_gap"] > 1e-14
                label = f"{row['optimiser']} ({row['norm']})"
                color = colors[row["optimiser"]]
                ax.loglog(row["steps"][shown], row["own_gap"][shown], color=color, label=label)
        k = rows[0]["steps"]
        ax.loglog(k, k**-0.5, "k:", linewidth=0.8, label="steps^(-1/2)")
        ax.loglog(k, 1.0 / k, "k--", linewidth=0.8, label="1/steps")
        ax.set(xlabel="steps", title=name)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("1 - margin / max margin, own norm")
    axes[0].legend(fontsize=7)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    steps = 3_000 if options.quick else 300_000
    points = np.random.default_rng(0).normal(size=(30, 5)) + np.array([3.0, 2.0, 1.0, 0.5, 0.0])
    random = gflow.Dataset(points / 6, np.ones(30), name="random, n = 30, d = 5")
    rows = [row for data in (gflow.datasets.one_datum(), random) for row in measure(data, steps)]
    table(
        rows,
        "data:s optimiser:s norm:s log_risk:.4g gap_1:.2e gap_2:.2e gap_inf:.2e exponent:.3f "
        "holds:d",
    )
    report.write(figure(rows), steps=steps, rows=rows)


if __name__ == "__main__":
    main()

"""Do the paper's promises for descent hold at every one of a million steps, for both constants?

Descent with `gflow.paper_steps`, with the paper's smoothness constant and with the sharper one. At
every step, on the device: the descent inequality, the two bounds of lemma 2 with the constant
enlarged by what descent adds to the imbalance, and the drift of the imbalance itself. With
e(t) = sum of eta^2 |grad R|^2 the drift of each conserved matrix is at most e(t), lemma 2 holds
with D + 2e for the norms and D + 3e for the alignment (derived in
`gflow/analysis/theorems/facts.py`), and e(t) <= 2 max(eta) R(W(0)), known before the run. Then
`gflow.verify` on the record of the same run, which knows 40 of its points.

    python benchmarks/paper_steps.py [--quick] [--out FOLDER]
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, dressed, parser, seconds, table, two_panels

import gflow
from gflow.problem.observables import imbalance, lemma_constant, singular
from gflow.problem.weights import squared_norm

WIDTHS = (2, 3, 2, 1)
STEPS = 1_000_000
SEED = 0
POINTS = 40
CLAIMS = ("risk decreases", "imbalance drifts little", "Lemma 2: rank one", "Lemma 2: alignment")
"""Of `gflow.verify`."""
ROUND_OFF = 1e-9
"""Of a decrease of the risk, which is a difference of nearly equal numbers."""


class Worst(NamedTuple):
    """The least slack of each promise so far; one that is not below zero holds."""

    descent: jax.Array
    """(R_t - R_{t+1}) / (eta/2 |grad R|^2) - 1."""
    norms: jax.Array
    """D + 2e - (|W_k|_F^2 - |W_k|_2^2), over the layers."""
    alignment: jax.Array
    """<v_{k+1}, u_k>^2 - 1 + (D + 3e + ...)/|W_{k+1}|_2^2, over the pairs."""
    drift: jax.Array
    """1 - drift/e of the conserved matrices."""


def loop(problem, weights, rule):
    """A function that goes on to a number of steps; its carry."""
    start = tuple(jnp.asarray(w) for w in weights)
    spectral = [np.linalg.norm(w, 2) ** 2 for w in weights]
    constant, conserved = lemma_constant(weights), imbalance(weights)

    def step(carry):
        now, state, log_risk, error, time, worst, k = carry
        _, gradient = problem.log_risk_and_gradient(now)
        gradient = jax.tree.map(lambda g: jnp.exp(log_risk) * g, gradient)
        updates, state = rule.update(gradient, state, now)
        after = optax.apply_updates(now, updates)
        squares, eta = squared_norm(gradient), state.step_size
        error = error + eta**2 * squares
        below = problem.log_risk(after)
        decrease = -jnp.expm1(below - log_risk) * jnp.exp(log_risk)
        layers = [singular(w) for w in after]
        norms = jnp.min(jnp.stack([constant + 2 * error - layer.tail for layer in layers]))
        pairs = [
            jnp.dot(b.right, a.left) ** 2
            - 1
            + (constant + 3 * error + spectral[j] + spectral[j + 1]) / b.value**2
            for j, (a, b) in enumerate(pairwise(layers))
        ]
        drift = [
            jnp.sqrt(jnp.sum((d - was) ** 2))
            for d, was in zip(imbalance(after), conserved, strict=True)
        ]
        found = Worst(
            decrease / (eta / 2 * squares) - 1,
            norms,
            jnp.min(jnp.stack(pairs)),
            1 - jnp.max(jnp.stack(drift)) / error,
        )
        worst = jax.tree.map(jnp.minimum, worst, found)
        return after, state, below, error, time + eta, worst, k + 1

    @jax.jit
    def advance(carry, steps):
        return jax.lax.while_loop(lambda at: at[-1] < steps, step, carry)

    infinite = Worst(*[jnp.full((), jnp.inf)] * 4)
    zero = jnp.zeros(())
    k = jnp.zeros((), int)
    return advance, (start, rule.init(start), problem.log_risk(start), zero, zero, infinite, k)


def measure(problem, weights, sharper, steps):
    rule = gflow.paper_steps(problem, sharper=sharper)
    advance, carry = loop(problem, weights, rule)
    begin_risk = float(jnp.exp(carry[2]))
    rows, took = [], 0.0
    for count in np.unique(np.geomspace(1, steps, POINTS).astype(int)):
        wall, carry = seconds(lambda now=carry, to=int(count): advance(now, to))
        took += wall
        _, state, log_risk, error, time, worst, k = carry
        rows.append(
            {
                "steps": int(k),
                "log_risk": float(log_risk),
                "time": float(time),
                "step_size": float(state.step_size),
                "radius": float(state.radius),
                "imbalance_budget": float(error),
                **{f"slack_{name}": float(value) for name, value in worst._asdict().items()},
            }
        )
    largest = max(row["step_size"] for row in rows)
    slacks = [rows[-1][f"slack_{name}"] for name in Worst._fields]
    constant, used = lemma_constant(weights), rows[-1]["imbalance_budget"]
    beforehand = 2 * largest * begin_risk
    record = gflow.gradient_descent(
        problem, weights, rule, until=gflow.Steps(steps), save=POINTS, progress=False
    )
    claims = gflow.verify(record)
    apart = [
        np.max(np.abs(record[f"final_weights_{k}"].values - layer))
        for k, layer in enumerate(carry[0], 1)
    ]
    return {
        "constant": "sharper" if sharper else "paper",
        "seconds": took,
        "budget_bound": beforehand,
        "lemma_constants": {
            "D": constant,
            "D + 2e, D + 3e, of the run": [constant + 2 * used, constant + 3 * used],
            "D + 2e, D + 3e, beforehand": [constant + 2 * beforehand, constant + 3 * beforehand],
        },
        "holds": min(slacks) >= -ROUND_OFF and used <= beforehand,
        "verify": {name: [claims[name].verdict, claims[name].value_text] for name in CLAIMS},
        "verified": all(claims[name].holds for name in CLAIMS),
        "final_weights_apart": max(apart),
        "rows": rows,
    }


def figure(found):
    fig, left, right = two_panels()
    for run, color in zip(found, ("#0072B2", "#D55E00"), strict=True):
        steps = [row["steps"] for row in run["rows"]]
        name = "the paper's constant" if run["constant"] == "paper" else "the sharper constant"
        left.loglog(steps, np.exp([r["log_risk"] for r in run["rows"]]), color=color, label=name)
        for key, style, text in (
            ("slack_descent", "-", "descent inequality"),
            ("slack_norms", "--", "lemma 2, norms"),
            ("slack_alignment", ":", "lemma 2, alignment"),
            ("slack_drift", "-.", "drift of the imbalance"),
        ):
            values = [row[key] for row in run["rows"]]
            label = text if run["constant"] == "paper" else None
            right.semilogx(steps, values, style, color=color, label=label)
    left.set(xlabel="steps", ylabel="risk", title="descent with the paper's step sizes")
    right.set(xlabel="steps", ylabel="least slack at any step so far")
    right.set_title("positive: the promise held at every step")
    right.set_ylim(bottom=0)
    return dressed(fig)


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    data = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=SEED)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.admissible(gflow.init.gaussian(WIDTHS, seed=SEED), problem)
    steps = 20_000 if options.quick else STEPS
    found = [measure(problem, weights, sharper, steps) for sharper in (False, True)]
    table(
        [{**run, **run["rows"][-1]} for run in found],
        "constant:s steps:d seconds:.1f log_risk:.4f time:.4g step_size:.3e slack_descent:.4f "
        "slack_norms:.4f slack_alignment:.4f slack_drift:.4f imbalance_budget:.3e "
        "budget_bound:.3e holds:d verified:d final_weights_apart:.1e",
    )
    report.write(figure(found), widths=WIDTHS, runs=found)


if __name__ == "__main__":
    main()

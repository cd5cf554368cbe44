"""Does recording cost descent its speed? `gradient_descent` against a bare jitted loop.

The bare loop is what one writes by hand: the mean logistic loss, `jax.grad`, an optax update, all
in one jitted `lax.scan` that returns the final weights and nothing else. Both make the same steps
from the same start in double precision, in turns, after compilation. What a step costs is the
difference between the least times of a long call and of one of a tenth of its steps, over many
short rounds: noise only adds, and some round is quiet. On a busy machine no round is, and the same
from processor times, which do not see other programs' turns, is the better figure: "cpu". What is
left, the fixed cost of a call with its checks and its record, is listed apart. "watching" asks a
rule on the risk at every iterate.
With PyTorch installed its eager loop, the same arithmetic without any tool, takes its turns as
well, with one thread and with all; the faster counts.

    python benchmarks/descent_throughput.py [--quick] [--out FOLDER]
"""

import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, parser, seconds, summary, table

import gflow

OPTIMISERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
}
NETWORKS = {10: ((2, 10, 10, 10, 1), 40_000), 256: ((20, 256, 256, 256, 1), 4_000)}
"""Width: (widths, steps of one run): a tenth of a second and half a second of them."""

ROUNDS, BUDGET = 40, 15.0
"""Rounds at most, and seconds after which no further one begins."""

SAME = 1e-12
"""By how much the final weights of all contestants may differ."""


def bare_loop(z, optimizer, steps):
    def risk(weights):
        row = weights[-1]
        for matrix in reversed(weights[:-1]):
            row = row @ matrix
        return jnp.mean(jax.nn.softplus(-(z @ row[0])))

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(risk)(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    @jax.jit
    def loop(weights):
        carry = (weights, optimizer.init(weights))
        return jax.lax.scan(step, carry, None, length=steps)[0][0]

    return lambda weights: jax.block_until_ready(loop(weights))


def torch_loop(z, rate=0.1):
    """The same in PyTorch, with a given number of threads; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    z = torch.tensor(np.asarray(z))

    def loop(weights, steps, threads):
        torch.set_num_threads(threads)
        layers = [torch.tensor(np.asarray(w), requires_grad=True) for w in weights]
        optimizer = torch.optim.SGD(layers, lr=rate)
        for _ in range(steps):
            row = layers[-1]
            for matrix in reversed(layers[:-1]):
                row = row @ matrix
            optimizer.zero_grad()
            # logaddexp: softplus of PyTorch is linear beyond 20
            margins = z @ row[0]
            torch.logaddexp(torch.zeros_like(margins), -margins).mean().backward()
            optimizer.step()
        return [layer.detach().numpy() for layer in layers]

    return loop


def compare(width, name, budget, fewer=1):
    widths, steps = NETWORKS[width]
    steps //= fewer
    data = gflow.datasets.separable(n=100, d=widths[0], margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.admissible(gflow.init.gaussian(widths, seed=0), problem)
    optimizer = OPTIMISERS[name]()
    z = jnp.asarray(data.signed_inputs)

    def ours(until):
        return lambda: gflow.gradient_descent(problem, weights, optimizer, until=until, save=2)

    def contestants(steps):
        bare = bare_loop(z, optimizer, steps)
        found = {"bare": lambda: bare(weights), "gflow": ours(gflow.Steps(steps))}
        if name == "sgd":
            # Asking a rule at every iterate, for a risk that is never reached.
            found["watching"] = ours(gflow.LogRisk(-1e9) | gflow.Steps(steps))
        return found

    counts = (steps, steps // 10)
    calls = {(key, n): call for n in counts for key, call in contestants(n).items()}
    few = 200
    if name == "sgd" and (peer := torch_loop(data.signed_inputs)) is not None:
        for threads in {1, os.cpu_count() or 1}:
            for n in (few, few // 10):
                key = (f"torch, {threads} threads", n)
                calls[key] = lambda n=n, threads=threads: peer(weights, n, threads)
    first, results, took = {}, {}, {key: [] for key in calls}
    for key, call in calls.items():
        first[key], _ = seconds(call)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for key, call in calls.items():
            spent = time.process_time()
            wall, results[key] = seconds(call)
            took[key].append((wall, time.process_time() - spent))
        if time.perf_counter() - began > budget:
            break
    times = {key: summary(each) for key, each in took.items()}
    least = {key: each.least for key, each in times.items()}

    def step(key, n, of=lambda timing: timing.least):
        return (of(times[key, n]) - of(times[key, n // 10])) / (n - n // 10)

    def cpu(key):
        return step(key, steps, lambda timing: timing.cpu)

    names = [key for key, n in calls if n == steps]
    found = {
        "width": width,
        "optimiser": name,
        "steps": steps,
        "rounds": len(took["bare", steps]),
        "first_call_s": {key: first[key, steps] for key in names},
        "fixed_s": {key: least[key, steps] - steps * step(key, steps) for key in names},
        "step_us": {key: 1e6 * step(key, steps) for key in names},
        "whole_call_s": {key: least[key, steps] for key in names},
        "throughput": step("bare", steps) / step("gflow", steps),
        "throughput_cpu": cpu("bare") / cpu("gflow"),
        "difference": largest(final(results["gflow", steps]), results["bare", steps]),
    }
    if "watching" in names:
        found["throughput_watching"] = step("bare", steps) / step("watching", steps)
        found["throughput_watching_cpu"] = cpu("bare") / cpu("watching")
    peers = {key: step(key, few) for key, n in calls if n == few and key.startswith("torch")}
    if peers:
        import torch

        fastest = min(peers, key=lambda key: peers[key])
        found |= {
            "torch": torch.__version__,
            "torch_threads": {key: 1e6 * each for key, each in peers.items()},
            "torch_step_us": 1e6 * peers[fastest],
            "torch_over_gflow": peers[fastest] / step("gflow", steps),
            "torch_difference": largest(final(ours(gflow.Steps(few))()), results[fastest, few]),
        }
    return found


def figure(rows):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    marks = {
        "bare_us": ("bare jitted loop", "o", "black"),
        "gflow_us": ("gradient_descent", "D", "#0072B2"),
        "watching_us": ("with a rule on the risk", "s", "#009E73"),
        "torch_step_us": ("PyTorch, eager", "^", "#D55E00"),
    }
    for key, (label, marker, color) in marks.items():
        shown = [(i, row[key]) for i, row in enumerate(rows) if key in row]
        places, values = zip(*shown, strict=True) if shown else ((), ())
        ax.plot(values, places, marker, color=color, label=label, markersize=6, alpha=0.8)
    ax.set_yticks(range(len(rows)), [f"width {row['width']}, {row['optimiser']}" for row in rows])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="microseconds a step (20 or 2 inputs, three hidden layers)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return fig


def final(record):
    return [record[f"final_weights_{k}"].values for k in range(1, record.sizes["layer"] + 1)]


def largest(a, b):
    return max(float(np.max(np.abs(x - np.asarray(y)))) for x, y in zip(a, b, strict=True))


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    rows = []
    cases = list(itertools.product(NETWORKS, OPTIMISERS))
    for width, name in cases[:1] if options.quick else cases:
        row = compare(width, name, *((BUDGET / 30, 10) if options.quick else (BUDGET,)))
        rows.append({**row, **{f"{key}_us": us for key, us in row["step_us"].items()}})
    table(
        rows,
        "width:d optimiser:s bare_us:.2f gflow_us:.2f throughput:.3f throughput_cpu:.3f "
        "throughput_watching:.3f throughput_watching_cpu:.3f "
        "torch_step_us:.1f torch_over_gflow:.1f difference:.1e torch_difference:.1e",
    )
    differences = [row[key] for row in rows for key in row if key.endswith("difference")]
    print(f"all final weights equal to {max(differences):.1e}; wanted {SAME:g}")
    report.write(figure(rows), rows=rows)


if __name__ == "__main__":
    main()

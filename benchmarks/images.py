"""Does stochastic descent on networks from a framework run as fast as a bare jitted optax loop?

One step of plain stochastic descent in single precision, on the convolutional network of `gflow
reproduce --images` with digits, and on a perceptron of the same dense layers with the same pictures
as rows. Contestants take turns after compilation: `gradient_descent`; the loop that one writes by
hand, one call of a jitted step for every mini-batch; and a jitted `lax.scan` over an epoch. What a
step costs is the difference between the least processor times of a long and a short call.
`throughput` is the faster of the two bare loops over gflow. A scan over convolutions is slow on
CPUs, since XLA turns them to its fast layout outside of loops only. Memory is the resident size
after a run and after one of five times its steps.

    python benchmarks/images.py [--quick] [--out FOLDER]
"""

import os
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, parser, seconds, summary, table

import gflow
from gflow.report.convolutional import Convolutional

BATCH, RATE = 64, 0.05
ROUNDS, BUDGET = 12, 150.0
"""Rounds at most, and seconds after which no further one begins."""


class Perceptron(eqx.Module):
    """The dense layers alone, on the pixels."""

    layers: eqx.nn.MLP

    def __call__(self, x):
        return self.layers(x.reshape(-1))


def networks(data, quick):
    key, width = jax.random.key(0), 64 if quick else 512
    return {
        "convolutional": Convolutional(data.point_shape, 10, hidden=(width, width), key=key),
        "perceptron": Perceptron(eqx.nn.MLP(data.dim, 10, width, 2, key=key)),
    }


def bare(model, data, optimizer):
    """The two loops by hand: functions of a number of epochs."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    arrays = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arrays)
    inputs, labels = np.asarray(data.points, np.float32), np.asarray(data.classes, np.int32)
    on_device, count = (jnp.asarray(inputs), jnp.asarray(labels)), len(labels) // BATCH

    def risk(weights, x, y):
        outputs = jax.vmap(eqx.combine(weights, rest))(x)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    def step(carry, batch):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(risk)(weights, *batch), state, weights)
        return optax.apply_updates(weights, updates), state

    jitted = jax.jit(step)

    @jax.jit
    def epoch(carry, key):
        order = jax.random.permutation(key, len(labels))[: count * BATCH].reshape(count, BATCH)
        batches = tuple(array[order] for array in on_device)
        return jax.lax.scan(lambda c, batch: (step(c, batch), None), carry, batches)[0]

    def by_hand(epochs):
        carry, generator = (arrays, optimizer.init(arrays)), np.random.default_rng(0)
        for _ in range(epochs):
            order = generator.permutation(len(labels))
            for k in range(count):
                some = order[k * BATCH : (k + 1) * BATCH]
                carry = jitted(carry, (inputs[some], labels[some]))
        return carry

    def by_scan(epochs):
        carry = arrays, optimizer.init(arrays)
        for k in range(epochs):
            carry = epoch(carry, jax.random.key(k))
        return carry

    return {"bare step": by_hand, "bare scan": by_scan}, count


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def compare(name, model, data, epochs, budget):
    optimizer = optax.sgd(RATE)
    network, weights = gflow.from_equinox(model)
    problem = gflow.Problem(data, network)
    options = {"batch_size": BATCH, "precision": "float32", "save": 2}
    loops, count = bare(model, data, optimizer)

    def ours(epochs):
        until = gflow.Epochs(epochs)
        return gflow.gradient_descent(problem, weights, optimizer, until=until, **options)

    contestants = {"gflow": ours, **loops}
    long, short = epochs, max(1, epochs // 5)
    calls = {
        (key, n): (lambda call=call, n=n: call(n))
        for key, call in contestants.items()
        for n in (long, short)
    }
    first = {key: seconds(call)[0] for key, call in calls.items()}
    took = {key: [] for key in calls}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for key, call in calls.items():
            spent = time.process_time()
            wall, _ = seconds(call)
            took[key].append((wall, time.process_time() - spent))
        if time.perf_counter() - began > budget:
            break
    times = {key: summary(each) for key, each in took.items()}
    steps = count * (long - short)
    step = {key: (times[key, long].cpu - times[key, short].cpu) / steps for key in contestants}
    fastest = min(step["bare step"], step["bare scan"])
    before = resident_mib()
    record = ours(5 * long)
    return {
        "network": name,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "steps": count * long,
        "rounds": len(took["gflow", long]),
        "step_ms": {key: 1e3 * each for key, each in step.items()},
        "first_call_s": first["gflow", long],
        "throughput": fastest / step["gflow"],
        "log_risk": float(record["log_risk"][-1]),
        "resident_mib": before,
        "resident_mib_after_five_times_the_steps": resident_mib(),
    }


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    data = gflow.datasets.digit_images()
    if options.quick:
        data = gflow.Dataset(data.points[:192], data.classes[:192])
    epochs, budget = (2, 1.0) if options.quick else (20, BUDGET)
    rows = [
        compare(name, model, data, epochs, budget)
        for name, model in networks(data, options.quick).items()
    ]
    shown = [row | {f"{key} ms": each for key, each in row["step_ms"].items()} for row in rows]
    shown = [{key.replace(" ", "_"): value for key, value in row.items()} for row in shown]
    table(shown, "network:s gflow_ms:.3f bare_step_ms:.3f bare_scan_ms:.3f throughput:.2f")
    report.write(rows=rows)


if __name__ == "__main__":
    main()

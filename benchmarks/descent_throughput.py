"""Does recording cost descent its speed? `gradient_descent` against a bare jitted loop.

The bare loop is what one writes by hand: the mean logistic loss, `jax.grad`, an optax update, all
in one jitted `lax.scan` that returns the final weights and nothing else. Both make the same steps
from the same start in double precision, alternately, after compilation. What a step costs is the
difference between a long call and one of a tenth of its steps; what is left, the fixed cost of a
call with its checks and its record, is listed apart. With PyTorch installed its eager loop, the
same arithmetic without any tool, is timed as well.

    python benchmarks/descent_throughput.py [--quick] [--out FOLDER]
"""

import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, parser, seconds

import gflow

OPTIMISERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
}
NETWORKS = {10: ((2, 10, 10, 10, 1), 300_000), 256: ((20, 256, 256, 256, 1), 5_000)}
"""Width: (widths, steps of one run)."""

REPEATS = 7


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


def torch_loop(z, steps, rate=0.1):
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    z = torch.tensor(z)

    def loop(weights):
        layers = [torch.tensor(np.asarray(w), requires_grad=True) for w in weights]
        optimizer = torch.optim.SGD(layers, lr=rate)
        for _ in range(steps):
            row = layers[-1]
            for matrix in reversed(layers[:-1]):
                row = row @ matrix
            optimizer.zero_grad()
            torch.nn.functional.softplus(-(z @ row[0])).mean().backward()
            optimizer.step()
        return [layer.detach().numpy() for layer in layers]

    return loop


def compare(width, name, steps):
    widths = NETWORKS[width][0]
    data = gflow.datasets.separable(n=100, d=widths[0], margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.admissible(gflow.init.gaussian(widths, seed=0), problem)
    optimizer = OPTIMISERS[name]()
    z = jnp.asarray(data.signed_inputs)

    def ours(until):
        return lambda: gflow.gradient_descent(problem, weights, optimizer, until=until, save=2)

    def contestants(steps):
        bare = bare_loop(z, optimizer, steps)
        return {
            "bare": lambda: bare(weights),
            "gflow": ours(gflow.Steps(steps)),
            # Asking a rule at every iterate, for a risk that is never reached.
            "gflow, watching the risk": ours(gflow.LogRisk(-1e9) | gflow.Steps(steps)),
        }

    long, short = contestants(steps), contestants(steps // 10)
    first = {key: seconds(call)[0] for key, call in long.items()}
    for call in short.values():
        call()
    times, fixed, results = ({key: [] for key in long} for _ in range(3))
    for _ in range(REPEATS):
        for key in long:
            took, results[key] = seconds(long[key])
            step = (took - seconds(short[key])[0]) / (steps - steps // 10)
            times[key].append(1e6 * step)
            fixed[key].append(took - steps * step)
    found = {
        "width": width,
        "optimiser": name,
        "steps": steps,
        "first_call_s": first,
        "fixed_s": {key: statistics.median(t) for key, t in fixed.items()},
        "step_us": {key: statistics.median(t) for key, t in times.items()},
        "step_us_least": {key: min(t) for key, t in times.items()},
    }
    for key in list(long)[1:]:
        ratios = sorted(b / t for b, t in zip(times["bare"], times[key], strict=True))
        found[f"throughput, {key}"] = {
            "median": statistics.median(ratios),
            "least": ratios[0],
            "greatest": ratios[-1],
        }
    final = results["gflow"]
    found["largest_difference_of_weights"] = max(
        float(np.max(np.abs(final[f"final_weights_{k}"].values - np.asarray(w))))
        for k, w in enumerate(results["bare"], start=1)
    )
    if name == "sgd":
        found["torch"] = against_torch(data, weights, steps, results["bare"])
    return found


def against_torch(data, weights, steps, expected):
    try:
        import torch
    except ImportError:
        return None
    few = max(100, steps // 200)
    loop = torch_loop(data.signed_inputs, few)
    loop(weights)
    took = statistics.median(seconds(lambda: loop(weights))[0] for _ in range(3))
    return {"version": torch.__version__, "steps": few, "step_us": 1e6 * took / few}


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    rows = []
    for width, (_, steps) in NETWORKS.items():
        for name in OPTIMISERS:
            row = compare(width, name, steps // 5 if options.quick else steps)
            rows.append(row)
            us, ratio = row["step_us"], row["throughput, gflow"]
            watching = row["throughput, gflow, watching the risk"]
            print(
                f"width {width:3d} {name:9s} bare {us['bare']:7.2f} us, gflow "
                f"{us['gflow']:7.2f} us: throughput {ratio['median']:.3f} "
                f"[{ratio['least']:.3f}, {ratio['greatest']:.3f}]; watching the risk "
                f"{watching['median']:.3f}; weights differ by "
                f"{row['largest_difference_of_weights']:.1e}",
                flush=True,
            )
    report.write(rows=rows)


if __name__ == "__main__":
    main()

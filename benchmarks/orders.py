"""How closely does descent follow the flow and the modified flows? Their orders in its step.

A network of three layers, logistic loss: the distance of descent at a given time from gradient
flow, from the flow of the modified equation of first and of second order, and of its Richardson
extrapolation from gradient flow. Expected: orders 1, 2, 3 and 2. Beside it, from a start close to
the saddle at zero, the gap along time at one learning rate and its two bounds from the curvature
along the flow (`gflow.gap_bound`). At last, what the ladder's descents cost one after the other,
as it runs them, and vmapped, when all take the steps of the smallest rate.

    python benchmarks/orders.py [--quick] [--out FOLDER]
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Report, begin, parser, seconds, table, timed

import gflow
from gflow.analysis.ladder import descend

WIDTHS = (2, 4, 3, 1)
TIME = 4.0
STEPS = (10, 20, 40, 80, 160, 320, 640)
CLOSE = 0.03
"""By how much a measured order may miss its limit."""

EXPECTED = (1, 2, 3)

RATE, LONG = 0.1, 1000.0
"""Learning rate and last time of the gap along time."""


def measure(steps):
    data = gflow.datasets.separable(n=20, d=WIDTHS[0], margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    start = gflow.init.admissible(gflow.init.gaussian(WIDTHS, seed=0), problem)
    return gflow.ladder(problem, start, [TIME / count for count in steps], TIME)


def along(points=40):
    """Gap and bounds along time; times are whole numbers of steps."""
    data = gflow.datasets.separable(n=20, d=WIDTHS[0], margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    small = gflow.init.balanced(WIDTHS, end_to_end=0.05 * data.max_margin().direction)
    steps = np.unique(np.geomspace(1, LONG / RATE, points).astype(int))
    descent = gflow.gradient_descent(
        problem,
        small,
        optax.sgd(RATE),
        until=gflow.Steps(int(steps[-1])),
        save=steps,
        keep_weights=True,
    )
    times = descent.log_time.values[1:]
    flow = gflow.gradient_flow(
        problem,
        small,
        until=gflow.LogTime(float(times[-1])),
        save=times,
        keep_weights=True,
        rtol=1e-11,
    )
    gaps = gflow.compare(flow, descent).isel(point=slice(1, None))
    bound = gflow.gap_bound(problem, small, times)
    gap = np.sqrt((gaps.weights_gap**2).sum("layer")).values
    return {
        "learning_rate": RATE,
        "time": np.exp(times),
        "gap": gap,
        "error_bar": np.sqrt((gaps.weights_gap_error**2).sum("layer")).values,
        "bound": RATE * bound.bound.values,
        "uniform_bound": RATE * bound.uniform_bound.values,
        "growth": bound.growth.values,
        "holds": bool(np.all(gap <= RATE * bound.bound.values)),
    }


@eqx.filter_jit
def descend_together(problem, weights, rates, counts):
    """The vmapped form: every rate goes on to the largest count, and is held at its own."""

    def step(k, now):
        new = jax.vmap(lambda lane, rate: descend(problem, lane, rate, 1))(now, rates)
        running = k < counts
        return jax.tree.map(
            lambda a, b: jnp.where(running.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, now
        )

    lanes = jax.tree.map(lambda layer: jnp.stack([layer] * len(rates)), weights)
    return jax.lax.fori_loop(0, jnp.max(counts), step, lanes)


def vmapped_or_not(widths, repeats):
    """Milliseconds of all descents of a ladder in either form, and of the whole ladder."""
    data = gflow.datasets.separable(n=20, d=widths[0], margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.admissible(gflow.init.gaussian(widths, seed=0), problem)
    weights = tuple(map(jnp.asarray, weights))
    counts = np.unique(np.outer([1, 2], STEPS))
    calls = {
        "apart": lambda: [descend(problem, weights, TIME / n, n) for n in counts],
        "vmapped": lambda: descend_together(
            problem, weights, jnp.asarray(TIME / counts), jnp.asarray(counts)
        ),
    }
    took, _ = timed(calls, repeats=repeats)
    rates = [TIME / n for n in STEPS]
    gflow.ladder(problem, weights, rates, TIME)
    whole, _ = seconds(lambda: gflow.ladder(problem, weights, rates, TIME))
    return {
        "widths": "-".join(map(str, widths)),
        "apart_ms": 1e3 * took["apart"].least,
        "vmapped_ms": 1e3 * took["vmapped"].least,
        "whole_ladder_ms": 1e3 * whole,
    }


def figure(found, gaps):
    """Gap against learning rate, with the slope that each tends to; gap against time."""
    import matplotlib.pyplot as plt

    fig, (ax, beside) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
    beside.loglog(gaps["time"], gaps["uniform_bound"], ":", color="#E69F00", label="uniform bound")
    beside.loglog(gaps["time"], gaps["bound"], "--", color="#D55E00", label="bound along the flow")
    beside.loglog(gaps["time"], gaps["gap"], "o-", color="#0072B2", markersize=3, label="gap")
    beside.loglog(gaps["time"], gaps["error_bar"], color="grey", label="the flow's error bar")
    beside.set(xlabel="time", ylabel="distance of descent's weights from the flow's")
    beside.set_title(f"learning rate {gaps['learning_rate']:g}, start near the saddle", fontsize=9)
    beside.legend(fontsize=8)
    beside.grid(alpha=0.3)
    rates = found.learning_rate.values
    curves = [
        (str(model), found.gap.sel(model=model).values, found.order.sel(model=model), slope)
        for model, slope in zip(found.model.values, EXPECTED, strict=True)
    ]
    curves.insert(1, ("Richardson", found.richardson_gap.values, found.richardson_order, 2))
    for (name, gaps, order, slope), marker in zip(curves, "os^D", strict=True):
        label = f"{name}: {float(order):.3f}"
        fill = "white" if name == "Richardson" else None
        (line,) = ax.loglog(rates, gaps, marker, label=label, markersize=5, markerfacecolor=fill)
        guide = gaps[0] * (rates / rates[0]) ** slope
        ax.loglog(rates, guide, color=line.get_color(), linewidth=0.8)
    ax.set_xlabel("learning rate of descent")
    ax.set_ylabel(f"distance of the weights at time {found.attrs['time']:g}")
    ax.set_title("lines: slopes 1, 2, 2 and 3", fontsize=9)
    ax.legend(title="compared with: measured order", fontsize=8, title_fontsize=8)
    ax.grid(alpha=0.3)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    found = measure(STEPS[2:6] if options.quick else STEPS)
    orders = dict(zip(found.model.values.tolist(), found.order.values.tolist(), strict=True))
    for (model, order), expected in zip(orders.items(), EXPECTED, strict=True):
        verdict = "holds" if abs(order - expected) < CLOSE else "MISSES"
        print(f"{model:28s} order {order:.4f}, expected {expected} within {CLOSE}: {verdict}")
    print(f"{'Richardson':28s} order {float(found.richardson_order):.4f}, expected 2")
    gaps = along(15 if options.quick else 40)
    print(
        f"gap at time {LONG:g}: {gaps['gap'][-1]:.3e}, bounds {gaps['bound'][-1]:.3e} and "
        f"{gaps['uniform_bound'][-1]:.3e}, growth exp({gaps['growth'][-1]:.3f}); below its bound "
        f"at every time: {gaps['holds']}"
    )
    sizes = [WIDTHS] if options.quick else [WIDTHS, (2, 10, 10, 1), (2, 32, 32, 1)]
    costs = [vmapped_or_not(widths, 5 if options.quick else 30) for widths in sizes]
    table(costs, "widths:s apart_ms:.2f vmapped_ms:.2f whole_ladder_ms:.0f")
    report.write(
        figure(found, gaps),
        along_time=gaps,
        descents_apart_or_vmapped=costs,
        widths=WIDTHS,
        orders=orders,
        within=max(abs(a - b) for a, b in zip(orders.values(), EXPECTED, strict=True)) < CLOSE,
        richardson_order=float(found.richardson_order),
        learning_rates=found.learning_rate.values,
        gaps={str(model): found.gap.sel(model=model).values for model in found.model.values},
        richardson_gaps=found.richardson_gap.values,
        local_orders=found.local_order.values,
        ladder=found.attrs,
    )


if __name__ == "__main__":
    main()

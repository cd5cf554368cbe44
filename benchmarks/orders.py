"""How closely does descent follow the flow and the modified flows? Their orders in its step.

A network of three layers, logistic loss: the distance of descent at a given time from gradient
flow, from the flow of the modified equation of first and of second order, and of its Richardson
extrapolation from gradient flow. Expected: orders 1, 2, 3 and 2.

    python benchmarks/orders.py [--quick] [--out FOLDER]
"""

from common import Report, begin, parser

import gflow

WIDTHS = (2, 4, 3, 1)
TIME = 4.0
STEPS = (10, 20, 40, 80, 160, 320, 640)
CLOSE = 0.03
"""By how much a measured order may miss its limit."""

EXPECTED = (1, 2, 3)


def measure(steps):
    data = gflow.datasets.separable(n=20, d=WIDTHS[0], margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    start = gflow.init.admissible(gflow.init.gaussian(WIDTHS, seed=0), problem)
    return gflow.ladder(problem, start, [TIME / count for count in steps], TIME)


def figure(found):
    """Gap against learning rate, with the slope that each tends to."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.8, 3.8), layout="constrained")
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
    report.write(
        figure(found),
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

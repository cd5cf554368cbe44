"""What does descent do with steps too large for the flow? Is the edge of stability transient?

Left: two layers on separable data, logistic loss, a learning rate above two over the flow's
greatest sharpness. Descent oscillates with eta S about 2, and since S t tends to a constant on
separable data it calms down again. Right: one layer, the points (gamma, 0.9) and (gamma, -0.1),
ever larger learning rates: the number of steps until R <= min(1/eta, l(0)/n), after which the risk
falls steadily, against the bound max(eta, n, (n/eta) log(n/eta))/gamma^2 of Wu et al. (arXiv
2402.15926) with the constant one. The phase does not grow like eta: in units of eta descent tends
to the batch perceptron, v <- v + (1/n) sum of the misclassified z_i, which separates any data after
a number of steps of its own, and when it has, every margin is a multiple of eta. That number is
marked, and compared on random data as well.

    python benchmarks/large_steps.py [--quick] [--out FOLDER]
"""

import math

import numpy as np
import optax
from common import Report, begin, dressed, parser, table, two_panels

import gflow

SHARP = {"log_sharpness": gflow.observables.log_sharpness}
FACTOR = 1.5
"""The learning rate of the left panel times the flow's greatest sharpness is twice this."""


MARGINS = (0.1, 0.03, 0.01)
HUGE = 4.0**20
"""A learning rate at which descent is the perceptron."""


def edge(steps):
    data = gflow.datasets.separable(n=20, d=2, margin=0.02, seed=0)
    problem = gflow.Problem(data, loss=gflow.Logistic())
    weights = gflow.init.balanced((2, 4, 1), end_to_end=0.05 * data.max_margin().direction)
    flow = gflow.gradient_flow(
        problem, weights, until=gflow.LogTime(math.log(1e4)), save=150, observables=SHARP
    )
    rate = 2 * FACTOR / math.exp(float(flow.log_sharpness.max()))
    descent = gflow.gradient_descent(
        problem,
        weights,
        optax.sgd(rate),
        until=gflow.Steps(steps),
        save=np.arange(1, steps + 1),
        observables=SHARP,
    )
    unstable = rate * np.exp(descent.log_sharpness.values) > 2
    rising = np.diff(descent.log_risk.values) > 0
    return {
        "learning_rate": rate,
        "status": descent.attrs["status"],
        "steps_above_two": int(unstable.sum()),
        "last_above_two": int(np.nonzero(unstable)[0][-1]) if unstable.any() else 0,
        "steps_up": int(rising.sum()),
        "last_up": int(np.nonzero(rising)[0][-1]) if rising.any() else 0,
        "flow": {
            "time": np.exp(flow.log_time.values),
            "stability": rate * np.exp(flow.log_sharpness.values),
        },
        "descent": {
            "time": np.exp(descent.log_time.values),
            "stability": rate * np.exp(descent.log_sharpness.values),
            "log_risk": descent.log_risk.values,
        },
    }


def phase(margin, rates):
    data = gflow.Dataset([[margin, 0.9], [margin, -0.1]], [1, 1])
    problem = gflow.Problem(data, loss=gflow.Logistic())
    n, gamma, rows = 2, data.max_margin().margin, []
    for rate in rates:
        record = exit_of_phase(problem, rate)
        rows.append(
            {
                "margin": gamma,
                "learning_rate": rate,
                "phase": int(record.num_steps[-1]),
                "bound": max(rate, n, n / rate * math.log(n / rate)) / gamma**2,
                "perceptron": perceptron(data.signed_inputs),
                "status": record.attrs["status"],
            }
        )
    return rows


def exit_of_phase(problem, rate):
    """Descent of one layer from zero to the risk at which the phase ends."""
    n, d = problem.data.inputs.shape
    level = math.log(min(1 / rate, math.log(2) / n))
    return gflow.gradient_descent(
        problem, (np.zeros((1, d)),), optax.sgd(rate), until=gflow.LogRisk(level), save=2
    )


def perceptron(z):
    """Steps of the batch perceptron from zero until it separates; margins of zero count half."""
    v, steps = np.zeros(z.shape[1]), 0
    while np.any(wrong := np.heaviside(-(z @ v), 0.5)):
        v, steps = v + wrong @ z / len(z), steps + 1
    return steps


def on_random_data(count):
    """The phase at a huge rate and the perceptron's steps, on random data of random margins."""
    rng, found = np.random.default_rng(0), []
    for seed in range(count):
        margin = 10 ** rng.uniform(-2, -0.7)
        data = gflow.datasets.separable(n=20, d=3, margin=margin, seed=seed)
        record = exit_of_phase(gflow.Problem(data, loss=gflow.Logistic()), HUGE)
        found.append([int(record.num_steps[-1]), perceptron(data.signed_inputs)])
    return found


def figure(found, rows):
    fig, left, right = two_panels()
    for name, color, width in (("flow", "black", 1.5), ("descent", "#D55E00", 0.8)):
        run = found[name]
        left.loglog(run["time"][1:], run["stability"][1:], color=color, linewidth=width, label=name)
    left.axhline(2, color="grey", linestyle=":")
    left.set(xlabel="time = sum of the steps", ylabel="learning rate times sharpness")
    left.set_title(f"two layers, learning rate {found['learning_rate']:.3g}", fontsize=9)
    for margin, color in zip(MARGINS, ("#0072B2", "#009E73", "#CC79A7"), strict=True):
        chosen = [row for row in rows if math.isclose(row["margin"], margin)]
        rates, steps, bound = (
            [row[key] for row in chosen] for key in ("learning_rate", "phase", "bound")
        )
        right.loglog(rates, steps, "o-", color=color, markersize=4, label=f"margin {margin:g}")
        right.loglog(rates, bound, ":", color=color)
        right.plot(rates[-1] * 2, chosen[0]["perceptron"], "*", color=color, markersize=9)
    right.set(xlabel="learning rate", ylabel="steps until R <= min(1/rate, l(0)/n)")
    right.set_title("one layer; dotted: bound, star: perceptron", fontsize=9)
    return dressed(fig)


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    found = edge(300 if options.quick else 1_000)
    rates = 4.0 ** np.arange(0, 5 if options.quick else 11)
    rows = [row for margin in MARGINS for row in phase(margin, rates)]
    print({key: value for key, value in found.items() if key not in ("flow", "descent")})
    table(rows, "margin:.3g learning_rate:g phase:d bound:.4g perceptron:d status:s")
    within = all(row["phase"] <= row["bound"] for row in rows)
    print(f"every phase within the bound: {within}")
    limits = on_random_data(5 if options.quick else 50)
    equal = sum(phase == steps for phase, steps in limits)
    print(f"at rate {HUGE:g} on random data: {equal} of {len(limits)} as long as the perceptron")
    report.write(
        figure(found, rows),
        edge=found,
        phase=rows,
        within_bound=within,
        huge_rate=HUGE,
        phase_and_perceptron_on_random_data=limits,
    )


if __name__ == "__main__":
    main()

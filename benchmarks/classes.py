"""How far and how exactly does the flow of several classes get?

Five questions. The closed form `simplex_modes` for K = 2 to 10 and 1 to 4 layers, at the default
tolerance: the error of log t at log R = -10, -1e3, -1e6 and the time of a warm call, the least of
several. Two outputs against one. Margins in the norm that belongs to the depth, from log R = -1e8
to where float64 weights end, against certified optima. Small starts of three layers on iris, whose
plateaus the default crosses beside explicit steps in the same clock. Ten digits, widths
64-32-32-10, to log R = -1e4, a call after a first one, beside diffrax's Tsit5, lent gflow's clock
and in logarithmic time, its Kvaerno5, and descent in single precision, each for as many steps as
its row says.

MLPGradientFlow.jl, the one program made for this, is not run: it is Julia's. It integrates in
physical time with the loss formed in double precision, so that its margins cannot pass the risk at
which one minus a probability is round-off, log R = -36, nor its time t = 1/R the horizon of a
solver whose steps are bounded by the curvature; it has no margin, alignment or logarithmic time.

    python benchmarks/classes.py [--quick] [--out FOLDER]
"""

import time

import diffrax
import jax
import numpy as np
import optax
from common import Report, begin, parser, seconds
from peers import PALETTE, kvaerno5

import gflow

GOALS = (-10.0, -1e3, -1e6)
FAR = (-1e8, -1e10, -1e12, -1e14)
WIDTHS = (64, 32, 32, 10)

IMPLICIT_STEPS = 3
"""Of a solver that forms the Jacobian of all 3,392 weights: seconds a step."""


def cpu(function):
    """What a function returns, and the processor seconds that it took."""
    found, (_, spent) = clocked(function)
    return found, spent


def clocked(function):
    """What a function returns, and the seconds that it took by the clock and of the processor."""
    began = time.process_time()
    wall, found = seconds(function)
    return found, (wall, time.process_time() - began)


def closed_form(num, depth, repeats):
    problem = gflow.Problem(gflow.Dataset(np.eye(num), np.arange(num), num_classes=num))
    start = (0.3 ** (1 / depth) * (np.eye(num) - 1 / num),) * depth

    def follow():
        return gflow.gradient_flow(
            problem, start, until=gflow.LogRisk(GOALS[-1]), save=GOALS, progress=False
        )

    follow()
    flow, spent = cpu(follow)
    flow_only = min(
        cpu(
            lambda: gflow.gradient_flow(
                problem, start, until=gflow.LogRisk(GOALS[-1]), save=2, progress=False
            )
        )[1]
        for _ in range(repeats)
    )
    exact = gflow.exact.simplex_modes(num, 0.3, depth, log_risk=flow.log_risk.values[1:])
    error = np.abs(flow.log_time.values[1:] / exact.log_time - 1)
    return {
        "classes": num,
        "depth": depth,
        "error": error.tolist(),
        "cpu_s": min(spent, flow_only),
        "num_steps": int(flow.num_steps[-1]),
    }


def two_outputs():
    data = gflow.datasets.separable(n=30, d=5, margin=0.1, seed=0)
    pair = gflow.Problem(gflow.Dataset(data.inputs, (1 - data.labels) / 2, num_classes=2))
    one = gflow.Problem(gflow.Dataset(np.sqrt(2) * data.inputs, data.labels))
    two = gflow.init.admissible(gflow.init.gaussian((5, 8, 2), seed=0), pair)
    single = (two[0], (two[1][:1] - two[1][1:]) / np.sqrt(2))
    until = gflow.LogRisk(-1e5)
    a = gflow.gradient_flow(pair, two, until=until, save=20, progress=False)
    b = gflow.gradient_flow(one, single, until=until, save=20, progress=False)
    w = (a.end_to_end.values[:, 0] - a.end_to_end.values[:, 1]) / np.sqrt(2)
    apart = np.linalg.norm(w - b.end_to_end.values, axis=1) / np.linalg.norm(w, axis=1)
    return {"end_to_end": float(apart.max())}


def norms():
    rng = np.random.default_rng(0)
    centres, classes = rng.normal(size=(3, 4)), np.arange(18) % 3
    inputs = 2 * centres[classes] + 0.5 * rng.normal(size=(18, 4))
    data = gflow.Dataset(inputs, classes, num_classes=3).scaled()
    problem = gflow.Problem(data)
    rows = []
    for norm, variable, widths in ((2, "margin", (4, 3)), ("nuclear", "nuclear_margin", (4, 6, 3))):
        best = gflow.max_margin(data, norm=norm)
        start = gflow.init.admissible(gflow.init.gaussian(widths, seed=1), problem)
        flow = gflow.gradient_flow(
            problem, start, until=gflow.LogRisk(-1e16), save=FAR, progress=False
        )
        missing = 1 - flow[variable].values[1:] / best.margin
        rows.append(
            {
                "depth": len(widths) - 1,
                "norm": str(norm),
                "certified_gap": best.relative_gap,
                "missing": float(missing[0]),
                "far": [
                    {"log_risk": float(a), "missing": float(b), "kkt_residual": float(c)}
                    for a, b, c in zip(
                        flow.log_risk[1:], missing, flow.kkt_residual[1:], strict=True
                    )
                ],
                "status": flow.attrs["status"],
            }
        )
    return rows


def small_starts(scales):
    """Steps from small starts of three layers to log R = -1.5, over two plateaus."""
    problem, clock = gflow.Problem(gflow.datasets.iris_all()), gflow.clocks.LogRisk()
    ways = {
        "default": {},
        "logarithmic time": {"clock": gflow.clocks.LogTime()},
        "Dopri8": {"solver": diffrax.Dopri8(), "clock": clock},
    }
    rows = []
    for scale in scales:
        start = gflow.init.gaussian((4, 5, 5, 3), scale=scale, seed=0)
        for name, options in ways.items():
            flow = gflow.gradient_flow(
                problem, start, until=gflow.LogRisk(-1.5), save=6, progress=False, **options
            )
            told = {key: flow.attrs[key] for key in ("status", "num_rejected")}
            found = {"num_steps": int(flow.num_steps[-1]), "log_time": float(flow.log_time[-1])}
            rows.append({"scale": scale, "way": name, **told, **found})
    return rows


def digits(goal, patience):
    """Ten digits: gflow, and how far others get in the same processor time or `patience`."""
    data = gflow.datasets.digits_all()
    solution, spent = cpu(lambda: gflow.max_margin(data))
    problem = gflow.Problem(data)
    start = gflow.init.admissible(gflow.init.gaussian(WIDTHS, seed=0), problem)

    def follow(**options):
        until = options.pop("until", gflow.LogRisk(goal))
        return gflow.gradient_flow(problem, start, until=until, save=2, progress=False, **options)

    follow()
    flow, own = clocked(follow)
    rows = [_row("gflow", flow, own)]
    implicit = kvaerno5(1e-9, fixed=False)
    for name, solver, clock, steps in (
        ("Tsit5, log-risk clock", diffrax.Tsit5(), gflow.clocks.LogRisk(), patience),
        ("Tsit5, log-time clock", diffrax.Tsit5(), gflow.clocks.LogTime(), patience),
        (
            "Kvaerno5, log-time clock",
            implicit,
            gflow.clocks.LogTime(),
            IMPLICIT_STEPS,
        ),
    ):
        record, taken = clocked(
            lambda solver=solver, clock=clock, steps=steps: follow(
                max_steps=steps, solver=solver, clock=clock
            )
        )
        rows.append(_row(name, record, taken))
    rows.append(_single_precision(problem, start, 10 * patience))
    return {"max_margin_cpu_s": spent, "max_margin_gap": solution.relative_gap, "rows": rows}


def _row(name, record, took):
    drift = record["imbalance_drift"].values
    return {
        "method": name,
        "log_risk": float(record.log_risk[-1]),
        "num_steps": int(record.num_steps[-1]),
        "wall_s": took[0],
        "cpu_s": took[1],
        "drift": float(drift.max()),
        "status": record.attrs["status"],
    }


def _single_precision(problem, start, steps):
    """Descent of float32, as a training script has it: where its loss ends."""
    import jax.numpy as jnp

    inputs = jnp.asarray(problem.data.inputs, jnp.float32)
    labels = jnp.asarray(problem.data.classes)
    weights = tuple(jnp.asarray(w, jnp.float32) for w in start)
    optimizer = optax.sgd(1.0)

    def loss(weights):
        outputs = inputs
        for matrix in weights:
            outputs = outputs @ matrix.T
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    @jax.jit
    def descend(weights, state):
        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), length=1000)[0]

    def train(weights):
        state = optimizer.init(weights)
        for _ in range(max(1, steps // 1000)):
            weights, state = descend(weights, state)
        return float(np.log(loss(weights)))

    found, (wall, spent) = clocked(lambda: train(weights))
    return {
        "method": "descent, float32",
        "log_risk": found,
        "num_steps": max(1, steps // 1000) * 1000,
        "wall_s": wall,
        "cpu_s": spent,
    }


def figure(cases):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(3.4, 2.5), layout="constrained")
    for depth in sorted({row["depth"] for row in cases}):
        rows = [row for row in cases if row["depth"] == depth]
        ax.semilogy(
            [row["classes"] for row in rows],
            [max(row["error"]) for row in rows],
            "o-",
            ms=3,
            color=PALETTE[depth - 1],
            label=f"{depth} layers" if depth > 1 else "1 layer",
        )
    ax.set_xlabel("classes", fontsize=8)
    ax.set_ylabel(r"largest relative error of $\log\,t$", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    grid = [(3, 2)] if options.quick else [(k, d) for d in (1, 2, 3, 4) for k in (2, 3, 5, 10)]
    cases = [closed_form(num, depth, 2 if options.quick else 10) for num, depth in grid]
    for row in cases:
        errors = " ".join(f"{e:.0e}" for e in row["error"])
        print(
            f"K = {row['classes']}, L = {row['depth']}: {errors}, {row['cpu_s']:.3f} s", flush=True
        )
    pair, limits = two_outputs(), norms()
    print(pair, *limits, sep="\n", flush=True)
    small = small_starts((0.01,) if options.quick else (0.01, 0.003, 0.001))
    print(*small, sep="\n", flush=True)
    found = digits(-3.0 if options.quick else -1e4, 200 if options.quick else 2000)
    for row in found["rows"]:
        print(row, flush=True)
    report.write(
        figure(cases),
        closed_form=cases,
        two_outputs=pair,
        limits=limits,
        small_starts=small,
        digits=found,
    )


if __name__ == "__main__":
    main()

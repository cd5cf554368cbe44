"""How fast and how exactly does the flow of the square loss run, from small starts to long times?

Six parts. The closed forms: modes of 1 to 5 layers, lambda-balanced starts. A spectrum 10 ... 0.1
long after it has converged, beside diffrax's Tsit5 and Kvaerno5 with optimistix's Chord at equal
measured error. Plateaus: the half height of a mode from 1e-15 to 1e-400, and a staircase of five.
Completions by one sweep, by flow and by descent. The test problems of MLPGradientFlow.jl that carry
over. Starts of three layers and more, to where float64 cannot tell the time.

    python benchmarks/regression.py [--quick] [--out FOLDER]
"""

import math
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from common import Report, begin, parser, summary
from peers import PALETTE

import gflow

QUIET = {"progress": False}
MODES = np.array([10.0, 3.0, 1.0, 0.3, 0.1])
TIMES = np.array([0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e4])
ERROR = 2e-8
"""That of the peer in the comparison."""


def warm(call, repeats):
    """The timing of a call that was made before, and what it returns."""
    took, found = [], call()
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
    return summary(took), found


def rotated(num, seed=0):
    rng = np.random.default_rng(seed)
    return [np.linalg.qr(rng.normal(size=(num, num)))[0] for _ in range(2)]


def whitened(target):
    size = math.sqrt(target.shape[1])
    return gflow.Problem(gflow.Regression(size * np.eye(target.shape[1]), size * target.T))


# -------------------------------------------------------------------------------------------------
# Closed forms
# -------------------------------------------------------------------------------------------------


def closed_forms():
    rows = []
    for depth in range(1, 6):
        problem = whitened(np.diag([1.7, 0.6]))
        starts = np.array([0.05, 0.02])
        layers = tuple(np.diag(starts ** (1 / depth)) for _ in range(depth))
        times = np.array([0.5, 2.0, 5.0, 20.0])
        flow = gflow.gradient_flow(problem, layers, until=gflow.Time(20.0), save=times, **QUIET)
        found = np.einsum("tii->ti", flow.end_to_end.values[1:])
        wanted = np.stack(
            [
                gflow.exact.square_loss_mode(times, target=s, start=u, depth=depth).end_to_end
                for s, u in zip((1.7, 0.6), starts, strict=True)
            ],
            axis=1,
        )
        error = float(np.abs(found - wanted).max())
        rows.append({"flow": f"modes, {depth} layers", "error": error})
    for inputs, hidden, outputs, level in (
        (4, 3, 2, -0.4),
        (3, 3, 3, 0.7),
        (4, 5, 6, 0.3),
        (6, 5, 2, -0.3),
    ):
        rng = np.random.default_rng(outputs + hidden)
        weights = balanced(rng, inputs, hidden, outputs, level)
        target, times = rng.normal(size=(outputs, inputs)), np.array([1.0, 3.0, 10.0])
        flow = gflow.gradient_flow(
            whitened(target), weights, until=gflow.Time(10.0), save=times, **QUIET
        )
        truth = gflow.exact.two_layer_riccati(times, target=target, weights=weights)
        error = float(np.abs(flow.end_to_end.values[1:] - truth.end_to_end).max())
        rows.append({"flow": f"Riccati, {inputs}-{hidden}-{outputs}, {level:+}", "error": error})
    return rows


def balanced(rng, inputs, hidden, outputs, level):
    """Random layers with W_2^T W_2 - W_1 W_1^T = level I, of any widths that allow it.

    Along hidden directions both layers have singular values with b^2 - a^2 = level; where a layer
    has no singular value the other has |level|.
    """
    left, basis, right = (
        np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (outputs, hidden, inputs)
    )
    a = np.zeros(hidden)
    free = min(inputs, hidden, outputs) if level < 0 else min(inputs, hidden)
    a[:free] = rng.uniform(0.3, 0.8, size=free)
    first, second = np.zeros((hidden, inputs)), np.zeros((outputs, hidden))
    for k in range(hidden):
        low, high = a[k], 0.0
        if level < 0:  # a^2 = b^2 + |level|
            high = low if k < outputs else 0.0
            low = math.sqrt(high**2 - level)
        else:
            high = math.sqrt(low**2 + level)
        if (low and k >= inputs) or (high and k >= outputs):
            raise ValueError("no such start has these widths")
        if low:
            first[k, k] = low
        if high:
            second[k, k] = high
    return basis @ first @ right.T, left @ second @ basis.T


# -------------------------------------------------------------------------------------------------
# Long after convergence
# -------------------------------------------------------------------------------------------------


def long_times(repeats, limit):
    left, right = rotated(5)
    target, weights = (left * MODES) @ right.T, (0.1 * right.T, 0.1 * left)
    curves = [
        gflow.exact.square_loss_mode(TIMES, target=s, start=0.01, depth=2).end_to_end for s in MODES
    ]
    truth = np.einsum("ik,kt,jk->tij", left, curves, right)
    problem = whitened(target)

    def ours(rtol):
        def call():
            return gflow.gradient_flow(
                problem, weights, until=gflow.Time(TIMES[-1]), save=TIMES, rtol=rtol, **QUIET
            )

        timing, flow = warm(call, repeats)
        error = float(np.abs(flow.end_to_end.values[1:] - truth).max())
        return {"steps": int(flow.num_steps[-1]), "error": error, "timing": timing}

    def field(_, w, args):
        slope = args - w[1] @ w[0]
        return w[1].T @ slope, slope @ w[0].T

    def peer(make, rtol):
        @jax.jit
        def solve(weights, target):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                make(rtol),
                t0=0.0,
                t1=TIMES[-1],
                dt0=None,
                y0=weights,
                args=target,
                stepsize_controller=diffrax.ClipStepSizeController(  # interpolation is worse
                    diffrax.PIDController(rtol=rtol, atol=1e-2 * rtol), step_ts=TIMES
                ),
                saveat=diffrax.SaveAt(ts=jnp.asarray(TIMES)),
                max_steps=limit,
                throw=False,
            )

        start = tuple(map(jnp.asarray, weights))
        timing, found = warm(lambda: jax.block_until_ready(solve(start, target)), repeats)
        product = np.asarray(jnp.einsum("tij,tjk->tik", found.ys[1], found.ys[0]))
        error = float(np.nan_to_num(np.abs(product - truth), nan=np.inf, posinf=np.inf).max())
        return {"steps": int(found.stats["num_steps"]), "error": error, "timing": timing}

    def chord(rtol):
        return diffrax.Kvaerno5(root_finder=optx.Chord(rtol=1e-2 * rtol, atol=1e-4 * rtol))

    rows = []
    for name, run, tolerances in (
        ("gflow", ours, (1e-9, 1e-7, 1e-5)),
        ("Kvaerno5 + Chord", lambda r: peer(chord, r), (1e-6, 1e-7, 1e-8, 1e-9, 1e-10)),
        ("Tsit5", lambda r: peer(lambda _: diffrax.Tsit5(), r), (1e-7, 1e-9)),
    ):
        for rtol in tolerances:
            row = {"method": name, "rtol": rtol, **run(rtol)}
            rows.append(row)
            print(name, f"{rtol:.0e}", row["steps"], f"{row['error']:.1e}", row["timing"].cpu)
    best = {}
    for row in rows:
        if row["error"] <= ERROR:
            first = best.get(row["method"])
            best[row["method"]] = min(first or math.inf, row["timing"].cpu)
    return {"rows": rows, "cpu_s_at_error": best, "error": ERROR}


# -------------------------------------------------------------------------------------------------
# Plateaus
# -------------------------------------------------------------------------------------------------


def plateaus(repeats):
    target, rows = 1.7, []
    problem = gflow.Problem(gflow.Regression([[1.0], [1.0]], np.full(2, target)))
    for start, rtol in (
        (1e-15, 1e-9),
        (1e-100, 1e-9),
        (1e-200, 1e-9),
        (1e-300, 1e-9),
        ("1e-400", 1e-9),
        ("1e-400", 1e-8),
    ):
        log_start = math.log(10) * float(str(start).split("e")[1])
        layer = math.exp(log_start / 2)
        wanted = (math.log(target) - log_start) / (2 * target)

        def call(layer=layer, rtol=rtol):
            weights = (np.array([[layer]]),) * 2
            return gflow.gradient_flow(
                problem, weights, until=gflow.Saddle(1), save=2, rtol=rtol, **QUIET
            )

        timing, flow = warm(call, repeats)
        rows.append(
            {
                "product": str(start),
                "rtol": rtol,
                "steps": int(flow.num_steps[-1]),
                "off": float(abs(math.expm1(float(flow.log_time[-1]) - math.log(wanted)))),
                "timing": timing,
            }
        )
        print(rows[-1], flush=True)
    sizes = np.array([5.0, 3.0, 2.0, 1.2, 0.7])
    steps = whitened(np.diag(sizes))
    weights = (math.sqrt(1e-15) * np.eye(5),) * 2

    def climb():
        return gflow.gradient_flow(
            steps, weights, until=gflow.Saddle(5), save=[1, 2, 3, 4], **QUIET
        )

    timing, flow = warm(climb, repeats)
    wanted = gflow.exact.saddle_times(sizes, 1e-15, depth=2)
    off = float(np.abs(np.exp(flow.log_time.values[1:]) / wanted - 1).max())
    staircase = {"steps": int(flow.num_steps[-1]), "off": off, "timing": timing}
    print(staircase, flush=True)
    return {"half_heights": rows, "staircase": staircase}


def deep_plateaus():
    """Where more layers end: the smallest product whose escape float64 can time."""
    rows = []
    problem = gflow.Problem(gflow.Regression([[1.0], [1.0]], np.full(2, 1.7)))
    for depth in (3, 4):
        for power in (-9, -18, -30, -42, -60):
            weights = (np.array([[10 ** (power / depth)]]),) * depth
            flow = gflow.gradient_flow(problem, weights, until=gflow.Saddle(1), save=2, **QUIET)
            wanted = float(gflow.exact.saddle_times([1.7], 10.0**power, depth=depth)[0])
            status = flow.attrs["status"]
            off = abs(math.exp(flow.log_time[-1]) / wanted - 1) if status == "reached" else None
            rows.append(
                {
                    "depth": depth,
                    "log10_product": power,
                    "status": flow.attrs["status"],
                    "steps": int(flow.num_steps[-1]),
                    "off": None if off is None else float(off),
                }
            )
            print(rows[-1], flush=True)
    return rows


# -------------------------------------------------------------------------------------------------
# Completion
# -------------------------------------------------------------------------------------------------


def completions(seeds, steps):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 6))
    matrix /= np.linalg.norm(matrix, 2)
    mask = np.zeros(36, dtype=bool)
    mask[rng.permutation(36)[:26]] = True
    data = gflow.datasets.completion(matrix, mask.reshape(6, 6))
    problem = gflow.Problem(data)

    def start(depth, scale, seed):
        shape = (6,) * (depth + 1)
        return problem, gflow.init.gaussian(shape, scale=scale ** (1 / depth), seed=seed)

    grid = {"depth": [2, 3, 4], "scale": [1e-1, 1e-2, 1e-3, 1e-4], "seed": range(seeds)}
    options = {
        "save": 2,
        "observables": {"distance": gflow.observables.distance_to(matrix)},
        **QUIET,
    }
    until = gflow.LogRisk(-30.0) | gflow.LogTime(20.0)

    def flow():
        return gflow.sweep(start, grid, until=until, **options)

    def descent(steps=steps):
        by_steps = gflow.LogRisk(-30.0) | gflow.Steps(steps)
        return gflow.sweep(start, grid, until=by_steps, optimizer=optax.sgd(2.0), **options)

    found = {"members": 12 * seeds, "observed": 26}
    records = {}
    for name, call, before in (("flow", flow, flow), ("descent", descent, lambda: descent(10))):
        before()  # compiles
        cpu, wall = time.process_time(), time.perf_counter()
        record = records[name] = call()
        last = record.isel(point=-1)
        found[name] = {
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "reached": int((record.log_risk.min("point") <= -29.9).sum()),
            "distance": last.distance.mean("seed").values.tolist(),
            "effective_rank": last.effective_rank.mean("seed").values.tolist(),
            "steps": last.num_steps.mean("seed").values.tolist(),
            "log_time": last.log_time.mean("seed").values.tolist(),
        }
        print(name, found[name], flush=True)
    apart = np.abs(records["flow"].distance - records["descent"].distance).isel(point=-1)
    done = records["descent"].log_risk.min("point") <= -29.9
    found["apart_where_both_arrive"] = float(apart.where(done).max())
    return found


# -------------------------------------------------------------------------------------------------
# MLPGradientFlow.jl's tests
# -------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "activation functions and their derivatives": "gflow has none of its own: any JAX function",
    "Net, params, ComponentArrays": "their containers; here any pytree",
    "hessian, hessian_spectrum": "gflow has the largest eigenvalue (`observables.sharpness`), not "
    "the matrix",
    "barrier (|x|^2/2 - c)^2 beyond a norm": "gflow integrates the flow of the risk alone",
    "infinite data (NetI), approximators, gauss_hermite_net": "expectations over normal inputs; "
    "gflow has points",
    "batch": "gflow's mini-batches are drawn at random, not taken in turn",
}


def sigmoid(z):
    return 1 / (1 + jnp.exp(-z))


def perceptron(activation):
    return gflow.Network(lambda w, x: w[1] @ activation(w[0] @ x))


def mlp_tests():
    rng, rows = np.random.default_rng(123), []

    def note(name, value, bound):
        rows.append(
            {"test": name, "value": float(value), "bound": bound, "passed": bool(value <= bound)}
        )
        print(rows[-1], flush=True)

    # Loss and gradient of a sigmoid network, against an obvious forward pass. Theirs is the mean of
    # the squares, twice ours.
    x, y = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    weights = rng.normal(size=(4, 2)), rng.normal(size=(2, 4))
    problem = gflow.Problem(gflow.Regression(x, y), perceptron(sigmoid))
    outputs = (weights[1] @ (1 / (1 + np.exp(-weights[0] @ x.T)))).T
    mean = float(np.mean(np.sum((outputs - y) ** 2, axis=1)))
    log_risk, slopes = problem.log_risk_and_gradient(weights)
    note("loss", abs(2 * math.exp(log_risk) / mean - 1), 1.5e-8)

    def risk(second):
        out = (second @ (1 / (1 + np.exp(-weights[0] @ x.T)))).T
        return float(np.log(np.sum((out - y) ** 2) / 6))

    h, off = 1e-5, 0.0
    for i in range(2):
        for j in range(4):
            step = np.zeros((2, 4))
            step[i, j] = h
            slope = (risk(weights[1] + step) - risk(weights[1] - step)) / (2 * h)
            off = max(off, abs(slope - float(slopes[1][i, j])))
    note("gradient, central differences", off, 1e-8)

    # ode: 2-2-1 sigmoid, 5 points; the flow ends below its start, and no higher than an optimiser.
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(5, 1))
    problem = gflow.Problem(gflow.Regression(x, y), perceptron(sigmoid))
    start = rng.normal(size=(2, 2)), rng.normal(size=(1, 2))
    flow = gflow.gradient_flow(
        problem, start, until=gflow.LogTime(8.0), save=20, max_steps=20_000, **QUIET
    )

    def loss(flat):
        first, second = flat[:4].reshape(2, 2), flat[4:].reshape(1, 2)
        return np.sum((second @ (1 / (1 + np.exp(-first @ x.T))) - y.T) ** 2) / 10

    from scipy.optimize import minimize

    end = np.concatenate([flow[f"final_weights_{k}"].values.ravel() for k in (1, 2)])
    polished = minimize(loss, end, method="BFGS", options={"gtol": 1e-9})
    note("ode: falls", float(np.exp(flow.log_risk[-1]) - np.exp(flow.log_risk[0])), 0.0)
    note("ode: above the optimiser's end by", loss(end) - polished.fun, 1e-3)
    note("ode: below it by", polished.fun - loss(end), math.sqrt(2.2e-16))

    # Teacher and student, softplus, 2-2-1 and 2-3-1, 100 points: the least loss is zero.
    x = rng.normal(size=(100, 2))
    teacher = rng.normal(size=(2, 2)), rng.normal(size=(1, 2))
    softplus = jax.nn.softplus
    y = np.logaddexp(0, x @ teacher[0].T) @ teacher[1].T
    problem = gflow.Problem(gflow.Regression(x, y), perceptron(softplus))
    start = rng.normal(size=(3, 2)), rng.normal(size=(1, 3))
    began = time.process_time()
    flow = gflow.gradient_flow(
        problem, start, until=gflow.LogRisk(math.log(1e-10)), save=20, max_steps=20_000, **QUIET
    )
    note("teacher and student: loss", 2 * math.exp(float(flow.log_risk[-1])), 2.1e-10)
    rows[-1] |= {"cpu_s": time.process_time() - began, "status": flow.attrs["status"]}
    rows[-1] |= {"steps": int(flow.num_steps[-1])}

    # distributed: several starts together are those alone.
    x, y = rng.uniform(size=(10, 2)), rng.uniform(size=(10, 1))
    network = gflow.Network(lambda w, x: sigmoid(w[1] @ jnp.tanh(w[0] @ x)))
    problem = gflow.Problem(gflow.Regression(x, y), network)
    starts = [(rng.normal(size=(2, 2)), rng.normal(size=(1, 2))) for _ in range(2)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *starts)
    many = gflow.ensemble(problem, stacked, until=gflow.Time(3.0), save=3, **QUIET)
    off = 0.0
    for k, start in enumerate(starts):
        alone = gflow.gradient_flow(problem, start, until=gflow.Time(3.0), save=3, **QUIET)
        off = max(off, float(np.abs(alone.log_risk - many.log_risk[k]).max()))
    note("distributed: together and alone", off, 1e-5)

    # cross-entropy: tanh, 10-2-10, against an obvious loss.
    x, labels = rng.normal(size=(100, 10)), np.arange(100) % 10
    data = gflow.Dataset(x, labels, num_classes=10)
    problem = gflow.Problem(data, perceptron(jnp.tanh), gflow.CrossEntropy())
    weights = rng.normal(size=(2, 10)), rng.normal(size=(10, 2))
    outputs = np.tanh(x @ weights[0].T) @ weights[1].T
    outputs -= np.log(np.sum(np.exp(outputs), axis=1, keepdims=True))
    mean = -float(np.mean(outputs[np.arange(100), labels]))
    note("crossentropy", abs(math.exp(float(problem.log_risk(weights))) / mean - 1), 1.5e-8)
    return {"rows": rows, "left_out": LEFT_OUT}


def figure(longer, filled):
    import matplotlib.pyplot as plt

    fig, (ax, other) = plt.subplots(1, 2, figsize=(7.0, 2.6), layout="constrained")
    for color, name in zip(PALETTE, ("gflow", "Kvaerno5 + Chord", "Tsit5"), strict=False):
        rows = [r for r in longer["rows"] if r["method"] == name and math.isfinite(r["error"])]
        error, cpu = [r["error"] for r in rows], [r["timing"].cpu for r in rows]
        ax.loglog(error, cpu, "o-", ms=3, color=color, label=name)
    ax.set_xlabel("largest error of the end-to-end matrix", fontsize=8)
    ax.set_ylabel("processor seconds", fontsize=8)
    for row, depth in enumerate((2, 3, 4)):
        for name, line in (("flow", "-"), ("descent", "--")):
            distance = filled[name]["distance"][row]
            label = f"{name}, {depth} layers"
            other.loglog([1e-1, 1e-2, 1e-3, 1e-4], distance, line, color=PALETTE[row], label=label)
    other.set_xlabel("scale of the start", fontsize=8)
    other.set_ylabel("distance to the matrix", fontsize=8)
    for each in (ax, other):
        each.tick_params(labelsize=7)
        each.legend(fontsize=6)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    repeats = 1 if options.quick else 5
    exact = closed_forms()
    for row in exact:
        print(row, flush=True)
    longer = long_times(repeats, 1_000 if options.quick else 400_000)
    print(longer["cpu_s_at_error"], flush=True)
    stairs, deep = plateaus(repeats), deep_plateaus()
    tests = mlp_tests()
    filled = completions(1 if options.quick else 6, 100 if options.quick else 100_000)
    report.write(
        figure(longer, filled),
        closed_forms=exact,
        long_times=longer,
        plateaus=stairs,
        deep_plateaus=deep,
        mlp_gradient_flow=tests,
        completions=filled,
    )


if __name__ == "__main__":
    main()

"""How exactly, how far and how fast does the flow of ReLU networks run, with all of its kinks?

Six parts. XOR with 20 neurons to log R = -100, -1e4, -1e6, and where diffrax and SciPy, which step
over kinks, stand after some seconds or 20,000 steps. Ten points, twelve neurons, T = 20: errors and
evaluations beside SciPy's and descent's of five step sizes. Two limits with closed forms (Phuong
and Lampert; Lyu, Li, Wang and Arora) at log R = -1e6. Orthogonal inputs and square loss (Boursier
et al.). Many kinks: 1,000 neurons on 100 points, many neurons on three. Networks drawn at random:
balance, NaN, ends.

    python benchmarks/kinks.py [--quick] [--out FOLDER]
"""

import contextlib
import math
import time
import warnings
from itertools import pairwise

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from common import Report, begin, parser
from peers import PALETTE
from scipy.integrate import DOP853, LSODA

import gflow
from gflow.problem.mlp import balances

QUIET = {"progress": False}
X = np.array([[1.0, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]]) / np.sqrt(3)
LABELS = np.array([1.0, -1, -1, 1])
TORCH = "not installed here, so not measured"


def drawn(width, d, scale=(0.3, 0.5), seed=0):
    rng = np.random.default_rng(seed)
    a, w = rng.normal(size=width) * scale[0], rng.normal(size=(width, d)) * scale[1]
    return w, a[None]


def flat(w, a):
    return np.concatenate([np.ravel(a), np.ravel(w)])


def weights_of(record, count=2):
    return [record[f"final_weights_{k + 1}"].values for k in range(count)]


def run(problem, weights, **options):
    """A warm run: the record, and its processor seconds."""
    gflow.gradient_flow(problem, weights, **options, **QUIET)
    began = time.process_time()
    record = gflow.gradient_flow(problem, weights, **options, **QUIET)
    return record, time.process_time() - began


def facts(record, cpu):
    return {
        "status": record.attrs["status"],
        "log_risk": float(record.log_risk[-1]) if np.isfinite(record.log_risk[-1]) else None,
        "steps": int(record.num_steps[-1]),
        "evaluations": int(record.attrs["num_field_evaluations"]),
        "kinks": int(record.num_kinks[-1]),
        "sliding": int(record.num_sliding[-1]),
        "stepped_over": int(record.attrs["num_stepped_over"]),
        "balance_drift": float(np.max(record.balance_drift)),
        "clock_error": float(np.max(record.clock_error)),
        "cpu": cpu,
    }


# -------------------------------------------------------------------------------------------------
# What the peers integrate
# -------------------------------------------------------------------------------------------------


def stepping_over(x, y, width, by_risk):
    """The field with the gates of its own signs, by time or by -log R, and its count of calls."""
    count = [0]

    def rhs(_, v):
        count[0] += 1
        a, w = v[:width], v[width:].reshape(width, -1)
        z = w @ x.T
        gates = np.where(z > 0, 1.0, 0.0)
        q = y * (a @ (gates * z))
        c = y / (1 + np.exp(q)) / len(y)
        f = np.concatenate([(gates * z) @ c, ((a[:, None] * gates * c) @ x).ravel()])
        if not by_risk:
            return f
        return f * np.mean(np.logaddexp(0, -q)) / (f @ f)

    return rhs, count


def scipy_until(solver, rhs, start, end, rtol, seconds):
    """Where a solver of SciPy's is at the end, or when its time is over."""
    at, began = solver(rhs, start[0], start[1], end, rtol=rtol, atol=rtol * 1e-3), time.monotonic()
    steps = 0
    while at.status == "running" and time.monotonic() - began < seconds:
        at.step()
        steps += 1
    return at.t, at.y, steps


def log_risk_of(v, width):
    a, w = v[:width], v[width:].reshape(width, -1)
    q = LABELS * (a @ np.maximum(w @ X.T, 0))
    return float(np.log(np.mean(np.logaddexp(0, -q))))


def xor(seconds):
    data, rows = gflow.Dataset(X, LABELS), []
    w, a = drawn(20, 3)
    for slope in (0.0, 0.1):
        problem = gflow.Problem(data, gflow.MLP(slope=slope))
        for goal in (-100.0, -1e4, -1e6):
            record, cpu = run(problem, (w, a), until=gflow.LogRisk(goal), save=2)
            margin = float(record.margin[-1])
            rows.append({"slope": slope, "goal": goal, "margin": margin, **facts(record, cpu)})
            print(rows[-1], flush=True)
    first = log_risk_of(flat(w, a), 20)
    peers = {
        f"torchdiffeq {method}, rtol 1e-6": over_with_torchdiffeq(method, (w, a), -first, seconds)
        for method in ("dopri5", "dopri8")
    }
    for solver in (DOP853, LSODA):
        rhs, count = stepping_over(X, LABELS, 20, by_risk=True)
        start = -first, flat(w, a)
        _, v, steps = scipy_until(solver, rhs, start, 100.0, 1e-6, seconds)
        reached = {"log_risk": log_risk_of(v, 20), "steps": steps, "evaluations": count[0]}
        peers[f"SciPy {solver.__name__}, rtol 1e-6"] = reached | {"seconds": seconds}
    network = gflow.Network(lambda w, x: (w[1] @ jax.nn.relu(w[0] @ x))[0], homogeneity=2)
    field = gflow.FlowField(gflow.Problem(data, network), gflow.clocks.Risk())
    for solver in (diffrax.Tsit5(), diffrax.Kvaerno5()):
        name = f"diffrax {type(solver).__name__}, rtol 1e-6"
        peers[name] = over_with_diffrax(field, solver, (w, a), -first)
    for name, reached in peers.items():
        print(name, reached, flush=True)
    return {"gflow": rows, "peers": peers}


class _LateError(Exception):
    """The time of a peer is over."""


def over_with_torchdiffeq(method, weights, s, seconds):
    try:
        import torch
        from torchdiffeq import odeint
    except ImportError:
        return TORCH
    torch.set_num_threads(1)
    x, labels = torch.tensor(X), torch.tensor(LABELS)
    began, count, last = time.monotonic(), 0, None

    def risk(v):
        q = labels * (torch.relu(x @ v[20:].reshape(20, -1).T) @ v[:20])
        return torch.mean(torch.nn.functional.softplus(-q))

    def field(_, v):
        nonlocal count, last
        count, last = count + 1, v
        if time.monotonic() - began > seconds:
            raise _LateError
        with torch.enable_grad():
            at = v.detach().requires_grad_(True)
            value = risk(at)
            (gradient,) = torch.autograd.grad(value, at)
        return -gradient * value.detach() / (gradient @ gradient)

    span = torch.tensor([s, 100.0], dtype=torch.float64)
    start = torch.tensor(flat(*weights))
    # An assertion fails where its step underflows.
    with contextlib.suppress(_LateError, AssertionError):
        last = odeint(field, start, span, rtol=1e-6, atol=1e-9, method=method)[-1]
    reached = float(torch.log(risk(last)))
    return {"log_risk": reached, "evaluations": count, "seconds": time.monotonic() - began}


def over_with_diffrax(field, solver, weights, s, max_steps=20_000):
    with jax.enable_x64(True):
        state = gflow.FlowState(jax.tree.map(jnp.asarray, weights), jnp.zeros(()))
        began = time.monotonic()
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            s,
            100.0,
            1e-3,
            state,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
            saveat=diffrax.SaveAt(steps=True),
            max_steps=max_steps,
            throw=False,
        )
        steps = int(found.stats["num_steps"])
        times = np.asarray(found.ts)
        reached = float(np.max(times[np.isfinite(times)]))
    return {"log_risk": -reached, "steps": steps, "seconds": time.monotonic() - began}


# -------------------------------------------------------------------------------------------------
# Exactness
# -------------------------------------------------------------------------------------------------


def ten_points(quick):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), np.sign(rng.normal(size=10))
    a, w = rng.normal(size=12) * 0.3, rng.normal(size=(12, 3)) * 0.5
    problem = gflow.Problem(gflow.Dataset(x, y), gflow.MLP())
    options = {"until": gflow.Time(20.0), "save": 2}
    exact, _ = run(problem, (w, a[None]), rtol=1e-13, solver=diffrax.Dopri8(), **options)
    truth, rows = flat(*weights_of(exact)), []

    def note(name, tolerance, v, evaluations, cpu):
        error = float(np.max(np.abs(v - truth)))
        rows.append(
            {
                "method": name,
                "at": tolerance,
                "error": error,
                "evaluations": evaluations,
                "cpu": cpu,
            }
        )
        print(rows[-1], flush=True)

    for solver in (diffrax.Tsit5(), diffrax.Dopri8()):
        for rtol in (1e-4, 1e-6, 1e-8, 1e-10):
            record, cpu = run(problem, (w, a[None]), rtol=rtol, solver=solver, **options)
            v, calls = flat(*weights_of(record)), record.attrs["num_field_evaluations"]
            note(f"gflow {type(solver).__name__}", rtol, v, calls, cpu)
    for solver, tolerances in ((DOP853, (1e-4, 1e-6)), (LSODA, (1e-3,) if quick else (1e-3, 1e-4))):
        for rtol in tolerances:
            rhs, count = stepping_over(x, y, 12, by_risk=False)
            began = time.process_time()
            start = 0.0, flat(w, a)
            t, v, _ = scipy_until(solver, rhs, start, 20.0, rtol, 5 if quick else 60)
            name = f"SciPy {solver.__name__}" + ("" if t >= 20 else f", given up at t = {t:.3g}")
            note(name, rtol, v, count[0], time.process_time() - began)
    for eta in (0.1, 0.01, 1e-3) if quick else (0.1, 0.01, 1e-3, 1e-4, 1e-5):
        began = time.process_time()
        v = descended(problem, (w, a[None]), eta, 20.0)
        note("descent", eta, flat(*v), round(20.0 / eta), time.process_time() - began)
    return rows


def descended(problem, weights, eta, horizon):
    with jax.enable_x64(True):

        @jax.jit
        def go(w):
            def step(_, w):
                log_risk, g = problem.log_risk_and_gradient(w)
                return jax.tree.map(lambda a, b: a - eta * jnp.exp(log_risk) * b, w, g)

            return jax.lax.fori_loop(0, round(horizon / eta), step, w)

        return jax.tree.map(np.asarray, go(jax.tree.map(jnp.asarray, weights)))


def balanced(width, d, scale, seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(width, d))
    a = np.linalg.norm(w, axis=1) * rng.choice([-1, 1], width)
    return w * scale, a[None] * scale


def limits():
    rng, rows = np.random.default_rng(0), []
    p, q = (np.abs(rng.normal(size=(5, 3))) + 0.2 for _ in range(2))
    data = gflow.Dataset(np.concatenate([p, -q]), np.repeat([1, -1], 5))
    cases = [("Phuong and Lampert", data, 0.0, 3)]
    half = rng.normal(size=(5, 2))
    half = half * np.sign(half @ [1.0, 0.5])[:, None] + 0.3 * np.array([1.0, 0.5])
    data = gflow.Dataset(np.concatenate([half, -half]), np.repeat([1, -1], 5))
    cases += [("Lyu, Li, Wang and Arora", data, slope, 2) for slope in (0.1, 0.5)]
    for name, data, slope, d in cases:
        limit = gflow.exact.small_start_margin(data, slope)
        problem = gflow.Problem(data, gflow.MLP(slope=slope))
        start = balanced(8, d, 1e-4, 1)
        record, cpu = run(problem, start, until=gflow.LogRisk(-1e6), save=2)
        margin = float(record.margin[-1])
        off = {"margin": margin, "limit": limit, "relative": margin / limit - 1}
        rows.append({"of": name, "slope": slope, **off, **facts(record, cpu)})
        print(rows[-1], flush=True)
    return rows


def orthogonal():
    """Boursier, Pillaud-Vivien and Flammarion: two groups of one rank each, from 1e-6."""
    y, rho = np.array([1.0, 0.5, -0.7, -0.4]), 1.3
    problem = gflow.Problem(gflow.Regression(rho * np.eye(4), y), gflow.MLP())
    start = balanced(60, 4, 1e-6, 0)  # some neurons see all points of their group
    times = np.array([30.0, 32.0, 34.0, 36.0, 40.0, 400.0])
    record, cpu = run(problem, start, until=gflow.Time(400.0), save=times, keep_weights=True)
    rows = []
    for sign in (1, -1):
        strength = np.linalg.norm(y[np.sign(y) == sign]) / rho
        got = []
        for w, a in zip(record.weights_1.values, record.weights_2.values, strict=True):
            chosen = np.sign(a[0]) == sign
            got.append(np.linalg.norm(np.abs(a[0][chosen]) @ w[chosen]))
        t = np.exp(record.log_time.values[1:])
        u = np.array(got[1:])
        # u' = 2 u (s - u) in the clock t rho^2 / n, from the first of these times.
        grown = np.exp(2 * strength * (t - t[0]) * rho**2 / 4)
        wanted = strength * grown / (grown - 1 + strength / u[0])
        rows.append({"sign": sign, "strength": strength, "u": u, "closed_form": wanted})
        print(rows[-1], flush=True)
    size = float(record.norm[-1]) ** 2 / 2
    wanted = sum(row["strength"] for row in rows)
    return {"groups": rows, "half_norm": size, "wanted": wanted, **facts(record, cpu)}


# -------------------------------------------------------------------------------------------------
# Many kinks, and any networks
# -------------------------------------------------------------------------------------------------


def many(quick):
    rng, found = np.random.default_rng(0), {}
    n, d, m = (100, 20, 100) if quick else (100, 20, 1000)
    x, y = rng.normal(size=(n, d)) / np.sqrt(d), np.sign(rng.normal(size=n))
    weights = rng.normal(size=(m, d)), rng.normal(size=(1, m)) / np.sqrt(m)
    problem = gflow.Problem(gflow.Dataset(x, y), gflow.MLP(branch="off"))
    options = {"rtol": 1e-6, "solver": diffrax.Tsit5(), "save": 2, **QUIET}
    gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-10.0), **options)
    began = time.process_time()
    record = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-10.0), **options)
    found[f"{m} neurons, {n} points"] = facts(record, time.process_time() - began)
    print(found, flush=True)
    x = np.array([[-0.8, 1.0], [0.5, 1.0], [0.9, 1.0]])
    problem = gflow.Problem(gflow.Regression(x, [0.4, -0.3, 0.9]), gflow.MLP(branch="off"))
    options.pop("solver")
    for m in (400,) if quick else (4000, 20000):
        weights = balanced(m, 2, 1e-3 / math.sqrt(m), 0)
        gflow.gradient_flow(problem, weights, until=gflow.Time(2000.0), **options)
        began = time.process_time()
        record = gflow.gradient_flow(problem, weights, until=gflow.Time(2000.0), **options)
        found[f"{m} neurons, 3 points"] = facts(record, time.process_time() - began)
        print(found, flush=True)
    return found


def fuzz(count):
    rows = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        depth, d, n = (int(rng.integers(*span)) for span in ((2, 4), (1, 4), (3, 7)))
        width, slope = int(rng.integers(2, 6)), float(rng.choice([0.0, 0.1, 0.5, -1.0]))
        x, ties = rng.normal(size=(n, d)), int(rng.integers(3))
        x = [x, np.concatenate([x, -x]), np.round(x)][ties]
        data = gflow.Regression(x, rng.normal(size=(len(x), 2)))
        widths = [d, *[width] * (depth - 1), 2]
        start = tuple(rng.normal(size=(b, a)) * 0.7 for a, b in pairwise(widths))
        problem = gflow.Problem(data, gflow.MLP(slope=slope))
        options = {"save": 2, "solver": diffrax.Tsit5(), "max_steps": 5000, **QUIET}
        try:
            record = gflow.gradient_flow(problem, start, until=gflow.Time(10.0), **options)
        except ValueError as error:  # all neurons may be off at all points
            rows.append({"seed": seed, "widths": widths, "refused": str(error)})
            continue
        end = tuple(weights_of(record, depth))
        drift = float(np.max(np.abs(balances(end) - balances(start))))
        case = {"seed": seed, "widths": widths, "points": len(x), "slope": slope, "ties": ties}
        rows.append({**case, "balance": drift, **facts(record, math.nan)})
        print(rows[-1], flush=True)
    return rows


def figure(rows):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.0, 2.8), layout="constrained")
    names = dict.fromkeys(row["method"].split(",")[0] for row in rows)
    for color, name in zip(PALETTE, names, strict=False):
        own = [row for row in rows if row["method"] == name]
        calls, errors = [row["evaluations"] for row in own], [row["error"] for row in own]
        ax.loglog(calls, errors, "o-", ms=3, color=color, label=name)
    ax.set_xlabel("evaluations of the field", fontsize=8)
    ax.set_ylabel("largest error of a weight at T = 20", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=6)
    return fig


def main():
    options = begin(parser(__doc__))
    report = Report(__file__, options)
    warnings.simplefilter("ignore", UserWarning)
    points = ten_points(options.quick)
    report.write(
        figure(points),
        ten_points=points,
        xor=xor(5 if options.quick else 10),
        limits=limits(),
        orthogonal=orthogonal(),
        many=many(options.quick),
        fuzz=fuzz(3 if options.quick else 30),
    )


if __name__ == "__main__":
    main()

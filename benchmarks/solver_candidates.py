"""Which kind of method suits the flow? Candidates for the implicit solver, by the work they need.

Radau IIA with the lifted Newton iteration (`gflow.GaussNewton`) beside what else is made for stiff
equations: Rosenbrock methods (Rodas3, Rodas4), the extrapolated linearly implicit Euler method (as
in SEULEX), and stabilised explicit Runge–Kutta–Chebyshev steps of second order. The candidates get
the best that they could get in a real implementation: the exact Jacobian at every step, and their
cost is counted, not timed, for they are plain loops: attempted steps, field evaluations and linear
systems solved. The (2,10,10,10,1) network, exponential loss; error of the worst observable.

    python benchmarks/solver_candidates.py [--quick] [--limit SECONDS] [--tag TAG] [--out FOLDER]

Coefficients: Sandu et al., Atmos. Environ. 31 (1997), 3459 (Rodas3); Hairer and Wanner, *Solving
Ordinary Differential Equations II* (1996), IV.7 and IV.9 (Rodas4, SEULEX); Sommeijer, Shampine and
Verwer, J. Comput. Appl. Math. 88 (1997), 315 (RKC).
"""

import math
import time
from typing import NamedTuple

import common
import jax
import numpy as np
import peers
from jax.flatten_util import ravel_pytree
from scipy.linalg import lu_factor, lu_solve

import gflow
from gflow.dynamics.march.tolerance import default_atol

GOALS = (-1e2, -1e4, -1e6)


class Rosenbrock(NamedTuple):
    r"""Stages $(I/h\gamma - J)U_i = F(z + \sum a_{ij}U_j) + \sum c_{ij}U_j/h$."""

    order: int
    gamma: float
    a: list[list[float]]
    c: list[list[float]]
    m: list[float]
    e: list[float]

    def step(self, flow, z, h):
        jacobian = flow.jacobian(z)
        factors = lu_factor(np.eye(z.size) / (h * self.gamma) - jacobian)
        stages = []
        for a, c in zip(self.a, self.c, strict=True):
            # The last column of the state is the clock, so that the system is autonomous.
            at = z + sum((x * u for x, u in zip(a, stages, strict=True)), np.zeros_like(z))
            rhs = flow.field(at) + sum(x * u / h for x, u in zip(c, stages, strict=True))
            stages.append(lu_solve(factors, rhs))
            flow.systems += 1
        stages = np.array(stages)
        return z + np.array(self.m) @ stages, np.array(self.e) @ stages


RODAS3 = Rosenbrock(
    order=3,
    gamma=0.5,
    a=[[], [0.0], [2.0, 0.0], [2.0, 0.0, 1.0]],
    c=[[], [4.0], [1.0, -1.0], [1.0, -1.0, -8 / 3]],
    m=[2.0, 0.0, 1.0, 1.0],
    e=[0.0, 0.0, 0.0, 1.0],
)
LAST = [6.019134481288629, 12.53708332932087, -0.6878860361058950]
RODAS4 = Rosenbrock(
    order=4,
    gamma=0.25,
    a=[
        [],
        [1.544],
        [0.9466785280815826, 0.2557011698983284],
        [3.314825187068521, 2.896124015972201, 0.9986419139977817],
        [1.221224509226641, *LAST],
        [1.221224509226641, *LAST, 1.0],
    ],
    c=[
        [],
        [-5.6688],
        [-2.430093356833875, -0.2063599157091915],
        [-0.1073529058151375, -9.594562251023355, -20.47028614809616],
        [7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160],
        [
            8.083246795921522,
            -7.981132988064893,
            -31.52159432874371,
            16.31930543123136,
            -6.058818238834054,
        ],
    ],
    m=[1.221224509226641, *LAST, 1.0, 1.0],
    e=[0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
)


class Extrapolation(NamedTuple):
    """The linearly implicit Euler method with 2, 3, 4, … substeps, extrapolated."""

    order: int = 6

    def step(self, flow, z, h):
        jacobian, rows = flow.jacobian(z), []
        for j in range(self.order):
            n, y = j + 2, z
            factors = lu_factor(np.eye(z.size) - h / n * jacobian)
            for _ in range(n):
                y = y + lu_solve(factors, h / n * flow.field(y))
                flow.systems += 1
            row = [y]
            for k in range(j):
                row.append(row[k] + (row[k] - rows[-1][k]) / (n / (n - k - 1) - 1))
            rows.append(row)
        return rows[-1][-1], rows[-1][-1] - rows[-1][-2]


class Chebyshev(NamedTuple):
    """Runge–Kutta–Chebyshev: as many stages as the stability of the step needs."""

    order: int = 2

    def step(self, flow, z, h):
        radius = np.max(np.abs(np.linalg.eigvals(flow.jacobian(z))))
        s = max(2, 1 + math.ceil(math.sqrt(1 + 1.54 * h * radius)))
        w0 = 1 + 2 / (13 * s**2)
        t, t1, t2 = [1.0, w0], [0.0, 1.0], [0.0, 0.0]
        for j in range(2, s + 1):
            t.append(2 * w0 * t[-1] - t[-2])
            t1.append(2 * t[j - 1] + 2 * w0 * t1[-1] - t1[-2])
            t2.append(4 * t1[j - 1] + 2 * w0 * t2[-1] - t2[-2])
        w1 = t1[s] / t2[s]
        b = [0.0, 0.0, *(t2[j] / t1[j] ** 2 for j in range(2, s + 1))]
        b[0] = b[1] = b[2]
        f0 = flow.field(z)
        before, now = z, z + b[1] * w1 * h * f0
        for j in range(2, s + 1):
            mu, nu = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2]
            scaled = 2 * b[j] * w1 / b[j - 1]
            gamma = -(1 - b[j - 1] * t[j - 1]) * scaled
            force = h * (scaled * flow.field(now) + gamma * f0)
            before, now = now, (1 - mu - nu) * z + mu * now + nu * before + force
        return now, 0.8 * (z - now) + 0.4 * h * (f0 + flow.field(now))


CANDIDATES = {
    "Rodas3": RODAS3,
    "Rodas4": RODAS4,
    "extrapolation": Extrapolation(),
    "RKC": Chebyshev(),
}


class Flow:
    """The field with the clock as a last state, its Jacobian, and counts of their use."""

    def __init__(self, work):
        flat, unravel = ravel_pytree(gflow.FlowState(work.weights, np.zeros(())))
        self.start = np.append(np.asarray(flat), work.s_start)
        self.unravel = lambda z: unravel(z[:-1])

        def field(z):
            slope, _ = ravel_pytree(work.field(z[-1], unravel(z[:-1])))
            return jax.numpy.append(slope, 1.0)

        self._field, self._jacobian = jax.jit(field), jax.jit(jax.jacfwd(field))
        self.field(self.start), self.jacobian(self.start)  # compiled before the clock runs
        self.evaluations = self.systems = 0

    evaluations = 0

    def field(self, z):
        self.evaluations += 1
        return np.asarray(self._field(z))

    def jacobian(self, z):
        return np.asarray(self._jacobian(z))


def follow(work, method, rtol, limit):
    """States at the goals that are reached within the limit, each with the work until there."""
    flow = Flow(work)
    atol = default_atol(gflow.FlowState(work.weights, np.zeros(())), rtol)
    z, h, attempts, rows = flow.start, 1e-3, 0, []
    began = time.perf_counter()
    for goal in GOALS:
        end = work.s_end(goal)
        while z[-1] < end and time.perf_counter() - began < limit:
            step = min(h, end - z[-1])
            with np.errstate(all="ignore"):
                new, error = method.step(flow, z, step)
                scale = atol + rtol * np.maximum(abs(z[:-1]), abs(new[:-1]))
                norm = math.sqrt(np.mean((error[:-1] / scale) ** 2))
            attempts += 1
            sound = math.isfinite(norm)
            order = method.order if method.order > 2 else 3
            factor = 0.9 * max(norm, 1e-10) ** (-1 / order) if sound else 0.1
            if sound and norm <= 1:
                z = np.append(new[:-1], end if step == end - z[-1] else new[-1])
                factor = max(factor, 1.0) if step < h else factor
            h = (h if step < h and sound and norm <= 1 else step) * min(5.0, max(0.1, factor))
        if z[-1] < end:
            break
        rows.append((goal, flow.unravel(z), attempts, flow.evaluations, flow.systems))
    log_risk = float(work.field.problem.log_risk(flow.unravel(z).weights))
    return rows, log_risk, attempts


def main():
    options = common.parser(__doc__)
    options.add_argument("--limit", type=float, default=25.0, help="seconds for each run")
    options = common.begin(options)
    report = common.Report(__file__, options)
    limit = 5.0 if options.quick else options.limit
    work = common.task((2, 10, 10, 10, 1))
    observer = common.Observer(work)
    exact = {goal: common.reference_run(work, goal, quick=options.quick) for goal in GOALS}
    rows, gave_up = [], []
    for rtol in (1e-6,) if options.quick else (1e-4, 1e-6, 1e-8):
        for goal in GOALS:
            solver = gflow.GaussNewton()
            run = common.walk(work, solver, goal, rtol)
            rows.append(
                {
                    "method": "GaussNewton",
                    "rtol": rtol,
                    "goal": goal,
                    "attempts": run.num_steps + run.num_rejected,
                    "evaluations": solver.stages * (run.num_iterations + run.num_steps),
                    "systems": run.num_iterations,
                    "error": observer.worst(run.state, exact[goal].state),
                }
            )
        for name, method in CANDIDATES.items():
            reached, log_risk, attempts = follow(work, method, rtol, limit)
            for goal, state, tried, evaluations, systems in reached:
                rows.append(
                    {
                        "method": name,
                        "rtol": rtol,
                        "goal": goal,
                        "attempts": tried,
                        "evaluations": evaluations,
                        "systems": systems,
                        "error": observer.worst(state, exact[goal].state),
                    }
                )
            if len(reached) < len(GOALS):
                gave_up.append(
                    {"method": name, "rtol": rtol, "log_risk": log_risk, "attempts": attempts}
                )
    common.table(rows, "method:s rtol:g goal:g attempts:d evaluations:d systems:d error:.1e")
    if gave_up:
        print(f"not at the next goal within {limit:g} s:")
        common.table(gave_up, "method:s rtol:g log_risk:.4g attempts:d")
    report.write(figure(rows), limit_s=limit, rows=rows, gave_up=gave_up)


def figure(rows):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1, len(GOALS), figsize=(9, 3.4), layout="constrained", sharex=True, sharey=True
    )
    for ax, goal in zip(axes, GOALS, strict=True):
        for name, color, marker in zip(
            ("GaussNewton", *CANDIDATES), peers.PALETTE, "osD^v", strict=False
        ):
            shown = [r for r in rows if r["method"] == name and r["goal"] == goal]
            ax.loglog(
                [r["evaluations"] for r in shown],
                [r["error"] for r in shown],
                color=color,
                marker=marker,
                label=name,
            )
        ax.set_title(f"to log R = {goal:g}", fontsize=9)
        ax.set_xlabel("field evaluations")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the worst observable")
    axes[0].legend(fontsize=7)
    return fig


if __name__ == "__main__":
    main()

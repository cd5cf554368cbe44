"""The solvers that the benchmarks compare with: diffrax's Kvaerno5, SciPy's LSODA and Radau."""

import math
import os
import time
from itertools import pairwise
from typing import Any

import common
import diffrax
import jax
import numpy as np
import optimistix as optx
import scipy.integrate
from jax.flatten_util import ravel_pytree
from threadpoolctl import threadpool_limits

import gflow
from gflow.dynamics.march.tolerance import default_atol

GREY = "#7F7F7F"
PALETTE = (*gflow.plot.COLORS[:-1], GREY)
"""The colours of gflow's own figures, with grey for black, in which gflow itself is drawn."""

COLORS = {
    "GaussNewton, 3 stages": PALETTE[5],
    "GaussNewton, 5 stages": PALETTE[0],
    "GaussNewton, 7 stages": "black",
    "Dopri8": PALETTE[4],
    "Kvaerno5, as shipped": PALETTE[3],
    "Kvaerno5, better root finder": PALETTE[1],
    "SciPy LSODA": PALETTE[2],
    "SciPy Radau": GREY,
}

MARKERS = dict(zip(COLORS, "v^sDoXP*", strict=True))


class FixedChord(diffrax.VeryChord):
    """diffrax's root finder without its mistake.

    `VeryChord` reports an iteration that has neither converged nor diverged as diverged, and the
    step is rejected. It is corrected in the development version of its library.
    """

    def terminate(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        terminate, result = super().terminate(*args, **kwargs)
        return terminate, optx.RESULTS.where(terminate, result, optx.RESULTS.successful)


def kvaerno5(rtol: float, *, fixed: bool) -> diffrax.Kvaerno5:
    """Kvaerno 5/4 with the root finder's tolerances those of the step, as ``diffeqsolve`` does."""
    finder = (FixedChord if fixed else diffrax.VeryChord)(np.float64(rtol), np.float64(rtol))
    return diffrax.Kvaerno5(root_finder=finder)


class Peer:
    """SciPy's implicit solvers on the same field, compiled, with its exact compiled Jacobian.

    They are told how small the scaled time becomes, so that its tolerance is relative as gflow's.
    """

    def __init__(self, work: common.Task):
        state = gflow.FlowState(work.weights, np.zeros(()))
        flat, self._unravel = ravel_pytree(state)
        self.start, self._work = np.asarray(flat), work
        field = lambda s, y: ravel_pytree(work.field(s, self._unravel(y)))[0]  # noqa: E731
        self._field, self.jacobian = jax.jit(field), jax.jit(jax.jacfwd(field, argnums=1))

    def compile(self) -> None:
        """Compile field and Jacobian."""
        s = np.float64(self._work.s_start)
        jax.block_until_ready((self._field(s, self.start), self.jacobian(s, self.start)))

    def walk(
        self, method: str, log_risk: float, rtol: float, *, scaled_time: float, limit: float
    ) -> common.Run:
        """Follow the flow; given up at the first step that ends after ``limit`` seconds."""
        work = self._work
        state = gflow.FlowState(work.weights, np.zeros(()))
        atol = np.full(self.start.size, default_atol(state, rtol))
        atol[-1] = rtol * scaled_time
        # A large LU gains from all cores, as a small one loses.
        threads = 1 if self.start.size < 2_000 else os.cpu_count()
        with threadpool_limits(threads, user_api="blas"):
            return self._walk(method, log_risk, rtol, atol, limit)

    def _walk(
        self, method: str, log_risk: float, rtol: float, atol: np.ndarray, limit: float
    ) -> common.Run:
        work = self._work
        began, spent = time.perf_counter(), time.process_time()
        solver = getattr(scipy.integrate, method)(
            lambda s, y: np.asarray(self._field(np.float64(s), y)),
            work.s_start,
            self.start,
            work.s_end(log_risk),
            rtol=rtol,
            atol=atol,
            jac=lambda s, y: np.asarray(self.jacobian(np.float64(s), y)),
        )
        steps = 0
        while solver.status == "running" and time.perf_counter() - began < limit:
            solver.step()
            steps += 1
        took, spent = time.perf_counter() - began, time.process_time() - spent
        state = self._unravel(solver.y)
        return common.Run(
            state=state,
            finished=solver.status == "finished",
            log_risk=float(work.field.problem.log_risk(state.weights)),
            num_steps=steps,
            num_rejected=0,
            num_iterations=int(solver.nlu),
            seconds=took,
            cpu=spent,
        )


def time_at(points: list[tuple[float, float]], error: float) -> float | None:
    """Seconds at an achieved error, between measured (error, seconds) in logarithms.

    None if no point is as good; the cheapest point if even the coarsest is better.
    """
    points = sorted(points)  # from the best error to the worst
    if not points or points[0][0] > error:
        return None
    # Between neighbours, and never slower than any point at least as good.
    good = min(wall for achieved, wall in points if achieved <= error)
    for (e0, t0), (e1, t1) in pairwise(points):
        if e0 <= error <= e1 and e1 > e0:
            weight = math.log(error / e0) / math.log(e1 / e0)
            good = min(good, math.exp((1 - weight) * math.log(t0) + weight * math.log(t1)))
    return good

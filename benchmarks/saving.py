"""Two that save 100 states on the way to log R = -10: gflow's default call, and Tsit5 by itself.

Nothing is imported before it is needed: `everyday.py` times them in processes of their own.
"""

from collections.abc import Callable
from typing import Any

import rivals

POINTS = 100
"""Gflow's default."""


def ours(path: Any) -> Callable[[], Any]:
    """The default call with its record, to the first target of what `reach.pose` wrote."""
    import gflow

    problem, targets = rivals.read(path)
    posed = gflow.Problem(gflow.Dataset(problem.z, [1] * len(problem.z)), loss=gflow.Exponential())
    until = gflow.LogRisk(targets[0].log_risk)
    start = tuple(problem.weights)
    return lambda: gflow.gradient_flow(posed, start, until=until, save=POINTS, progress=False)


def tsit5(path: Any, rtol: float = rivals.RTOL) -> Callable[[], Any]:
    """Diffrax's `diffeqsolve` to the time of that target, its states evenly saved in time.

    Field and tolerances are those of `rivals.py`, or tighter ones; it observes nothing.
    """
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    problem, targets = rivals.read(path)
    end = float(jnp.exp(targets[0].log_time))
    z = jnp.asarray(problem.z)

    def field(t: Any, weights: Any, args: Any) -> Any:
        return tuple(rivals.descent_direction(weights, z, jnp.exp))

    @jax.jit
    def solve(weights: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            end,
            None,
            weights,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, end, POINTS)),
            stepsize_controller=diffrax.PIDController(rtol, rtol * rivals.ATOL / rivals.RTOL),
            max_steps=1_000_000,
        ).ys

    weights = tuple(jnp.asarray(matrix) for matrix in problem.weights)
    return lambda: jax.block_until_ready(solve(weights))


def off(found: Any, exact: Any) -> float:
    """The largest difference of some weights from others."""
    return max(float(abs(a - b).max()) for a, b in zip(found, exact, strict=True))

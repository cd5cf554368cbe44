r"""How far descent may be from the flow: a bound from the curvature along the flow.

To first order in the learning rate the gap $e = W_{\text{descent}} - W_{\text{flow}}$ at equal time
obeys the linearised modified equation (see ``gflow.ModifiedEquation``)

$$\dot e = -H e - \frac\eta2 H\nabla R, \qquad H = \nabla^2R(W(t)),$$

so with $\lambda_- = \min(\lambda_{\min}(H), 0)$ its norm is at most $\eta b(t)$, where

$$\dot b = -\lambda_-\,b + \frac12\lVert H\nabla R\rVert, \quad b(0) = 0, \qquad
b(t) \le e^{-\int_0^t\lambda_-}\,\frac12\int_0^t\lVert H\nabla R\rVert.$$

The second has the form of Elkabetz and Cohen's bound (arXiv 2107.06608), with the integral in the
place of $t$ times a constant: what lets descent leave the flow is negative curvature alone.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import LogTime
from gflow.dynamics.field import FlowField, FlowState
from gflow.problem import settings
from gflow.problem.arguments import numbers_of
from gflow.problem.array import Array
from gflow.problem.curvature import ends_of_spectrum, relative_hessian
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights, squared_norm

if TYPE_CHECKING:
    import xarray as xr

MAX_STEPS = 100_000
"""Steps of the explicit solver: enough for log R = -1000 on a small problem."""


class _State(NamedTuple):
    flow: FlowState
    growth: Array
    r"""$-\int\lambda_-\,dt$."""
    bound: Array
    """$b$."""
    force: Array
    r"""$\frac12\int\lVert H\nabla R\rVert\,dt$."""


class _Field(Module):
    """The flow in the clock $s = log(1 + t)$ with growth and bound as states of their own."""

    flow: FlowField

    # With K = H/R and mu = dt/ds R: dt lambda_- = mu kappa_- ds, dt |H grad R| = mu R |K g| ds.
    def __call__(self, s: Any, state: _State, args: Any = None) -> _State:
        problem, weights = self.flow.problem, state.flow.weights
        log_risk, g, product = relative_hessian(problem, weights)
        rate = jnp.exp(s + log_risk)
        growing = -rate * jnp.minimum(ends_of_spectrum(product, weights)[0], 0.0)
        bent = squared_norm(product(g))
        force = rate * jnp.exp(log_risk) * jnp.sqrt(bent) / 2
        return _State(self.flow(s, state.flow), growing, growing * state.bound + force, force)


@settings.own()
def gap_bound(
    problem: Problem, weights: Weights, log_times: np.ndarray, *, rtol: float = 1e-8
) -> "xr.Dataset":
    r"""Bound the gap between descent and flow, per unit of learning rate, at given times.

    $\lVert W_{\text{descent}} - W_{\text{flow}}\rVert \le \eta b(t) + O(\eta^2)$ over all layers at
    equal time $t$, descent with a constant learning rate $\eta$. Curvature and bound are integrated
    along the flow by an explicit solver, in float64: for horizons like log R = -1000, beyond which
    the bound has long been constant.

    Args:
        problem: data, network and loss.
        weights: the start, as for ``gradient_flow``.
        log_times: increasing, minus infinity at the start, as ``log_time`` of a descent's record.
        rtol: relative tolerance of a step.

    Returns:
        A dataset over ``point`` with coordinate ``log_time`` and

        - ``growth``, $-\int_0^t\lambda_-$, the logarithm of how much a disturbance may have grown;
        - ``bound``, $b(t)$;
        - ``uniform_bound``, $e^{\text{growth}}\frac12\int_0^t\lVert H\nabla R\rVert$, the form of
          Elkabetz and Cohen.

        ``attrs["status"]`` is "reached" or "max_steps"; what was not reached is NaN.

    Raises:
        ValueError: when an argument is malformed.
    """
    import xarray as xr

    log_times = numbers_of("log_times", log_times)
    times = np.logaddexp(0.0, log_times)
    if times.ndim != 1 or len(times) == 0 or not np.all(np.isfinite(times)):
        raise ValueError(
            f"`log_times` has shape {times.shape} and values up to {np.max(times, initial=0.0):g}; "
            "expected a vector of logarithms of finite times."
        )
    if not np.all(np.diff(times) > 0):
        raise ValueError("`log_times` is not increasing; expected the times of one run in order.")
    if not 1e-14 <= rtol < 1:
        raise ValueError(f"`rtol` is {rtol}; expected a number from 1e-14 to below 1.")
    with jax.enable_x64(True):
        weights = problem.check(weights)
        *found, complete = _integrate(problem, weights, jnp.asarray(times), jnp.asarray(rtol))
        growth, bound, force = (np.where(np.isfinite(value), value, np.nan) for value in found)
    columns = {
        "growth": (growth, "minus the integral of the negative curvature"),
        "bound": (bound, "bound of the gap over the learning rate"),
        "uniform_bound": (
            np.exp(growth) * force,
            "exp(growth) times half the integral of |H grad R|",
        ),
    }
    return xr.Dataset(
        {k: ("point", v, {"long_name": text, "units": "1"}) for k, (v, text) in columns.items()},
        coords={"log_time": ("point", log_times, {"long_name": "log t", "units": "1"})},
        attrs={
            "rtol": rtol,
            "status": "reached" if complete else "max_steps",
            "message": "every time was reached"
            if complete
            else f"{MAX_STEPS} steps were made; points that were not reached are NaN",
        },
    )


@eqx.filter_jit
def _integrate(
    problem: Problem, weights: Weights, times: Array, rtol: Array
) -> tuple[Array, Array, Array, Array]:
    field = _Field(FlowField(problem, LogTime()))
    start = _State(
        FlowState(jax.tree.map(jnp.asarray, weights), jnp.zeros(())),
        *[jnp.zeros(())] * 3,
    )

    def seen(s: Array, state: _State, args: Any) -> tuple[Array, Array, Array]:
        return state.growth, state.bound, state.force

    found = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        times[-1],
        1e-3 * jnp.minimum(1.0, times[-1]),
        start,
        saveat=diffrax.SaveAt(ts=times, fn=seen),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
        max_steps=MAX_STEPS,
        throw=False,
    )
    assert found.ys is not None
    return (*found.ys, found.result == diffrax.RESULTS.successful)

"""Why a flow cannot go on: what is known of a place where shorter steps do not help."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.checkpoint import End
from gflow.problem.network import Weights, end_to_end
from gflow.problem.observables import is_deep_linear
from gflow.problem.risk import Problem, risk_and_slope

SADDLE = 1e-4
"""A slope that has fallen below this part of the first one, on the level R(0), is that of a saddle:
on which side the flow would leave it is beyond the tolerances."""

LARGE_TERMS = 1e4
"""Margins whose terms are so many times larger have lost digits worth telling."""

EPSILON = float(np.finfo(np.float64).eps)

TIME_CLOCK = "a time clock (`until=gflow.Time(...)`) shows the approach"


def why_stalled(problem: Problem, weights: Weights, first_slope: float, rtol: float) -> End:
    r"""The end of a run on the weights whose steps cannot be made short enough.

    Args:
        problem: what it goes down.
        weights: where it stands.
        first_slope: $|\nabla\log R|$ at the start.
        rtol: relative tolerance of a step.
    """
    log_risk, squared = (float(value) for value in risk_and_slope(problem, weights))
    above = log_risk - float(problem.log_risk_at_zero())
    size = f"|grad log R| = {math.sqrt(squared):.2g}"
    where = f"shorter steps did not help at log R = {log_risk:.6g}, with {size}"
    if above >= 0 and math.sqrt(squared) <= SADDLE * first_slope:
        return End(
            "stalled",
            f"{where} after {first_slope:.2g} at the start, and R is not below that of zero "
            "weights: the flow is running into a saddle, which it may from a start with "
            f"R(W(0)) > R(0); {TIME_CLOCK}",
        )
    if is_deep_linear(problem) and not (solution := problem.data.max_margin()).separable:
        return End("stalled", f"{where}: {solution.verdict}; {TIME_CLOCK}")
    if abs(above) <= 4 * EPSILON * max(1.0, abs(log_risk)):
        return End("precision_lost", f"{where}: {_why_level(problem, weights)}")
    return End(
        "precision_lost",
        f"{where}: the error estimate does not fall with the step, round-off exceeds the "
        f"tolerance{_why_rounded(problem, weights)}; try a larger `rtol` than {rtol:.0e}",
    )


def at_level_zero(problem: Problem, slope: float) -> str:
    """Why a flow from above R(0) whose slope has vanished on that level goes no further."""
    where = f"the flow comes to rest at R = R(0), with |grad log R| = {slope:.2g}"
    if is_deep_linear(problem) and not (solution := problem.data.max_margin()).separable:
        return f"{where}: {solution.verdict}; {TIME_CLOCK}"
    return (
        f"{where}: it runs into a saddle, as it may from a start with R(W(0)) > R(0); {TIME_CLOCK}"
    )


def _why_level(problem: Problem, weights: Weights) -> str:
    """What keeps the risk at that of zero weights, to all of float64's digits."""
    largest = max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in jax.tree.leaves(weights))
    inputs = float(np.max(np.abs(np.asarray(problem.data.inputs))))
    return (
        f"with weights up to {largest:.1g} and inputs up to {inputs:.1g} the margins are below "
        "float64's round-off beside R(0), so that a clock that follows the risk stands still; "
        "start from larger weights, scale the data (`data.scaled()`), or ask for a time "
        "(`until=gflow.LogTime(...)`), whose clock does not"
    )


def _why_rounded(problem: Problem, weights: Weights) -> str:
    """What makes round-off large, where that is known."""
    if not is_deep_linear(problem):
        lowest = lowest_precision(problem, weights)
        if lowest is not None:
            return (
                f": the network computes in {lowest} on its way, with {jnp.finfo(lowest).eps:.0e} "
                "of round-off; let it compute in the type of its weights, float64"
            )
        return (
            ", or the network has a kink there (as ReLU), at which the field jumps and no step "
            "is short enough"
        )
    w, z = np.asarray(end_to_end(weights)), np.asarray(problem.data.signed_inputs)
    terms = float(np.max(np.abs(z) @ np.abs(w)))
    smallest = float(np.min(z @ w))
    if terms < LARGE_TERMS * max(1.0, abs(smallest)):
        return ""
    return (
        f" (margins are sums of terms of size {terms:.1g}, which float64 holds to "
        f"{EPSILON * terms:.0e}, as for data that are almost not separable; once every margin "
        "exceeds 1 the default solver goes on in coordinates without this loss)"
    )


def lowest_precision(problem: Problem, weights: Weights) -> str | None:
    """The type of the shortest numbers on a network's way to its outputs, if not float64."""
    traced = jax.make_jaxpr(lambda at: problem.network.coordinates(at, problem.data))(weights)
    shortest = min(_float_types(traced.jaxpr), key=lambda kind: jnp.finfo(kind).bits, default=None)
    return None if shortest is None or shortest == np.float64 else str(shortest)


def _float_types(jaxpr: "jax.extend.core.Jaxpr") -> set[np.dtype]:  # pyright: ignore
    found: set[np.dtype] = set()
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            kind = getattr(variable.aval, "dtype", None)
            if kind is not None and jnp.issubdtype(kind, jnp.floating):
                found.add(kind)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # closed ones have it inside
            if hasattr(inner, "eqns"):
                found |= _float_types(inner)
    return found

"""Why a flow cannot go on: what is known of a place where shorter steps do not help."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.field import AbstractField
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.stops import AbstractRule
from gflow.problem.array import Array, as_array
from gflow.problem.data import labelled
from gflow.problem.deep_linear import end_to_end
from gflow.problem.losses import AbstractJointLoss
from gflow.problem.memo import once_per_object
from gflow.problem.risk import Problem, level_at_zero, risk_and_slope
from gflow.problem.weights import Weights
from gflow.programs import ONCE, compiled

SADDLE = 1e-4
"""A slope that has fallen below this part of the first one, on the level R(0), is that of a saddle:
on which side the flow would leave it is beyond the tolerances."""

RESIDUAL = 20.0
"""Log risks above that of round-off at which residuals do not vanish."""

LARGE_TERMS = 1e4
"""Margins whose terms are so many times larger have lost digits worth telling."""

UNCERTAIN_MARGIN = 1 / float(np.finfo(np.float64).eps)
"""A margin of this size is uncertain by one: which points share the slope is then no longer known
from float64 weights."""

ONWARDS = (
    "the default solver, on data and networks that allow it, goes on in coordinates that lose "
    "nothing"
)
NO_FURTHER = (
    "coordinates that lose nothing are for one output, and a flow of several ends here: risk, "
    "norms and margins of the record hold, but not what is told from the shares of the points "
    "beyond log R = -1e10"
)
"""Ways on from there, with one output and with several."""

AT_REST = 1e-9
"""A risk that exceeds the least one by this part of it does not fall any more."""

LARGEST_MARGIN = 1e150
"""The square of a larger one may leave float64's range; polynomial tails come to that."""

EPSILON = float(np.finfo(np.float64).eps)


def why_stalled(field: AbstractField, weights: Weights, first_slope: float, rtol: float) -> End:
    r"""The end of a run on the weights whose steps cannot be made short enough.

    Args:
        field: that it follows.
        weights: where it stands.
        first_slope: $|\nabla\log R|$ at the start.
        rtol: relative tolerance of a step.
    """
    why, problem = field.ended(weights), field.problem
    if why is not None:
        return Reason.NO_MEANING.end(why=why)
    log_risk, squared = (float(value) for value in risk_and_slope(problem, weights))
    above, slope = log_risk - level_at_zero(problem), math.sqrt(squared)
    where = {"log_risk": log_risk, "slope": slope}
    if slope > SADDLE * first_slope and problem.network.hidden_kinks(weights, problem.data):
        return Reason.HIDDEN_KINK.end(**where)
    if problem.loss.attained and field.clock.knows_time:  # a saddle is no obstacle to such a clock
        rests = slope <= SADDLE * first_slope and log_risk > problem.loss.least_log_risk + RESIDUAL
        if rests:
            return Reason.RESTS_ON_RESIDUALS.end(**where, first=first_slope)
        return Reason.TIME_IS_ROUND_OFF.end(**where, rtol=rtol)
    level = 4 * EPSILON * max(1.0, abs(log_risk))
    if above >= -level and slope <= SADDLE * first_slope:
        return Reason.SADDLE_AHEAD.end(**where, first=first_slope)
    inseparable = _inseparable(problem, weights)
    if inseparable:
        return Reason.NOT_SEPARABLE.end(**where, verdict=inseparable)
    if abs(above) <= level:
        return Reason.BELOW_ROUND_OFF.end(**where, **_sizes(problem, weights))
    why = _why_rounded(problem, weights)
    return Reason.ROUND_OFF.end(**where, why=why, rtol=rtol)


def at_level_zero(problem: Problem, weights: Weights, slope: float) -> End:
    """The end of a flow from above R(0) whose slope has vanished on that level."""
    inseparable = _inseparable(problem, weights)
    if inseparable:
        return Reason.REST_NOT_SEPARABLE.end(slope=slope, verdict=inseparable)
    return Reason.SADDLE.end(slope=slope)


def end_of_risk(
    problem: Problem, weights: Weights, rules: Sequence[AbstractRule], clock: AbstractClock
) -> tuple[float, End] | None:
    """The risk below which a run is not to go, and why; None where it may.

    Where the infimum is attained it is no end for a run that other rules stop, in a clock that does
    not follow the risk.
    """
    if not problem.loss.attained:
        return wall(problem)
    if clock.knows_time and not all(rule.of_risk for rule in rules):
        return None
    lost, layers = problem.loss.least_log_risk, problem.network.layers(weights)
    rank = 0 if layers is None else min(min(np.shape(matrix)) for matrix in layers)
    least = -math.inf if layers is None else problem.loss.least_log_risk_of(problem.data, rank)
    if least > lost:
        return least + AT_REST, Reason.AT_LEAST_RISK.end(log_risk=least, rank=rank)
    return lost, Reason.RISK_IS_ROUND_OFF.end(log_risk=lost)


@once_per_object
def wall(problem: Problem) -> tuple[float, End]:
    """The risk at which float64 weights end, and why."""
    margins = np.full((problem.num_margins,), LARGEST_MARGIN)
    overflow = float(_log_risk(problem.loss, as_array(margins)))
    if overflow > -UNCERTAIN_MARGIN:
        return overflow, Reason.OVERFLOW.end(log_risk=overflow, margin=LARGEST_MARGIN)
    way = ONWARDS if problem.data.num_classes is None else NO_FURTHER
    return -UNCERTAIN_MARGIN, Reason.UNCERTAIN_MARGINS.end(log_risk=-UNCERTAIN_MARGIN, way=way)


@functools.partial(compiled, options=ONCE)
def _log_risk(loss: AbstractJointLoss, margins: Array) -> Array:
    return loss.terms(margins).log_risk


def _inseparable(problem: Problem, weights: Weights) -> str | None:
    """That the data are not separable, where that keeps a network from risk zero."""
    if problem.network.layers(weights) is None or "margins" not in problem.data.offers:
        return None
    solution = problem.data.max_margin()
    return None if solution.separable else solution.verdict


def _sizes(problem: Problem, weights: Weights) -> dict[str, float]:
    """The largest entries of weights and inputs."""
    largest = max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in jax.tree.leaves(weights))
    inputs = float(np.max(np.abs(np.asarray(problem.data.inputs))))
    return {"weights": largest, "inputs": inputs}


def _why_rounded(problem: Problem, weights: Weights) -> str:
    """What makes round-off large, where that is known."""
    layers = problem.network.layers(weights)
    if layers is None:
        lowest = lowest_precision(problem, weights)
        if lowest is not None:
            return (
                f": the network computes in {lowest} on its way, with {jnp.finfo(lowest).eps:.0e} "
                "of round-off; let it compute in the type of its weights, float64"
            )
        return ""
    if "margins" not in problem.data.offers:
        return ""
    w, z = np.ravel(end_to_end(layers)), np.asarray(labelled(problem.data).signed_inputs)
    terms = float(np.max(np.abs(z) @ np.abs(w)))
    smallest = float(np.min(z @ w))
    rank, several = min(min(np.shape(matrix)) for matrix in layers), problem.data.num_classes
    if several is not None and rank < several - 1 and smallest <= 0:
        return (
            f" (a layer of width {rank} leaves fewer than the {several - 1} directions of "
            f"{several} classes, and not every margin is positive: the risk may have a positive "
            "infimum; widen the layer)"
        )
    if terms < LARGE_TERMS * max(1.0, abs(smallest)):
        return ""
    further = (
        "; once every margin exceeds 1 the default solver goes on in coordinates without this loss"
    )
    return (
        f" (margins are sums of terms of size {terms:.1g}, which float64 holds to "
        f"{EPSILON * terms:.0e}, as for data that are almost not separable"
        f"{further if several is None else ''})"
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

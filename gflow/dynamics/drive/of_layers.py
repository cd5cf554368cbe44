"""What a record holds of a network that is a product of matrices, by what its data ask for."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gflow.problem import observables as obs
from gflow.problem.abstract_data import AbstractData
from gflow.problem.abstract_targets import slowest_rate, targets_of
from gflow.problem.array import as_array
from gflow.problem.class_observables import ClassReference, of_classes
from gflow.problem.data import Dataset, labelled
from gflow.problem.design import others_of
from gflow.problem.max_margin import MaxMargin
from gflow.problem.memo import once_per_object
from gflow.problem.nuclear import least_nuclear
from gflow.problem.risk import Problem, level_at_zero
from gflow.problem.target_observables import TargetReference, of_targets, padded_targets
from gflow.problem.weights import Weights


class OfLayers(NamedTuple):
    """The parts of a record that one kind of answers has, beside those of all."""

    reference: Callable[[Problem, Weights], Any]
    """What observables are measured against, from the start."""
    observe: Callable[[Problem, Weights, Any], dict[str, Any]]
    """The observables at some weights, with the reference; JAX traces it."""
    constants: Callable[[Any], dict[str, np.ndarray]]
    """Variables of the data alone, which have a row in the table of quantities each."""
    facts: Callable[[Problem], dict[str, Any]]
    """Attributes of the problem; asked for once a problem."""
    at_end: Callable[[Any, Weights], dict[str, Any]] = lambda data, last: {}
    """Attributes that depend on the last weights."""


def of_layers(data: AbstractData) -> OfLayers:
    """That of some data."""
    return next(found for offer, found in _BY_OFFER.items() if offer in data.offers)


def _reference_of_labels(problem: Problem, weights: Weights) -> obs.Reference:
    return obs.Reference.of(problem.data.max_margin(), problem, weights)  # pyright: ignore


def _limit_of_labels(data: Dataset) -> dict[str, np.ndarray]:
    """The best direction and the points on the margin: all that the asymptotic laws need."""
    solution = data.max_margin()
    if not solution.separable:
        return _no_limit(solution)
    on = solution.support
    return {
        "max_margin_direction": np.asarray(solution.direction),
        "support": np.asarray(on),
        "support_vectors": np.asarray(data.signed_inputs[on]),
        "dual_weights": np.asarray(solution.dual[on]),
    }


def _limit_of_classes(data: Dataset) -> dict[str, np.ndarray]:
    """The best matrix, and the margins on its edge by their points and the classes beside."""
    solution = data.max_margin()
    if not solution.separable:
        return _no_limit(solution)
    assert data.num_classes is not None
    on = np.asarray(solution.support)
    point, other = np.divmod(on, data.num_classes - 1)  # margins are numbered point by point
    return {
        "max_margin_direction": np.asarray(solution.direction),
        "support": point,
        "support_margins": others_of(data.num_classes)[data.classes[point], other],
        "dual_weights": np.asarray(solution.dual[on]),
    }


def _no_limit(solution: MaxMargin) -> dict[str, np.ndarray]:
    return {"max_margin_direction": np.full_like(solution.direction, np.nan)}


def _limit_of_targets(data: AbstractData) -> dict[str, np.ndarray]:
    """What the modes tend to."""
    targets = targets_of(data)
    solution = targets.least_squares()
    return {
        "mode_targets": padded_targets(targets),
        "least_norm_solution": solution if targets.num_outputs > 1 else solution[0],
    }


@once_per_object  # an ensemble asks for every member
def _facts_of_margins(problem: Problem) -> dict[str, Any]:
    """What claims about margins need to know."""
    data = labelled(problem.data)
    solution = data.max_margin()
    radius = float(problem.loss.pull_radius(data.num_points))
    return {
        "separable": solution.separable,
        "classes_alike": data.classes_alike if data.num_classes is not None else None,
        "max_margin": solution.margin if solution.separable else None,
        "margin_upper_bound": solution.margin_upper,
        "pull_radius": None if math.isnan(radius) else radius,
        "next_margin_gap": _next_gap(data, solution),
    }


def _next_gap(data: Dataset, solution: MaxMargin) -> float | None:
    r"""The least $\langle z_i, \bar u\rangle/\gamma - 1$ of a margin that is not the smallest."""
    if not solution.separable or len(solution.support) == len(solution.dual):
        return None
    direction = np.asarray(solution.direction) / solution.margin
    gaps = np.asarray(data.margins_of(as_array(data.inputs @ direction.T))) - 1
    return float(np.min(np.delete(gaps, solution.support)))


@once_per_object
def _facts_of_targets(problem: Problem) -> dict[str, Any]:
    """What claims about targets need to know of the data.

    The least nuclear norm, and its proof, where it is not that of the solution of least norm.
    """
    data = targets_of(problem.data)
    least_norm, least = least_nuclear(data), problem.loss.least_log_risk_of(data, data.dim)
    lost = problem.loss.least_log_risk
    return {
        "log_risk_of_zero": level_at_zero(problem),
        "round_off_log_risk": lost,
        "least_log_risk": least if least > lost else None,
        "whitened": data.whitened,
        "least_nuclear_norm": None if least_norm is None else least_norm.norm,
        "nuclear_norm_bound": None if least_norm is None else least_norm.lower,
    }


def _rate_of_targets(data: AbstractData, last: Weights) -> dict[str, Any]:
    return {"slowest_rate": slowest_rate(targets_of(data), tuple(map(np.asarray, last)))}


_BY_OFFER = {
    "one output": OfLayers(_reference_of_labels, obs.standard, _limit_of_labels, _facts_of_margins),
    "classes": OfLayers(ClassReference.of, of_classes, _limit_of_classes, _facts_of_margins),
    "targets": OfLayers(
        lambda problem, weights: TargetReference.of(targets_of(problem.data), weights),
        of_targets,
        _limit_of_targets,
        _facts_of_targets,
        _rate_of_targets,
    ),
}

"""From saved weights to a record: the part of a run that flow and descent share."""

import functools
import hashlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np

from gflow import record
from gflow.dynamics import extras
from gflow.dynamics.extras import Observable as Observable
from gflow.names import merged
from gflow.problem import observables as obs
from gflow.problem.arguments import flag
from gflow.problem.max_margin import MaxMargin
from gflow.problem.network import Array, Weights, widths
from gflow.problem.risk import Problem
from gflow.quantities import QUANTITIES

if TYPE_CHECKING:
    import xarray as xr


class Recorder:
    """Evaluates observables on saved states as a run goes on and builds the record at its end.

    Only the observables' values are kept, and the weights too if asked for, so that memory does
    not grow with the number of steps. It may be built at any time of a run: what it holds is valid.
    """

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        observables: Mapping[str, Observable] | None,
        keep_weights: bool,
    ):
        self.problem = problem
        self.start = weights
        self.extra = extras.checked(observables, problem, weights)
        self.keep_weights = bool(flag("keep_weights", keep_weights))
        self.deep_linear = obs.is_deep_linear(problem)
        self.reference = None
        if self.deep_linear:
            solution = problem.data.max_margin()
            self.reference = obs.Reference.of(solution, problem, weights)
        self.points: list[dict[str, Any]] = []
        self.kept: list[Weights] = []
        self.last = weights
        self.began = time.perf_counter()

    def save(
        self, weights: Weights, values: Mapping[str, Any] | None = None, **scalars: Any
    ) -> None:
        """Add one point: its observables, and ``scalars`` that the caller knows.

        Args:
            weights: where the run stands.
            values: observables known better than from the weights, which replace them.
            scalars: further variables.
        """
        found = {**_evaluate(self.problem, weights, self.reference), **(values or {})}
        more = extras.evaluate(self.extra, self.problem, weights)
        self.points.append(merged(found, more, scalars))
        self.last = weights
        if self.keep_weights:
            self.kept.append(jax.tree.map(np.asarray, weights))

    def save_all(
        self,
        weights: Weights,
        found: Mapping[str, np.ndarray],
        *,
        scaled_time: np.ndarray,
        **columns: np.ndarray,
    ) -> None:
        """Add points of a flow that were observed together, on a leading axis.

        Args:
            weights: the states.
            found: their observables.
            scaled_time: $tR$ at each.
            **columns: further variables.
        """
        with np.errstate(divide="ignore"):
            log_time = np.log(scaled_time) - found["log_risk"]
        columns = {**found, **columns, "log_time": log_time}
        for k in range(len(scaled_time)):
            self.points.append({name: values[k] for name, values in columns.items()})
            self.last = jax.tree.map(lambda leaf, k=k: leaf[k], weights)
            if self.keep_weights:
                self.kept.append(self.last)

    @property
    def num_steps(self) -> int:
        """Of the run at the last saved point."""
        return int(self.points[-1]["num_steps"])

    def seconds(self) -> float:
        """Wall time of the run, that before it was resumed included."""
        return time.perf_counter() - self.began

    def columns(self, num_points: int) -> dict[str, list[Any]]:
        """The values of each variable at the first ``num_points`` saved points."""
        points, kept = self.points[:num_points], self.kept[:num_points]
        columns = {name: [point[name] for point in points] for name in points[0]}
        for index, (name, _) in enumerate(_named(self.start) if self.keep_weights else []):
            columns[name] = [jax.tree.leaves(weights)[index] for weights in kept]
        return columns

    def resume(self, columns: Mapping[str, np.ndarray], last: Weights, elapsed: float) -> None:
        """Take over the points of an earlier part of the run, which ended at weights ``last``."""
        columns = dict(columns)
        if self.keep_weights:
            leaves = [columns.pop(name) for name, _ in _named(self.start)]
            structure = jax.tree.structure(self.start)
            self.kept = [
                jax.tree.unflatten(structure, point) for point in zip(*leaves, strict=True)
            ]
        count = len(columns["num_steps"])
        self.points = [{name: columns[name][i] for name in columns} for i in range(count)]
        self.last, self.began = last, time.perf_counter() - elapsed

    def record(self, more: Mapping[str, np.ndarray] | None = None, **attrs: Any) -> "xr.Dataset":
        """The record of all points saved so far, with ``more`` variables and provenance."""
        return record.build(**self.contents(more, **attrs))

    def contents(self, more: Mapping[str, np.ndarray] | None = None, **attrs: Any) -> dict:
        """The arguments of ``record.build`` for this record."""
        columns = merged(self.columns(len(self.points)), more or {})
        dims: dict[str, tuple[str, ...]] = {}
        constants: dict[str, tuple[tuple[str, ...], Any, str]] = {}
        for label, weights in (("initial", self.start), ("final", self.last)):
            for name, leaf in _named(weights):
                axes = tuple(f"{name}_{axis}" for axis in range(leaf.ndim))
                constants[f"{label}_{name}"] = (axes, leaf, f"{label} {name}")
        if self.keep_weights:
            for name, leaf in _named(self.start):
                dims[name] = tuple(f"{name}_{axis}" for axis in range(np.ndim(leaf)))
        if self.deep_linear:
            for name, value in self._of_data().items():
                constants[name] = (QUANTITIES[name].dims, value, QUANTITIES[name].meaning)
        return {
            "points": columns,
            "constants": constants,
            "extra_dims": dims,
            "attrs": {"wall_time": self.seconds(), **attrs, **self._provenance()},
        }

    def _of_data(self) -> dict[str, np.ndarray]:
        """The best direction and the points on the margin: all that the asymptotic laws need."""
        data, solution = self.problem.data, self.problem.data.max_margin()
        if not solution.separable:
            return {"max_margin_direction": np.full(data.dim, np.nan)}
        on = solution.support
        return {
            "max_margin_direction": np.asarray(solution.direction),
            "support": np.asarray(on),
            "support_vectors": np.asarray(data.signed_inputs[on]),
            "dual_weights": np.asarray(solution.dual[on]),
        }

    def _provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for _, leaf in _named(self.start):
            digest.update(np.ascontiguousarray(leaf, dtype=np.float64).tobytes())
        facts = {**_facts(Itself(self.problem)), "start_sha256": digest.hexdigest()}
        return facts | ({"widths": widths(self.start)} if self.deep_linear else {})


class Itself:
    """A problem, equal to itself only: a key of a cache."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.problem is other.problem

    def __hash__(self) -> int:
        return id(self.problem)


@functools.lru_cache(maxsize=4)  # an ensemble asks for every member
def _facts(of: Itself) -> dict[str, Any]:
    """What a record says about its problem."""
    problem, data = of.problem, of.problem.data
    facts: dict[str, Any] = {
        "dataset": data.name,
        "num_points": data.num_points,
        "network": type(problem.network).__name__,
        "loss": repr(problem.loss),
        "exponential_tail": problem.loss.exponential_tail,
        "slope_bound": float(problem.loss.slope_bound),
        "smoothness": float(problem.loss.smoothness),
        "log_risk_at_zero": float(problem.log_risk_at_zero()),
    }
    if obs.is_deep_linear(problem):
        solution = data.max_margin()
        radius = float(problem.loss.pull_radius(data.num_points))
        facts |= {
            "separable": solution.separable,
            "max_margin": solution.margin if solution.separable else None,
            "margin_upper_bound": solution.margin_upper,
            "pull_radius": None if math.isnan(radius) else radius,
            "next_margin_gap": _next_gap(np.asarray(data.signed_inputs), solution),
        }
    return facts


def _next_gap(signed_inputs: np.ndarray, solution: MaxMargin) -> float | None:
    r"""The least $\langle z_i, \bar u\rangle/\gamma - 1$ of a point that is not on the margin."""
    if not solution.separable or len(solution.support) == len(signed_inputs):
        return None
    gaps = signed_inputs @ (solution.direction / solution.margin) - 1
    return float(np.min(np.delete(gaps, solution.support)))


@eqx.filter_jit
def _evaluate(
    problem: Problem,
    weights: Weights,
    reference: obs.Reference | None,
) -> dict[str, Array]:
    if reference is None:
        return obs.general(problem, weights)
    return obs.standard(problem, weights, reference)


@eqx.filter_jit
def observe_members(
    problem: Problem, designs: Array, weights: Weights, references: obs.Reference
) -> dict[str, Array]:
    """The standard observables of deep linear networks, shape (members, points, …).

    Args:
        problem: of one member; that of the others differs in its design only.
        designs: of every member, on a leading axis, or one that all share.
        weights: states, on axes (members, points).
        references: what each member is measured against, on a leading axis.
    """

    def observe(design: Array, states: Weights, reference: obs.Reference) -> dict[str, Array]:
        own = eqx.tree_at(lambda p: p.design, problem, design)
        return jax.vmap(lambda at: obs.standard(own, at, reference))(states)

    shared = None if designs.ndim == 2 else 0
    return jax.vmap(observe, in_axes=(shared, 0, 0))(designs, weights, references)


def _named(weights: Weights) -> list[tuple[str, np.ndarray]]:
    """Each array of the weights under the name it has in a record: ``weights_1`` at the input."""
    leaves = enumerate(jax.tree.leaves(weights), start=1)
    return [(f"weights_{k}", np.asarray(leaf)) for k, leaf in leaves]

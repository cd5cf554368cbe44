"""From saved weights to a record: the part of a run that flow and descent share."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gflow import record
from gflow.dynamics.drive import extras
from gflow.dynamics.drive.extras import Observable as Observable
from gflow.dynamics.drive.of_layers import of_layers
from gflow.names import merged
from gflow.problem import observables as obs
from gflow.problem.arguments import flag
from gflow.problem.array import Array, as_array
from gflow.problem.deep_linear import widths
from gflow.problem.dense import names
from gflow.problem.memo import once_per_object
from gflow.problem.risk import Problem, has_few_margins, level_at_zero
from gflow.problem.weights import Weights, size_of
from gflow.programs import by_size
from gflow.quantities import QUANTITIES

if TYPE_CHECKING:
    import xarray as xr


BUFFER = 2**21
"""Numbers in a buffer of states, at most."""

ROWS, ROWS_OF_MANY = 128, 32
"""States in a buffer, at most, of a run by itself, and of each of several side by side: the host is
to be asked seldom, and the buffers of all lanes are cleared at each call."""


def rows_for(weights: Weights, width: int = 1) -> int:
    """How many states of each of ``width`` members are observed, or saved, in one call."""
    most = ROWS if width == 1 else ROWS_OF_MANY
    return max(1, min(most, BUFFER // (size_of(weights) * width)))


def filled(leaf: np.ndarray, rows: int) -> np.ndarray:
    """A buffer of so many rows that begins with those of ``leaf``."""
    if len(leaf) == rows:
        return leaf
    buffer = np.zeros((rows, *leaf.shape[1:]), leaf.dtype)
    buffer[: len(leaf)] = leaf
    return buffer


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
        self.layers = problem.network.layers(weights)
        """The matrices whose product the network is, at the start; None if it is none."""
        self.reference = (
            None if self.layers is None else of_layers(problem.data).reference(problem, weights)
        )
        self.blocks: list[dict[str, np.ndarray]] = []
        """The variables of so many saved points together, the points on a leading axis."""
        self.last = weights
        self.more: Callable[[], Mapping[str, np.ndarray]] | None = None
        """Gives further variables of the run as a whole, with a row in the table each."""
        self.began = time.perf_counter()

    def add(
        self,
        weights: Weights,
        rows: Sequence[int],
        more: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        seen: Problem | None = None,
    ) -> None:
        """Add points: their observables, and what the run knows of them.

        Args:
            weights: a buffer of states, on a leading axis.
            rows: the states to record, in order.
            more: from the observables, by name, with the points on a leading axis, to further
                variables, and to observables known better than from the weights.
            seen: the problem as it is there, where it is not that of the run: in a pattern of
                gates, whose slides the gradient does not see.
        """
        found = self._observed(seen or self.problem, weights, rows)

        def at(row: int) -> Weights:
            return jax.tree.map(lambda leaf: np.asarray(leaf[row]), weights)

        added: dict[str, np.ndarray] = {}
        if self.extra or self.keep_weights:
            own = [self._asked_for(at(row)) for row in rows]
            added = {name: np.stack([each[name] for each in own]) for name in own[0]}
        self.blocks.append(merged({**found, **more(found)}, added))
        self.last = at(rows[-1])

    def add_one(self, weights: Weights, values: Mapping[str, Any]) -> None:
        """Add the point at some weights, with what the run knows of it."""
        rows = rows_for(weights)
        buffer = jax.tree.map(lambda leaf: filled(np.asarray(leaf)[None], rows), weights)
        columns = {name: np.asarray(value)[None] for name, value in values.items()}
        self.add(buffer, [0], lambda _: columns)

    def _asked_for(self, weights: Weights) -> dict[str, Any]:
        """What a record has at some weights because the caller asked for it."""
        kept = dict(_named(weights)) if self.keep_weights else {}
        return merged(extras.evaluate(self.extra, self.problem, weights), kept)

    def _observed(
        self, problem: Problem, weights: Weights, rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """The observables of some rows of a buffer, as one call of a compiled program."""
        size = jax.tree.leaves(weights)[0].shape[0]
        chosen = as_array(np.array([*rows, *[0] * (size - len(rows))]))
        count = as_array(np.int64(len(rows)))
        few, weights = has_few_margins(problem), problem.network.placed(weights)
        found = _observe(problem, weights, chosen, count, self.reference, few=few)
        return {name: _wide(np.asarray(values)[: len(rows)]) for name, values in found.items()}

    @property
    def num_steps(self) -> int:
        """Of the run at the last saved point."""
        return int(self.last_of("num_steps"))

    @property
    def num_points(self) -> int:
        """How many points are saved."""
        return sum(len(block["num_steps"]) for block in self.blocks)

    def last_of(self, name: str) -> Any:
        """The value of a variable at the last saved point."""
        return self.blocks[-1][name][-1]

    def column(self, name: str) -> np.ndarray:
        """The values of a variable at all points so far."""
        return np.concatenate([block[name] for block in self.blocks])

    def seconds(self) -> float:
        """Wall time of the run, that before it was resumed included."""
        return time.perf_counter() - self.began

    def columns(self, num_points: int | None = None) -> dict[str, np.ndarray]:
        """The values of each variable at the first ``num_points`` saved points, or at all."""
        return {name: self.column(name)[:num_points] for name in self.blocks[0]}

    def resume(self, columns: Mapping[str, np.ndarray], last: Weights, elapsed: float) -> None:
        """Take over the points of an earlier part of the run, which ended at weights ``last``."""
        self.blocks = [dict(columns)]
        self.last, self.began = last, time.perf_counter() - elapsed

    def record(self, more: Mapping[str, np.ndarray] | None = None, **attrs: Any) -> "xr.Dataset":
        """The record of all points saved so far, with ``more`` variables and provenance."""
        return record.build(**self.contents(more, **attrs))

    def contents(self, more: Mapping[str, np.ndarray] | None = None, **attrs: Any) -> dict:
        """The arguments of ``record.build`` for this record."""
        columns = merged(self.columns(), more or {})
        dims: dict[str, tuple[str, ...]] = {}
        constants: dict[str, tuple[tuple[str, ...], Any, str]] = {}
        for label, weights in (("initial", self.start), ("final", self.last)):
            for name, leaf in _named(weights):
                axes = tuple(f"{name}_{axis}" for axis in range(leaf.ndim))
                constants[f"{label}_{name}"] = (axes, leaf, f"{label} {name}")
        if self.keep_weights:
            for name, leaf in _named(self.start):
                dims[name] = tuple(f"{name}_{axis}" for axis in range(np.ndim(leaf)))
        if self.layers is not None:
            for name, value in of_layers(self.problem.data).constants(self.problem.data).items():
                row = QUANTITIES[name]
                constants[name] = (row.dims_of(np.ndim(value)), value, row.meaning)
        elif (dense := self.problem.network.dense_layers(self.start)) is not None:
            least = np.array([min(np.shape(matrix)) ** -0.5 for matrix in dense])
            row = QUANTITIES["least_ratio"]
            constants["least_ratio"] = (row.dims, least, row.meaning)
        for name, value in ({} if self.more is None else self.more()).items():
            row = QUANTITIES[name]
            constants[name] = (row.dims_of(np.ndim(value)), value, row.meaning)
        return {
            "points": columns,
            "constants": constants,
            "extra_dims": dims,
            "attrs": {"wall_time": self.seconds(), **attrs, **self._provenance()},
        }

    def _provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for _, leaf in _named(self.start):
            digest.update(np.ascontiguousarray(leaf, dtype=np.float64).tobytes())
        facts = {**_facts(self.problem), "start_sha256": digest.hexdigest()}
        if self.layers is not None:
            own, data = of_layers(self.problem.data), self.problem.data
            facts |= own.facts(self.problem) | own.at_end(data, self.last)
            facts["widths"] = widths(self.layers)
        elif self.problem.network.dense_layers(self.start) is not None:
            layers, rest = names(self.problem.network, self.start)
            facts |= {"layer_names": layers, "leaf_names": rest or None}
        return facts


@once_per_object  # an ensemble asks for every member
def _facts(problem: Problem) -> dict[str, Any]:
    """What a record says about its problem."""
    data = problem.data
    return {
        "dataset": data.name,
        "num_points": data.num_points,
        "num_classes": data.num_classes,
        "num_targets": data.num_outputs if "targets" in data.offers else None,
        "network": type(problem.network).__name__,
        "loss": repr(problem.loss),
        "exponential_tail": problem.loss.exponential_tail,
        "slope_bound": float(problem.loss.slope_bound),
        "smoothness": float(problem.loss.smoothness),
        "log_risk_at_zero": None if problem.loss.attained else level_at_zero(problem),
    }


@by_size
def _observe(
    problem: Problem,
    weights: Weights,
    rows: Array,
    count: Array,
    reference: Any,
) -> dict[str, Array]:
    """The observables of the first ``count`` of ``rows``, one after the other."""

    @jax.jit  # traced once, for the shapes and for the loop
    def one(row: Array) -> dict[str, Array]:
        at = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], weights)
        if reference is None:
            return obs.general(problem, at)
        return of_layers(problem.data).observe(problem, at, reference)

    def put(k: Array, found: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda column, value: column.at[k].set(value), found, one(rows[k]))

    shapes = jax.eval_shape(one, rows[0])
    blank = jax.tree.map(lambda leaf: jnp.zeros((rows.shape[0], *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, count, put, blank)


def _wide(values: np.ndarray) -> np.ndarray:
    """Real numbers as float64, whatever they were computed in."""
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _named(weights: Weights) -> list[tuple[str, np.ndarray]]:
    """Each array of the weights under the name it has in a record: ``weights_1`` at the input."""
    leaves = enumerate(jax.tree.leaves(weights), start=1)
    return [(f"weights_{k}", np.asarray(leaf)) for k, leaf in leaves]

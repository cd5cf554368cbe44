"""Lanes for descents: many members, or a single one, in one call of the loop of descent.

Members of one call share the shapes, and all of the optimiser but its numbers. Those that are done
wait for the others, which is why a call takes about a quarter of a second.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.descending.method import advance
from gflow.dynamics.drive.drive import AbstractLanes
from gflow.dynamics.drive.progress import Pace

if TYPE_CHECKING:
    from gflow.dynamics.descending.run import DescentRun

STEPS_AT_FIRST = 64
"""Length of the first call, before the speed is known."""


class DescentLanes(AbstractLanes):
    """Descents in the lanes of one device.

    Args:
        alike: all runs that are to pass through these lanes, or others of the same program.
        width: how many are side by side.
    """

    def __init__(self, alike: "Sequence[DescentRun]", width: int):
        super().__init__(width)
        self.pace = Pace(STEPS_AT_FIRST)
        whole = [jax.tree.leaves((run.descent, run.watch)) for run in alike]
        self.shared = [
            all(each is column[0] or np.array_equal(each, column[0]) for each in column)
            for column in zip(*whole, strict=True)
        ]
        """Which arrays of the problem, the optimiser and the rules all have in common."""

    def seat(self, places: Sequence[int]) -> None:
        for k in places:
            self.seats[k].in_lanes |= len(self.seats) > 1
            self.seats[k].seated = True

    def advance(self, waiting: bool) -> "list[tuple[DescentRun, tuple]]":
        runs = [run for run in self.seats if run is not None]
        requests = [run.request(self.pace.size) for run in runs]
        before, began = [run.num_steps for run in runs], time.perf_counter()
        if len(self.seats) == 1:
            answers = [advance(*requests[0])]
        else:
            answers = self._joined(requests)
        made = [int(after.num_steps) for after, _, _ in answers]
        full = max(map(int.__sub__, made, before)) == self.pace.size
        self.pace.took(time.perf_counter() - began, full=full)
        return list(zip(runs, answers, strict=True))

    def _joined(self, requests: list[Any]) -> list[Any]:
        """The answers to several requests, by one call."""
        structure, told = kind_of(requests[0])
        # Filled up to one size, so that it is compiled once, with calls that make no step.
        descent, watch, carry, _, goals = requests[0]
        idle = (descent, watch, carry, jnp.asarray(int(carry.num_steps)), goals)
        filled = requests + [idle] * (len(self.seats) - len(requests))
        columns = list(zip(*(jax.tree.leaves(request) for request in filled), strict=True))
        shared = self.shared + [False] * (len(columns) - len(self.shared))
        varying, axes = [], []
        for column, leaf, same in zip(columns, told, shared, strict=True):
            if isinstance(leaf, _Shape):
                axes.append(None if same else 0)
                varying.append(column[0] if same else _stacked(column, weak=leaf[-1]))
        after = jax.device_get(_advance_all(structure, told, tuple(axes), *varying))
        return [jax.tree.map(lambda leaf, k=k: leaf[k], after) for k in range(len(requests))]


def kind_of(request: Any) -> tuple[Any, tuple[Any, ...]]:
    """What requests that can be joined have in common: all but the numbers in their arrays."""
    leaves, structure = jax.tree.flatten(request)
    return structure, tuple(
        _Shape((leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)))
        if isinstance(leaf, jax.Array | np.ndarray | np.generic)
        else leaf
        for leaf in leaves
    )


class _Shape(tuple):
    """Of an array, and whether it is weakly typed; a leaf of another kind stands for itself."""

    __slots__ = ()


def _stacked(column: Sequence[Any], *, weak: bool) -> Any:
    """Arrays on a new leading axis; numbers of an optimiser stay weakly typed."""
    return jnp.stack(column) if weak else np.stack([np.asarray(each) for each in column])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance_all(structure: Any, told: Any, axes: Any, *varying: Any) -> Any:
    def one(*arrays: Any) -> Any:
        ready = iter(arrays)
        leaves = [next(ready) if isinstance(leaf, _Shape) else leaf for leaf in told]
        return advance(*jax.tree.unflatten(structure, leaves))

    return jax.vmap(one, in_axes=axes)(*varying)

"""Lanes for flows: many members, or a single one, in one call of the march."""

import dataclasses
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from gflow.dynamics.drive.drive import AbstractLanes
from gflow.dynamics.drive.progress import Pace
from gflow.dynamics.drive.recorder import rows_for
from gflow.dynamics.field import FlowState
from gflow.dynamics.march.lane import Lane, Member, watching
from gflow.dynamics.march.loop import choose, march, start
from gflow.dynamics.reasons import Reason
from gflow.problem.array import as_array
from gflow.problem.risk import has_few_margins
from gflow.problem.sharding import gathered
from gflow.problem.weights import size_of

if TYPE_CHECKING:
    from gflow.dynamics.drive.flow_run import FlowRun

TRIPS_AT_FIRST, EXPLICIT = 128, 4
"""Steps tried in the first call, before their speed is known, and so many times as many where no
step is worked on; fewer where few states fit a buffer, whose weights are large."""


def program_of(member: Member, *more: Hashable) -> Hashable:
    """What runs that can share a program have in common: all of a member but its numbers."""
    leaves, structure = jax.tree.flatten(member)
    kinds = tuple((np.shape(leaf), str(leaf.dtype)) if _is_array(leaf) else leaf for leaf in leaves)
    return structure, kinds, *more


class Stand(NamedTuple):
    """Where a flow stands on the weights."""

    s: float
    state: FlowState
    num_steps: int


class Report:
    """What a call of the march has come to for one run, and where the run stands in its lanes.

    Attributes:
        reason: why the lane stopped, RUNNING if it did not.
        num_steps, num_rejected: so far.
        tally: the solver's own counts.
        num_saved: how many states on goals there are.
        rows: of a buffer, the first of which are those states; None where there is none.
    """

    def __init__(self, lanes: "FlowLanes", k: int, scalars: Any, tally: Any, rows: Any):
        self.lanes, self.k, self.tally, self.rows = lanes, k, tally, rows
        self.num_saved = int(scalars["num_saved"])
        self.reason = Reason(int(scalars["reason"]))
        self.num_steps = int(scalars["num_steps"])
        self.num_rejected = int(scalars["num_rejected"])

    @property
    def lane(self) -> Lane:
        """The lane by itself."""
        return self.lanes.at(self.k)

    @property
    def stand(self) -> Stand:
        """Where the lane stands."""
        return self.lanes.stand_at(self.k)

    def row(self, row: int) -> Stand:
        """A saved state."""
        at = jax.tree.map(lambda leaf: leaf[row], self.rows)
        return Stand(float(at.s), at.state, int(at.num_steps))

    def replace(self, lane: Lane) -> None:
        """Let the run go on from another state."""
        self.lanes.put(self.k, lane)


class FlowLanes(AbstractLanes):
    """Members in the lanes of one device.

    Args:
        alike: all runs that are to pass through these lanes, or others of the same program.
        width: how many are side by side. A single one has no leading axis: large matrices then go
            through the same products as in a program written for one.
    """

    def __init__(self, alike: "Sequence[FlowRun]", width: int):
        super().__init__(width)
        self.many = width > 1
        self.method, self.watches = alike[0].method, alike[0].watches_stiffness
        self.rows = min(rows_for(alike[0].weights, width), alike[0].most_rows)
        self.few = not self.many and has_few_margins(alike[0].problem)
        # Corrections multiply matrices, which a library does faster than one function of all.
        whole = alike[0].problem.network.mesh is None
        self.at_once = self.few and whole and not self.method.iterates
        columns = list(zip(*(jax.tree.leaves(run.member) for run in alike), strict=True))
        self.own = [
            _is_array(column[0])
            and (not self.many or not all(_equal(column[0], each) for each in column))
            for column in columns
        ]
        trips = TRIPS_AT_FIRST * (1 if self.method.iterates else EXPLICIT)
        self.pace = Pace(min(trips, 4 * self.rows), size_of(alike[0].weights))
        self.lane: Lane | None = None
        self._stands: tuple[Lane, Any] | None = None
        """Lanes, and on the host where they stand."""
        self.done = np.zeros(2)

    @property
    def work(self) -> tuple[float, float]:
        return float(self.done[0]), float(self.done[1])

    def seat(self, places: Sequence[int]) -> None:
        for k in places:
            self.seats[k].in_lanes |= self.many
            self.seats[k].seated = True
        self._stack()
        member, shared = self._members()
        resumed: dict[int, Lane] = {}
        for k in places:
            if (lane := self.seats[k].resumed) is not None:
                resumed[k], self.seats[k].resumed = watching(lane, bool(shared.rules)), None
        if not self.many:
            self.lane = resumed.get(0)
            if self.lane is None:
                self.lane = start(member, shared, self.method, *self.seats[0].standing())
            return
        spare = self.seats[places[0]].standing()
        standing = [run.standing() if k in places else spare for k, run in enumerate(self.seats)]
        fresh = start(member, shared, self.method, *_stacked(standing), many=True)
        which = as_array(np.isin(np.arange(len(self.seats)), places))
        self.lane = fresh if self.lane is None else choose(which, fresh, self.lane)
        for k, lane in resumed.items():
            self.put(k, lane)

    def advance(self, waiting: bool) -> "list[tuple[FlowRun, tuple]]":
        width = len(self.seats)
        idle = sum(run is None for run in self.seats)
        enough = min(width, idle + max(1, width // 16)) if waiting else width
        member, shared = self._members()
        began = time.perf_counter()
        assert self.lane is not None
        trips = self.pace.size
        lane, saved, made, busy = march(
            member,
            shared,
            self.method,
            self.lane,
            as_array(np.int64(trips)),
            as_array(np.int64(enough)),
            self.rows,
            self.watches,
            self.many,
            self.at_once,
            few=self.few,
        )
        self.lane = lane
        names = ("reason", "num_steps", "num_rejected")
        asked = {name: getattr(lane, name) for name in names} | {"num_saved": saved.count}
        told = jax.device_get((asked, self.method.tally(lane.memory)))
        self.pace.took(time.perf_counter() - began, full=int(made) == trips)
        # Most calls fill no row of a buffer that may be as large as the weights.
        rows = gathered(saved.rows) if np.any(told[0]["num_saved"]) else None
        self.done += float(busy), float(made) * width
        found = []
        for k, run in enumerate(self.seats):
            if run is not None:
                scalars, tally = (
                    jax.tree.map(lambda leaf, k=k: leaf[k], told) if self.many else told
                )
                own = jax.tree.map(lambda leaf, k=k: leaf[k], rows) if self.many else rows
                found.append((run, (Report(self, k, scalars, tally, own),)))
        return found

    def close(self) -> None:
        for run in self.seats:
            if run is not None:
                run.interrupt()

    def at(self, k: int) -> Lane:
        """The lane in place k by itself."""
        assert self.lane is not None
        return _take(self.lane, np.int64(k)) if self.many else self.lane

    def stand_at(self, k: int) -> Stand:
        """Where the lane in place k stands."""
        lane = self.lane
        assert lane is not None
        if not self.many:
            return Stand(float(lane.s), lane.state, int(lane.num_steps))
        if self._stands is None or self._stands[0] is not lane:  # one by one costs a call each
            self._stands = lane, jax.device_get((lane.s, lane.state, lane.num_steps))
        s, state, num_steps = jax.tree.map(lambda leaf: leaf[k], self._stands[1])
        return Stand(float(s), state, int(num_steps))

    def put(self, k: int, lane: Lane) -> None:
        """Replace the lane in place k."""
        assert self.lane is not None
        self.lane = _put(self.lane, np.int64(k), lane) if self.many else lane

    def settle(self) -> None:
        """Let lanes that stopped for their run go on, some of them to other goals."""
        assert self.lane is not None
        again = np.array([run is not None and run.end is None for run in self.seats])
        anew = again & np.array([run is not None and run.anew for run in self.seats])
        lane = self.lane
        if not self.many:
            if again[0]:
                lane = dataclasses.replace(lane, reason=as_array(np.int64(Reason.RUNNING)))
            if anew[0]:
                self._stack()  # its network may be in another pattern
                lane = at_no_goal(lane)
        else:
            idle = np.where(again, np.int64(Reason.RUNNING), np.int64(Reason.ARRIVED))
            lane = dataclasses.replace(lane, reason=as_array(idle))
            if anew.any():
                lane = choose(as_array(anew), at_no_goal(lane), lane)
        for run in self.seats:
            if run is not None:
                run.anew = False
        self.lane = lane

    def _stack(self) -> None:
        """Bring together what the runs in the lanes follow: their own, stacked, and shared."""
        spare = next(run for run in self.seats if run is not None)
        runs = [spare if run is None else run for run in self.seats]
        columns = zip(*(jax.tree.leaves(run.member) for run in runs), strict=True)
        structure = jax.tree.structure(spare.member)
        own, shared = [], []
        for column, apart in zip(columns, self.own, strict=True):
            kept = np.stack(column) if apart and self.many else column[0]
            own.append(kept if apart else None)
            shared.append(None if apart else kept)
        nothing = jax.tree.map(lambda _: None, spare.goals(self.rows))
        self.followed = jax.tree.unflatten(structure, own)
        self.shared = dataclasses.replace(jax.tree.unflatten(structure, shared), goals=nothing)

    def _members(self) -> tuple[Member, Member]:
        """What the lanes follow, with their goals as they are now, and what all share."""
        spare = next(run for run in self.seats if run is not None)
        goals = [(spare if run is None else run).goals(self.rows) for run in self.seats]
        wanted = _stacked(goals) if self.many else goals[0]
        return dataclasses.replace(self.followed, goals=wanted), self.shared


def at_no_goal(lane: Lane) -> Lane:
    """A lane, or lanes, on the way to the first of a new list of goals."""
    none = as_array(np.zeros(np.shape(lane.reason), np.int64))
    return dataclasses.replace(lane, clock_goal=none, steps_goal=none, reason=none)


@eqx.filter_jit
def _take(lanes: Lane, k: Any) -> Lane:
    return jax.tree.map(lambda leaf: leaf[k], lanes)


@eqx.filter_jit
def _put(lanes: Lane, k: Any, lane: Lane) -> Lane:
    return jax.tree.map(lambda leaf, one: leaf.at[k].set(one), lanes, lane)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _equal(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(a, b)

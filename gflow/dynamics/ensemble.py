"""Many trajectories at once: one labelled record with a dimension ``member``."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from gflow.dynamics import lanes as lane
from gflow.dynamics.certify import evidence
from gflow.dynamics.clocks import LogRisk as LogRiskClock
from gflow.dynamics.descent import gradient_descent
from gflow.dynamics.field import FlowState
from gflow.dynamics.flow import HAND_OVER_AT, gradient_flow
from gflow.dynamics.gauss_newton import DIRECT, GaussNewton
from gflow.dynamics.recorder import Recorder
from gflow.dynamics.stepping import default_atol
from gflow.dynamics.until import AbstractRule, AnyOf, LogRisk, as_rules, save_grid
from gflow.problem.network import Weights, as_array
from gflow.problem.observables import is_deep_linear
from gflow.problem.risk import ROUND_OFF, Problem, risk_and_slope

if TYPE_CHECKING:
    import xarray as xr

TRIPS = 2_000
"""Trips of the lanes between two looks of the host at the latest."""

NOT_BATCHED = {"observables", "checkpoint", "certify", "clock", "solver", "modified"}
"""Arguments of ``gradient_flow`` with which members go one after the other."""


def ensemble(
    problem: Problem | Sequence[Problem],
    weights_batch: Weights,
    optimizer: optax.GradientTransformation | Sequence[optax.GradientTransformation] | None = None,
    *,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray = 100,
    rtol: float | Sequence[float] = 1e-9,
    lanes: int = 64,
    **options: Any,
) -> "xr.Dataset":
    r"""Follow many starts at once, by flow or with an optimiser by descent.

    Members share shapes and differ in start, data, loss, tolerance or optimiser. Flows of small
    deep linear networks to a ``LogRisk`` of at least -1e6 run side by side (``lanes.py``): one
    compiled program, in which a member that is done makes room for the next. All other members, and
    those that a lane gives up, are runs of ``gradient_flow`` or ``gradient_descent`` one after the
    other. Members share the devices that JAX sees; where a member runs does not change its result.

    Args:
        problem: one for all, or one a member, of equal shapes.
        weights_batch: the weights with a leading axis, the member's, on every array.
        optimizer: for descent: any optax optimiser, or one a member.
        until: the stopping rule, as for the two verbs.
        save: the points to record, as for the two verbs.
        rtol: the flow's tolerance, or one a member.
        lanes: how many members are side by side on a device.
        **options: further arguments of ``gradient_flow`` or ``gradient_descent``, for all members.

    Returns:
        The records along a dimension ``member``. ``status`` and ``message`` are variables, and
        ``in_lanes`` tells which members ran side by side. A member that ended early has NaN at the
        points that it lacks, and one that failed to start at all of them. ``attrs["utilisation"]``
        is the part of the lanes' work that was spent on members.

    Raises:
        ValueError: when there are no members, or as many problems, tolerances or optimisers as
            members are expected and are not there.
    """
    leaves = [np.asarray(leaf, dtype=np.float64) for leaf in jax.tree.leaves(weights_batch)]
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"`weights_batch` has arrays of shapes {[leaf.shape for leaf in leaves]}; expected the "
            "same number of members, at least one, as the leading axis of each."
        )
    count = counts.pop()
    structure = jax.tree.structure(weights_batch)
    starts = [jax.tree.unflatten(structure, [leaf[i] for leaf in leaves]) for i in range(count)]
    problems = _each("problem", problem, count, Problem)
    tolerances = _each("rtol", rtol, count, float | int)
    optimizers = _each("optimizer", optimizer, count, tuple | type(None))

    def alone(i: int) -> "xr.Dataset":
        if optimizers[i] is None:
            return gradient_flow(
                problems[i], starts[i], until=until, save=save, rtol=tolerances[i], **options
            )
        return gradient_descent(
            problems[i], starts[i], optimizers[i], until=until, save=save, **options
        )

    records: list[Any] = [None] * count
    work = np.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a start above R(0): it has its status
        if optimizer is None and not NOT_BATCHED & set(options):
            groups: dict[Any, list[int]] = {}
            for i in range(count):
                if _fits(problems[i], starts[i], until):
                    groups.setdefault((repr(problems[i].loss), _shape(problems[i])), []).append(i)
            for group in groups.values():
                pool = _Pool(problems, starts, tolerances, until, save, options, lanes)
                for i, record in pool.run(group).items():
                    records[i] = record
                work += pool.work
        side_by_side = [record is not None for record in records]
        for i in range(count):
            if records[i] is None:
                try:
                    records[i] = alone(i)
                except ValueError as error:
                    records[i] = error
    return _joined(records, side_by_side, work)


def _each(name: str, value: Any, count: int, kind: Any) -> list[Any]:
    """One value a member."""
    if isinstance(value, kind) or np.ndim(value) == 0:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{name}` has {len(value)} entries; expected one for all or {count}.")
    return list(value)


def _shape(problem: Problem) -> tuple[int, ...]:
    return problem.data.inputs.shape


def _fits(problem: Problem, weights: Weights, until: AbstractRule | AnyOf) -> bool:
    """Whether a lane can run this member to its end."""
    (rule, *others) = as_rules(until)
    if others or not isinstance(rule, LogRisk) or rule.value < HAND_OVER_AT:
        return False
    if not is_deep_linear(problem) or problem.data.dim * GaussNewton().stages > DIRECT:
        return False
    try:
        with jax.enable_x64(True):
            weights = problem.check(weights)
            log_risk = float(risk_and_slope(problem, weights)[0])
            at_zero = float(problem.log_risk_at_zero())
    except ValueError:
        return False
    return rule.value < log_risk <= at_zero + ROUND_OFF and problem.data.separable


class _Pool:
    """Members of one shape and loss that wait for a lane, and the lanes of every device."""

    def __init__(
        self,
        problems: list[Problem],
        starts: list[Weights],
        rtol: list[float],
        until: AbstractRule | AnyOf,
        save: int | Sequence[float] | np.ndarray,
        options: dict[str, Any],
        lanes: int,
    ):
        self.problems, self.starts, self.rtol = problems, starts, rtol
        (self.rule,) = as_rules(until)
        self.save, self.options, self.lanes = save, options, lanes
        self.clock, self.lock = LogRiskClock(), threading.Lock()
        self.work = np.zeros(2)
        """Lane trips spent on members, and all."""

    def run(self, members: list[int]) -> dict[int, "xr.Dataset"]:
        """The records of the members that reached their goal."""
        problem = self.problems[members[0]]
        self.machine = lane.Machine(problem.loss, self.clock, GaussNewton())
        self.begin: dict[int, float] = {}
        self.grid: dict[int, np.ndarray] = {}
        with jax.enable_x64(True):
            for i in members:
                log_risk = float(risk_and_slope(self.problems[i], self.starts[i])[0])
                self.begin[i] = self.clock.read(log_risk, -np.inf)
                self.grid[i] = save_grid(self.rule, self.begin[i], self.save)
        # Those nearest to the saddle at zero take longest: first, so that lanes end together.
        size = {
            i: sum(np.sum(np.log(np.linalg.norm(w) + 1e-300)) for w in self.starts[i])
            for i in members
        }
        longest = max(len(grid) for grid in self.grid.values())
        same = [i for i in members if len(self.grid[i]) == longest]
        self.waiting = deque(sorted(same, key=lambda i: size[i]))
        devices = jax.local_devices()[: max(1, len(same))]
        width = min(self.lanes, -(-len(same) // len(devices)))
        if len(devices) == 1:
            return self._drive(devices[0], width)
        found: dict[int, xr.Dataset] = {}
        with ThreadPoolExecutor(len(devices)) as threads:
            for part in threads.map(lambda device: self._drive(device, width), devices):
                found |= part
        return found

    def _drive(self, device: Any, width: int) -> dict[int, "xr.Dataset"]:
        """Run the lanes of one device until no member waits and none is on its way."""
        found: dict[int, xr.Dataset] = {}
        # What a lane has one of meets what it has many of: ranks differ on purpose.
        allow = jax.numpy_rank_promotion("allow")
        with jax.enable_x64(True), jax.default_device(device), allow:
            holds = self._take([None] * width)
            members, fresh = self._members(holds)
            now, saved = self.machine.start(*fresh, members)
            while any(i is not None for i in holds):
                idle = sum(i is None for i in holds)
                last = len(self.waiting) == 0
                enough = width if last else min(width, idle + max(1, width // 16))
                now, saved, trips, busy = self.machine.run(
                    now, saved, members, as_array(np.int64(TRIPS)), as_array(np.int64(enough))
                )
                with self.lock:
                    self.work += int(busy), int(trips) * width
                status = np.asarray(now.status)
                done = [k for k in range(width) if holds[k] is not None and status[k]]
                rows = jax.device_get(saved)
                for k in done:
                    if status[k] == lane.LANDED:
                        found[holds[k]] = self._record(holds[k], rows, k, now)  # pyright: ignore
                    holds[k] = None
                taken = self._take(holds)
                new = np.array(
                    [a is not None and b is None for a, b in zip(taken, holds, strict=True)]
                )
                holds = taken
                members, fresh = self._members(holds)
                if new.any():
                    begun, _ = self.machine.start(*fresh, members)
                    now = self.machine.put(now, begun, as_array(new))
        return found

    def _take(self, holds: list[int | None]) -> list[int | None]:
        """Fill empty lanes with waiting members."""
        with self.lock:
            return [self.waiting.popleft() if i is None and self.waiting else i for i in holds]

    def _members(self, holds: list[int | None]) -> tuple[lane.Members, tuple[Any, Any]]:
        """What the members in the lanes ask for; empty lanes repeat one of them."""
        spare = next((i for i in holds if i is not None), None)
        spare = next(iter(self.begin)) if spare is None else spare
        chosen = [spare if i is None else i for i in holds]
        problems = [self.problems[i] for i in chosen]
        shared = all(p is self.problems[next(iter(self.begin))] for p in self.problems)
        designs = [np.asarray(p.design) for p in (problems[:1] if shared else problems)]
        given = self.options.get("atol")
        atol = [
            given or default_atol(FlowState(self.starts[i], as_array(np.zeros(()))), self.rtol[i])
            for i in chosen
        ]
        members = lane.Members(
            design=as_array(np.stack(designs, -1)),
            rtol=as_array(np.array([float(self.rtol[i]) for i in chosen])),
            atol=as_array(np.array(atol, dtype=np.float64)),
            targets=as_array(np.stack([self.grid[i] for i in chosen], -1)),
            max_steps=as_array(np.full(len(chosen), self.options.get("max_steps", 1_000_000))),
        )
        layers = zip(*(self.starts[i] for i in chosen), strict=True)
        weights = tuple(np.stack(layer, -1) for layer in layers)
        return members, (weights, np.array([self.begin[i] for i in chosen]))

    def _record(self, i: int, rows: lane.Saved, k: int, now: lane.Lanes) -> "xr.Dataset":
        """The record of the member in lane ``k``."""
        start = self.problems[i].check(self.starts[i])
        recorder = Recorder(
            self.problems[i], start, None, bool(self.options.get("keep_weights", False))
        )
        weights = tuple(
            np.concatenate([w[None], after[k]])
            for w, after in zip(start, rows.weights, strict=True)
        )
        u = np.concatenate([[0.0], rows.scaled_time[k]])
        clock = np.concatenate([[self.begin[i]], self.grid[i]])
        steps = np.concatenate([[0], rows.num_steps[k]])
        recorder.save_all(
            weights,
            scaled_time=u,
            num_steps=steps,
            clock_value=clock,
            expected=-np.sinh(clock),
        )
        return recorder.record(
            evidence(recorder, conserved=True),
            kind="flow",
            status="reached",
            message=f"{self.rule!r} after {int(steps[-1])} steps",
            until=repr(self.rule),
            clock=self.clock.name,
            rtol=float(self.rtol[i]),
            solver="GaussNewton",
            num_rejected=int(now.num_rejected[k]),
            num_newton_iterations=int(now.num_iterations[k]),
        )


PER_MEMBER: dict[str, Callable[[Any], Any]] = {
    "status": str,
    "message": str,
    "wall_time": float,
    "max_margin": float,
    "num_rejected": int,
    "num_newton_iterations": int,
    "start_sha256": str,
    "rtol": float,
    "loss": str,
    "dataset": str,
}
"""Attributes of a record that an ensemble has as variables."""


def _joined(records: list[Any], side_by_side: list[bool], work: np.ndarray) -> "xr.Dataset":
    """All records along ``member``."""
    import xarray as xr

    whole = [record for record in records if not isinstance(record, Exception)]
    if not whole:
        raise records[0]
    parts = []
    for record in records:
        if isinstance(record, Exception):
            part = xr.full_like(whole[0], np.nan).isel(point=slice(0, 1))
            part.attrs = {"status": "refused", "message": str(record)}
        else:
            part = record
        told = {
            name: kind(part.attrs[name])
            for name, kind in PER_MEMBER.items()
            if part.attrs.get(name) is not None
        }
        parts.append(part.assign(told).drop_attrs(deep=False))
    joined = xr.concat(
        parts, "member", data_vars="all", coords="minimal", compat="equals", join="outer"
    )
    first = whole[0].attrs
    joined = joined.assign(in_lanes=("member", np.array(side_by_side)))
    joined = joined.assign_coords(member=np.arange(len(records)))
    common = {
        key: value
        for key, value in first.items()
        if key not in PER_MEMBER and all(np.array_equal(r.attrs.get(key), value) for r in whole)
    }
    joined.attrs = {**common, "num_members": len(records)}
    if work[1]:
        joined.attrs["utilisation"] = float(work[0] / work[1])
    return joined

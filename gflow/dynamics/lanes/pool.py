"""The host's side of an ensemble: members that wait for a lane, and the lanes of every device."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import equinox as eqx
import jax
import numpy as np

from gflow import record
from gflow.dynamics.certify import evidence
from gflow.dynamics.clocks import LogRisk as LogRiskClock
from gflow.dynamics.field import FlowState
from gflow.dynamics.gauss_newton import DIRECT, GaussNewton
from gflow.dynamics.lanes import machine as lane
from gflow.dynamics.members import Member
from gflow.dynamics.recorder import Recorder, observe_members
from gflow.dynamics.tolerance import default_atol
from gflow.dynamics.until import AbstractRule, AnyOf, LogRisk, as_rules, save_grid
from gflow.problem import settings
from gflow.problem.network import Weights, as_array
from gflow.problem.observables import is_deep_linear
from gflow.problem.risk import ROUND_OFF, Problem

TRIPS = 1_000
"""Trips of the lanes between two looks of the host at the latest."""

CHUNK = 32
"""Members that are observed in one call: one shape, so one compilation."""

MAX_STEPS = 1_000_000

Tell = Callable[[float], None]
"""Takes how many members are done; fractions count."""


def fits(problem: Problem, until: AbstractRule | AnyOf, farthest: float) -> bool:
    """Whether lanes can run members of this problem to the end, wherever they start."""
    (rule, *others) = as_rules(until)
    if others or not isinstance(rule, LogRisk) or rule.value < farthest:
        return False
    small = problem.data.dim * GaussNewton().stages <= DIRECT
    return is_deep_linear(problem) and small and problem.data.separable


class Pool:
    """Members of one shape and loss, side by side.

    Args:
        problems, starts, rtol: of each member.
        until: the risk to reach.
        save: as for ``gradient_flow``.
        lanes: how many members are side by side on a device.
        devices: where; a device that is named twice has two sets of lanes.
        options: ``atol``, ``max_steps`` and ``keep_weights`` of ``gradient_flow``.
        tell: is told how many members are done.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        starts: Sequence[Weights],
        rtol: Sequence[float],
        *,
        until: AbstractRule | AnyOf,
        save: int | Sequence[float] | np.ndarray,
        lanes: int,
        devices: Sequence[Any],
        options: Mapping[str, Any],
        tell: Tell,
    ):
        self.problems, self.starts, self.rtol = problems, starts, rtol
        (rule,) = as_rules(until)
        assert isinstance(rule, LogRisk)
        self.rule, self.save, self.options, self.tell = rule, save, options, tell
        self.lanes, self.devices = lanes, devices
        self.clock, self.lock = LogRiskClock(), threading.Lock()
        method = lane.Method(problems[0].loss, self.clock, GaussNewton())
        self.machine = lane.Machine(method)
        designs = [np.asarray(problem.design) for problem in problems]
        self.shared = all(d is designs[0] or np.array_equal(d, designs[0]) for d in designs)
        self.designs = designs[:1] if self.shared else designs
        self.work = np.zeros(2)
        """Lane trips spent on members, and all."""
        self.landed, self.stopped = 0, False
        self.found: dict[int, Member] = {}
        """What the members that reached their goal gave; the others are left to the caller."""

    def run(self) -> dict[int, Member]:
        """Follow the members; after Ctrl-C ``found`` has those that were done."""
        with settings.own():
            members = self._ready()
        if not members:
            return {}
        self.waiting = deque(members)
        devices = self.devices[: len(members)]
        width = min(self.lanes, -(-len(members) // len(devices)))
        # In threads, for one device too: Ctrl-C reaches this one and leaves no record half made.
        with ThreadPoolExecutor(len(devices)) as threads:
            parts = [
                threads.submit(copy_context().run, self._drive, device, width) for device in devices
            ]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                self.stopped = True
                raise
        return self.found

    def _ready(self) -> list[int]:
        """The members whose start a lane can take, those that take longest first."""
        count, problem = len(self.starts), self.problems[0]
        risks, slopes = [np.zeros(0)], [np.zeros(0)]
        for chunk in _chunks(range(count)):
            found = _start_risks(problem, self._designs(chunk), _stack(self.starts, chunk, 0))
            risks.append(np.asarray(found[0]))
            slopes.append(np.asarray(found[1]))
        risk, slope = np.concatenate(risks)[:count], np.concatenate(slopes)[:count]
        self.begin = np.array([self.clock.read(float(r), -np.inf) for r in risk])
        at_zero = float(problem.log_risk_at_zero())
        sound = np.isfinite(risk) & (slope > 0) & (risk <= at_zero + ROUND_OFF)
        ready = np.flatnonzero(sound & (risk > self.rule.value))
        grids = {int(i): save_grid(self.rule, self.begin[i], self.save) for i in ready}
        longest = max(map(len, grids.values()), default=0)
        grids = {i: grid for i, grid in grids.items() if len(grid) == longest}
        if not grids:
            return []
        given = self.options.get("atol")
        zero = as_array(np.zeros(()))
        atol = [
            given or default_atol(FlowState(w, zero), r)
            for w, r in zip(self.starts, self.rtol, strict=True)
        ]
        targets = np.full((longest, count), np.nan)
        for i, grid in grids.items():
            targets[:, i] = grid
        limit = self.options.get("max_steps") or MAX_STEPS
        self.asked = lane.Members(
            design=as_array(np.stack(self.designs, -1)),
            rtol=as_array(np.array(self.rtol, dtype=np.float64)),
            atol=as_array(np.array(atol, dtype=np.float64)),
            targets=as_array(targets),
            max_steps=as_array(np.full(count, limit)),
        )
        # Those nearest to the saddle at zero take longest: first, so that lanes end together.
        size = [sum(np.log(np.linalg.norm(w) + 1e-300) for w in start) for start in self.starts]
        return sorted(grids, key=lambda i: size[i])

    def _drive(self, device: Any, width: int) -> None:
        """Run the lanes of one device until no member waits and none is on its way."""
        rows: list[tuple[int, lane.Saved, int, int]] = []
        # What a lane has one of meets what it has many of: ranks differ on purpose.
        allow = jax.numpy_rank_promotion("allow")
        with settings.own(), jax.default_device(device), allow:
            holds = self._take([None] * width)
            members, fresh = self._seat(holds)
            now, saved = self.machine.start(*fresh, members)
            while any(i is not None for i in holds) and not self.stopped:
                idle = sum(i is None for i in holds)
                enough = width if not self.waiting else min(width, idle + max(1, width // 16))
                now, saved, trips, busy = self.machine.run(
                    now, saved, members, as_array(np.int64(TRIPS)), as_array(np.int64(enough))
                )
                status, on_way = np.asarray(now.status), np.asarray(now.saved)
                done = [k for k in range(width) if holds[k] is not None and status[k]]
                counts, there = (), saved
                if done:
                    counts = jax.device_get((now.num_rejected, now.num_iterations))
                    there = jax.device_get(saved)
                for k in done:
                    if status[k] == lane.LANDED:
                        own = jax.tree.map(lambda leaf, k=k: leaf[k], there)
                        rejected, iterations = (int(each[k]) for each in counts)
                        rows.append((holds[k], own, rejected, iterations))  # pyright: ignore
                    holds[k] = None
                with self.lock:
                    self.work += int(busy), int(trips) * width
                    self.landed += len(done)
                    part = sum(on_way[k] for k in range(width) if holds[k] is not None)
                    self.tell(self.landed + part / len(self.asked.targets))
                taken = self._take(holds)
                new = np.array([a is not b for a, b in zip(taken, holds, strict=True)])
                holds = taken
                if new.any():
                    members, fresh = self._seat(holds)
                    begun, _ = self.machine.start(*fresh, members)
                    now = self.machine.put(now, begun, as_array(new))
                while len(rows) >= CHUNK:
                    self.found |= self._observe(rows[:CHUNK])
                    rows = rows[CHUNK:]
            if rows:
                self.found |= self._observe(rows)

    def _take(self, holds: list[int | None]) -> list[int | None]:
        """Fill empty lanes with waiting members."""
        with self.lock:
            return [self.waiting.popleft() if i is None and self.waiting else i for i in holds]

    def _seat(self, holds: list[int | None]) -> tuple[lane.Members, tuple[Any, Any]]:
        """What the members in the lanes ask for; empty lanes repeat one of them."""
        spare = next(i for i in holds if i is not None)
        chosen = [spare if i is None else i for i in holds]
        design, *others = (np.asarray(leaf) for leaf in self.asked)
        design = design if self.shared else design[..., chosen]
        members = lane.Members(as_array(design), *(as_array(leaf[..., chosen]) for leaf in others))
        return members, (_stack(self.starts, chosen, -1), self.begin[chosen])

    def _designs(self, chosen: Sequence[int]) -> Any:
        return self.designs[0] if self.shared else np.stack([self.designs[i] for i in chosen])

    def _observe(self, rows: list[tuple[int, lane.Saved, int, int]]) -> dict[int, Member]:
        """The records of members that have landed."""
        keep = bool(self.options.get("keep_weights", False))
        recorders = {i: Recorder(self.problems[i], self.starts[i], None, keep) for i, *_ in rows}
        weights = {
            i: tuple(
                np.concatenate([w[None], after])
                for w, after in zip(self.starts[i], saved.weights, strict=True)
            )
            for i, saved, *_ in rows
        }
        chosen = next(_chunks([i for i, *_ in rows]))
        references = jax.tree.map(
            lambda *leaves: np.stack(leaves), *(recorders[i].reference for i in chosen)
        )
        states = _stack(weights, chosen, 0)
        observed = observe_members(self.problems[0], self._designs(chosen), states, references)
        observed = {name: np.asarray(value) for name, value in observed.items()}
        found = {}
        for at, (i, saved, rejected, iterations) in enumerate(rows):
            recorder = recorders[i]
            columns = {name: value[at] for name, value in observed.items()}
            clock = np.concatenate([self.begin[i : i + 1], np.asarray(self.asked.targets)[:, i]])
            steps = np.concatenate([[0], saved.num_steps])
            log_risk = columns["log_risk"]
            off = np.abs(log_risk + np.sinh(clock)) / np.maximum(1.0, np.abs(log_risk))
            recorder.save_all(
                weights[i],
                columns,
                scaled_time=np.concatenate([[0.0], saved.scaled_time]),
                num_steps=steps,
                clock_value=clock,
                clock_error=off,
                beyond_hand_over=np.zeros(len(steps), dtype=bool),
            )
            contents = recorder.contents(
                evidence(recorder, conserved=True),
                kind="flow",
                status="reached",
                message=f"{self.rule!r} after {int(steps[-1])} steps",
                until=repr(self.rule),
                clock=self.clock.name,
                rtol=float(self.rtol[i]),
                atol=float(np.asarray(self.asked.atol)[i]),
                solver="GaussNewton",
                wall_time=None,  # of all together only
                num_rejected=rejected,
                num_newton_iterations=iterations,
            )
            attrs = contents.pop("attrs")
            found[i] = Member(record.variables(**contents), attrs)
        return found


@eqx.filter_jit
def _start_risks(problem: Problem, designs: Any, weights: Weights) -> tuple[Any, Any]:
    """Log risk and the squared norm of its gradient, of many members."""

    def one(design: Any, weights: Weights) -> tuple[Any, Any]:
        own = eqx.tree_at(lambda p: p.design, problem, design)
        log_risk, _, squared = own.log_risk_gradient_and_norm(weights)
        return log_risk, squared

    return jax.vmap(one, in_axes=(None if designs.ndim == 2 else 0, 0))(designs, weights)


def _chunks(members: Sequence[int]) -> Any:
    """``members`` in pieces of one length, the last filled up with its first."""
    for begin in range(0, len(members), CHUNK):
        piece = list(members[begin : begin + CHUNK])
        yield piece + piece[:1] * (CHUNK - len(piece))


def _stack(weights: Any, chosen: Sequence[int], axis: int) -> Weights:
    """The weights of chosen members on a new axis."""
    return tuple(np.stack(layer, axis) for layer in zip(*(weights[i] for i in chosen), strict=True))

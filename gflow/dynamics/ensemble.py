"""Many trajectories at once: one labelled record with a dimension ``member``."""

import concurrent.futures as cf
import contextlib
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from gflow import record
from gflow.dynamics import descent, flow
from gflow.dynamics.descending.run import DescentRun
from gflow.dynamics.drive.drive import Drive, one_by_one, widest_for
from gflow.dynamics.drive.flow_run import FlowRun
from gflow.dynamics.drive.members import Member, joined, none_done
from gflow.dynamics.drive.progress import ProgressBar
from gflow.dynamics.reasons import Reason
from gflow.dynamics.spread import check_executor, spread
from gflow.dynamics.stops import AbstractRule, AnyOf
from gflow.names import SETTINGS, all_names, check_names
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, expect, positive_count, shown
from gflow.problem.risk import ROUND_OFF, Problem
from gflow.problem.weights import Weights, float_leaves

if TYPE_CHECKING:
    import xarray as xr

LANES = 32
"""Members side by side on a device: more fill the vector units better, but the last ones to land
leave more lanes idle."""

AT_ONCE = 128
"""Members that a process of an engine takes at a time."""


def ensemble(
    problem: Problem | Sequence[Problem],
    weights_batch: Weights,
    optimizer: optax.GradientTransformation | Sequence[optax.GradientTransformation] | None = None,
    *,
    until: AbstractRule | AnyOf,
    save: int | Sequence[float] | np.ndarray = 100,
    rtol: float | Sequence[float] = 1e-9,
    coordinates: Mapping[str, Sequence[Any]] | None = None,
    lanes: int = LANES,
    devices: Sequence[Any] | None = None,
    executor: cf.Executor | None = None,
    progress: bool | None = None,
    **options: Any,
) -> "xr.Dataset":
    r"""Follow many starts at once, by flow or with an optimiser by descent.

    Members share shapes and differ in start, data, loss, tolerance or optimiser. Flows of small
    deep linear networks to a ``LogRisk`` of at least -1e6 run side by side (``dynamics/lanes``):
    one compiled program, in which a member that is done makes room for the next, on all devices.
    Descents make their steps in one vmapped call, if their optimisers differ in numbers such as the
    learning rate only. All other members, and those that a lane gives up, run one after the other.
    Where and beside what a member runs does not change its result beyond round-off. One that fails
    says so and touches no other.

    Args:
        problem: one for all, or one a member, of equal shapes.
        weights_batch: the weights with a leading axis, the member's, on every array.
        optimizer: for descent: any optax optimiser, or one a member.
        until: the stopping rule, as for the two verbs.
        save: the points to record, as for the two verbs.
        rtol: the flow's tolerance, or one a member.
        coordinates: what members are labelled with, one value a member, such as
            ``{"scale": scales}``.
        lanes: how many members are side by side on a device.
        devices: where to run, by default on all devices of this process, or on the one that
            ``jax.default_device`` names. One that is named twice runs two sets of lanes in two
            threads: ``jax.devices() * 2`` uses two cores of a CPU, of which by default as many are
            used as there are members to fill their lanes.
        executor: any ``concurrent.futures.Executor``, whose processes take 128 members at a time,
            as for ``sweep``.
        progress: show a progress bar; None shows it on terminals and in notebooks.
        **options: further arguments of ``gradient_flow`` or ``gradient_descent``, for all members.

    Returns:
        The records along a dimension ``member``. ``status`` and ``message`` are variables,
        ``admissible`` tells which members meet the paper's assumption $R(W(0)) \le R(0)$, and
        ``in_lanes`` which ran side by side. A member that ended early has NaN at the points that it
        lacks, and one that could not start ("refused", or "failed" with an error) at all of them.
        ``attrs["utilisation"]`` is the part of the lanes' work that was spent on members.

    Raises:
        ValueError: when there are no members, as many problems, tolerances, optimisers or labels as
            members are expected and are not there, an option is unknown, or no member can start.
        KeyboardInterrupt: by Ctrl-C before any member is done. Later, the record has what is done,
            and "interrupted" as the status of all other members.

    Warns:
        UserWarning: when members start with $R(W(0)) > R(0)$.
    """
    leaves = jax.tree.leaves(float_leaves("weights_batch", weights_batch))
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"`weights_batch` has arrays of shapes {[leaf.shape for leaf in leaves]}; expected the "
            "same number of members, at least one, as the leading axis of each."
        )
    count = counts.pop()
    structure = jax.tree.structure(weights_batch)
    mapping = 'a mapping from name to one value a member, as {"scale": scales}'
    expect("coordinates", coordinates, Mapping | None, mapping)
    given = (coordinates or {}).items()
    labels = {name: list(values) if np.ndim(values) else [] for name, values in given}
    for name, values in labels.items():
        if len(values) != count:
            raise ValueError(
                f"`coordinates[{name!r}]` has {len(values)} entries; expected {count}, one a "
                "member."
            )
    taken = all_names(options.get("observables"))
    check_names("coordinates", labels, beside=taken, allowed=SETTINGS)
    problems = _each("problem", problem, count, Problem)
    for one in problems:
        expect("problem", one, Problem, f"{A_PROBLEM}, or one a member")
    lanes = positive_count("lanes", lanes)
    chosen = list(devices) if isinstance(devices, Sequence) else devices
    if devices is not None and not (
        chosen and isinstance(chosen, list) and all(isinstance(d, jax.Device) for d in chosen)
    ):
        raise ValueError(
            f"`devices` is {shown(devices)}; expected a list of devices, as `jax.devices()`."
        )
    executor = check_executor(executor, devices)
    checked = check_options(options, descends=optimizer is not None)
    rtols = _each("rtol", rtol, count, float | int)
    for one, each in zip(problems, rtols, strict=True):
        flow.check(one, flow.Options(rtol=each))
    work = Work(
        problems,
        [jax.tree.unflatten(structure, [leaf[i] for leaf in leaves]) for i in range(count)],
        _each("optimizer", optimizer, count, tuple | type(None)),
        rtols,
        until,
        save,
        checked,
    )
    with ProgressBar("ensemble", 0.0, float(count), progress) as bar:

        def tell(done: float) -> None:
            bar.update(done, f"{int(done)} of {count} members")

        chosen = chosen or devices_here(count, lanes)
        found = follow(work, labels, lanes=lanes, devices=chosen, executor=executor, tell=tell)
    if none_done(found):
        raise KeyboardInterrupt
    if "log_risk" not in found:
        raise ValueError(f"no member can start; the first says: {found.message.values[0]}")
    return found


class Work(NamedTuple):
    """Members to follow: lists have one entry each."""

    problems: Sequence[Problem]
    starts: Sequence[Weights]
    optimizers: Sequence[optax.GradientTransformation | None]
    rtol: Sequence[float]
    until: AbstractRule | AnyOf
    save: int | Sequence[float] | np.ndarray
    options: Mapping[str, Any]

    def part(self, begin: int) -> "Work":
        """That of ``AT_ONCE`` members from ``begin``."""
        own = slice(begin, begin + AT_ONCE)
        each = (self.problems[own], self.starts[own], self.optimizers[own], self.rtol[own])
        return Work(*each, self.until, self.save, self.options)


class Followed(NamedTuple):
    """What members gave."""

    members: Sequence[Member | BaseException]
    in_lanes: list[bool]
    work: Sequence[float] = (0, 0)
    """Steps that lanes ended, and rounds in each of which they may have."""


def follow(
    work: Work,
    labels: Mapping[str, Sequence[Any]],
    *,
    lanes: int = LANES,
    devices: Sequence[Any] | None = None,
    executor: cf.Executor | None = None,
    tell: Callable[[float], None],
) -> "xr.Dataset":
    """The record of all members; ``tell`` is told how many are done."""
    began = time.perf_counter()
    if executor is None:
        found = _followed(work, lanes, devices=devices, tell=tell)
    else:
        found = _followed_on(executor, work, lanes, tell)
    admissible = [_admissible(member) for member in found.members]
    if not all(admissible):
        warnings.warn(
            f"{admissible.count(False)} of {len(admissible)} members do not start with R(W(0)) <= "
            "R(0), as Ji and Telgarsky assume: their flow may end at a saddle. The variable "
            "`admissible` tells which; `gflow.init.admissible` repairs a start.",
            UserWarning,
            stacklevel=3,
        )
    spent, trips = found.work
    used = {"utilisation": spent / trips} if trips else {}
    return joined(
        found.members,
        more={"in_lanes": found.in_lanes, "admissible": admissible},
        coordinates=labels,
        wall_time=time.perf_counter() - began,
        **used,
    )


def _followed_on(
    executor: cf.Executor, work: Work, lanes: int, tell: Callable[[float], None]
) -> Followed:
    """Follow members in the processes of an engine."""
    begins, done = range(0, len(work.starts), AT_ONCE), 0
    parts = [Followed([KeyboardInterrupt()] * len(work.part(i).starts), []) for i in begins]
    with contextlib.suppress(KeyboardInterrupt):
        for k, found in spread(executor, _followed, ((work.part(i), lanes) for i in begins)):
            lost = isinstance(found, BaseException)
            parts[k] = Followed([found] * len(parts[k].members), []) if lost else found
            done += len(parts[k].members)
            tell(done)
    return Followed(
        [member for part in parts for member in part.members],
        [each for part in parts for each in part.in_lanes or [False] * len(part.members)],
        [sum(part.work[k] for part in parts) for k in range(2)],
    )


def _followed(
    work: Work,
    lanes: int,
    *,
    devices: Sequence[Any] | None = None,
    tell: Callable[[float], None] = lambda done: None,
) -> Followed:
    """Follow members here."""
    count = len(work.starts)
    width = min(count, lanes, *map(widest_for, work.starts))
    devices = devices or _own_devices()
    with settings.own(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a start above R(0): told later, once
        with one_by_one(width):
            begun = [_begun(work, i) for i in range(count)]
        runs = [one for one in begun if not isinstance(one, Exception)]
        # Those nearest to the saddle at zero take longest: first, so that lanes end together.
        drive = Drive(
            sorted(runs, key=_size_of_start),
            width=lanes,
            devices=devices,
            look=lambda: tell(count - len(runs) + sum(run.part_done for run in runs)),
            isolate=True,
        )
        seconds: dict[int, FlowRun] = {}
        with contextlib.suppress(KeyboardInterrupt):
            drive.go()
            if work.options.get("certify"):
                seconds = {
                    i: flow.second_run(run, _flow_options(work, i))
                    for i, run in enumerate(begun)
                    if isinstance(run, FlowRun) and run.end is not None
                }
                Drive(list(seconds.values()), width=lanes, devices=devices, isolate=True).go()
        with one_by_one(width):
            members = [_member(work, i, one, seconds) for i, one in enumerate(begun)]
    in_lanes = [not isinstance(one, Exception) and one.in_lanes for one in begun]
    return Followed(members, in_lanes, drive.work)


def _own_devices() -> list[Any]:
    """All of this process, or the one that the caller has made the default."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.local_devices() if chosen is None else [chosen]


def devices_here(count: int, lanes: int) -> list[Any]:
    """Where members are followed in the caller's own process: a CPU once a core, to fill its lanes.

    One set of lanes keeps one core busy. A process of an engine has one core by custom, and others
    beside it.
    """
    found = _own_devices()
    if len(found) > 1 or jax.default_backend() != "cpu":
        return found
    return found * max(1, min(_num_cores(), count // lanes))


def _num_cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begun(work: Work, i: int) -> FlowRun | DescentRun | Exception:
    """A member at its start, or the error that keeps it from being followed."""
    problem, start, optimizer = work.problems[i], work.starts[i], work.optimizers[i]
    try:
        if optimizer is None:
            return flow.flow_of(problem, start, work.until, work.save, _flow_options(work, i))
        options = descent.Options(**work.options)
        descent.check(problem, options)
        return descent.descent_of(problem, start, optimizer, work.until, work.save, options)
    except Exception as error:  # whatever it is, the other members are not to suffer
        return error


def _flow_options(work: Work, i: int) -> flow.Options:
    given = {name: value for name, value in work.options.items() if name != "certify"}
    options = flow.Options(**given, rtol=work.rtol[i], many=True)
    flow.check(work.problems[i], options)
    return options


def _size_of_start(run: FlowRun | DescentRun) -> float:
    """The logarithm of the product of the norms of the starting weights."""
    leaves = jax.tree.leaves(run.recorder.start)
    return sum(math.log(np.linalg.norm(leaf) + 1e-300) for leaf in leaves)


def _member(
    work: Work, i: int, run: FlowRun | DescentRun | Exception, seconds: Mapping[int, FlowRun]
) -> Member | Exception:
    """What a member gave."""
    if isinstance(run, Exception):
        return run
    if run.end is None:
        run.end = Reason.INTERRUPTED.end()
    run.close()
    if isinstance(run, FlowRun):
        second = seconds.get(i)
        if second is not None:
            second.end = second.end or Reason.INTERRUPTED.end()
            second.close()
        variables, attrs = flow.told(run, _flow_options(work, i), second)
    else:
        optimizer = work.optimizers[i]
        assert optimizer is not None
        variables, attrs = {}, descent.attributes(run, optimizer, descent.Options(**work.options))
    contents = run.recorder.contents(variables, **attrs, wall_time=None)  # of all together only
    attrs = contents.pop("attrs")
    return Member(record.variables(**contents), attrs)


def check_options(options: Mapping[str, Any], *, descends: bool) -> Mapping[str, Any]:
    """``options`` if the verb takes them all for many members, or a ValueError that names one."""
    verb = descent.gradient_descent if descends else flow.gradient_flow
    known = {
        name
        for name, parameter in inspect.signature(verb).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    } - {"until", "save", "rtol", "progress", "checkpoint"}
    for name in options:
        if name not in known:
            raise ValueError(
                f"`{name}` is no option of {verb.__name__} for many members; expected one of "
                f"{', '.join(sorted(known))}."
            )
    return options


def _admissible(member: Member | BaseException) -> bool:
    if isinstance(member, BaseException):
        return True  # nothing is known; its status says why
    first = float(member.variables["log_risk"][1][0])
    at_zero = member.attrs["log_risk_at_zero"]
    return at_zero is None or first <= float(at_zero) + ROUND_OFF


def _each(name: str, value: Any, count: int, kind: Any) -> list[Any]:
    """One value a member."""
    if isinstance(value, kind) or np.ndim(value) == 0:
        return [value] * count
    if isinstance(value, str) or len(value) != count:
        has = shown(value) if isinstance(value, str) else f"{len(value)} entries"
        raise ValueError(f"`{name}` has {has}; expected one for all or {count}.")
    return list(value)

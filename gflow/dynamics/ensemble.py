"""Many trajectories at once: one labelled record with a dimension ``member``."""

import contextlib
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from gflow.dynamics import together
from gflow.dynamics.descent import gradient_descent
from gflow.dynamics.flow import gradient_flow, tolerances
from gflow.dynamics.flow_run import HAND_OVER_AT
from gflow.dynamics.lanes import pool
from gflow.dynamics.members import Member, Unfinished, joined
from gflow.dynamics.progress import ProgressBar
from gflow.dynamics.until import AbstractRule, AnyOf
from gflow.names import SETTINGS, all_names, check_names
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, expect, positive_count, shown
from gflow.problem.network import Weights, float_leaves
from gflow.problem.risk import ROUND_OFF, Problem

if TYPE_CHECKING:
    import xarray as xr

LANES = 32
"""Members side by side on a device: more fill the vector units better, but the last ones to land
leave more lanes idle."""

IN_LANES = {"atol", "keep_weights", "max_steps"}
"""Arguments of ``gradient_flow`` that lanes know. Others are for members one after the other."""


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
        devices: where to run, by default on all devices of this process. One that is named twice
            runs two sets of lanes in two threads: ``jax.devices() * 2`` uses two cores of a CPU.
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
    checked = check_options(options, descent=optimizer is not None)
    whole_function = bool(options.get("function_space"))
    rtols = _each("rtol", rtol, count, float | int)
    rtols = [tolerances(each, options.get("atol"), whole_function)[0] for each in rtols]
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

        found = follow(work, labels, lanes=lanes, devices=devices, tell=tell)
    if "log_risk" not in found:
        if "interrupted" in found.status.values:
            raise KeyboardInterrupt
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


def follow(
    work: Work,
    labels: Mapping[str, Sequence[Any]],
    *,
    lanes: int = LANES,
    devices: Sequence[Any] | None = None,
    tell: Callable[[float], None],
) -> "xr.Dataset":
    """The record of all members; ``tell`` is told how many are done."""
    count, began = len(work.starts), time.perf_counter()
    got = Got([None] * count, np.zeros(count, dtype=bool), np.zeros(2))
    with settings.own(), warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore", UserWarning)  # of a start above R(0): told below, once
        _through_lanes(work, got, lanes, devices or jax.local_devices(), tell)
        _by_themselves(work, got, lanes, tell)
    members = [Unfinished() if member is None else member for member in got.members]
    admissible = [_admissible(member) for member in members]
    if not all(admissible):
        warnings.warn(
            f"{count - sum(admissible)} of {count} members do not start with R(W(0)) <= R(0), as "
            "Ji and Telgarsky assume: their flow may end at a saddle. The variable `admissible` "
            "tells which; `gflow.init.admissible` repairs a start.",
            UserWarning,
            stacklevel=3,
        )
    spent, all_trips = got.trips
    used = {"utilisation": float(spent / all_trips)} if all_trips else {}
    return joined(
        members,
        more={"in_lanes": got.in_lanes, "admissible": admissible},
        coordinates=labels,
        wall_time=time.perf_counter() - began,
        **used,
    )


class Got(NamedTuple):
    """What the members gave so far."""

    members: list[Member | Exception | None]
    in_lanes: np.ndarray
    trips: np.ndarray
    """Trips of lanes spent on members, and all."""


def _through_lanes(
    work: Work, got: Got, lanes: int, devices: Sequence[Any], tell: Callable[[float], None]
) -> None:
    """Follow side by side the members that can be."""
    for group in _side_by_side(work):
        before = int(np.sum(got.in_lanes))
        chosen = pool.Pool(
            [work.problems[i] for i in group],
            [work.starts[i] for i in group],
            [work.rtol[i] for i in group],
            until=work.until,
            save=work.save,
            lanes=lanes,
            devices=list(devices),
            options=work.options,
            tell=lambda landed, before=before: tell(before + landed),
        )
        try:
            chosen.run()
        finally:  # after Ctrl-C too
            for k, member in chosen.found.items():
                got.members[group[k]], got.in_lanes[group[k]] = member, True
            got.trips[:] += chosen.work


def _by_themselves(work: Work, got: Got, lanes: int, tell: Callable[[float], None]) -> None:
    """Follow the other members; descents make their steps together."""
    rest = [i for i, member in enumerate(got.members) if member is None]

    def alone(i: int) -> None:
        got.members[i] = _alone(work, i)
        tell(float(sum(member is not None for member in got.members)))

    for problem in {id(p): p for p in work.problems}.values():
        problem.data.max_margin()  # once, not in every thread
    descents = [i for i in rest if work.optimizers[i] is not None]
    together.side_by_side([functools.partial(alone, i) for i in descents], lanes)
    for i in rest:
        if work.optimizers[i] is None:
            alone(i)
            member = got.members[i]
            if isinstance(member, Member) and member.attrs["status"] == "interrupted":
                break


def check_options(options: Mapping[str, Any], *, descent: bool) -> Mapping[str, Any]:
    """``options`` if the verb takes them all for many members, or a ValueError that names one."""
    verb = gradient_descent if descent else gradient_flow
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


def _side_by_side(work: Work) -> list[list[int]]:
    """Groups of members that can run in lanes."""
    if set(work.options) - IN_LANES:
        return []
    groups: dict[Any, list[int]] = {}
    different = {id(problem): problem for problem in work.problems}.items()
    fit = {key for key, problem in different if pool.fits(problem, work.until, HAND_OVER_AT)}
    losses = {key: repr(problem.loss) for key, problem in different}
    for i, problem in enumerate(work.problems):
        if work.optimizers[i] is not None or id(problem) not in fit:
            continue
        try:
            problem.network.check(work.starts[i], problem.data)
        except ValueError:
            continue
        groups.setdefault((losses[id(problem)], problem.data.inputs.shape), []).append(i)
    return list(groups.values())


def _alone(work: Work, i: int) -> Member | Exception:
    """What a member gives by itself, or the error that keeps it from being followed."""
    given = {"until": work.until, "save": work.save, "progress": False, **work.options}
    problem, start, optimizer = work.problems[i], work.starts[i], work.optimizers[i]
    try:
        if optimizer is None:
            found = gradient_flow(problem, start, rtol=work.rtol[i], **given)
        else:
            found = gradient_descent(problem, start, optimizer, **given)
        return Member.of(found)
    except Exception as error:  # whatever it is, the other members are not to suffer
        return error


def _admissible(member: Member | Exception) -> bool:
    if isinstance(member, Exception):
        return True  # nothing is known; its status says why
    first = float(member.variables["log_risk"][1][0])
    return first <= float(member.attrs["log_risk_at_zero"]) + ROUND_OFF


def _each(name: str, value: Any, count: int, kind: Any) -> list[Any]:
    """One value a member."""
    if isinstance(value, kind) or np.ndim(value) == 0:
        return [value] * count
    if isinstance(value, str) or len(value) != count:
        has = shown(value) if isinstance(value, str) else f"{len(value)} entries"
        raise ValueError(f"`{name}` has {has}; expected one for all or {count}.")
    return list(value)

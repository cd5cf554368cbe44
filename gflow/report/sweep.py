"""Trajectories over a grid of parameters: one labelled record with a dimension a parameter."""

import concurrent.futures as cf
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gflow import record
from gflow.dynamics.drive.members import joined, none_done
from gflow.dynamics.drive.progress import ProgressBar
from gflow.dynamics.ensemble import LANES, Work, devices_here, follow
from gflow.dynamics.spread import check_executor, spread
from gflow.names import SETTINGS, all_names, check_names
from gflow.problem.arguments import expect, file_path, flag, positive_count
from gflow.report.grid import Axis, Grid, Points, Trial, common, seen
from gflow.report.groups import Folder, Summary, merged, together

if TYPE_CHECKING:
    import xarray as xr

GROUP_SIZE = 128
"""Members of a group at most: what a kill may lose, and what a process takes at a time."""


def sweep(
    function: Callable[..., Any] | str | os.PathLike[str],
    grid: Mapping[str, Sequence[Any] | Mapping[str, Any]] | None = None,
    *,
    until: Any = None,
    save: int | Sequence[float] | np.ndarray = 20,
    folder: str | os.PathLike[str] | None = None,
    group_size: int = GROUP_SIZE,
    lanes: int = LANES,
    devices: Sequence[Any] | None = None,
    executor: cf.Executor | None = None,
    lazy: bool | None = None,
    progress: bool | None = None,
    **options: Any,
) -> "xr.Dataset":
    r"""Follow one trajectory at every point of a grid.

    The grid is cut into groups, boxes of at most ``group_size`` points of the same shapes. Each is
    followed as one ``gflow.ensemble``, whatever differs between its points. With ``folder`` it is
    saved as it ends: after a kill, or Ctrl-C, the same call does what is missing.
    With ``executor`` groups are made and followed in the processes of an engine, on this machine or
    on many (see ``docs/scaling.md``). Ctrl-C returns what is done, and "interrupted" as the
    status of all other points. A point whose function raises an error, or whose run fails, says so
    in ``status`` and ``message``, and the others are as they would be without.

    Args:
        function: takes one value for each dimension of the grid, by name, and returns
            ``(problem, weights)`` or ``(problem, weights, options)``, the last a dict of arguments
            of ``gradient_flow`` for this point alone, or with ``optimizer`` those of
            ``gradient_descent``. It must give the same at every call. It is called where a group
            is followed; beforehand only at a few points along each axis, which tell shapes and
            options, and this sweep from others. Or the path of a TOML file
            with a table ``[sweep]``, as for ``gflow sweep``.
        grid: for each dimension its values; or a mapping from label to value where values are
            objects, as in ``{"loss": {"exp": Exponential(), "log": Logistic()}}``. For a file,
            values that take the place of its own.
        until: the stopping rule, where the options of a point have none.
        save: how many points to record of each trajectory.
        folder: where to save groups; None keeps them in memory.
        group_size: how many members a group has at most.
        lanes: members side by side, as for ``ensemble``.
        devices: as for ``ensemble``.
        executor: any ``concurrent.futures.Executor``: a ``ProcessPoolExecutor`` that spawns, or
            ``dask.distributed.Client(...).get_executor()``, those of MPI and loky. The function is
            pickled, by value if it cannot be imported; ``folder`` is one that all processes see. A
            group whose process dies, and which the engine does not do again, has the status
            "failed"; the same call tries it again.
        lazy: open the files of ``folder`` when values are asked for, as arrays of dask, so that a
            result may be larger than memory; None does so beyond a gigabyte.
        progress: show one progress bar, with the time left; None shows it on terminals and in
            notebooks.
        **options: further arguments of ``gradient_flow`` or ``gradient_descent``, for all points.

    Returns:
        One record with the dimensions of the grid before those of a trajectory, so that
        ``found.sel(depth=4, scale=0.1).mean("seed")`` is what it says. Layers that a shallower
        network lacks, and points that a run did not reach, are NaN. Weights, which differ in shape,
        are in the files of the groups only.

    Raises:
        ValueError: when the grid or an option is malformed, the function fails at every point, or
            ``folder`` holds another sweep.
        OSError: when ``folder`` cannot be written.
        ModuleNotFoundError: when ``lazy`` wants dask, which is not installed.

    >>> import gflow
    >>> def start(depth, seed):
    ...     data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    ...     return gflow.Problem(data), gflow.init.zero_first((2, *[3] * (depth - 1), 1), seed=seed)
    >>> grid = {"depth": [2, 3], "seed": range(2)}
    >>> found = gflow.sweep(start, grid, optimizer=gflow.polyak(), until=gflow.Steps(9), save=3)
    >>> dict(found.misalignment.sizes)
    {'depth': 2, 'seed': 2, 'point': 3, 'pair': 2}
    """
    group_size, lanes = positive_count("group_size", group_size), positive_count("lanes", lanes)
    folder = None if folder is None else file_path("folder", folder)
    executor = check_executor(executor, devices)
    lazy = flag("lazy", lazy, none=True)
    if lazy and folder is None:
        raise ValueError("`lazy` is true without `folder`; expected one, whose files can wait.")
    if not callable(function):
        from gflow.report.variation import OfFile

        function = OfFile(file_path("function", function))
        own = function.grid
        unknown = set(grid or ()) - set(own)
        if unknown:
            raise ValueError(
                f"`grid` has {sorted(unknown)}; expected dimensions of the file: {list(own)}."
            )
        grid = {**own, **(grid or {})}
    listed = 'a mapping from name to values, as {"seed": [0, 1]}'
    expect("grid", grid, Mapping | None, listed)
    taken = all_names(options.get("observables"))
    check_names("grid", grid or (), beside=taken, allowed=SETTINGS)
    check_names("observables", options.get("observables") or ())
    axes = {name: Axis.of(name, values) for name, values in (grid or {}).items()}
    if not axes:
        raise ValueError("`grid` is empty; expected values for at least one name.")
    points = Points(function, {"until": until, "save": save, **options})
    tried = seen(axes, points)
    cut = Grid.cut(axes, tried.single, group_size)
    kept = Folder(folder, cut, tried.fingerprint)
    summary, stopped = kept.summary, False
    if summary is None:
        summary, stopped = _follow_missing(kept, points, executor, lanes, devices, progress)
    result = together(kept, summary, lazy)
    if "log_risk" not in summary.columns and set(np.ravel(result.status.values)) == {"refused"}:
        first = np.ravel(result.message.values)[0]
        raise ValueError(f"no point of the grid can be followed; the first says: {first}")
    if stopped and none_done(result):
        raise KeyboardInterrupt
    return result


class Task(NamedTuple):
    """A group, for whoever follows it."""

    points: Points
    values: list[dict[str, Any]]
    """At each of its points."""
    labels: dict[str, list[Any]]
    path: Path | None
    """Of its file."""
    lanes: int


class Done(NamedTuple):
    """What became of a group."""

    summary: Summary
    group: "xr.Dataset | None"
    """If it is in no file."""


def _follow_missing(
    kept: Folder,
    points: Points,
    executor: cf.Executor | None,
    lanes: int,
    devices: Sequence[Any] | None,
    progress: bool | None,
) -> tuple[Summary, bool]:
    """Follow the groups that are not there yet.

    Returns:
        What is known of all groups, and whether Ctrl-C came before the last. A group that could not
        be followed is in memory, with the reason; if there is none, the manifest says that all is
        done.
    """
    grid, total = kept.grid, kept.grid.num_points
    there = [block for block in grid if kept.has(block)]
    missing = sorted(set(range(grid.num_blocks)) - {block.number for block in there})
    done = sum(block.where.size for block in there)
    summary = functools.reduce(
        lambda known, block: Summary.of(kept.load(block)).beside(known), there, None
    )
    ends: dict[int, BaseException] = dict.fromkeys(missing, KeyboardInterrupt())
    stopped = False

    def tasks() -> Iterator[tuple[Task]]:
        for block in map(grid.block, missing):
            path = None if kept.path is None else kept.path / block.name
            values, labels = grid.points(block.where), grid.labelled(block.where)
            yield (Task(points, values, labels, path, lanes),)

    with ProgressBar("sweep", float(done), float(total), progress) as bar:

        def tell(now: float) -> None:
            bar.update(done + now, f"{int(done + now)} of {total} runs")

        own = devices or devices_here(grid.block(0).where.size, lanes)
        here = functools.partial(follow_group, devices=own, tell=tell)
        try:
            for i, found in spread(executor, here if executor is None else follow_group, tasks()):
                block = grid.block(missing[i])
                if isinstance(found, BaseException):
                    ends[block.number] = found
                else:
                    del ends[block.number]
                    summary = found.summary.beside(summary)
                    if found.group is not None:
                        kept.memory[block.name] = found.group
                    if stopped := found.summary.interrupted:
                        break
                done += block.where.size
                tell(0.0)
        except KeyboardInterrupt:
            stopped = True
    known: dict[tuple[int, int], xr.Dataset] = {}  # one for all that share the reason
    for number, error in ends.items():
        block = grid.block(number)
        size = block.where.size
        if (id(error), size) not in known:
            known[id(error), size] = group = _unfollowed([error] * size, {})
            summary = Summary.of(group).beside(summary)
        kept.memory[block.name] = known[id(error), size]
    assert summary is not None  # a grid has a point
    if not ends and not stopped:
        kept.complete(summary)
    return summary, stopped


def follow_group(
    task: Task,
    *,
    devices: Sequence[Any] | None = None,
    tell: Callable[[float], None] = lambda done: None,
) -> Done:
    """Follow the members of a group, and write its file.

    Args:
        task: the group.
        devices: as for ``ensemble``.
        tell: is told how many are done.
    """
    trials = task.points.trials(task.values)
    kinds: dict[str | None, list[int]] = {}
    for i, trial in enumerate(trials):
        kinds.setdefault(trial.kind if isinstance(trial, Trial) else None, []).append(i)
    parts, done = [], 0
    for kind, places in kinds.items():
        labels = {name: [each[i] for i in places] for name, each in task.labels.items()}
        own: list[Any] = [trials[i] for i in places]
        if kind is None:
            part = _unfollowed([ValueError(f"{type(e).__name__}: {e}") for e in own], labels)
        else:
            before = done

            def told(now: float, before: int = before) -> None:
                tell(before + now)

            part = _followed(own, labels, task.lanes, devices, told)
        parts.append((np.array(places), part))
        done += len(places)
    group = merged(parts, len(trials))
    summary = Summary.of(group)
    if task.path is None or summary.interrupted:
        return Done(summary, group)
    record.save(group, task.path)
    return Done(summary, None)


def _followed(
    trials: Sequence[Trial],
    labels: Mapping[str, Sequence[Any]],
    lanes: int,
    devices: Sequence[Any] | None,
    tell: Callable[[float], None],
) -> "xr.Dataset":
    """The record of members of one kind."""
    shared = {k: v for k, v in common(trials[0].options).items() if k != "descent"}
    work = Work(
        [trial.problem for trial in trials],
        [trial.weights for trial in trials],
        [trial.options.get("optimizer") for trial in trials],
        [trial.options.get("rtol", 1e-9) for trial in trials],
        shared.pop("until"),
        shared.pop("save"),
        shared,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the variable `admissible` tells
        return follow(work, labels, lanes=lanes, devices=devices, tell=tell)


def _unfollowed(
    errors: Sequence[BaseException], labels: Mapping[str, Sequence[Any]]
) -> "xr.Dataset":
    """The record of members that were not followed, which says why."""
    more = {"in_lanes": [False] * len(errors), "admissible": [True] * len(errors)}
    return joined(errors, more=more, coordinates=labels)

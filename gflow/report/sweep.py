"""Trajectories over a grid of parameters: one labelled record with a dimension a parameter."""

import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gflow import record
from gflow.dynamics.descending.optimizers import describe
from gflow.dynamics.drive.members import agreed, filled, none_done
from gflow.dynamics.drive.progress import ProgressBar
from gflow.dynamics.ensemble import LANES, Work, check_options, follow
from gflow.dynamics.reasons import Reason
from gflow.names import SETTINGS, all_names, check_names
from gflow.problem.arguments import (
    expect,
    expect_unmasked,
    file_path,
    positive_count,
    shown,
)
from gflow.problem.network import Weights
from gflow.problem.risk import Problem
from gflow.report.groups import Folder

if TYPE_CHECKING:
    import xarray as xr

GROUP_SIZE = 128
"""Members of a group at most: what a kill may lose, and what a process takes at a time."""

INDEX = "grid_index"
"""The variable of a group that says where on the grid a member is, counted along the last axis
first."""

Grid = Mapping[str, Sequence[Any] | Mapping[str, Any]]


def sweep(
    function: Callable[..., Any] | str | os.PathLike[str],
    grid: Grid | None = None,
    *,
    until: Any = None,
    save: int | Sequence[float] | np.ndarray = 20,
    folder: str | os.PathLike[str] | None = None,
    group_size: int = GROUP_SIZE,
    lanes: int = LANES,
    devices: Sequence[Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> "xr.Dataset":
    r"""Follow one trajectory at every point of a grid.

    Points that share shapes are followed together as one ``gflow.ensemble``, whatever differs
    between them. With ``folder`` each such group is saved as it ends: after a kill, or Ctrl-C, the
    same call does what is missing, and any number of processes that call it with the same folder
    share the groups (see ``docs/scaling.md``). Ctrl-C returns what is done, and "interrupted" as
    the status of all other points. A point whose function raises an error, or whose
    run fails, says so in ``status`` and ``message``, and the others are as they would be without.

    Args:
        function: takes one value for each dimension of the grid, by name, and returns
            ``(problem, weights)`` or ``(problem, weights, options)``, the last a dict of arguments
            of ``gradient_flow`` for this point alone, or with ``optimizer`` those of
            ``gradient_descent``. It must give the same at every call. Or the path of a TOML file
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

    >>> import gflow
    >>> def start(depth, seed):
    ...     data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    ...     return gflow.Problem(data), gflow.init.zero_first((2, *[3] * (depth - 1), 1), seed=seed)
    >>> grid = {"depth": [2, 3], "seed": range(2)}
    >>> found = gflow.sweep(start, grid, optimizer=gflow.polyak(), until=gflow.Steps(9), save=3)
    >>> dict(found.misalignment.sizes)
    {'depth': 2, 'seed': 2, 'point': 3, 'pair': 2}
    """
    group_size = positive_count("group_size", group_size)
    folder = None if folder is None else file_path("folder", folder)
    if not callable(function):
        function = file_path("function", function)
        from gflow.report.variation import read_sweep

        made = read_sweep(function)
        function, own = made.function, made.grid
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
    axes = {name: _axis(name, values) for name, values in (grid or {}).items()}
    if not axes:
        raise ValueError("`grid` is empty; expected values for at least one name.")
    labels = {name: list(labels) for name, (labels, _) in axes.items()}
    trials = _trials(function, axes, {"until": until, "save": save, **options})
    groups = list(_groups(trials, labels, group_size))
    kept = Folder(folder, labels, [g.name for g in groups])

    missing = [group for group in groups if not kept.has(group.name)]
    total, done = len(trials), len(trials) - sum(len(group.indices) for group in missing)
    with ProgressBar("sweep", float(done), float(total), progress) as bar:

        def tell(now: float) -> None:
            bar.update(done + now, f"{int(done + now)} of {total} runs")

        stopped = None
        # At first what nobody works on, then what nobody finished.
        for wait, group in itertools.product((False, True), missing):
            if kept.has(group.name):
                continue
            with kept.claim(group.name, wait=wait) as mine:
                if mine and not kept.has(group.name):
                    found = _follow(group, trials, labels, lanes, devices, tell)
                    if "interrupted" in found.status.values:
                        stopped = found
                        break
                    kept.keep(group.name, found)
            if kept.has(group.name):
                done += len(group.indices)
                tell(0.0)
    ends = {
        i: ("refused", f"{type(trial).__name__}: {trial}")
        for i, trial in enumerate(trials)
        if isinstance(trial, Exception)
    }
    if stopped is None:
        kept.tidy([group.name for group in groups])
        return _assembled((kept.load(group.name) for group in groups), labels, ends)
    there = [group for group in groups if kept.has(group.name)]
    known = {i for group in there for i in group.indices} | set(stopped[INDEX].values) | set(ends)
    ends |= {i: Reason.NOT_STARTED.end() for i in range(total) if i not in known}
    parts = (*(kept.load(group.name) for group in there), stopped)
    if all(map(none_done, parts)):
        raise KeyboardInterrupt
    return _assembled(iter(parts), labels, ends)


class Trial(NamedTuple):
    """What the function gave at a point of the grid."""

    problem: Problem
    weights: Weights
    options: dict[str, Any]


class Group(NamedTuple):
    """Points that are followed together."""

    name: str
    indices: list[int]


def _axis(name: str, values: Any) -> tuple[list[Any], list[Any]]:
    """Labels and values along a dimension."""
    expect_unmasked(f"grid[{name!r}]", values)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(
            f"`grid[{name!r}]` is {shown(values)}; expected a list of values, or a mapping from "
            "label to value."
        )
    labels, values = (
        (list(values), list(values.values()))
        if isinstance(values, Mapping)
        else (list(values), list(values))
    )
    plain = all(isinstance(label, int | float | np.number) for label in labels)
    labels = labels if plain else [str(label) for label in labels]
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(
            f"`grid[{name!r}]` has labels {labels}; expected at least one, and no two alike."
        )
    return labels, values


def _trials(
    function: Callable[..., Any],
    axes: Mapping[str, tuple[list[Any], list[Any]]],
    shared: Mapping[str, Any],
) -> list[Trial | Exception]:
    """What the function gives at every point, equal problems as one object."""
    known: dict[Any, Problem] = {}
    found: list[Trial | Exception] = []
    for point in itertools.product(*(values for _, values in axes.values())):
        try:
            found.append(_trial(function(**dict(zip(axes, point, strict=True))), shared, known))
        except Exception as error:  # whatever it is, the other points are not to suffer
            found.append(error)
    errors = [each for each in found if isinstance(each, Exception)]
    if len(errors) == len(found):
        raise ValueError(f"`function` fails at every point of the grid: {errors[0]}") from errors[0]
    return found


def _trial(given: Any, shared: Mapping[str, Any], known: dict[Any, Problem]) -> Trial:
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise ValueError(
            f"`function` returns a {type(given).__name__}; expected (problem, weights) or "
            "(problem, weights, options)."
        )
    problem, weights, *more = given
    options = {**shared, **(more[0] if more else {})}
    if options["until"] is None:
        raise ValueError("`until` is missing; expected it here or in the options of the point.")
    rest = {k: v for k, v in options.items() if k not in ("until", "save", "rtol", "optimizer")}
    check_options(rest, descends=options.get("optimizer") is not None)
    problem = known.setdefault(_digest(problem), problem)
    return Trial(problem, problem.network.check(weights, problem.data), options)


def _digest(*things: Any) -> str:
    """What tells things apart: arrays by their contents, others by their text."""
    digest = hashlib.sha256()
    for thing in things:
        for leaf in jax.tree.leaves(thing):
            told = np.asarray(leaf)
            digest.update(told.tobytes() if told.dtype != object else repr(leaf).encode())
        digest.update(str(jax.tree.structure(thing)).encode())
    return digest.hexdigest()


def _lasting(text: str) -> str:
    """Text that is the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _groups(
    trials: Sequence[Trial | Exception], labels: Mapping[str, Any], size: int
) -> Iterator[Group]:
    """Points with equal shapes and options, named by all that they consist of."""
    alike: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        if isinstance(trial, Trial):
            problem, weights, options = trial
            shapes = [leaf.shape for leaf in jax.tree.leaves((problem.data, weights))]
            key = _lasting(repr((shapes, jax.tree.structure(weights), _common(options))))
            alike.setdefault(key, []).append(i)
    pieces = [
        indices[begin : begin + size]
        for indices in alike.values()
        for begin in range(0, len(indices), size)
    ]
    for number, piece in enumerate(pieces):
        own: list[Any] = [trials[i] for i in piece]
        arrays = [jax.tree.leaves((trial.problem, trial.weights)) for trial in own]
        text = [_lasting(repr((t.problem.network, t.problem.loss, _told(t.options)))) for t in own]
        digest = _digest(arrays, text, [str(labels)], piece)
        yield Group(f"group-{number:04d}-{digest[:12]}.nc", piece)


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that members of a group share."""
    found = {key: value for key, value in options.items() if key not in ("rtol", "optimizer")}
    return found | {"descent": options.get("optimizer") is not None}


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = options.get("optimizer")
    return {**options, "optimizer": optimizer and describe(optimizer)}


def _follow(
    group: Group,
    trials: Sequence[Any],
    labels: Mapping[str, list[Any]],
    lanes: int,
    devices: Sequence[Any] | None,
    tell: Callable[[float], None],
) -> "xr.Dataset":
    """The record of a group's members."""
    own = [trials[i] for i in group.indices]
    common = {k: v for k, v in _common(own[0].options).items() if k != "descent"}
    work = Work(
        [trial.problem for trial in own],
        [trial.weights for trial in own],
        [trial.options.get("optimizer") for trial in own],
        [trial.options.get("rtol", 1e-9) for trial in own],
        common.pop("until"),
        common.pop("save"),
        common,
    )
    places = np.unravel_index(group.indices, [len(each) for each in labels.values()])
    told = {
        name: [each[k] for k in place]
        for (name, each), place in zip(labels.items(), places, strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the variable `admissible` tells
        found = follow(work, told, lanes=lanes, devices=devices, tell=tell)
    return found.assign({INDEX: ("member", np.array(group.indices))})


class Part(NamedTuple):
    """A variable of one group."""

    where: np.ndarray
    """Places on the grid."""
    of_members: bool
    dims: tuple[str, ...]
    values: np.ndarray
    told: dict[str, str]

    @classmethod
    def of(cls, group: "xr.Dataset", name: str) -> "Part":
        """A variable of a group; one that all members share is repeated."""
        dims = tuple(str(dim) for dim in group[name].dims if dim != "member")
        values, where = group[name].values, group[INDEX].values
        of_members = "member" in group[name].dims
        if not of_members:
            values = np.broadcast_to(values, (len(where), *values.shape))
        return cls(where, of_members, dims, values, group[name].attrs)


def _assembled(
    groups: "Iterator[xr.Dataset]",
    labels: Mapping[str, list[Any]],
    ends: Mapping[int, tuple[str, str]],
) -> "xr.Dataset":
    """All groups on the grid."""
    shape = tuple(len(each) for each in labels.values())
    columns: dict[str, list[Part]] = {}
    attrs: list[dict[str, Any]] = []
    for group in groups:
        attrs.append(group.attrs)
        for name in map(str, group.data_vars):
            if name != INDEX and "weights_" not in name and "support" not in name:
                columns.setdefault(name, []).append(Part.of(group, name))
    found: dict[str, record.Variable] = {}
    for name, parts in columns.items():
        first = parts[0]
        rows = [part.values[:1] for part in parts if not part.of_members]
        if len(rows) == len(parts) and all(np.array_equal(row, rows[0]) for row in rows):
            found[name] = (first.dims, rows[0][0], first.told)
            continue
        out = filled([(part.where, part.values) for part in parts], int(np.prod(shape)))
        if name in ("status", "message"):
            for i, told in ends.items():
                out[i] = told[name == "message"]
        out = out.astype(str) if out.dtype == object else out
        found[name] = ((*labels, *first.dims), out.reshape(*shape, *out.shape[1:]), first.told)
    common = agreed(attrs, but=("num_members", "utilisation", "wall_time"))
    one = record.assemble(found, {**common, "num_members": int(np.prod(shape))})
    return one.assign_coords({name: (name, each) for name, each in labels.items()})

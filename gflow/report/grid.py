"""The grid of a sweep, and the blocks that it is cut into.

Whoever runs a sweep sees the axes, never all points: a block is a box of the grid, and its points
are made where it is followed. Points of one shape belong together, so an axis along which shapes or
options differ is cut into single values; which ones these are is asked of a few points.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gflow.dynamics.descending.optimizers import describe
from gflow.dynamics.ensemble import check_options
from gflow.problem.arguments import expect_unmasked, shown
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

TRIED = 16
"""Axes of so many values are tried at each of them, longer ones at their ends and middle."""


class Axis(NamedTuple):
    """A dimension of the grid."""

    labels: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, name: str, values: Any) -> "Axis":
        """Labels and values as the caller gave them.

        Raises:
            ValueError: if they are no list or mapping, empty, or two labels are alike.
        """
        expect_unmasked(f"grid[{name!r}]", values)
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(
                f"`grid[{name!r}]` is {shown(values)}; expected a list of values, or a mapping "
                "from label to value."
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
                f"`grid[{name!r}]` has labels {shown(labels)}; expected at least one, and no two "
                "alike."
            )
        return cls(labels, values)


class Trial(NamedTuple):
    """What the function gave at a point of the grid."""

    problem: Problem
    weights: Weights
    options: dict[str, Any]

    @property
    def kind(self) -> str:
        """What members that are followed together share: shapes and options."""
        leaves = jax.tree.leaves((self.problem.data, self.weights))
        shapes = [leaf.shape for leaf in leaves]
        structure = jax.tree.structure(self.weights)
        return _lasting(repr((shapes, structure, common(self.options))))

    @property
    def digest(self) -> str:
        """What tells it from any other, in every process."""
        told = common(self.options) | {"optimizer": None, "rtol": self.options.get("rtol")}
        if self.options.get("optimizer") is not None:
            told["optimizer"] = describe(self.options["optimizer"])
        text = _lasting(repr((self.problem.network, self.problem.loss, told)))
        return digest(jax.tree.leaves((self.problem, self.weights)), text)


class Points(NamedTuple):
    """What is done at points of a grid, wherever it is done."""

    function: Callable[..., Any]
    shared: Mapping[str, Any]
    """Options for all points."""

    def trials(self, points: Iterable[Mapping[str, Any]]) -> list[Trial | Exception]:
        """What the function gives at each, or raises; equal problems as one object."""
        known: dict[str, Problem] = {}
        found: list[Trial | Exception] = []
        for point in points:
            try:
                found.append(self._trial(self.function(**point), known))
            except Exception as error:  # whatever it is, the other points are not to suffer
                found.append(error)
        return found

    def _trial(self, given: Any, known: dict[str, Problem]) -> Trial:
        if not isinstance(given, tuple) or len(given) not in (2, 3):
            raise ValueError(
                f"`function` returns a {type(given).__name__}; expected (problem, weights) or "
                "(problem, weights, options)."
            )
        problem, weights, *more = given
        options = {**self.shared, **(more[0] if more else {})}
        if options["until"] is None:
            raise ValueError("`until` is missing; expected it here or in the options of the point.")
        rest = {k: v for k, v in options.items() if k not in ("until", "save", "rtol", "optimizer")}
        check_options(rest, descends=options.get("optimizer") is not None)
        problem = known.setdefault(digest(problem), problem)
        return Trial(problem, problem.network.check(weights, problem.data), options)


class Block(NamedTuple):
    """A box of the grid, whose points are followed by one task."""

    number: int
    box: tuple[slice, ...]
    """Where it is along each axis."""
    where: np.ndarray
    """Its points, counted along the last axis first."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(along.stop - along.start for along in self.box)

    @property
    def name(self) -> str:
        """Of its file."""
        return f"group-{self.number:06d}.nc"


class Grid:
    """Axes, and the lengths of a block along each."""

    def __init__(self, axes: Mapping[str, Axis], pieces: Sequence[int]):
        self.axes = dict(axes)
        self.shape = tuple(len(axis.labels) for axis in axes.values())
        self.pieces = tuple(pieces)
        cut = zip(self.shape, self.pieces, strict=True)
        self.lengths = tuple(
            tuple(min(piece, n - begin) for begin in range(0, n, piece)) for n, piece in cut
        )
        """Of the blocks along each axis."""
        self.blocks = tuple(map(len, self.lengths))

    @classmethod
    def cut(cls, axes: Mapping[str, Axis], single: Iterable[str], size: int) -> "Grid":
        """That of the largest blocks, of at most ``size`` points, single values along some axes."""
        alone = set(single)
        lengths = [1 if name in alone else len(axis.labels) for name, axis in axes.items()]
        return cls(axes, _pieces(lengths, size))

    @property
    def labels(self) -> dict[str, list[Any]]:
        """Along each dimension."""
        return {name: axis.labels for name, axis in self.axes.items()}

    @property
    def num_points(self) -> int:
        """Of the grid."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_blocks(self) -> int:
        """Of the grid."""
        return int(np.prod(self.blocks, dtype=np.int64))

    def __iter__(self) -> Iterator[Block]:
        return map(self.block, range(self.num_blocks))

    def block(self, number: int) -> Block:
        """The block of a number, counted along the last axis first."""
        at = np.unravel_index(number, self.blocks)
        box = tuple(
            slice(int(i) * piece, min((int(i) + 1) * piece, n))
            for i, piece, n in zip(at, self.pieces, self.shape, strict=True)
        )
        along = np.ix_(*(np.arange(each.start, each.stop) for each in box))
        return Block(number, box, np.ravel_multi_index(along, self.shape).ravel())

    def points(self, where: np.ndarray) -> list[dict[str, Any]]:
        """The values at points."""
        return [
            {
                name: axis.values[k]
                for (name, axis), k in zip(
                    self.axes.items(), np.unravel_index(i, self.shape), strict=True
                )
            }
            for i in where
        ]

    def labelled(self, where: np.ndarray) -> dict[str, list[Any]]:
        """The labels at points."""
        places = np.unravel_index(where, self.shape)
        return {
            name: [axis.labels[k] for k in place]
            for (name, axis), place in zip(self.axes.items(), places, strict=True)
        }


class Seen(NamedTuple):
    """What a few points of a grid show of it."""

    single: list[str]
    """The axes along which shapes or options differ."""
    fingerprint: str
    """What tells this sweep from any other of the same axes."""


def seen(axes: Mapping[str, Axis], points: Points) -> Seen:
    """What one sees along each axis, the others at their first value.

    Raises:
        ValueError: if the function fails at every point that is tried.
    """
    tried: dict[tuple[int, ...], None] = {}
    along: dict[str, list[tuple[int, ...]]] = {}
    for k, (name, axis) in enumerate(axes.items()):
        n = len(axis.labels)
        steps = range(n) if n <= TRIED else (0, n // 2, n - 1)
        along[name] = [tuple(i if j == k else 0 for j in range(len(axes))) for i in steps]
        tried |= dict.fromkeys(along[name])
    whole = Grid(axes, [1] * len(axes))
    where = np.array([np.ravel_multi_index(at, whole.shape) for at in tried])
    trials = points.trials(whole.points(where))
    errors = [each for each in trials if isinstance(each, Exception)]
    if len(errors) == len(trials):
        first = f"{len(trials)} tried first, of {whole.num_points}"
        raise ValueError(
            f"`function` fails at every point of the grid ({first}): {errors[0]}"
        ) from errors[0]
    found = dict(zip(tried, trials, strict=True))
    kinds = {at: trial.kind for at, trial in found.items() if isinstance(trial, Trial)}
    single = [
        name for name, there in along.items() if len({kinds[at] for at in there if at in kinds}) > 1
    ]
    told = [trial.digest if isinstance(trial, Trial) else type(trial).__name__ for trial in trials]
    return Seen(single, digest(told))


def common(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that members followed together share."""
    found = {key: value for key, value in options.items() if key not in ("rtol", "optimizer")}
    return found | {"descent": options.get("optimizer") is not None}


def digest(*things: Any) -> str:
    """What tells things apart: arrays by their contents, others by their text."""
    told = hashlib.sha256()
    for thing in things:
        for leaf in jax.tree.leaves(thing):
            array = np.asarray(leaf)
            told.update(array.tobytes() if array.dtype != object else repr(leaf).encode())
        told.update(str(jax.tree.structure(thing)).encode())
    return told.hexdigest()


def _lasting(text: str) -> str:
    """Text that is the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _pieces(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Lengths along the axes of the largest box of at most ``size`` points.

    Pieces of an axis are as equal as can be, so of n values they are ceil(n / p) long, p of them.
    """
    found: tuple[int, tuple[int, ...]] = (1, (1,) * len(shape))

    def extend(before: tuple[int, ...], room: int) -> None:
        nonlocal found
        k = len(before)
        if k == len(shape):
            found = max(found, (int(np.prod(before)), before))
            return
        for length in _lengths(shape[k], room):
            extend((*before, length), room // length)

    extend((), size)
    return found[1]


def _lengths(n: int, most: int) -> list[int]:
    """Lengths of at most ``most`` into which n values can be cut."""
    return [k for k in range(1, min(n, most) + 1) if -(-n // -(-n // k)) == k]

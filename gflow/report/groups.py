"""Files of a sweep: one a block of the grid, and a manifest that says how they make one record.

A file is written whole or not at all, and holds all members of its block, also those that could not
be followed. The manifest is written at the start, with what the sweep is, and once more at the end,
with the variables and their largest sizes, which is all that opening the whole takes.
"""

import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gflow import record
from gflow.dynamics.drive.members import agreed, filled, laid_out
from gflow.problem.arguments import file_path, flag
from gflow.report.grid import Axis, Block, Grid, digest

if TYPE_CHECKING:
    import xarray as xr

MANIFEST, SCHEMA = "sweep.json", "gflow-sweep-2"

MEMBER = "member"

LARGE = 2**30
"""Bytes beyond which a sweep in a folder is opened, not read."""

OWN_ATTRS = ("num_members", "utilisation", "wall_time")
"""Attributes of a group that say nothing of the whole."""


ONE_AT_A_TIME = threading.Lock()


class Column(NamedTuple):
    """A variable of all groups together, as the manifest has it."""

    dims: list[str]
    """Beside the members'."""
    sizes: list[int]
    """The largest of each."""
    kind: str
    """The type of the values, as NumPy writes it."""
    told: dict[str, str]
    of_all: str | None
    """What tells the values from others, where all members share them."""

    @classmethod
    def of(cls, variable: "xr.DataArray") -> "Column":
        """That of one group."""
        values = _values(variable)
        dims = [str(dim) for dim in variable.dims if dim != MEMBER]
        sizes = [int(variable.sizes[dim]) for dim in dims]
        told = {str(key): str(value) for key, value in variable.attrs.items()}
        of_all = None if MEMBER in variable.dims else digest(values)
        return cls(dims, sizes, values.dtype.str, told, of_all)

    def beside(self, other: "Column | None") -> "Column":
        """That of two groups, the other of which may lack it."""
        if other is None:
            return self if self.of_all else self._replace(kind=_with_blanks(self.kind))
        kind = np.promote_types(self.kind, other.kind).str
        of_all = self.of_all if self.of_all == other.of_all else None
        if self.sizes == other.sizes:
            return self._replace(kind=kind, of_all=of_all)
        sizes = list(map(max, self.sizes, other.sizes))
        return self._replace(sizes=sizes, kind=_with_blanks(kind), of_all=None)

    @property
    def bytes_of_one(self) -> int:
        """What it takes for each point of the grid."""
        size = 0 if self.of_all is not None else int(np.prod(self.sizes))
        return size * np.dtype(self.kind).itemsize


class Summary(NamedTuple):
    """What one needs to know of groups to find them in the whole."""

    columns: dict[str, Column]
    attrs: dict[str, Any]
    interrupted: bool = False

    @classmethod
    def of(cls, group: "xr.Dataset") -> "Summary":
        """That of one group."""
        columns = {
            str(name): Column.of(group[name])
            for name in group.data_vars
            if "weights_" not in str(name) and "support" not in str(name)
        }
        plain = {
            str(key): value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            for key, value in group.attrs.items()
        }
        return cls(columns, plain, "interrupted" in group["status"].values)

    def beside(self, other: "Summary | None") -> "Summary":
        """That of both."""
        if other is None:
            return self
        columns = {}
        for name, column in (other.columns | self.columns).items():
            known = other.columns if name in self.columns else self.columns
            columns[name] = column.beside(known.get(name))
        # A group none of whose members could be followed knows nothing of the others.
        attrs = [each.attrs for each in (self, other) if "log_risk" in each.columns]
        return Summary(columns, agreed(attrs, but=OWN_ATTRS))


def load(path: str | os.PathLike[str], *, lazy: bool | None = None) -> "xr.Dataset":
    """Read a record that ``gflow.save`` wrote, or the folder of a sweep that is done.

    Args:
        path: a file, or a folder that ``gflow.sweep`` filled.
        lazy: of a folder, whether its files are opened when values are asked for, as arrays of
            dask; None does so beyond a gigabyte. A file is read into memory.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is not a gflow record, or the folder not one of a sweep that is
            done.
        ModuleNotFoundError: when ``lazy`` wants dask, which is not installed.
    """
    path, lazy = file_path("path", path), flag("lazy", lazy, none=True)
    if not path.is_dir():
        return record.load(path)
    kept = Folder.found(path)
    assert kept.summary is not None  # the sweep is done
    return together(kept, kept.summary, lazy)


def merged(parts: Sequence[tuple[np.ndarray, "xr.Dataset"]], count: int) -> "xr.Dataset":
    """One group of members that are in several, at places in it.

    Weights, whose shapes differ between them, are left out.
    """
    if len(parts) == 1:
        return parts[0][1]
    summary = functools.reduce(Summary.beside, (Summary.of(part) for _, part in parts))
    found: dict[str, record.Variable] = {}
    for name, column in summary.columns.items():
        if column.of_all is not None:
            shared = next(part[name] for _, part in parts if name in part)
            found[name] = (tuple(column.dims), _values(shared), column.told)
            continue
        there = [(places, part[name]) for places, part in parts if name in part]
        values = filled([(places, _each(len(places), one)) for places, one in there], count)
        values = _plain_text(values)
        found[name] = ((MEMBER, *column.dims), values, column.told)
    return record.assemble(found, summary.attrs)


class Folder:
    """Where the groups of one sweep are kept; None keeps them in memory.

    Args:
        path: the folder, made if it is not there.
        grid: of the sweep.
        fingerprint: what tells it from any other on this grid.

    Raises:
        ValueError: when the folder holds another sweep.
        OSError: when it cannot be written.
    """

    def __init__(self, path: Path | None, grid: Grid, fingerprint: str):
        self.path, self.grid = path, grid
        self.memory: dict[str, xr.Dataset] = {}
        self.told = {
            "schema": SCHEMA,
            "axes": {name: list(map(_plain, each)) for name, each in grid.labels.items()},
            "pieces": list(grid.pieces),
            "fingerprint": fingerprint,
        }
        self.summary: Summary | None = None
        """Of all groups, once they are done."""
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            there = _manifest(path)
            if any(there.get(key) != value for key, value in self.told.items()):
                raise ValueError(
                    f"`folder` is {path}, which holds another sweep: its grid, function, options "
                    f"or data were not these. Choose another folder, or delete {path}."
                )
            self.summary = _summary(there)
            return
        self._write(self.told)

    @classmethod
    def found(cls, path: Path) -> "Folder":
        """One that holds a sweep.

        Raises:
            ValueError: when it holds none, or one that is not done.
        """
        if not (path / MANIFEST).exists():
            raise ValueError(
                f"`path` is {path}, a folder without {MANIFEST}; expected the file of a record, or "
                "the folder of a sweep."
            )
        there = _manifest(path)
        if there.get("schema") != SCHEMA or "variables" not in there:
            raise ValueError(
                f"`path` is {path}, a sweep that is not done, or of another version of gflow; "
                "expected one that is: call `gflow.sweep` with this folder again."
            )
        axes = {name: Axis(labels, labels) for name, labels in there["axes"].items()}
        kept = cls(None, Grid(axes, there["pieces"]), there["fingerprint"])
        kept.path, kept.summary = path, _summary(there)
        return kept

    def has(self, block: Block) -> bool:
        """Whether a group is done."""
        there = self.path is not None and (self.path / block.name).exists()
        return there or block.name in self.memory

    def load(self, block: Block) -> "xr.Dataset":
        """A group that is done."""
        if self.path is None or block.name in self.memory:
            return self.memory[block.name]
        return record.load(self.path / block.name)

    def variable(self, block: Block, name: str) -> "tuple[tuple[str, ...], np.ndarray] | None":
        """Dimensions and values of one variable of a group that is done.

        Of a file nothing else is read: what xarray makes of the others takes as long as opening it.
        """
        import xarray as xr

        if self.path is None or block.name in self.memory:
            return _told(self.memory[block.name].get(name))
        others = () if self.summary is None else self.summary.columns.keys() - {name}
        how: dict[str, Any] = {"engine": "netcdf4", "drop_variables": sorted(others)}
        # The library is not made for threads, in which dask asks.
        with ONE_AT_A_TIME, xr.open_dataset(self.path / block.name, **how) as stored:
            return _told(stored.get(name))

    def complete(self, summary: Summary) -> None:
        """All groups are done: say so in the manifest."""
        self.summary = summary
        if self.path is not None:
            found = {name: column._asdict() for name, column in summary.columns.items()}
            self._write({**self.told, "variables": found, "attrs": summary.attrs})

    def _write(self, told: Mapping[str, Any]) -> None:
        assert self.path is not None
        with record.whole_file(self.path / MANIFEST) as partial:
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def together(kept: Folder, summary: Summary, lazy: bool | None) -> "xr.Dataset":
    """All groups on their grid, as one record.

    Args:
        kept: where they are.
        summary: of all of them.
        lazy: whether to open files when values are asked for, as arrays of dask; None does so if
            the values take more than a gigabyte and there are files.

    Raises:
        ModuleNotFoundError: when dask is wanted and not there.
    """
    grid = kept.grid
    columns = dict(summary.columns)
    size = grid.num_points * sum(column.bytes_of_one for column in columns.values())
    if lazy is None:
        lazy = kept.path is not None and size > LARGE
    found: dict[str, record.Variable] = {}
    for name in [name for name, column in columns.items() if column.of_all is not None]:
        column = columns.pop(name)
        shared = next(v for block in grid if (v := kept.variable(block, name)) is not None)
        found[name] = (tuple(column.dims), shared[1], column.told)
    values = _lazily(kept, columns, size) if lazy else _eagerly(kept, columns)
    for name, column in columns.items():
        found[name] = ((*grid.axes, *column.dims), values[name], column.told)
    one = record.assemble(found, {**summary.attrs, "num_members": grid.num_points})
    return one.assign_coords({name: (name, each) for name, each in grid.labels.items()})


def _eagerly(kept: Folder, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """The values of variables, in memory."""
    grid = kept.grid
    found = {
        name: laid_out([], (*grid.shape, *column.sizes), np.dtype(column.kind))
        for name, column in columns.items()
    }
    for block in grid:
        group = kept.load(block)
        for name, column in columns.items():
            found[name][block.box] = _of_block(block, _told(group.get(name)), column)
    return found


def _lazily(kept: Folder, columns: Mapping[str, Column], size: int) -> dict[str, Any]:
    """The values of variables, read when they are asked for."""
    try:
        import dask.array as da
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A record of {size / 2**30:.1f} GB is opened with dask, which is not installed: "
            "`pip install gflow[distributed]`, or `lazy=False` to read all of it."
        ) from error
    grid = kept.grid

    def of(name: str, column: Column) -> Any:
        def read(block_id: tuple[int, ...]) -> np.ndarray:
            at = block_id[: len(grid.shape)]
            block = grid.block(int(np.ravel_multi_index(at, grid.blocks)))
            return _of_block(block, kept.variable(block, name), column)

        chunks = (*grid.lengths, *((n,) for n in column.sizes))
        kind = np.dtype(column.kind)
        return da.map_blocks(
            read, chunks=chunks, dtype=kind, meta=np.empty((0,) * len(chunks), kind)
        )

    return {name: of(name, column) for name, column in columns.items()}


def _of_block(
    block: Block, variable: tuple[tuple[str, ...], np.ndarray] | None, column: Column
) -> np.ndarray:
    """The values of a variable on a block, filled up where members have none or fewer."""
    count = block.where.size
    parts = []
    if variable is not None:
        dims, values = variable
        parts.append((slice(count), values if MEMBER in dims else _repeated(count, values)))
    values = laid_out(parts, (count, *column.sizes), np.dtype(column.kind))
    return values.reshape(*block.shape, *column.sizes)


def _each(count: int, variable: "xr.DataArray") -> np.ndarray:
    """The values of members, repeated where they share them."""
    values = _values(variable)
    return values if MEMBER in variable.dims else _repeated(count, values)


def _repeated(count: int, values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values, (count, *values.shape))


def _told(variable: "xr.DataArray | None") -> tuple[tuple[str, ...], np.ndarray] | None:
    if variable is None:
        return None
    return tuple(map(str, variable.dims)), _values(variable)


def _values(variable: "xr.DataArray") -> np.ndarray:
    """Its values, text of one width."""
    return _plain_text(variable.values)


def _plain_text(values: np.ndarray) -> np.ndarray:
    return values.astype(str) if values.dtype == object else values


def _with_blanks(kind: str) -> str:
    """The type that has a value for what is not known."""
    return kind if np.dtype(kind).kind in "USb" else np.promote_types(kind, np.float64).str


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _summary(told: Mapping[str, Any]) -> Summary | None:
    if "variables" not in told:
        return None
    return Summary({k: Column(**v) for k, v in told["variables"].items()}, told["attrs"])


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label

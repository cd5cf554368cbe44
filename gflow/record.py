"""Records: every trajectory is a labelled ``xarray.Dataset``, saved as one netCDF file.

Dimensions: ``point`` along the trajectory, numbered from 0; ``layer`` from 1 at the input; ``pair``
of neighbouring layers (k, k+1), numbered by k; ``coordinate`` of the input space. A record explains
itself: its variables carry the words of ``quantities.py`` in their attributes.
"""

import contextlib
import functools
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.names import merged
from gflow.quantities import DIMENSIONS, QUANTITIES, quantity

if TYPE_CHECKING:
    import xarray as xr

SCHEMA = "gflow-record-1"

CERTIFIED = tuple(name for name, row in QUANTITIES.items() if row.certified)
"""Variables NAME for which a certified flow holds an error estimate, under ``NAME_error``."""

VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    **{name: (row.dims, row.meaning) for name, row in QUANTITIES.items()},
    **{
        f"{name}_error": (QUANTITIES[name].dims, f"estimated absolute error of {name}")
        for name in CERTIFIED
    },
}
"""Name: (dimensions, meaning), of everything that gflow writes along a run or about the data."""

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, str]]
"""Dimensions, values and attributes."""


def build(
    points: Mapping[str, Sequence[Any]],
    *,
    constants: Mapping[str, tuple[Sequence[str], Any, str]],
    attrs: Mapping[str, Any],
    extra_dims: Mapping[str, Sequence[str]] | None = None,
) -> "xr.Dataset":
    """A record from per-point values.

    Args:
        points: for each variable its values, one a saved point.
        constants: for each further variable (dimensions, value, meaning).
        attrs: provenance of the whole run; None values are dropped, booleans become 0 or 1.
        extra_dims: dimensions after ``point`` of variables that the table does not list.
    """
    return assemble(variables(points, constants, extra_dims), attrs)


def variables(
    points: Mapping[str, Sequence[Any]],
    constants: Mapping[str, tuple[Sequence[str], Any, str]],
    extra_dims: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Variable]:
    """The variables of a record, with dimensions and meanings; arguments as of `build`."""
    found: dict[str, Variable] = {}
    for name, values in points.items():
        stacked = np.stack([np.asarray(value) for value in values])
        if name in VARIABLES:
            dims, meaning = VARIABLES[name]
        else:
            after = (extra_dims or {}).get(name) or [
                f"{name}_{axis}" for axis in range(stacked.ndim - 1)
            ]
            dims, meaning = ("point", *after), name
        found[name] = (dims, stacked, {"long_name": meaning, "units": quantity(name).unit})
    fixed: dict[str, Variable] = {
        name: (tuple(dims), np.asarray(value), {"long_name": meaning, "units": "1"})
        for name, (dims, value, meaning) in constants.items()
    }
    return merged(found, fixed)


def assemble(found: Mapping[str, Variable], attrs: Mapping[str, Any]) -> "xr.Dataset":
    """A record of variables, with numbered dimensions, its provenance and the versions."""
    import xarray as xr

    from gflow.headline import as_record  # it imports xarray, which is slow

    record = xr.Dataset(dict(found))
    numbers = {
        dim: (dim, np.arange(first, first + record.sizes[dim]))
        for dim, first in DIMENSIONS.items()
        if dim in record.sizes
    }
    record = record.assign_coords(numbers)
    clean = {key: _plain(value) for key, value in attrs.items() if value is not None}
    record.attrs = {"schema": SCHEMA, **clean, **versions()}
    return as_record(record)


@functools.cache
def versions() -> dict[str, str]:
    """The versions that produced a record."""
    found = {"python": platform.python_version()}
    for package in ("gflow", "jax", "diffrax", "optax", "numpy"):
        try:
            found[f"{package}_version"] = version(package)
        except PackageNotFoundError:
            found[f"{package}_version"] = "unknown"
    return found


def save(record: "xr.Dataset", path: str | os.PathLike[str]) -> Path:
    """Write a record to one netCDF file that plain ``xarray.open_dataset`` reads.

    The file appears whole or not at all: it is written beside its final place and renamed.

    Raises:
        OSError: when the folder does not exist or cannot be written.
    """
    path = Path(path)
    with whole_file(path) as partial:
        record.to_netcdf(partial, engine="netcdf4", format="NETCDF4")
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, which replaces ``path`` once all of it is on the disk.

    Whatever happens meanwhile, ``path`` is the old file or the new one. After an error nothing is
    left; a process that is killed leaves a hidden ``.part`` file.

    Raises:
        OSError: when the folder does not exist or cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of {path} does not exist. Create it first.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    partial = Path(name)
    try:
        os.close(handle)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | os.PathLike[str]) -> "xr.Dataset":
    """Read a record that :func:`save` wrote, into memory.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is not a gflow record.
    """
    import xarray as xr

    from gflow.headline import as_record

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` is {path}; there is no such file.")
    try:
        with xr.open_dataset(path, engine="netcdf4") as stored:
            record = stored.load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`path` is {path}, which cannot be read as netCDF ({error}); expected a file written "
            "by `gflow.save`. It may be truncated."
        ) from error
    if record.attrs.get("schema") != SCHEMA:
        raise ValueError(
            f"`path` is {path}, a netCDF file with schema {record.attrs.get('schema')!r}; expected "
            f"{SCHEMA!r}, as written by `gflow.save`."
        )
    return as_record(record)


def _plain(value: Any) -> Any:
    """An attribute as netCDF can store it."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, tuple | list):
        return np.asarray(value)
    return value

"""Records: every trajectory is a labelled ``xarray.Dataset``, saved as one netCDF file.

Dimensions: ``point`` along the trajectory, numbered from 0; ``layer`` from 1 at the input; ``pair``
of neighbouring layers (k, k+1), numbered by k; ``coordinate`` of the input space. A record explains
itself: its variables carry the words of ``quantities.py`` in their attributes.
"""

import contextlib
import functools
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.names import fault_of, merged
from gflow.problem.arguments import expect, file_path
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
    points: Mapping[str, np.ndarray],
    *,
    constants: Mapping[str, tuple[Sequence[str], Any, str]],
    attrs: Mapping[str, Any],
    extra_dims: Mapping[str, Sequence[str]] | None = None,
) -> "xr.Dataset":
    """A record from values at saved points.

    Args:
        points: for each variable its values, the points on a leading axis.
        constants: for each further variable (dimensions, value, meaning).
        attrs: provenance of the whole run; None values are dropped, booleans become 0 or 1.
        extra_dims: dimensions after ``point`` of variables that the table does not list.
    """
    return assemble(variables(points, constants, extra_dims), attrs)


def variables(
    points: Mapping[str, np.ndarray],
    constants: Mapping[str, tuple[Sequence[str], Any, str]],
    extra_dims: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Variable]:
    """The variables of a record, with dimensions and meanings; arguments as of `build`."""
    found: dict[str, Variable] = {}
    for name, values in points.items():
        stacked = _countable(np.asarray(values))
        if name in VARIABLES:
            dims, meaning = VARIABLES[name]
            if (row := QUANTITIES.get(name.removesuffix("_error"))) is not None:
                dims = row.dims_of(stacked.ndim)
        else:
            after = (extra_dims or {}).get(name) or [
                f"{name}_{axis}" for axis in range(stacked.ndim - 1)
            ]
            dims, meaning = ("point", *after), name
        found[name] = (dims, stacked, {"long_name": meaning, "units": quantity(name).unit})
    fixed: dict[str, Variable] = {
        name: (tuple(dims), _countable(np.asarray(value)), {"long_name": meaning, "units": "1"})
        for name, (dims, value, meaning) in constants.items()
    }
    return merged(found, fixed)


def assemble(found: Mapping[str, Variable], attrs: Mapping[str, Any]) -> "xr.Dataset":
    """A record of variables, with numbered dimensions, its provenance and the versions."""
    from gflow.headline import Record  # it imports xarray, which is slow

    sizes: dict[str, int] = {}
    for dims, values, _ in found.values():
        sizes |= zip(dims, np.shape(values), strict=True)
    numbers = {
        dim: (dim, np.arange(first, first + sizes[dim]))
        for dim, first in DIMENSIONS.items()
        if dim in sizes
    }
    clean = {key: _plain(value) for key, value in attrs.items() if value is not None}
    return Record(dict(found), numbers, {"schema": SCHEMA, **clean, **versions()})


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

    Notes of your own in its attributes are kept as far as a file can hold them: None is left out,
    true and false become 1 and 0, dates and paths text, mappings and nested lists JSON.

    Raises:
        ValueError: when a variable or an attribute cannot be stored, which it names; nothing has
            been written then.
        OSError: when the folder does not exist or cannot be written.
    """
    import xarray as xr

    path = file_path("path", path)
    expect("record", record, xr.Dataset, "a record, as `gflow.gradient_flow` returns")
    stored = storable(record)
    with whole_file(path) as partial:
        try:
            _write(stored, partial)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`record` cannot be stored: {error}. {path} is as it was before."
            ) from error
    return path


def _write(stored: "xr.Dataset", path: Path) -> None:
    """Into a netCDF file.

    In a worker of dask ``to_netcdf`` asks the scheduler for a lock, several times a variable, which
    takes a quarter of what following many short trajectories does. No other process writes here,
    and threads of this one are kept apart by xarray's lock, as the library needs.
    """
    from xarray.backends import NetCDF4DataStore
    from xarray.backends.netCDF4_ import NETCDF4_PYTHON_LOCK

    if stored.chunks:  # read from other files as it is written
        stored.to_netcdf(path, engine="netcdf4", format="NETCDF4")
        return
    lock = NETCDF4_PYTHON_LOCK
    store = NetCDF4DataStore.open(os.fspath(path), mode="w", format="NETCDF4", lock=lock)
    try:
        stored.dump_to_store(store)
    finally:
        store.close()


def storable(record: "xr.Dataset") -> "xr.Dataset":
    """The record with names and attributes that a file can hold.

    Raises:
        ValueError: that names what no file can hold.
    """
    for name in (*record.variables, *record.dims):
        fault = fault_of(name)
        if fault:
            raise ValueError(
                f"`record` has the variable or dimension {name!r}, whose name {fault}; expected "
                "one that a file can hold: rename it."
            )
    out = record.copy()
    out.attrs = _stored_attrs("", record.attrs)
    for name in out.variables:
        where = f"[{str(name)!r}]"
        out[name].attrs = _stored_attrs(where, record[name].attrs)
        if record[name].dtype.kind not in "biufSUOMm":
            raise ValueError(
                f"`record{where}` has the type {record[name].dtype}, which a file cannot hold; "
                "expected numbers or text. Store real and imaginary parts apart."
            )
    return out


def _stored_attrs(where: str, attrs: Mapping[Any, Any]) -> dict[str, Any]:
    found = {}
    for name, value in attrs.items():
        fault = fault_of(name)
        if fault:
            raise ValueError(
                f"`record{where}.attrs` has the name {name!r}, which {fault}; expected one that a "
                "file can hold."
            )
        if value is None:
            continue
        try:
            found[name] = _stored(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"`record{where}.attrs[{name!r}]` is a {type(value).__name__}, which a file cannot "
                f"hold ({error}); expected a number, text, a list of them, or what JSON can write."
            ) from error
    return found


def _stored(value: Any) -> Any:
    """An attribute as a file holds it."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return json.dumps(value, default=_for_json)
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        array = _simple_array(value)
        return json.dumps(value, default=_for_json) if array is None else array
    array: Any = np.asarray(value)  # of NumPy's and JAX's, and plain numbers
    if array.dtype == bool:
        array = array.astype(np.int8)
    if array.dtype.kind == "U" and array.ndim == 0:
        return str(array)
    if array.dtype.kind == "M":
        return str(array) if array.ndim == 0 else np.datetime_as_string(array)  # pyright: ignore
    if array.dtype.kind not in "iufU" or array.dtype.itemsize < 1 + (array.dtype.kind == "f"):
        raise TypeError(f"no number and no text, {array.dtype}")
    if array.dtype == np.float16 or (array.dtype.itemsize > 8 and array.dtype.kind == "f"):
        array = array.astype(np.float64)
    return json.dumps(array.tolist()) if array.ndim > 1 else array


def _simple_array(values: Sequence[Any]) -> np.ndarray | None:
    """Numbers, or texts, as an array; None for what is nested, empty or mixed."""
    plain = (bool, np.bool_), (int, float, np.integer, np.floating), (str,)
    for kinds in plain:
        if values and all(isinstance(each, kinds) for each in values):
            array = np.asarray(values)
            return array.astype(np.int8) if array.dtype == bool else array
    return None


def _for_json(value: Any) -> Any:
    """What JSON does not know, in what it knows."""
    stored = _stored(value)
    return stored.tolist() if isinstance(stored, np.ndarray | np.generic) else stored


def _countable(values: np.ndarray) -> np.ndarray:
    """True and false as one and zero, of which there are differences and means."""
    return values.astype(np.int8) if values.dtype == bool else values


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

    path = file_path("path", path)
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

"""Records: every trajectory is a labelled ``xarray.Dataset``, saved as one netCDF file.

Dimensions: ``point`` along the trajectory, numbered from 0; ``layer`` from 1 at the input; ``pair``
of neighbouring layers (k, k+1), numbered by k; ``coordinate`` of the input space. The table below
says what each variable is; a record explains itself through the same words in its attributes.
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

if TYPE_CHECKING:
    import xarray as xr

SCHEMA = "gflow-record-1"

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, str]]
"""Dimensions, values and attributes."""

_POINT, _LAYER, _PAIR = ("point",), ("point", "layer"), ("point", "pair")

VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "log_risk": (_POINT, "log R, natural logarithm of the mean loss"),
    "log_time": (_POINT, "log t, natural logarithm of the time of dW/dt = -grad R"),
    "num_steps": (_POINT, "accepted solver steps, or descent iterations, so far"),
    "log_step_size": (_POINT, "logarithm of descent's latest step size"),
    "margin": (_POINT, "normalised margin min_i q_i / |w|"),
    "margin_gap": (_POINT, "max margin minus normalised margin, absolute error 1e-16"),
    "layer_margin": (_POINT, "min_i q_i / prod_k |W_k|_F"),
    "smoothed_margin": (_POINT, "l^-1(sum_i l(q_i)) / prod_k |W_k|_F"),
    "min_margin": (_POINT, "unnormalised margin min_i q_i"),
    "norm": (_POINT, "Euclidean norm of all weights"),
    "kkt_residual": (_POINT, "Lyu and Li's epsilon: |W~ - sum_i lambda_i grad q_i(W~)|"),
    "kkt_slackness": (_POINT, "Lyu and Li's delta: max_i lambda_i (q_i(W~) - 1)"),
    "perpendicular_cosine": (_POINT, "cosine between w off the max-margin direction and grad R(w)"),
    "direction_error": (_POINT, "| w/|w| - max-margin direction |"),
    "direction_alignment": (_POINT, "| <w / prod_k |W_k|_F, v_1> |"),
    "alignment": (_PAIR, "|<v_{k+1}, u_k>| of neighbouring layers"),
    "misalignment": (_PAIR, "1 - |<v_{k+1}, u_k>|, free of cancellation"),
    "frobenius_norm": (_LAYER, "|W_k|_F"),
    "spectral_norm": (_LAYER, "|W_k|_2"),
    "rank_one_residual": (_LAYER, "| W_k/|W_k|_F - u_k v_k^T |_F"),
    "rank_one_gap": (_LAYER, "1 - |W_k|_2/|W_k|_F, free of cancellation"),
    "imbalance_drift": (_POINT, "largest change of a conserved matrix / largest |W_k|_F^2"),
    "clock_value": (_POINT, "s, the coordinate that the solver steps in"),
    "clock_error": (
        _POINT,
        "energy identity R(0) - R(t) = int |grad R|^2 dt: |-log R minus its value by the clock| / "
        "max(1, |log R|), in a time clock the same of log t",
    ),
    "digits_left": (_POINT, "decimal digits that float64 leaves of differences of margins"),
    "rank_one_slack": (_LAYER, "Lemma 2 (i): D minus |W_k|_F^2 - |W_k|_2^2"),
    "alignment_slack": (
        _PAIR,
        "Lemma 2 (ii): D + |W_{k+1}(0)|_2^2 + |W_k(0)|_2^2 minus "
        "(1 - <v_{k+1}, u_k>^2) |W_{k+1}|_2^2",
    ),
    "beyond_hand_over": (_POINT, "1 where the run continues in split coordinates, else 0"),
    "end_to_end": (("point", "coordinate"), "w = (W_L ... W_1)^T"),
}
"""Name: (dimensions, meaning). All quantities are dimensionless."""

CERTIFIED = (
    "log_time",
    "margin",
    "margin_gap",
    "layer_margin",
    "smoothed_margin",
    "kkt_residual",
    "kkt_slackness",
    "min_margin",
    "norm",
    "direction_error",
    "direction_alignment",
    "alignment",
    "misalignment",
    "frobenius_norm",
    "spectral_norm",
    "rank_one_residual",
    "rank_one_gap",
    "end_to_end",
)
"""Variables NAME for which a certified flow holds an error estimate, under ``NAME_error``."""

VARIABLES |= {
    f"{name}_error": (VARIABLES[name][0], f"estimated absolute error of {name}")
    for name in CERTIFIED
}


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
        found[name] = (dims, stacked, {"long_name": meaning, "units": "1"})
    for name, (dims, value, meaning) in constants.items():
        found[name] = (tuple(dims), np.asarray(value), {"long_name": meaning, "units": "1"})
    return found


def assemble(found: Mapping[str, Variable], attrs: Mapping[str, Any]) -> "xr.Dataset":
    """A record of variables, with numbered dimensions, its provenance and the versions."""
    import xarray as xr

    from gflow.headline import as_record  # it imports xarray, which is slow

    record = xr.Dataset(dict(found))
    starts = {"member": 0, "point": 0, "layer": 1, "pair": 1, "coordinate": 0}
    numbers = {
        dim: (dim, np.arange(first, first + record.sizes[dim]))
        for dim, first in starts.items()
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

"""Files of points: which reader a suffix asks for, and the arrays of an NPZ file."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gflow.problem.arguments import file_path

Data = TypeVar("Data")

READERS = {
    ".arff": ", as by scipy.io.arff.loadarff",
    ".libsvm": ", as by sklearn.datasets.load_svmlight_file",
    ".svm": ", as by sklearn.datasets.load_svmlight_file",
    ".mat": ", as by scipy.io.loadmat",
    ".npy": ", as by numpy.load",
    ".xlsx": ", as by pandas.read_excel",
    ".parquet": ", as by pandas.read_parquet",
}
"""What reads formats that are not read here."""


def by_suffix(
    path: str | Path,
    from_csv: Callable[..., Data],
    from_npz: Callable[..., Data],
    instead: str,
    **options: Any,
) -> Data:
    """Read a file by its suffix.

    Args:
        path: the file.
        from_csv, from_npz: the readers.
        instead: the call that makes such data of arrays, for the message.
        **options: keyword arguments of the reader.

    Raises:
        ValueError: for any other suffix; the message says what reads such files.
    """
    path = file_path("path", path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return from_npz(path, **options)
    if suffix == ".tsv":
        return from_csv(path, **{"delimiter": "\t", **options})
    if suffix in (".csv", ".txt"):
        return from_csv(path, **options)
    raise ValueError(
        f"`path` is {str(path)!r} with the suffix {suffix!r}; expected .csv, .tsv, .txt or "
        f".npz. For other formats read the arrays yourself and call {instead}"
        f"{READERS.get(suffix, '')}."
    )


def arrays(path: Path, keys: Mapping[str, str]) -> list[np.ndarray]:
    """Arrays of an NPZ file.

    Args:
        path: the file.
        keys: of each argument that names an array, its name in the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not an NPZ file, lacks a key, or does not hold plain numbers.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: it is not an NPZ file, as numpy.savez writes them.")
    with np.load(path, allow_pickle=False) as file:
        for argument, key in keys.items():
            if key not in file.files:
                raise ValueError(
                    f"`{argument}` is {key!r}, which {path} does not have; it has "
                    f"{', '.join(map(repr, file.files)) or 'no array'}."
                )
        try:
            return [file[key] for key in keys.values()]
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            written = ", ".join(f"{argument}=..." for argument in keys)
            raise ValueError(
                f"{path}: an array cannot be read, {error}. Expected arrays of plain numbers, "
                f"as numpy.savez(path, {written}) writes them."
            ) from error

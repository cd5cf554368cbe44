"""``[sweep]`` of a configuration file: which keys take which values."""

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gflow.names import SETTINGS, is_taken
from gflow.problem.abstract_data import AbstractData
from gflow.report.config import build, data_of, parsed
from gflow.report.toml_table import TomlTable


class OfFile(NamedTuple):
    """The function of a file, which is read where the function is called."""

    path: Path

    def __call__(self, **point: Any) -> tuple[Any, Any, dict[str, Any]]:
        return self._read.function(**point)

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values along each dimension."""
        return self._read.grid

    @property
    def _read(self) -> "Variation":
        return _read_once(self.path, self.path.stat().st_mtime_ns)


class Variation(NamedTuple):
    """What ``gflow.sweep`` takes."""

    function: Callable[..., Any]
    grid: dict[str, list[Any]]


@functools.lru_cache(maxsize=1)
def _read_once(path: Path, _: int) -> Variation:
    """A file of which one knows when it was written."""
    return read_sweep(path)


def read_sweep(path: str | Path) -> Variation:
    """The function and the grid of a file for ``gflow sweep``.

    Under ``[sweep]``, ``TABLE.KEY = [...]`` lists the values of a key of another table, and
    ``TABLE.KEY = { count = 20 }`` is short for 0 … 19. The dimension has the key's name, or
    ``TABLE_KEY`` where two tables have the key or a record has a variable of that name, as
    ``data_margin``. The function takes one value for each dimension.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is malformed, or nothing varies.
    """
    path = Path(path)
    document = parsed(path)
    document.pop("name", None)
    varied = document.pop("sweep", None)
    if not isinstance(varied, dict) or not varied:
        raise ValueError(
            f"{path} has no table [sweep]; expected one that lists values of keys, such as\n"
            "[sweep]\nstart.scale = [0.01, 0.1, 1.0]\nstart.seed = { count = 20 }"
        )
    values = _values(varied)
    keys = [key for _, key in values]
    names = {
        place: place[1]
        if keys.count(place[1]) == 1 and (place[1] in SETTINGS or not is_taken(place[1]))
        else "_".join(place)
        for place in values
    }
    datasets: dict[str, AbstractData] = {}

    def read_data(table: TomlTable, folder: Path) -> AbstractData:
        known = json.dumps(table.values, sort_keys=True, default=str)
        if known not in datasets:
            datasets[known] = data_of(table, folder)
        return datasets[known]

    def member(**point: Any) -> tuple[Any, Any, dict[str, Any]]:
        here = copy.deepcopy(document)
        for (table, key), name in names.items():
            here.setdefault(table, {})[key] = point[name]
        made = build(here, folder=path.parent, name=path.stem, read_data=read_data)
        if len(made.runs) != 1:
            raise ValueError(
                f"{path} describes {len(made.runs)} runs; a sweep follows one: leave [flow] or "
                "[descent] out, and `one_layer`."
            )
        (run,) = made.runs
        return (
            made.problem,
            run.weights,
            {
                "until": run.until,
                "optimizer": run.optimizer,
                **run.options,
            },
        )

    return Variation(member, {names[place]: listed for place, listed in values.items()})


def _values(varied: Mapping[str, Any]) -> dict[tuple[str, str], list[Any]]:
    found: dict[tuple[str, str], list[Any]] = {}
    for table, keys in varied.items():
        if not isinstance(keys, dict):
            raise ValueError(
                f"[sweep] {table} is {keys!r}; expected TABLE.KEY = [...], such as "
                "start.scale = [0.1, 1.0]."
            )
        for key, given in keys.items():
            where = f"[sweep] {table}.{key}"
            if isinstance(given, dict) and set(given) == {"count"}:
                given = list(range(int(given["count"])))
            if not isinstance(given, list) or not given:
                raise ValueError(
                    f"{where} is {given!r}; expected a list that is not empty, or {{ count = N }}."
                )
            found[table, key] = given
    return found

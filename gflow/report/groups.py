"""Files of a sweep: one a group of members, and who works on which.

A group is written whole or not at all. A process that works on one holds a lock on a file beside
it, which the system lets go of when the process ends, however it ends. So any number of processes
on machines that share the folder divide the groups among themselves, one that dies loses the group
it had open, and no process has to be told of another. Where a file system has no locks, processes
may do the same group twice, with the same result.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gflow import record

if TYPE_CHECKING:
    import xarray as xr

MANIFEST, SCHEMA = "sweep.json", "gflow-sweep-1"


class Folder:
    """Where the groups of one sweep are kept; None keeps them in memory.

    Args:
        path: the folder, made if it is not there.
        axes: the labels along each dimension.
        names: of the groups, which tell a group from any other by its contents.

    Raises:
        ValueError: when the folder holds another sweep.
        OSError: when it cannot be written.
    """

    def __init__(self, path: Path | None, axes: Mapping[str, Sequence[Any]], names: Sequence[str]):
        self.path = path
        self.memory: dict[str, xr.Dataset] = {}
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
        told = {"schema": SCHEMA, "axes": {k: [str(v) for v in each] for k, each in axes.items()}}
        told["groups"] = list(names)
        manifest = path / MANIFEST
        if manifest.exists():
            if json.loads(manifest.read_text(encoding="utf-8")) != told:
                raise ValueError(
                    f"`folder` is {path}, which holds another sweep: its grid, function, options "
                    f"or data were not these. Choose another folder, or delete {path}."
                )
            return
        with record.whole_file(manifest) as partial:
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def has(self, name: str) -> bool:
        """Whether a group is done."""
        return name in self.memory if self.path is None else (self.path / name).exists()

    def keep(self, name: str, group: "xr.Dataset") -> None:
        """Store a group that is done."""
        if self.path is None:
            self.memory[name] = group
        else:
            record.save(group, self.path / name)

    def load(self, name: str) -> "xr.Dataset":
        """A group that is done."""
        return self.memory[name] if self.path is None else record.load(self.path / name)

    @contextlib.contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether the group is this process's to work on, for as long as the context lasts.

        Args:
            name: of the group.
            wait: until whoever works on it is done or dead, instead of saying no.
        """
        if self.path is None:
            yield True
            return
        with open(self._lock(name), "a") as file:
            yield _locked(file.fileno(), wait)

    def tidy(self, names: Sequence[str]) -> None:
        """Remove the locks of groups that are done."""
        if self.path is not None:
            for name in names:
                self._lock(name).unlink(missing_ok=True)

    def _lock(self, name: str) -> Path:
        assert self.path is not None
        return self.path / f".{name}.lock"


def _locked(handle: int, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True

"""Checkpoints: a run that is killed goes on where its file ends, bit for bit.

The file is an ordinary ``.npz``: the saved points so far (``numpy.load(path)["points/log_risk"]``
reads them while the run is under way), what the run needs to go on, and the identity of the run.
It is replaced as a whole, so that at any moment it is one whole segment old at most. When it is
written never changes a number: the host only looks at what the device has computed.
"""

import hashlib
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gflow.dynamics.drive.recorder import Recorder
from gflow.dynamics.reasons import End
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights
from gflow.record import versions, whole_file

SCHEMA = "gflow-checkpoint-4"

SECONDS_A_SEGMENT = 2.0
"""A run that is killed loses at most so much, and what the device computes between two looks."""

SHARE = 20.0
"""Writing takes at most one part in so many of the time: a large file has longer segments."""


class Snapshot(NamedTuple):
    """All that a run needs to go on, as references that nobody changes."""

    facts: dict[str, Any]
    """Numbers, words, lists and mappings of them."""
    arrays: Mapping[str, PyTree]
    """States by name: pytrees when a snapshot is taken; of a file, its arrays by name and path."""

    def holds(self, name: str) -> bool:
        """Whether a file has a state of this name."""
        return any(path.startswith(f"{name}/") for path in self.arrays)

    def read(self, name: str, like: PyTree) -> PyTree:
        """A file's state ``name``, of the structure of ``like``."""

        def leaf(path: Any, blank: Any) -> Any:
            array = self.arrays[f"{name}/{jax.tree_util.keystr(path)}"]
            if _is_key(blank):
                return jax.random.wrap_key_data(array, impl=jax.random.key_impl(blank))
            return array.item() if isinstance(blank, float | int) and array.ndim == 0 else array

        return jax.tree_util.tree_map_with_path(leaf, like)


@runtime_checkable
class Run(Protocol):
    """What a checkpoint needs of a run."""

    @property
    def weights(self) -> Weights:
        """Where it stands."""
        ...

    def snapshot(self) -> Snapshot:
        """All that the run needs to go on."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where a snapshot was taken of a run with the same start."""
        ...


class CheckpointError(Exception):
    """The file could not be written; the message says why and what there is."""


class _Segment(NamedTuple):
    num_points: int
    snapshot: Snapshot
    end: End | None


class Checkpoint:
    """The file of one run.

    Args:
        path: where it is, or None for a run without one: nothing is then done.
        identity: what the run is, by name; a file with another identity is refused.
        run: the run, at its start.
        recorder: of the run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: Callable[[], dict[str, str]],
        run: Run,
        recorder: Recorder,
    ):
        self.path = None if path is None else Path(path)
        self.identity = identity() if path is not None else {}
        self.run, self.recorder = run, recorder
        self.segment: _Segment | None = None
        self.wrote_at, self.cost = time.monotonic(), 0.0

    def resume(self) -> End | None:
        """Go to where the file ends: the end of the run if it is there.

        Raises:
            ValueError: when the file is another run's, no checkpoint, or damaged; it is kept.
            OSError: when the file cannot be written.
        """
        if self.path is None:
            return None
        if not self.path.exists():
            self.look()
            self._write()
            return None
        content = _read(self.path)
        _compare(self.path, json.loads(str(content["identity"])), self.identity)
        names = {"state": {}, "points": {}}
        for path, array in content.items():
            folder, _, name = path.partition("/")
            if folder in names:
                names[folder][name] = array
        self.run.restore(Snapshot(json.loads(str(content["facts"])), names["state"]))
        self.recorder.resume(names["points"], self.run.weights, float(content["elapsed"]))
        end = json.loads(str(content["end"]))
        self.look()
        return end and End(*end)

    def look(self) -> None:
        """Note where the run stands, and write it down if it is time.

        Raises:
            CheckpointError: when the file cannot be written.
        """
        if self.path is None:
            return
        self.segment = self._segment(None)
        if time.monotonic() - self.wrote_at > max(SECONDS_A_SEGMENT, SHARE * self.cost):
            self.flush()

    def flush(self) -> None:
        """Write down where the run stood at the last look."""
        if self.segment is None:
            return
        try:
            self._write()
        except OSError as error:
            raise CheckpointError(
                f"`checkpoint` {self.path} could not be written ({error.strerror or error}), and "
                "the run stopped there; all that it computed is in this record, and the file holds "
                "the run up to its last segment. Make room, and the same call goes on from there"
            ) from error

    def close(self, end: End) -> None:
        """Write down that the run is over: the same call will give the same record at once."""
        if self.path is None:
            return
        self.segment = self._segment(end)
        self.flush()

    def _segment(self, end: End | None) -> _Segment:
        snapshot = self.run.snapshot()  # the recorder has all points from then on
        return _Segment(self.recorder.num_points, snapshot, end)

    def _write(self) -> None:
        assert self.path is not None
        assert self.segment is not None
        segment, began = self.segment, time.monotonic()
        columns = self.recorder.columns(segment.num_points)
        content = {
            "identity": np.array(json.dumps(self.identity)),
            "end": np.array(json.dumps(segment.end)),
            "elapsed": np.array(self.recorder.seconds()),
            "facts": np.array(json.dumps(segment.snapshot.facts)),
            **_flat("state", segment.snapshot.arrays),
            **{f"points/{name}": values for name, values in columns.items()},
        }
        with whole_file(self.path) as partial, open(partial, "wb") as file:
            head = {"schema": np.array(SCHEMA), "sha256": np.array(_digest(content))}
            arrays: dict[str, Any] = head | content  # the checker takes one for `allow_pickle`
            np.savez(file, **arrays)
        self.wrote_at = time.monotonic()
        self.cost = self.wrote_at - began


def _without_keys(tree: PyTree) -> PyTree:
    """Random keys as the numbers they stand for."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.int64), jax.dtypes.prng_key)


def identity(
    problem: Problem,
    weights: Weights,
    recorder: Recorder,
    program: Callable[..., Any],
    arguments: tuple[Any, ...],
    **options: Any,
) -> dict[str, str]:
    """What a run is, by name: two runs of the same identity give the same numbers.

    Args:
        problem: the data, network and loss.
        weights: the start.
        recorder: of the run.
        program: the function that the run iterates. Networks, optimisers and observables are
            functions that no name identifies; the operations that they consist of do.
        arguments: of ``program``.
        options: everything else that a number depends on.
    """
    traced = [
        _program(program, *arguments),
        *(_program(extra, problem, weights) for extra in recorder.extra.values()),
    ]
    return {
        "inputs": _fingerprint(problem.data.inputs),
        "labels": _fingerprint(problem.data.answers),
        "network": _words(problem.network),
        "loss": _words(problem.loss),
        "weights": _fingerprint(weights),
        "observables": ", ".join(recorder.extra),
        "keep_weights": str(recorder.keep_weights),
        **{name: _words(option) for name, option in options.items()},
        "program": _fingerprint(traced),
        "device": jax.devices()[0].device_kind,
        **versions(),
    }


def _program(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The operations that a function consists of, and the arrays that it closes over."""
    traced = jax.make_jaxpr(lambda: function(*arguments))()
    return [_words(traced), *traced.consts]


def _words(value: Any) -> str:
    """What an object prints, without its place in memory; arrays by their values."""
    if isinstance(value, np.ndarray):
        return _fingerprint(value)
    return re.sub(r" at 0x[0-9a-f]+|id=\d+", "", repr(value))


def _fingerprint(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(_without_keys(tree)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _flat(folder: str, trees: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """The arrays of some pytrees by their paths."""
    found: dict[str, np.ndarray] = {}
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(_without_keys(tree)):
            found[f"{folder}/{name}/{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def _digest(content: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        array = content[name]
        digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, np.ndarray]:
    """All of a file, after its hash has been compared."""
    refused = f"`checkpoint` is {path}, which "
    advice = "Nothing was changed: move it away, or choose another path."
    try:
        with open(path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            content = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{refused}cannot be read as a checkpoint of gflow ({error}). It is another kind of "
            f"file, or truncated. {advice}"
        ) from error
    schema = str(content.pop("schema", None))
    if schema != SCHEMA:
        raise ValueError(f"{refused}has schema {schema!r}; expected {SCHEMA!r}. {advice}")
    if str(content.pop("sha256", None)) != _digest(content):
        raise ValueError(f"{refused}does not match its own hash: it is damaged. {advice}")
    return content


def _compare(path: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if len(names) > 1 and "program" in names:
        names.remove("program")  # it differs because another named thing does
    if names:
        differing = "; ".join(
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in names
        )
        raise ValueError(
            f"`checkpoint` is {path}, which belongs to another run: {differing}. Nothing was "
            "changed: repeat the call that wrote it, or choose another path."
        )

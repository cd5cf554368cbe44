"""The host's loop: runs, one or many, from saved point to saved point to their ends.

A single run is a queue of one. Runs that can share a compiled program share *lanes*: a run that is
done, or goes on by another solver, makes room for the next in the queue. When a lane is looked at,
and what runs beside it, never changes a number of a run.
"""

import contextlib
import os
import signal
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from gflow.dynamics.drive import checkpoint
from gflow.dynamics.drive.checkpoint import Checkpoint, CheckpointError
from gflow.dynamics.drive.memory_maps import make_room
from gflow.dynamics.drive.progress import ProgressBar
from gflow.dynamics.drive.recorder import Recorder
from gflow.dynamics.reasons import End, Reason
from gflow.dynamics.stops import AbstractRule
from gflow.problem import settings
from gflow.problem.arguments import file_path, flag
from gflow.problem.one_thread import one_thread
from gflow.problem.weights import Weights, size_of

NARROW = 4096
"""Weights up to which members gain by going side by side: beyond, the products of one member's
matrices fill a processor by themselves."""


def widest_for(weights: Weights) -> int:
    """How many members of such weights gain by going side by side."""
    narrow = size_of(weights) <= NARROW
    return int(np.iinfo(np.int64).max) if narrow else 1


def on(device: Any) -> contextlib.AbstractContextManager:
    """A device for a block; None for the caller's."""
    return contextlib.nullcontext() if device is None else jax.default_device(device)


def one_by_one(width: int) -> contextlib.AbstractContextManager:
    """The processor, for what is computed for one member after the other.

    A GPU takes as long for the few numbers of one member as for those of a thousand: only what all
    members do together goes there. By ``widest_for``, members that fill a device stay on it.
    """
    if width > 1 and jax.default_backend() != "cpu":
        with contextlib.suppress(RuntimeError):  # by JAX_PLATFORMS there may be none
            return jax.default_device(jax.local_devices(backend="cpu")[0])
    return contextlib.nullcontext()


@runtime_checkable
class Run(checkpoint.Run, Protocol):
    """A flow or a descent on its way, with the points that it records."""

    name: str
    recorder: Recorder
    rules: tuple[AbstractRule, ...]
    """The stopping rules; points are saved in the coordinate of the first."""
    end: End | None
    """How it ended; None while it is on its way."""

    seated: bool
    """Whether it is in a lane; a run that is to go on in another way leaves its own."""

    @property
    def program(self) -> Hashable:
        """Runs of equal programs can be in lanes side by side."""
        ...

    @property
    def part_done(self) -> float:
        """How much of its way it has made, from 0 to 1."""
        ...

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far it is in the coordinate of ``lead``, and what a bar says beside it."""
        ...

    def close(self) -> None:
        """Record the last point, if it is not there yet."""
        ...

    def identity(self) -> dict[str, str]:
        """What it is, for its checkpoint."""
        ...

    @property
    def widest(self) -> int:
        """How many runs of this kind gain by going side by side."""
        ...

    def fail(self, error: Exception) -> None:
        """End, because of an error."""
        ...

    def lanes(self, alike: "Sequence[Any]", width: int) -> "AbstractLanes":
        """Lanes for runs of this program."""
        ...


class AbstractLanes:
    """Places for runs of one program, which go on together.

    Args:
        width: how many places there are.
    """

    def __init__(self, width: int):
        self.seats: list[Any] = [None] * width

    @abstractmethod
    def seat(self, places: Sequence[int]) -> None:
        """Runs have been put in these places of ``seats``."""

    @abstractmethod
    def advance(self, waiting: bool) -> list[tuple[Any, tuple]]:
        """One call of the compiled program: each run, and what its ``take`` is to be given.

        Args:
            waiting: whether runs wait for a place: then come back as soon as one is free.
        """

    def settle(self) -> None:
        """All runs have taken what came of the last call."""

    def close(self) -> None:
        """Runs that are still on their way stand where the last call left them."""

    @property
    def work(self) -> tuple[float, float]:
        """Lane trips spent on runs, and all."""
        return 0.0, 0.0


class Drive:
    """All runs of one call.

    Args:
        runs: in the order in which they are to begin.
        width: lanes side by side on a device.
        devices: where; a device named twice has two sets of lanes, in two threads.
        look: is called after each call of a compiled program.
        isolate: whether an error of one run is that run's end, and not that of all.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        width: int = 1,
        devices: Sequence[Any] | None = None,
        look: Callable[[], None] = lambda: None,
        isolate: bool = False,
    ):
        self.runs, self.width, self.look, self.isolate = list(runs), width, look, isolate
        self.devices = list(devices or [None])
        self.lock, self.stopped = threading.Lock(), False
        self.work = [0.0, 0.0]

    def go(self) -> None:
        """Bring every run to its end.

        Raises:
            KeyboardInterrupt: by Ctrl-C; runs that are on their way have no end then.
        """
        waiting = [run for run in self.runs if run.end is None]
        with one_thread():
            while waiting:
                program = waiting[0].program
                self._follow([run for run in waiting if run.program == program])
                waiting = [run for run in self.runs if run.end is None]

    def _follow(self, alike: list[Run]) -> None:
        """Follow runs of one program until they end or go on by another."""
        make_room(alike[0].program)
        queue, devices = deque(alike), self.devices[: len(alike)]
        width = min(self.width, alike[0].widest, -(-len(alike) // len(devices)))
        compiled = {device: threading.Event() for device in devices}
        if width == 1 and len(devices) == 1:
            self._serve(queue, alike, width, devices[0], compiled[devices[0]])
            return

        def serve(device: Any, first: bool) -> None:
            if not first:  # of its device, whose programs it needs and need not compile again
                compiled[device].wait()
            try:
                self._serve(queue, alike, width, device, compiled[device])
            finally:
                compiled[device].set()

        # In threads, for one device too: Ctrl-C reaches this one and leaves no run half told.
        with ThreadPoolExecutor(len(devices)) as threads:
            parts = [
                threads.submit(copy_context().run, serve, device, device not in devices[:k])
                for k, device in enumerate(devices)
            ]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                self.stopped = True
                raise

    def _serve(
        self,
        queue: deque[Run],
        alike: list[Run],
        width: int,
        device: Any,
        compiled: threading.Event,
    ) -> None:
        """Follow runs from the queue in the lanes of one device until none is left."""
        with settings.own(), on(device):
            lanes = alike[0].lanes(alike, width)
            try:
                while not self.stopped:
                    with self.lock:
                        new = [k for k, run in enumerate(lanes.seats) if run is None and queue]
                        for k in new:
                            lanes.seats[k] = queue.popleft() if queue else None
                    new = [k for k in new if lanes.seats[k] is not None]
                    if all(run is None for run in lanes.seats):
                        break
                    with interrupted_at_the_end():
                        self._advance(lanes, new, bool(queue))
                    compiled.set()
                    for k, run in enumerate(lanes.seats):
                        if run is not None and (run.end is not None or not run.seated):
                            lanes.seats[k] = None
                    with self.lock:
                        self.look()
            finally:
                lanes.close()
                with self.lock:
                    self.work = [a + b for a, b in zip(self.work, lanes.work, strict=True)]

    def _advance(self, lanes: "AbstractLanes", new: Sequence[int], waiting: bool) -> None:
        """Seat new runs and go on; what goes wrong may be the end of the runs that it befalls."""
        try:
            if new:
                lanes.seat(new)
            for run, answer in lanes.advance(waiting):
                try:
                    with one_by_one(len(lanes.seats)):
                        run.take(*answer)
                except Exception as error:
                    if not self.isolate:
                        raise
                    run.fail(error)
            lanes.settle()
        except Exception as error:
            if not self.isolate:
                raise
            for run in lanes.seats:
                if run is not None and run.end is None:
                    run.fail(error)


@contextlib.contextmanager
def interrupted_at_the_end() -> Iterator[None]:
    """Ctrl-C within the block is raised at its end, so that no run is left half told.

    It reaches the main thread only, where Python has a handler that raises.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    if not callable(handler):
        yield
        return
    caught: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])


def follow(run: Run, *, progress: bool | None, path: str | os.PathLike[str] | None = None) -> End:
    """Follow one run from its start to its end; says how it ended.

    Args:
        run: at its start.
        progress: whether to show a bar.
        path: of the checkpoint, if there is to be one.
    """
    flag("progress", progress, none=True)
    file = None if path is None else file_path("checkpoint", path)
    if run.end is not None:
        run.close()
        return run.end
    lead = run.rules[0]
    begin = run.tell(lead)[0]
    kept = Checkpoint(file, run.identity, run, run.recorder)
    run.end = kept.resume() or run.end
    if run.end is not None:
        run.close()
        return run.end
    with ProgressBar(run.name, begin, lead.goal, progress) as bar:

        def look() -> None:
            if bar.shown:
                bar.update(*run.tell(lead))
            if run.end is None or run.end.status == "max_steps":
                kept.look()  # a run that is over is written down as such

        try:
            Drive([run], look=look).go()
            assert run.end is not None
            if run.end.status == "max_steps":
                kept.flush()  # without the point to come: a larger `max_steps` goes on
            run.close()
            if run.end.status != "max_steps":
                kept.close(run.end)
        except CheckpointError as error:
            run.end = Reason.CHECKPOINT_FAILED.end(why=error)
        except KeyboardInterrupt:
            run.end = Reason.INTERRUPTED.end()
            with contextlib.suppress(CheckpointError):
                kept.flush()
        run.close()
    return run.end

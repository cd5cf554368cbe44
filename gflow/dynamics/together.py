"""Descents side by side: every member runs as it does alone, but calls of ``advance`` are joined.

A worker thread follows one member after the other by ``gradient_descent``. When all workers wait
for steps, their calls are made as one, under ``vmap``; so stopping rules, saved points and statuses
of a member are those of a run by itself. Members of one call share the shapes, and all of the
optimiser but its numbers; what cannot be joined is called alone. In a joined call the members that
are done wait for the others, which is why workers ask for at most a quarter of a second of steps.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics import iterating
from gflow.dynamics.iterating import Carry, Descent, Goals, Watch
from gflow.problem import settings
from gflow.problem.network import Array

_CALLS: "ContextVar[Calls | None]" = ContextVar("calls", default=None)
"""Where the calls of this thread are joined with others, if anywhere."""


def advance(
    descent: Descent, watch: Watch, carry: Carry, num_steps: Array, goals: Goals
) -> tuple[Carry, Array, Array]:
    """``iterating.advance``, joined with the calls of other members where there are any."""
    calls = _CALLS.get()
    request = (descent, watch, carry, num_steps, goals)
    if calls is None or descent.sampler is not None or watch.costly:
        return iterating.advance(*request)
    return calls.make(request)


def side_by_side(runs: Sequence[Callable[[], None]], workers: int) -> None:
    """Make all ``runs``, which raise nothing; Ctrl-C interrupts those that are on their way."""
    workers = min(workers, len(runs))
    calls, waiting = Calls(workers), deque(runs)

    def work() -> None:
        _CALLS.set(calls)
        try:
            while waiting:
                try:
                    run = waiting.popleft()
                except IndexError:
                    break
                run()
        except KeyboardInterrupt:  # by `stop`
            pass
        finally:
            calls.leave()

    with ThreadPoolExecutor(max(workers, 1)) as threads:
        parts = [threads.submit(copy_context().run, work) for _ in range(workers)]
        try:
            for part in parts:
                part.result()
        except KeyboardInterrupt:
            waiting.clear()
            calls.stop()
            raise


class Calls:
    """Calls that wait until every worker has one.

    Args:
        workers: how many threads make calls.
    """

    def __init__(self, workers: int):
        self.size = self.working = workers
        self.turn = threading.Condition()
        self.requests: dict[int, Any] = {}
        self.answers: dict[int, Any] = {}
        self.stopped = False

    def make(self, request: Any) -> Any:
        """The answer to a request of this thread."""
        me = threading.get_ident()
        with self.turn:
            self.requests[me] = request
            self._serve()
            self.turn.wait_for(lambda: me in self.answers or self.stopped)
            if self.stopped:
                raise KeyboardInterrupt
            answer = self.answers.pop(me)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave(self) -> None:
        """This thread makes no more calls."""
        with self.turn:
            self.working -= 1
            self._serve()

    def stop(self) -> None:
        """End all calls."""
        with self.turn:
            self.stopped = True
            self.turn.notify_all()

    def _serve(self) -> None:
        """Make the calls if every worker has one."""
        if not self.requests or len(self.requests) < self.working:
            return
        alike: dict[Any, list[int]] = {}
        for who, request in self.requests.items():
            alike.setdefault(_kind(request), []).append(who)
        for kind, group in alike.items():
            requests = [self.requests[who] for who in group]
            try:
                with settings.own():
                    answers = self._joined(kind, requests)
            except Exception as error:  # each member tells it as its own
                answers = [error] * len(group)
            self.answers |= dict(zip(group, answers, strict=True))
        self.requests = {}
        self.turn.notify_all()

    def _joined(self, kind: Any, requests: list[Any]) -> list[Any]:
        if len(requests) == 1:
            return [iterating.advance(*requests[0])]
        structure, told = kind
        # Filled up to one size, so that it is compiled once, with a call that makes no step.
        descent, watch, carry, _, goals = requests[0]
        idle = (descent, watch, carry, carry.num_steps, goals)
        filled = requests + [idle] * (self.size - len(requests))
        columns = zip(*(jax.tree.leaves(request) for request in filled), strict=True)
        varying, axes = [], []
        for column, leaf in zip(columns, told, strict=True):
            if isinstance(leaf, _Shape):
                same = all(each is column[0] for each in column)
                axes.append(None if same else 0)
                varying.append(column[0] if same else _stacked(column, weak=leaf[-1]))
        after = jax.device_get(_advance_all(structure, told, tuple(axes), *varying))
        return [jax.tree.map(lambda leaf, k=k: leaf[k], after) for k in range(len(requests))]


def _stacked(column: Sequence[Any], *, weak: bool) -> Any:
    """Arrays on a new leading axis; numbers of an optimiser stay weakly typed."""
    return jnp.stack(column) if weak else np.stack([np.asarray(each) for each in column])


class _Shape(tuple):
    """Of an array, and whether it is weakly typed; a leaf of another kind stands for itself."""

    __slots__ = ()


def _kind(request: Any) -> tuple[Any, tuple[Any, ...]]:
    """What requests that can be joined have in common."""
    leaves, structure = jax.tree.flatten(request)
    return structure, tuple(
        _Shape((leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)))
        if isinstance(leaf, jax.Array | np.ndarray | np.generic)
        else leaf
        for leaf in leaves
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance_all(structure: Any, told: Any, axes: Any, *varying: Any) -> Any:
    def one(*arrays: Any) -> Any:
        ready = iter(arrays)
        leaves = [next(ready) if isinstance(leaf, _Shape) else leaf for leaf in told]
        return iterating.advance(*jax.tree.unflatten(structure, leaves))

    return jax.vmap(one, in_axes=axes)(*varying)

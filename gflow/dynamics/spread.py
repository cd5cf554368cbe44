"""Tasks on an engine: any ``concurrent.futures.Executor``, in this process without one.

What travels is pickled here, by value where it cannot be imported (functions of a notebook,
lambdas), and unpickled under gflow's settings: JAX arrays that are unpickled where float64 is off
lose half their digits.
"""

import concurrent.futures as cf
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cloudpickle
import jax

from gflow.problem import settings
from gflow.problem.arguments import expect
from gflow.programs import cache_programs

WAITING = 256
"""Tasks that an engine has at a time: enough for as many processes, and no more are held."""

EXECUTOR = (
    "a `concurrent.futures.Executor`, as `ProcessPoolExecutor(mp_context=get_context('spawn'))` or "
    "`dask.distributed.Client(...).get_executor()`"
)


def spread(
    executor: cf.Executor | None, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """The number of each task and what the function gave for it, as they end.

    Args:
        executor: runs them; without one each is run here, when it is asked for.
        function: of this package, so that it is found where a task runs.
        tasks: arguments; those that an engine has no place for yet are not made.

    Yields:
        Numbers, and results; or the error that a task ended in, as when its process died and the
        engine did not do it again. When this generator is closed, tasks that wait are cancelled.
    """
    if executor is None:
        for number, task in enumerate(tasks):
            yield number, function(*task)
        return
    config: Any = jax.config  # whose entries the checker does not know
    cache = config.jax_compilation_cache_dir
    numbers: dict[cf.Future, int] = {}
    ahead = enumerate(tasks)
    try:
        while True:
            for number, task in itertools.islice(ahead, WAITING - len(numbers)):
                packed = cloudpickle.dumps((function, task))
                numbers[executor.submit(_run, packed, cache)] = number
            if not numbers:
                return
            done, _ = cf.wait(numbers, return_when=cf.FIRST_COMPLETED)
            for future in done:
                yield numbers.pop(future), _result(future)
    finally:
        for future in numbers:
            future.cancel()


def check_executor(executor: Any, devices: Any) -> cf.Executor | None:
    """The engine, if it is one.

    Raises:
        ValueError: that names the argument.
    """
    expect("executor", executor, cf.Executor | None, EXECUTOR)
    if executor is not None and devices is not None:
        raise ValueError(
            "`devices` is given beside `executor`, whose processes use the devices that they have; "
            "expected one or the other."
        )
    context = getattr(executor, "_mp_context", None)  # of a ProcessPoolExecutor
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "`executor` is a pool of forked processes, in which JAX, whose threads are not forked, "
            "would wait for ever; expected one that spawns, as "
            "`ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))`."
        )
    return executor


def _run(packed: bytes, cache: str | None) -> bytes:
    """In a process of the engine: a task, and what comes of it."""
    config: Any = jax.config
    if cache and not config.jax_compilation_cache_dir:
        cache_programs(cache)
    with settings.own():
        function, task = cloudpickle.loads(packed)
    found = function(*task)
    with settings.own():
        return cloudpickle.dumps(found)


def _result(future: cf.Future) -> Any:
    error = future.exception()
    if error is not None:
        return error
    with settings.own():
        return cloudpickle.loads(future.result())

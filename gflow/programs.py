"""Compiled programs: what they are compiled for, and how they are kept on disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jaxlib.version

SMALL: dict[str, Any] = (
    {"xla_cpu_use_fusion_emitters": False} if jaxlib.version.__version_info__ < (0, 11) else {}
)
"""For loops over few numbers: XLA's older way of making them takes a third less time to compile,
and what it makes is as fast but for many logarithms and exponentials at once. From jaxlib 0.11 on
there is no older way, and XLA refuses an option that it does not know."""

ONCE = {"xla_backend_optimization_level": 0, **SMALL}
"""For a program that is called once a run: it is compiled in less time, and runs in more."""

FEW = 4096
"""So many margins, or entries of a matrix, are still few."""


def compiled(function: Callable, options: dict[str, Any] | None = None) -> Callable:
    """``equinox.filter_jit`` with options of the compiler."""
    return eqx.filter_jit(function, compiler_options=options)  # pyright: ignore[reportCallIssue]


def by_size(function: Callable, options: dict[str, Any] = SMALL) -> Callable:
    """A program that is compiled with ``options`` where the call says ``few=True``."""
    forms = {True: compiled(function, options), False: compiled(function)}

    def call(*args: Any, few: bool, **options: Any) -> Any:
        return forms[few](*args, **options)

    return call


LEAST_SECONDS = 0.0
"""Of compilation, from which on a program is kept: a flow has thirty that take 0.03 s each."""


def cache_programs(directory: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, so that the next process reads instead of compiling them.

    Call it once, before the first flow. It switches on JAX's persistent cache for the whole
    process; importing gflow does not. The command line, ``make`` and the notebooks call it. Where
    JAX has a cache already, from ``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``, that one stays
    unless a ``directory`` is given. The folder may be deleted at any time, and shared by processes
    and versions: JAX tells programs, flags, devices and versions apart.

    Args:
        directory: by default ``gflow`` in the user's folder for caches: ``$XDG_CACHE_HOME`` or
            ``~/.cache`` on Linux, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.

    Returns:
        The folder.

    Raises:
        ValueError: when ``directory`` is no path.
        OSError: when the folder cannot be made.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from gflow.problem.arguments import expect

    expect("directory", directory, str | os.PathLike | None, "a folder, or None for the user's")
    config: Any = jax.config  # whose entries the checker does not know
    if directory is None and config.jax_compilation_cache_dir is not None:
        return Path(config.jax_compilation_cache_dir)
    folder = _users() if directory is None else Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    compilation_cache.reset_cache()  # what has been compiled already has settled that there is none
    return folder


def _users() -> Path:
    """The folder of gflow in the user's folder for caches."""
    home = Path.home()
    match sys.platform:
        case "win32":
            base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
        case "darwin":
            base = home / "Library" / "Caches"
        case _:
            base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "gflow"

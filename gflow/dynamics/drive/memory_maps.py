"""Room for compiled programs: a process may map its memory in so many pieces, and no more.

On CPUs XLA keeps each compiled program in hundreds of pieces; a flow of a new shape takes about a
thousand. Linux allows a process 65,530 (``vm.max_map_count``), and the one that asks for more is
killed without a message. That is some sixty shapes in one process, as many as a sweep over widths
has.
"""

import gc
from collections.abc import Hashable
from pathlib import Path

import jax

MAPS, MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

FULL = 0.6
"""The part of what is allowed from which compiled programs are dropped."""

_known: set[Hashable] = set()
"""Programs for which there was room; the pieces are counted when another one comes."""


def make_room(program: Hashable) -> None:
    """Drop all compiled programs if there may be no room for one more.

    What is used again is compiled again, or read from JAX's persistent cache. Nowhere but on Linux
    is there such a limit to look at.
    """
    if program in _known:
        return
    if MAPS.exists() and MOST.exists() and _pieces() > FULL * int(MOST.read_text()):
        jax.clear_caches()
        gc.collect()
        _known.clear()
    _known.add(program)


def _pieces() -> int:
    with MAPS.open("rb") as lines:
        return sum(1 for _ in lines)

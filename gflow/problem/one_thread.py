"""LAPACK and BLAS in the calling thread only, while gflow computes.

JAX takes decompositions on CPUs from SciPy's OpenBLAS, whose threads wait for each other by
spinning. On matrices up to some thousand rows they save little; beside another busy process they
cost five to a hundred times what they save.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

_lock, _inside = threading.Lock(), [0]
_held = contextlib.ExitStack()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for LAPACK and BLAS, in the whole process, until the last such block ends.

    A process has one number of threads: the first block that begins, in any thread, keeps it and
    the last that ends puts it back.
    """
    with _lock:
        _inside[0] += 1
        if _inside[0] == 1:
            _held.enter_context(_pools().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            if _inside[0] == 0:
                _held.close()


@functools.cache
def _pools() -> "ThreadpoolController":
    import scipy.linalg  # noqa: F401  # whose OpenBLAS it is, to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()

"""Switches of JAX and NumPy: ours around our code, the caller's around the caller's.

Some of what gflow computes is NaN or infinite on purpose (log t at t = 0, what has no value), and
NumPy arrays go to the device all the time. A caller who looks for a NaN of their own, with
``jax_debug_nans``, transfer guards or ``np.seterr(all="raise")``, is not to find these.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np


class Settings(NamedTuple):
    """What one may set that makes intended values raise."""

    debug_nans: bool
    debug_infs: bool
    to_device: str | None
    on_device: str | None
    to_host: str | None
    floats: Mapping[str, Any]
    """As of ``np.geterr``."""
    ranks: str | None = None
    """Whether ranks may be promoted; None leaves it."""
    types: str | None = None
    """Which types may be promoted; None leaves it."""

    @classmethod
    def now(cls) -> "Settings":
        """Those in force, in this thread."""
        config: Any = jax.config  # whose entries the checker does not know
        return cls(
            config.jax_debug_nans,
            config.jax_debug_infs,
            config.jax_transfer_guard_host_to_device,
            config.jax_transfer_guard_device_to_device,
            config.jax_transfer_guard_device_to_host,
            np.geterr(),
            config.jax_numpy_rank_promotion,
            config.jax_numpy_dtype_promotion,
        )

    @contextlib.contextmanager
    def promotion(self) -> Iterator[None]:
        """What may be promoted, in force in this thread until the block ends."""
        with contextlib.ExitStack() as stack:
            if self.ranks is not None:
                stack.enter_context(jax.numpy_rank_promotion(self.ranks))
            if self.types is not None:
                stack.enter_context(jax.numpy_dtype_promotion(self.types))
            yield

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In force, in this thread, until the block ends."""
        with (
            jax.debug_nans(self.debug_nans),
            jax.debug_infs(self.debug_infs),
            jax.transfer_guard_host_to_device(self.to_device),
            jax.transfer_guard_device_to_device(self.on_device),
            jax.transfer_guard_device_to_host(self.to_host),
            np.errstate(**self.floats),
        ):
            yield


OWN = Settings(
    debug_nans=False,
    debug_infs=False,
    to_device="allow",
    on_device="allow",
    to_host="allow",
    floats={"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
)

_CALLERS: "ContextVar[Settings | None]" = ContextVar("callers", default=None)
"""The settings outside of gflow, where gflow's are in force."""


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Our settings and float64, for a block or, as ``@own()``, for a function.

    Settings belong to a thread. One that is started inside has the caller's at hand if it runs in a
    copy of the context: ``pool.submit(contextvars.copy_context().run, function)``. What the caller
    lets JAX promote, which their network and optimiser count on, then holds there too.
    """
    theirs = _CALLERS.get()
    token = None if theirs else _CALLERS.set(Settings.now())
    try:
        with OWN.applied(), jax.enable_x64(True), (theirs or OWN).promotion():
            yield
    finally:
        if token is not None:
            _CALLERS.reset(token)


@contextlib.contextmanager
def callers() -> Iterator[None]:
    """The caller's settings again, for a call of what the caller wrote; float64 stays."""
    theirs = _CALLERS.get()
    if theirs is None:
        yield
        return
    token = _CALLERS.set(None)
    try:
        with theirs.applied():
            yield
    finally:
        _CALLERS.reset(token)

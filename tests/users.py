"""What users have, for code of theirs that runs in a process of tests: notebooks and benchmarks."""

import contextlib

import jax
import jaxtyping
import matplotlib as mpl


@contextlib.contextmanager
def settings(folder):
    """JAX's own defaults, annotations that nothing checks, figures that nobody sees, a folder."""
    import matplotlib.pyplot as plt

    mpl.use("agg")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with (
            contextlib.chdir(folder),
            mpl.rc_context(),
            jax.enable_x64(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        plt.close("all")

"""What every test runs under: double precision, no silent promotion, annotations checked.

Warnings are errors by `pyproject.toml`. Nothing here outlives the test process but a cache of
compiled programs, and gflow itself never touches JAX's configuration.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Nearly all the time of these tests is compilation, of programs that then run for milliseconds: the
# compiler is asked not to optimise, to make loops in its older way, which takes half off, and not
# to share a program out among the cores, each of which has a worker of pytest: a sixth of the rest.
# From jaxlib 0.11 on there is no older way, and XLA ends the process at a flag that it does not
# know. Set before JAX is imported.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 "
    + (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        if int(version("jaxlib").split(".")[1]) < 11
        else ""
    )
    + os.environ.get("XLA_FLAGS", "")
)

# Matrices are small here, and there is a worker of pytest for each core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What one process has compiled the others read: the second worker, notebooks, benchmarks, and the
# next run, which takes half the time. JAX tells programs, flags and versions apart.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Must come before the first import of gflow: from here on the modules whose annotations have shapes
# are compiled with every annotation checked at each call. Elsewhere that would find little, and
# take a tenth of all tests' time.
jaxtyping.install_import_hook(["gflow.problem", "gflow.analysis.exact"], "typechecker.checked")

collect_ignore = ["conftest.py"]  # there is another of that name, and doctests are in neither


def pytest_collection_finish(session):
    """What is imported stays: searching it for garbage, again and again, took a twentieth, and as
    much what tracing leaves, of which little is garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def unchecked():
    """Annotations unchecked, as for a user: to see what gflow itself says of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

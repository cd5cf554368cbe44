"""What every test runs under: double precision, no silent promotion, annotations checked.

Warnings are errors by `pyproject.toml`. Nothing here outlives the test process, and gflow itself
never touches JAX's configuration.
"""

import os

# Nearly all the time of these tests is compilation, of programs that then run for milliseconds: the
# compiler is asked not to optimise, which takes a third off. Set before JAX is imported.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Must come before the first import of gflow: from here on its modules are compiled with every
# annotation of shape and dtype checked at each call.
jaxtyping.install_import_hook("gflow", "typechecker.checked")


@pytest.fixture
def unchecked():
    """Annotations unchecked, as for a user: to see what gflow itself says of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

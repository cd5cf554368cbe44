import subprocess
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gflow
from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.march.of_diffrax import method_of
from gflow.dynamics.march.runge_kutta import LARGE
from gflow.native import native

CODE = """
import jax
import gflow

def kept():
    return sorted(path.name for path in folder.iterdir())

assert jax.config.jax_compilation_cache_dir is None  # importing gflow switches nothing on
jax.jit(lambda x: x + 1)(1.0)
folder = gflow.cache_programs()
assert kept() == []
jax.jit(lambda x: x + 2)(1.0)
assert len(kept()) > 0
assert gflow.cache_programs() == folder
print(folder)
"""


def test_programs_are_kept_in_the_users_folder_from_the_call_on(tmp_path):
    root = Path(gflow.__file__).parent.parent
    bare = {
        "PYTHONPATH": str(root),
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=bare, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and done.stdout.strip().endswith("gflow")


@pytest.mark.usefixtures("unchecked")
def test_a_folder_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`directory` is a int"):
        gflow.cache_programs(3)


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        (lambda x: jnp.tanh(jnp.outer(x, x) @ x) / jnp.max(jnp.abs(x)), True),
        (lambda x: x + jnp.sort(x)[0], False),  # for which XLA calls what no function can
        (lambda x: x + jnp.linalg.svd(jnp.outer(x, x))[1], False),
        (lambda x: x + jnp.sum(jnp.outer(x, x) @ jnp.outer(x, x)) * 1e-9, False),
    ],
    ids=["plain", "sort", "decomposition", "product of matrices"],
)
def test_a_loop_is_one_function_where_it_can_be_and_gives_the_same(body, whole):
    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: body(x), x)

    x = jnp.linspace(-1.0, 0.5, 7)
    program = jax.jit(lambda x: native(loop, x)).lower(x)
    assert ("xla_cpu_small_call" in program.as_text()) == whole
    np.testing.assert_allclose(program.compile()(x), loop(x), rtol=1e-13)


@pytest.mark.parametrize(
    ("solver", "width"),
    [(diffrax.Dopri8(), 3), (diffrax.Heun(), 3), (diffrax.Dopri8(), LARGE // 2 + 1)],
    ids=["fsal", "not", "wide"],
)
def test_an_explicit_step_is_that_of_diffrax(solver, width):
    data = gflow.datasets.separable(n=5, d=2, margin=0.1, seed=0)
    field = FlowField(gflow.Problem(data, loss=gflow.Exponential()), gflow.clocks.Risk())
    weights = tuple(map(jnp.asarray, gflow.init.gaussian((2, width, 1), seed=0)))
    s, h, state = jnp.asarray(0.3), jnp.asarray(0.01), FlowState(weights, jnp.asarray(0.2))
    method, term = method_of(solver, 1e-6, 1e-9), diffrax.ODETerm(field)

    @jax.jit
    def ours(state):
        made = method.end(field, s, h, state, (), (), method.start(field, s, state, h))
        return made.state, made.error, made.memory

    @jax.jit
    def theirs(state):
        before = solver.init(term, s, s + h, state, None)
        after, error, *_ = solver.step(term, s, s + h, state, None, before, jnp.array(False))
        return after, error, field(s + h, after)

    for found, expected in zip(*map(jax.tree.leaves, (ours(state), theirs(state))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-16)

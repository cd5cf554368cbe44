import math
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
from gflow.dynamics.march.runge_kutta import LARGE, outer
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


POINTS = gflow.datasets.separable(n=5, d=2, margin=0.1, seed=0)
CLASSES = gflow.Dataset(POINTS.inputs, np.arange(5) % 3, num_classes=3)
SIDE = math.isqrt(LARGE) + 1


@pytest.mark.parametrize(
    ("solver", "data", "widths"),
    [
        (diffrax.Dopri8(), POINTS, (2, 3, 1)),
        (diffrax.Heun(), POINTS, (2, 3, 1)),
        (diffrax.Dopri8(), POINTS, (2, LARGE // 2 + 1, 1)),
        (diffrax.Dopri8(), POINTS, (2, SIDE, SIDE, 1)),
        (diffrax.Heun(), CLASSES, (2, SIDE, SIDE, 3)),
    ],
    ids=["fsal", "not", "wide", "outer products", "of several rows"],
)
def test_explicit_steps_are_those_of_diffrax(solver, data, widths):
    loss = gflow.Exponential() if data is POINTS else gflow.CrossEntropy()
    field = FlowField(gflow.Problem(data, loss=loss), gflow.clocks.Risk())
    weights = tuple(map(jnp.asarray, gflow.init.gaussian(widths, seed=0)))
    s, h, state = jnp.asarray(0.3), jnp.asarray(0.01), FlowState(weights, jnp.asarray(0.2))
    method, term = method_of(solver, 1e-6, 1e-9), diffrax.ODETerm(field)

    @jax.jit
    def ours(state):
        made = method.end(field, s, h, state, (), (), method.start(field, s, state, h))
        after = method.end(field, s + h, h, made.state, (), (), made.memory)
        return made.state, made.error, after.state

    @jax.jit
    def theirs(state):
        kept, told = solver.init(term, s, s + h, state, None), jnp.array(False)
        made, error, _, kept, _ = solver.step(term, s, s + h, state, None, kept, told)
        after, *_ = solver.step(term, s + h, s + 2 * h, made, None, kept, told)
        return made, error, after

    assert outer(field, weights) == (SIDE in widths)
    for found, expected in zip(*map(jax.tree.leaves, (ours(state), theirs(state))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-16)

"""Optimisers taken apart: equal when their calls are, and one program whatever their numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow.dynamics.descending.closures import open_function
from gflow.dynamics.descending.optimizers import opened

MAKERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adamw": optax.adamw,
    "schedule": lambda rate: optax.sgd(optax.exponential_decay(rate, 10, 0.5)),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)),
    "on_log_risk": lambda rate: gflow.on_log_risk(optax.sgd(rate)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimisers_from_one_call_differ_in_their_numbers_only(name):
    make = MAKERS[name]
    first, again, other = (
        eqx.partition(opened(make(rate)), eqx.is_array) for rate in (0.1, 0.1, 0.2)
    )
    for numbers, rest in (again, other):
        assert jax.tree.structure(rest) == jax.tree.structure(first[1])
        assert jax.tree.leaves(rest) == jax.tree.leaves(first[1])
        same = all(map(np.array_equal, jax.tree.leaves(numbers), jax.tree.leaves(first[0])))
        assert same == (numbers is again[0])


def test_other_code_and_other_settings_are_another_function():
    def scaled(by, *, twice=False):
        return lambda x: by * x * (2 if twice else 1)

    def other(by):
        return lambda x: by + x

    one = jax.tree.structure(open_function(scaled(2.0)))
    assert one == jax.tree.structure(open_function(scaled(3.0)))
    assert one != jax.tree.structure(open_function(other(2.0)))
    plain, doubled = open_function(scaled(2.0)), open_function(scaled(2.0, twice=True))
    assert jax.tree.leaves(plain) != jax.tree.leaves(doubled)
    assert doubled(3.0) == 12.0


def test_an_optimiser_that_decides_by_its_numbers_still_runs():
    def update(updates, state, params=None, *, rate=0.1):
        step = threshold if threshold < rate else rate  # needs a number, not a tracer
        return jax.tree.map(lambda leaf: -step * leaf, updates), state

    threshold = 0.05
    own = optax.GradientTransformation(lambda params: (), update)
    problem = gflow.Problem(gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0))
    start, until = gflow.init.gaussian((2, 3, 1), seed=0), gflow.Steps(3)
    ours = gflow.gradient_descent(problem, start, own, until=until, save=2)
    plain = gflow.gradient_descent(problem, start, optax.sgd(0.05), until=until, save=2)
    np.testing.assert_allclose(ours.log_risk.values, plain.log_risk.values, rtol=1e-13)


def test_a_name_without_a_value_and_a_function_within_itself_stay_what_they_are():
    def made():
        def count(n):
            return 0 if n == 0 else 1 + count(n - 1)

        if made is None:
            missing = 1

        def ask():
            return missing

        return count, ask

    count, ask = map(open_function, made())
    assert count(3) == 3
    with pytest.raises(NameError):
        ask()
    assert float(jax.jit(open_function(lambda x: jnp.sin(x)))(0.0)) == 0.0

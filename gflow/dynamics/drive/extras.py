"""Observables that the caller adds: checked before a run, evaluated under the caller's settings."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.names import check_names, made_from
from gflow.problem import settings
from gflow.problem.array import Array
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

Observable = Callable[[Problem, Weights], Array]


def checked(
    observables: Mapping[str, Observable] | None, problem: Problem, weights: Weights
) -> dict[str, Observable]:
    """The caller's observables, each of which a record can hold under its name.

    Each function is traced once, so that what does not work is known before the run.

    Raises:
        ValueError: that names the observable and says what is wrong with it.
    """
    if observables is None:
        return {}
    if not isinstance(observables, Mapping):
        raise ValueError(
            f"`observables` is a {type(observables).__name__}; expected a mapping from name to "
            'function of (problem, weights), as {"size": lambda problem, weights: ...}.'
        )
    check_names("observables", observables)
    made: set[str] = set()
    for name, function in observables.items():
        made |= made_from(name, len(_shape(name, function, problem, weights)))
    check_names("observables", observables, beside=made)
    return dict(observables)


def evaluate(
    extra: Mapping[str, Observable], problem: Problem, weights: Weights
) -> dict[str, Array]:
    """The caller's observables at some weights."""
    if not extra:
        return {}
    # The caller's guard against transfers is for theirs.
    arrays, rest = eqx.partition((problem, weights), eqx.is_array)
    problem, weights = eqx.combine(jax.device_put(arrays), rest)
    with settings.callers():
        return _evaluate(problem, weights, tuple(extra.items()))


@eqx.filter_jit
def _evaluate(
    problem: Problem, weights: Weights, extra: tuple[tuple[str, Observable], ...]
) -> dict[str, Array]:
    return {name: _stored(function(problem, weights)) for name, function in extra}


def _shape(name: str, function: Any, problem: Problem, weights: Weights) -> tuple[int, ...]:
    """The shape of an observable, if it is one and a record can hold it."""
    where = f"`observables[{name!r}]`"
    if not callable(function):
        raise ValueError(f"{where} is {function!r}; expected a function of (problem, weights).")
    try:
        with settings.callers():
            value = eqx.filter_eval_shape(function, problem, weights)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"{where} uses NumPy, or converts to a NumPy array, where JAX traces it; expected a "
            "function of (problem, weights) written with jax.numpy."
        ) from error
    except Exception as error:  # whatever it is, it is the caller's
        raise ValueError(
            f"{where} raises {type(error).__name__}: {error}. Expected a function of (problem, "
            "weights), written with jax.numpy, that JAX can trace."
        ) from error
    expected = "expected one real number or array; several go under several names."
    try:
        stored = jax.eval_shape(_stored, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} returns {_described(value)}; {expected}") from error
    if stored.dtype.kind not in "biuf":
        raise ValueError(f"{where} returns {_described(value)}; {expected}")
    return stored.shape


def _stored(value: Any) -> Array:
    """A value as an array of a type that files know."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError("a random key is no number")
    short = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    if short or (array.dtype.kind not in "biufc" and jnp.issubdtype(array.dtype, jnp.number)):
        return array.astype(jnp.float32)
    return array


def _described(value: Any) -> str:
    leaf = np.shape(value) if hasattr(value, "dtype") else None
    if leaf is None:
        return f"a {type(value).__name__}"
    return f"an array of type {value.dtype}"

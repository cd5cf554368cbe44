"""Functions that compare by what they are made of, so that nothing is compiled twice.

optax's optimisers are closures: ``optax.sgd(0.1)`` written twice gives two functions that JAX knows
to be nothing but different. Here a function is taken apart into its code and what it closes over,
to any depth. Code and settings are compared, and numbers with a decimal point become arrays: to
JAX, optimisers from equal calls are one, and those that differ in a learning rate or a decay are
one program with other arguments, which many members can run side by side.
"""

import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

EMPTY = "a cell without contents"


def open_function(function: Callable[..., Any]) -> "Callable[..., Any]":
    """The function, as a pytree of what it closes over; as it is if that cannot be told.

    >>> def scale(by):
    ...     return lambda x: by * x
    >>> open_function(scale(2.0))(3.0), bool(open_function(scale(2.0)) == open_function(scale(2.0)))
    (6.0, True)
    """
    opened = _open(function, ())
    try:
        hash(jax.tree.structure(opened))
        hash(tuple(leaf for leaf in jax.tree.leaves(opened) if not eqx.is_array(leaf)))
    except (TypeError, ValueError):
        return function
    return opened


class Closure(eqx.Module):
    """A function taken apart. Calling it puts it together again."""

    recipe: "Recipe" = eqx.field(static=True)
    cells: tuple[Any, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.closed()(*args, **kwargs)

    def closed(self) -> types.FunctionType:
        """The function itself."""
        return self.recipe.function(tuple(_close(cell) for cell in self.cells))


class Recipe:
    """All of a function but what it closes over; equal for functions from one line of code."""

    def __init__(self, function: types.FunctionType):
        self.model = function
        self.settings = (function.__defaults__, tuple((function.__kwdefaults__ or {}).items()))

    def function(self, contents: tuple[Any, ...]) -> types.FunctionType:
        """A function that closes over ``contents``."""
        model = self.model
        cells = tuple(
            types.CellType() if each is EMPTY else types.CellType(each) for each in contents
        )
        made = types.FunctionType(
            model.__code__, model.__globals__, model.__name__, model.__defaults__, cells
        )
        made.__kwdefaults__ = model.__kwdefaults__
        made.__qualname__ = model.__qualname__
        return made

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Recipe)
            and self.model.__code__ == other.model.__code__
            and self.model.__globals__ is other.model.__globals__
            and self.settings == other.settings
        )

    def __hash__(self) -> int:
        return hash(self.model.__code__)


def _open(value: Any, inside: tuple[int, ...]) -> Any:
    """``value`` with its functions taken apart and its numbers as arrays."""
    if isinstance(value, float):
        with jax.enable_x64(True):
            return jnp.asarray(value)  # weakly typed, as the number is: bfloat16 times it stays so
    if isinstance(value, types.FunctionType) and id(value) not in inside:  # not within itself
        inside = (*inside, id(value))
        cells = (_contents(cell) for cell in value.__closure__ or ())
        return Closure(Recipe(value), tuple(_open(each, inside) for each in cells))
    return _within(value, lambda each: _open(each, inside))


def _close(value: Any) -> Any:
    """``value`` with its functions put together, and numbers as they were unless JAX traces."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        return float(value) if value.weak_type and value.ndim == 0 else value
    return value.closed() if isinstance(value, Closure) else _within(value, _close)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that was never given a value
        return EMPTY


def _within(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with its parts changed, if it is a container of Python's own."""
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if type(value) is dict:
        return {key: change(each) for key, each in value.items()}
    return value

"""How gflow holds an optax optimiser: with extra arguments, comparable, and described in words."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import optax

from gflow.dynamics.descending.closures import open_function

ALONG_GRADIENT = {
    "chain",
    "clip_by_global_norm",
    "identity",
    "normalize_by_update_norm",
    "scale",
    "scale_by_backtracking_linesearch",
    "scale_by_learning_rate",
    "scale_by_polyak",
    "scale_by_schedule",
    "scale_by_zoom_linesearch",
    "with_extra_args_support",
}
"""optax's transformations whose updates are a positive multiple of minus the gradient."""


def transformation(rule: Any) -> optax.GradientTransformationExtraArgs:
    """The optax transformation of a rule, an ``equinox`` module with `init` and `update`."""
    # Bound methods of equinox modules are pytrees that compare by value: a rule built twice with
    # the same settings is compiled once, and so are those that differ in an array only.
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)


def with_extra_arguments(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, taking extra arguments and ignoring those that it does not know.

    As ``optax.with_extra_args_support``, but equal for equal optimisers: nothing is compiled twice.
    """
    known = extra_arguments(optimizer)
    if known is None and isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optimizer
    return transformation(PlainOptimizer(optimizer, known or ()))


def without_extra_arguments(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, ignoring all extra arguments: parts of it may take none."""
    return transformation(PlainOptimizer(optimizer, ()))


def extra_arguments(optimizer: optax.GradientTransformation) -> tuple[str, ...] | None:
    """The names of the extra arguments that an optimiser takes; None if it takes any."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return ()
    try:
        parameters = inspect.signature(optimizer.update).parameters.values()
    except (TypeError, ValueError):  # a callable that does not tell
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    named = [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY]
    return tuple(name for name in named if name not in ("updates", "state", "params"))


class PlainOptimizer(eqx.Module):
    """An optimiser that is not given the extra arguments that it does not know."""

    inner: optax.GradientTransformation
    known: tuple[str, ...] = eqx.field(static=True)

    @property
    def along_gradient(self) -> bool:
        """Whether updates are positive multiples of minus the gradient."""
        return along_gradient(self.inner)

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        extra = {name: value for name, value in extra.items() if name in self.known}
        return self.inner.update(updates, state, params, **extra)

    def __repr__(self) -> str:
        return describe(self.inner)


class AroundOptimizer(eqx.Module):
    """A rule that hands its own gradients to an optimiser."""

    inner: optax.GradientTransformationExtraArgs

    @property
    def along_gradient(self) -> bool:
        """Whether updates are positive multiples of minus the gradient."""
        return along_gradient(self.inner)


def opened(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with its numbers as arrays, equal for equal calls (see ``closures.py``).

    It cannot be traced if the optimiser decides by its numbers what to do.
    """
    rule = getattr(optimizer.update, "__self__", None)
    if isinstance(rule, PlainOptimizer):
        return opened(rule.inner)
    if isinstance(rule, AroundOptimizer):
        return transformation(dataclasses.replace(rule, inner=opened(rule.inner)))
    if isinstance(rule, eqx.Module):  # one of ours
        return with_extra_arguments(optimizer)
    functions = open_function(optimizer.init), open_function(optimizer.update)
    return transformation(OpenOptimizer(*functions, extra_arguments(optimizer)))


class OpenOptimizer(eqx.Module):
    """An optimiser whose numbers are leaves."""

    start: Callable
    move: Callable
    known: tuple[str, ...] | None = eqx.field(static=True)
    """The extra arguments that it takes; None if any."""

    def init(self, params: Any) -> Any:
        return self.start(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        # A state of low precision meets float64 gradients.
        if self.known is not None:
            extra = {name: value for name, value in extra.items() if name in self.known}
        with jax.numpy_dtype_promotion("standard"):
            return self.move(updates, state, params, **extra)

    @property
    def along_gradient(self) -> bool:
        """Whether updates are positive multiples of minus the gradient."""
        return _along_gradient(self._closed())

    def __repr__(self) -> str:
        return _describe(self._closed())

    def _closed(self) -> Callable:
        return getattr(self.move, "closed", lambda: self.move)()


def describe(optimizer: optax.GradientTransformation) -> str:
    """What an optimiser is made of, as far as it can be seen from outside.

    >>> describe(optax.sgd(0.5, momentum=0.9))
    'chain(trace(decay=0.9, nesterov=False), scale(step_size=-0.5))'
    """
    return _describe(optimizer.update)


def along_gradient(optimizer: optax.GradientTransformation) -> bool:
    """Whether every update is a positive multiple of minus the gradient, as far as can be seen.

    Rules of gflow declare it, as may one's own: an ``equinox`` module with such an attribute. Of
    optax's transformations the parts are looked up.

    >>> along_gradient(optax.sgd(0.5)), along_gradient(optax.sgd(0.5, momentum=0.9))
    (True, False)
    """
    return _along_gradient(optimizer.update)


def _along_gradient(update: Callable) -> bool:
    owner = getattr(update, "__self__", None)
    if owner is not None:
        return bool(getattr(owner, "along_gradient", False))
    parts = []
    for name, value in _settings(update):
        if name == "update_fns":
            parts.extend(value)
        elif isinstance(value, optax.GradientTransformation):
            parts.append(value.update)
    return _head(update) in ALONG_GRADIENT and all(map(_along_gradient, parts))


def _settings(update: Callable) -> Iterator[tuple[str, Any]]:
    """What one of optax's transformations, a closure, closes over: its settings and parts."""
    names: Any = getattr(getattr(update, "__code__", None), "co_freevars", ())
    cells: Any = getattr(update, "__closure__", None) or ()
    for name, cell in zip(names, cells, strict=False):
        yield name, cell.cell_contents


def _describe(update: Callable) -> str:
    owner = getattr(update, "__self__", None)
    if owner is not None:
        return repr(owner)
    parts = []
    for name, value in _settings(update):
        if name == "update_fns":
            parts.extend(_describe(part) for part in value)
        elif isinstance(value, float):
            parts.append(f"{name}={value:g}")
        elif isinstance(value, bool | int):
            parts.append(f"{name}={value}")
        elif isinstance(value, optax.GradientTransformation):
            parts.append(describe(value))
        elif "step_size" in name and callable(value):
            parts.append(f"{name}={_head(value)}")
    head = _head(update)
    parts = [part for part in parts if part != "identity"] or parts
    if head in ("with_extra_args_support", "chain") and len(parts) == 1:
        return parts[0]
    return f"{head}({', '.join(parts)})" if parts else head


def _head(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]

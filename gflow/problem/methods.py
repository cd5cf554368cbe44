"""Methods of modules as functions that JAX's transformations take."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class BoundFunction:
    """A method of an instance; equal to the same method of the same instance, and to nothing else.

    Args:
        function: the method.
        instance: what it is of.
    """

    def __init__(self, function: Callable[..., Any], instance: Any):
        functools.update_wrapper(self, function)
        self.function, self.instance = function, instance
        self.__wrapped__ = functools.partial(function, instance)  # whose signature is this one's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.instance, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BoundFunction)
            and self.instance is other.instance
            and self.function is other.function
        )

    def __hash__(self) -> int:
        return hash((id(self.instance), id(self.function)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.instance, self.function.__name__)


class _PlainMethod:
    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)  # pyright: ignore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)  # pyright: ignore

    def __get__(self, instance: Any, owner: type) -> Any:
        function: Any = self.__wrapped__  # pyright: ignore
        return function if instance is None else BoundFunction(function, instance)


def plain_method(function: Method) -> Method:
    """A method that ``jax.jit`` takes although its module holds arrays.

    An equinox module binds its methods as pytrees, equal if all their arrays are, and JAX cannot
    hash these: ``jax.jit(problem.log_risk)`` would raise.
    """
    method: Any = _PlainMethod(function)
    return method

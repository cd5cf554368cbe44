"""What follows from an object, worked out once for as long as the object lives."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def once_per_object(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of an object that is called once for each, told apart by identity.

    What is found is kept beside the object and not on it: a further attribute of a pytree would be
    another structure to JAX, and everything would be compiled again. Arrays of a problem are never
    changed in place, so that nothing kept goes stale.

    >>> class Thing: ...
    >>> calls = []
    >>> ask = once_per_object(lambda thing: calls.append(thing) or len(calls))
    >>> thing = Thing()
    >>> ask(thing), ask(thing)
    (1, 1)
    """
    found: dict[int, Result] = {}

    @functools.wraps(function)
    def once(of: Any) -> Result:
        key = id(of)
        if key not in found:
            found[key] = function(of)
            weakref.finalize(of, found.pop, key, None).atexit = False
        return found[key]

    return once

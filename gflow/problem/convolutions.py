r"""Convolutions inside compiled loops on a CPU, in the one layout that is fast there.

XLA has a fast convolution on CPUs for one order of axes: pictures as (points, rows, columns,
channels), filters as (rows, columns, inputs, outputs). Outside of loops it turns all others round;
inside a loop it does not, and takes plain nested loops instead, which are ten to forty times slower
(jaxlib 0.10.2: 44 against 1.1 ms for 16 to 32 channels on 64 pictures of 8 by 8). All that gflow
does is in loops. So the program of a network, and that of its gradient, is gone through and every
convolution in it turned round by hand.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.lax import ConvDimensionNumbers


def in_fast_layout(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with every convolution in it in the layout that is fast on a CPU.

    The function itself where it has none, or there is another device. Its derivatives are right,
    but their convolutions are as JAX makes them: differentiate first.

    Args:
        function: of pytrees of arrays; pure JAX.
    """

    @functools.wraps(function)
    def same(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        found = _evaluated(traced.jaxpr, traced.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return same


def _evaluated(program: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program."""
    known: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    known.update(zip(program.invars, inputs, strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for step in program.eqns:
        given = [of(atom) for atom in step.invars]
        known.update(zip(step.outvars, _done(step, given), strict=True))
    return [of(atom) for atom in program.outvars]


def _done(step: Any, given: Sequence[Any]) -> list[Any]:
    """What an operation gives; the program of a plain call is gone through in turn."""
    if step.primitive is jax.lax.conv_general_dilated_p:
        return [_turned(step.params, *given)]
    inner = step.params.get("jaxpr")
    if step.primitive.name in ("jit", "pjit") and _has_convolution(inner.jaxpr):
        return _evaluated(inner.jaxpr, inner.consts, given)
    bound = step.primitive.get_bind_params(step.params)
    # Up to JAX 0.9 functions are apart from the other parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    found = step.primitive.bind(*functions, *given, **params)
    return found if step.primitive.multiple_results else [found]


def _has_convolution(program: Any) -> bool:
    return any(
        step.primitive is jax.lax.conv_general_dilated_p
        or (step.primitive.name in ("jit", "pjit") and _has_convolution(step.params["jaxpr"].jaxpr))
        for step in program.eqns
    )


def _turned(params: dict[str, Any], pictures: Any, filters: Any) -> Any:
    """A convolution by one in the fast layout."""
    # A specification lists where (points, channels, rows, columns) are, of filters (outputs,
    # inputs, rows, columns).
    numbers: ConvDimensionNumbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    last = len(lhs) - 1
    inside = tuple(range(1, last))
    fast = (0, last, *inside)
    fast_filters = (last, last - 1, *range(last - 1))
    found = jax.lax.conv_general_dilated_p.bind(
        jax.lax.transpose(pictures, (lhs[0], *lhs[2:], lhs[1])),
        jax.lax.transpose(filters, (*rhs[2:], rhs[1], rhs[0])),
        **{**params, "dimension_numbers": ConvDimensionNumbers(fast, fast_filters, fast)},
    )
    back = [0] * len(out)
    for place, axis in zip(out, fast, strict=True):
        back[place] = axis
    return jax.lax.transpose(found, tuple(back))

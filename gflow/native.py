"""Loops over few numbers, run by a CPU as one function of machine code.

XLA runs a program for a CPU operation by operation. Each costs some tenths of a microsecond beside
its own work, and where several could be done at once they are shared out among threads, which wait
for each other. Of a loop over few numbers that is nearly all of the time: the march of a small
network to log R = -10 takes 14 ms that way, and 3.4 ms as one function.

Such a function XLA makes of loops that access less than 1 kB. That a larger loop is to be one is
said by attributes of a call, which other versions and devices do not heed. XLA's emitter of whole
functions does not know all operations, so what is to be run is read first.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import jaxpr_as_fun

PLAIN = frozenset(  # written as a list they would take a page
    """abs add and argmax argmin broadcast_in_dim cbrt ceil clamp concatenate cond
    convert_element_type copy cos custom_jvp_call custom_vjp_call div dot_general dynamic_slice
    dynamic_update_slice eq exp exp2 expm1 floor gather ge gt integer_pow iota is_finite jit le log
    log1p logistic lt max min mul ne neg not or pad pjit pow reduce_and reduce_max reduce_min
    reduce_or reduce_prod reduce_sum reshape rev round rsqrt scan scatter scatter-add select_n sign
    sin slice split sqrt square squeeze stack stop_gradient sub tan tanh transpose unstack while
    xor""".split()  # noqa: SIM905
)
"""Operations that the emitter of whole functions knows, or that are made of such."""

LARGE = 2**14
"""Numbers in an array from which on the operations' own work is what counts."""

IN_PLACE = frozenset(
    ["cond", "dynamic_update_slice", "jit", "pjit", "scan", "scatter", "scatter-add", "while"]
)
"""Operations that need not write all of what they give."""


def native(function: Callable, *args: Any) -> Any:
    """``function(*args)``, run as one function of machine code where that is possible and pays.

    To be called in a program that is being compiled. Nothing is different but the time, and the
    last bits: sums are in another order.

    Args:
        function: of pytrees of arrays; a loop.
        args: its arguments.
    """
    if jax.default_backend() != "cpu":
        return function(*args)
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    run, leaves = jaxpr_as_fun(traced), jax.tree.leaves(args)
    if _is_plain(traced.jaxpr):
        # A call that is made part of the program around it is run operation by operation again.
        with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
            found = jax.jit(run)(*leaves)
    else:
        found = run(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _is_plain(program: Any) -> bool:
    """Whether all operations are ``PLAIN``, and their work little."""
    return all(
        operation.primitive.name in PLAIN
        and _is_little(operation)
        and all(_is_plain(inner) for inner in _inner_programs(operation))
        for operation in program.eqns
    )


def _is_little(operation: Any) -> bool:
    name = operation.primitive.name
    shapes = [operand.aval.shape for operand in operation.invars]
    if name.startswith("scatter"):  # one by one in a loop, but for a single one
        return math.prod(shapes[1][:-1]) == 1
    if name == "dot_general":
        # A product of two matrices may be left to a library, which the emitter does not know.
        (contracted, _), (batch, _) = operation.params["dimension_numbers"]
        summed = math.prod(shapes[0][axis] for axis in (*contracted, *batch))
        if min(math.prod(shape) // max(1, summed) for shape in shapes) > 1:
            return False
    given = [result.aval.shape for result in operation.outvars]
    return name in IN_PLACE or all(math.prod(shape) <= LARGE for shape in given)


def _inner_programs(operation: Any) -> list[Any]:
    """The bodies of a loop, the branches of a condition, what is called."""

    def is_program(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    found = jax.tree.leaves(list(operation.params.values()), is_leaf=is_program)
    return [getattr(value, "jaxpr", value) for value in found if is_program(value)]

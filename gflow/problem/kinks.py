r"""Activations with a kink that gflow knows of: $\phi_\kappa(z) = \max(z, \kappa z)$.

``gflow.relu`` and ``gflow.leaky_relu`` are ordinary JAX functions, to be used anywhere. In a traced
network each stands as a primitive of its own, so that a flow finds its kinks wherever they are,
under ``vmap`` and ``jit`` too, and can put *gates* in their places: a number $g$ with
$\phi(z) = g z$, which is 1 on the one side of the kink and $\kappa$ on the other. With gates held
fixed a network is smooth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from gflow.problem.arguments import is_number, shown
from gflow.problem.array import Array


def relu(z: Array) -> Array:
    r"""The rectifier $\max(z, 0)$, elementwise; its derivative at zero is 0.

    >>> (relu(jnp.array([-2.0, 3.0])) == jnp.array([0.0, 3.0])).tolist()
    [True, True]
    """
    return leaky_relu(z, 0.0)


def leaky_relu(z: Array, slope: float = 0.01) -> Array:
    r"""$z$ where $z > 0$, elsewhere ``slope`` times $z$; elementwise.

    Args:
        z: pre-activations, of any shape.
        slope: a number below 1: 0 for a ReLU, -1 for the absolute value.

    Raises:
        ValueError: when the slope is no such number.

    >>> leaky_relu(jnp.array([-2.0, 3.0]), 0.5).tolist()
    [-1.0, 3.0]
    """
    return _kink.bind(jnp.asarray(z), slope=checked_slope(slope))


def checked_slope(slope: float) -> float:
    """The slope on the lower side, a number below 1.

    Raises:
        ValueError: when it is not.
    """
    if not is_number(slope) or not -1e6 < slope < 1:
        raise ValueError(
            f"`slope` is {shown(slope)}; expected a number below 1, the slope where z < 0: 0 for "
            "a ReLU, 0.1 for a leaky one, -1 for the absolute value."
        )
    return float(slope)


def check_branch(branch: str | None) -> None:
    """Raise where ``branch`` is none of "on", "off" and None."""
    if branch not in (None, "on", "off"):
        raise ValueError(
            f"`branch` is {shown(branch)}; expected 'on' or 'off', the side of a kink to go to "
            "where both lead away from it, or None to end there."
        )


def side_of(branch: str | None) -> int | None:
    """The side that is meant: 1 or -1."""
    return None if branch is None else 1 if branch == "on" else -1


def _branch(z: Any, *, slope: float) -> Any:
    return jnp.where(z > 0, z, z * jnp.asarray(slope, z.dtype))


def _gate(tangent: Any, z: Any, *, slope: float) -> Any:
    one = jnp.ones((), z.dtype)
    return jnp.where(z > 0, one, jnp.asarray(slope, z.dtype)) * tangent


_kink = Primitive("kink")
_kink.def_impl(_branch)
_kink.def_abstract_eval(lambda z, **_: z)
batching.defvectorized(_kink)
ad.defjvp(_kink, _gate)
mlir.register_lowering(_kink, mlir.lower_fun(_branch, multiple_results=False))


SWITCHES = ("max", "min", "abs", "clamp", "sign")
"""Primitives that have kinks: of an activation that gflow does not know of, as jax.nn.relu. A
maximum over an axis is none of them, since softmax takes it off and adds it again."""

LOOPS = ("scan", "while", "cond")
"""Primitives whose passes share a program."""

Wanted = Callable[[Any], bool]
"""Whether an equation is one of those that are looked for."""

Meet = Callable[[Any, list[Any]], Any]
"""From such an equation and its operands to its result."""


def is_kink(equation: Any) -> bool:
    """Whether an equation is an activation with a kink that gflow knows of."""
    return equation.primitive is _kink


def is_switch(equation: Any) -> bool:
    """Whether it has a kink that is none of gflow's."""
    if equation.primitive.name not in SWITCHES:
        return False
    floats = all(jnp.issubdtype(out.aval.dtype, jnp.floating) for out in equation.outvars)
    literals = [atom.val for atom in equation.invars if isinstance(atom, Literal)]
    return floats and bool(np.all(np.isfinite(np.array(literals, dtype=np.float64))))


def holds(jaxpr: Jaxpr, wanted: Wanted) -> bool:
    """Whether there is such an equation in a program, at any level."""
    return any(
        wanted(equation) or any(holds(inner, wanted) for inner in _inner(equation))
        for equation in jaxpr.eqns
    )


def replay(
    program: ClosedJaxpr, arguments: list[Any], wanted: Wanted, meet: Meet, loops: bool = True
) -> list[Any]:
    """Evaluate a program with ``meet`` in the place of each equation that is wanted, in order.

    Args:
        program: see :func:`traced`.
        arguments: its flat arguments.
        wanted, meet: which equations, and what stands in their place.
        loops: whether a wanted one inside a loop or a branch is an error; else it is left alone.

    Raises:
        ValueError: when one is inside a loop or a branch.
    """
    jaxpr, known = program.jaxpr, {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    known.update(zip(jaxpr.constvars, program.consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        if wanted(equation):
            found = [meet(equation, values)]
        elif (called := _called(equation, wanted, loops)) is not None:
            found = replay(called, values, wanted, meet, loops)
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            # A pair before JAX 0.10.
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
            found = equation.primitive.bind(*functions, *values, **parameters)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Any, wanted: Wanted, loops: bool) -> ClosedJaxpr | None:
    """The program that an equation calls, if something that is wanted is in it."""
    if not any(holds(inner, wanted) for inner in _inner(equation)):
        return None
    inner = [each for each in equation.params.values() if isinstance(each, ClosedJaxpr | Jaxpr)]
    if equation.primitive.name not in LOOPS and len(inner) == 1:
        return inner[0] if isinstance(inner[0], ClosedJaxpr) else ClosedJaxpr(inner[0], [])
    if not loops:
        return None
    raise ValueError(
        f"`apply` has a gflow.relu or gflow.leaky_relu inside a `{equation.primitive.name}`; "
        "expected it outside of loops and branches of JAX, where each is one place of the network: "
        "write the loop over layers in Python."
    )


def _inner(equation: Any) -> list[Jaxpr]:
    """The programs that an equation calls."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                found.append(each.jaxpr)
            elif isinstance(each, Jaxpr):
                found.append(each)
    return found


def traced(apply: Callable[..., Any], *arguments: Any) -> ClosedJaxpr:
    """``apply`` as a program, of the shapes and types of its arguments."""
    return jax.make_jaxpr(apply)(*arguments)

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
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from gflow.problem.arguments import is_number, shown
from gflow.problem.array import Array


def relu(z: Array) -> Array:
    r"""The rectifier $\max(z, 0)$, elementwise; its derivative at zero is 0.

    >>> relu(jnp.array([-2.0, 3.0])).tolist()
    [0.0, 3.0]
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
            f"`branch` is {shown(branch)}; expected 'on' or 'off', the side of a kink to go to where "
            "both lead away from it, or None to end there."
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


Meet = Callable[[Any, float], Any]
"""From a pre-activation and the lower slope to what stands in the activation's place."""


def has_kinks(jaxpr: Jaxpr) -> bool:
    """Whether there is a known kink in a program, at any level."""
    return any(
        equation.primitive is _kink or any(has_kinks(inner) for inner in _inner(equation))
        for equation in jaxpr.eqns
    )


def replay(jaxpr: Jaxpr, constants: list[Any], arguments: list[Any], meet: Meet) -> list[Any]:
    """Evaluate a program, with ``meet`` in the place of each activation, in their order.

    Raises:
        ValueError: when a known kink is inside a loop or a branch, whose passes share a program.
    """
    known: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    known.update(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        inner = _inner(equation)
        if equation.primitive is _kink:
            found = [meet(values[0], equation.params["slope"])]
        elif any(has_kinks(each) for each in inner):
            found = _replay_call(equation, values, meet)
        else:
            functions, parameters = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*functions, *values, **parameters)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


LOOPS = ("scan", "while", "cond")


def _replay_call(equation: Any, values: list[Any], meet: Meet) -> list[Any]:
    """The inside of a call that has a kink in it."""
    name = equation.primitive.name
    inner = [each for each in equation.params.values() if isinstance(each, ClosedJaxpr | Jaxpr)]
    if name in LOOPS or len(inner) != 1:
        raise ValueError(
            f"`apply` has a gflow.relu or gflow.leaky_relu inside a `{name}`; expected it outside "
            "of loops and branches of JAX, where each is one place of the network: write the loop "
            "over layers in Python."
        )
    closed = inner[0]
    if isinstance(closed, ClosedJaxpr):
        return replay(closed.jaxpr, closed.consts, values, meet)
    return replay(closed, [], values, meet)


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

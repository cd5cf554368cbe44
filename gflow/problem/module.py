"""The base of gflow's own modules."""

import equinox as eqx


class Module(eqx.Module):
    """A pytree with methods, which are Python's own.

    Equinox binds a method as a pytree, so that it may be an argument of a compiled function. That
    takes 40 microseconds each time one is named, and makes `jax.jit(problem.log_risk)` an error:
    such a method is equal to another if all arrays are, and has no hash.
    """

    __getattribute__ = object.__getattribute__

"""The adaptive solvers of diffrax, as the march takes them."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import optimistix

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.method import AbstractMethod, AtOnce, Step
from gflow.dynamics.march.runge_kutta import RungeKutta, is_explicit_pair
from gflow.problem.array import Array


class WholeStep(AtOnce):
    """A step as the solver makes it."""

    def start(self, field: AbstractField, s: Array, state: FlowState, h: Array) -> Any:
        return self.solver.init(diffrax.ODETerm(field), s, s + h, state, None)

    def end(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        attempt: Any,
        seen: Any,
        before: Any,
    ) -> Step:
        after, error, _, memory, result = self.solver.step(
            diffrax.ODETerm(field), s, s + h, state, None, before, jnp.array(False)
        )
        assert error is not None  # the solver is adaptive
        failed = result != diffrax.RESULTS.successful
        scaled_time = jnp.where(failed, jnp.inf, error.scaled_time)
        return Step(after, FlowState(error.weights, scaled_time), memory)

    def counts(self, tally: Any, num_steps: int) -> tuple[int, int]:
        """Zero: it does not say."""
        return 0, 0


def method_of(
    solver: diffrax.AbstractAdaptiveSolver | AbstractMethod, rtol: float, atol: float
) -> AbstractMethod:
    """The solver as the march takes it; tolerances that it leaves open are those of the steps."""
    if isinstance(solver, AbstractMethod):
        return solver
    if is_explicit_pair(solver):
        return RungeKutta(solver)
    whole: diffrax.AbstractAdaptiveSolver = solver
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        given = {"rtol": rtol, "atol": atol, "norm": optimistix.rms_norm}
        # What is open is an object of diffrax's own, neither a number nor a function.
        there = {name: getattr(solver.root_finder, name, 0.0) for name in given}
        left = [name for name, x in there.items() if not (callable(x) or eqx.is_array_like(x))]
        if left:
            whole = eqx.tree_at(
                lambda s: [getattr(s.root_finder, name) for name in left],
                whole,
                [given[name] for name in left],
            )
    return WholeStep(whole)

"""What the march asks of a solver: one attempt at a step, as pure functions of one member."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.control import ROUND_OFF
from gflow.problem.array import Array
from gflow.problem.module import Module


class Step(NamedTuple):
    """What an attempt has come to."""

    state: FlowState
    error: FlowState
    memory: Any
    """What the next step is told of this one, a pytree of arrays."""


class AbstractMethod(Module):
    """A one-step method whose attempts may take many iterations.

    An *attempt* at the step from s to s + h is begun from a memory, worked on until it is solved,
    and ended. All functions are pure and of one member; the march maps them over many.
    """

    iterates: ClassVar[bool] = True
    """Whether attempts are worked on; if not, they are solved as they begin."""

    @property
    @abstractmethod
    def exponent(self) -> float:
        """One over the order of the error estimate in the step."""

    @property
    def noise(self) -> float:
        """The error, relative to the weights, that a step of any length may have."""
        return ROUND_OFF

    def among(self, many: bool) -> "AbstractMethod":
        """The same, for a member that others may go beside, or for one alone."""
        return self

    @abstractmethod
    def start(self, field: AbstractField, s: Array, state: FlowState, h: Array) -> Any:
        """The memory at the start of a run whose first step may be ``h`` long."""

    @abstractmethod
    def begin(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        before: Any,
        last: Any = None,
    ) -> Any:
        """An attempt at the step from ``s`` to ``s + h``.

        ``last`` is the attempt before it, accepted or not, or the same one at another length.
        """

    @abstractmethod
    def solved(self, attempt: Any) -> Array:
        """Whether the attempt can be ended."""

    @abstractmethod
    def look(self, field: AbstractField, s: Array, h: Array, state: FlowState, attempt: Any) -> Any:
        """What the field is at the attempt as it stands: what comes next is made from it."""

    @abstractmethod
    def correct(self, field: AbstractField, h: Array, attempt: Any, seen: Any) -> Any:
        """The attempt after one more iteration."""

    @abstractmethod
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
        """The new state with its error, infinite where the attempt failed."""

    def solve(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, before: Any
    ) -> tuple[Any, Any]:
        """An attempt from its beginning until it is solved, and a last look, for one member."""
        return self.work(field, s, h, state, self.begin(field, s, h, state, before))

    def work(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, attempt: Any
    ) -> tuple[Any, Any]:
        """Corrections until the attempt is solved, and a last look, for one member by itself.

        The look may be less than what :meth:`look` gives, as long as :meth:`end` can do with it.
        """
        if self.iterates:

            def once(attempt: Any) -> Any:
                seen = self.look(field, s, h, state, attempt)
                return self.correct(field, h, attempt, seen)

            attempt = jax.lax.while_loop(lambda attempt: ~self.solved(attempt), once, attempt)
        return attempt, self.look(field, s, h, state, attempt)

    @abstractmethod
    def tally(self, memory: Any) -> Any:
        """The part of the memory that counts."""

    @abstractmethod
    def counts(self, tally: Any, num_steps: int) -> tuple[int, int]:
        """Field evaluations and Newton iterations of ``num_steps`` accepted steps."""

    @property
    def name(self) -> str:
        """As a record names the solver."""
        return type(self).__name__


class WholeStep(AbstractMethod):
    """An adaptive diffrax solver, which makes a step at once."""

    solver: diffrax.AbstractAdaptiveSolver
    sharper: float = 1.0
    """By how much its estimate of the error is to stay below the tolerance."""
    iterates: ClassVar[bool] = False

    @property
    def exponent(self) -> float:
        order = self.solver.error_order(diffrax.ODETerm(lambda t, y, args: y))
        assert order is not None  # the solver is adaptive
        return 1 / float(order)

    @property
    def noise(self) -> float:
        return self.sharper * ROUND_OFF

    def start(self, field: AbstractField, s: Array, state: FlowState, h: Array) -> Any:
        return self.solver.init(diffrax.ODETerm(field), s, s + h, state, None)

    def begin(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        before: Any,
        last: Any = None,
    ) -> Any:
        return ()

    def solved(self, attempt: Any) -> Array:
        return jnp.array(True)

    def look(self, field: AbstractField, s: Array, h: Array, state: FlowState, attempt: Any) -> Any:
        return ()

    def correct(self, field: AbstractField, h: Array, attempt: Any, seen: Any) -> Any:
        return attempt

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
        error = jax.tree.map(lambda leaf: self.sharper * leaf, error)
        scaled_time = jnp.where(failed, jnp.inf, error.scaled_time)
        return Step(after, FlowState(error.weights, scaled_time), memory)

    def tally(self, memory: Any) -> tuple:
        return ()

    def counts(self, tally: Any, num_steps: int) -> tuple[int, int]:
        """Of an explicit Runge–Kutta method; zero for others, which do not say."""
        tableau = getattr(self.solver, "tableau", None)
        explicit = isinstance(self.solver, diffrax.AbstractERK)
        if not (explicit and isinstance(tableau, diffrax.ButcherTableau)):
            return 0, 0
        stages = len(tableau.c) + 1 - int(tableau.fsal)
        return stages * num_steps, 0

    @property
    def name(self) -> str:
        return type(self.solver).__name__


def method_of(
    solver: diffrax.AbstractAdaptiveSolver | AbstractMethod, rtol: float, atol: float
) -> AbstractMethod:
    """The solver as the march takes it; tolerances that it leaves open are those of the steps."""
    if isinstance(solver, AbstractMethod):
        return solver
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


SHARPER, SHARPEST = 100.0, 1e-12
"""By how much, and down to which tolerance."""


def sharp(solver: diffrax.AbstractAdaptiveSolver, rtol: float) -> WholeStep:
    """An explicit solver whose steps are as exact as those of the implicit one at a tolerance.

    The estimate of the implicit solver is of lower order than its steps, whose errors are a hundred
    times smaller, or less. That of an explicit pair is as large as they are.
    """
    return WholeStep(solver, min(SHARPER, max(1.0, rtol / SHARPEST)))

"""What the march asks of a solver: one attempt at a step, as pure functions of one member."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

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
    round_off: Any = 0.0
    """What of the scaled time's error may be there at any length of the step."""


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

    @property
    def patience(self) -> int | None:
        """Attempts, beside two a saved point, after which a flow is taken for stiff.

        None where every so many steps are looked at for that.
        """
        return None

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

        ``last`` is the attempt before it, accepted or not; zeros, or None, where there is none.
        """

    def again(self, made: Any, before: Any) -> Any:
        """The memory for another attempt from where the last one began.

        Args:
            made: what that one left, accepted or not.
            before: the memory that it was given.
        """
        return before

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

    def from_begin_to_end(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, before: Any
    ) -> Step:
        """A step of one member by itself."""
        attempt, seen = self.solve(field, s, h, state, before)
        return self.end(field, s, h, state, attempt, seen, before)

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


class AtOnce(AbstractMethod):
    """A solver of diffrax's, whose attempts are solved as they begin: all is done as they end."""

    solver: diffrax.AbstractAdaptiveSolver
    iterates: ClassVar[bool] = False

    @property
    def exponent(self) -> float:
        order = self.solver.error_order(diffrax.ODETerm(lambda t, y, args: y))
        assert order is not None  # the solver is adaptive
        return 1 / float(order)

    @property
    def name(self) -> str:
        return type(self.solver).__name__

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

    def tally(self, memory: Any) -> tuple:
        return ()

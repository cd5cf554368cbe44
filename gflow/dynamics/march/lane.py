"""Where a member of the march stands, what it follows, and what it has left on its way.

All are pytrees of one member; of many, every array has the lanes on a leading axis.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.tolerance import AbstractTolerance
from gflow.dynamics.stops import AbstractRule
from gflow.problem.array import Array
from gflow.problem.module import Module


class Goals(Module):
    """Where a member stops next. Absent ones are infinite, or the largest integer."""

    clock: Array
    """Clock values to land on, increasing, shape (window,)."""
    steps: Array
    """Accepted steps in all to meet, increasing, shape (window,)."""
    first: Array
    """Numbers of the first clock value and of the first count in these windows, shape (2,)."""
    count: Array
    """How many of each there are in all, shape (2,); the march stops at the last."""
    events: Array
    """The progress at which each watched rule is met, shape (rules,)."""
    longest: Array
    """No step towards a clock value is longer, shape (window,)."""
    max_steps: Array
    """Steps to try in all."""


class Member(Module):
    """What a lane follows, and how exactly."""

    field: AbstractField
    tolerance: AbstractTolerance
    rules: tuple[AbstractRule, ...]
    """The events watched after each step, one for each of ``goals.events``."""
    goals: Goals | None
    """None until it is in a lane."""

    @property
    def ahead(self) -> Goals:
        """The goals of a member in a lane."""
        assert self.goals is not None
        return self.goals


class Lane(Module):
    """Where a member stands: everything it needs to go on, a pytree of arrays."""

    s: Array
    state: FlowState
    memory: Any
    """What the solver's next step is told of the last one."""
    next_step: Array
    error: Array
    """Norm of the last accepted step's error, the memory of the step-size control."""
    step: Array
    """Length of the attempt under way; not a number between two attempts."""
    lands: Array
    """Whether the attempt ends on the next clock goal."""
    cut: Array
    """Whether it is shorter than the control would have it."""
    attempt: Any
    """The one under way, or the last one; zeros at a start and of a lane that was put elsewhere."""
    previous: tuple[Array, FlowState, Any] | None
    """Where the last accepted step began: (s, state, memory). None where no rule is watched."""
    num_steps: Array
    num_rejected: Array
    refused: tuple[Array, Array]
    """The first refused step since the last accepted one, and its error norm; zeros for none."""
    num_stiff: Array
    """Looks in a row that found the step limited by stability."""
    clock_goal: Array
    """Number of the clock goal ahead."""
    steps_goal: Array
    reason: Array

    @property
    def began(self) -> tuple[Array, FlowState, Any]:
        """Where the last accepted step began, of a lane whose member watches rules."""
        assert self.previous is not None
        return self.previous


class Rows(NamedTuple):
    """States on goals, on a leading axis."""

    s: Array
    state: FlowState
    num_steps: Array
    clock_goal: Array
    """Number of the lane's clock goal ahead, after this one."""
    steps_goal: Array


class Saved(NamedTuple):
    """A buffer of states on goals."""

    rows: Rows
    count: Array
    """How many are in use."""


def strong(tree: PyTree[Array]) -> PyTree[Array]:
    """The same arrays without JAX's weak types, so that one compilation serves them all."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.asarray(leaf).dtype), tree)


def blank(tree: PyTree) -> PyTree:
    """Zeros of the same shapes."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def gone_on_from(lane: Lane, state: FlowState, memory: Any, next_step: Array) -> Lane:
    """A lane that goes on from another state where it stands, as if its last step had led there."""
    zero = jnp.zeros_like(lane.s)
    return dataclasses.replace(
        lane,
        state=state,
        memory=memory,
        next_step=next_step,
        refused=(zero, zero),
        attempt=blank(lane.attempt),
        previous=(lane.s, state, memory),
    )


def watching(lane: Lane, watches: bool) -> Lane:
    """A lane, or lanes, of a member that watches rules, or of one that does not."""
    if watches == (lane.previous is not None):
        return lane
    return dataclasses.replace(
        lane, previous=(lane.s, lane.state, lane.memory) if watches else None
    )

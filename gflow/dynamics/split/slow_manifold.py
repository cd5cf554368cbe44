r"""The flow past the wall of float64, to any horizon: ``SlowManifold``.

Margins of size $s = -\log R$ carry an absolute error of $10^{-16}s$, while the softmax weights
need their differences to order one, so that near $s = 10^{10}$ no solver that works on $W_k$ itself
can go on. In split coordinates (``split.state``) that wall does not exist. For losses with
an exponential tail ($-\log\ell(q) = q$ to round-off once all margins exceed 40):

1. $p_i \propto e^{-q_i}$, and $s = m - \operatorname{LSE}_i(-(m\delta_i + \langle b, z_i\rangle))
   + \log n$ determines $m$ from $s$ and $b$.
2. In $\tau = \log s$ only b is stiff: $db/d\tau = s\,(K\bar z/\kappa)_\perp$, where $\bar z$
   depends on b through the softmax with derivative minus the covariance of $z$ under p: rate s on
   the span of the differences of active points, nothing elsewhere. Everything else converges.
   $u = tR$ is stiff too, and linear: $du/d\tau = s(1/\kappa - u)$.
3. So an additive Runge-Kutta pair (Kennedy and Carpenter's ARK5(4)8L[2]SA, whose coefficients
   diffrax carries as KenCarp5) treats b and u implicitly, the rest explicitly. A stage is one pass
   through the layers and a Newton iteration in the d - 1 unknowns b, which for $s\to\infty$ is the
   inner problem of the slow manifold: the p for which all active margins grow alike, that is, the
   least-norm convex combination of their gradients. It is convex, so duplicates, more support
   points than dimensions, and points that enter or leave need no special treatment.
4. After Newton's iteration $\bar z_\perp$, of order 1/s, is read from the stage equation, which is
   solved for it, rather than from the sum over points, which has an absolute error of $10^{-16}$.

Nothing is neglected but the loss's own deviation from its tail: this is the exact flow, and the
slow manifold is what the implicit solver finds by itself.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import numpy as np

from gflow.dynamics.split.field import SplitField
from gflow.dynamics.split.geometry import Geometry
from gflow.dynamics.split.observables import observables
from gflow.dynamics.split.state import SplitState, split
from gflow.dynamics.split.walk import Walk
from gflow.problem.data import labelled
from gflow.problem.memo import once_per_object
from gflow.problem.module import Module
from gflow.problem.one_thread import one_thread
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    from gflow.problem.risk import Problem

STEPS_A_LOOK = 16
"""After so many accepted steps a walk ends and begins anew from its state, so that a run that was
stopped there goes on bit for bit."""

LARGEST = 1e140
r"""Squares of $s^{2-2/L}$ must stay in the range of float64."""


class SlowManifold(Module):
    """Gradient flow of a deep linear network from where it has separated the data, to any horizon.

    Plain NumPy: nothing is compiled, a step of a small network takes a millisecond. Needs
    separable data and a loss with an exponential tail.

    Args:
        rtol: tolerance of a step, relative to the size of each block of variables.
        max_steps: steps to try in one call of ``advance``.
    """

    rtol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __init__(self, *, rtol: float = 1e-9, max_steps: int = 20_000):
        if not 1e-13 <= rtol < 1:
            raise ValueError(f"`rtol` is {rtol}; expected a number from 1e-13 to below 1.")
        self.rtol = float(rtol)
        self.max_steps = int(max_steps)

    @staticmethod
    def obstacle(problem: "Problem", weights: Weights) -> str | None:
        """Why the flow cannot be continued from ``weights``, or None if it can."""
        if problem.network.layers(weights) is None:
            return "the network is not deep linear"
        if problem.data.num_classes is not None:
            return "the data have classes, and split coordinates are for one output"
        if not problem.loss.exponential_tail:
            return f"{problem.loss!r} has no exponential tail, so that all points keep their weight"
        if not (solution := problem.data.max_margin()).separable:
            return f"{solution.verdict}, and split coordinates are about its maximum margin"
        lowest = float(np.min(_margins(problem, weights)))
        least = max(1.0, problem.loss.tail_from)
        if lowest < least:
            return f"the smallest margin is {lowest:.3g}, below {least:g}"
        return None

    def start(
        self,
        problem: "Problem",
        weights: Weights,
        *,
        log_risk: float | None = None,
        log_time: float = -np.inf,
        imbalance: Sequence[np.ndarray] | None = None,
    ) -> SplitState:
        r"""The state at ``weights``.

        Args:
            problem: separable data, a deep linear network, a loss with an exponential tail.
            weights: where the exact solver arrived.
            log_risk: $\log R$ there; computed if not given.
            log_time: $\log t$ there.
            imbalance: the conserved matrices at the start of the flow, which know the misalignment
                better than the entries of ``weights`` do.

        Raises:
            ValueError: when ``obstacle`` finds one.
        """
        reason = self.obstacle(problem, weights)
        if reason is not None:
            raise ValueError(f"The flow cannot be continued on the slow manifold: {reason}.")
        state = split(
            labelled(problem.data),
            weights,
            _log_risk(problem, weights) if log_risk is None else log_risk,
            log_time,
            imbalance,
            geometry(problem),
        )
        return dataclasses.replace(state, along=SplitField(state).weigh(state).along)

    def advance(self, state: SplitState, log_risk: float) -> SplitState:
        r"""The state when $\log R$ has fallen to ``log_risk``.

        Raises:
            ManifoldError: when ``max_steps`` do not suffice; it carries the state reached.
        """
        left = self.max_steps
        while state.minus_log_risk < -log_risk:
            walked = self.walk(state, log_risk, tries=left)
            state, left = walked.state, left - walked.tried
            if walked.spent:
                raise ManifoldError(
                    f"{self.max_steps} steps were tried before log R = {log_risk:.6g} was reached, "
                    f"up to {state.log_risk:.6g}; raise `max_steps`, or loosen `rtol`.",
                    state,
                )
        return state

    def walk(
        self,
        state: SplitState,
        log_risk: float,
        ahead: Callable[[SplitState], float] | None = None,
        longest: float = np.inf,
        tries: int = 20_000,
    ) -> "Walked":
        r"""Some steps on: from what they reach, the same steps follow as if there were no stop.

        Args:
            state: where from.
            log_risk: the risk to stop at.
            ahead: an increasing function of the state, to stop where it is zero.
            longest: no step is longer in the logarithm of -log R.
            tries: steps to try.
        """
        goal = -float(log_risk)
        if not goal <= LARGEST:
            raise ValueError(f"`log_risk` is {log_risk}; expected at least {-LARGEST:g}.")
        if goal <= state.minus_log_risk or (ahead is not None and ahead(state) >= 0):
            return Walked(state, arrived=True)
        with one_thread():
            walk, before = Walk(state, self.rtol, longest), state
            for tried in range(1, tries + 1):
                if not walk.step(np.log(goal)):
                    continue
                at_goal = walk.tau >= np.log(goal)
                if ahead is not None:
                    now = walk.state(goal if at_goal else None)
                    if ahead(now) >= 0:
                        return Walked(self._landed(before, now, ahead), arrived=True, tried=tried)
                    before = now
                if at_goal:
                    return Walked(walk.state(goal), arrived=True, tried=tried)
                if walk.num_steps == STEPS_A_LOOK:
                    return Walked(walk.state(), tried=tried)
        return Walked(walk.state(), spent=True, tried=tries)

    def _landed(
        self, before: SplitState, after: SplitState, ahead: Callable[[SplitState], float]
    ) -> SplitState:
        """The state between two at which ``ahead`` is zero."""
        from scipy.optimize import brentq

        def miss(tau: float) -> float:
            return ahead(self.advance(before, -float(np.exp(tau))))

        ends = np.log([before.minus_log_risk, after.minus_log_risk])
        root = brentq(miss, ends[0], ends[1], xtol=1e-14)
        return self.advance(before, -math.exp(root))  # pyright: ignore[reportArgumentType]


class Walked(NamedTuple):
    """What some steps in split coordinates came to."""

    state: SplitState
    arrived: bool = False
    """At the risk or the event asked for."""
    spent: bool = False
    """All tries were used."""
    tried: int = 0


class ManifoldError(RuntimeError):
    """The continuation stopped early; ``state`` is the last point reached."""

    def __init__(self, message: str, state: SplitState):
        super().__init__(message)
        self.state = state


def difference(state: SplitState, other: SplitState) -> dict[str, float]:
    """The largest relative difference of each small quantity of two states at one risk."""
    first, second = observables(state), observables(other)
    names = ("direction_error", "misalignment", "rank_one_gap", "frobenius_norm")
    found = {}
    for name in names:
        a, b = np.atleast_1d(first[name]), np.atleast_1d(second[name])
        scale = np.maximum(np.abs(a), np.abs(b))
        change = np.where(scale > 0, np.abs(a - b) / np.where(scale > 0, scale, 1), 0.0)
        found[name] = float(np.max(change, initial=0.0))
    found["log_time"] = abs(state.log_time - other.log_time)
    return found


def _margins(problem: "Problem", weights: Weights) -> np.ndarray:
    row = np.ones(1)
    for matrix in reversed(weights):
        row = row @ np.asarray(matrix, dtype=np.float64)
    return np.asarray(labelled(problem.data).signed_inputs) @ row


def _log_risk(problem: "Problem", weights: Weights) -> float:
    margins = _margins(problem, weights)
    lowest = float(np.min(margins))
    return float(np.log(np.mean(np.exp(lowest - margins)))) - lowest


_geometry = once_per_object(Geometry)


def geometry(problem: "Problem") -> Geometry:
    """The data's geometry, worked out once for each data set."""
    return _geometry(problem.data)

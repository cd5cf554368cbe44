"""The hand-over of a flow from its weights to split coordinates: where, whether, and how well."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gflow.dynamics.drive.events import Action
from gflow.dynamics.drive.flow_lanes import Stand
from gflow.dynamics.drive.on_split import OnSplit
from gflow.dynamics.split.slow_manifold import SlowManifold, difference, geometry
from gflow.dynamics.split.state import SplitState
from gflow.problem.observables import imbalance
from gflow.problem.risk import Problem, risk_and_slope
from gflow.problem.sharding import gathered
from gflow.problem.weights import Weights

COMPARE_AT, HAND_OVER_AT = -1e5, -1e6
"""Log risks at which the run on the weights is compared with the continuation, and handed over.
Further out, float64 weights still carry the flow but not its misalignment and direction error."""

SHARED = 0.01
"""The observables' error of a run on the weights, in units of its tolerance: of this order, in
``benchmarks/hand_over.py``."""


class HandOver:
    """Whether a flow may go on in split coordinates, and what its record says of it.

    Args:
        solver: of split coordinates; None if the flow stays on its weights.
        problem: whose flow it is.
        start: its first weights.
        rtol: the tolerance of the run on the weights.
        compares: whether the two ways of going on are compared before the hand-over.

    Attributes:
        early: the other way of going on, begun before the hand-over to be compared there.
        told: what the record says.
    """

    def __init__(
        self,
        solver: SlowManifold | None,
        problem: Problem,
        start: Weights,
        *,
        rtol: float,
        compares: bool,
    ):
        self.solver, self.problem, self.start = solver, problem, start
        self.rtol, self.compares = rtol, compares
        self.early: OnSplit | None = None
        self.told: dict[str, Any] = {}

    def levels(self) -> list[tuple[float, Action]]:
        """Log risks at which there is something to do."""
        if self.solver is None:
            return []
        compares = self.compares and self.early is None
        return [(HAND_OVER_AT, Action.HAND_OVER), *[(COMPARE_AT, Action.COMPARE)] * compares]

    def compare(self, stand: Stand) -> None:
        """Begin the other way of going on."""
        found = self._begun(stand)
        if isinstance(found, OnSplit):
            self.early = found
        else:
            self._not_made(found)

    def made(self, stand: Stand) -> OnSplit | None:
        """The run in split coordinates from where it stands; None if it is to stay."""
        found = self._begun(stand)
        if not isinstance(found, OnSplit):
            self._not_made(found)
            return None
        self.told = {"hand_over": "made", "hand_over_log_risk": found.state.log_risk}
        if self.early is not None:
            errors = hand_over_error(found.solver, self.early.state, found.state, self.rtol)
            self.told |= {f"hand_over_error_{name}": error for name, error in errors.items()}
        return found

    def at_start(self, stand: Stand) -> OnSplit:
        """The run in split coordinates from its start, which is no hand-over.

        Raises:
            ValueError: when it cannot be.
        """
        found = self._begun(stand)
        if isinstance(found, OnSplit):
            return found
        raise ValueError(f"The flow cannot be continued on the slow manifold: {found}.")

    def _not_made(self, reason: str) -> None:
        if self.solver is not None:
            self.solver, self.told = None, {"hand_over": f"not made: {reason}"}

    def _begun(self, stand: Stand) -> OnSplit | str:
        """The run in split coordinates from a place, or why it cannot be."""
        if self.solver is None:
            return "the flow stays on its weights"
        weights, scaled_time = stand.state
        reason = self.solver.obstacle(self.problem, weights)
        if reason is not None:
            return reason
        log_risk = float(risk_and_slope(self.problem, weights)[0])
        with np.errstate(divide="ignore"):
            log_time = float(np.log(np.asarray(scaled_time))) - log_risk
        layers = gathered(tuple(weights))
        start = self.problem.network.layers(self.start) or ()
        conserved = tuple(map(np.asarray, imbalance(start)))
        return OnSplit.of(self.solver, self.problem, layers, log_time, conserved, stand.num_steps)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says, beside the states."""
        early = self.early and self.early.facts()
        return {"may": self.solver is not None, "told": self.told, "early": early}

    def restore(self, facts: Mapping[str, Any], read: Callable[[str, Any], Any]) -> None:
        """Be as a checkpoint says; ``read`` gives a state by its name and its shape."""
        self.told = facts["told"]
        if facts["early"] is not None:
            self.early = self.restored("early", facts["early"], read)
        if not facts["may"]:
            self.solver = None

    def restored(
        self, name: str, facts: Mapping[str, Any], read: Callable[[str, Any], Any]
    ) -> OnSplit:
        """The run in split coordinates that a checkpoint holds under a name."""
        assert self.solver is not None
        state = read(name, SplitState.blank(geometry(self.problem), facts))
        return OnSplit.restored(self.solver, state, facts)


def hand_over_error(
    solver: SlowManifold, early: SplitState, late: SplitState, rtol: float
) -> dict[str, float]:
    """How far what follows a hand-over may be off.

    The difference of the two ways of integrating between two states of one flow, and what they
    share: the error of the run on the weights that led to both.

    Args:
        solver: of the split coordinates.
        early: split coordinates begun at a state of that run.
        late: split coordinates begun at a later one.
        rtol: the tolerance of that run.

    Returns:
        For each small quantity at ``late`` a relative error, for the log time an absolute one.
    """
    arrived = solver.advance(early, late.log_risk)
    return {name: math.hypot(e, SHARED * rtol) for name, e in difference(arrived, late).items()}

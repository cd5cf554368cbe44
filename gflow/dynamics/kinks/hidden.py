"""Kinks of a network that gflow does not know: they are stepped over, and the record says so."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from gflow.problem.array import Array
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights


@eqx.filter_jit
def _switches(problem: Problem, weights: Weights) -> Array:
    return jax.vmap(lambda at: problem.network.switches(at, problem.data))(weights)


class Hidden:
    """How often a run is seen on the other side of a kink, at some of its points.

    Args:
        problem: whose network has kinks of this sort.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.last: np.ndarray | None = None
        self.num_switched = 0

    @classmethod
    def of(cls, problem: Problem, weights: Weights) -> "Hidden | None":
        """Those of a run; None for a network without."""
        found = problem.network.hidden_kinks(weights, problem.data)
        return cls(problem) if found else None

    def see(self, weights: Weights, count: int) -> None:
        """Look at the first ``count`` of a block of weights, in the order of the run."""
        for row in np.asarray(_switches(self.problem, weights))[:count]:
            if self.last is not None:
                self.num_switched += int(np.count_nonzero(row != self.last))
            self.last = row

    def facts(self) -> dict[str, Any]:
        """What a record says of them."""
        return {
            "kinks": "stepped over: the network has kinks of which gflow does not know, and its "
            "flow is right to first order in the step at each; clock_error shows what that costs. "
            "gflow.relu, gflow.leaky_relu and gflow.MLP are located",
            "num_switched": self.num_switched,
        }

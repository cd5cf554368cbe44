"""How far a flow goes, told before it begins."""

from collections.abc import Sequence

import numpy as np

from gflow.dynamics.stops import AbstractRule
from gflow.problem.data import labelled
from gflow.problem.risk import Problem, is_small
from gflow.problem.weights import Weights

A_STEP = 12.0
r"""Times $(\gamma/\max_i\lVert x_i\rVert)^2$: how far log R falls in a step of ``diffrax.Dopri8``
that stability limits. Measured for one to six layers, both losses, $\gamma/\max_i\lVert x_i\rVert$
from 0.02 to 0.1 and log R from -5 to -20: 10 to 14."""

FEW_STEPS = 200.0
"""So many cost no more than those of the implicit solver to the same place, whose program takes
longer to compile, where the problem is small. At width 128 they cost twice
as much, at 256 four times."""

PATIENCE = 600
"""Attempts, beside two a saved point, after which a flow that was taken for a near one is left to
the implicit solver. To look at every few steps for stiffness instead would be a third of what is
compiled."""


def is_near(problem: Problem, weights: Weights, rules: Sequence[AbstractRule]) -> bool:
    r"""Whether a flow is over in few explicit steps, since a rule ends it at a risk not far off.

    In the clock $-\log R$ its fastest rate is about $(\max_i\lVert x_i\rVert/\gamma)^2$. Told of
    products of small matrices with one output, on separable data; of others the answer is no.
    """
    levels = [rule.value for rule in rules if rule.of_risk]
    told = {"margins", "one output"} <= problem.data.offers
    if not (levels and told and is_small(problem, weights)):
        return False
    if problem.network.layers(weights) is None:
        return False
    data = labelled(problem.data)
    part = data.max_margin().margin / np.max(np.linalg.norm(data.inputs, axis=1))
    return bool(-max(levels) <= FEW_STEPS * A_STEP * part**2)

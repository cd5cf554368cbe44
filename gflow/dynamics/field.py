r"""The vector field of gradient flow in a clock, with physical time as an extra state.

Physical time overflows, so the state carries $u = tR$ instead. From
$dt/ds = \mu/R$ and $d\log R/ds = -\mu\lVert g\rVert^2$,

$$\frac{dW}{ds} = -\mu\,g, \qquad \frac{du}{ds} = \mu\,(1 - u\lVert g\rVert^2), \qquad
\log t = \log u - \log R,$$

linear in $u$, which relaxes to $1/\lVert g\rVert^2$ and never leaves float64's range.

A field may go down the risk in another direction $h$ (``modified.py``); then $h$ stands in the
place of $g$ and $\langle g, h\rangle$ in that of $\lVert g\rVert^2$, and every clock keeps its
meaning.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gflow.dynamics.clocks import AbstractClock
from gflow.problem.array import Array, total
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.weights import Factors, Weights, squared_norms


class FlowState(NamedTuple):
    """What the solver integrates: all weights, and $u = tR$."""

    weights: Weights
    scaled_time: Array


class AbstractField(Module):
    """A field that lowers the risk of a problem, in a clock."""

    problem: eqx.AbstractVar[Problem]
    clock: eqx.AbstractVar[AbstractClock]

    @abstractmethod
    def direction(self, weights: Weights) -> tuple[Array, Weights, Array]:
        r"""$\log R$, $h$ and $\langle g, h\rangle$, not positive where $h$ does not go down."""

    def __call__(self, s: ArrayLike, state: FlowState, args: Any = None) -> FlowState:
        log_risk, direction, descent = self.direction(state.weights)
        rate = self.clock.rate(jnp.asarray(s), log_risk, descent)
        return FlowState(
            weights=jax.tree.map(lambda h: -rate * h, direction),
            scaled_time=rate * (1 - state.scaled_time * descent),
        )

    def log_time(self, state: FlowState) -> Array:
        r"""$\log t = \log u - \log R$; minus infinity at the start."""
        return jnp.log(state.scaled_time) - self.problem.log_risk(state.weights)

    # What a solver asks for at the stages of a step, without forming their weights: see
    # ``AbstractNetwork.along``.

    @abstractmethod
    def no_vectors(self, weights: Weights) -> Factors:
        """No vectors of weight space, in the form of those that ``along`` takes and gives."""

    @abstractmethod
    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array
    ) -> tuple[Array, Callable[[Array], Factors]]:
        """Coordinates and pullback at ``weights + coefficients[i] @ vectors``."""

    @abstractmethod
    def bent(
        self, weights: Weights, vectors: Factors, coefficients: Array, slopes: Factors
    ) -> tuple[Factors, Array]:
        r"""$-h$ and $\langle g, h\rangle$ at these points, for $-g$ given, a vector a stage.

        Whole vectors where those that are moved along are.
        """

    def velocities(
        self,
        s: Array,
        weights: Weights,
        vectors: Factors,
        coefficients: Array,
        log_risk: Array,
        slopes: Factors,
    ) -> tuple[Factors, Array, Array]:
        r"""$dW/ds$, $\mu$ and $\langle g, h\rangle$ at these points, of $\log R$ and $-g$ there."""
        if vectors.are_whole:
            slopes = slopes.multiplied()
        (lefts, rights), descent = self.bent(weights, vectors, coefficients, slopes)
        rate = self.clock.rate(s, log_risk, descent)
        return Factors(lefts, [rate[:, None, None] * right for right in rights]), rate, descent

    def slope_along(
        self, s: Array, weights: Weights, vectors: Factors, coefficients: Array, scaled_time: Array
    ) -> tuple[Factors, Array]:
        """The field at ``weights + coefficients @ vectors``: a vector's factors, and that of u.

        Args:
            s: the clock there.
            weights, vectors: as for :meth:`along`.
            coefficients: one for each of the J vectors, shape (J,).
            scaled_time: u there.
        """
        problem, row = self.problem, coefficients[None]
        coordinates, pull = self.along(weights, vectors, row)
        log_risk, slopes, _ = problem.loss.terms(problem.spread(coordinates)[0])
        pulled = pull(problem.gather(slopes[None]))
        velocity, (rate,), (descent,) = self.velocities(
            s[None], weights, vectors, row, log_risk[None], pulled
        )
        return jax.tree.map(lambda x: x[0], velocity), rate * (1 - scaled_time * descent)

    @property
    def separates_points(self) -> bool:
        """Whether the field of some of the points is found by leaving out the others."""
        return False

    # What the plan of a run asks for.

    @property
    @abstractmethod
    def dense(self) -> bool:
        """Whether the implicit solver's dense systems cost less than an explicit solver's steps."""

    @abstractmethod
    def faded(self, weights: Weights) -> str | None:
        """None where the field is gradient flow to the last digit, else how it differs."""

    @abstractmethod
    def ended(self, weights: Weights) -> str | None:
        """Why the field has lost its meaning at given weights; None where it has not."""


CANCELLED = 1e-4
"""Part of the squared norms of its terms below which the square of a vector is computed anew."""


def _squares(vectors: Factors) -> Array:
    r"""$\lVert l^\top r\rVert_F^2$ of each vector, over all arrays.

    By Gram matrices, which is less to compute. Near a saddle the terms of a vector cancel, one for
    each contrast of the classes, to a thousandth and less: that has then lost the square of it, and
    the terms are added first.
    """
    pairs = list(zip(*vectors, strict=True))
    found = total(squared_norms(left, right) for left, right in pairs)
    if pairs[0][0].shape[1] == 1:
        return found
    terms = total(jnp.sum(left**2, (1, 2)) * jnp.sum(right**2, (1, 2)) for left, right in pairs)

    def added_first() -> Array:
        return total(jnp.sum((left.mT @ right) ** 2, (1, 2)) for left, right in pairs)

    return jax.lax.cond(jnp.any(found < CANCELLED * terms), added_first, lambda: found)


SMALL_SYSTEM = 64
"""Up to so many coordinates the implicit solver's dense systems cost less than an explicit
solver's extra evaluations, and one compilation serves the whole run."""


CLASS_SYSTEM = 150
"""The same of several classes, whose margins are K - 1 times as many: ten classes in ten features,
90 coordinates, four layers, to log R = -1e6: 0.24 s against 4.5."""


class FlowField(AbstractField):
    """The field of gradient flow: ``diffrax.ODETerm(FlowField(problem, clock))`` is its term.

    A solver that exploits the problem's structure finds it here, as ``terms.vector_field``.
    """

    problem: Problem
    clock: AbstractClock

    def direction(self, weights: Weights) -> tuple[Array, Weights, Array]:
        return self.problem.log_risk_gradient_and_norm(weights)

    def no_vectors(self, weights: Weights) -> Factors:
        return self.problem.network.no_vectors(weights)

    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array
    ) -> tuple[Array, Callable[[Array], Factors]]:
        return self.problem.network.along(weights, vectors, coefficients, self.problem.data)

    def bent(
        self, weights: Weights, vectors: Factors, coefficients: Array, slopes: Factors
    ) -> tuple[Factors, Array]:
        return slopes, _squares(slopes)

    @property
    def separates_points(self) -> bool:
        return True

    @property
    def dense(self) -> bool:
        several = self.problem.data.num_classes is not None
        return self.problem.num_coordinates <= (CLASS_SYSTEM if several else SMALL_SYSTEM)

    def faded(self, weights: Weights) -> None:
        return None

    def ended(self, weights: Weights) -> None:
        return None

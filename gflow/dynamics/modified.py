r"""Modified equations: flows that gradient descent follows more closely than gradient flow.

Descent $W \leftarrow W - \eta\nabla R(W)$ is Euler's method for $\dot W = f(W)$, $f = -\nabla R$,
and backward error analysis says which flow it follows instead:

$$\dot W = f - \frac\eta2 f'f
+ \eta^2\Bigl(\frac1{12} f''(f, f) + \frac13 f'f'f\Bigr) + O(\eta^3).$$

Up to a given time descent is $O(\eta)$ from the flow of $f$, $O(\eta^2)$ from that of the first
two terms, which is gradient flow of $R + \frac\eta4\lVert\nabla R\rVert^2$, and $O(\eta^3)$ from
that of all of them.

**In the log domain** neither $R$ nor $\nabla R$ may be formed. With $g = \nabla\log R$ at the point
of evaluation $W_0$ and $\psi(W) = \nabla R(W)/R(W_0)$,

$$\dot W = -R\,h, \qquad h = g + \frac\varepsilon2\,\psi'g
+ \varepsilon^2\Bigl(\frac1{12}\psi''(g, g) + \frac13\psi'\psi'g\Bigr), \qquad
\varepsilon = \eta R,$$

where $\psi(W_0) = g$: wherever $\varepsilon$ underflows the modified flow is gradient flow. With
$\langle g, h\rangle$ in the place of $\lVert g\rVert^2$, $d\log R/ds = -\mu\langle g, h\rangle$ and
every clock keeps its meaning.

Hairer, Lubich and Wanner, *Geometric Numerical Integration* (2006), IX.1; Barrett and Dherin,
*Implicit gradient regularization* (2021).
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.field import AbstractField
from gflow.problem.arguments import is_number, shown
from gflow.problem.array import Array, as_array
from gflow.problem.curvature import Slope, relative_gradient
from gflow.problem.module import Module
from gflow.problem.network import AbstractNetwork
from gflow.problem.risk import Problem, risk_and_slope
from gflow.problem.weights import Factors, Weights, in_rows, inner_product, move, squared_norm

ORDERS = (1, 2)

ENDS = 1e-2
"""A modified field that lowers the risk by less than this part of what the plain one does has come
to the end of its meaning: the terms of the expansion cancel."""


class ModifiedEquation(Module):
    r"""The modified equation of descent with learning rate $\eta$ = ``step``.

    For ``gradient_flow(..., modified=ModifiedEquation(0.1))``. The expansion means something as
    long as $\eta$ times the largest curvature is well below two.

    Args:
        step: the learning rate $\eta > 0$ of the descent that is followed.
        order: the highest power of $\eta$ kept. 1: $f - \frac\eta2 f'f$, gradient flow of
            $R + \frac\eta4\lVert\nabla R\rVert^2$; 2: also
            $\eta^2(\frac1{12}f''(f, f) + \frac13 f'f'f)$.

    Raises:
        ValueError: when the step is not positive and finite, or the order neither 1 nor 2.

    >>> ModifiedEquation(0.1)
    ModifiedEquation(step=0.1, order=1)
    """

    step: float
    order: int = eqx.field(static=True)

    def __init__(self, step: float, order: int = 1):
        if not (is_number(step) and 0 < step < math.inf):
            raise ValueError(
                f"`step` is {shown(step)}; expected a positive finite number, the learning rate of "
                "the descent to follow. Without `modified` the flow is that of descent's limit."
            )
        if order not in ORDERS:
            raise ValueError(
                f"`order` is {order!r}; expected 1 or 2, the highest power of the step that the "
                "modified equation keeps."
            )
        self.step, self.order = float(step), int(order)


class ModifiedField(AbstractField):
    r"""The field of a modified equation: $h$ in the place of $g$."""

    problem: Problem
    clock: AbstractClock
    step: Array
    order: int = eqx.field(static=True)

    def __init__(self, problem: Problem, clock: AbstractClock, equation: ModifiedEquation):
        self.problem, self.clock, self.order = problem, clock, equation.order
        # An array, so that another learning rate is not another program to compile.
        self.step = as_array(np.asarray(equation.step))

    def direction(self, weights: Weights) -> tuple[Array, Weights, Array]:
        r"""$\log R$, $h$ and $\langle g, h\rangle$; NaN for the last where it is not positive."""
        slope = self.problem.log_risk_gradient_and_norm
        log_risk, g, added = correction(slope, weights, self.step, self.order)
        h = jax.tree.map(jnp.add, g, added)
        return log_risk, h, still_falling(inner_product(g, h))

    # What is added to g is no outer product, and needs the weights themselves: the vectors of a
    # step are whole, as those of any network.

    def no_vectors(self, weights: Weights) -> Factors:
        return AbstractNetwork.no_vectors(self.problem.network, weights)

    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array
    ) -> tuple[Array, Callable[[Array], Factors]]:
        return self.problem.network.along(weights, vectors, coefficients, self.problem.data)

    def bent(
        self, weights: Weights, vectors: Factors, coefficients: Array, slopes: Factors
    ) -> tuple[Factors, Array]:
        def added(row: Array) -> Weights:
            slope = self.problem.log_risk_gradient_and_norm
            at = move(weights, vectors, row)
            return correction(slope, at, self.step, self.order)[2]

        (right,), more = slopes.rights, in_rows(jax.vmap(added)(coefficients))
        bent = right - more[:, None]
        return Factors(slopes.lefts, [bent]), still_falling(jnp.sum(right * bent, (1, 2)))

    @property
    def dense(self) -> bool:
        """False: what the equation adds makes the implicit solver slow to compile."""
        return False

    def faded(self, weights: Weights) -> str | None:
        part = float(_part_added(self, weights))
        return None if part <= np.finfo(float).eps else f"`modified` still adds {part:.2g} of it"

    def ended(self, weights: Weights) -> str | None:
        log_risk, plain = risk_and_slope(self.problem, weights)
        if float(_descent(self, weights)) > ENDS * float(plain):
            return None
        return (
            f"at log R = {float(log_risk):.6g} the modified equation of step {float(self.step):g} "
            f"and order {self.order} ceases to lower the risk: its step is too large for the "
            "expansion to say anything about descent from there on; take a smaller one"
        )


def still_falling(descent: Array) -> Array:
    r"""$\langle g, h\rangle$, NaN where it is not positive.

    Where the risk no longer falls the expansion has lost its meaning, and a clock that follows the
    risk would turn round: the run is to stop there.
    """
    return jnp.where(descent > 0, descent, jnp.nan)


def correction(
    slope: Slope,
    weights: Weights,
    step: Array,
    order: int,
) -> tuple[Array, Weights, Weights]:
    r"""$\log R$, $g$ and $h - g$, with the direction $h$ of the module's second equation.

    Args:
        slope: $\log R$, $\nabla\log R$ and its squared norm at given weights, as
            ``Problem.log_risk_gradient_and_norm``.
        weights: where.
        step: the learning rate $\eta$.
        order: 1 or 2.

    At margin 0 the derivatives of the exponential loss are 1, -1, 1: h = -(1 + 0.1/2).

    >>> import gflow
    >>> problem = gflow.Problem(gflow.Dataset([[1.0]], [1]), loss=gflow.Exponential())
    >>> slope = problem.log_risk_gradient_and_norm
    >>> _, (g,), (added,) = correction(slope, (jnp.zeros((1, 1)),), jnp.asarray(0.1), 1)
    >>> float(g[0, 0]), round(float(added[0, 0]), 6)
    (-1.0, -0.05)
    """
    log_risk, g, _ = slope(weights)
    psi = relative_gradient(slope, log_risk)

    def along(direction: Weights, at: Weights) -> Weights:
        return jax.jvp(psi, (at,), (direction,))[1]

    epsilon = step * jnp.exp(log_risk)
    if order == 1:
        return log_risk, g, jax.tree.map(lambda a: epsilon / 2 * a, along(g, weights))
    first, second = jax.jvp(lambda at: along(g, at), (weights,), (g,))
    added = jax.tree.map(
        lambda a, b, c: epsilon * (a / 2 + epsilon * (b / 12 + c / 3)),
        first,
        second,
        along(first, weights),
    )
    return log_risk, g, added


def modified_field(
    problem: Problem, clock: AbstractClock, equation: ModifiedEquation, weights: Weights
) -> ModifiedField:
    """The modified field, which must lower the risk at the start.

    Raises:
        ValueError: when it does not.
    """
    field = ModifiedField(problem, clock, equation)
    if not float(_descent(field, weights)) > 0:
        raise ValueError(
            f"`modified` has step {equation.step}; at the start the modified equation of order "
            f"{equation.order} does not lower the risk, so that it says nothing about descent. "
            "Expected a step well below two over the largest curvature: take a smaller one."
        )
    return field


@eqx.filter_jit
def _descent(field: ModifiedField, weights: Weights) -> Array:
    return field.direction(weights)[2]


@eqx.filter_jit
def _part_added(field: ModifiedField, weights: Weights) -> Array:
    slope = field.problem.log_risk_gradient_and_norm
    _, g, added = correction(slope, weights, field.step, field.order)
    return jnp.sqrt(squared_norm(added) / squared_norm(g))

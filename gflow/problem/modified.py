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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.curvature import Slope, relative_gradient
from gflow.problem.network import Array, Weights, inner_product, squared_norm
from gflow.problem.risk import Problem, risk_and_slope

ORDERS = (1, 2)

ENDS = 1e-2
"""A modified field that lowers the risk by less than this part of what the plain one does has come
to the end of its meaning: the terms of the expansion cancel."""


class ModifiedEquation(eqx.Module):
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
        if not (math.isfinite(step) and step > 0):
            raise ValueError(
                f"`step` is {step}; expected a positive finite number, the learning rate of the "
                "descent to follow. Without `modified` the flow is that of descent's limit."
            )
        if order not in ORDERS:
            raise ValueError(
                f"`order` is {order!r}; expected 1 or 2, the highest power of the step that the "
                "modified equation keeps."
            )
        self.step, self.order = float(step), int(order)


class ModifiedProblem(Problem):
    r"""A problem with $h$ and $\langle g, h\rangle$ in the place of $g$ and $\lVert g\rVert^2$.

    All that a clock and the field of a flow need; everything else is the problem's own.
    """

    step: Array
    order: int = eqx.field(static=True)

    def __init__(self, problem: Problem, equation: ModifiedEquation):
        self.data, self.network = problem.data, problem.network
        self.loss, self.design = problem.loss, problem.design
        # An array, so that another learning rate is not another program to compile.
        self.step = np.asarray(equation.step)  # pyright: ignore
        self.order = equation.order

    def log_risk_gradient_and_norm(self, weights: Weights) -> tuple[Array, Weights, Array]:
        r"""$\log R$, $h$ and $\langle g, h\rangle$; NaN for the last where it is not positive."""
        slope = super().log_risk_gradient_and_norm
        log_risk, g, added = correction(slope, weights, self.step, self.order)
        h = jax.tree.map(jnp.add, g, added)
        return log_risk, h, still_falling(inner_product(g, h))

    @property
    def outer(self) -> bool:
        """False: what is added to $g$ is no outer product."""
        return False

    def correction(self, weights: Weights) -> Weights:
        """$h - g$."""
        slope = super().log_risk_gradient_and_norm
        return correction(slope, weights, self.step, self.order)[2]


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


def modify(problem: Problem, weights: Weights, equation: ModifiedEquation) -> ModifiedProblem:
    """The problem with the modified field, which must lower the risk at the start.

    Raises:
        ValueError: when it does not.
    """
    modified = ModifiedProblem(problem, equation)
    if not float(risk_and_slope(modified, weights)[1]) > 0:
        raise ValueError(
            f"`modified` has step {equation.step}; at the start the modified equation of order "
            f"{equation.order} does not lower the risk, so that it says nothing about descent. "
            "Expected a step well below two over the largest curvature: take a smaller one."
        )
    return modified


def expect_faded(modified: ModifiedProblem, weights: Weights) -> None:
    """Refuse a start where the modified flow still differs from the plain one.

    Raises:
        ValueError: when what is added to the field is not below round-off.
    """
    part = float(_part_added(modified, weights))
    if part > np.finfo(float).eps:
        raise ValueError(
            "`solver` is SlowManifold, whose coordinates are those of the plain flow; at the start "
            f"`modified` still adds {part:.2g} of the field to it. Leave `solver` out: the default "
            "goes on in these coordinates from where nothing is added."
        )


@eqx.filter_jit
def _part_added(modified: ModifiedProblem, weights: Weights) -> Array:
    _, g, _ = Problem.log_risk_gradient_and_norm(modified, weights)
    return jnp.sqrt(squared_norm(modified.correction(weights)) / squared_norm(g))


def why_stopped(
    problem: Problem, modified: ModifiedProblem, weights: Weights
) -> tuple[str, str] | None:
    """The status and message of a run that came to the end of the modified equation's meaning.

    Args:
        problem: the plain problem.
        modified: the same, with the modified field.
        weights: where the run stopped.

    Returns:
        None where the modified field still lowers the risk, so that the run has another reason.
    """
    log_risk, plain = risk_and_slope(problem, weights)
    _, descent = risk_and_slope(modified, weights)
    if float(descent) > ENDS * float(plain):
        return None
    return "stalled", (
        f"at log R = {float(log_risk):.6g} the modified equation of step {float(modified.step):g} "
        f"and order {modified.order} ceases to lower the risk: its step is too large for the "
        "expansion to say anything about descent from there on; take a smaller one"
    )

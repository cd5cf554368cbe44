r"""The implicit solver that makes the cost of a flow nearly independent of its horizon.

.. math::
    \frac{dW}{ds} = \mu\,G^\top A^\top s(q), \qquad q = A\,c(W), \quad
    G = \frac{\partial c}{\partial W}, \quad s_i(q) = \frac{-\ell'(q_i)}{\sum_j\ell(q_j)}

**What is stiff.** W and G are smooth in the clock, but the slopes s, a softmax of margins of size
:math:`-\log R`, react to relative changes of W as small as :math:`1/\log R`. That part of the
Jacobian is :math:`-\mu\,G^\top A^\top H A\,G`, of rank at most m, the number of coordinates c, with

.. math::
    H = \operatorname{diag}(\ell''_i/\textstyle\sum_j\ell_j)
        - s s^\top \text{ if the clock follows the risk, without } s s^\top \text{ if it is time.}

Its limit is a differential-algebraic equation of index 2: the slopes become the multipliers that
keep the margins of the support vectors together.

**The method.** Radau IIA collocation, which is made for this limit: with the derivatives
:math:`K_j = \mu_j G_j^\top A^\top s_j` at p nodes, :math:`W_i = W_0 + h\sum_j a_{ij}K_j`; the last
stage is the new point. Its order 2p - 1 (9 by default) survives there, while diagonally implicit
methods fall back to two or three.

**The lifted Newton iteration.** At margins that are off by 100 the softmax is one-hot and Newton's
method is lost, and margins of size 1e6 are off by 100 as soon as W is off by 1e-4. So the *offsets*
:math:`\theta_j`, margins up to a common level, are unknowns beside :math:`K_j`: slopes and H are
taken at :math:`\theta_j`, and the gap :math:`e_j = q(W_j) - \theta_j - \text{level}_j` is one more
residual, which enters linearly. With :math:`r_j = \mu_jG_j^\top A^\top s_j - K_j` and
:math:`y_i = G_i h\sum_j a_{ij}\,\delta K_j` a Newton step reads

.. math::
    \delta K_j = r_j - G_j^\top z_j, \qquad \delta\theta_j = e_j + A y_j, \qquad
    z_j = \mu_j A^\top H_j (e_j + A y_j), \\
    y_i + h\sum_j a_{ij}\,G_i G_j^\top\,\mu_j A^\top H_j A\, y_j
        = h\sum_j a_{ij}\,(G_i r_j - G_i G_j^\top\,\mu_j A^\top H_j e_j),

a system of order pm: Woodbury's identity for :math:`I + (ha_{ij}\mu_j G_i^\top A^\top H_j A G_j)`.
Here :math:`G_i` only matters for the speed of convergence and is taken as :math:`\varphi_i G_0`,
where :math:`\varphi_i^2 = \lVert G_i^\top A^\top s_i\rVert^2/\lVert G_0^\top A^\top s_i\rVert^2`.
It converges equally fast at every risk. No margins are subtracted in the softmax, and the rounding
errors of margins, of size :math:`10^{-16}\log R`, are damped by :math:`1/(h\log R)` as every gap
is: float64 does not end near :math:`\log R = -10^{10}`, where it does for the softmax of margins.

**What it costs.** The pullback of a deep linear network is an outer product in every layer. The
:math:`K_j` are kept as these factors, stage weights are never formed, and all stages pass through
:math:`W_0` together: an iteration reads the weights twice, for any number of stages. Any other
network goes the same way with per-example gradients for G.

**Scaled time** is linear, :math:`u' = \mu(1 - u\lVert g\rVert^2)`, once the stages are known.

**The error estimate** is the last Legendre coefficient of the derivative on the step, extrapolated
by the observed rate of decay to the order of the end point, its stiff part damped as the flow does.
A point that enters the support inside a step leaves a kink there that coefficients can miss; the
balance :math:`\Delta\log R = -\int\mu\lVert g\rVert^2 ds` does not, so ten times its defect
counts as an error too.

Hairer and Wanner, *Solving Ordinary Differential Equations II* (1996), IV.5, IV.8 and VII.4;
Albersmeyer and Diehl, *The lifted Newton method*, SIAM J. Optim. 20 (2010).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import gmres

from gflow.dynamics.field import FlowField, FlowState
from gflow.dynamics.radau import decay_rate, legendre_values, radau
from gflow.dynamics.stages import (
    Collocation,
    Factors,
    Frame,
    Stage,
    advance,
    evaluate_stage,
    move,
    no_vectors,
    shaped,
    start_frame,
)
from gflow.problem.network import Array, Weights

DIRECT = 100
"""Up to this order the linear system is solved as it is; beyond, the stages share a Jacobian."""


class SolverState(NamedTuple):
    """What a step hands to the next: the predictor's data, and counts since the start."""

    step: Array
    derivatives: Factors
    offsets: Array
    """Margins up to a common level, shape (stages, points)."""
    num_iterations: Array
    num_evaluations: Array
    """Of the field, one for each stage in each iteration."""
    newton_error: Array
    """Of the last step, relative to the weights: the precision reached."""


class Iterate(NamedTuple):
    """A Newton iterate: stage weights are :math:`W_0` + ``coefficients`` @ ``derivatives``."""

    count: Array
    coefficients: Array
    derivatives: Factors
    projection: Array
    offsets: Array
    size: Array
    contraction: Array
    stiffness: Array
    """The last stage's :math:`\\varphi^2\\mu A^\\top H A`, shape (m, m)."""


class GaussNewton(diffrax.AbstractAdaptiveSolver):
    """Radau IIA with a matrix-free Newton iteration made for gradient flow.

    For ``gradient_flow(..., solver=GaussNewton())``, or for ``diffrax.diffeqsolve`` with the term
    ``ODETerm(FlowField(problem, clock))`` and a ``FlowState``: problem and clock are read there.
    Works for all clocks, losses and networks, under ``vmap``, ``jvp`` and ``grad``.

    Args:
        stages: the number p >= 3 of stages; the order is 2p - 1.
        tolerance: error of the Newton iteration, relative to each layer, at which a step counts as
            solved. Far below the step tolerance: what is lost here, the conserved matrices lose.
        max_iterations: a step that needs more is rejected.
    """

    stages: int = eqx.field(static=True, default=5)
    tolerance: float = eqx.field(static=True, default=1e-12)
    max_iterations: int = eqx.field(static=True, default=12)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = Collocation

    def order(self, terms: Any) -> int:
        return 2 * self.stages - 1

    def error_order(self, terms: Any) -> float:
        return 2.0 * self.stages - 1.0

    def func(self, terms: Any, t0: Any, y0: FlowState, args: Any) -> FlowState:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: FlowState, args: Any) -> SolverState:
        field = _flow_field(terms)
        offsets = field.problem.margins(y0.weights)
        offsets = eqx.error_if(
            offsets - jnp.min(offsets),
            getattr(terms, "direction", 1) < 0,
            "`GaussNewton` was asked to integrate backwards; expected `t1` larger than `t0`.",
        )
        at_rest = no_vectors(field.problem, y0.weights)
        start = evaluate_stage(field, y0.weights, at_rest, t0, offsets[:0], offsets)
        repeat = lambda x: jnp.broadcast_to(x, (self.stages, *x.shape))  # noqa: E731
        return SolverState(
            step=t1 - t0,
            derivatives=jax.tree.map(repeat, start.derivative),
            offsets=repeat(offsets),
            num_iterations=jnp.zeros((), int),
            num_evaluations=jnp.ones((), int),
            newton_error=jnp.zeros_like(start.rate),
        )

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: FlowState,
        args: Any,
        solver_state: SolverState,
        made_jump: Any,
    ) -> tuple[FlowState, FlowState, dict, SolverState, diffrax.RESULTS]:
        field = _flow_field(terms)
        p, tableau, h = self.stages, radau(self.stages), t1 - t0
        matrix = h * tableau.matrix

        (derivatives, offsets), (count, newton_error, log_risk, error) = _solve_stages(
            self, field, y0.weights, t0, h, solver_state
        )
        stage = _evaluate(p, field, y0.weights, t0, h)(matrix, derivatives, offsets)
        decay = stage.rate * stage.squared_norm
        u = jnp.linalg.solve(
            jnp.eye(p) + matrix * decay[None, :], y0.scaled_time + matrix @ stage.rate
        )
        time_slopes = np.linalg.inv(tableau.matrix) @ (u - y0.scaled_time) / h
        *_, third, second, final = jnp.abs(tableau.legendre @ time_slopes)
        tail = h * final * decay_rate(final, second, third) ** (p - 1)
        balance = stage.log_risk[-1] - log_risk + matrix[-1] @ decay
        time_error = jnp.maximum(
            tail / (1 + h * tableau.damping * decay[-1]),
            10 * jnp.abs(u[-1] * balance) / jnp.hypot(1.0, log_risk),
        )

        failed = ~(newton_error < 100 * self.tolerance)
        y1 = FlowState(move(y0.weights, derivatives, matrix[-1]), u[-1])
        y1 = jax.tree.map(lambda new, old: jnp.where(failed, old, new), y1, y0)
        error = FlowState(shaped(error, y0.weights), jax.lax.stop_gradient(time_error))
        error = jax.tree.map(lambda e: jnp.where(failed, jnp.inf, e), error)
        state = SolverState(
            step=h,
            derivatives=derivatives,
            offsets=offsets,
            num_iterations=solver_state.num_iterations + count,
            num_evaluations=solver_state.num_evaluations + p * (count + 1),
            newton_error=newton_error,
        )
        dense = {"state": y0, "derivatives": derivatives, "time_slopes": time_slopes}
        return y1, error, dense, state, diffrax.RESULTS.successful

    def _newton(
        self,
        field: FlowField,
        evaluate: Callable[[Array, Factors, Array], Stage],
        frame: Frame,
        before: SolverState,
        h: Array,
    ) -> Iterate:
        """The derivatives and offsets at the stages, by the iteration derived above."""
        p, m, tableau, design = self.stages, frame.gram.shape[0], radau(self.stages), frame.design
        matrix, loss, direct = h * tableau.matrix, field.problem.loss, p * m <= DIRECT

        # Predictor: the polynomial of the previous step, followed for at most three of its steps.
        ahead = 1 + jnp.minimum(h / before.step, 3.0) * tableau.nodes
        extrapolate = legendre_values(ahead, p).T @ tableau.legendre
        latest = before.offsets[-1:]
        offsets, _ = advance(loss, latest, extrapolate @ before.offsets - latest)
        start = Iterate(
            count=jnp.zeros((), int),
            coefficients=matrix @ extrapolate,
            derivatives=before.derivatives,
            projection=extrapolate @ frame.project(before.derivatives),
            offsets=offsets,
            size=jnp.full_like(h, jnp.inf),
            contraction=jnp.ones_like(h),
            stiffness=jnp.zeros_like(frame.gram),
        )

        def iterate(now: Iterate) -> Iterate:
            stage = evaluate(now.coefficients, now.derivatives, now.offsets)
            mu, slopes, curvatures = stage.rate[:, None], stage.slopes, stage.curvatures

            def pull(v: Array) -> Array:
                return v if design is None else v @ design

            force, gap = pull(slopes), stage.gap
            growth = stage.squared_norm / jnp.sum(force @ frame.gram * force, 1)
            growth = jnp.sqrt(growth)[:, None]
            if not direct:
                # The Jacobian of the stage in the middle for all, up to G_j's factor.
                mu = (growth[p // 2][None] / growth) ** 2 * mu[p // 2][None]
                slopes, curvatures, force = (
                    jnp.broadcast_to(x[p // 2][None], x.shape) for x in (slopes, curvatures, force)
                )

            # mu A^T H A and mu A^T H e.
            pulled = mu * pull(curvatures * gap)
            if design is None:
                stiff = jax.vmap(jnp.diag)(mu * curvatures)
            else:
                weighted = (mu * curvatures)[:, :, None] * design[None]
                stiff = jnp.einsum("na,jnb->jab", design, weighted)
            if field.clock.centred:
                pulled = pulled - mu * force * jnp.sum(slopes * gap, 1, keepdims=True)
                stiff = stiff - mu[:, :, None] * force[:, :, None] * force[:, None, :]

            # y / growth solves the system.
            change = frame.project(stage.derivative) - now.projection
            rhs = matrix @ (change - growth * pulled @ frame.gram)
            blocks = jnp.einsum("ac,jcb->jab", frame.gram, growth[:, :, None] ** 2 * stiff)
            if direct:
                system = matrix[:, None, :, None] * blocks.transpose(1, 0, 2)[None]
                system = jnp.eye(p * m) + system.reshape(p * m, p * m)
                y = growth * jnp.linalg.solve(system, rhs.reshape(p * m)).reshape(p, m)
            else:
                y = growth * tableau.solve(h * blocks[0], rhs)
            z = pulled + jnp.einsum("jab,jb->ja", stiff, y)
            rights = [
                right - growth * _ratio(jnp.linalg.norm(a), _norms(left))[:, None] * (z @ b)
                for left, right, a, b in zip(
                    *stage.derivative, frame.lefts, frame.columns, strict=True
                )
            ]
            derivatives = Factors(stage.derivative.lefts, rights)
            shift = gap + (y if design is None else y @ design.T)
            shift = shift - jnp.sum(jax.nn.softmax(-now.offsets) * shift, 1, keepdims=True)
            offsets, held = advance(loss, now.offsets, shift)

            # Solved when the correction of K is small, and that of the slopes too up to a square.
            sizes = [
                (_norms(l1 - l0) * _norms(r1) + _norms(l0) * _norms(r1 - r0)).max()
                / (w + h * (_norms(l1) * _norms(r1)).max())
                for l0, r0, l1, r1, w in zip(
                    *now.derivatives, *derivatives, frame.sizes, strict=True
                )
            ]
            size = h * jnp.max(jnp.stack(sizes))
            moving = jnp.max(jnp.sum(stage.curvatures * jnp.abs(shift), 1)) > 1e-6
            size = jnp.where(
                jnp.any(held) | moving | (now.count == 0), jnp.maximum(size, 1.0), size
            )
            return Iterate(
                count=now.count + 1,
                coefficients=matrix,
                derivatives=derivatives,
                projection=frame.project(derivatives),
                offsets=offsets,
                size=size,
                contraction=jnp.where(now.size < 1, size / now.size, 1.0),
                stiffness=growth[-1, 0] ** 2 * stiff[-1],
            )

        def unfinished(now: Iterate) -> Array:
            solved = remaining(now.size, now.contraction) < self.tolerance
            stagnant = (now.contraction > 0.5) & (now.size < 100 * self.tolerance)
            spent = jnp.isnan(now.size) | (now.count >= self.max_iterations)
            return (now.count < 2) | ~(solved | stagnant | spent)

        return jax.lax.while_loop(unfinished, iterate, start)

    def _error(self, frame: Frame, last: Iterate, h: Array) -> list[Array]:
        """The weights' error: last Legendre coefficient, times its decay, stiff part damped."""
        tableau = radau(self.stages)
        tail = tableau.legendre[-3:]
        squares = sum(
            jnp.einsum("ka,ab,kb->k", tail, (left @ left.T) * (right @ right.T), tail)
            / (w + h * (_norms(left) * _norms(right)).max()) ** 2
            for left, right, w in zip(*last.derivatives, frame.sizes, strict=True)
        )
        third, second, final = jnp.sqrt(jnp.abs(squares))
        damping = h * tableau.damping
        stiff = jnp.eye(frame.gram.shape[0]) + damping * last.stiffness @ frame.gram
        z = damping * jnp.linalg.solve(stiff, last.stiffness @ (tail[-1] @ last.projection))
        scale = h * decay_rate(final, second, third) ** (self.stages - 1)
        return [
            scale * ((tail[-1][:, None] * left).T @ right - jnp.outer(a, z @ b))
            for left, right, a, b in zip(*last.derivatives, frame.lefts, frame.columns, strict=True)
        ]


def _evaluate(
    p: int, field: FlowField, weights: Weights, t0: Array, h: Array
) -> Callable[[Array, Factors, Array], Stage]:
    """The field at all stages of a step, as a function of the unknowns."""

    def evaluate(coefficients: Array, derivatives: Factors, offsets: Array) -> Stage:
        at = lambda t, c, o: evaluate_stage(field, weights, derivatives, t, c, o)  # noqa: E731
        return jax.vmap(at)(t0 + h * radau(p).nodes, coefficients, offsets)

    return evaluate


# Derivatives of the solution follow from the equations by the implicit function theorem, however
# it is found; their tracing, which takes as long as the rest, is left until they are asked for.
@eqx.filter_custom_jvp
def _solve_stages(
    solver: GaussNewton,
    field: FlowField,
    weights: Weights,
    t0: Array,
    h: Array,
    before: SolverState,
) -> tuple[tuple[Factors, Array], tuple[Array, Array, Array, list[Array]]]:
    """Derivatives and offsets at the stages; Newton's count and error, log R, the step's error."""
    frame = start_frame(field.problem, weights)
    last = solver._newton(field, _evaluate(solver.stages, field, weights, t0, h), frame, before, h)
    error = solver._error(frame, last, h)
    left = remaining(last.size, last.contraction)
    return (last.derivatives, last.offsets), (last.count, left, frame.log_risk, error)


@_solve_stages.def_jvp
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple:
    solution, rest = _solve_stages(*primals)

    def residual(unknown: tuple, *at: Any) -> tuple[Factors, Array]:
        solver, field, weights, t0, h, _ = at
        derivatives, offsets = unknown
        matrix = h * radau(solver.stages).matrix
        stage = _evaluate(solver.stages, field, weights, t0, h)(matrix, derivatives, offsets)
        weight = jax.lax.stop_gradient(jax.nn.softmax(-offsets))
        margins = stage.gap + offsets
        margins = margins - jnp.sum(weight * margins, axis=1, keepdims=True)
        return jax.tree.map(jnp.subtract, unknown, (stage.derivative, margins))

    def linear(change: tuple) -> tuple:
        return jax.jvp(lambda unknown: residual(unknown, *primals), (solution,), (change,))[1]

    value, moved = eqx.filter_jvp(lambda *at: residual(solution, *at), primals, tangents)
    rhs = jax.tree.map(
        lambda change, x: jnp.zeros_like(x) if change is None else -change,
        moved,
        value,
        is_leaf=lambda change: change is None,
    )
    change = _solve_linear(linear, rhs)
    still = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, rest)
    return (solution, rest), (change, still)


def remaining(size: Array, contraction: Array) -> Array:
    """The error left after a correction of a size, from the rate at which corrections shrink."""
    return size * jnp.minimum(contraction / (1 - jnp.minimum(contraction, 0.5)), 1.0)


def _solve_linear(linear: Callable, rhs: Any) -> Any:
    """The root's derivative, from the linearised equations."""
    flat, unravel = ravel_pytree(rhs)
    matvec = lambda v: ravel_pytree(linear(unravel(v)))[0]  # noqa: E731
    solve = lambda apply, b: gmres(apply, b, tol=1e-11, restart=100, maxiter=10)[0]  # noqa: E731
    return unravel(jax.lax.custom_linear_solve(matvec, flat, solve, transpose_solve=solve))


def _norms(rows: Array) -> Array:
    return jnp.sqrt(jnp.sum(rows**2, axis=-1))


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``, zero where b is."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _flow_field(terms: Any) -> FlowField:
    terms = getattr(terms, "term", terms)  # diffeqsolve wraps it, to integrate backwards
    field = getattr(terms, "vector_field", None)
    if not isinstance(field, FlowField):
        raise ValueError(
            f"`GaussNewton` got the vector field {field!r}; expected a `FlowField`, from which it "
            "reads problem and clock: diffrax.ODETerm(FlowField(problem, clock))."
        )
    return field

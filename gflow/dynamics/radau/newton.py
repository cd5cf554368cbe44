r"""A step of Radau IIA collocation along a gradient flow, for one member.

.. math::
    \frac{dW}{ds} = \mu\,G^\top A^\top s(q), \qquad q = A\,c(W), \quad
    G = \frac{\partial c}{\partial W}, \quad s = -\nabla_q\log R(q)

**What is stiff.** W and G are smooth in the clock, but the slopes s, a softmax of margins of size
:math:`-\log R`, react to relative changes of W as small as :math:`1/\log R`. That part of the
Jacobian is :math:`-\mu\,G^\top A^\top H A\,G`, of rank at most m, the number of coordinates c, with

.. math::
    H = \nabla_q^2 R/R - s s^\top \text{ if the clock follows the risk, without } s s^\top
    \text{ if it is time.}

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

**A quadratic risk** (square loss) has no level: the offsets are the margins. Its slopes times R are
linear, so that a correction is exact but for G, and :math:`H` is taken as it is in every clock:
what a clock of risk adds to the Jacobian is not small, but smooth, and less :math:`s s^\top` the
matrix would be indefinite.

**What it costs.** The pullback of a deep linear network is an outer product in every layer, with K
outputs a sum of K - 1 of them. The :math:`K_j` are kept as these factors, stage weights are never
formed, and all stages pass through :math:`W_0` together: an iteration reads the weights twice, for
any number of stages. Any other network goes the same way with whole arrays for vectors.

**Scaled time** is linear, :math:`u' = \mu(1 - u\lVert g\rVert^2)`, once the stages are known.

**The error estimate** is the last Legendre coefficient of the derivative on the step, extrapolated
by the observed rate of decay to the order of the end point, its stiff part damped as the flow does.
A point that enters the support inside a step leaves a kink there that coefficients can miss; the
balance :math:`\Delta\log R = -\int\mu\lVert g\rVert^2 ds` does not, so ten times its defect
counts as an error too.

**Shapes.** p stages, n margins, J vectors of weight space of rank q, m = q·d coordinates: a matrix
of q rows, of which there is one for one output; everything is of one member. An ensemble maps these
functions over a leading axis; the one thing made for that is the solution of small systems
(``batching.py``).

Hairer and Wanner, *Solving Ordinary Differential Equations II* (1996), IV.5, IV.8 and VII.4;
Albersmeyer and Diehl, *The lifted Newton method*, SIAM J. Optim. 20 (2010).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.radau.batching import solve, solve_differentiably
from gflow.dynamics.radau.spectral import LARGE, SINGLE, Systems
from gflow.dynamics.radau.tableau import decay_rate, legendre_values, radau
from gflow.problem.array import Array
from gflow.problem.design import AbstractDesign
from gflow.problem.risk import Problem
from gflow.problem.terms import AbstractCurvature
from gflow.problem.weights import Factors, Weights, combined, move, shaped

DIRECT = 100
"""Up to this order the linear system is solved as it is; beyond, the stages share a Jacobian."""

SLOW, PATIENCE = 0.5, 6
"""If corrections shrink by no more than the one after so many, there is a fresh Jacobian."""

KEPT, KEPT_LOOKS = 0.03, 3
"""A decomposition serves for the next attempt too, up to the sizes of both matrices, where
corrections have shrunk by more than the first, and as long as they do after so many. Not beyond the
order of ``SINGLE``: ten digits take a quarter more corrections with it."""


class Solution(NamedTuple):
    """What a step hands to the next: its equations' solution, and counts since the start."""

    step: Array
    derivatives: Factors
    """K, p vectors."""
    offsets: Array
    """Margins up to a common level, shape (p, n)."""
    num_iterations: Array
    num_evaluations: Array
    """Of the field, one for each stage in each iteration."""
    newton_error: Array
    """Of the last step, relative to the weights: the precision reached."""


class Balance(NamedTuple):
    """What a step's end asks of the field at its stages, shapes (p,)."""

    log_risk: Array
    rate: Array
    squared_norm: Array


class Stages(NamedTuple):
    """The field at the stages of a step; the stages are the leading axis of all arrays."""

    derivatives: Factors
    log_risk: Array
    rate: Array
    squared_norm: Array
    slopes: Array
    curvature: AbstractCurvature
    gap: Array

    @property
    def balance(self) -> Balance:
        return Balance(self.log_risk, self.rate, self.squared_norm)


class Frame(NamedTuple):
    """:math:`G_0`: the pullback of a cotangent Z, (q, d), is ``lefts[k].T @ Z @ columns[k]``."""

    lefts: list[Array]
    """Shapes (q, rows)."""
    columns: list[Array]
    """Shapes (d, columns)."""
    gram: Array
    sizes: list[Array]
    """Frobenius norm of each array of weights."""
    log_risk: Array

    def project(self, vectors: Factors) -> Array:
        """:math:`G_0 K_j`, shape (J, m)."""
        parts = [
            jnp.einsum("qx,jrx,jrd->jqd", a, left, right @ b.T, optimize="optimal")
            for left, right, a, b in zip(*vectors, self.lefts, self.columns, strict=True)
        ]
        return sum(parts[1:], parts[0]).reshape(len(parts[0]), -1)

    def pull(self, cotangents: Array) -> list[Array]:
        """Right factors of the pullbacks of z_j, beside ``lefts``: shapes (J, q, columns)."""
        z = cotangents.reshape(*cotangents.shape[:-1], self.lefts[0].shape[0], -1)
        return [z @ b for b in self.columns]


class Attempt(NamedTuple):
    """A Newton iterate: stage weights are :math:`W_0` + ``coefficients`` @ ``derivatives``."""

    frame: Frame
    count: Array
    coefficients: Array
    derivatives: Factors
    projection: Array
    offsets: Array
    size: Array
    """Of the last correction, relative to the weights."""
    contraction: Array
    stiffness: Array | Systems
    """The last stage's :math:`\\varphi^2\\mu A^\\top H A`, shape (m, m); of a large system, of all
    stages, as it was last decomposed."""
    kept: Array
    """Whether that was in an attempt before."""


def at_rest(field: AbstractField, stages: int, s: Array, weights: Weights, h: Array) -> Solution:
    """The solution that predicts a first step: the field at the start at every stage."""
    margins = field.problem.margins(weights)
    offsets = (margins - field.problem.loss.level(margins, margins))[None]
    nothing = jnp.zeros((1, 0), offsets.dtype)
    start = evaluate(field, weights, field.no_vectors(weights), nothing, offsets, s[None])
    repeat = lambda x: jnp.broadcast_to(x[0], (stages, *x.shape[1:]))  # noqa: E731
    return Solution(
        step=h,
        derivatives=jax.tree.map(repeat, start.derivatives),
        offsets=repeat(offsets),
        num_iterations=jnp.zeros((), int),
        num_evaluations=jnp.ones((), int),
        newton_error=jnp.zeros_like(h),
    )


def evaluate(
    field: AbstractField,
    weights: Weights,
    vectors: Factors,
    coefficients: Array,
    offsets: Array,
    s: Array,
    log_share: float = 0.0,
) -> Stages:
    """The field at ``weights + coefficients @ vectors``, with slopes taken at the offsets.

    Of some of the points, ``log_share`` is to be added to the logarithm of their mean loss.
    """
    problem = field.problem
    coordinates, pull = field.along(weights, vectors, coefficients)
    distance = problem.spread(coordinates) - offsets
    level = jax.vmap(problem.loss.level)(offsets, distance)
    log_risk, slopes, curvature = jax.vmap(problem.loss.terms)(offsets, level)
    log_risk = log_risk + log_share
    slopes_pulled = pull(problem.gather(slopes))
    (lefts, rights), squared = field.bent(weights, vectors, coefficients, slopes_pulled)
    rate = field.clock.rate(s, log_risk, squared)
    derivatives = Factors(lefts, [rate[:, None, None] * right for right in rights])
    gap = distance - level[:, None]
    return Stages(derivatives, log_risk, rate, squared, slopes, curvature, gap)


def begin(
    field: AbstractField,
    stages: int,
    s: Array,
    h: Array,
    weights: Weights,
    before: Solution,
    many: bool = True,
    last: Attempt | None = None,
) -> Attempt:
    """The predictor: the polynomial of the previous step, for at most three of its lengths.

    Whether it is one of ``many`` says from which order on its systems are decomposed. One alone
    may keep the decomposition of the ``last`` attempt, whether that was accepted or not.
    """
    tableau, frame = radau(stages), start_frame(field, weights)
    ahead = 1 + jnp.minimum(h / before.step, 3.0) * tableau.nodes
    extrapolate = legendre_values(ahead, stages).T @ tableau.legendre
    latest = before.offsets[-1:]
    change = extrapolate @ before.offsets - latest
    offsets, _ = jax.vmap(lambda c: field.problem.loss.advance(latest[0], c))(change)
    stiffness, kept = _no_stiffness(frame.gram, many), jnp.zeros((), bool)
    small = len(frame.gram) <= SINGLE
    if last is not None and not many and small and decomposes(last):
        stiffness, kept = last.stiffness, _serves(last)
    return Attempt(
        frame=frame,
        count=jnp.zeros((), int),
        coefficients=h * tableau.matrix @ extrapolate,
        derivatives=before.derivatives,
        projection=extrapolate @ frame.project(before.derivatives),
        offsets=offsets,
        size=jnp.full_like(h, jnp.inf),
        contraction=jnp.ones_like(h),
        stiffness=stiffness,
        kept=kept,
    )


def _no_stiffness(gram: Array, many: bool) -> Array | Systems:
    return Systems.blank(gram) if len(gram) > LARGE[many] else jnp.zeros_like(gram)


def start_frame(field: AbstractField, weights: Weights) -> Frame:
    """G at the start of a step."""
    problem = field.problem
    nothing = jnp.zeros((1, 0), jnp.result_type(*jax.tree.leaves(weights)))
    coordinates, pull = field.along(weights, field.no_vectors(weights), nothing)
    lefts = [left[0] for left in pull(jnp.zeros_like(coordinates)).lefts]  # of every vector
    basis, _ = _axes(problem, coordinates.shape[1], lefts[0].shape[0])
    columns = [right[:, 0, 0] for right in jax.vmap(lambda v: pull(v[None]).rights)(basis)]
    parts = [jnp.kron(a @ a.T, b @ b.T) for a, b in zip(lefts, columns, strict=True)]
    sizes = [jnp.sqrt(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(weights)]
    log_risk = problem.loss.terms(problem.spread(coordinates[0])).log_risk
    return Frame(lefts, columns, sum(parts[1:], parts[0]), sizes, log_risk)


def _axes(problem: Problem, num_coordinates: int, rank: int) -> tuple[Array, AbstractDesign | None]:
    """The cotangents that G is kept for, of each row of coordinates the same, and A in their terms.

    With fewer margins than coordinates the margins serve as coordinates, and A is the identity.
    Vectors of a lower rank than there are rows are whole arrays, which rows do not share.
    """
    if problem.design is None:
        return jnp.eye(num_coordinates), None
    if problem.data.rows is not None and rank < len(problem.data.rows):
        return jnp.eye(num_coordinates), problem.design
    return problem.design.axes()


def decomposes(attempt: Attempt) -> bool:
    """Whether its systems are large, so that they are decomposed."""
    return isinstance(attempt.stiffness, Systems)


def stale(attempt: Attempt) -> Array:
    """Whether large systems are to be decomposed: at first, and where they do not do."""
    slow = (attempt.count == PATIENCE) & (attempt.contraction > SLOW)
    aged = attempt.kept & (attempt.count >= KEPT_LOOKS) & (attempt.contraction > KEPT)
    return (attempt.count == 0) | slow | aged


def _serves(attempt: Attempt) -> Array:
    """Whether its decomposition does for the attempt after it; as told before it has begun."""
    # With two corrections a rate is not known, and they were enough.
    does = (attempt.contraction < KEPT) | ((attempt.count == 2) & jnp.isfinite(attempt.size))
    return jnp.where(attempt.count == 0, attempt.kept, does)


def decomposed(
    field: AbstractField, stages: int, h: Array, attempt: Attempt, at: Stages
) -> Attempt:
    """The attempt with its systems decomposed, those of the stage in the middle for all."""
    known, j = attempt.stiffness, stages // 2
    if not isinstance(known, Systems):
        return attempt
    force, growth, _ = _linearised(field, attempt.frame, at)
    gram = attempt.frame.gram
    _, design = _axes(field.problem, len(gram), attempt.frame.lefts[0].shape[0])
    slopes, middle = at.slopes[j], jax.tree.map(lambda x: x[j], at.curvature)

    def among(chosen: Array) -> tuple[Array, Array]:
        rows = jnp.eye(len(gram))[chosen] if design is None else design.rows_at(chosen)
        found = middle.among(chosen)
        if _centred(field):
            found = found - slopes[chosen][:, None] * slopes[chosen][None, :]
        return rows, found

    def whole(dtype: jnp.dtype) -> Array:
        def within(x: Any) -> Any:
            inexact = eqx.is_array_like(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            return jnp.asarray(x, dtype) if inexact else x

        curvature, known, mean = jax.tree.map(within, (middle, design, force[j]))
        return _stiffness(field, curvature, known, mean)

    # All of the curvature if a part of it has not done.
    scale, first = growth[j] ** 2 * at.rate[j], attempt.count == 0
    kept = first & attempt.kept
    found = jax.lax.cond(
        kept,
        lambda: known.rescaled(gram, scale),
        lambda: Systems.of(gram, slopes, first | attempt.kept, whole, among, scale, h),
    )
    return attempt._replace(stiffness=found, kept=kept)


def _stiffness(
    field: AbstractField, curvature: AbstractCurvature, design: AbstractDesign | None, force: Array
) -> Array:
    r""":math:`A^\top HA` of a stage, in the precision of what is given."""
    found = curvature.gram(design)
    return found - force[:, None] * force[None, :] if _centred(field) else found


def _centred(field: AbstractField) -> bool:
    return field.clock.centred and not field.problem.loss.quadratic


def _linearised(
    field: AbstractField, frame: Frame, at: Stages
) -> tuple[Array, Array, Callable[[Array, Array, AbstractCurvature], Array]]:
    r""":math:`A^\top s`, :math:`\varphi`, and what makes :math:`\mu A^\top HA` of a stage."""
    _, design = _axes(field.problem, len(frame.gram), frame.lefts[0].shape[0])
    force = at.slopes if design is None else design.gather(at.slopes)
    seen = jnp.sum(force @ frame.gram * force, 1)
    resting = seen == 0  # at risk zero, or beyond the range of squares
    growth = jnp.where(resting, 1.0, jnp.sqrt(at.squared_norm / jnp.where(resting, 1.0, seen)))

    def stiffness(mu: Array, force: Array, curvature: AbstractCurvature) -> Array:
        return mu * _stiffness(field, curvature, design, force)

    return force, growth, stiffness


def correct(field: AbstractField, stages: int, h: Array, attempt: Attempt, at: Stages) -> Attempt:
    """The next Newton iterate, by the equations above; large systems as they are decomposed.

    Args:
        field: of the flow.
        stages: p.
        h: the step.
        attempt: the iterate.
        at: the field there.
    """
    p, tableau, frame, loss = stages, radau(stages), attempt.frame, field.problem.loss
    m = frame.gram.shape[0]
    matrix, direct = h * tableau.matrix, p * m <= DIRECT
    _, design = _axes(field.problem, m, frame.lefts[0].shape[0])

    mu, slopes, gap, curvature = at.rate, at.slopes, at.gap, at.curvature
    force, growth, stiffness = _linearised(field, frame, at)
    # The change of y that the gaps ask for is that of mu A^T H e.
    change = frame.project(at.derivatives) - attempt.projection
    if direct:
        stiff = jax.vmap(stiffness)(mu, force, curvature)
    else:
        # The Jacobian of the stage in the middle for all, up to G_j's factor.
        mu = (growth[p // 2] / growth) ** 2 * mu[p // 2]
        slopes, force, curvature = jax.tree.map(
            lambda x: jnp.broadcast_to(x[p // 2][None], x.shape), (slopes, force, curvature)
        )
        middle = jax.tree.map(lambda x: x[p // 2], (mu, force, at.curvature))
    pulled = jax.vmap(lambda each, v: each.apply(v))(curvature, gap)
    pulled = mu[:, None] * (pulled if design is None else design.gather(pulled))
    if _centred(field):
        pulled = pulled - mu[:, None] * force * jnp.sum(slopes * gap, 1, keepdims=True)

    # y / growth solves the system.
    rhs = matrix @ (change - growth[:, None] * (pulled @ frame.gram))
    if direct:
        blocks = frame.gram @ (growth[:, None, None] ** 2 * stiff)
        system = matrix[:, None, :, None] * blocks.transpose(1, 0, 2)[None]
        system = jnp.eye(p * m) + system.reshape(p * m, p * m)
        y = growth[:, None] * solve(system, rhs.reshape(p * m)).reshape(p, m)
        z = pulled + jnp.einsum("jab,jb->ja", stiff, y)
        last = growth[-1] ** 2 * stiff[-1]
    elif isinstance(attempt.stiffness, Systems):
        last = attempt.stiffness
        y, forces = last.solve(tableau, h, frame.gram, rhs)
        y, z = growth[:, None] * y, pulled + forces / growth[:, None]
    else:
        last = growth[p // 2] ** 2 * stiffness(*middle)
        y = growth[:, None] * tableau.solve(h * frame.gram @ last, rhs)
        z = pulled + (y / growth[:, None] ** 2) @ last
    rights = [
        right - (growth * _ratio(jnp.linalg.norm(a), _norms(left)))[:, None, None] * back
        for left, right, a, back in zip(*at.derivatives, frame.lefts, frame.pull(z), strict=True)
    ]
    derivatives = Factors(at.derivatives.lefts, rights)
    shift = gap + (y if design is None else design.spread(y))
    shift = shift - jax.vmap(loss.level)(attempt.offsets, shift)[:, None]
    offsets, held = jax.vmap(loss.advance)(attempt.offsets, shift)

    # Solved when the correction of K is small, and that of the slopes too up to a square.
    sizes = [
        (_norms(l1 - l0) * _norms(r1) + _norms(l0) * _norms(r1 - r0)).max()
        / (w + h * (_norms(l1) * _norms(r1)).max())
        for l0, r0, l1, r1, w in zip(*attempt.derivatives, *derivatives, frame.sizes, strict=True)
    ]
    size = h * jnp.max(jnp.stack(sizes))
    unsettled = jnp.any(held)
    if not loss.quadratic:
        moved = jax.vmap(lambda each, v: each.apply(v))(at.curvature, jnp.abs(shift))
        unsettled = unsettled | (jnp.max(jnp.sum(jnp.abs(moved), 1)) > 1e-6)
    size = jnp.where(unsettled | (attempt.count == 0), jnp.maximum(size, 1.0), size)
    return Attempt(
        frame=frame,
        count=attempt.count + 1,
        coefficients=matrix,
        derivatives=derivatives,
        projection=frame.project(derivatives),
        offsets=offsets,
        size=size,
        contraction=jnp.where(attempt.size < 1, size / attempt.size, 1.0),
        stiffness=last,
        kept=attempt.kept,
    )


def solved(attempt: Attempt, tolerance: float, max_iterations: int) -> Array:
    """Whether the iteration is over: converged, no longer improving, or given up."""
    close = remaining(attempt.size, attempt.contraction) < tolerance
    stagnant = (attempt.contraction > 0.5) & (attempt.size < 100 * tolerance)
    spent = jnp.isnan(attempt.size) | (attempt.count >= max_iterations)
    return (attempt.count >= 2) & (close | stagnant | spent)


def remaining(size: Array, contraction: Array) -> Array:
    """The error left after a correction of a size, from the rate at which corrections shrink."""
    return size * jnp.minimum(contraction / (1 - jnp.minimum(contraction, 0.5)), 1.0)


def failed(error: Array, tolerance: float) -> Array:
    """Whether the equations are not solved, from the error that is left."""
    return ~(error < 100 * tolerance)


def error_of_weights(stages: int, h: Array, last: Attempt) -> list[Array]:
    """Last Legendre coefficient of the derivative, times its decay, its stiff part damped."""
    tableau, frame = radau(stages), last.frame
    tail = tableau.legendre[-3:]
    parts = [
        jnp.sum((tail @ _products(left, right)) * tail, 1)
        / (w + h * (_norms(left) * _norms(right)).max()) ** 2
        for left, right, w in zip(*last.derivatives, frame.sizes, strict=True)
    ]
    third, second, final = jnp.sqrt(jnp.abs(sum(parts[1:], parts[0])))
    damping, projected = h * tableau.damping, tail[-1] @ last.projection
    if isinstance(last.stiffness, Systems):
        z = damping * last.stiffness.damped(damping, projected)
    else:
        stiff = jnp.eye(frame.gram.shape[0]) + damping * last.stiffness @ frame.gram
        z = damping * solve(stiff, last.stiffness @ projected)
    scale = h * decay_rate(final, second, third) ** (stages - 1)
    return [
        scale * (combined(jnp.asarray(tail[-1]), left, right) - a.T @ back)
        for left, right, a, back in zip(*last.derivatives, frame.lefts, frame.pull(z), strict=True)
    ]


class End(NamedTuple):
    """A step at its end."""

    state: FlowState
    error: FlowState
    """Infinite where Newton's iteration failed; the state is then that of the start."""
    time_slopes: Array


def end(
    stages: int,
    tolerance: float,
    h: Array,
    before: FlowState,
    log_risk: Array,
    solution: Solution,
    error: list[Array],
    at: Stages | Balance,
) -> End:
    """The new state and its error, from the solution of a step's equations.

    Args:
        stages, tolerance: of the solver.
        h: the step.
        before: the state that it starts from.
        log_risk: there.
        solution: derivatives and offsets at the stages.
        error: of the weights.
        at: the field at the solution.
    """
    p, tableau = stages, radau(stages)
    matrix = h * tableau.matrix
    decay = at.rate * at.squared_norm
    system = jnp.eye(p) + matrix * decay[None, :]
    u = solve_differentiably(system, before.scaled_time + matrix @ at.rate)
    time_slopes = jnp.asarray(np.linalg.inv(tableau.matrix)) @ (u - before.scaled_time) / h
    *_, third, second, final = jnp.abs(tableau.legendre @ time_slopes)
    tail = h * final * decay_rate(final, second, third) ** (p - 1)
    balance = at.log_risk[-1] - log_risk + matrix[-1] @ decay
    time_error = jnp.maximum(
        tail / (1 + h * tableau.damping * decay[-1]),
        10 * jnp.abs(u[-1] * balance) / jnp.hypot(1.0, log_risk),
    )
    given_up = failed(solution.newton_error, tolerance)
    after = FlowState(move(before.weights, solution.derivatives, matrix[-1]), u[-1])
    after = jax.tree.map(lambda new, old: jnp.where(given_up, old, new), after, before)
    off = FlowState(shaped(error, before.weights), jax.lax.stop_gradient(time_error))
    off = jax.tree.map(lambda e: jnp.where(given_up, jnp.inf, e), off)
    return End(after, off, time_slopes)


def _norms(factors: Array) -> Array:
    """The Frobenius norm of each vector's factor; products of two bound that of the vector."""
    return jnp.sqrt(jnp.sum(factors**2, axis=(1, 2)))


def _products(left: Array, right: Array) -> Array:
    """The inner products of all vectors with each other in one array, shape (J, J)."""
    num, rank, _ = left.shape
    a, b = (x.reshape(num * rank, x.shape[2]) for x in (left, right))
    return jnp.sum(((a @ a.T) * (b @ b.T)).reshape(num, rank, num, rank), (1, 3))


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``, zero where b is."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))

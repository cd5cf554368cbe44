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
stage is the new point. Its order 2p - 1 (11 by default) survives there, while diagonally implicit
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
Here :math:`G_i` only matters for the speed of convergence and is taken as :math:`\varphi_i G_0`, of
one :math:`G_0` at the stage in the middle as it is predicted (of ten digits 46 of 207 attempts are
refused with it, 59 of 217 with that of the start), where
:math:`\varphi_i^2 = \lVert G_i^\top A^\top s_i\rVert^2/\lVert G_0^\top A^\top s_i\rVert^2`,
held to what the weights may grow by: near a saddle it is a ratio of remainders.
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
any number of stages. Any other network goes the same way with whole vectors, each a row of all its
arrays, and so does a deep linear one whose layers have no more entries than the factors.

**Scaled time** is linear, :math:`u' = \mu(1 - u\lVert g\rVert^2)`, once the stages are known.

**The error estimate** is the last Legendre coefficient of the derivative on the step, extrapolated
by the observed rate of decay to the order of the end point, its stiff part damped as the flow does.
That of scaled time is one number, whose coefficients may pass through zero, which sizes of vectors
do not: it decays as it seems to by the better of two looks, and no faster than the weights. The
coefficients :math:`c_k` beyond the last are residuals of its equation, and the end has of them

.. math::
    h\sum_{k\ge p} c_k \int_0^1 (P_k - I P_k)(s)\, e^{-h\int_s^1 \mu\lVert g\rVert^2}\,ds,

I the interpolation at the nodes: where u falls by much on a step, the exponential has coefficients
of its own, which decay more slowly than those of the weights.
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

import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField
from gflow.dynamics.radau import jacobian
from gflow.dynamics.radau.batching import solve
from gflow.dynamics.radau.spectral import Systems
from gflow.dynamics.radau.stages import (
    Attempt,
    Solution,
    Stages,
    axes,
    evaluate,
    frame_of,
    norms,
    norms_of_products,
)
from gflow.dynamics.radau.tableau import legendre_values, radau
from gflow.problem.array import Array
from gflow.problem.weights import Factors, Weights

DIRECT = 100
"""Up to this order the linear system is solved as it is; beyond, the stages share a Jacobian."""

UNSETTLED = 8
"""Slopes that have not settled after so many corrections do not: none of a run of ten digits did.
With six a run of ten random classes takes 68 steps for 59, since some settle at the seventh."""


def at_rest(field: AbstractField, stages: int, s: Array, weights: Weights, h: Array) -> Solution:
    """The solution that predicts a first step: the field at the start at every stage."""
    margins = field.problem.margins(weights)
    offsets = (margins - field.problem.loss.level(margins, margins))[None]
    nothing = jnp.zeros((1, 0), offsets.dtype)
    start = evaluate(field, weights, field.no_vectors(weights), nothing, offsets, s[None])
    repeat = lambda x: jnp.broadcast_to(x[0], (stages, *x.shape[1:]))  # noqa: E731
    return Solution(
        step=h,
        behind=jnp.ones_like(h),
        derivatives=jax.tree.map(repeat, start.derivatives),
        offsets=repeat(offsets),
        num_iterations=jnp.zeros((), int),
        num_evaluations=jnp.ones((), int),
        newton_error=jnp.zeros_like(h),
    )


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
    """The predictor: the polynomial of the step before, for at most three of its lengths.

    Or, of another step from where one began, as a refused one, that one's polynomial.

    Of ``many`` and ``last`` see ``jacobian.at_first``.
    """
    tableau = radau(stages)
    ahead = before.behind + jnp.minimum(h / before.step, 3.0) * tableau.nodes
    extrapolate = legendre_values(ahead, stages).T @ tableau.legendre
    coefficients = h * tableau.matrix @ extrapolate
    frame = frame_of(field, weights, h, before.derivatives, coefficients[stages // 2])
    latest = before.offsets[-1:]
    change = extrapolate @ before.offsets - latest
    offsets, _ = jax.vmap(lambda c: field.problem.loss.advance(latest[0], c))(change)
    stiffness, kept = jacobian.at_first(field, frame, many, last)
    return Attempt(
        frame=frame,
        count=jnp.zeros((), int),
        coefficients=coefficients,
        derivatives=before.derivatives,
        inner=jnp.tensordot(extrapolate, frame.inner(before.derivatives), 1),
        offsets=offsets,
        size=jnp.full_like(h, jnp.inf),
        contraction=jnp.full_like(h, jnp.inf),
        stiffness=stiffness,
        kept=kept,
    )


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
    m = frame.gram.order
    matrix, direct = h * tableau.matrix, p * m <= DIRECT
    _, design = axes(field.problem)

    mu, slopes, gap, curvature = at.rate, at.slopes, at.gap, at.curvature
    force, growth, stiffness = jacobian.linearised(field, frame, at)
    # The change of y that the gaps ask for is that of mu A^T H e.
    change = frame.project(frame.inner(at.derivatives) - attempt.inner)
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
    if jacobian.centred(field):
        pulled = pulled - mu[:, None] * force * jnp.sum(slopes * gap, 1, keepdims=True)

    # y / growth solves the system.
    rhs = matrix @ (change - growth[:, None] * frame.gram.times(pulled))
    if direct:
        blocks = frame.gram.matrix @ (growth[:, None, None] ** 2 * stiff)
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
        y = growth[:, None] * tableau.solve(h * frame.gram.matrix @ last, rhs)
        z = pulled + (y / growth[:, None] ** 2) @ last
    backs = frame.pull(z, at.derivatives.rights)
    rights = [
        right - (growth * _ratio(jnp.linalg.norm(a), norms(left)))[:, None, None] * back
        for left, right, a, back in zip(*at.derivatives, frame.lefts, backs, strict=True)
    ]
    derivatives = Factors(at.derivatives.lefts, rights)
    shift = gap + (y if design is None else design.spread(y))
    shift = shift - jax.vmap(loss.level)(attempt.offsets, shift)[:, None]
    offsets, held = jax.vmap(loss.advance)(attempt.offsets, shift)

    # Solved when the correction of K is small, and that of the slopes too up to a square.
    sizes = [
        norms_of_products(l1 - l0, r1 / scale) + norms_of_products(l0, (r1 - r0) / scale)
        for l0, r0, l1, r1, scale in zip(
            *attempt.derivatives, *derivatives, frame.scales, strict=True
        )
    ]
    size = h * jnp.max(jnp.stack(sizes))
    unsettled = jnp.any(held)
    if not loss.quadratic:
        moved = jnp.sum(jnp.abs(at.slopes * shift), 1)  # of the risk, relative to it
        unsettled = unsettled | (jnp.max(moved) > 1e-6)
    size = jnp.where(unsettled | (attempt.count == 0), jnp.maximum(size, 1.0), size)
    return Attempt(
        frame=frame,
        count=attempt.count + 1,
        coefficients=matrix,
        derivatives=derivatives,
        inner=frame.inner(derivatives),
        offsets=offsets,
        size=size,
        contraction=jnp.where(attempt.size < 1, size / attempt.size, jnp.inf),
        stiffness=last,
        kept=attempt.kept,
    )


def solved(attempt: Attempt, tolerance: float, max_iterations: int) -> Array:
    """Whether the iteration is over: converged, no longer improving, or given up."""
    close = remaining(attempt.size, attempt.contraction) < tolerance
    known = jnp.isfinite(attempt.contraction)
    stagnant = known & (attempt.contraction > 0.5) & (attempt.size < 100 * tolerance)
    lost = jnp.isnan(attempt.size) | ((attempt.size >= 1) & (attempt.count >= UNSETTLED))
    spent = attempt.count >= max_iterations
    return (attempt.count >= 2) & (close | stagnant | lost | spent)


def remaining(size: Array, contraction: Array) -> Array:
    """The error left after a correction of a size, from the rate at which corrections shrink."""
    return size * jnp.minimum(contraction / (1 - jnp.minimum(contraction, 0.5)), 1.0)


def failed(error: Array, tolerance: float) -> Array:
    """Whether the equations are not solved, from the error that is left."""
    return ~(error < 100 * tolerance)


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``, zero where b is."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))

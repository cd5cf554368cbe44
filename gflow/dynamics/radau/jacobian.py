r"""The Jacobian of a step's equations, $\mu A^\top HA$ of its stages; of large systems, decomposed.

A decomposition serves all corrections of an attempt as long as they shrink, and may serve the next
attempt. All that is decided about it, when it is made and how long it is kept, is decided here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gflow.dynamics.field import AbstractField
from gflow.dynamics.radau.spectral import LARGE, SINGLE, Systems, few, in_precision
from gflow.dynamics.radau.stages import Attempt, Frame, Stages, axes
from gflow.problem.array import Array
from gflow.problem.design import AbstractDesign, Products
from gflow.problem.terms import AbstractCurvature

SLOW, PATIENCE = 0.5, 6
"""If corrections shrink by no more than the one after so many, there is a fresh Jacobian."""

KEPT, KEPT_LOOKS = 0.1, 3
"""A decomposition serves for the next attempt too, up to the sizes of both matrices, where
corrections have shrunk by more than the first, and as long as they do after so many. Not beyond the
order of ``SINGLE``: ten digits take a quarter more corrections with it. At order 90 a decomposition
takes as long as five corrections: a run takes 0.86 of the time with 0.1 that it takes with 0.03."""


def at_first(
    field: AbstractField, frame: Frame, many: bool, last: Attempt | None
) -> tuple[Array | Systems, Array]:
    """What an attempt begins with, and whether that was in the one before it.

    Whether it is one of ``many`` says from which order on its systems are decomposed. One alone
    may keep the decomposition of the ``last`` attempt, whether that was accepted or not; where it
    may not, its arrays are made use of: to fill new ones would be a tenth of a decomposition.
    """
    gram = frame.gram
    if gram.order <= LARGE[many]:
        return jnp.zeros_like(gram.matrix), jnp.zeros((), bool)
    if last is not None and not many and decomposes(last):
        return last.stiffness, _serves(last) if gram.order <= SINGLE else jnp.zeros((), bool)
    _, design = axes(field.problem)
    rows = _rows(design, gram.order, jnp.zeros((few(gram.order)[-1],), int))
    return Systems.blank(gram, rows), jnp.zeros((), bool)


def decomposes(attempt: Attempt) -> bool:
    """Whether its systems are large, so that they are decomposed."""
    return isinstance(attempt.stiffness, Systems)


def stale(attempt: Attempt) -> Array:
    """Whether large systems are to be decomposed: at first, and where they do not do."""
    known = jnp.isfinite(attempt.contraction)
    slow = (attempt.count == PATIENCE) & known & (attempt.contraction > SLOW)
    aged = attempt.kept & (attempt.count >= KEPT_LOOKS) & (attempt.contraction > KEPT)
    return (attempt.count == 0) | slow | aged


def up_to_date(
    field: AbstractField, stages: int, h: Array, attempt: Attempt, at: Stages
) -> Attempt:
    """The attempt with its systems decomposed again if they are stale."""
    if not decomposes(attempt):
        return attempt
    return jax.lax.cond(
        stale(attempt), lambda: decomposed(field, stages, h, attempt, at), lambda: attempt
    )


def _serves(attempt: Attempt) -> Array:
    """Whether its decomposition does for the attempt after it; that of no attempt does not."""
    # With two corrections a rate is not known, and they were enough.
    does = (attempt.contraction < KEPT) | ((attempt.count == 2) & jnp.isfinite(attempt.size))
    return does & (attempt.count > 0)


def decomposed(
    field: AbstractField, stages: int, h: Array, attempt: Attempt, at: Stages
) -> Attempt:
    """The attempt with its systems decomposed, those of the stage in the middle for all."""
    known, j = attempt.stiffness, stages // 2
    if not isinstance(known, Systems):
        return attempt
    force, growth, _ = linearised(field, attempt.frame, at)
    gram = attempt.frame.gram
    _, design = axes(field.problem)
    slopes, middle = at.slopes[j], jax.tree.map(lambda x: x[j], at.curvature)

    def among(chosen: Array) -> tuple[Products, Array]:
        found = middle.among(chosen)
        if centred(field):
            found = found - slopes[chosen][:, None] * slopes[chosen][None, :]
        return _rows(design, gram.order, chosen), found

    def whole(dtype: jnp.dtype) -> Array:
        curvature, known, mean = in_precision((middle, design, force[j]), dtype)
        return _stiffness(field, curvature, known, mean)

    # All of the curvature if a part of it has not done.
    scale, first = growth[j] ** 2 * at.rate[j], attempt.count == 0
    kept = first & attempt.kept
    found = jax.lax.cond(
        kept,
        lambda: known.rescaled(gram, scale),
        lambda: known.decomposed(gram, slopes, first | attempt.kept, whole, among, scale, h),
    )
    return attempt._replace(stiffness=found, kept=kept)


def _rows(design: AbstractDesign | None, order: int, chosen: Array) -> Products:
    """Those of some margins, which are the coordinates themselves where there is no design."""
    return Products.of(jnp.eye(order)[chosen]) if design is None else design.among(chosen)


def _stiffness(
    field: AbstractField, curvature: AbstractCurvature, design: AbstractDesign | None, force: Array
) -> Array:
    r""":math:`A^\top HA` of a stage, in the precision of what is given."""
    found = curvature.gram(design)
    return found - force[:, None] * force[None, :] if centred(field) else found


def centred(field: AbstractField) -> bool:
    """Whether the clock takes its part out of H."""
    return field.clock.centred and not field.problem.loss.quadratic


def linearised(
    field: AbstractField, frame: Frame, at: Stages
) -> tuple[Array, Array, Callable[[Array, Array, AbstractCurvature], Array]]:
    r""":math:`A^\top s`, :math:`\varphi`, and what makes :math:`\mu A^\top HA` of a stage."""
    _, design = axes(field.problem)
    force = at.force  # unless the axes are others than the problem's coordinates
    if design is not field.problem.design:
        force = at.slopes if design is None else design.gather(at.slopes)
    seen = jnp.sum(frame.gram.times(force) * force, 1)
    resting = seen == 0  # at risk zero, or beyond the range of squares
    growth = jnp.where(resting, 1.0, jnp.sqrt(at.squared_norm / jnp.where(resting, 1.0, seen)))
    # Near a saddle both are what is left of terms that cancel, and their ratio says nothing.
    growth = jnp.clip(growth, 1 / frame.most, frame.most)

    def stiffness(mu: Array, force: Array, curvature: AbstractCurvature) -> Array:
        return mu * _stiffness(field, curvature, design, force)

    return force, growth, stiffness

"""The seam between a loss and the solvers: a risk of all margins together, in one file.

The loss below is cross-entropy of three classes, written as a risk of the margins
$q_{ik} = \\langle w_{y_i} - w_k, x_i\\rangle$, two a point: its curvature has a block a point.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import gflow
from gflow.problem.terms import AbstractCurvature, AbstractJointLoss, Diagonal, LossTerms

INTEGRATORS = 1e-8  # what two integrators at rtol 1e-9 agree to


class Blocks(AbstractCurvature):
    """A block diagonal matrix, blocks of shape (points, k, k)."""

    blocks: jax.Array

    def apply(self, vector):
        rows = vector.reshape(self.blocks.shape[:2])
        return jnp.einsum("nij,nj->ni", self.blocks, rows).reshape(vector.shape)

    def gram(self, design):
        points, k, _ = self.blocks.shape
        rows = (jnp.eye(points * k) if design is None else design).reshape(points, k, -1)
        return jnp.einsum("nia,nij,njb->ab", rows, self.blocks, rows)


class Groups(AbstractJointLoss):
    r"""$R = \frac1n\sum_i\log(1 + \sum_k e^{-q_{ik}})$, k margins a point."""

    k: int

    def terms(self, offsets, level=None):
        # log l = log log(1 + e^{-level} S), S = sum_k e^{-offset}, never forming e^{-level}.
        level = jnp.zeros(()) if level is None else level
        rows = offsets.reshape(-1, self.k)
        log_sum = logsumexp(-rows, axis=1)
        share = jnp.exp(-rows - log_sum[:, None])
        z = jnp.minimum(log_sum - level, 700.0)
        log_loss = jnp.where(z > -40, jnp.log(jnp.maximum(jnp.logaddexp(0.0, z), 1e-300)), z)
        log_loss = log_loss + level  # of R e^level
        log_total = logsumexp(log_loss)
        # dl/dq_k = -sigma(z) share_k, with sigma(z) e^level relative to the total.
        weight = jnp.exp(log_sum - jnp.logaddexp(0.0, z) - log_total)
        sigma = jnp.exp(z - jnp.logaddexp(0.0, z))
        slopes = (weight[:, None] * share).reshape(offsets.shape)
        diagonal = jax.vmap(jnp.diag)(share)
        outer = share[:, :, None] * share[:, None, :]
        blocks = weight[:, None, None] * (diagonal - sigma[:, None, None] * outer)
        log_risk = log_total - level - np.log(rows.shape[0])
        return LossTerms(log_risk, slopes, Blocks(blocks))

    @property
    def exponential_tail(self):
        return False

    @property
    def name(self):
        return "groups"


@pytest.fixture(scope="module")
def problem():
    """Three classes in the plane; a column of weights a class and axis."""
    rng = np.random.default_rng(0)
    angles = np.repeat([0.0, 2.1, 4.2], 4) + rng.uniform(-0.4, 0.4, 12)
    inputs, classes = np.stack([np.cos(angles), np.sin(angles)], 1), np.repeat([0, 1, 2], 4)
    rows = []
    for x, y in zip(inputs, classes, strict=True):
        for other in set(range(3)) - {y}:
            sign = np.zeros(3)
            sign[[y, other]] = 1.0, -1.0
            rows.append(np.kron(sign, x))
    return gflow.Problem(gflow.Dataset(np.array(rows), np.ones(len(rows))), loss=Groups(2))


def test_terms_are_the_derivatives_of_the_log_risk(problem):
    loss, rng = problem.loss, np.random.default_rng(1)
    q = rng.normal(size=6)
    log_risk, slopes, curvature = loss.terms(q)
    direct = np.log(np.mean(np.log1p(np.exp(-q.reshape(-1, 2)).sum(1))))
    np.testing.assert_allclose(log_risk, direct, rtol=1e-14)
    gradient = jax.grad(lambda q: loss.terms(q).log_risk)(jnp.asarray(q))
    np.testing.assert_allclose(slopes, -gradient, rtol=1e-12)
    hessian = jax.hessian(lambda q: jnp.exp(loss.terms(q).log_risk))(jnp.asarray(q))
    np.testing.assert_allclose(curvature.gram(None), hessian / np.exp(log_risk), atol=1e-13)
    np.testing.assert_allclose(curvature.apply(q), curvature.gram(None) @ q, atol=1e-13)
    level = loss.terms(q, jnp.asarray(300.0))
    np.testing.assert_allclose(level.log_risk, loss.terms(q + 300.0).log_risk, rtol=1e-13)


def test_a_loss_whose_curvature_is_not_diagonal_is_followed_by_every_solver(problem):
    start = gflow.init.admissible(gflow.init.gaussian((6, 4, 1), scale=0.3, seed=0), problem)
    rule, clock = gflow.LogRisk(-30.0), gflow.clocks.LogRisk()
    implicit = gflow.gradient_flow(problem, start, until=rule, save=4)
    explicit = gflow.gradient_flow(
        problem, start, until=rule, save=4, solver=diffrax.Dopri8(), rtol=1e-10, clock=clock
    )
    assert implicit.attrs["solver"] == "GaussNewton" and implicit.attrs["status"] == "reached"
    np.testing.assert_allclose(implicit.end_to_end, explicit.end_to_end, rtol=INTEGRATORS)
    np.testing.assert_allclose(
        implicit.log_time[1:], explicit.log_time[1:], rtol=INTEGRATORS, atol=INTEGRATORS
    )
    assert implicit.imbalance_drift.max() < 1e-11


def test_the_diagonal_of_a_mean_of_losses_is_one_curvature_among_others():
    q = np.array([0.3, -1.0, 2.0])
    found = gflow.Logistic().terms(q).curvature
    assert isinstance(found, Diagonal)
    blocks = Blocks(jnp.asarray(found.entries).reshape(3, 1, 1))
    design = np.random.default_rng(0).normal(size=(3, 2))
    np.testing.assert_allclose(found.gram(design), blocks.gram(design), rtol=1e-14)
    np.testing.assert_allclose(found.apply(q), blocks.apply(q), rtol=1e-14)

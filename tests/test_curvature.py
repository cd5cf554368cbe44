"""Sharpness against dense eigenvalues and against what theory says of its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gflow
from gflow.problem import curvature
from gflow.problem.curvature import extreme_eigenvalues

DATA = gflow.datasets.separable(n=8, d=3, margin=0.2, seed=1)
PROBLEM = gflow.Problem(DATA, loss=gflow.Logistic())

# A hundred round-offs of matrices of norm one.
ROUND_OFF = 1e-13

# What 40 iterations leave on 155 weights.
LANCZOS = 1e-9


def dense(problem, weights):
    flat, shaped = ravel_pytree(weights)

    def risk(at):
        return jnp.exp(problem.log_risk(shaped(at)))

    return np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(risk))(flat)))


@pytest.mark.parametrize(
    ("widths", "within"), [((3, 4, 3, 1), ROUND_OFF), ((3, 10, 10, 2, 1), LANCZOS)]
)
def test_the_extreme_eigenvalues_are_those_of_the_dense_hessian(widths, within):
    weights = gflow.init.gaussian(widths, seed=0)
    values = dense(PROBLEM, weights)
    found = curvature.curvature(PROBLEM, weights)
    ends = np.exp(found.log_risk) * np.array([found.least, found.greatest])
    np.testing.assert_allclose(ends, values[[0, -1]], atol=within * values[-1])
    assert found.least < 0  # no deep network is convex
    # The residual vouches for the eigenvalue; at convergence its square over the gap is the error.
    off = np.abs(ends - values[[0, -1]]).max()
    assert off <= curvature.sharpness_error(PROBLEM, weights) + ROUND_OFF * values[-1]
    np.testing.assert_allclose(curvature.sharpness(PROBLEM, weights), values[-1], rtol=within)


def test_an_exhausted_krylov_space_adds_no_eigenvalue():
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(rng.normal(size=(200, 2)))[0].T
    matrix = 3.0 * np.outer(a, a) + 2.0 * np.outer(b, b) + np.eye(200)
    *ends, error = extreme_eigenvalues(lambda v: matrix @ v, 200, np.dtype(float))
    np.testing.assert_allclose(ends, [1.0, 4.0], rtol=ROUND_OFF)
    assert error == 0.0


def test_few_iterations_leave_a_residual_that_covers_the_error():
    matrix = np.diag(np.linspace(-1.0, 1.0, 2000))  # no gap at either end
    *ends, error = extreme_eigenvalues(lambda v: matrix @ v, 2000, np.dtype(float))
    off = np.abs(np.array(ends) - [-1.0, 1.0]).max()
    assert 1e-4 < off < error < 0.1


def test_a_general_network_has_the_sharpness_of_the_same_layers():
    network = gflow.Network(lambda w, x: (w[1] @ (w[0] @ x))[0], homogeneity=2)
    weights = gflow.init.gaussian((3, 4, 1), seed=0)
    general = gflow.Problem(DATA, network, gflow.Logistic())
    np.testing.assert_allclose(
        curvature.sharpness(general, weights), curvature.sharpness(PROBLEM, weights), rtol=ROUND_OFF
    )


# S t -> lambda_max(sum_i p_i z_i z_i^T)/gamma^2 along the flow of one layer, p the limiting softmax
# weights; for the points (a, +-b) it is max(1, b^2/a^2). One datum: 1 at every depth.


def test_sharpness_times_time_of_one_layer_tends_to_its_limit():
    problem = gflow.Problem(gflow.datasets.two_point(0.8, 1.0), loss=gflow.Exponential())
    flow = gflow.gradient_flow(
        problem,
        (np.array([[0.9, -0.1]]),),
        until=gflow.LogTime(1000.0),  # log R near -1000: S itself has underflowed
        save=2,
        observables={"log_sharpness": gflow.observables.log_sharpness},
    )
    times = np.exp(flow.log_sharpness + flow.log_time).values
    assert times[-1] == pytest.approx((1.0 / 0.8) ** 2, rel=1e-7)


def test_sharpness_times_time_of_a_deep_network_on_one_datum_tends_to_one():
    data = gflow.datasets.one_datum()
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.balanced((3, 2, 2, 1), end_to_end=0.5 * data.max_margin().direction)
    flow = gflow.gradient_flow(
        problem,
        weights,
        until=gflow.LogRisk(-500.0),
        save=[-50.0, -500.0],
        observables={"log_sharpness": gflow.observables.log_sharpness},
    )
    times = np.exp(flow.log_sharpness + flow.log_time).values[1:]
    # With 50 digits: 1.0143 and 1.0013 at log R = -50 and -500.
    np.testing.assert_allclose(times, [1.0143, 1.0013], atol=6e-5)

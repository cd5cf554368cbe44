import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow.dynamics.descending import optimizers
from gflow.dynamics.descending.step_meter import works_entry_by_entry
from gflow.problem.weights import inner_product

PROBLEM = gflow.Problem(gflow.datasets.two_point(), loss=gflow.Logistic())
WEIGHTS = (np.array([[0.5, -0.2], [0.1, 0.4]]), np.array([[0.3, 0.7]]))


def test_the_smoothness_constants_are_those_of_the_theory():
    # By hand: 2 L^2 r^(2L-2) (beta + G) and beta L r^(2L-2) + G (L-1) r^(L-2) with L = 3, r = 2,
    # beta = 1/4, G = 1.
    assert gflow.ball_smoothness(PROBLEM, 3, 2.0) == 360.0
    assert gflow.ball_smoothness(PROBLEM, 3, 2.0, sharper=True) == 16.0
    assert gflow.ball_smoothness(PROBLEM, 1, 5.0, sharper=True) == 0.25


def test_longer_inputs_raise_the_smoothness():
    data = gflow.Dataset([[3.0, 0.0], [0.0, -1.0]], [1, -1])
    longer = gflow.Problem(data, loss=gflow.Logistic())
    assert gflow.ball_smoothness(longer, 1, 1.0, sharper=True) == 0.25 * 9


def test_no_hessian_on_the_ball_exceeds_the_smoothness():
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (2, 2), (1, 2)]
    radius = 1.5

    def risk(flat):
        layers, begin = [], 0
        for shape in shapes:
            size = math.prod(shape)
            layers.append(flat[begin : begin + size].reshape(shape))
            begin += size
        return jnp.exp(PROBLEM.log_risk(tuple(layers)))

    points = []
    for _ in range(200):
        layers = [rng.normal(size=shape) for shape in shapes]
        points.append(np.concatenate([(radius * w / np.linalg.norm(w)).ravel() for w in layers]))
    hessians = jax.jit(jax.vmap(jax.hessian(risk)))(np.array(points))
    largest = np.abs(np.linalg.eigvalsh(np.asarray(hessians))).max()
    sharper = gflow.ball_smoothness(PROBLEM, 3, radius, sharper=True)
    assert 0.1 * sharper < largest <= sharper < gflow.ball_smoothness(PROBLEM, 3, radius)


@pytest.mark.parametrize("sharper", [False, True])
def test_the_radius_keeps_a_distance_of_one_and_never_shrinks(sharper):
    rule = gflow.paper_steps(PROBLEM, sharper=sharper)
    state = rule.init(WEIGHTS)
    large = tuple(3 * layer for layer in WEIGHTS)
    for weights, norm in ((large, 3 * np.sqrt(0.58)), (WEIGHTS, 3 * np.sqrt(0.58))):
        _, state = rule.update(WEIGHTS, state, weights)
        np.testing.assert_allclose(float(state.radius), 1 + norm, rtol=1e-14)
    expected = gflow.ball_smoothness(PROBLEM, 2, float(state.radius), sharper=sharper)
    np.testing.assert_allclose(float(state.step_size), min(1.0, 1 / expected), rtol=1e-14)


def test_rules_on_log_risk_work_in_a_loop_of_ones_own():
    gradient = jax.tree.map(jnp.ones_like, WEIGHTS)
    risk = 0.25
    scaled = gflow.loss_scaled(0.5, power=1.0)
    state = scaled.init(WEIGHTS)
    for count in (1, 2):  # eta = rate / (count R)
        updates, state = scaled.update(gradient, state, WEIGHTS, value=risk)
        np.testing.assert_allclose(updates[0], -0.5 / (count * risk), rtol=1e-15)
    polyak = gflow.polyak(2.0)
    updates, _ = polyak.update(gradient, polyak.init(WEIGHTS), WEIGHTS, value=risk)
    np.testing.assert_allclose(updates[1], -2.0 * risk / 6, rtol=1e-15)  # six entries of one
    momentum = gflow.on_log_risk(optax.sgd(0.1, momentum=0.9))
    updates, _ = momentum.update(gradient, momentum.init(WEIGHTS), WEIGHTS, value=risk)
    np.testing.assert_allclose(updates[0], -0.1 / risk, rtol=1e-15)
    with pytest.raises(ValueError, match="`value` is missing"):
        scaled.update(gradient, state, WEIGHTS)


def test_the_line_search_shrinks_until_the_risk_falls_and_grows_after_it_did():
    # R = w^2 from w = 1: a step 2 rate decreases it when 0 < 2 rate < 2.
    rule = gflow.loss_line_search(8.0, grow=3.0, shrink=0.5)
    w = jnp.ones(())
    updates, rate = rule.update(2 * w, rule.init(w), w, value=w**2, value_fn=lambda w: w**2)
    assert float(updates) == -1.0  # 8, 4, 2, 1 do not, 1/2 does
    assert float(rate) == 1.5
    # At a minimum it stands still, and begins anew.
    updates, rate = rule.update(w, rate, 0 * w, value=1 + 0 * w, value_fn=lambda w: 1 + w**2)
    assert float(updates) == 0.0 and float(rate) == 8.0


def test_rules_of_equal_settings_are_one_program():
    def structure(rule):
        return jax.tree.structure(rule)

    assert structure(gflow.loss_scaled(0.1)) == structure(gflow.loss_scaled(0.2))
    assert structure(gflow.polyak(0.1)) == structure(gflow.polyak(0.2))
    assert structure(gflow.loss_scaled(0.1)) != structure(gflow.polyak(0.1))


def test_an_optimiser_without_extra_arguments_is_one_program_each_time_it_is_given():
    plain = optax.scale(-0.1)
    assert not isinstance(plain, optax.GradientTransformationExtraArgs)
    one, other = (optimizers.with_extra_arguments(plain) for _ in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.leaves(one) == jax.tree.leaves(other)
    (moved,), _ = one.update((1.0,), one.init((0.0,)), value=0.5)
    assert moved == -0.1


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.sgd(0.1), True),
        (optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9, nesterov=True), True),
        (optax.adamw(1e-2), True),
        (optax.sign_sgd(1e-2), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
        (optax.lamb(1e-2), False),
        (optax.polyak_sgd(), False),
        (optax.lbfgs(), False),
        (optax.sgd(0.0), False),
    ],
)
def test_a_trial_tells_optimisers_that_work_entry_by_entry(optimizer, expected):
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        assert works_entry_by_entry(optimizer, WEIGHTS) == expected


def test_inner_products_sum_over_all_arrays():
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=s) for s in ((), (3,), (2, 3), (2, 3, 4))] for _ in range(2))
    expected = sum(float(np.sum(x * y)) for x, y in zip(a, b, strict=True))
    np.testing.assert_allclose(float(inner_product(a, b)), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (optax.sgd(0.1), "scale(step_size=-0.1)"),
        (
            optax.sgd(0.5, momentum=0.9),
            "chain(trace(decay=0.9, nesterov=False), scale(step_size=-0.5))",
        ),
        (gflow.loss_scaled(0.1), "loss_scaled(0.1, power=0)"),
        (gflow.paper_steps(PROBLEM), "paper_steps(sharper=False)"),
        (gflow.on_log_risk(optax.sgd(0.1)), "on_log_risk(scale(step_size=-0.1))"),
        (gflow.on_log_risk(optax.scale(-0.1)), "on_log_risk(scale(step_size=-0.1))"),
    ],
)
def test_an_optimiser_is_described_by_its_parts(optimizer, text):
    assert optimizers.describe(optimizer) == text


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: gflow.loss_scaled(0.0), "`rate` is 0.0; expected a positive"),
        (lambda: gflow.loss_scaled(math.nan), "`rate` is nan"),
        (lambda: gflow.loss_scaled(0.1, power=-1.0), "`power` is -1.0"),
        (lambda: gflow.polyak(-1.0), "`scaling` is -1.0"),
        (lambda: gflow.loss_line_search(0.1, grow=0.9), "`grow` is 0.9; expected"),
        (lambda: gflow.loss_line_search(0.1, shrink=1.5), "`shrink` is 1.5; expected"),
        (lambda: gflow.ball_smoothness(PROBLEM, 2, 0.5), "`radius` is 0.5; expected at"),
        (lambda: gflow.ball_smoothness(PROBLEM, 0, 2.0), "`depth` is 0"),
    ],
)
def test_settings_out_of_range_are_named(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_an_optimiser_is_named():
    with pytest.raises(ValueError, match="`optimizer` is a float; expected an optax optimiser"):
        gflow.on_log_risk(0.1)  # pyright: ignore


def test_the_papers_steps_need_a_loss_and_a_network_that_the_paper_covers():
    data = gflow.datasets.two_point()
    steep = gflow.Problem(data, loss=gflow.Exponential())
    with pytest.raises(ValueError, match=r"exponential loss.*assumption 4"):
        gflow.paper_steps(steep)
    general = gflow.Problem(data, gflow.Network(lambda w, x: w[0] @ x), gflow.Logistic())
    with pytest.raises(ValueError, match="`problem` has a Network; expected a DeepLinear"):
        gflow.paper_steps(general)

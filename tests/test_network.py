import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import gflow
from gflow.problem.deep_linear import check_weights, end_to_end, widths

DATA = gflow.Dataset([[0.5, 0.1], [-0.2, 0.9], [0.3, 0.3]], [1, -1, 1])
WEIGHTS = gflow.init.gaussian((2, 4, 3, 1), seed=1)


def test_end_to_end_is_the_product_of_the_layers():
    product = (WEIGHTS[2] @ WEIGHTS[1] @ WEIGHTS[0])[0]
    np.testing.assert_allclose(end_to_end(WEIGHTS), product, rtol=1e-14)
    assert widths(WEIGHTS) == (2, 4, 3, 1)


@pytest.mark.parametrize("loss", [gflow.Exponential(), gflow.Logistic(), gflow.PolynomialTail(2.0)])
def test_gradient_of_the_log_risk_is_that_of_automatic_differentiation(loss):
    problem = gflow.Problem(DATA, loss=loss)
    log_risk, gradient, norm = problem.log_risk_gradient_and_norm(WEIGHTS)

    def plain(weights):
        margins = jnp.asarray(DATA.signed_inputs) @ (weights[2] @ weights[1] @ weights[0])[0]
        return jnp.log(jnp.mean(jnp.exp(loss.log_value(margins))))

    value, expected = jax.value_and_grad(plain)(tuple(map(jnp.asarray, WEIGHTS)))
    np.testing.assert_allclose(log_risk, value, rtol=1e-13)
    for one, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(norm, sum(np.sum(g**2) for g in map(np.asarray, expected)))


def test_a_general_network_that_is_deep_linear_agrees_with_deep_linear():
    def apply(weights, x):
        return (weights[2] @ (weights[1] @ (weights[0] @ x)))[0]

    one = gflow.Problem(DATA).log_risk_gradient_and_norm(WEIGHTS)
    other = gflow.Problem(DATA, gflow.Network(apply, 3)).log_risk_gradient_and_norm(WEIGHTS)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_log_risk_stays_finite_where_the_risk_underflows():
    problem = gflow.Problem(DATA, loss=gflow.Logistic())
    direction = DATA.max_margin().direction
    log_risk, _, norm = problem.log_risk_gradient_and_norm(
        gflow.init.balanced((2, 3, 1), end_to_end=1e6 * direction)
    )
    assert -1e6 < float(log_risk) < -1e4
    assert 0 < float(norm) < np.inf


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((), "is empty"),
        (np.ones((1, 2)), "expected a tuple"),
        ((np.ones(2),), "expected a matrix"),
        ((np.ones((0, 2)), np.ones((1, 0))), "widths of at least 1"),
        ((np.ones((3, 2)), np.ones((1, 4))), r"expected 3 columns, the rows of `weights\[0\]`"),
        ((np.ones((3, 2)), np.ones((2, 3))), "expected one row"),
        ((np.full((1, 2), np.nan),), "NaN or infinite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_malformed_weights_are_named(weights, words):
    with pytest.raises(ValueError, match=words):
        check_weights(weights)


def test_weights_that_do_not_fit_the_data_are_named():
    with pytest.raises(ValueError, match="expected 2 columns, the dimension"):
        gflow.Problem(DATA).check((np.ones((1, 3)),))


def test_a_saddle_at_the_start_is_refused():
    with pytest.raises(ValueError, match="saddle"):
        gflow.Problem(DATA).check((np.zeros((3, 2)), np.zeros((1, 3))))


def test_a_start_above_the_risk_of_zero_is_warned_of():
    uphill = gflow.init.balanced((2, 3, 1), end_to_end=-DATA.max_margin().direction)
    with pytest.warns(UserWarning, match="assumption of Ji and Telgarsky"):
        gflow.Problem(DATA).check(uphill)


def test_a_network_with_several_outputs_is_refused():
    problem = gflow.Problem(DATA, gflow.Network(lambda weights, x: weights * x))
    with pytest.raises(ValueError, match="one output"):
        problem.check(np.ones(2))


@pytest.mark.usefixtures("unchecked")
def test_a_problem_of_something_else_is_refused():
    with pytest.raises(ValueError, match="`data` is a list; expected a gflow Dataset"):
        gflow.Problem([1.0])  # pyright: ignore


def test_jax_takes_the_methods_of_a_problem():
    problem = gflow.Problem(DATA)
    value = problem.log_risk(WEIGHTS)
    for transform in (jax.jit, jax.checkpoint, eqx.filter_jit):
        np.testing.assert_allclose(transform(problem.log_risk)(WEIGHTS), value, rtol=1e-14)
    stacked = jax.tree.map(lambda layer: jnp.stack([layer, layer]), WEIGHTS)
    assert jax.jit(jax.vmap(problem.margins))(stacked).shape == (2, 3)
    _, gradient = jax.jit(problem.log_risk_and_gradient)(WEIGHTS)
    expected = jax.jit(jax.grad(problem.log_risk))(WEIGHTS)
    for one, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)
    # One program for one problem, as for the methods of any other class.
    assert problem.log_risk == problem.log_risk
    assert hash(problem.log_risk) == hash(problem.log_risk)
    assert problem.log_risk != gflow.Problem(DATA).log_risk


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": np.ones(2), "heads": 2}, r"`weights\['heads'\]` is of the type int64, 2; .*trained"),
        ({"a": np.ones(2), "on": True}, r"`weights\['on'\]` is of the type bool"),
        ({"a": np.ones(2), "f": jnp.tanh}, r"`weights\['f'\]` is .*equinox.partition"),
        ({"a": np.ones(2), "f": "relu"}, r"`weights\['f'\]` is 'relu'; expected an array"),
        ({"a": np.ma.masked_array([1.0, 2.0], [0, 1])}, r"`weights\['a'\]\[1\]` is masked"),
        ([np.ones(2), 1j], r"`weights\[1\]` is"),
    ],
)
def test_leaves_that_are_not_to_be_trained_are_named(weights, words):
    network = gflow.Network(lambda w, x: jnp.sum(x))
    with pytest.raises(ValueError, match=words):
        network.check(weights, DATA)
    with pytest.raises(ValueError, match=words.replace("weights", "weights_batch")):
        gflow.ensemble(gflow.Problem(DATA, network), weights, until=gflow.LogRisk(-1))


def test_a_model_is_split_as_the_message_says():
    model = eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    network = gflow.Network(lambda arrays, x: eqx.combine(arrays, rest)(x))
    assert network.check(arrays, DATA).layers[0].weight.dtype == np.float64


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("apply", "homogeneity", "words"),
    [
        (lambda w, x: w @ x, 2, r"`homogeneity` is 2, but with twice the weights"),
        (lambda w, x: w @ x + 1.0, 1, r"`homogeneity` is 1, but .*None if it has none"),
        (lambda w, x: w @ x, "2", r"`homogeneity` is '2'; expected the degree"),
        (3, None, r"`apply` is 3; expected the function"),
        (lambda w, x: w * x, None, r"returns shape \(2,\)"),
        (lambda w, x: (w @ x).astype(complex), None, r"numbers of type complex128; expected real"),
        (lambda w, x: jnp.round(w @ x).astype(int), None, r"returns numbers of type int64"),
        (lambda w, x: w @ x[:1, None, None], None, r"`apply\(weights, x\)` raises|returns shape"),
    ],
)
def test_a_network_that_is_not_what_it_says_is_refused(apply, homogeneity, words):
    with pytest.raises(ValueError, match=words):
        gflow.Network(apply, homogeneity=homogeneity).check(np.ones(2), DATA)


def test_the_degree_of_networks_in_single_precision_is_believed():
    single = gflow.Network(
        lambda w, x: w.astype(jnp.float32) @ x.astype(jnp.float32), homogeneity=1.0
    )
    single.check(np.ones(2), DATA)


def test_several_outputs_in_single_precision_are_followed():
    inputs, classes = np.eye(3) + 0.1, np.arange(3)
    problem = gflow.Problem(
        gflow.Dataset(inputs, classes, num_classes=3),
        gflow.Network(lambda w, x: w.astype(jnp.float32) @ x.astype(jnp.float32)),
    )
    until = gflow.LogRisk(-1.0)
    single = gflow.gradient_flow(problem, 0.1 * np.eye(3), until=until, save=2, rtol=1e-5)
    assert single.attrs["status"] == "reached"
    exact = gflow.gradient_flow(
        gflow.Problem(problem.data), (0.1 * np.eye(3),), until=until, save=2
    )
    np.testing.assert_allclose(single.log_time[-1], exact.log_time[-1], rtol=1e-5)


def test_the_layers_of_an_mlp_come_back_from_a_record_with_their_biases():
    weights = (np.ones((3, 2)), (np.full((2, 3), 2.0), np.full(2, 3.0)))
    names = [f"final_weights_{k}" for k in range(1, 4)]
    leaves = jax.tree.leaves(weights)
    axes = [
        [f"{name}_{axis}" for axis in range(leaf.ndim)]
        for name, leaf in zip(names, leaves, strict=True)
    ]
    record = xr.Dataset(dict(zip(names, zip(axes, leaves, strict=True), strict=True)))
    found = gflow.MLP().weights_of(record)
    assert jax.tree.structure(found) == jax.tree.structure(weights)
    assert [np.shape(m) for m in gflow.MLP().dense_layers(found)] == [(3, 2), (2, 3)]
    with pytest.raises(ValueError, match="no 'initial_weights_1'"):
        gflow.MLP().weights_of(record, "initial")

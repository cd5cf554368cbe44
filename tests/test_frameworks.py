import re
from itertools import pairwise
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow.problem import dense, network as networks
from gflow.problem.convolutions import in_fast_layout
from gflow.report.convolutional import Convolutional

RNG = np.random.default_rng(0)
PICTURES = gflow.Dataset(RNG.normal(size=(30, 1, 8, 8)), np.arange(30) % 3, name="noise")


class Shuffled(eqx.Module):
    """Its fields are in another order than its layers; one matrix is kept the other way round."""

    out: eqx.nn.Linear
    filters: eqx.nn.Conv2d
    middle: jax.Array
    first: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.filters = eqx.nn.Conv2d(1, 2, 3, stride=2, key=a)
        self.first = eqx.nn.Linear(18, 6, key=b)
        self.middle = jax.random.normal(c, (6, 5))
        self.out = eqx.nn.Linear(5, 3, key=d)

    def __call__(self, x):
        x = jnp.tanh(self.filters(x)).reshape(-1)
        return self.out(jnp.tanh(jnp.tanh(self.first(x)) @ self.middle))


@pytest.fixture(scope="module")
def shuffled():
    network, weights = gflow.from_equinox(Shuffled(jax.random.key(0)))
    return gflow.Problem(PICTURES, network), weights


@pytest.fixture(scope="module")
def run(shuffled):
    problem, weights = shuffled
    start = gflow.init.rescaled(weights, problem, frobenius=2.0)
    until = gflow.Epochs(2)
    return gflow.gradient_descent(
        problem,
        start,
        optax.sgd(0.05, momentum=0.5),
        until=until,
        save=[0.5, 1],
        batch_size=7,
        precision="float32",
    )


def test_the_chain_is_found_in_the_order_of_use_and_the_right_way_round(shuffled):
    problem, weights = shuffled
    layers = problem.network.dense_layers(weights)
    expected = (weights.first.weight, weights.middle.T, weights.out.weight)
    for found, matrix in zip(layers, expected, strict=True):
        np.testing.assert_array_equal(found, matrix)
    names, rest = dense.names(problem.network, weights)
    assert names == [".first.weight", ".middle", ".out.weight"]
    assert rest == [".out.bias", ".filters.weight", ".filters.bias", ".first.bias"]


def test_a_record_holds_the_layers_and_the_norms_of_the_rest(run, shuffled):
    problem, _ = shuffled
    weights = problem.network.weights_of(run)
    layers = problem.network.dense_layers(weights)
    norms = [np.linalg.norm(np.float64(matrix)) for matrix in layers]
    np.testing.assert_allclose(run.frobenius_norm[-1], norms, rtol=1e-12)
    tops = [np.linalg.svd(np.float64(matrix)) for matrix in layers]
    np.testing.assert_allclose(run.spectral_norm[-1], [s[0] for _, s, _ in tops], rtol=1e-12)
    aligned = [abs(b[2][0] @ a[0][:, 0]) for a, b in pairwise(tops)]
    np.testing.assert_allclose(run.alignment[-1], aligned, rtol=1e-9)
    np.testing.assert_allclose(run.least_ratio, [6**-0.5, 5**-0.5, 3**-0.5])
    rest = (weights.out.bias, weights.filters.weight, weights.filters.bias, weights.first.bias)
    np.testing.assert_allclose(
        run.leaf_norm[-1], [np.linalg.norm(leaf) for leaf in rest], rtol=1e-6
    )
    np.testing.assert_allclose(run.frobenius_norm[0], [2.0, 2.0, 2.0], rtol=1e-6)
    assert "end_to_end" not in run
    assert len(gflow.verify(run)) == 3


def test_epochs_are_counted_and_the_precision_is_said(run):
    assert run.attrs["status"] == "reached"
    np.testing.assert_array_equal(run.num_steps, [0, 2, 4, 8])  # four batches of 7 among 30 points
    np.testing.assert_array_equal(run.num_epochs, [0, 0.5, 1, 2])
    assert run.attrs["precision"] == "float32"
    assert run.attrs["step_size"] == "nominal"
    steps = 0.05 * np.cumsum(2 - 0.5 ** np.arange(8))  # 1 + m + ... + m^j
    np.testing.assert_allclose(np.exp(run.log_time), [0, *steps[[1, 3, 7]]], rtol=1e-12)
    assert run.final_weights_1.dtype == np.float32
    assert run.log_risk.dtype == np.float64


def test_the_trained_model_comes_back_and_computes_the_recorded_risk(run, shuffled):
    problem, _ = shuffled
    model = problem.network.model(run)
    assert isinstance(model, Shuffled)
    outputs = jax.vmap(model)(jnp.asarray(PICTURES.points, jnp.float64))
    chosen = jax.nn.log_softmax(outputs)[np.arange(30), PICTURES.classes]
    np.testing.assert_allclose(np.log(-np.mean(chosen)), run.log_risk[-1], rtol=1e-5)


def test_single_precision_is_double_precision_to_single_precision(run, shuffled):
    problem, weights = shuffled
    start, until = gflow.init.rescaled(weights, problem, frobenius=2.0), gflow.Epochs(2)
    double = gflow.gradient_descent(
        problem, start, optax.sgd(0.05, momentum=0.5), until=until, save=[0.5, 1], batch_size=7
    )
    for name in (f"final_weights_{k}" for k in range(1, 8)):
        np.testing.assert_allclose(run[name], double[name], atol=1e-6)
    assert run.log_risk[-1] != double.log_risk[-1]


def test_convolutions_turned_round_are_the_same_and_so_in_the_gradient(shuffled, monkeypatch):
    problem, weights = shuffled
    model = problem.network.model(weights)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), arrays)
    points = jnp.asarray(PICTURES.points)

    def risk(arrays):
        outputs = jax.vmap(eqx.combine(arrays, rest))(points)
        chosen = jax.nn.log_softmax(outputs)[np.arange(30), PICTURES.classes]
        return jnp.log(-jnp.mean(chosen))

    value, gradient = jax.value_and_grad(risk)(arrays)
    # In one piece, and in parts of 7 points with 2 left over.
    for numbers in (networks.AT_ONCE, 7 * 64):
        monkeypatch.setattr(networks, "AT_ONCE", numbers)
        found, slope, _ = jax.jit(problem.log_risk_gradient_and_norm)(arrays)
        np.testing.assert_allclose(found, value, rtol=1e-12)
        for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    text = str(jax.make_jaxpr(in_fast_layout(jax.grad(risk)))(arrays))
    layouts = set(re.findall(r"lhs_spec=(\(.*?\)), rhs_spec=(\(.*?\)), out_spec=(\(.*?\))", text))
    assert layouts == {("(0, 3, 1, 2)", "(3, 2, 0, 1)", "(0, 3, 1, 2)")}


def test_models_that_differ_in_their_weights_only_are_one_program():
    one, other = (gflow.from_equinox(Shuffled(jax.random.key(k)))[0] for k in (0, 1))
    assert one == other
    assert hash(one.forward) == hash(other.forward)


def test_layers_of_ones_own_choice_are_observed():
    def apply(weights, x):
        return weights["b"] @ jnp.tanh(weights["a"] @ x)

    weights = {"a": RNG.normal(size=(4, 2)), "b": RNG.normal(size=4)}
    data = gflow.datasets.two_point()
    network = gflow.Network(apply, layers=lambda w: [w["a"], w["b"][None]])
    problem = gflow.Problem(data, network)
    scaled = gflow.init.rescaled(weights, problem)
    np.testing.assert_allclose([np.linalg.norm(scaled[name]) for name in "ab"], [4, 4])
    np.testing.assert_allclose(scaled["a"] / weights["a"], 4 / np.linalg.norm(weights["a"]))


class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm


def test_states_and_noise_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"a part with a state.*no gradient flow"):
        gflow.from_equinox(Stateful(eqx.nn.BatchNorm(3, "batch", mode="batch")))
    dropout = eqx.nn.Sequential([eqx.nn.Linear(2, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    with pytest.raises(ValueError, match=r"dropout that is on.*inference_mode"):
        gflow.from_equinox(dropout)
    network, _ = gflow.from_equinox(eqx.nn.inference_mode(dropout))
    assert gflow.Problem(gflow.datasets.two_point(), network).network.network.apply is not None


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda model: [], "gives no matrix"),
        (lambda model: [model.out.bias], "expected a matrix"),
        (lambda model: [model.out.weight, model.first.weight], "expected 3 columns"),
        (lambda model: [2 * model.out.weight + 1], "not entries of the weights"),
    ],
)
def test_layers_that_are_none_are_named(layers, words):
    network, weights = gflow.from_equinox(Shuffled(jax.random.key(0)), layers)
    with pytest.raises(ValueError, match=words):
        gflow.init.rescaled(weights, gflow.Problem(PICTURES, network))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(shuffled):
    problem, weights = shuffled
    with pytest.raises(ValueError, match="`model` is"):
        gflow.from_equinox(3)  # pyright: ignore
    with pytest.raises(ValueError, match="has no weights"):
        gflow.from_equinox(eqx.nn.Identity())
    with pytest.raises(ValueError, match="another structure"):
        problem.check((np.ones((3, 3)),))
    flat, start = gflow.from_equinox(eqx.nn.MLP(64, 10, 4, 1, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"^the model raises .*one point `x` of shape \(1, 8, 8\)"):
        gflow.Problem(PICTURES, flat).check(start)
    with pytest.raises(ValueError, match="expected those of the model"):
        problem.network.model([np.ones(3)])
    with pytest.raises(ValueError, match="`precision` is 'half'; expected one of"):
        gflow.gradient_descent(
            problem, weights, optax.sgd(0.1), until=gflow.Steps(1), precision="half"
        )
    with pytest.raises(ValueError, match="a flow has no epochs"):
        gflow.gradient_flow(problem, weights, until=gflow.Epochs(1))
    plain = gflow.Problem(gflow.datasets.two_point(), gflow.Network(jnp.dot))
    with pytest.raises(ValueError, match="without dense layers"):
        gflow.init.rescaled(np.ones(2), plain)


def test_flax_in_the_documentation_runs_and_its_parameters_come_back():
    pytest.importorskip("flax", reason="flax is in the extra `images`")
    page = Path(__file__).parent.parent / "docs" / "images.md"
    (code,) = re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    found = {}
    with jax.numpy_dtype_promotion("standard"):  # which flax counts on
        exec(compile(code, str(page), "exec"), found)
    run, params = found["run"], found["params"]
    assert run.sizes["layer"] == 2
    kernel = params["params"]["layers_0"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel), run.frobenius_norm[-1, 0], rtol=1e-5)
    assert run.attrs["layer_names"][0] == "['layers_0']['kernel']"


def test_batch_normalisation_of_flax_is_refused():
    nn = pytest.importorskip("flax.linen", reason="flax is in the extra `images`")
    module = nn.BatchNorm(use_running_average=False)
    variables = module.init(jax.random.key(0), jnp.ones((2, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"collection 'batch_stats'.*no gradient flow"):
        gflow.from_flax(module, variables)


def test_the_network_of_the_figure_has_the_papers_widths_by_eight():
    for shape in ((1, 8, 8), (3, 32, 32)):
        model = Convolutional(shape, 10, key=jax.random.key(0))
        assert [layer.weight.shape for layer in model.dense] == [(512, 128), (512, 512), (10, 512)]
    with pytest.raises(ValueError, match="at least 4 by 4"):
        Convolutional((1, 2, 2), 10, key=jax.random.key(0))

"""What optimisers of optax do in gflow: each its own max margin, searches on log R, large steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow

DATUM = gflow.datasets.one_datum((1.0, 0.9, 0.3))
ONE = gflow.Problem(DATUM, loss=gflow.Exponential())
LAYER = (np.array([[0.0, 0.5, 0.2]]),)

DATA = gflow.datasets.separable(n=20, d=2, margin=0.02, seed=0)
PROBLEM = gflow.Problem(DATA, loss=gflow.Logistic())
START = gflow.init.balanced((2, 4, 1), end_to_end=0.05 * DATA.max_margin().direction)

# After k steps the start is a part 1/sqrt(k) of the weights.
GEOMETRY = 0.02


def decaying(rate):
    return lambda step: rate / jnp.sqrt(1.0 + step)


def coordinate_update(gradient, state, params=None):
    (g,) = gradient
    return (jnp.where(jnp.abs(g) == jnp.max(jnp.abs(g)), -0.5 * jnp.sign(g), 0.0),), state


COORDINATE = optax.GradientTransformation(lambda params: (), coordinate_update)


@pytest.mark.parametrize(
    ("optimizer", "norm"),
    [
        (gflow.loss_scaled(0.5), 2),
        (gflow.on_log_risk(optax.sign_sgd(decaying(2.0))), math.inf),
        (optax.adam(decaying(0.5), b2=0.99, eps=1e-150), math.inf),
        (gflow.on_log_risk(COORDINATE), 1),
    ],
    ids=["descent", "sign", "adam", "coordinate"],
)
def test_every_geometry_ends_at_its_own_max_margin(optimizer, norm):
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        record = gflow.gradient_descent(ONE, LAYER, optimizer, until=gflow.Steps(20_000), save=2)
    w = record.end_to_end.values[-1]
    best = {p: gflow.max_margin(DATUM, norm=p) for p in (1, 2, math.inf)}
    gaps = {p: 1 - w @ DATUM.inputs[0] / np.linalg.norm(w, p) / best[p].margin for p in best}
    assert gaps[norm] < GEOMETRY < min(gap for p, gap in gaps.items() if p != norm)
    np.testing.assert_allclose(w / np.linalg.norm(w, norm), best[norm].direction, atol=GEOMETRY)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(20)),
        optax.adamw(1e-2, weight_decay=0.0),
        optax.contrib.muon(1e-2),
    ],
    ids=["zoom", "adamw", "muon"],
)
def test_optimisers_of_optax_go_on_far_below_underflow(optimizer):
    with jax.numpy_dtype_promotion("standard"):  # optax adds integers to floats
        record = gflow.gradient_descent(
            PROBLEM,
            START,
            gflow.on_log_risk(optimizer),
            until=gflow.LogRisk(-2000.0) | gflow.Steps(20_000),
            save=10,
        )
    assert record.attrs["status"] == "reached" and record.log_risk[-1] < -745
    assert np.all(np.isfinite(record.log_time[1:]))


def test_the_imbalance_drifts_less_than_its_bound():
    rate = 1.0
    record = gflow.gradient_descent(PROBLEM, START, optax.sgd(rate), until=gflow.Steps(3000))
    assert np.all(np.diff(record.log_risk) < 0)  # the bound holds where the risk falls
    drift = record.imbalance_drift * (record.frobenius_norm.max("layer")) ** 2
    assert 0 < drift[-1] < 2 * rate * np.exp(record.log_risk[0])


def test_the_edge_of_stability_is_left_again():
    # Along the flow eta S would pass two; descent oscillates with it near two, and S t bounded
    # lets it fall in the end.
    rate, steps = 8.8, 400
    record = gflow.gradient_descent(
        PROBLEM,
        START,
        optax.sgd(rate),
        until=gflow.Steps(steps),
        save=np.arange(1, steps + 1),
        observables={"sharpness": gflow.observables.sharpness},
    )
    stability = rate * record.sharpness.values
    above = np.nonzero(stability > 2)[0]
    up = np.nonzero(np.diff(record.log_risk) > 0)[0]
    assert len(above) > 50 and len(up) > 20 and stability.max() < 5
    assert above[-1] < 300 and up[-1] < 300
    assert stability[-1] < stability[300] < 2 and record.log_risk[-1] < -5


def test_a_step_far_too_large_diverges_with_a_finite_record():
    record = gflow.gradient_descent(PROBLEM, START, optax.sgd(17.5), until=gflow.Steps(2000))
    assert record.attrs["status"] == "diverged"
    assert "take shorter steps" in record.attrs["message"]
    for name in ("log_risk", "end_to_end", "frobenius_norm", "margin"):
        assert np.all(np.isfinite(record[name])), name


def test_one_layer_of_logistic_loss_calms_down_at_any_step():
    # Until R <= min(1/eta, l(0)/n), at most max(eta, n, (n/eta) log(n/eta))/gamma^2 steps.
    data = gflow.Dataset([[0.1, 0.9], [0.1, -0.1]], [1, 1])
    problem = gflow.Problem(data, loss=gflow.Logistic())
    for rate in (4.0, 4096.0):
        record = gflow.gradient_descent(
            problem,
            (np.zeros((1, 2)),),
            optax.sgd(rate),
            until=gflow.LogRisk(math.log(min(1 / rate, math.log(2) / 2))),
            save=2,
        )
        assert record.attrs["status"] == "reached"
        assert record.num_steps[-1] < max(rate, 2) / data.max_margin().margin ** 2

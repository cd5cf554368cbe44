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


# -- what is written by hand ----------------------------------------------------------------------


def by_hand(optimizer, steps=25):
    """The loop that one would write, compiled."""
    now = tuple(map(jnp.asarray, START))
    state = optimizer.init(now)

    @jax.jit
    def step(now, state):
        gradient = jax.grad(lambda at: jnp.exp(PROBLEM.log_risk(at)))(now)
        with jax.numpy_dtype_promotion("standard"):  # of low precision with double
            updates, state = optimizer.update(gradient, state, now)
        return optax.apply_updates(now, updates), state

    for _ in range(steps):
        now, state = step(now, state)
    return now


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adam(0.05, mu_dtype=jnp.bfloat16),
        lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float32),
        lambda: optax.contrib.sam(  # takes no extra arguments, also inside a chain
            optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2
        ),
        lambda: optax.sgd(jnp.array([0.1])),
    ],
    ids=["bfloat16", "float32", "sam", "rate of shape (1,)"],
)
def test_descent_makes_the_steps_of_a_loop_by_hand(make):
    with jax.numpy_rank_promotion("allow"):  # for the rate
        found = gflow.gradient_descent(PROBLEM, START, make(), until=gflow.Steps(25), save=3)
        expected = by_hand(make())
    for k, layer in enumerate(expected, start=1):
        np.testing.assert_allclose(found[f"final_weights_{k}"], layer, rtol=0, atol=1e-14)


def test_members_with_states_of_low_precision_make_the_steps_that_they_make_alone():
    makers = [optax.adam(rate, mu_dtype=jnp.bfloat16) for rate in (0.02, 0.05)]
    batch = tuple(np.stack([layer, layer]) for layer in START)
    found = gflow.ensemble(PROBLEM, batch, makers, until=gflow.Steps(25), save=3)
    for k, layer in enumerate(by_hand(makers[1]), start=1):
        np.testing.assert_allclose(found[f"final_weights_{k}"][1], layer, rtol=0, atol=1e-14)


def test_time_passes_for_a_projected_descent():
    data = gflow.Dataset(np.abs(DATA.inputs) + 0.1, np.ones(20))
    kept = optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())
    start = (np.array([[0.1, 0.2]]),)
    found = gflow.gradient_descent(gflow.Problem(data), start, kept, until=gflow.Steps(50), save=3)
    assert found.attrs["status"] == "reached" and found.attrs["step_size"] == "measured"
    # The projection changes nothing here: it is plain descent, whose steps are 0.1.
    np.testing.assert_allclose(np.exp(found.log_time[1:]), 0.1 * found.num_steps[1:], rtol=1e-12)


def test_decay_of_the_weights_leaves_the_nominal_time():
    found = gflow.gradient_descent(
        PROBLEM, START, optax.adamw(0.05, weight_decay=0.1), until=gflow.Steps(4), save=2
    )
    assert found.attrs["step_size"] == "nominal"
    assert found.log_step_size[-1] == pytest.approx(math.log(0.05), rel=1e-6)


def test_a_schedule_that_ends_at_zero_is_not_said_to_go_uphill():
    # Schedules count in float32 and end at -1.5e-9 instead of zero.
    falling = optax.sgd(optax.linear_schedule(0.1, 0.0, 20))
    found = gflow.gradient_descent(PROBLEM, START, falling, until=gflow.Steps(25), save=3)
    assert "uphill" not in found.attrs["message"]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), "as the pairs of optax.lookahead, cannot be run"),
        (optax.sgd(jnp.full((1, 1, 1), 0.1)), "an array of shape|cannot make a step"),
        (optax.sgd(jnp.ones(3)), "cannot make a step"),
        (optax.masked(optax.sgd(0.1), {"a": True}), "cannot be started: its `init` raises"),
    ],
)
def test_optimisers_that_cannot_run_are_refused_in_words(optimizer, words):
    with pytest.raises(ValueError, match=f"`optimizer`.*({words})"):
        gflow.gradient_descent(PROBLEM, START, optimizer, until=gflow.Steps(5))

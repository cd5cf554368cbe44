"""The ladder's orders, and the modified flows against closed forms and independent derivatives."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gflow
from gflow.dynamics.modified import ModifiedField

DATA = gflow.datasets.separable(n=8, d=2, margin=0.2, seed=1)
PROBLEM = gflow.Problem(DATA, loss=gflow.Exponential())
WEIGHTS = gflow.init.admissible(gflow.init.gaussian((2, 3, 2, 1), seed=0), PROBLEM)
TIME = 2.0
STEPS = np.array([100, 50, 25])

DATUM = np.array([0.6, 0.5, -0.3])
ONE_DATUM = gflow.Problem(gflow.Dataset([DATUM], [1]), loss=gflow.Exponential())
LINEAR = (0.3 * DATUM[None],)

# The promise; the orders are limits, missed by a multiple of the largest rate.
WITHIN = 0.03

# A hundred times the tolerance of the flows in the ladder, relative to gaps of 1e-7 and more.
GAP_DIGITS = 1e-3

# A hundred times the tolerance of a step, for small differences of weights of size ten.
SOLVERS = 1e-7

# A hundred round-offs, of derivatives of order one.
DERIVATIVES = 1e-14


@pytest.fixture(scope="module")
def measured():
    return gflow.ladder(PROBLEM, WEIGHTS, TIME / STEPS[::-1], TIME)


def test_descent_follows_the_flow_and_the_modified_flows_at_orders_one_two_three(measured):
    assert measured.attrs["status"] == "reached"
    assert measured.order.sizes == {"model": 3}
    np.testing.assert_allclose(measured.order, [1, 2, 3], atol=WITHIN)
    np.testing.assert_allclose(measured.local_order, [[1, 2, 3]] * 2, atol=WITHIN)


def test_richardson_extrapolation_has_order_two(measured):
    assert abs(measured.richardson_order - 2) < WITHIN


def test_the_ladder_is_labelled(measured):
    np.testing.assert_allclose(measured.learning_rate, TIME / STEPS, rtol=1e-15)
    np.testing.assert_array_equal(measured.num_steps, STEPS)
    assert measured.model.values.tolist()[0] == "flow"
    assert measured.gap.dims == measured.direction_gap.dims == ("learning_rate", "model")
    assert (measured.gap > measured.attrs["floor"]).all()
    assert measured.attrs["time"] == TIME and "jax_version" in measured.attrs


def test_the_gap_is_that_of_a_plain_loop(measured):
    z = DATA.signed_inputs
    first, second, third = WEIGHTS
    rate = TIME / STEPS[0]
    for _ in range(STEPS[0]):
        pull = z.T @ np.exp(-z @ (third @ second @ first)[0]) / len(z)
        first, second, third = (
            first + rate * np.outer((third @ second)[0], pull),
            second + rate * np.outer(third[0], first @ pull),
            third + rate * (second @ first @ pull)[None],
        )
    flow = gflow.gradient_flow(
        PROBLEM, WEIGHTS, until=gflow.Time(TIME), save=2, solver=diffrax.Dopri8(), rtol=1e-12
    )
    ends = [flow[f"final_weights_{k}"].values for k in (1, 2, 3)]
    squares = [np.sum((a - b) ** 2) for a, b in zip(ends, (first, second, third), strict=True)]
    np.testing.assert_allclose(measured.gap[0, 0], np.sqrt(np.sum(squares)), rtol=GAP_DIGITS)


@pytest.mark.parametrize(
    ("until", "clock", "solver"),
    [
        (gflow.Time(50.0), gflow.clocks.Time(), diffrax.Dopri8()),
        (gflow.LogRisk(-8.0), gflow.clocks.Risk(), diffrax.Dopri8()),
        (gflow.Time(50.0), gflow.clocks.LogTime(), gflow.GaussNewton()),
    ],
    ids=["Time", "Risk", "GaussNewton"],
)
def test_the_modified_flow_of_one_datum_follows_its_closed_form(until, clock, solver):
    rate = 0.7
    record = gflow.gradient_flow(
        ONE_DATUM,
        LINEAR,
        until=until,
        clock=clock,
        save=4,
        solver=solver,
        modified=gflow.ModifiedEquation(rate),
        rtol=1e-11,
    )
    assert record.attrs["status"] == "reached" and record.attrs["kind"] == "modified flow"
    h = rate * DATUM @ DATUM
    y = np.exp(record.end_to_end.values @ DATUM)
    conserved = y - h / 2 * np.log1p(2 * y / h) - h / rate * np.exp(record.log_time.values)
    np.testing.assert_allclose(conserved, conserved[0], rtol=1e-8)
    if isinstance(clock, gflow.clocks.Risk):
        assert record.clock_error.max() < 1e-9


def test_modified_flows_go_to_any_horizon_by_the_solvers_of_the_plain_one():
    modified = gflow.ModifiedEquation(0.3)
    save = [-5.0, -20.0, -1e4, -1e5]

    def follow(until, **options):
        return gflow.gradient_flow(
            PROBLEM, WEIGHTS, until=until, modified=modified, save=save, **options
        )

    alone = follow(gflow.LogRisk(save[-1]), solver=gflow.GaussNewton())
    default = follow(gflow.LogRisk(-1e8))
    assert default.attrs["status"] == "reached"
    assert default.attrs["solver"] == "Dopri8, then GaussNewton, then SlowManifold"
    for name in ("end_to_end", "log_time", "misalignment", "frobenius_norm"):
        a, b = alone[name].values[1:], default[name].values[1 : len(save) + 1]
        np.testing.assert_allclose(a, b, rtol=SOLVERS)


def test_the_modified_fields_are_the_derivatives_of_the_risk():
    weights = (WEIGHTS[0], WEIGHTS[2] @ WEIGHTS[1])
    flat, shape = ravel_pytree(weights)
    rate = 0.3

    @jax.jit
    def by_differentiation(at):
        slope = jax.grad(lambda at: jnp.exp(PROBLEM.log_risk(shape(at))))

        def bend(direction, at):
            return jax.jvp(slope, (at,), (direction,))[1]

        g = slope(at)
        hessian = jax.vmap(bend, (0, None))(jnp.eye(at.size), at)
        third = jax.jvp(lambda at: bend(g, at), (at,), (g,))[1]
        first_order = g + rate / 2 * hessian @ g
        return g, first_order, first_order + rate**2 * (third / 12 + hessian @ hessian @ g / 3)

    g, *expected = by_differentiation(flat)
    for order, field in enumerate(expected, start=1):
        modified = ModifiedField(
            PROBLEM, gflow.clocks.LogRisk(), gflow.ModifiedEquation(rate, order)
        )
        log_risk, direction, descent = eqx.filter_jit(modified.direction)(weights)
        risk = np.exp(log_risk)
        np.testing.assert_allclose(ravel_pytree(direction)[0] * risk, field, atol=DERIVATIVES)
        np.testing.assert_allclose(descent * risk**2, field @ g, rtol=DERIVATIVES)


def test_far_out_the_modified_field_is_that_of_the_flow():
    far = (1e4 * DATUM[None],)
    modified = ModifiedField(ONE_DATUM, gflow.clocks.LogRisk(), gflow.ModifiedEquation(0.3))
    _, plain = ONE_DATUM.log_risk_and_gradient(far)
    _, direction, _ = eqx.filter_jit(modified.direction)(far)
    np.testing.assert_array_equal(direction[0], plain[0])


@pytest.mark.parametrize(
    ("rates", "time", "message"),
    [
        ([0.1], 1.0, "`learning_rates` is .0.1.; expected at least two different"),
        ([0.1, 0.1], 1.0, "at least two different"),
        ([0.1, -0.2], 1.0, r"`learning_rates\[1\]` is -0.2; expected a positive finite number"),
        ([0.1, 0.3], 1.0, "`learning_rates` has 0.3, .* 0.25 and 0.333333333333"),
        ([0.1, 2.0], 1.0, "`learning_rates` has 2, .* nearest .* 1"),
        ([0.1, 0.2], np.inf, "`time` is inf"),
    ],
)
def test_the_ladder_refuses_rates_that_give_no_order(rates, time, message):
    with pytest.raises(ValueError, match=message):
        gflow.ladder(PROBLEM, WEIGHTS, rates, time)


def test_a_modified_equation_needs_a_step_and_an_order():
    with pytest.raises(ValueError, match="`step` is 0"):
        gflow.ModifiedEquation(0.0)
    with pytest.raises(ValueError, match="`order` is 3; expected 1 or 2"):
        gflow.ModifiedEquation(0.1, 3)


def test_split_coordinates_are_for_where_the_modified_flow_is_the_plain_one(unchecked):
    with pytest.raises(ValueError, match=r"`solver` is SlowManifold.* still adds"):
        gflow.gradient_flow(
            PROBLEM,
            WEIGHTS,
            until=gflow.Time(1.0),
            solver=gflow.SlowManifold(),
            modified=gflow.ModifiedEquation(0.1),
        )


def test_a_step_too_large_for_the_expansion_is_refused():
    # Near the saddle at zero the curvature along the gradient is negative.
    small = tuple(0.3 * matrix for matrix in WEIGHTS)
    with pytest.raises(ValueError, match="`modified` has step 1000"):
        gflow.gradient_flow(
            PROBLEM, small, until=gflow.Time(1.0), modified=gflow.ModifiedEquation(1000.0)
        )


def test_a_modified_flow_that_ceases_to_lower_the_risk_says_so():
    record = gflow.gradient_flow(
        PROBLEM,
        WEIGHTS,
        until=gflow.Time(TIME),
        save=2,
        solver=diffrax.Dopri8(),
        modified=gflow.ModifiedEquation(30.0, 2),
    )
    assert record.attrs["status"] == "stalled"
    assert "ceases to lower the risk" in record.attrs["message"]

import math

import numpy as np
import optax
import pytest

import gflow
from gflow.dynamics.stops import Coordinates, as_rules, save_grid

HERE = Coordinates(
    log_risk=np.float64(-3.0),
    log_time=np.float64(math.log(5.0)),
    num_steps=np.int64(7),
    small={"misalignment": np.float64(1e-3)},
)


@pytest.mark.parametrize(
    "rule",
    [
        gflow.LogRisk(-3.0),
        gflow.Time(5.0),
        gflow.LogTime(math.log(5.0)),
        gflow.Steps(7),
        gflow.Misalignment(1e-3),
    ],
)
def test_a_rule_is_just_met_at_its_own_value(rule):
    np.testing.assert_allclose(float(rule.progress(HERE)), rule.goal, rtol=1e-14)


@pytest.mark.usefixtures("unchecked")
def test_rules_join_with_a_bar_and_keep_their_order():
    a, b, c = gflow.LogRisk(-1), gflow.Steps(3), gflow.Time(2)
    assert as_rules(a | b | c) == as_rules(a | (b | c)) == (a, b, c)
    with pytest.raises(TypeError):
        a | 3  # pyright: ignore


def test_points_are_saved_at_given_values_and_at_the_end():
    grid = save_grid(gflow.LogRisk(-100), 0.3, np.array([-1.0, -10.0]))
    np.testing.assert_allclose(-np.sinh(grid), [-1, -10, -100])


def test_a_number_of_points_counts_both_ends():
    assert len(save_grid(gflow.Time(10.0), 0.0, 5)) == 4


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (1, "at least 2 points"),
        (2.5, "at least 2 points"),
        ([[-1.0]], "1-d"),
        ([-1.0, np.nan], "not finite"),
        ([-10.0, -1.0], "not strictly ordered"),
        ([-10.0, -1000.0], "beyond the stopping rule"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_saved_points_are_named(save, words):
    with pytest.raises(ValueError, match=words):
        save_grid(gflow.LogRisk(-100), 0.0, save if np.ndim(save) == 0 else np.asarray(save))


@pytest.mark.parametrize(
    "make",
    [
        lambda: gflow.LogRisk(math.nan),
        lambda: gflow.Time(-1.0),
        lambda: gflow.LogTime(math.inf),
        lambda: gflow.Steps(0),
        lambda: gflow.Steps(2.5),
        lambda: gflow.Misalignment(1.5),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_goals_are_refused(make):
    with pytest.raises(ValueError, match="expected a"):
        make()


@pytest.mark.usefixtures("unchecked")
def test_something_else_than_a_rule_is_named():
    with pytest.raises(ValueError, match="`until` is -100"):
        as_rules(-100)  # pyright: ignore


@pytest.mark.parametrize("rule", [gflow.MarginGap(1e-3), gflow.KKT(0.1)])
@pytest.mark.parametrize("far", [False, True], ids=["weights", "split"])
def test_rules_on_small_variables_stop_where_they_are_met(rule, far):
    data = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.admissible(gflow.init.gaussian((2, 3, 1), seed=0), problem)
    if far:
        rule = type(rule)(1e-9 if rule.variable == "margin_gap" else 3e-4)
    record = gflow.gradient_flow(problem, weights, until=rule, save=2)
    assert record.attrs["status"] == "reached"
    assert record[rule.variable][-1] == pytest.approx(rule.value, rel=1e-9)
    assert bool(record.beyond_hand_over[-1]) == far


def test_points_saved_within_steps_are_landed_on_and_change_no_step():
    data = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.admissible(gflow.init.gaussian((2, 3, 1), seed=0), problem)
    few, many = (
        gflow.gradient_flow(problem, weights, until=gflow.MarginGap(1e-3), save=save)
        for save in (2, 80)
    )
    gap, steps = many.margin_gap.values, many.num_steps.values
    assert steps[-1] == few.num_steps[-1] < 80
    assert many.final_weights_1.equals(few.final_weights_1)
    np.testing.assert_allclose(gap[1:], np.geomspace(gap[0], 1e-3, 80)[1:], rtol=1e-11)
    assert np.all(np.diff(many.log_time[1:]) > 0)
    assert np.all(np.diff(steps) >= 0)
    # Four trials each of 26: not thirty, as where every trial halves the miss.
    spent = [record.attrs["num_field_evaluations"] for record in (few, many)]
    assert spent[1] < 160 * 80 + spent[0]


def test_a_log_risk_with_the_wrong_sign_is_doubted():
    with pytest.warns(UserWarning, match=r"is it LogRisk\(-50\)"):
        as_rules(gflow.LogRisk(50) | gflow.Steps(3))
    as_rules(gflow.LogRisk(5.0))  # which some start may be above


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [None, "5", np.nan, np.inf, [5], True, np.ma.masked, 1j])
@pytest.mark.parametrize(
    "rule",
    [gflow.LogRisk, gflow.Time, gflow.LogTime, gflow.Steps, gflow.Misalignment, gflow.KKT],
)
def test_what_is_no_number_is_no_goal(rule, value):
    with pytest.raises(ValueError, match=rf"`{rule.__name__}\("):
        rule(value)


@pytest.mark.filterwarnings("ignore:.*exceeds R")
def test_rules_say_what_a_network_lacks_for_them_and_work_where_it_does_not():
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
    data = gflow.datasets.separable(n=12, d=2, margin=0.2, seed=1)

    def apply(weights, x):
        return weights["b"] @ (weights["a"] @ x)

    def problem(degree):
        return gflow.Problem(data, gflow.Network(apply, degree), gflow.Exponential())

    def descend(of, rule):
        return gflow.gradient_descent(of, start, optax.sgd(0.1), until=rule)

    def follow(of, rule):
        return gflow.gradient_flow(of, start, until=rule, save=3)

    for verb in (descend, follow):
        for rule in (gflow.Misalignment(0.1), gflow.MarginGap(0.1)):
            with pytest.raises(ValueError, match="layers of a product of matrices"):
                verb(problem(2.0), rule)
        with pytest.raises(ValueError, match="needs a homogeneous network"):
            verb(problem(None), gflow.KKT(0.1))
    flow = follow(problem(2.0), gflow.KKT(0.5))
    assert flow.attrs["status"] == "reached"
    np.testing.assert_allclose(flow.kkt_residual[-1], 0.5, rtol=1e-10)

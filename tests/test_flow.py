"""The flow against closed forms, invariants, an independent integrator, and wrong input."""

import functools
import subprocess
import sys
import textwrap

import diffrax
import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gflow
from gflow.dynamics.drive import flow_lanes, memory_maps

DATA = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
WEIGHTS = gflow.init.admissible(
    gflow.init.gaussian((2, 4, 3, 1), seed=0), gflow.Problem(DATA, loss=gflow.Logistic())
)

# What the default tolerances promise: eight correct digits of every observable.
DIGITS = 1e-8


LOSSES = {"exponential": gflow.Exponential(), "logistic": gflow.Logistic()}


@functools.cache
def solved(loss):
    problem = gflow.Problem(DATA, loss=LOSSES[loss])
    return problem, gflow.gradient_flow(
        problem, WEIGHTS, until=gflow.LogRisk(-300), save=[-1, -5, -20, -100], keep_weights=True
    )


@pytest.fixture(scope="module", params=["exponential", "logistic"])
def flow_of_either_loss(request):
    return solved(request.param)


@pytest.fixture(scope="module")
def flow():
    return solved("logistic")


def test_the_flow_reaches_its_goal_and_steps_onto_every_saved_point(flow_of_either_loss):
    _, record = flow_of_either_loss
    assert record.attrs["status"] == "reached"
    np.testing.assert_allclose(record.log_risk[1:], [-1, -5, -20, -100, -300], rtol=1e-9)
    assert record.clock_error.max() < 1e-9


def test_the_imbalance_is_conserved(flow_of_either_loss):
    _, record = flow_of_either_loss
    assert record.imbalance_drift.max() < 1e-9


def test_risk_falls_and_smoothed_margin_rises(flow_of_either_loss):
    _, record = flow_of_either_loss
    assert (record.log_risk.diff("point") < 0).all()
    # Lyu and Li's theorem holds from where the sum of the losses is below l(0).
    below = record.log_risk + np.log(DATA.num_points) < record.attrs["log_risk_at_zero"]
    assert (record.smoothed_margin[below].diff("point") > 0).all()
    assert (record.margin <= record.attrs["margin_upper_bound"]).all()


def test_an_independent_integrator_in_physical_time_agrees(flow_of_either_loss):
    problem, record = flow_of_either_loss
    end = 2  # log R = -5, where plain arithmetic still holds
    z, n = DATA.signed_inputs, DATA.num_points
    shapes = [matrix.shape for matrix in WEIGHTS]
    cuts = np.cumsum([matrix.size for matrix in WEIGHTS])[:-1]
    slope = {"exponential": lambda q: np.exp(-q), "logistic": lambda q: 1 / (1 + np.exp(q))}

    def field(_, flat):
        a, b, c = (part.reshape(s) for part, s in zip(np.split(flat, cuts), shapes, strict=True))
        pull = z.T @ slope[problem.loss.name](z @ (c @ b @ a)[0]) / n  # minus the gradient in w
        parts = (np.outer((c @ b)[0], pull), np.outer(c[0], a @ pull), (b @ a @ pull)[None])
        return np.concatenate([part.ravel() for part in parts])

    start = np.concatenate([matrix.ravel() for matrix in WEIGHTS])
    time = float(np.exp(record.log_time[end]))
    solution = solve_ivp(field, (0, time), start, method="DOP853", rtol=1e-12, atol=1e-13)
    ours = np.concatenate([np.ravel(record[f"weights_{k}"][end]) for k in (1, 2, 3)])
    np.testing.assert_allclose(ours, solution.y[:, -1], atol=DIGITS * np.abs(ours).max())


def test_all_clocks_walk_the_same_path(flow):
    problem, record = flow
    time = float(np.exp(record.log_time[2]))
    for clock in (gflow.clocks.Time(), gflow.clocks.LogTime(), gflow.clocks.Risk()):
        other = gflow.gradient_flow(
            problem,
            WEIGHTS,
            until=gflow.Time(time),
            save=2,
            clock=clock,
            solver=diffrax.Dopri8(),
            rtol=1e-11,
        )
        np.testing.assert_allclose(other.log_risk[-1], record.log_risk[2], rtol=DIGITS)
        np.testing.assert_allclose(other.log_time[-1], np.log(time), rtol=1e-11)
        np.testing.assert_allclose(
            other.end_to_end[-1], record.end_to_end[2], rtol=DIGITS, err_msg=clock.name
        )


def test_continuing_from_the_middle_is_the_same_flow(flow):
    problem, record = flow
    middle = tuple(np.asarray(record[f"weights_{k}"][3]) for k in (1, 2, 3))
    rest = gflow.gradient_flow(problem, middle, until=gflow.LogRisk(-300), save=2)
    np.testing.assert_allclose(rest.end_to_end[-1], record.end_to_end[-1], rtol=DIGITS)
    total = np.logaddexp(record.log_time[3], rest.log_time[-1])
    np.testing.assert_allclose(total, record.log_time[-1], rtol=DIGITS)


def test_a_looser_tolerance_gives_a_proportionally_larger_error(flow_of_either_loss):
    problem, record = flow_of_either_loss
    errors = []
    for rtol in (1e-4, 1e-6, 1e-8):
        loose = gflow.gradient_flow(
            problem, WEIGHTS, until=gflow.LogRisk(-5), save=2, rtol=rtol, solver=diffrax.Tsit5()
        )
        errors.append(float(np.abs(loose.end_to_end[-1] - record.end_to_end[2]).max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize(
    "solver", [diffrax.Tsit5(), diffrax.Kvaerno3()], ids=["explicit", "implicit"]
)
def test_the_solver_may_be_any_adaptive_one_of_diffrax(flow, solver):
    # The root finder of the second takes its tolerances from the steps.
    problem, record = flow
    given = {"until": gflow.LogRisk(-5), "save": 2, "rtol": 1e-8}
    other = gflow.gradient_flow(problem, WEIGHTS, solver=solver, **given)
    assert other.attrs["solver"] == type(solver).__name__
    np.testing.assert_allclose(other.end_to_end[-1], record.end_to_end[2], rtol=1e-6)


# Closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("log_risks", [[-10.0, -100.0, -1000.0]])
def test_one_datum_and_one_layer_follow_the_closed_form(log_risks):
    z = np.array([0.6, 0.5, -0.3])
    problem = gflow.Problem(gflow.Dataset([z], [1]), loss=gflow.Exponential())
    start = np.array([0.1, 0.2, 0.3])
    record = gflow.gradient_flow(
        problem, (start[None],), until=gflow.LogRisk(-1000), save=log_risks
    )
    # w(t) = w0 + z/|z|^2 (q - q0), R = 1/(e^q0 + |z|^2 t), so q = -log R.
    q0, size = z @ start, z @ z
    q = np.array(log_risks)
    expected = start - np.outer(q + q0, z) / size
    np.testing.assert_allclose(record.end_to_end[1:], expected, rtol=DIGITS)
    log_time = -q - np.log(size) + np.log1p(-np.exp(q0 + q))
    np.testing.assert_allclose(record.log_time[1:], log_time, rtol=DIGITS)


def test_a_saddle_to_come_stalls_with_a_reason_and_everything_so_far():
    problem = gflow.Problem(gflow.Dataset([[1.0]], [1]), loss=gflow.Exponential())
    weights = (np.array([[1.0]]), np.array([[-1.0]]))  # runs into (0, 0), where R = 1
    with pytest.warns(UserWarning, match="assumption"):
        record = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-5), save=4)
    assert record.attrs["status"] == "stalled"
    assert "saddle" in record.attrs["message"]
    assert np.isfinite(record.log_risk).all()
    np.testing.assert_allclose(record.log_risk[-1], 0.0, atol=1e-6)


def test_a_flow_that_leaves_float64s_resolution_goes_on_in_split_coordinates(flow_of_either_loss):
    problem, _ = flow_of_either_loss
    record = gflow.gradient_flow(problem, WEIGHTS, until=gflow.LogRisk(-1e30), save=12)
    assert record.attrs["status"] == "reached"
    assert record.attrs["hand_over"] == "made"
    errors = [record.attrs[f"hand_over_error_{name}"] for name in ("misalignment", "rank_one_gap")]
    assert max(errors) < DIGITS
    np.testing.assert_allclose(record.log_risk[-1], -1e30, rtol=1e-12)
    assert record.beyond_hand_over[-1] == 1
    # The products with powers of -log R have become constants (three layers).
    s = -record.log_risk[-3:]
    for name, power in (("misalignment", 4 / 3), ("rank_one_gap", 2 / 3), ("direction_error", 1)):
        constant = record[name][-3:] * s**power
        np.testing.assert_allclose(constant - constant[-1], 0.0, atol=1e-4 * np.abs(constant).max())
    assert record.imbalance_drift.max() < 1e-9


# Stopping -----------------------------------------------------------------------------------


def test_the_first_rule_that_is_met_stops_the_run(flow):
    problem, _ = flow
    until = gflow.LogRisk(-300) | gflow.Misalignment(1e-2) | gflow.Time(1e9)
    record = gflow.gradient_flow(problem, WEIGHTS, until=until, save=10)
    assert record.attrs["message"].startswith("Misalignment(0.01)")
    np.testing.assert_allclose(record.misalignment[-1].max(), 1e-2, rtol=1e-9)


def test_steps_are_counted(flow):
    problem, _ = flow
    record = gflow.gradient_flow(problem, WEIGHTS, until=gflow.Steps(9), save=[3, 5])
    np.testing.assert_array_equal(record.num_steps, [0, 3, 5, 9])


def test_an_exhausted_budget_says_so_and_keeps_what_it_has(flow):
    problem, _ = flow
    record = gflow.gradient_flow(problem, WEIGHTS, until=gflow.LogRisk(-300), max_steps=30)
    assert record.attrs["status"] == "max_steps"
    assert record.num_steps[-1] + record.attrs["num_rejected"] == 30
    assert record.sizes["point"] > 2


def test_a_goal_that_is_met_at_the_start_returns_the_start(flow):
    problem, _ = flow
    record = gflow.gradient_flow(problem, WEIGHTS, until=gflow.LogRisk(5.0))
    assert record.sizes["point"] == 1
    assert "met at the start" in record.attrs["message"]


def test_an_interrupted_run_returns_what_was_done(flow, monkeypatch):
    problem, _ = flow
    calls = iter(range(100))
    march = flow_lanes.march

    def interrupted(*args, **options):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return march(*args, **options)

    monkeypatch.setattr(flow_lanes, "march", interrupted)
    monkeypatch.setattr(flow_lanes, "TRIPS_AT_FIRST", 1)
    monkeypatch.setattr("gflow.dynamics.drive.progress.SECONDS_A_CALL", 0.0)  # a step a call
    record = gflow.gradient_flow(
        problem, WEIGHTS, until=gflow.LogRisk(-300), save=[-1, -5, -20, -100]
    )
    assert record.attrs["status"] == "interrupted"
    assert 0 < record.num_steps[-1] <= 10 and np.isfinite(record.end_to_end).all()


def test_a_near_risk_is_reached_by_explicit_steps_as_exactly(flow):
    problem, far = flow
    near = gflow.gradient_flow(problem, WEIGHTS, until=gflow.LogRisk(-20), save=[-1, -5])
    assert (near.attrs["solver"], far.attrs["solver"]) == ("Dopri8", "GaussNewton")
    for name in ("log_time", "direction_error", "misalignment", "frobenius_norm"):
        np.testing.assert_allclose(near[name][1:], far[name][1:4], rtol=1e-9, err_msg=name)


def test_a_near_risk_that_is_not_near_is_left_to_the_implicit_solver(flow, monkeypatch):
    problem, far = flow
    monkeypatch.setattr("gflow.dynamics.flow.PATIENCE", 10)
    near = gflow.gradient_flow(problem, WEIGHTS, until=gflow.LogRisk(-20), save=[-1, -5])
    assert near.attrs["solver"] == "Dopri8, then GaussNewton"
    np.testing.assert_allclose(near.log_time[1:], far.log_time[1:4], rtol=1e-9)


def test_a_run_in_pieces_is_the_run_in_one_bit_for_bit(flow, monkeypatch):
    problem, _ = flow
    arguments = {"until": gflow.LogRisk(-20), "save": 3}
    whole = gflow.gradient_flow(problem, WEIGHTS, **arguments)
    monkeypatch.setattr(flow_lanes, "TRIPS_AT_FIRST", 7)
    monkeypatch.setattr("gflow.dynamics.drive.progress.SECONDS_A_CALL", 0.0)
    pieces = gflow.gradient_flow(problem, WEIGHTS, **arguments)
    np.testing.assert_array_equal(whole.end_to_end, pieces.end_to_end)


# Use and misuse -------------------------------------------------------------------------------


def test_observables_of_ones_own_are_recorded(flow):
    problem, _ = flow
    record = gflow.gradient_flow(
        problem,
        WEIGHTS,
        until=gflow.LogRisk(-5),
        save=3,
        observables={"gradient_alignment": gflow.observables.gradient_alignment},
    )
    assert record.gradient_alignment.dims == ("point",)
    assert record.gradient_alignment[-1] > record.gradient_alignment[0]


def test_a_general_network_walks_the_same_path(flow):
    problem, record = flow

    def apply(weights, x):
        return (weights["c"] @ (weights["b"] @ (weights["a"] @ x)))[0]

    general = gflow.Problem(DATA, gflow.Network(apply, 3), problem.loss)
    start = dict(zip("abc", WEIGHTS, strict=True))
    other = gflow.gradient_flow(general, start, until=gflow.LogRisk(-5), save=2)
    np.testing.assert_allclose(other.log_time[-1], record.log_time[2], rtol=DIGITS)
    np.testing.assert_allclose(other.final_weights_1, record.weights_1[2], atol=DIGITS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rtol": 1e-16}, "`rtol` is 1e-16"),
        ({"rtol": 2.0}, "`rtol` is 2.0"),
        ({"atol": -1.0}, "`atol` is -1.0"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"max_steps": "many"}, "`max_steps` is 'many'"),
        ({"save": 1}, "`save` is 1"),
        ({"save": "all"}, "`save` is 'all'"),
        ({"solver": "Tsit5"}, "`solver` is a str; expected an adaptive solver"),
        ({"solver": gflow.GaussNewton}, "`solver` is the class GaussNewton"),
        ({"clock": gflow.clocks.Time}, "`clock` is the class Time; expected a clock"),
        ({"observables": {"margin": lambda problem, weights: 0.0}}, "does not use already"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        gflow.gradient_flow(gflow.Problem(DATA), WEIGHTS, until=gflow.LogRisk(-2), **arguments)


@pytest.mark.parametrize("verb", [gflow.gradient_flow, gflow.gradient_descent])
@pytest.mark.usefixtures("unchecked")
def test_data_in_the_place_of_a_problem_are_told_what_to_do(verb):
    with pytest.raises(ValueError, match=r"`problem` is a Dataset; .* `gflow.Problem\(data"):
        verb(DATA, WEIGHTS, *[None] * (verb is gflow.gradient_descent), until=gflow.Steps(2))


def test_the_verbs_compute_in_float64_and_leave_the_global_setting_alone():
    script = """
        import warnings
        warnings.simplefilter("error")
        import jax, numpy as np
        import gflow
        data = gflow.datasets.one_datum()
        problem = gflow.Problem(data, loss=gflow.Exponential())
        weights = gflow.init.balanced((3, 2, 1), end_to_end=0.1 * data.signed_inputs[0])
        record = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-50), save=3)
        assert record.end_to_end.dtype == np.float64
        assert record.clock_error.max() < 1e-9, record.clock_error
        assert not jax.config.jax_enable_x64
        assert jax.numpy.ones(()).dtype == "float32"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_the_field_is_an_ordinary_diffrax_term(flow):
    problem, record = flow
    field = gflow.FlowField(problem, gflow.clocks.LogRisk())
    start = float(field.clock.read(float(record.log_risk[0]), -np.inf))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        t0=start,
        t1=np.arcsinh(5.0),
        dt0=1e-3,
        y0=gflow.FlowState(jax.tree.map(jax.numpy.asarray, WEIGHTS), jax.numpy.zeros(())),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
    )
    weights = [leaf[-1] for leaf in solution.ys.weights]
    np.testing.assert_allclose(
        gflow.observables.end_to_end(weights), record.end_to_end[2], rtol=DIGITS
    )


LOG_RISKS = [-10.0, -100.0, -1000.0]


@pytest.mark.parametrize("loss", [gflow.Exponential(), gflow.Logistic()], ids=lambda p: p.name)
def test_three_balanced_layers_on_one_datum_follow_the_closed_form(loss):
    z = np.array([0.6, 0.5, -0.3])
    problem = gflow.Problem(gflow.Dataset([z], [1]), loss=loss)
    start = 0.3 * z / np.linalg.norm(z)
    weights = gflow.init.balanced((3, 2, 2, 1), end_to_end=start)
    record = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-1000), save=LOG_RISKS)
    exact = gflow.exact.one_datum_balanced(z, 0.3, 3, loss=loss, log_risk=LOG_RISKS)
    np.testing.assert_allclose(record.end_to_end[1:], exact.end_to_end, rtol=DIGITS)
    np.testing.assert_allclose(record.log_time[1:], exact.log_time, rtol=DIGITS)


def test_weighted_two_point_data_follow_the_closed_form():
    problem = gflow.Problem(gflow.datasets.two_point(), loss=gflow.Exponential())
    start = np.array([0.3, -0.4])
    record = gflow.gradient_flow(
        problem, (start[None],), until=gflow.LogRisk(-1000), save=LOG_RISKS
    )
    exact = gflow.exact.two_point_linear((0.8, 0.5), (3, 1), start, log_risk=LOG_RISKS)
    np.testing.assert_allclose(record.end_to_end[1:], exact.end_to_end, rtol=DIGITS)
    np.testing.assert_allclose(record.log_time[1:], exact.log_time, rtol=DIGITS)


@pytest.mark.skipif(not memory_maps.MAPS.exists(), reason="only Linux has such a limit")
def test_compiled_programs_are_dropped_before_a_process_has_too_many_memory_maps(monkeypatch):
    problem, start = gflow.Problem(DATA, loss=gflow.Logistic()), (np.array([[0.1, 0.2]]),)
    options = {"until": gflow.LogRisk(-5), "save": 2, "solver": diffrax.Tsit5()}

    def follow():
        return gflow.gradient_flow(problem, start, **options)

    before, compiled = follow(), jax.jit(lambda x: x + 1)
    compiled(1.0)
    assert compiled._cache_size() == 1
    follow()
    assert compiled._cache_size() == 1
    monkeypatch.setattr(memory_maps, "FULL", 0.0)
    memory_maps._known.clear()
    after = follow()
    assert compiled._cache_size() == 0
    for name in before.data_vars:
        np.testing.assert_array_equal(before[name], after[name])

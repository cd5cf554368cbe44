from itertools import pairwise

import diffrax
import numpy as np
import optax
import pytest

import gflow
from gflow.analysis.theorems import Claims, verify
from gflow.analysis.theorems.bounds import least_pull
from gflow.analysis.theorems.facts import Facts
from gflow.analysis.theorems.rates import limit_vector
from gflow.analysis.theorems.trend import log_trend, stays_bounded, trend
from gflow.dynamics.descending.optimizers import along_gradient
from gflow.dynamics.descent import gradient_descent
from gflow.problem.data import Dataset

# Two points off the axes and with unequal dual weights: the generic case, margin 0.5.
DATA = Dataset([[0.5, 0.2], [-0.5, 0.6]], [1, -1], name="two points")
WEIGHTS = gflow.init.gaussian((2, 3, 1), scale=0.5, seed=1)

ALL = [
    "risk decreases",
    "energy identity",
    "risk vanishes",
    "every norm grows",
    "layers become rank one",
    "layers align",
    "product follows v_1",
    "direction is max margin",
    "margin is maximal",
    "margin below its bound",
    "imbalance is conserved",
    "Lemma 2: rank one",
    "Lemma 2: alignment",
    "Lemma 4: pull",
    "smoothed margin grows",
    "KKT: residual",
    "KKT: slackness",
    "rate of the loss",
    "rate of the norms",
    "law of time",
    "direction's rate",
    "margin's rate",
    "residual vector",
]
OF_ONE_LAYER = {"margin's rate", "residual vector"}
NOT_REACHED = {"Lemma 4: pull"}  # the start is not far off the max-margin direction
SHARP = [f"sharp law: {name}" for name in ("rank one", "alignment", "direction", "norms", "time")]


@pytest.fixture(scope="module")
def problem():
    return gflow.Problem(DATA, loss=gflow.Logistic())


@pytest.fixture(scope="module")
def start(problem):
    return gflow.init.admissible(WEIGHTS, problem)


@pytest.fixture(scope="module")
def flow(problem, start):
    return gflow.gradient_flow(
        problem, start, until=gflow.LogRisk(-300.0), save=40, solver=diffrax.Dopri8()
    )


@pytest.fixture(scope="module")
def descent(problem, start):
    return gradient_descent(problem, start, optax.sgd(0.5), until=gflow.Steps(20_000), save=40)


@pytest.fixture
def polynomial(flow):
    """The flow's record under the name of a loss for which it would be as good."""
    return flow.assign_attrs(loss="PolynomialTail(power=1)", exponential_tail=0, pull_radius=np.nan)


def changed(record, **variables):
    """A copy of a record with some variables replaced."""
    return record.assign({name: (record[name].dims, v) for name, v in variables.items()})


# -------------------------------------------------------------------------------------------------
# Trends
# -------------------------------------------------------------------------------------------------

X = np.linspace(0.0, 6.0, 61)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0, 4.0, 40.0])
def test_a_power_law_tends_to_zero_with_its_exponent(exponent):
    found = trend(X, np.exp(-exponent * X))
    assert found.tends
    assert found.exponent == pytest.approx(exponent, rel=1e-9)
    assert found.limit == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("level", [0.6, 0.8, 0.95])
def test_a_law_that_levels_off_does_not_and_its_level_is_found(level):
    last = np.exp(-X[-1])
    values = level / (1 - level) * last + np.exp(-X)  # the level is that part of the last value
    # On the 61 points the middle of the decade lies between two of them, hence the tolerance.
    found = trend(X, values)
    assert found.tends is False
    assert found.limit == pytest.approx(level, abs=0.01)


def test_a_decrease_that_speeds_up_tends_to_zero():
    assert trend(X, np.exp(-np.exp(X / 3))).tends
    assert trend(X, 1.0 / (1.0 + np.exp(X - 5.0))).tends


def test_growth_and_rest_do_not_tend_to_zero():
    assert trend(X, np.exp(X)).tends is False
    assert trend(X, np.ones_like(X)).tends is False


def test_values_at_the_floor_tend_to_zero_whatever_they_do():
    noise = 1e-16 * np.abs(np.sin(37 * X))
    assert trend(X, noise, floor=1e-14).tends
    assert trend(X, np.zeros_like(X)).tends


def test_only_what_follows_the_last_change_of_sign_is_looked_at():
    deviation = np.where(X < 4.5, 1.0, -np.exp(-X))
    assert trend(X, deviation).tends
    assert trend(X, np.where(X < 5.9, 1.0, -1.0)).tends is None


def test_a_short_record_cannot_tell():
    for points in (1, 2):
        assert trend(X[:points], np.exp(-X[:points])).tends is None
    assert trend(X[:6], np.exp(-X[:6])).tends is None  # the coordinate has not doubled
    assert trend(np.full(3, np.nan), np.ones(3)).tends is None


def test_the_envelope_speaks_only_near_the_limit_and_at_full_rate():
    resting = np.maximum(np.exp(-2 * X), np.exp(-2 * 5.0))  # falls like x^-2, then rests
    assert trend(X, resting).tends is False
    assert trend(X, resting, rate=1.0, near=0.1).tends
    assert trend(X, resting, rate=1.0, near=1e-9).tends is False
    assert trend(X, resting, rate=3.0, near=0.1).tends is False


def test_logarithms_beyond_the_range_of_floats_are_judged_too():
    log_time = np.linspace(1.0, 1e6, 50)
    assert log_trend(log_time, -log_time, span=5e5).tends
    assert log_trend(log_time, np.full(50, -1e6), span=5e5).tends is False


def test_a_long_fall_whose_exponent_drifts_is_no_level():
    x = np.array([5.0, 25.0, 45.0])
    assert log_trend(x, -np.array([5.0, 26.0, 46.0]), span=40.0).tends  # e^1 apart from a line
    assert log_trend(x, -np.array([5.0, 26.0, 36.0]), span=40.0).tends is False


def test_bounded_growth_levels_off_and_logarithmic_growth_does_not():
    assert stays_bounded(X, np.exp(X) / (1 + np.exp(X))).tends
    assert stays_bounded(X, np.exp(-X)).tends
    assert stays_bounded(X, X).tends is False
    assert stays_bounded(X[:2], X[:2]).tends is None


# -------------------------------------------------------------------------------------------------
# Records
# -------------------------------------------------------------------------------------------------


def test_every_claim_holds_on_the_flow(flow):
    claims = verify(flow)
    assert [claim.name for claim in claims] == ALL + SHARP
    idle = {claim.name for claim in claims if claim.verdict == "not applicable"}
    assert idle == OF_ONE_LAYER | NOT_REACHED and not claims.failed, str(claims)


def test_every_claim_holds_on_descent(descent):
    claims = verify(descent)
    expected = [name.replace("is conserved", "drifts little") for name in ALL]
    assert [claim.name for claim in claims] == expected
    idle = {claim.name for claim in claims if claim.verdict == "not applicable"}
    early = {"rate of the loss", "rate of the norms"}  # their next order is log log T/log T
    assert idle == OF_ONE_LAYER | NOT_REACHED | early | {"energy identity"}, str(claims)
    assert not claims.failed, str(claims)


def test_a_reloaded_record_gives_the_same_table(flow, descent, tmp_path):
    for record in (flow, descent):
        path = gflow.save(record, tmp_path / "record.nc")
        assert str(verify(gflow.load(path))) == str(verify(record))


def test_one_saved_point_decides_what_holds_at_every_time_and_no_limit(flow):
    claims = verify(flow.isel(point=[-1]))
    assert not claims.failed
    assert {claim.name for claim in claims if claim.holds} == {
        "energy identity",
        "margin below its bound",
        "imbalance is conserved",
        "Lemma 2: rank one",
        "Lemma 2: alignment",
        "rate of the norms",  # it is within a per cent of its law
        "law of time",  # compared with its next order, as the sharp laws are
        *SHARP,
    }
    assert "one saved point" in claims["risk vanishes"].why


def test_a_run_that_did_not_reach_its_goal_is_judged_by_what_it_has(flow):
    part = flow.isel(point=slice(0, 25)).assign_attrs(status="max_steps")
    claims = verify(part)
    assert "max_steps" in str(claims)
    assert not claims.failed


def test_without_exponential_tail_the_layers_align_and_the_direction_is_not_claimed(polynomial):
    claims = verify(polynomial)
    assert claims["layers align"].holds and claims["layers become rank one"].holds
    for name in ("direction is max margin", "margin is maximal", "law of time"):
        assert claims[name].verdict == "not applicable"
        assert "exponential tail" in claims[name].why
        assert np.isfinite(claims[name].value)


def test_data_that_are_not_separable_make_the_limits_not_applicable(flow):
    claims = verify(flow.assign_attrs(separable=0))
    assert "separable" in claims["risk vanishes"].why
    assert claims["risk vanishes"].holds is None
    assert claims["Lemma 2: rank one"].holds  # a statement about any flow


def test_a_flow_above_the_risk_at_zero_may_end_at_a_saddle(flow):
    above = flow.assign_attrs(log_risk_at_zero=float(flow.log_risk[-1]) - 1.0)
    assert "saddle" in verify(above)["layers align"].why
    # One point at most at R(0) is an admissible start of the rest.
    late = flow.assign_attrs(log_risk_at_zero=float(flow.log_risk[10]))
    assert verify(late)["layers align"].holds


@pytest.mark.parametrize(
    ("optimizer", "covered"),
    [
        (optax.sgd(0.1), True),
        (optax.sgd(optax.linear_schedule(0.1, 0.01, 10)), True),
        (gflow.loss_scaled(1e-6), True),
        (gflow.polyak(), True),
        (optax.sgd(0.1, momentum=0.9), False),
        (optax.adam(1e-6), False),
        (gflow.on_log_risk(optax.adam(0.1)), False),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), False),
    ],
)
def test_only_steps_along_the_gradient_are_covered(descent, optimizer, covered):
    claims = verify(descent.assign_attrs(along_gradient=along_gradient(optimizer)))
    assert (claims["layers align"].holds is True) == covered
    assert (claims["Lemma 2: rank one"].holds is True) == covered


def test_mini_batches_and_steep_losses_are_not_covered(descent):
    batches = verify(descent.assign_attrs(batch_size=1))
    assert "mini-batches" in batches["layers align"].why
    steep = verify(descent.assign_attrs(slope_bound=np.inf))
    assert "slope" in steep["layers align"].why
    assert steep["Lemma 2: rank one"].holds


@pytest.mark.parametrize(
    ("loss", "bounded"),
    [
        (gflow.Logistic(), True),
        (gflow.Exponential(), False),
        (gflow.PolynomialTail(), True),
        (gflow.PolynomialTail(power=2.0), False),
    ],
    ids=str,
)
def test_a_record_knows_whether_slope_and_curvature_of_its_loss_are_bounded(loss, bounded):
    problem = gflow.Problem(DATA, loss=loss)
    start = gflow.init.admissible(WEIGHTS, problem)
    record = gradient_descent(problem, start, optax.sgd(0.1), until=gflow.Steps(2), save=2)
    assert ("slope and curvature" in verify(record)["layers align"].why) != bounded


def test_early_on_nothing_is_denied(flow):
    rising = flow.isel(point=slice(0, 20))
    rising = changed(
        rising,
        rank_one_gap=np.linspace(0.1, 0.2, 20)[:, None] * np.ones(2),
        direction_error=np.linspace(0.1, 0.2, 20),
    )
    late, early = verify(rising), verify(rising.assign_attrs(num_points=10**9))
    assert late["layers become rank one"].holds is False
    assert early["layers become rank one"].holds is None
    assert "too early" in early["layers become rank one"].why
    assert "too early" in early["direction is max margin"].why


# -------------------------------------------------------------------------------------------------
# Failures are seen
# -------------------------------------------------------------------------------------------------


def test_a_rising_risk_fails(flow):
    risk = flow.log_risk.values.copy()
    risk[5] = risk[4] + 1e-3
    claims = verify(changed(flow, log_risk=risk))
    assert claims["risk decreases"].holds is False


def test_layers_that_stop_aligning_fail(flow):
    stuck = np.maximum(flow.misalignment.values, flow.misalignment.values[-15])
    claims = verify(changed(flow, misalignment=stuck))
    assert claims["layers align"].holds is False


@pytest.mark.parametrize("name", ["KKT: residual", "KKT: slackness"])
def test_kkt_conditions_that_stop_improving_fail(flow, name):
    variable = {"KKT: residual": "kkt_residual", "KKT: slackness": "kkt_slackness"}[name]
    stuck = np.maximum(flow[variable].values, flow[variable].values[-15])
    assert verify(changed(flow, **{variable: stuck}))[name].holds is False


def test_a_broken_energy_identity_fails(flow):
    claims = verify(changed(flow, clock_error=flow.clock_error.values + 1e-3))
    assert claims["energy identity"].holds is False


@pytest.mark.parametrize(
    ("variable", "name"),
    [("log_time", "rate of the loss"), ("frobenius_norm", "rate of the norms")],
)
def test_a_wrong_constant_of_lyu_and_lis_rates_fails(flow, variable, name):
    wrong = flow.log_time + 0.1 if variable == "log_time" else flow.frobenius_norm * 1.1
    assert verify(changed(flow, **{variable: wrong.values}))[name].holds is False


def test_a_margin_above_the_certified_bound_fails(flow):
    claims = verify(flow.assign_attrs(margin_upper_bound=float(flow.margin[-1]) * (1 - 1e-9)))
    assert claims["margin below its bound"].holds is False


def test_a_wrong_direction_fails(flow):
    wrong = flow.direction_error.values + 0.05
    claims = verify(changed(flow, direction_error=wrong))
    assert claims["direction is max margin"].holds is False


def test_a_drifting_imbalance_fails(flow):
    claims = verify(changed(flow, imbalance_drift=flow.imbalance_drift.values + 1e-3))
    assert claims["imbalance is conserved"].holds is False
    assert "rtol" in claims["imbalance is conserved"].why


def test_a_layer_further_from_rank_one_than_lemma_2_allows_fails(flow):
    part = flow.drop_vars(["rank_one_slack", "alignment_slack"])  # so that they are worked out
    for record in (
        changed(part, rank_one_gap=flow.rank_one_gap.values * 0 + 0.5),
        changed(flow, rank_one_slack=flow.rank_one_slack.values * 0 - 0.5),
    ):
        claims = verify(record)
        assert claims["Lemma 2: rank one"].holds is False
        assert claims["Lemma 2: rank one"].value < 0


def test_layers_less_aligned_than_lemma_2_allows_fail(flow):
    part = flow.drop_vars(["rank_one_slack", "alignment_slack"])
    for record in (
        changed(part, misalignment=flow.misalignment.values * 0 + 0.5),
        changed(flow, alignment_slack=flow.alignment_slack.values * 0 - 0.5),
    ):
        assert verify(record)["Lemma 2: alignment"].holds is False


def test_a_falling_smoothed_margin_fails(flow):
    claims = verify(changed(flow, smoothed_margin=flow.smoothed_margin.values[::-1].copy()))
    assert claims["smoothed margin grows"].holds is False


def test_a_drift_beyond_the_error_budget_fails(descent):
    claims = verify(changed(descent, imbalance_drift=descent.imbalance_drift.values + 1.0))
    assert claims["imbalance drifts little"].holds is False


def test_descent_is_not_denied_what_its_saved_points_cannot_tell(descent):
    size = descent.log_step_size.values + 3.0 * (np.arange(descent.sizes["point"]) % 2)
    beyond = descent.imbalance_drift.values + 1e6
    falling = descent.smoothed_margin.values[::-1].copy()
    record = changed(descent, log_step_size=size, imbalance_drift=beyond, smoothed_margin=falling)
    claims = verify(record)
    assert "varies between saved points" in claims["imbalance drifts little"].why
    assert claims["imbalance drifts little"].verdict == "not applicable"
    assert claims["smoothed margin grows"].verdict == "not applicable"
    assert "small" in claims["smoothed margin grows"].why


# -------------------------------------------------------------------------------------------------
# One layer, and starts far off
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_layer():
    """Weighted points with Soudry's vector in closed form, from near and from far off."""
    problem = gflow.Problem(gflow.datasets.two_point(), loss=gflow.Exponential())
    return [
        gflow.gradient_flow(problem, (np.array([start]),), until=gflow.LogRisk(-150), save=40)
        for start in ([0.3, -0.4], [60.0, 40.0])
    ]


def test_one_layer_keeps_soudrys_residual_vector(one_layer):
    record = one_layer[0]
    claims = verify(record)
    assert not claims.failed
    for name in OF_ONE_LAYER:
        assert claims[name].holds, str(claims)
    a, b, m, n = 0.8, 0.5, (3, 1), 4
    kappa = 2 * np.sqrt(m[0] * m[1]) / n
    vector = [np.log(a**2 * kappa) / a, np.log(m[0] / m[1]) / (2 * b)]
    np.testing.assert_allclose(limit_vector(Facts(record)), vector, rtol=1e-10)
    assert claims["residual vector"].value < 1e-9 * 150
    other = changed(record, end_to_end=record.end_to_end.values + 0.1)
    assert verify(other)["residual vector"].holds is False


def test_far_off_the_best_direction_lemma_4_pulls_back(one_layer):
    record = one_layer[1]
    claim = verify(record)["Lemma 4: pull"]
    assert claim.holds and claim.value > 0 and "alpha = 0.5" in claim.why
    assert not verify(record).failed
    turned = changed(record, perpendicular_cosine=-record.perpendicular_cosine.values)
    assert verify(turned)["Lemma 4: pull"].holds is False


def test_lemma_3s_constant_is_that_of_a_search_over_directions(flow):
    rng = np.random.default_rng(0)
    across = rng.normal(size=(3, 2))
    across -= rng.dirichlet(np.ones(3)) @ across  # zero is inside
    angles = np.linspace(0, 2 * np.pi, 200_001)
    search = np.max(across @ np.stack([np.cos(angles), np.sin(angles)]), axis=0).min()
    more = np.vstack([across, 0.9 * across[:1]])  # of no account, but no simplex
    for points in (across, more):
        facts = Facts(
            flow.drop_vars(["support_vectors", "dual_weights", "max_margin_direction"]).assign(
                support_vectors=(
                    ("on", "axis"),
                    np.column_stack([np.full(len(points), 0.5), points]),
                ),
                max_margin_direction=("axis", [1.0, 0.0, 0.0]),
            )
        )
        alpha, reason = least_pull(facts)
        assert not reason
        np.testing.assert_allclose(alpha, search, rtol=1e-3)  # the search's own step
        assert alpha <= search


# -------------------------------------------------------------------------------------------------
# The sharp laws
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(problem, start):
    return gflow.gradient_flow(problem, start, until=gflow.LogRisk(-1e30), save=61)


@pytest.mark.parametrize("at", [25, 40, 60])  # s = 2e12, 3e20, 1e30
def test_the_sharp_laws_hold_beyond_float64s_wall_to_more_than_six_digits(far, at):
    claims = verify(far.isel(point=slice(0, at + 1)))
    assert not claims.failed
    for name in SHARP:
        assert claims[name].holds and claims[name].value < 1e-6, str(claims)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("rank_one_gap", "rank one"),
        ("misalignment", "alignment"),
        ("direction_error", "direction"),
        ("spectral_norm", "norms"),
    ],
)
def test_a_constant_off_by_a_tenth_of_a_per_cent_fails(far, variable, name):
    claims = verify(changed(far, **{variable: far[variable].values * 1.001}))
    assert [claim.name for claim in claims.failed] == [f"sharp law: {name}"]


def test_a_time_off_by_a_tenth_of_a_per_cent_fails(far):
    claims = verify(changed(far, log_time=far.log_time.values + 1e-3))
    assert claims["sharp law: time"].holds is False


def test_log_time_without_digits_left_is_not_compared(far):
    claims = verify(far.isel(point=slice(40, None)))
    for name in ("law of time", "sharp law: time"):
        assert claims[name].verdict == "not applicable" and "s up to 1e+10" in claims[name].why


def test_a_law_is_not_denied_while_a_point_off_the_margin_may_have_weight(far):
    wrong = changed(far, direction_error=far.direction_error.values * 2)
    tied = verify(wrong.assign_attrs(next_margin_gap=1e-40))["sharp law: direction"]
    assert tied.holds is None and "may have weight up to s = 3e+41" in tied.why


def test_balanced_starts_have_no_constants_to_compare(problem):
    start = gflow.init.balanced((2, 3, 1), end_to_end=[0.2, -0.1], seed=3)
    claims = verify(gflow.gradient_flow(problem, start, until=gflow.LogRisk(-1e12), save=20))
    assert not claims.failed
    assert "balanced" in claims["sharp law: rank one"].why
    assert "always aligned" in claims["sharp law: alignment"].why
    assert claims["sharp law: direction"].holds and claims["sharp law: norms"].holds


def test_a_support_that_does_not_span_has_its_own_direction_law():
    data = Dataset([[0.5, 0.2, 0.3], [-0.5, 0.6, 0.1]], [1, -1])
    problem = gflow.Problem(data, loss=gflow.Exponential())
    start = gflow.init.admissible(gflow.init.gaussian((3, 3, 1), seed=2), problem)
    record = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-1e30), save=31)
    claims = verify(record)
    assert not claims.failed
    assert claims["sharp law: direction"].holds  # (W_1^T u_1)_N read off an earlier point
    assert claims["sharp law: direction"].value < 1e-6


def test_records_without_support_vectors_say_so(flow):
    claims = verify(flow.drop_vars(["support_vectors"]))
    assert "no support vectors" in claims["sharp law: direction"].why
    assert not claims.failed


# -------------------------------------------------------------------------------------------------
# Lemma 2
# -------------------------------------------------------------------------------------------------


def test_the_papers_constant_is_that_of_a_hand_computed_start(flow):
    # |W_1|^2 = 5, |W_2|^2 = 9: 9 - 9; W_1 W_1^T - W_2^T W_2 = diag(1 - 9, 4), of norm 8.
    first, second = np.diag([1.0, 2.0]), np.array([[3.0, 0.0]])
    record = flow.drop_vars(["initial_weights_1", "initial_weights_2"]).assign(
        initial_weights_1=(("a", "b"), first), initial_weights_2=(("c", "a"), second)
    )
    assert Facts(record).constant == pytest.approx(8.0, rel=1e-15)


def test_the_error_budget_of_constant_steps_is_twice_the_step_times_the_fall(descent):
    risk = np.exp(descent.log_risk.values)
    by_step = 2 * 0.5 * (risk[0] - risk)
    budget = Facts(descent).budget
    assert np.all(budget <= by_step * (1 + 1e-12) + 1e-15)
    assert budget[-1] > 0.5 * by_step[-1]


def test_lemma_2_with_the_enlarged_constant_holds_for_any_steps_along_rank_one_gradients():
    # The derivation, in NumPy: gradients of a random chain, steps far too long for descent.
    rng = np.random.default_rng(0)
    for depth in (2, 3, 4):
        widths = [3, *[4] * (depth - 1), 1]
        weights = [rng.normal(size=(b, a)) for a, b in pairwise(widths)]
        start = [w.copy() for w in weights]
        constant = _paper_constant(start)
        budget = 0.0
        for _ in range(30):
            gradients = _chain_gradients(weights, rng.normal(size=3))
            step = 0.1 * rng.random()
            total = sum(float(np.sum(g**2)) for g in gradients)
            step = min(step, 0.3 / np.sqrt(total))
            budget += step**2 * total
            weights = [w - step * g for w, g in zip(weights, gradients, strict=True)]
            for k, w in enumerate(weights):
                u, s, _ = np.linalg.svd(w)
                assert np.sum(s[1:] ** 2) <= constant + 2 * budget + 1e-12
                if k + 1 < depth:
                    _, s2, vt = np.linalg.svd(weights[k + 1])
                    before = np.linalg.norm(start[k], 2) ** 2 + np.linalg.norm(start[k + 1], 2) ** 2
                    lost = (1 - (vt[0] @ u[:, 0]) ** 2) * s2[0] ** 2
                    assert lost <= constant + before + 3 * budget + 1e-12


def _paper_constant(weights):
    norms = [np.sum(w**2) for w in weights]
    spread = [np.linalg.norm(a @ a.T - b.T @ b, 2) for a, b in pairwise(weights)]
    return max(norms) - norms[-1] + sum(spread)


def _chain_gradients(weights, slope):
    """dR/dW_k = (W_L ... W_{k+1})^T (W_{k-1} ... W_1 slope)^T for the covector ``slope`` on w."""
    rights = [slope]
    for w in weights[:-1]:
        rights.append(w @ rights[-1])
    lefts = [np.ones(1)]
    for w in weights[:0:-1]:
        lefts.append(w.T @ lefts[-1])
    return [np.outer(a, b) for a, b in zip(lefts[::-1], rights, strict=True)]


# -------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------


def test_the_table_prints_aligned_and_sums_up(flow):
    claims = verify(flow)
    lines = str(claims).splitlines()
    assert "two points" in lines[0] and "widths 2-3-1" in lines[0]
    column = lines[2].index("verdict")
    rows = lines[4 : 4 + len(claims)]
    assert {row[column:] for row in rows} == {"holds", "not applicable"}
    assert all(row[column - 2 : column] == "  " for row in rows)
    count = len(ALL + SHARP) - len(OF_ONE_LAYER | NOT_REACHED)
    assert f"{count} of {count} applicable claims hold" in str(claims)


def test_the_table_explains_what_does_not_hold(polynomial):
    text = str(verify(polynomial))
    assert "16 not applicable" in text
    assert "has no exponential tail" in text


def test_the_html_view_escapes_and_has_one_row_a_claim(flow):
    html = verify(flow)._repr_html_()
    assert html.count("<tr") == len(ALL + SHARP) + 1
    assert "|&lt;v_{k+1}, u_k&gt;|" in html


def test_rows_are_found_by_name_number_and_slice(flow):
    claims = verify(flow)
    assert claims["layers align"] is claims[ALL.index("layers align")]
    assert isinstance(claims[:2], Claims) and len(claims[:2]) == 2
    with pytest.raises(KeyError, match="layers align"):
        claims["alignment"]


def test_what_is_not_a_record_is_refused(flow, unchecked):
    with pytest.raises(ValueError, match="gflow record"):
        verify({"log_risk": 1})
    with pytest.raises(ValueError, match="slice or a list"):
        verify(flow.isel(point=0))
    with pytest.raises(ValueError, match="no saved point"):
        verify(flow.isel(point=[]))

"""Several classes: data, losses, networks of K outputs and what a record of them holds."""

import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from scipy.special import log_softmax

import gflow
from gflow.problem.class_observables import ClassReference, of_classes
from gflow.problem.deep_linear import end_to_end
from gflow.problem.design import ClassDesign, contrasts
from gflow.problem.terms import Diagonal

ROUND_OFF = 1e-12
INTEGRATORS = 1e-8  # what two integrators at rtol 1e-9 agree to
SOME = np.array([2, 5, 4, 23])  # margins, by their numbers
FIRST, SECOND = gflow.LogRisk(-30.0), gflow.clocks.LogRisk()


def three(n=12, seed=0):
    """Three classes in the plane, separable, in a general position."""
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % 3
    angles = classes * 2.1 + rng.uniform(-0.4, 0.4, n)
    radii = rng.uniform(0.5, 1.0, n)
    inputs = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return gflow.Dataset(inputs, classes, num_classes=3, name="three")


PROBLEM = gflow.Problem(three())


@pytest.fixture(scope="module")
def start():
    return gflow.init.admissible(gflow.init.gaussian((2, 5, 4, 3), scale=0.7, seed=1), PROBLEM)


@pytest.fixture(scope="module")
def flow(start):
    return gflow.gradient_flow(PROBLEM, start, until=FIRST, save=5, keep_weights=True, certify=True)


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def test_margins_are_those_of_the_signed_inputs():
    data, rng = three(), np.random.default_rng(0)
    w = rng.normal(size=(3, 2))
    outputs = data.inputs @ w.T
    direct = [
        outputs[i, y] - outputs[i, k]
        for i, y in enumerate(data.classes)
        for k in range(3)
        if k != y
    ]
    np.testing.assert_allclose(data.margins_of(outputs), direct, rtol=1e-15)
    np.testing.assert_allclose(data.signed_inputs @ w.ravel(), direct, atol=1e-15)
    shifted = data.margins_of(outputs + 1e8 * 2.0**-10 * np.ones((1, 1)))
    np.testing.assert_allclose(shifted, direct, atol=1e-10)


def test_classes_are_told_by_their_labels():
    inputs = np.eye(4)
    assert gflow.Dataset(inputs, [0, 1, 2, 1]).num_classes == 3
    assert gflow.Dataset(inputs, [0, 1, 1, 0], num_classes=2).num_classes == 2
    assert gflow.Dataset(inputs, [1, -1, 1, 1]).num_classes is None
    scaled = gflow.Dataset(inputs, [0, 1, 2, 1]).with_bias().scaled()
    assert scaled.num_classes == 3 and scaled.dim == 5


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([0, 1, 1], None, r"`num_classes=2`"),
        ([0, 1, 3], None, r"number the classes from 0 on"),
        ([0, 1, 3], 3, r"`labels\[2\]` is 3; expected a class, 0 to 2"),
        ([0, 1, 1], 3, r"no point of class 2"),
        ([-1, 1, 1], 2, r"`labels\[0\]` is -1; .*np\.where\(labels > 0, 1, 0\)"),
        (["a", "b", "c"], None, r"np\.unique\(labels, return_inverse=True\)"),
        ([0, 1, 1], 1, r"`num_classes` is 1"),
        ([0, 0.5, 1], 2, r"`labels\[1\]` is 0\.5"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        gflow.Dataset(np.eye(3), labels, num_classes=num_classes)


def test_what_does_not_fit_the_classes_is_named(start):
    with pytest.raises(ValueError, match=r"Logistic, .*3 classes.*gflow\.CrossEntropy\(\)"):
        gflow.Problem(three(), loss=gflow.Logistic())
    with pytest.raises(ValueError, match=r"PairwiseExponential, .*gflow\.Exponential"):
        gflow.Problem(gflow.datasets.two_point(), loss=gflow.PairwiseExponential())
    with pytest.raises(ValueError, match=r"expected 3 rows, an output for each class"):
        gflow.gradient_flow(PROBLEM, gflow.init.gaussian((2, 4, 2)), until=FIRST)
    with pytest.raises(ValueError, match=r"expected 3 rows, an output for each class"):
        gflow.init.admissible(gflow.init.gaussian((2, 4, 2)), PROBLEM)
    scalar = gflow.Problem(three(), gflow.Network(lambda w, x: jnp.dot(w, x)))
    with pytest.raises(ValueError, match=r"expected one output a class, shape \(3,\)"):
        gflow.gradient_flow(scalar, np.ones(2), until=FIRST)
    with pytest.raises(ValueError, match=r"of one output; the data have 3 classes"):
        gflow.gradient_flow(PROBLEM, start, until=gflow.Misalignment(0.1))
    for number in (0, 1, True):
        with pytest.raises(ValueError, match=r"`num_classes` is .*; expected a whole number from"):
            gflow.CrossEntropy(number)
    with pytest.raises(ValueError, match=r"`norm` is True; expected 2, 1"):
        gflow.max_margin(three(), norm=True)


# ---------------------------------------------------------------------------------------------
# Losses and their seam
# ---------------------------------------------------------------------------------------------


def test_terms_are_the_derivatives_of_the_log_risk():
    q, v = np.random.default_rng(1).normal(size=(2, 24))
    for loss, direct in (
        (PROBLEM.loss, lambda rows: np.log1p(np.exp(-rows).sum(1))),
        (gflow.PairwiseExponential().on(three()), lambda rows: np.exp(-rows).sum(1)),
    ):

        @jax.jit
        def found(q, loss=loss):
            terms, level = loss.terms(q), loss.terms(q, jnp.asarray(300.0))
            gram, applied = terms.curvature.gram(None), terms.curvature.apply(v)
            among = terms.curvature.among(SOME)
            log_risk = jax.grad(lambda q: loss.terms(q).log_risk)(q)
            hessian = jax.hessian(lambda q: jnp.exp(loss.terms(q).log_risk))(q)
            far = loss.terms(q + 300.0).log_risk, loss.risk_slopes(q)
            return terms, gram, among, applied, log_risk, hessian, level.log_risk, *far

        terms, gram, among, applied, gradient, hessian, level, far, risk_slopes = found(q)
        risk = np.mean(direct(q.reshape(-1, 2)))
        np.testing.assert_allclose(terms.log_risk, np.log(risk), rtol=1e-14)
        np.testing.assert_allclose(terms.slopes, -gradient, rtol=1e-12)
        np.testing.assert_allclose(risk_slopes, risk * np.asarray(terms.slopes), rtol=1e-12)
        np.testing.assert_allclose(gram, hessian / risk, atol=1e-13)
        np.testing.assert_allclose(among, np.asarray(gram)[SOME][:, SOME], atol=1e-15)
        np.testing.assert_allclose(applied, gram @ v, atol=1e-13)
        np.testing.assert_allclose(level, far, rtol=1e-13)


@pytest.mark.parametrize(("points", "dim"), [(12, 5), (12, 7), (3, 5)])
def test_the_design_is_its_matrix(points, dim):
    rng = np.random.default_rng(2)
    inputs, classes = rng.normal(size=(points, dim)), np.arange(points) % 3
    data = gflow.Dataset(inputs, classes, num_classes=3)
    w = rng.normal(size=(3, dim))
    s, c = rng.normal(size=(2, 2 * points)), rng.normal(size=(2, 2 * dim))
    blocks = rng.normal(size=(points, 2, 2))
    blocks = blocks + blocks.transpose(0, 2, 1)
    some = np.array([4, 0, 2 * points - 1])

    @jax.jit
    def found(s, c, blocks):
        design = ClassDesign(data.classes, data.inputs, 3)
        first, reduced = design.axes()
        return (
            (design.matrix, design.spread(c), design.gather(s), design.gram_of_blocks(blocks)),
            (design.gram_of_diagonal(s[0]), design.among(some).matrix, contrasts(3)),
            (first, reduced.matrix, reduced.among(some).matrix, reduced.gram_of_blocks(blocks)),
        )

    (a, spread, gathered, gram), (diagonal, rows, apart), axes = found(s, c, blocks)
    a = np.asarray(a)
    np.testing.assert_allclose(a @ (apart @ w).ravel(), data.margins_of(inputs @ w.T))
    np.testing.assert_allclose(spread, c @ a.T, atol=ROUND_OFF)
    np.testing.assert_allclose(gathered, s @ a, atol=ROUND_OFF)
    dense = scipy.linalg.block_diag(*blocks)
    np.testing.assert_allclose(gram, a.T @ dense @ a, atol=ROUND_OFF)
    np.testing.assert_allclose(diagonal, a.T * s[0] @ a, atol=ROUND_OFF)
    np.testing.assert_allclose(rows, a[some], atol=ROUND_OFF)
    first, reduced, rows, gram = map(np.asarray, axes)
    assert len(first) == min(points, dim)
    # The same cotangents for every contrast; A in their terms times them is A.
    both = np.concatenate([first, np.roll(first, dim, axis=1)])
    np.testing.assert_allclose(reduced @ both, a, atol=ROUND_OFF)
    np.testing.assert_allclose(rows, reduced[some], atol=ROUND_OFF)
    np.testing.assert_allclose(both.T @ gram @ both, a.T @ dense @ a, atol=ROUND_OFF)


@pytest.mark.parametrize("loss", [gflow.CrossEntropy(4), gflow.PairwiseExponential(4)])
def test_a_level_and_bounded_corrections_are_those_of_all_margins_together(loss):
    rng = np.random.default_rng(0)
    offsets, change = 30 * rng.normal(size=(2, 5 * 3))
    shares = np.exp(log_softmax(-offsets))
    np.testing.assert_allclose(loss.level(offsets, change), shares @ change, rtol=1e-13)
    found, held = loss.advance(jnp.asarray(offsets), jnp.asarray(change))
    # Shares grow by no more than a factor e and the size of the change, beyond exp(-5).
    limit = np.maximum(log_softmax(-offsets) + 1 + np.log(np.maximum(-change, 1)), -5)
    np.testing.assert_array_equal(held, log_softmax(-offsets) - change > limit)
    free = ~np.asarray(held)
    level = np.log(np.sum(np.exp(-offsets)))
    np.testing.assert_allclose(found[free], (offsets + change + level)[free], atol=1e-12)
    np.testing.assert_allclose(found[~free], -limit[~free], atol=1e-12)


def test_the_diagonal_of_a_mean_of_losses_is_one_curvature_among_others():
    q = np.array([0.3, -1.0, 2.0])
    found = gflow.Logistic().terms(q).curvature
    assert isinstance(found, Diagonal)
    design = gflow.problem.design.Rows(np.random.default_rng(0).normal(size=(3, 2)))
    blocks = jnp.asarray(found.entries).reshape(3, 1, 1)
    np.testing.assert_allclose(found.gram(design), design.gram_of_blocks(blocks), rtol=1e-14)


@pytest.mark.parametrize("size", [1e300, 1e8, 700.0])
def test_losses_are_exact_at_any_margin(size):
    for loss in (gflow.CrossEntropy(num_classes=3), gflow.PairwiseExponential(num_classes=3)):
        terms = jax.jit(loss.terms)
        far = terms(np.array([size, size, size, size]))
        np.testing.assert_allclose(far.log_risk, -size + np.log(2), rtol=1e-15)
        np.testing.assert_allclose(far.slopes, 0.25, rtol=1e-15)
        near = terms(np.array([-size, 0.0]))
        expected = np.log(size) if isinstance(loss, gflow.CrossEntropy) else size
        np.testing.assert_allclose(near.log_risk, expected, rtol=1e-15)
        assert near.slopes[1] < 1e-300


# ---------------------------------------------------------------------------------------------
# Flows
# ---------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_cross_entropy(start):
    data = PROBLEM.data

    def direct(weights):
        scores = data.inputs @ end_to_end(weights).T
        picked = jax.nn.log_softmax(scores)[jnp.arange(data.num_points), data.classes]
        return jnp.log(-jnp.mean(picked))

    @jax.jit
    def both(weights):
        return PROBLEM.log_risk_gradient_and_norm(weights), jax.value_and_grad(direct)(weights)

    (log_risk, gradient, squared), (value, slopes) = both(start)
    np.testing.assert_allclose(log_risk, value, rtol=1e-14)
    for found, expected in zip(gradient, slopes, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(squared, sum(np.sum(np.square(g)) for g in gradient), rtol=1e-13)


def test_two_integrators_agree_on_a_flow_of_three_classes(flow, start):
    explicit = gflow.gradient_flow(
        PROBLEM, start, until=FIRST, save=5, solver=diffrax.Dopri8(), rtol=1e-10, clock=SECOND
    )
    assert flow.attrs["solver"] == "GaussNewton" and flow.attrs["status"] == "reached"
    assert flow["end_to_end"].dims == ("point", "output", "coordinate")
    np.testing.assert_allclose(flow.end_to_end, explicit.end_to_end, rtol=INTEGRATORS)
    np.testing.assert_allclose(flow.log_time[1:], explicit.log_time[1:], rtol=INTEGRATORS)
    assert flow.imbalance_drift.max() < 1e-11
    assert flow.output_sum_drift.max() < 1e-11
    error = np.abs(flow.end_to_end.values - explicit.end_to_end.values)
    assert np.all(error <= flow.end_to_end_error.values + 1e-9)


def test_lemma_2_for_several_outputs_holds_at_every_saved_point(flow, start):
    assert np.all(flow.rank_slack >= -1e-10) and np.all(flow.spectrum_slack >= -1e-10)
    # They are no empty bounds: the last layer's takes all of it that is orthogonal to its image.
    sums = np.sum(np.sum(start[-1], axis=0) ** 2) / 3
    np.testing.assert_allclose(
        flow.rank_slack[:, -1], sums - flow.singular_values[:, -1, 2] ** 2, rtol=1e-12
    )
    assert float(flow.rank_slack[-1, -1]) < sums


def test_claims_say_where_a_direction_does_not_grow_or_has_not_settled(flow):
    claims = gflow.verify(flow)
    assert claims["Lemma 2: subspaces"].holds
    assert "not one point each" in claims["classes collapse"].why
    maximal = claims["margin is maximal in its norm"]
    least, most = map(float, re.findall(r"[\d.]+", maximal.bound_text))
    assert least <= gflow.max_margin(PROBLEM.data, norm="nuclear").margin <= most
    assert float(flow.schatten_margin.max()) <= most
    # An angle that Davis and Kahan's theorem does not allow.
    turned = flow.assign(subspace_misalignment=flow.subspace_misalignment * 0 + 0.9)
    assert gflow.verify(turned)["Lemma 2: subspaces"].holds is False
    # The second of two directions rests: of it nothing is said.
    values = flow.singular_values.copy()
    values[:, :, 1] = 1.0
    aligned = gflow.verify(turned.assign(singular_values=values))["subspaces align"]
    assert aligned.holds is None and "rank below 2" in aligned.why
    # The law of time misses one by as much as weights and slope are apart.
    late = flow.isel(point=slice(2, None))
    s = -late.log_risk
    ratio = np.linspace(0.5, 0.4, late.sizes["point"])  # and goes on to do so
    log_time = np.log(ratio / 9) + s - 2 * np.log(s / late.norm)
    late = late.assign(log_time=log_time)
    apart = np.sqrt(2 * (1 - np.sqrt(0.4))) * late.norm / late.min_margin ** (1 / 3)
    law = gflow.verify(late.assign(kkt_residual=apart))["law of time"]
    assert law.value == pytest.approx(0.4) and law.holds is None
    assert "cos^2 of weights and slope is 0.4" in law.why
    assert gflow.verify(late.assign(kkt_residual=0 * apart))["law of time"].holds is False


def test_what_a_record_of_classes_does_not_hold_is_told(flow):
    with pytest.raises(KeyError, match=r"direction_error.*of problems with .*one output"):
        flow["direction_error"]
    with pytest.raises(KeyError, match=r"No variable named 'marginn'. Did you mean"):
        flow["marginn"]


def test_claims_of_classes_that_cannot_be_separated_are_told_without_a_warning(recwarn):
    inputs, classes = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 3
    problem = gflow.Problem(gflow.Dataset(inputs, classes, num_classes=3).scaled())
    start = (gflow.init.gaussian((3, 3), seed=0)[0],)
    flow = gflow.gradient_flow(problem, start, until=gflow.Time(1e4), save=8)
    claims = gflow.verify(flow)
    assert not recwarn.list  # of one layer none of the start either: there is no saddle
    assert claims["risk decreases"].holds
    for name in ("margin is maximal in its norm", "law of time"):
        assert claims[name].holds is None and np.isnan(claims[name].value)
        assert "not linearly separable" in claims[name].why
    beyond = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-10.0), max_steps=500)
    assert beyond.attrs["status"] == "stalled" and "not separable" in beyond.attrs["message"]


def test_a_layer_too_narrow_for_the_classes_is_named():
    start = gflow.init.admissible(gflow.init.gaussian((2, 1, 3), seed=0), PROBLEM)
    flow = gflow.gradient_flow(PROBLEM, start, until=gflow.LogRisk(-5.0), max_steps=1000)
    assert flow.attrs["status"] == "precision_lost" and float(flow.margin[-1]) < 0
    assert "width 1 leaves fewer than the 2 directions of 3 classes" in flow.attrs["message"]


def test_two_outputs_are_the_flow_of_one(monkeypatch):
    data = gflow.datasets.separable(n=10, d=3, margin=0.2, seed=3)
    pair = gflow.Problem(gflow.Dataset(data.inputs, (1 - data.labels) / 2, num_classes=2))
    single = gflow.Problem(gflow.Dataset(np.sqrt(2) * data.inputs, data.labels))
    two = gflow.init.admissible(gflow.init.gaussian((3, 4, 2), seed=0), pair)
    one = (two[0], (two[1][:1] - two[1][1:]) / np.sqrt(2))
    rule = gflow.LogRisk(-1e5)
    a = gflow.gradient_flow(pair, two, until=rule, save=6)
    b = gflow.gradient_flow(single, one, until=rule, save=6)
    w = (a.end_to_end.values[:, 0] - a.end_to_end.values[:, 1]) / np.sqrt(2)
    np.testing.assert_allclose(w, b.end_to_end.values, rtol=1e-9, atol=1e-9 * np.abs(w).max())
    np.testing.assert_allclose(a.log_time[1:], b.log_time[1:], rtol=1e-9)
    assert a.attrs["num_classes"] == 2 and "num_classes" not in b.attrs


def test_a_small_start_leaves_its_second_plateau_in_the_default_clock():
    # There the terms of a velocity, one for each contrast of the classes, cancel to a thousandth.
    problem = gflow.Problem(gflow.datasets.iris_all())
    start = gflow.init.gaussian((4, 5, 5, 3), scale=0.003, seed=0)
    flow = gflow.gradient_flow(
        problem, start, until=gflow.LogRisk(-1.5), save=[-0.93, -1.0, -1.5], max_steps=1000
    )
    assert flow.attrs["status"] == "reached", flow.attrs["message"]
    explicit = gflow.gradient_flow(
        problem,
        start,
        until=gflow.LogTime(float(flow.log_time[-1])),
        save=flow.log_time.values[1:],
        clock=gflow.clocks.LogTime(),
        solver=diffrax.Dopri8(),
    )
    np.testing.assert_allclose(flow.log_risk[1:], explicit.log_risk[1:], rtol=1e-6)
    assert flow.imbalance_drift.max() < 1e-11


def test_four_layers_leave_a_plateau_of_twenty_thousand_in_either_clock():
    # The largest curvature is 3,000: explicit steps would be three millions.
    rng = np.random.default_rng(2)
    classes, centres = np.arange(18) % 3, 3 * rng.normal(size=(3, 4))
    inputs = centres[classes] + 0.3 * rng.normal(size=(18, 4))
    problem = gflow.Problem(gflow.Dataset(inputs, classes, num_classes=3).scaled())
    start = gflow.init.gaussian((4, 5, 5, 5, 3), scale=0.03, seed=2)
    flows = [
        gflow.gradient_flow(
            problem, start, until=gflow.LogRisk(-2.0), save=3, max_steps=2000, clock=clock
        )
        for clock in (None, gflow.clocks.LogTime())
    ]
    for flow in flows:
        assert flow.attrs["status"] == "reached", flow.attrs["message"]
        assert flow.clock_error.max() < 1e-8 and flow.imbalance_drift.max() < 1e-10
    assert 2e4 < np.exp(flows[0].log_time[-1]) < 3e4
    np.testing.assert_allclose(flows[0].log_time[1:], flows[1].log_time[1:], rtol=INTEGRATORS)


@pytest.mark.parametrize("depth", [2, 4])
def test_one_point_a_class_is_the_closed_form(depth):
    num = 4
    problem = gflow.Problem(gflow.Dataset(np.eye(num), np.arange(num), num_classes=num))
    start = (0.3 ** (1 / depth) * (np.eye(num) - 1 / num),) * depth
    goals = [-10.0, -1e3, -1e6]
    flow = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-1e6), save=goals)
    assert flow.attrs["status"] == "reached"
    exact = gflow.exact.simplex_modes(num, 0.3, depth, log_risk=flow.log_risk.values[1:])
    np.testing.assert_allclose(flow.log_time[1:], exact.log_time, rtol=1e-8)
    np.testing.assert_allclose(
        flow.end_to_end[1:], exact.end_to_end, atol=1e-8 * np.abs(exact.end_to_end).max()
    )
    # Neural collapse at all times, which no theorem says of four layers.
    assert flow.collapse_variability.max() < 1e-28 and flow.collapse_simplex.max() < 1e-12
    collapse = gflow.verify(flow)["classes collapse"]
    assert collapse.holds is (True if depth == 2 else None)
    assert depth == 2 or "a regular polygon is the smaller one" in collapse.why


def test_a_sweep_over_depth_finds_that_two_layers_collapse():
    problem = gflow.Problem(gflow.Dataset(3 * np.eye(4)[::-1], np.arange(4), num_classes=4))

    def started(depth):
        weights = gflow.init.gaussian((4,) * (depth + 1), scale=0.3, seed=1)
        return problem, gflow.init.admissible(weights, problem)

    grid = {"depth": [2, 4]}
    found = gflow.sweep(started, grid, until=gflow.LogRisk(-1e3), save=12, progress=False)
    assert set(found.status.values.ravel().tolist()) == {"reached"}
    values = found.end_to_end_values.isel(point=-1)
    directions = values.sum("value") ** 2 / (values**2).sum("value")
    np.testing.assert_allclose(directions.sel(depth=2), 3, atol=1e-3)
    assert found.collapse_simplex.sel(depth=2).isel(point=-1) < 1e-3
    assert directions.sel(depth=4) < 2.1  # a polygon
    # The claim, of one of its runs.
    alone = gflow.gradient_flow(*started(2), until=gflow.LogRisk(-1e3), save=12)
    collapse = gflow.verify(alone)["classes collapse"]
    assert collapse.holds and collapse.value < 1e-2
    apart = alone.end_to_end_values.copy()
    apart[:, 2] *= 0.5
    assert gflow.verify(alone.assign(end_to_end_values=apart))["classes collapse"].holds is False


def test_a_network_of_three_outputs_follows_the_same_flow(flow, start):
    network = gflow.Network(lambda w, x: w[2] @ (w[1] @ (w[0] @ x)), homogeneity=3)
    problem = gflow.Problem(three(), network)
    same = gflow.gradient_flow(problem, start, until=FIRST, save=5)
    np.testing.assert_allclose(same.log_time[1:], flow.log_time[1:], rtol=INTEGRATORS)
    np.testing.assert_allclose(same.final_weights_3, flow.final_weights_3, rtol=1e-7)


def test_a_record_is_drawn_with_what_it_has(flow):
    import matplotlib.pyplot as plt

    axes = gflow.plot.summary(flow)
    assert axes[0, 0].lines and axes[0, 1].lines  # risk and norms
    plt.close("all")


def test_members_and_descent_hold_the_same_observables(flow, start):
    starts = tuple(np.stack([w, 0.9 * w]) for w in start)
    many = gflow.ensemble(PROBLEM, starts, until=FIRST, save=5, progress=False)
    np.testing.assert_allclose(
        many.singular_values.isel(member=0), flow.singular_values, rtol=1e-6, atol=1e-8
    )
    descent = gflow.gradient_descent(PROBLEM, start, optax.sgd(0.01), until=gflow.Steps(50), save=2)
    assert {"rank_residual", "collapse_duality", "nuclear_margin"} <= set(descent.variables)
    assert "rank_slack" in flow and "rank_slack" not in descent
    assert descent.output_sum_drift.max() < 1e-14


def test_observables_are_their_definitions(start):
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=w.shape) for w in start)
    data = PROBLEM.data
    reference = ClassReference.of(PROBLEM, weights)
    found = jax.jit(lambda weights: of_classes(PROBLEM, weights, reference))(weights)
    w = weights[2] @ weights[1] @ weights[0]
    sigma = np.linalg.svd(w, compute_uv=False)
    smallest = min(PROBLEM.margins(weights))
    np.testing.assert_allclose(found["schatten_margin"], smallest / np.sum(sigma ** (2 / 3)) ** 1.5)
    np.testing.assert_allclose(found["nuclear_margin"], smallest / sigma.sum())
    u = np.linalg.svd(weights[0])[0][:, :2]
    v = np.linalg.svd(weights[1])[2][:2].T
    cosine = np.linalg.svd(u.T @ v, compute_uv=False).min()
    np.testing.assert_allclose(found["subspace_misalignment"][0], 1 - cosine, rtol=1e-9)
    tail = np.linalg.svd(weights[1], compute_uv=False)[2:]
    expected = np.linalg.norm(tail) / np.linalg.norm(weights[1])
    np.testing.assert_allclose(found["rank_residual"][1], expected)
    h = data.inputs @ (weights[1] @ weights[0]).T
    means = np.stack([h[data.classes == c].mean(0) for c in range(3)])
    centred = means - h.mean(0)
    between = centred.T @ centred / 3
    within = (h - means[data.classes]).T @ (h - means[data.classes]) / len(h)
    variability = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 3
    np.testing.assert_allclose(found["collapse_variability"], variability, rtol=1e-8)
    nearest = np.linalg.norm(h[:, None] - means[None], axis=2).argmin(1)
    disagree = np.mean((h @ weights[2].T).argmax(1) != nearest)
    np.testing.assert_allclose(found["collapse_classifier"], disagree)
    shares = np.exp(log_softmax(-np.asarray(PROBLEM.margins(weights))))
    assert shares.sum() == pytest.approx(1)


def test_the_largest_margin_of_classes_is_certified():
    data = three(30, seed=2)
    found = data.max_margin()
    assert found.direction.shape == (3, 2) and found.relative_gap < 1e-12
    margins = np.asarray(data.margins_of(data.inputs @ found.direction.T))
    np.testing.assert_allclose(margins.min(), found.margin, rtol=1e-13)
    dual = (found.dual @ data.signed_inputs).reshape(3, 2)
    np.testing.assert_allclose(dual, found.margin * found.direction, atol=1e-14)
    mixed = gflow.Dataset(np.ones((3, 1)), [0, 1, 2])
    assert mixed.max_margin().inseparable


@pytest.mark.parametrize("seed", [0, 1])
def test_the_nuclear_margin_is_certified(seed):
    rng = np.random.default_rng(seed)
    centres, classes = rng.normal(size=(4, 5)), np.arange(24) % 4
    inputs = 2 * centres[classes] + 0.4 * rng.normal(size=(24, 5))
    data = gflow.Dataset(inputs, classes, num_classes=4)
    found, frobenius = gflow.max_margin(data, norm="nuclear"), data.max_margin()
    assert found.relative_gap < 1e-8
    assert np.linalg.norm(found.direction, "nuc") == pytest.approx(1, rel=1e-12)
    margins = np.asarray(data.margins_of(data.inputs @ found.direction.T))
    assert margins.min() == pytest.approx(found.margin, rel=1e-12)
    # The other norm's solution is worse in this one, and this one's in the other.
    assert frobenius.margin / np.linalg.norm(frobenius.direction, "nuc") < found.margin
    assert found.margin / np.linalg.norm(found.direction) < frobenius.margin
    dual = (found.dual @ data.signed_inputs).reshape(4, 5)
    assert np.linalg.norm(dual, 2) == pytest.approx(found.margin, rel=1e-8)


def test_depth_decides_the_norm_of_the_limit(start):
    data, until = three(), gflow.LogRisk(-1e16)  # beyond what margins can tell
    for norm, margin, widths in ((2, "margin", (2, 3)), ("nuclear", "nuclear_margin", (2, 4, 3))):
        best = gflow.max_margin(data, norm=norm)
        weights = gflow.init.admissible(gflow.init.gaussian(widths, seed=2), PROBLEM)
        flow = gflow.gradient_flow(PROBLEM, weights, until=until, save=60)
        assert flow.attrs["status"] == "precision_lost"
        assert "coordinates that lose nothing are for one output" in flow.attrs["message"]
        assert float(flow[margin][-1]) == pytest.approx(best.margin, rel=1e-9)
        assert np.all(flow[margin] <= best.margin_upper * (1 + 1e-13))
        claims = gflow.verify(flow)
        assert not claims.failed.rows, str(claims)
        maximal = claims["margin is maximal in its norm"]
        assert maximal.holds and "beyond 1e+10 shares are round-off" in maximal.why


def test_a_column_of_classes_is_read(tmp_path):
    path = tmp_path / "three.csv"
    path.write_text("x,y,kind\n1,2,oak\n3,4,elm\n5,6,ash\n7,8,elm\n")
    data = gflow.Dataset.from_csv(path, classes=True)
    assert data.num_classes == 3 and data.labels.tolist() == [2, 1, 0, 1]
    chosen = gflow.Dataset.from_csv(path, classes=["elm", "oak"])
    assert chosen.labels.tolist() == [1, 0, 0] and chosen.inputs[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"`classes` is \['elm', 'fir'\]; .*'ash', 'elm', 'oak'"):
        gflow.Dataset.from_csv(path, classes=["elm", "fir"])
    with pytest.raises(ValueError, match=r"`classes` is given beside"):
        gflow.Dataset.from_csv(path, classes=True, positive="elm")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("11", r"line 2, column 2 \('y'\): every label is '1'; expected two classes"),
        (["0", "1", "1.5"], r"line 4, .*'1.5', no whole number.*gflow.Regression.from_csv"),
        (["0", "one", "2"], r"line 3, .*'one', where most are numbers; .*`classes=\[\.\.\.\]`"),
        (["a", "b", "2"], r"line 4, .*'2', where most are words"),
    ],
)
def test_labels_that_are_hardly_classes_are_asked_about(tmp_path, labels, message):
    path = tmp_path / "some.csv"
    path.write_text("x,y\n" + "".join(f"{k},{label}\n" for k, label in enumerate(labels)))
    with pytest.raises(ValueError, match=message):
        gflow.Dataset.from_csv(path, classes=True)


def test_real_data_have_all_their_classes():
    for name, points, classes in (("digits", 1797, 10), ("iris", 150, 3), ("wine", 178, 3)):
        data = gflow.datasets.load(name)
        assert (data.num_points, data.num_classes) == (points, classes)
    assert gflow.datasets.load("wine").separable
    assert gflow.datasets.load("iris").max_margin().inseparable

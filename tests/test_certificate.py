"""The certificate of a flow: its estimates against closed forms, and what a record says first."""

import numpy as np
import pytest
import xarray as xr

import gflow
from gflow.headline import digits, headline
from gflow.record import CERTIFIED, VARIABLES

DATUM = np.array([0.8, -0.5])
RTOL = 1e-6  # loose, so that errors are above round-off

# An estimate is as large as the error up to this factor.
FACTOR = 10.0


@pytest.fixture(scope="module")
def flow():
    data = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.admissible(gflow.init.gaussian((2, 4, 3, 1), seed=1), problem)
    return gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-50), save=5, certify=True)


@pytest.fixture(scope="module")
def loose():
    """One datum at a loose tolerance in physical time, with its closed form."""
    problem = gflow.Problem(gflow.Dataset([DATUM], [1]), loss=gflow.Exponential())
    start = np.array([[0.3, 0.2]])
    record = gflow.gradient_flow(
        problem, (start,), until=gflow.LogTime(40), save=6, rtol=RTOL, certify=True
    )
    truth = gflow.exact.one_datum_linear(DATUM, start[0], log_time=record.log_time.values[1:])
    return record, truth


def test_estimates_cover_the_true_error(loose):
    record, truth = loose
    error = np.linalg.norm(record.end_to_end[1:] - truth.end_to_end, axis=1)
    claimed = np.linalg.norm(record.end_to_end_error[1:], axis=1)
    assert (error <= FACTOR * claimed).all()
    assert (
        claimed <= FACTOR * np.maximum(error.max(), 1e-12 * record.end_to_end.max().item())
    ).all()


def test_the_energy_identity_is_measured_in_a_time_clock(loose):
    record, _ = loose
    assert record.clock_error[0] == 0
    assert 0 < record.clock_error.max() < 1e3 * RTOL


def test_every_observable_of_a_certified_flow_has_an_error_of_its_own_shape(flow):
    for name in CERTIFIED:
        if name in flow:
            error = flow[f"{name}_error"]
            assert error.dims == flow[name].dims == VARIABLES[f"{name}_error"][0]
            assert np.isfinite(error).all() and (error[0] == 0).all()
            assert (error[1:] >= 0).all()


def test_the_second_run_takes_steps_of_its_own(flow):
    assert flow.attrs["certificate_num_steps"] > flow.num_steps[-1]
    assert flow.attrs["certificate"] == "a second run at rtol = 1e-10"


def test_lemma_2_has_slack_at_every_point(flow):
    assert (flow.rank_one_slack > 0).all()
    assert (flow.alignment_slack > 0).all()
    claims = gflow.verify(flow)
    np.testing.assert_allclose(claims["Lemma 2: rank one"].value, flow.rank_one_slack.min())
    np.testing.assert_allclose(claims["Lemma 2: alignment"].value, flow.alignment_slack.min())


def test_the_digits_left_fall_with_the_size_of_the_margins(flow):
    np.testing.assert_allclose(flow.digits_left[-1], -np.log10(np.finfo(float).eps * 50))


def test_a_record_prints_its_headline_first(flow):
    line = headline(flow)
    fewest = int(min(digits(flow).values()))
    assert line.startswith(f"log R = -50, {fewest} digits certain, ")
    assert fewest >= 8
    assert str(flow).splitlines()[0] == line
    assert line in flow._repr_html_()
    assert isinstance(flow, xr.Dataset)


def test_the_headline_is_that_of_the_last_point_selected(flow):
    assert headline(flow.isel(point=slice(0, 2))) != headline(flow)
    assert headline(flow[["margin"]]) == ""
    assert not str(flow[["margin"]]).startswith("log R")


def test_a_record_without_certificate_says_what_it_can():
    problem = gflow.Problem(gflow.Dataset([DATUM], [1]), loss=gflow.Exponential())
    record = gflow.gradient_flow(problem, (np.array([[0.3, 0.2]]),), until=gflow.LogTime(2), save=2)
    assert "margin_error" not in record
    assert "certain" not in headline(record)

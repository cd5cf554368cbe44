import diffrax
import numpy as np
import optax
import pytest

import gflow
from gflow import record as records
from gflow.analysis.compare import compare
from gflow.dynamics.descent import gradient_descent
from gflow.problem.data import Dataset

# -------------------------------------------------------------------------------------------------
# Records written by hand: x = log(1 + t), everything a known smooth function of x
# -------------------------------------------------------------------------------------------------


def known(x, shift=0.0, **attrs):
    """A record whose values at x are known, moved by ``shift`` in x for all but the clocks."""
    x = np.asarray(x, dtype=float)
    y = x + shift
    w = np.stack([np.exp(0.3 * y), np.sin(y), 2.0 + y], axis=1)
    with np.errstate(divide="ignore"):
        log_time = np.log(np.expm1(x))
    points = {
        "log_risk": -0.5 - np.sinh(y),
        "log_time": log_time,
        "num_steps": np.arange(len(x)),
        "margin": np.tanh(y),
        "misalignment": np.exp(-3 * y)[:, None],
        "frobenius_norm": np.stack([1 + y, np.exp(y)], axis=1),
        "end_to_end": w,
        "weights_1": np.stack([np.outer(a, [1.0, -1.0]) for a in w]),
        "weights_2": w[:, None, :],
    }
    dims = {"weights_1": ["a", "b"], "weights_2": ["c", "a"]}
    return records.build(
        {name: list(values) for name, values in points.items()},
        constants={},
        attrs={"kind": "flow", **attrs},
        extra_dims=dims,
    ), w


# Times go through log(1 + t) and back.
ROUND_OFF = 1e-14

NODES = np.linspace(0.0, 6.0, 61)
BETWEEN = NODES[:-1] + 0.037


def test_a_record_has_no_gap_to_itself_at_time_or_risk():
    flow, _ = known(NODES)
    for at in ("time", "log_risk"):
        gaps = compare(flow, flow, at=at)
        assert gaps.sizes["point"] == len(NODES)
        for name, gap in gaps.data_vars.items():
            if str(name) != "num_steps":
                assert np.max(np.abs(gap.values)) <= ROUND_OFF, name


def test_gaps_at_common_points_are_differences_and_nothing_is_interpolated():
    flow, w = known(NODES)
    descent, v = known(NODES[::3], shift=0.01)
    gaps = compare(flow, descent)
    expected = np.linalg.norm(v - w[::3], axis=1)
    np.testing.assert_allclose(gaps.end_to_end_gap, expected, rtol=1e-12)
    unit = v / np.linalg.norm(v, axis=1)[:, None] - (w / np.linalg.norm(w, axis=1)[:, None])[::3]
    np.testing.assert_allclose(gaps.direction_gap, np.linalg.norm(unit, axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        gaps.log_risk_gap, descent.log_risk.values - flow.log_risk.values[::3], rtol=1e-12
    )
    np.testing.assert_allclose(
        gaps.weights_gap, np.stack([np.sqrt(2) * expected, expected], axis=1), rtol=1e-12
    )
    assert gaps.end_to_end_gap_error.max() == 0.0 and gaps.weights_gap_error.max() == 0.0


def test_between_saved_points_the_error_is_small_and_its_estimate_covers_it():
    flow, _ = known(NODES)
    descent, _ = known(BETWEEN)  # the same curve: every gap is an interpolation error
    gaps = compare(flow, descent)
    for name in ("end_to_end", "direction", "log_risk", "margin", "frobenius_norm", "weights"):
        gap, error = np.abs(gaps[f"{name}_gap"].values), gaps[f"{name}_gap_error"].values
        assert gap.max() < 2e-5, name
        assert np.mean(gap <= error + 1e-13) > 0.97, name


def test_the_error_of_interpolation_has_order_six():
    errors = []
    for points in (16, 31):
        nodes = np.linspace(0.0, 6.0, points)
        middle = 0.5 * (nodes[5:-5] + nodes[6:-4])
        gaps = compare(known(nodes)[0], known(middle)[0])
        errors.append(float(np.max(gaps.end_to_end_gap)))
    assert errors[0] / errors[1] == pytest.approx(2**6, rel=0.25)


def test_a_small_quantity_is_interpolated_to_relative_accuracy():
    flow, _ = known(NODES)
    descent, _ = known(BETWEEN)  # the misalignment falls from 1 to 1e-8
    gaps = compare(flow, descent)
    assert np.max(np.abs(gaps.misalignment_gap / descent.misalignment)) < 1e-10


def test_at_equal_risk_the_gap_is_one_of_time():
    flow, _ = known(NODES)
    descent, _ = known(NODES[10:-10], shift=0.05)
    gaps = compare(flow, descent, at="log_risk")
    assert "log_risk_gap" not in gaps and "log_risk" in gaps.coords
    # Equal risk means equal x + shift, so everything else agrees and time lags by the shift.
    assert gaps.end_to_end_gap.max() < 1e-6
    flow_time = np.log(np.expm1(NODES[10:-10] + 0.05))
    np.testing.assert_allclose(gaps.log_time_gap, descent.log_time.values - flow_time, rtol=1e-6)


def test_points_beyond_the_flow_are_left_out_and_counted():
    gaps = compare(known(NODES)[0], known(np.linspace(0.0, 8.0, 81))[0])
    assert gaps.sizes["point"] == 61
    assert gaps.attrs["points_left_out"] == 20


def test_the_first_passage_of_a_threshold_is_its_first_point():
    flow, _ = known(NODES)
    descent, _ = known(NODES, shift=0.1)
    gaps = compare(flow, descent, thresholds={"frobenius_norm_gap": 1.0, "margin_gap": 9.0})
    # The second layer's gap e^x (e^0.1 - 1) passes 1 at x = 2.2522, so at the node 2.3.
    expected = np.log(np.expm1(2.3))
    assert float(gaps.frobenius_norm_gap_first_above) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(gaps.margin_gap_first_above)


@pytest.mark.parametrize("points", [1, 2, 3, 4, 5])
def test_records_of_few_points_are_compared_as_well_as_they_allow(points):
    flow, _ = known(NODES[:points])
    descent, _ = known(NODES[:points], shift=0.1)
    gaps = compare(flow, descent)
    assert np.all(np.isfinite(gaps.end_to_end_gap)) and np.all(gaps.end_to_end_gap_error == 0.0)
    if points > 1:
        between, _ = known([0.05])
        gap = compare(flow, between)
        assert float(gap.end_to_end_gap[0]) <= float(gap.end_to_end_gap_error[0])


def test_a_repeated_point_does_no_harm():
    flow, _ = known(np.sort(np.append(NODES, [3.0, 3.0 + 1e-13])))
    gaps = compare(flow, known(BETWEEN)[0])
    assert gaps.end_to_end_gap.max() < 2e-5


def test_what_a_record_lacks_is_left_out():
    flow, _ = known(NODES)
    gaps = compare(flow.drop_vars("weights_1"), known(NODES)[0].drop_vars("margin"))
    assert "weights_gap" not in gaps and "margin_gap" not in gaps
    assert "end_to_end_gap" in gaps


def test_undefined_values_at_the_start_stay_there():
    flow, _ = known(NODES)
    flow["misalignment"][0] = np.nan
    gaps = compare(flow, known(NODES)[0])
    assert np.isnan(gaps.misalignment_gap[0]) and np.all(np.isfinite(gaps.misalignment_gap[1:]))


def test_records_of_different_runs_are_compared_with_a_warning():
    flow, _ = known(NODES, start_sha256="a", loss="Logistic()")
    descent, _ = known(NODES, start_sha256="b", loss="Logistic()")
    with pytest.warns(UserWarning, match="differ in initial weights"):
        compare(flow, descent)


def test_wrong_arguments_are_refused_with_what_to_do(unchecked):
    flow, _ = known(NODES)
    with pytest.raises(ValueError, match="'time' or 'log_risk'"):
        compare(flow, flow, at="steps")
    with pytest.raises(ValueError, match=r"do not overlap.*LogTime"):
        compare(flow, known(NODES + 7.0)[0])
    with pytest.raises(
        ValueError, match="`thresholds` names 'gap'; expected one of end_to_end_gap"
    ):
        compare(flow, flow, thresholds={"gap": 1.0})
    with pytest.raises(ValueError, match="positive"):
        compare(flow, flow, thresholds={"margin_gap": 0.0})
    with pytest.raises(ValueError, match=r"dimension 3.*2"):
        compare(flow, flow.isel(coordinate=[0, 1]))
    with pytest.raises(ValueError, match="gflow record"):
        compare(flow, {"log_risk": [1.0]})


# -------------------------------------------------------------------------------------------------
# Runs
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    """Descent at two step sizes, and the flow saved at the times of both."""
    problem = gflow.Problem(Dataset([[0.5, 0.2], [-0.5, 0.6]], [1, -1]), loss=gflow.Logistic())
    weights = gflow.init.balanced((2, 3, 1), end_to_end=(0.3, 0.2))

    def descend(rate, steps):
        options = {"until": gflow.Steps(steps), "save": steps // 20 * np.arange(1, 21)}
        return gradient_descent(problem, weights, optax.sgd(rate), keep_weights=True, **options)

    descents = [descend(0.1, 200), descend(0.05, 400)]
    times = descents[0].log_time.values[1:]
    flow = gflow.gradient_flow(
        problem,
        weights,
        until=gflow.LogTime(times[-1]),
        save=times,
        keep_weights=True,
        solver=diffrax.Dopri8(),
    )
    return flow, descents


def test_the_gap_is_of_first_order_in_the_step_size(runs):
    flow, (coarse, fine) = runs
    for name in ("end_to_end_gap", "log_risk_gap", "weights_gap"):
        last = [np.max(np.abs(compare(flow, d)[name].values[-1])) for d in (coarse, fine)]
        # e(h)/e(h/2) = 2 + O(h)
        assert last[0] / last[1] == pytest.approx(2.0, abs=0.05), name


def test_the_error_bar_is_the_flows_own_error_where_nothing_is_interpolated():
    flow, w = known(NODES, rtol=1e-9)
    flow["clock_error"] = ("point", np.linspace(0.0, 3e-9, len(NODES)))
    gaps = compare(flow, known(NODES, shift=0.01)[0])
    assert gaps.attrs["flow_error"] == 3e-9
    np.testing.assert_allclose(
        gaps.end_to_end_gap_error, 3e-9 * np.linalg.norm(w, axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(gaps.log_risk_gap_error, 3e-9 * np.abs(flow.log_risk), rtol=1e-12)
    np.testing.assert_allclose(gaps.direction_gap_error, 3e-9, rtol=1e-12)


@pytest.mark.parametrize("certify", [False, True])
def test_the_error_bar_covers_the_error_of_a_loose_flow(runs, certify):
    tight, _ = runs
    problem = gflow.Problem(Dataset([[0.5, 0.2], [-0.5, 0.6]], [1, -1]), loss=gflow.Logistic())
    loose = gflow.gradient_flow(
        problem,
        gflow.init.balanced((2, 3, 1), end_to_end=(0.3, 0.2)),
        until=gflow.LogTime(float(tight.log_time[-1])),
        save=tight.log_time.values[1:],
        keep_weights=True,
        solver=diffrax.Dopri8(),
        rtol=1e-5,
        certify=certify,
    )
    gaps = compare(loose, tight)  # what is left is the error of the loose one
    assert gaps.attrs["error_bars"] == ("certificate" if certify else "tolerance")
    for name in ("end_to_end_gap", "log_risk_gap", "frobenius_norm_gap", "weights_gap"):
        bar = gaps[f"{name}_error"] * (2 if certify else 1)  # an estimate, within a factor
        assert np.all(np.abs(gaps[name]) <= bar), name
        assert np.max(np.abs(gaps[name])) > 1e-12, name  # and there is one
    if certify:
        assert gaps.end_to_end_gap_error.max() < 10 * gaps.end_to_end_gap.max()


def test_a_flow_saved_at_descents_times_needs_no_interpolation(runs):
    flow, descents = runs
    for descent in descents:
        gaps = compare(flow, descent)
        assert gaps.attrs["points_left_out"] == 0
        assert gaps.end_to_end_gap_error.max() < 1e-8 < gaps.end_to_end_gap[-1]
        np.testing.assert_array_equal(gaps.num_steps, descent.num_steps)


def test_gaps_survive_a_round_trip_through_netcdf(runs, tmp_path):
    import xarray as xr

    flow, (coarse, _) = runs
    gaps = compare(flow, coarse, thresholds={"end_to_end_gap": 1e-3})
    gaps.to_netcdf(tmp_path / "gaps.nc")
    with xr.open_dataset(tmp_path / "gaps.nc") as stored:
        xr.testing.assert_equal(stored.load(), gaps)

import numpy as np
import pytest
import xarray as xr

import gflow


@pytest.fixture(scope="module")
def flow():
    data = gflow.datasets.two_point()
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.balanced((2, 3, 1), end_to_end=(0.3, -0.1))
    return gflow.gradient_flow(
        problem, weights, until=gflow.LogRisk(-20), save=4, keep_weights=True
    )


def test_a_record_is_labelled(flow):
    assert flow.sizes["point"] == 4
    assert list(flow.layer) == [1, 2]
    assert list(flow.pair) == [1]
    assert flow.margin.attrs["units"] == "1"
    assert "normalised margin" in flow.margin.attrs["long_name"]
    for name in ("status", "message", "solver", "clock", "rtol", "jax_version", "dataset"):
        assert flow.attrs[name] != ""


def test_every_variable_of_a_record_says_what_it_is(flow):
    assert all(flow[name].attrs["long_name"] for name in flow.data_vars)


def test_the_final_weights_are_in_the_record(flow):
    np.testing.assert_array_equal(flow.final_weights_1, flow.weights_1[-1])
    np.testing.assert_array_equal(flow.initial_weights_2, flow.weights_2[0])


def test_a_saved_record_is_read_back_unchanged(flow, tmp_path):
    path = gflow.save(flow, tmp_path / "flow.nc")
    xr.testing.assert_identical(gflow.load(path), gflow.load(gflow.save(gflow.load(path), path)))
    xr.testing.assert_equal(gflow.load(path), flow)
    assert list(tmp_path.iterdir()) == [path]


def test_plain_xarray_opens_a_saved_record(flow, tmp_path):
    path = gflow.save(flow, tmp_path / "flow.nc")
    with xr.open_dataset(path) as plain:
        np.testing.assert_array_equal(plain.margin, flow.margin)
        assert plain.attrs["status"] == "reached"


def test_a_missing_folder_is_named(flow, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gflow.save(flow, tmp_path / "no" / "flow.nc")


def test_a_file_that_is_no_record_is_refused(flow, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        gflow.load(tmp_path / "none.nc")
    foreign = tmp_path / "foreign.nc"
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(foreign)
    with pytest.raises(ValueError, match="schema None"):
        gflow.load(foreign)
    path = gflow.save(flow, tmp_path / "cut.nc")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as netCDF"):
        gflow.load(path)

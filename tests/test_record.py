from datetime import datetime
from pathlib import Path

import jax.numpy as jnp
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


def test_records_can_be_subtracted_averaged_and_still_be_printed(flow):
    difference = flow - flow
    assert float(abs(difference.margin).max()) == 0.0 and "beyond_hand_over" in difference
    for made in (
        difference,
        flow.mean("point"),
        flow.isel(point=slice(0, 0)),
        flow > 0,
        flow[["margin"]],
        flow.expand_dims("start"),
        xr.concat([flow, flow], "start"),
        flow.where(flow.margin > 0),
        flow.drop_vars("log_risk"),
        flow.rename(point="saved"),
    ):
        assert "margin" in repr(made)
    assert flow.beyond_hand_over.mean() == 0.0


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (True, 1),
        (np.False_, 0),
        ({"lr": 0.1, "at": Path("a")}, '{"lr": 0.1, "at": "a"}'),
        (Path("a/b.nc"), "a/b.nc"),
        (jnp.float32(1.5), 1.5),
        ([1, 2], [1, 2]),
        ([True, False], [1, 0]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2]], "[[1], [2]]"),
        ([], "[]"),
        ([1, None], "[1, null]"),
        ({2, 1}, [1, 2]),
        (datetime(2026, 1, 2), "2026-01-02T00:00:00"),
        (np.ones((2, 2)), "[[1.0, 1.0], [1.0, 1.0]]"),
    ],
)
def test_notes_in_attributes_are_kept_as_far_as_a_file_can_hold_them(flow, tmp_path, value, stored):
    noted = flow.assign_attrs(note=value, nothing=None)
    noted["margin"].attrs["note"] = value
    loaded = gflow.load(gflow.save(noted, tmp_path / "a.nc"))
    assert "nothing" not in loaded.attrs
    for attrs in (loaded.attrs, loaded.margin.attrs):
        np.testing.assert_array_equal(attrs["note"], stored)
    assert noted.attrs["note"] is value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.assign_attrs(note=object()), r"`record.attrs\['note'\]` is a object"),
        (lambda r: r.assign_attrs(note=1j), r"`record.attrs\['note'\]` is a complex"),
        (lambda r: r.assign_attrs({"a/b": 1}), r"`record.attrs` has the name 'a/b', which has a"),
        (lambda r: r.assign({"a/b": 1}), r"the variable or dimension 'a/b'"),
        (lambda r: r.assign({3: 1}), r"the variable or dimension 3, whose name is no text"),
        (lambda r: r.assign(a=r.margin * 1j), r"`record\['a'\]` has the type complex128"),
        (lambda r: r.assign(a=("p", np.array([None, {}], dtype=object))), "cannot be stored"),
    ],
)
def test_what_no_file_can_hold_is_named_and_the_old_file_stays(flow, tmp_path, change, message):
    path = gflow.save(flow, tmp_path / "a.nc")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        gflow.save(change(flow), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

"""A grid of runs against the same runs one by one; engines whose processes are killed."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
import pytest
import xarray as xr
from distributed import Client, LocalCluster

import gflow
from gflow.__main__ import main
from gflow.dynamics.descending.run import DescentRun

GOAL = gflow.Steps(50)
STEPS = optax.sgd(0.3)
HOW = {"optimizer": STEPS, "group_size": 2, "progress": False}
GRID = {"depth": [2, 1], "scale": [0.5, 1.0], "seed": range(2)}


def start(depth, scale, seed):
    if (depth, scale, seed) == (1, 1.0, 0):
        raise RuntimeError("no such start")
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.gaussian((2, *[3] * (depth - 1), 1), scale=scale, seed=seed)
    return problem, gflow.init.admissible(weights, problem)


class Dying(NamedTuple):
    """The same start, in a process that ends there while a file exists."""

    file: Path

    def __call__(self, **point):
        if self.file.exists() and multiprocessing.parent_process() is not None:
            os._exit(1)
        return start(**point)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def found(folder):
    """By two workers of a scheduler, one of which is killed as soon as a group is done."""
    groups = folder / "groups"
    local = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": "ERROR"}
    with LocalCluster(n_workers=2, **local) as cluster, Client(cluster) as client:
        victims = list(client.run(os.getpid).values())

        def kill():
            while not list(groups.glob("group-*.nc")):
                time.sleep(0.01)
            os.kill(victims[0], signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        engine = client.get_executor()
        found = gflow.sweep(start, GRID, until=GOAL, save=3, folder=groups, executor=engine, **HOW)
        killer.join(60)
        assert victims[0] not in client.run(os.getpid).values()
    return found


def test_every_point_is_where_its_labels_say(found):
    assert dict(found.misalignment.sizes) == {
        "depth": 2, "scale": 2, "seed": 2, "point": 3, "pair": 1,
    }  # fmt: skip
    problem, weights = start(2, 0.5, 1)
    single = gflow.gradient_descent(problem, weights, STEPS, until=GOAL, save=3)
    member = found.sel(depth=2, scale=0.5, seed=1)
    for name in ("log_risk", "margin", "misalignment", "end_to_end", "frobenius_norm"):
        np.testing.assert_allclose(member[name].values, single[name].values, rtol=1e-10)
    means = found.sel(depth=2, scale=0.5).mean("seed")
    assert np.isfinite(means.frobenius_norm).all()


def test_an_engine_changes_no_bit(found):
    alone = gflow.sweep(start, GRID, until=GOAL, save=3, **HOW)
    for name in alone.data_vars:
        np.testing.assert_array_equal(alone[name].values, found[name].values, err_msg=name)


def test_an_ensemble_on_an_engine_is_the_ensemble(monkeypatch):
    problem, _ = start(2, 0.5, 0)
    batch = tuple(
        np.stack(each) for each in zip(*(start(2, 0.5, k)[1] for k in range(3)), strict=True)
    )
    given = {"until": GOAL, "save": 3, "progress": False}
    alone = gflow.ensemble(problem, batch, STEPS, **given)
    monkeypatch.setattr("gflow.dynamics.ensemble.AT_ONCE", 2)
    with ThreadPoolExecutor(2) as engine:
        found = gflow.ensemble(problem, batch, STEPS, executor=engine, **given)
    assert found.sizes == alone.sizes
    np.testing.assert_allclose(found.log_risk.values, alone.log_risk.values, rtol=1e-12)
    np.testing.assert_array_equal(found.status.values, alone.status.values)


def test_a_sweep_on_disk_is_opened_when_values_are_asked_for(found, folder):
    lazy = gflow.load(folder / "groups", lazy=True)
    assert lazy.frobenius_norm.chunks is not None
    saved = gflow.load(gflow.save(lazy, folder / "saved.nc"))
    xr.testing.assert_equal(saved.frobenius_norm, found.frobenius_norm)
    xr.testing.assert_equal(lazy.load(), found)
    xr.testing.assert_equal(gflow.load(folder / "groups"), found)
    assert lazy.attrs == found.attrs


def test_what_a_shallower_network_lacks_is_nan(found):
    assert np.isnan(found.sel(depth=1).misalignment).all()
    assert np.isnan(found.sel(depth=1, seed=1).frobenius_norm.sel(layer=2)).all()
    assert np.isfinite(found.sel(depth=1, seed=1).frobenius_norm.sel(layer=1)).all()


def test_a_point_that_fails_says_so_and_touches_no_other(found):
    bad = found.sel(depth=1, scale=1.0, seed=0)
    assert str(bad.status.values) == "refused"
    assert str(bad.message.values) == "RuntimeError: no such start"
    assert int((found.status == "reached").sum()) == 7


def test_a_group_whose_process_dies_fails_and_the_same_call_does_it(found, tmp_path):
    # This engine, unlike dask, does not do again what a dead process was at.
    engine = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    given = {"until": GOAL, "save": 3, "folder": tmp_path / "groups", **HOW}
    (tmp_path / "die").touch()
    with engine:
        lost = gflow.sweep(Dying(tmp_path / "die"), GRID, executor=engine, **given)
    assert set(lost.status.values.ravel()) == {"failed"}
    assert "BrokenProcessPool" in str(lost.message.values[0, 0, 0])
    (tmp_path / "die").unlink()
    again = gflow.sweep(Dying(tmp_path / "die"), GRID, **given)
    assert again.log_risk.equals(found.log_risk)


def test_a_function_is_called_where_its_group_is_followed():
    calls = []

    def counted(seed):
        calls.append(seed)
        return start(2, 0.5, seed)

    class Engine(Executor):  # one that never runs anything
        def submit(self, function, *args):
            raise KeyboardInterrupt

    given = HOW | {"group_size": 1000}
    with pytest.raises(KeyboardInterrupt):
        gflow.sweep(counted, {"seed": range(100_000)}, until=GOAL, executor=Engine(), **given)
    assert calls == [0, 50_000, 99_999]


def test_a_finished_sweep_computes_nothing_and_another_is_refused(found, folder, monkeypatch):
    monkeypatch.setattr("gflow.report.sweep.follow_group", None)
    given = {"folder": folder / "groups", **HOW}
    again = gflow.sweep(start, GRID, until=GOAL, save=3, **given)
    assert again.log_risk.equals(found.log_risk)
    with pytest.raises(ValueError, match="holds another sweep"):
        gflow.sweep(start, GRID, until=GOAL, save=4, **given)


def test_ctrl_c_returns_what_is_done_and_the_next_call_the_rest(found, tmp_path, monkeypatch):
    given = {"folder": tmp_path / "groups", **HOW}
    ended, take = [], DescentRun.take

    def interrupted(run, *answer):
        if len(ended) == 2:
            raise KeyboardInterrupt
        take(run, *answer)
        if run.end is not None:
            ended.append(run)

    with monkeypatch.context() as patch:
        patch.setattr(DescentRun, "take", interrupted)
        part = gflow.sweep(start, GRID, until=GOAL, save=3, **given)
    ends = part.status.values.ravel().tolist()
    assert [ends.count(end) for end in ("reached", "interrupted", "refused")] == [2, 6, 0]
    assert len(list((tmp_path / "groups").glob("group-*.nc"))) == 1
    done = part.status == "reached"
    assert part.log_risk.where(done).equals(found.log_risk.where(done))
    whole = gflow.sweep(start, GRID, until=GOAL, save=3, **given)
    assert whole.log_risk.equals(found.log_risk)


def test_phase_diagram_shows_the_medians(found):
    (ax,) = gflow.plot.phase_diagram(found, "frobenius_norm", x="scale", y="depth")
    shown = ax.images[0].get_array()
    expected = found.frobenius_norm.isel(point=-1).max("layer").median("seed")
    np.testing.assert_array_equal(shown, expected.transpose("depth", "scale").values)
    with pytest.raises(ValueError, match="no parameter 'width'"):
        gflow.plot.phase_diagram(found, x="width")


CONFIG = """
[data]
dataset = "separable"
n = 20
d = 2
margin = 0.1
[network]
width = 3
[descent]
optimizer = "sgd"
until = { steps = 10 }
save = 3
[sweep]
network.depth = [1, 2]
descent.learning_rate = [0.1, 0.2]
"""


def test_command_line_sweeps_a_file(tmp_path, capsys):
    config = tmp_path / "rates.toml"
    config.write_text(CONFIG)
    assert main(["sweep", str(config), "--out", str(tmp_path / "out"), "--no-progress"]) == 0
    assert "4 runs: 4 reached" in capsys.readouterr().out
    assert (tmp_path / "out" / "phase_diagram.png").exists()
    found = gflow.load(tmp_path / "out" / "sweep.nc")
    assert found.log_risk.dims == ("depth", "learning_rate", "point")
    sums = np.exp(found.log_time.isel(point=-1))  # ten steps of each size
    np.testing.assert_allclose(sums, np.broadcast_to([1.0, 2.0], (2, 2)), rtol=1e-12)


def test_bad_grids_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`grid` is empty"):
        gflow.sweep(start, {}, until=GOAL)
    with pytest.raises(ValueError, match=r"`executor` is a pool of forked processes"):
        gflow.sweep(start, GRID, until=GOAL, executor=ProcessPoolExecutor(1, get_context("fork")))
    with pytest.raises(ValueError, match=r"`lazy` is true without `folder`"):
        gflow.sweep(start, GRID, until=GOAL, lazy=True)
    with pytest.raises(ValueError, match=r"a folder without sweep.json"):
        gflow.load(tmp_path)
    with pytest.raises(ValueError, match=r"no two alike"):
        gflow.sweep(start, {**GRID, "seed": [1, 1]}, until=GOAL)
    with pytest.raises(
        ValueError, match=r"fails at every point .*tried first, of 1\): no such start"
    ):
        gflow.sweep(start, {"depth": [1], "scale": [1.0], "seed": [0]}, until=GOAL)
    (tmp_path / "none.toml").write_text('[data]\ndataset = "separable"\n')
    with pytest.raises(ValueError, match=r"has no table \[sweep\]"):
        gflow.sweep(tmp_path / "none.toml")

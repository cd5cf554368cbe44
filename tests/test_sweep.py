"""A grid of runs against the same runs one by one; kills, and processes that share a folder."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import optax
import pytest

import gflow
from gflow.__main__ import main
from gflow.dynamics.descending.run import DescentRun

GOAL = gflow.Steps(50)
STEPS = optax.sgd(0.3)
GRID = {"depth": [2, 1], "scale": [0.5, 1.0], "seed": range(2)}

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import gflow, test_sweep
found = gflow.sweep(test_sweep.start, test_sweep.GRID, until=test_sweep.GOAL, save=3,
                    optimizer=test_sweep.STEPS, folder=sys.argv[1], group_size=2)
gflow.save(found, sys.argv[2])
"""


def start(depth, scale, seed):
    if (depth, scale, seed) == (1, 1.0, 0):
        raise RuntimeError("no such start")
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    weights = gflow.init.gaussian((2, *[3] * (depth - 1), 1), scale=scale, seed=seed)
    return problem, gflow.init.admissible(weights, problem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def found(folder):
    """Two processes share the groups; one of them is killed as soon as the first is done."""
    program = PROGRAM.format(tests=os.path.dirname(__file__))
    groups = folder / "groups"

    def begin(name):
        command = [sys.executable, "-c", program, str(groups), str(folder / name)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    victim, other = begin("victim.nc"), begin("other.nc")
    while not list(groups.glob("group-*.nc")) and victim.poll() is None:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    _, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    return gflow.load(folder / "other.nc")


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


def test_two_processes_of_one_distributed_program_find_the_same(found, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def begin(number):
        joined = f"import jax; jax.distributed.initialize({address!r}, 2, {number})\n"
        program = joined + PROGRAM.format(tests=os.path.dirname(__file__))
        command = [
            sys.executable,
            "-c",
            program,
            str(tmp_path / "groups"),
            str(tmp_path / f"{number}.nc"),
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    processes = [begin(number) for number in range(2)]
    for number, process in enumerate(processes):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        mine = gflow.load(tmp_path / f"{number}.nc")
        for name in ("log_risk", "margin", "end_to_end"):
            np.testing.assert_array_equal(mine[name].values, found[name].values)


def test_what_a_shallower_network_lacks_is_nan(found):
    assert np.isnan(found.sel(depth=1).misalignment).all()
    assert np.isnan(found.sel(depth=1, seed=1).frobenius_norm.sel(layer=2)).all()
    assert np.isfinite(found.sel(depth=1, seed=1).frobenius_norm.sel(layer=1)).all()


def test_a_point_that_fails_says_so_and_touches_no_other(found):
    bad = found.sel(depth=1, scale=1.0, seed=0)
    assert str(bad.status.values) == "refused"
    assert str(bad.message.values) == "RuntimeError: no such start"
    assert int((found.status == "reached").sum()) == 7


def test_a_finished_sweep_computes_nothing_and_another_is_refused(found, folder, monkeypatch):
    monkeypatch.setattr("gflow.report.sweep._follow", None)
    given = {"optimizer": STEPS, "folder": folder / "groups", "group_size": 2}
    again = gflow.sweep(start, GRID, until=GOAL, save=3, **given)
    assert again.log_risk.equals(found.log_risk)
    assert not list((folder / "groups").glob(".*.lock"))
    with pytest.raises(ValueError, match="holds another sweep"):
        gflow.sweep(start, GRID, until=GOAL, save=4, **given)


def test_ctrl_c_returns_what_is_done_and_the_next_call_the_rest(found, tmp_path, monkeypatch):
    given = {"optimizer": STEPS, "folder": tmp_path / "groups", "group_size": 2}
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
    assert [ends.count(end) for end in ("reached", "interrupted", "refused")] == [2, 5, 1]
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
    with pytest.raises(ValueError, match=r"no two alike"):
        gflow.sweep(start, {**GRID, "seed": [1, 1]}, until=GOAL)
    with pytest.raises(ValueError, match=r"fails at every point of the grid: no such start"):
        gflow.sweep(start, {"depth": [1], "scale": [1.0], "seed": [0]}, until=GOAL)
    (tmp_path / "none.toml").write_text('[data]\ndataset = "separable"\n')
    with pytest.raises(ValueError, match=r"has no table \[sweep\]"):
        gflow.sweep(tmp_path / "none.toml")

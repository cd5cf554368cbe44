"""Nothing lost: runs that are killed, stopped or out of disk go on bit for bit."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import gflow
from gflow.dynamics.drive import checkpoint as module, flow_lanes, progress

DATA = gflow.datasets.separable(n=20, d=2, margin=0.2, seed=1)
PROBLEM = gflow.Problem(DATA, loss=gflow.Exponential())
START = gflow.init.admissible(gflow.init.gaussian((2, 3, 1), seed=0), PROBLEM)
STEPS = 400


class Shaken(NamedTuple):
    key: Array
    count: Array


def shaken_update(gradient, state, weights=None, **extra):
    """Descent that is pushed about: its state holds a random key."""
    noise = optax.tree.random_like(jax.random.fold_in(state.key, state.count), gradient)
    updates = jax.tree.map(lambda g, e: -0.1 * g + 1e-3 * e, gradient, noise)
    return updates, Shaken(state.key, state.count + 1)


SHAKEN = optax.GradientTransformationExtraArgs(
    lambda weights: Shaken(jax.random.key(3), jnp.zeros((), jnp.int64)), shaken_update
)


def squared(problem, weights):
    return jnp.sum(weights[0] ** 2)


def flow(path=None, **changes):
    """Across the hand-over, and in split coordinates for more steps than one look takes."""
    settings = {"until": gflow.LogRisk(-1e60), "save": 4, "observables": {"squared": squared}}
    return gflow.gradient_flow(
        PROBLEM, START, checkpoint=path, keep_weights=True, **(settings | changes)
    )


def descent(path=None, **changes):
    settings = {"until": gflow.Steps(STEPS) | gflow.LogRisk(-50), "save": 5, "batch_size": 5}
    return gflow.gradient_descent(
        PROBLEM, START, SHAKEN, checkpoint=path, keep_weights=True, **(settings | changes)
    )


VERBS = [flow, descent]


@pytest.fixture(scope="module")
def whole():
    return {verb: verb() for verb in VERBS}


def look_always(monkeypatch):
    """The host looks after every step or a few, and writes every time."""
    monkeypatch.setattr(module, "SECONDS_A_SEGMENT", -1.0)
    monkeypatch.setattr(module, "SHARE", 0.0)
    monkeypatch.setattr(progress, "SECONDS_A_CALL", 0.0)
    monkeypatch.setattr(flow_lanes, "TRIPS_AT_FIRST", 1)


@pytest.fixture
def every_step(monkeypatch):
    look_always(monkeypatch)


def assert_same(record, other):
    assert set(record.variables) == set(other.variables)
    for name in record.variables:
        assert record[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(record[name], other[name], err_msg=name)
    assert set(record.attrs) == set(other.attrs)
    for name in set(record.attrs) - {"wall_time"}:
        np.testing.assert_array_equal(record.attrs[name], other.attrs[name], err_msg=name)


class Killed(BaseException):
    """Nothing in gflow catches it: all that is left of the run is its file."""


def at_write(monkeypatch, number, action, *, before=False):
    """Run ``action`` at the ``number``-th write, before or after the file is replaced."""
    counter = itertools.count(1)
    real = module.whole_file

    @contextlib.contextmanager
    def whole_file(path):
        due = next(counter) == number
        with real(path) as partial:
            yield partial
            if due and before:
                action()
        if due:
            action()

    monkeypatch.setattr(module, "whole_file", whole_file)
    return real


def fail(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("before", [False, True])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(
    tmp_path, monkeypatch, whole, every_step, verb, before
):
    path, sessions = tmp_path / "run.npz", 0
    while True:
        with monkeypatch.context() as patch:
            at_write(patch, 9 if verb is flow else 5, fail(Killed()), before=before)
            try:
                record = verb(path)
                break
            except Killed:
                sessions += 1
    assert sessions > 3
    assert_same(record, whole[verb])
    assert not list(tmp_path.glob(".*"))


KILL_ITSELF = """
import os, signal
import conftest, pytest
import test_checkpoint as tests

patch = pytest.MonkeyPatch()
tests.look_always(patch)
tests.at_write(patch, 20, lambda: os.kill(os.getpid(), signal.SIGKILL), before=True)
tests.flow({path!r})
"""


def test_kill_nine_in_the_middle_of_a_write_loses_nothing(tmp_path, whole):
    path = tmp_path / "run.npz"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    code = KILL_ITSELF.format(path=str(path))
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert_same(flow(path), whole[flow])


@pytest.mark.parametrize("verb", VERBS)
def test_after_its_end_a_run_is_not_run_again(tmp_path, monkeypatch, whole, verb):
    path = tmp_path / "run.npz"
    assert_same(verb(path), whole[verb])
    with np.load(path) as file:
        np.testing.assert_array_equal(file["points/log_risk"], whole[verb].log_risk)
    monkeypatch.setattr("gflow.dynamics.drive.flow_lanes.march", None)
    monkeypatch.setattr("gflow.dynamics.descending.lanes.advance", None)
    assert_same(verb(path), whole[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, whole, every_step, verb):
    path = tmp_path / "run.npz"
    with monkeypatch.context() as patch:
        at_write(patch, 12, fail(KeyboardInterrupt()))
        record = verb(path)
    assert record.attrs["status"] == "interrupted"
    assert 0 < record.num_steps[-1] < whole[verb].num_steps[-1]
    assert_same(verb(path), whole[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_out_of_steps_goes_on_with_more(tmp_path, whole, verb):
    path = tmp_path / "run.npz"
    changes = {"until": gflow.LogRisk(-50)} if verb is descent else {}
    record = verb(path, max_steps=13, **changes)
    assert record.attrs["status"] == "max_steps"
    assert_same(verb(path, max_steps=13, **changes), record)
    if verb is flow:
        assert_same(verb(path), whole[verb])
    else:
        more = verb(path, max_steps=500, **changes)
        assert_same(more, verb(max_steps=500, **changes))


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_stops_the_run_with_its_data(tmp_path, monkeypatch, whole, every_step, verb):
    path = tmp_path / "run.npz"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at_write(patch, 10, fail(full), before=True)
        record = verb(path)
    assert record.attrs["status"] == "checkpoint_failed"
    assert "No space left" in record.attrs["message"] and str(path) in record.attrs["message"]
    assert 0 < record.num_steps[-1] < whole[verb].num_steps[-1]
    for name in ("log_risk", "end_to_end", "final_weights_1"):
        assert np.all(np.isfinite(record[name])), name
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.npz"]
    assert_same(verb(path), whole[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_a_write_that_the_system_refuses_stops_the_run_with_its_data(
    tmp_path, monkeypatch, whole, every_step, verb
):
    path = tmp_path / "run.npz"
    resource = pytest.importorskip("resource")  # not on Windows
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        limit = (1024, old[1])  # bytes; a checkpoint has more
        at_write(patch, 10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        try:
            record = verb(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert record.attrs["status"] == "checkpoint_failed"
    assert os.strerror(errno.EFBIG) in record.attrs["message"]
    assert 0 < record.num_steps[-1] < whole[verb].num_steps[-1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.npz"]
    assert np.load(path)["points/log_risk"].size > 0  # the file is the last whole segment
    assert_same(verb(path), whole[verb])


def test_a_folder_that_goes_away_stops_the_run_with_its_data(tmp_path, monkeypatch, every_step):
    folder = tmp_path / "folder"
    folder.mkdir()
    at_write(monkeypatch, 10, lambda: shutil.rmtree(folder))
    record = flow(folder / "run.npz")
    assert record.attrs["status"] == "checkpoint_failed"
    assert record.num_steps[-1] > 0 and not folder.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        flow(tmp_path / "nowhere" / "run.npz")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: b"", "truncated"),
        (lambda content: content[:3000] + b"!" + content[3001:], "cannot be read|damaged"),
        (lambda content: b"log_risk,log_time\n-1,2\n", "another kind"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_kept(tmp_path, spoil, message):
    path = tmp_path / "run.npz"
    flow(path, max_steps=5)
    path.write_bytes(spoil(path.read_bytes()))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        flow(path)
    assert path.read_bytes() == content


def test_arrays_of_somebody_else_are_refused(tmp_path):
    path = tmp_path / "run.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(ValueError, match="schema"):
        flow(path)
    single = tmp_path / "single.npy"
    np.save(single, np.ones(3))
    with pytest.raises(ValueError, match="another kind"):
        flow(single)
    with pytest.raises(ValueError, match="cannot be read"):
        flow(tmp_path)


def doubled(problem, weights):
    return 2 * squared(problem, weights)


@pytest.mark.parametrize(
    ("verb", "changes", "named"),
    [
        (flow, {"rtol": 1e-8}, "rtol is 1e-09 there and 1e-08 here"),
        (flow, {"save": 5}, "save is"),
        (flow, {"until": gflow.LogRisk(-1e61)}, "until is"),
        (flow, {"observables": {"squared": doubled}}, "program is"),
        (descent, {"seed": 1}, "seed is 0 there and 1 here"),
        (descent, {"batch_size": 6}, "batch_size is 5 there and 6 here"),
    ],
)
def test_another_runs_file_is_refused_by_name(tmp_path, verb, changes, named):
    path = tmp_path / "run.npz"
    verb(path, max_steps=2, until=gflow.LogRisk(-1e60))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another run: .*{named}"):
        verb(path, max_steps=2, **({"until": gflow.LogRisk(-1e60)} | changes))
    assert path.read_bytes() == content


def test_an_optimiser_is_known_by_what_it_does(tmp_path):
    """A closure over a function prints alike for every function."""
    path = tmp_path / "run.npz"

    def descend(rate):
        optimizer = optax.sgd(lambda count: rate * jnp.exp(-jnp.astype(count, float)))
        return gflow.gradient_descent(
            PROBLEM, START, optimizer, until=gflow.Steps(4), save=2, checkpoint=path
        )

    first = descend(0.1)
    assert_same(descend(0.1), first)
    with pytest.raises(ValueError, match="program is"):
        descend(0.2)


def test_where_a_stalled_run_ends_does_not_depend_on_the_speed_of_the_machine(monkeypatch):
    steep = 800 * DATA.max_margin().direction / DATA.max_margin().margin
    far = gflow.init.balanced((2, 3, 1), end_to_end=steep)
    optimizer = optax.sgd(0.1)

    def stall():
        return gflow.gradient_descent(
            PROBLEM, far, optimizer, until=gflow.Steps(100_000), save=[3.0]
        )

    record = stall()
    assert record.attrs["status"] == "stalled"
    monkeypatch.setattr(progress, "SECONDS_A_CALL", 1e-3)
    assert_same(stall(), record)

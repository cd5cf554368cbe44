"""Members side by side against the same runs one after the other."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import diffrax
import jax
import numpy as np
import optax
import pytest

import gflow
from gflow.dynamics.descending.lanes import DescentLanes, kind_of
from gflow.dynamics.drive.flow_run import FlowRun
from gflow.dynamics.drive.progress import ProgressBar

WIDTHS, GOAL, POINTS = (2, 3, 1), -1e3, 4
SCALES = (0.1, 0.3, 1.0, 2.0, 0.1)


@pytest.fixture(scope="module")
def problem():
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    return gflow.Problem(data, loss=gflow.Exponential())


@pytest.fixture(scope="module")
def starts(problem):
    """Five, for two lanes: from near the saddle to far from it; the last one above R(0)."""
    made = [
        gflow.init.admissible(gflow.init.gaussian(WIDTHS, scale=s, seed=i), problem)
        for i, s in enumerate(SCALES[:4])
    ]
    uphill = (made[0][0], -made[0][1])
    return [*made, uphill]


@pytest.fixture(scope="module")
def batch(starts):
    return tuple(np.stack(layer) for layer in zip(*starts, strict=True))


@pytest.fixture(scope="module")
def together(problem, batch):
    with pytest.warns(UserWarning, match="1 of 5 members do not start with"):
        return gflow.ensemble(
            problem,
            batch,
            until=gflow.LogRisk(GOAL),
            save=POINTS,
            lanes=2,
            coordinates={"scale": SCALES},
        )


@pytest.mark.filterwarnings("ignore:.*exceeds R")
def test_members_equal_single_runs(problem, starts, together):
    for i, start in enumerate(starts):
        single = gflow.gradient_flow(
            problem, start, until=gflow.LogRisk(GOAL), save=POINTS, progress=False
        )
        member = together.sel(member=i)
        assert str(member.status.values) == single.attrs["status"]
        assert set(single.data_vars) <= set(member.data_vars)
        count = single.sizes["point"]
        for name in ("log_risk", "log_time", "misalignment", "direction_error", "end_to_end"):
            # Of two solvers, each held to 1e-9 a step.
            np.testing.assert_allclose(
                member[name].values[:count], single[name].values, rtol=3e-9, atol=1e-12
            )


def test_lanes_take_every_start_and_report_their_use(together):
    assert together.in_lanes.all()
    assert 0.4 < together.attrs["utilisation"] <= 1
    assert together.sizes["member"] == 5 and together.sizes["point"] == POINTS


def test_members_are_labelled_and_say_whether_their_start_is_admissible(together):
    assert together.scale.values.tolist() == list(SCALES)
    assert together.admissible.values.tolist() == [True] * 4 + [False]
    assert together.max_margin_direction.dims == ("coordinate",)


def test_lane_flow_conserves_the_imbalance_and_follows_its_clock(together):
    lanes = together.isel(member=slice(0, 4))
    assert float(lanes.imbalance_drift.max()) < 1e-10
    assert float(lanes.clock_error.max()) < 1e-8


DEVICES = """
import jax, numpy as np, gflow
from gflow.dynamics.drive.flow_lanes import FlowLanes
data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
problem = gflow.Problem(data, loss=gflow.Exponential())
batch = (np.stack([s * data.max_margin().direction[None] for s in (0.1, 0.2, 0.4, 0.8)]),)
one, two = (
    gflow.ensemble(problem, batch, until=gflow.LogRisk(-20), save=3, lanes=2, devices=devices)
    for devices in (jax.devices()[:1], None)
)
assert len(jax.devices()) == 2 and one.in_lanes.all() and two.in_lanes.all()
assert (one.status == "reached").all()
np.testing.assert_array_equal(one.end_to_end.values, two.end_to_end.values)
np.testing.assert_array_equal(one.log_time.values, two.log_time.values)

# The points and the weights of one problem on two devices.
shared = problem.sharded(weights=True)
assert len(shared.design.rows.sharding.device_set) == 2
assert shared.design.rows.addressable_shards[0].data.shape == (10, 2)
states, advance = [], FlowLanes.advance

def seen(lanes, waiting):
    found = advance(lanes, waiting)
    states.extend((lanes.lane.state, lanes.lane.previous))
    return found

FlowLanes.advance = seen
flow = gflow.gradient_flow(shared, (batch[0][0],), until=gflow.LogRisk(-20), save=3)
assert flow.attrs["status"] == "reached"
for name in ("end_to_end", "log_time", "margin", "direction_error"):
    np.testing.assert_allclose(flow[name].values, one[name].values[0], rtol=1e-7)
kept = [leaf for leaf in jax.tree.leaves(states) if leaf.shape == (1, 2)]
assert kept and all(leaf.addressable_shards[0].data.shape == (1, 1) for leaf in kept)

# On the device that the caller has made the default.
second = jax.devices()[1]
with jax.default_device(second):
    states.clear()
    gflow.gradient_flow(problem, (batch[0][0],), until=gflow.LogRisk(-20), save=3)
    gflow.ensemble(problem, batch, until=gflow.LogRisk(-20), save=3, lanes=2)
assert states and all(leaf.devices() == {second} for leaf in jax.tree.leaves(states))
"""


PROCESSES = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np, gflow
data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
problem = gflow.Problem(data, loss=gflow.Exponential())
shared = problem.sharded(jax.devices(), weights=True)
assert len(shared.design.rows.sharding.device_set) == 2
assert [part.data.shape for part in shared.design.rows.addressable_shards] == [(10, 2)]
start = gflow.init.zero_first((2, 4, 1), seed=0)
with jax.enable_x64(True):
    first, last = shared.network.placed(start)
assert [part.data.shape for part in first.addressable_shards] == [(2, 2)]
assert [part.data.shape for part in last.addressable_shards] == [(1, 2)]
flow = gflow.gradient_flow(shared, start, until=gflow.LogRisk(-3), save=2)
for name, values in np.load(sys.argv[3]).items():
    np.testing.assert_allclose(flow[name].values, values, rtol=1e-7)
"""


def test_two_processes_share_the_points_and_the_weights_of_one_problem(problem, tmp_path):
    start = gflow.init.zero_first((2, 4, 1), seed=0)
    alone = gflow.gradient_flow(problem, start, until=gflow.LogRisk(-3), save=2)
    names = "end_to_end", "log_time", "margin", "direction_error"
    np.savez(tmp_path / "alone.npz", **{name: alone[name].values for name in names})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESSES, address]
    both = [
        subprocess.Popen(
            [*command, number, tmp_path / "alone.npz"], stderr=subprocess.PIPE, text=True
        )
        for number in "01"
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_two_devices_give_what_one_gives_and_the_callers_default_is_the_one_taken():
    flags = "--xla_force_host_platform_device_count=2 " + os.environ["XLA_FLAGS"]
    subprocess.run(
        [sys.executable, "-c", DEVICES], env={**os.environ, "XLA_FLAGS": flags}, check=True
    )


def test_descents_with_other_rates_are_one_program(problem, batch, monkeypatch):
    two, kinds, join = tuple(layer[:2] for layer in batch), set(), DescentLanes._joined

    def joined(lanes, requests):
        kinds.update(map(kind_of, requests))
        return join(lanes, requests)

    monkeypatch.setattr(DescentLanes, "_joined", joined)
    optimizers = [optax.sgd(0.1), optax.sgd(0.2)]
    found = gflow.ensemble(problem, two, optimizers, until=gflow.Steps(20), save=3)
    assert len(kinds) == 1
    assert found.optimizer.values.tolist() == ["scale(step_size=-0.1)", "scale(step_size=-0.2)"]
    for i, optimizer in enumerate(optimizers):
        single = gflow.gradient_descent(
            problem, tuple(w[i] for w in two), optimizer, until=gflow.Steps(20), save=3
        )
        np.testing.assert_allclose(
            found.sel(member=i).log_risk.values, single.log_risk.values, rtol=1e-12
        )


def test_sweep_follows_flows_in_lanes_whatever_differs(problem, starts, together):
    def start(scale):
        return problem, starts[SCALES.index(scale)], {"rtol": 1e-10 if scale == 2.0 else 1e-9}

    swept = gflow.sweep(
        start, {"scale": SCALES[:4]}, until=gflow.LogRisk(GOAL), save=POINTS, lanes=2
    )
    assert swept.in_lanes.all() and swept.rtol.values.tolist() == [1e-9] * 3 + [1e-10]
    np.testing.assert_allclose(
        swept.misalignment.values, together.misalignment.values[:4], rtol=1e-6
    )


def test_a_member_that_cannot_start_touches_no_other(problem, batch, together):
    broken = tuple(layer[:3].copy() for layer in batch)
    broken[0][1] = np.nan
    found = gflow.ensemble(problem, broken, until=gflow.LogRisk(GOAL), save=POINTS, lanes=2)
    assert found.status.values.tolist() == ["reached", "refused", "reached"]
    assert "NaN" in str(found.message.values[1]) and np.isnan(found.log_risk.values[1]).all()
    np.testing.assert_allclose(
        found.end_to_end.values[::2], together.end_to_end.values[:3:2], rtol=1e-9
    )


def test_descents_by_one_optimiser_make_their_steps_together(problem, batch, monkeypatch):
    optimizer, until = optax.sgd(0.3), gflow.LogRisk(-3.0) | gflow.Steps(400)
    singles = [
        gflow.gradient_descent(
            problem, tuple(w[i] for w in batch), optimizer, until=until, save=POINTS
        )
        for i in range(4)
    ]
    joined, join = [], DescentLanes._joined
    monkeypatch.setattr(
        DescentLanes,
        "_joined",
        lambda lanes, requests: joined.append(len(requests)) or join(lanes, requests),
    )
    four = tuple(layer[:4] for layer in batch)
    found = gflow.ensemble(problem, four, optimizer, until=until, save=POINTS, lanes=3)
    assert max(joined) == 3 and len(joined) < 40
    for i, single in enumerate(singles):
        member = found.sel(member=i)
        assert str(member.message.values) == single.attrs["message"]
        for name in ("num_steps", "log_risk", "end_to_end"):
            np.testing.assert_allclose(
                member[name].values[: single.sizes["point"]], single[name].values, rtol=1e-11
            )


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also where these tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_the_members_that_are_done(problem, batch, monkeypatch):
    main, first = threading.get_ident(), threading.Lock()

    def interrupt(bar, done, words):
        if done >= 2 and first.acquire(blocking=False):  # one Ctrl-C
            signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(ProgressBar, "update", interrupt)
    four = tuple(layer[:4] for layer in batch)
    steps = [optax.sgd(rate) for rate in (1e-9, 0.3, 1e-9, 0.3)]  # two that never arrive
    found = gflow.ensemble(problem, four, steps, until=gflow.LogRisk(-2), save=3, lanes=4)
    assert found.status.values.tolist() == ["interrupted", "reached"] * 2
    assert np.isfinite(found.log_risk.values[:, 0]).all()
    assert (found.num_steps.max("point").values[::2] > 0).all()  # as far as they came


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_lanes_have_finished(problem, starts, monkeypatch):
    many = [starts[i % 4] for i in range(36)]
    batch = tuple(np.stack(layer) for layer in zip(*many, strict=True))
    take, main, first = FlowRun.take, threading.get_ident(), threading.Lock()

    def taken(run, report):
        take(run, report)
        if run.end is not None and first.acquire(blocking=False):  # one Ctrl-C
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)

    monkeypatch.setattr(FlowRun, "take", taken)
    found = gflow.ensemble(problem, batch, until=gflow.LogRisk(GOAL), save=POINTS, lanes=2)
    ends = found.status.values.tolist()
    assert set(ends) == {"reached", "interrupted"}
    assert np.isfinite(found.log_risk.values[found.status.values == "reached"]).all()
    assert "keyboard" in str(found.message.values[ends.index("interrupted")])


def test_points_that_devices_cannot_share_are_refused(problem):
    with pytest.raises(ValueError, match="`devices` are 3 and there are 20 points"):
        problem.sharded(jax.devices()[:1] * 3)
    network = gflow.Network(lambda weights, x: weights[0] @ x, homogeneity=1.0)
    with pytest.raises(ValueError, match="expected a DeepLinear network"):
        gflow.Problem(problem.data, network).sharded()
    with pytest.raises(ValueError, match="`points` and `weights` are false"):
        problem.sharded(points=False)


def test_weights_that_devices_cannot_share_are_refused(problem):
    shared = problem.sharded(jax.devices()[:1] * 3, points=False, weights=True)
    with pytest.raises(ValueError, match=r"`weights\[1\]` has shape \(4, 4\) and there are 3"):
        gflow.gradient_flow(
            shared, gflow.init.gaussian((2, 4, 4, 1), seed=0), until=gflow.LogRisk(-1)
        )


def test_wrong_counts_are_refused(problem, batch):
    with pytest.raises(ValueError, match="`rtoll` is no option of gradient_flow"):
        gflow.ensemble(problem, batch, until=gflow.LogRisk(-10), rtoll=1e-8)
    with pytest.raises(ValueError, match=r"`coordinates\['scale'\]` has 2 entries"):
        gflow.ensemble(problem, batch, until=gflow.LogRisk(-10), coordinates={"scale": [1, 2]})
    with pytest.raises(ValueError, match="`rtol` has 2 entries"):
        gflow.ensemble(problem, batch, until=gflow.LogRisk(-10), rtol=[1e-8, 1e-9])
    with pytest.raises(ValueError, match="`weights_batch` has arrays"):
        gflow.ensemble(problem, (batch[0], batch[1][:2]), until=gflow.LogRisk(-10))
    with pytest.raises(ValueError, match="`lanes` is 0"):
        gflow.ensemble(problem, batch, until=gflow.LogRisk(-10), lanes=0)


@pytest.mark.usefixtures("unchecked")
def test_data_in_the_place_of_problems_are_told_what_to_do(problem, batch):
    with pytest.raises(ValueError, match="`problem` is a Dataset; expected a problem"):
        gflow.ensemble(problem.data, batch, until=gflow.LogRisk(-10))


@pytest.mark.filterwarnings("ignore:.*R.W.0..")
def test_members_take_the_steps_that_they_take_alone():
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    many = gflow.Problem(data, loss=gflow.Exponential())
    starts = [gflow.init.gaussian((2, 10, 10, 10, 1), scale=0.5, seed=i) for i in range(10)]
    batch = tuple(np.stack(layer) for layer in zip(*starts, strict=True))
    rule = gflow.LogRisk(-1e3)
    found = gflow.ensemble(many, batch, until=rule, save=2)
    alone = [gflow.gradient_flow(many, start, until=rule, save=2) for start in starts]
    steps = [int(flow.num_steps[-1]) for flow in alone]
    apart = np.abs(found.num_steps.max("point").values - np.array(steps))
    # All equal with XLA's optimisations; without, as in these tests, round-off may decide.
    assert np.sum(apart > 0) <= 2 and apart.sum() <= 0.01 * sum(steps), apart.tolist()
    assert found.status.values.tolist() == [flow.attrs["status"] for flow in alone]


def smooth_network(weights, x):
    return weights["second"] @ jax.numpy.tanh(weights["first"] @ x)


KINDS = {
    "a time clock, and steps": {
        "clock": gflow.clocks.LogTime(),
        "until": gflow.LogRisk(-12.0) | gflow.Steps(200),
    },
    "an explicit solver, a rule that is watched, function space": {
        "solver": diffrax.Tsit5(),
        "until": gflow.Misalignment(1e-4),
        "function_space": True,
        "rtol": 1e-6,
    },
    "a certificate, beyond the hand-over": {"until": gflow.LogRisk(-1e7), "certify": True},
}
NOT_OF_THE_PATH = {"num_steps", "clock_error", "imbalance_drift"}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_ensemble_of_anything_is_a_loop_over_its_members(problem, starts, options):
    options = {"until": gflow.LogRisk(-12.0), "save": 3, **options}
    two = tuple(np.stack(layer) for layer in zip(*starts[2:4], strict=True))
    found = gflow.ensemble(problem, two, **options)
    for i, start in enumerate(starts[2:4]):
        single = gflow.gradient_flow(problem, start, **options)
        member = found.sel(member=i)
        assert str(member.status.values) == single.attrs["status"]
        # Round-off of the order of a step's tolerance decides now and then on a step or two more.
        assert abs(int(member.num_steps[-1]) - int(single.num_steps[-1])) <= 2
        bars = {name for name in single.data_vars if name.removesuffix("_error") in single}
        bars = {name for name in bars if name.endswith("_error")}
        for name in set(single.data_vars) - NOT_OF_THE_PATH - bars:
            np.testing.assert_allclose(
                member[name].values, single[name].values, rtol=1e-5, atol=1e-11, err_msg=name
            )


@pytest.mark.filterwarnings("ignore:.*R.W.0..")
def test_any_network_and_loss_goes_in_lanes(problem):
    rng = np.random.default_rng(0)
    batch = {"first": rng.normal(size=(3, 4, 2)), "second": rng.normal(size=(3, 4))}
    loss = gflow.PolynomialTail(2.0)
    smooth = gflow.Problem(problem.data, gflow.Network(smooth_network), loss)
    given = {"until": gflow.Time(20.0), "save": 3, "solver": diffrax.Tsit5()}
    found = gflow.ensemble(smooth, batch, **given)
    assert found.in_lanes.all() and (found.status == "reached").all()
    for i in range(3):
        start = {name: leaf[i] for name, leaf in batch.items()}
        single = gflow.gradient_flow(smooth, start, **given)
        np.testing.assert_allclose(found.log_risk[i], single.log_risk, rtol=1e-9)

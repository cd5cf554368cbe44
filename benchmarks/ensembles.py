"""Members side by side: how much faster than a loop, a plain vmap, and one device?

256 members of (2,10,10,10,1), 20 points, to log R = -1e4, from starts of scale 0.01 to 3: by
``gradient_flow`` one after the other, by ``ensemble``, and by ``vmap`` of the same solver in the
same loop. The first two give records; the plain vmap gives the final weights only, so it is held
against the same members without their records too. Each is compiled before. With ``--devices 2``
the ensemble also runs with two sets of lanes on one device, and on two virtual devices in a process
of their own. Then 128 Gaussian starts, most of them above R(0), as by default, on one core, and one
after the other. Last, fifty descents with as many learning rates, together and one after the other.
``--part`` renews one of these parts alone.
"""

import json
import os
import subprocess
import sys
import warnings
from typing import Any

import common
import jax
import numpy as np
import optax
from common import RESULTS, Report, begin, begun, marched, member, parser, seconds, table

import gflow
from gflow.dynamics.drive.drive import Drive
from gflow.dynamics.ensemble import LANES
from gflow.dynamics.flow import Options, flow_of
from gflow.dynamics.march.tolerance import default_atol
from gflow.problem import settings

WIDTHS, GOAL, SAVE = (2, 10, 10, 10, 1), -1e4, 20
RATES, STEPS = 50, 100_000


def members(count: int, points: int = 20) -> tuple[gflow.Problem, list[Any], np.ndarray]:
    """The problem, the starts and their scales."""
    data = gflow.datasets.separable(n=points, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    scales = np.geomspace(0.01, 3, count)
    starts = [gflow.init.gaussian(WIDTHS, scale=s, seed=i) for i, s in enumerate(scales)]
    return problem, [gflow.init.admissible(start, problem) for start in starts], scales


def plain_vmap(problem: gflow.Problem, starts: list[Any]) -> Any:
    """All members in one vmapped call of the loop of ``gradient_flow``."""
    clock, rtol = gflow.clocks.LogRisk(), 1e-9
    field = gflow.FlowField(problem, clock)
    solver = gflow.GaussNewton()
    log_risks = [float(problem.log_risk(start)) for start in starts]
    s = np.array([clock.read(log_risk, -np.inf) for log_risk in log_risks])
    state = gflow.FlowState(
        tuple(np.stack(layer) for layer in zip(*starts, strict=True)), np.zeros(len(starts))
    )
    zero = np.zeros(())
    atol = np.array([default_atol(gflow.FlowState(w, zero), rtol) for w in starts])
    s_end = clock.read(GOAL, -np.inf)

    @jax.jit
    def run(s: Any, state: Any, atol: Any) -> Any:
        def one(s: Any, state: Any, atol: Any) -> Any:
            followed = member(field, rtol, atol, s_end)
            lane = marched(followed, solver, begun(followed, solver, s, state), 10**6)
            return lane.state.weights, lane.num_steps

        return jax.vmap(one)(s, state, atol)

    return lambda: run(s, state, atol)


def without_records(problem: gflow.Problem, starts: list[Any]) -> Any:
    """The members in lanes up to their final weights."""
    options = Options()

    def run() -> Any:
        with settings.own():
            runs = [flow_of(problem, start, gflow.LogRisk(GOAL), 2, options) for start in starts]
            for each in runs:
                each.observe = lambda: None  # pyright: ignore
            Drive(runs, width=LANES, devices=jax.devices()).go()
        return [each.weights for each in runs]

    return run


def rates_compared(count: int, steps: int) -> dict[str, float]:
    """Seconds of descents with as many learning rates, together and one after the other."""
    problem, (start,), _ = members(1)
    rates = np.geomspace(0.01, 0.5, count)
    batch = tuple(np.repeat(layer[None], count, axis=0) for layer in start)
    until = gflow.Steps(steps)

    def together() -> Any:
        optimizers = [optax.sgd(rate) for rate in rates]
        return gflow.ensemble(problem, batch, optimizers, until=until, save=SAVE, lanes=count)

    def loop() -> None:
        for rate in rates:
            gflow.gradient_descent(problem, start, optax.sgd(rate), until=until, save=SAVE)

    found = {"together": timed(together, 1)[0], "one after the other": timed(loop, 1)[0]}
    print(f"{count} learning rates, {steps} steps each:", found)
    return found


def timed(call: Any, repeats: int) -> tuple[float, Any]:
    """Least wall time of several calls, after one that compiles."""
    call()
    times, result = zip(*(seconds(call) for _ in range(repeats)), strict=True)
    return min(times), result[-1]


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--members", type=int, default=256)
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument(
        "--devices", type=int, default=2, help="virtual devices of the second part; 1 leaves it out"
    )
    found.add_argument(
        "--part",
        choices=("members", *PARTS),
        help="renew one part alone, in the JSON of all; by default all",
    )
    found.add_argument("--only-ensemble", action="store_true", help="time one call and print it")
    options = begin(found)
    if options.quick:
        options.members, options.repeats, options.devices = 4, 1, 1
    count = options.members
    # In the quick run with the points, and so the programs, of `reach.py`.
    problem, starts, scales = members(count, 100 if options.quick else 20)
    batch = tuple(np.stack(layer) for layer in zip(*starts, strict=True))
    until = gflow.LogRisk(GOAL)

    def together(devices: Any = None) -> Any:
        return gflow.ensemble(
            problem,
            batch,
            until=until,
            save=SAVE,
            coordinates={"scale": scales},
            devices=devices or jax.devices(),
        )

    if options.only_ensemble:
        took, record = timed(together, options.repeats)
        print(json.dumps({"seconds": took, "utilisation": record.attrs["utilisation"]}))
        if options.out:
            np.save(options.out / "end_to_end.npy", record.end_to_end.values)
        return

    known = {}
    if options.part:
        path = (options.out or RESULTS) / "ensembles.json"
        known = json.loads(path.read_text())
    if options.part in PARTS:
        known[options.part] = PARTS[options.part](options)
        path.write_text(json.dumps(known, indent=1) + "\n")
        figure(known["seconds"], known["devices"]).savefig(path.with_suffix(".png"), dpi=130)
        return

    report = Report(__file__, options)
    took: dict[str, float] = {}
    took["ensemble"], record = timed(together, options.repeats)
    if options.devices > 1:
        took["two sets of lanes, one device"], _ = timed(
            lambda: together(jax.devices() * 2), options.repeats
        )
    if not options.quick:
        took["lanes without records"], _ = timed(without_records(problem, starts), options.repeats)
    took["plain vmap"], _ = timed(plain_vmap(problem, starts), 1)

    def loop() -> Any:
        return [
            gflow.gradient_flow(problem, start, until=until, save=SAVE, progress=False)
            for start in starts
        ]

    gflow.gradient_flow(problem, starts[0], until=until, save=SAVE, progress=False)
    took["loop over gradient_flow"], singles = seconds(loop)

    last = np.stack([single.end_to_end.values[-1] for single in singles])
    ends = record.end_to_end.values[:, -1]
    apart = float(np.max(np.linalg.norm(ends - last, axis=1) / np.linalg.norm(last, axis=1)))
    rows = [
        {
            "run": name,
            "seconds": t,
            "ms_a_member": 1e3 * t / count,
            "ensembles": t / took["ensemble"],
        }
        for name, t in took.items()
    ]
    table(rows, "run:s seconds:.3f ms_a_member:.2f ensembles:.2f")
    ratios = {
        "loop_over_ensemble": took["loop over gradient_flow"] / took["ensemble"],
        "vmap_over_ensemble": took["plain vmap"] / took["ensemble"],
    }
    if "lanes without records" in took:
        ratios["vmap_over_lanes"] = took["plain vmap"] / took["lanes without records"]
    used = record.attrs["utilisation"]
    print(ratios, f"utilisation {used:.3f}, largest relative difference of w {apart:.1e}")
    virtual = known.get("devices", {})
    if options.devices > 1 and not options.part:
        virtual = devices_compared(options)
    few = options.quick or options.part
    more = {
        name: known.get(name, {}) if few else PARTS[name](options) for name in ("rates", "gaussian")
    }
    report.write(
        figure(took, virtual),
        **more,
        members=count,
        seconds=took,
        **ratios,
        utilisation=used,
        largest_difference=apart,
        devices=virtual,
    )


def gaussian_compared(options: Any) -> dict[str, Any]:
    """128 Gaussian starts, most above R(0): as by default, on one core, and one after the other."""
    data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
    problem = gflow.Problem(data, loss=gflow.Exponential())
    scales = np.geomspace(0.3, 2, 128)
    starts = [gflow.init.gaussian(WIDTHS, scale=s, seed=i) for i, s in enumerate(scales)]
    batch = tuple(np.stack(layer) for layer in zip(*starts, strict=True))
    given = {"until": gflow.LogRisk(GOAL), "save": SAVE, "progress": False}
    calls = {
        "default": lambda: gflow.ensemble(problem, batch, **given),
        "one core": lambda: gflow.ensemble(problem, batch, devices=jax.devices()[:1], **given),
        "loop": lambda: [gflow.gradient_flow(problem, start, **given) for start in starts],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that starts are above R(0)
        took, _ = common.timed(calls, repeats=options.repeats)
    found: dict[str, Any] = {
        "above": sum(float(problem.log_risk(start)) > 0 for start in starts),
        "wall_s": {name: each.least for name, each in took.items()},
        "cpu_s": {name: each.cpu for name, each in took.items()},
    }
    print(found)
    return found


def devices_compared(options: Any) -> dict[str, Any]:
    """The ensemble on one and on several virtual devices, taking turns, a process each."""
    found: dict[str, Any] = {}
    for _ in range(2):
        for devices in (1, options.devices):
            flags = f"--xla_force_host_platform_device_count={devices}"
            command = [sys.executable, __file__, "--only-ensemble"]
            command += ["--members", str(options.members)]
            done = subprocess.run(
                command,
                env={**os.environ, "XLA_FLAGS": flags},
                capture_output=True,
                text=True,
                check=True,
            )
            this = json.loads(done.stdout.splitlines()[-1])
            if this["seconds"] < found.get(str(devices), {"seconds": np.inf})["seconds"]:
                found[str(devices)] = this
    found["speed_up"] = found["1"]["seconds"] / found[str(options.devices)]["seconds"]
    print(found)
    return found


def figure(took: dict[str, float], virtual: dict[str, Any]) -> Any:
    """Seconds of each contestant as bars."""
    import matplotlib.pyplot as plt

    bars = dict(took)
    for devices, each in virtual.items():
        if devices.isdigit() and int(devices) > 1:
            bars[f"ensemble, {devices} virtual devices"] = each["seconds"]
    names = sorted(bars, key=lambda name: bars[name])
    fig, ax = plt.subplots(figsize=(6.0, 0.42 * len(names) + 0.9), layout="constrained")
    drawn = ax.barh(names, [bars[name] for name in names], color="#0072B2")
    ax.bar_label(drawn, fmt="%.2f s", padding=3, fontsize=8)
    ax.set_xscale("log")
    ax.set_xlim(min(1.0, 0.5 * min(bars.values())), 2.5 * max(bars.values()))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel(f"seconds to log R = {GOAL:g}, compiled before")
    ax.spines[["top", "right"]].set_visible(False)
    return fig


PARTS = {
    "devices": devices_compared,
    "rates": lambda options: rates_compared(RATES, STEPS),
    "gaussian": gaussian_compared,
}
"""Parts that are measured apart, by their names in the JSON file."""


if __name__ == "__main__":
    main()

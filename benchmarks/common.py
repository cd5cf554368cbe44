"""What the benchmarks of the solvers share: timing, achieved errors and the report.

Compilation is never part of a time: `timed` calls once before it measures. Contestants that are
compared take turns, so that a disturbance of the machine meets all of them. Every report says how
busy the machine was, and gives processor times beside wall times.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import numpy as np
import optimistix as optx
import scipy
from threadpoolctl import threadpool_limits

import gflow
from gflow.dynamics.march.lane import Goals, Lane, Member
from gflow.dynamics.march.loop import lanes_at, march
from gflow.dynamics.march.of_diffrax import method_of
from gflow.dynamics.march.tolerance import Tolerance, default_atol
from gflow.dynamics.reasons import Reason
from gflow.problem.observables import Reference, standard
from gflow.record import versions

RESULTS = Path(__file__).with_name("results")

AT_THE_LIMIT = ("margin_gap", "direction_error")
"""Distances from the limit of a vector of length one: below 1e-8 float64 weights cannot hold eight
digits of them, whatever the solver; their errors are reported apart."""

NOT_COMPARED = ("alignment", "imbalance_drift")
"""One minus the misalignment; a round-off."""

UNLIMITED = 10**9

# -------------------------------------------------------------------------------------------------
# Timing
# -------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Seconds of one warm call."""

    median: float
    least: float
    greatest: float
    cpu: float
    """Least processor time, all threads together: what does not see other programs' turns."""
    repeats: int


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, its result ready."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def timed(
    calls: dict[str, Callable[[], Any]], *, repeats: int, budget: float = 60.0, warm: bool = False
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Warm times and results of calls that take turns, each called once before.

    Args:
        calls: the contestants.
        repeats: how often each is timed.
        budget: seconds after which no further round begins (one is always made).
        warm: whether the calls are compiled already.
    """
    results = {} if warm else {name: seconds(call)[1] for name, call in calls.items()}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    began = time.perf_counter()
    for _ in range(repeats):
        for name, call in calls.items():
            spent = time.process_time()
            wall, results[name] = seconds(call)
            took[name].append((wall, time.process_time() - spent))
        if time.perf_counter() - began > budget:
            break
    return {name: summary(each) for name, each in took.items()}, results


def summary(took: list[tuple[float, float]]) -> Timing:
    """The median and the extremes of wall times, from pairs with processor times."""
    wall, cpu = zip(*took, strict=True)
    return Timing(statistics.median(wall), min(wall), max(wall), min(cpu), len(took))


# -------------------------------------------------------------------------------------------------
# Runs and their errors
# -------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A flow to follow in a clock, from its start to a risk."""

    field: gflow.FlowField
    weights: tuple[np.ndarray, ...]
    s_start: float

    @property
    def num_weights(self) -> int:
        """The number of weights."""
        return sum(matrix.size for matrix in self.weights)

    def s_end(self, log_risk: float) -> float:
        """The clock where log R has this value."""
        return self.field.clock.read(log_risk, -math.inf)


def task(
    widths: tuple[int, ...],
    *,
    n: int = 100,
    loss: gflow.AbstractLoss | None = None,
    data: gflow.Dataset | None = None,
    start: tuple[np.ndarray, ...] | None = None,
    seed: int = 0,
) -> Task:
    """Separable data (margin 0.1), a random start, or given ones; the clock of the risk."""
    data = data or gflow.datasets.separable(n=n, d=widths[0], margin=0.1, seed=seed)
    problem = gflow.Problem(data, loss=loss or gflow.Exponential())
    weights = start or gflow.init.admissible(gflow.init.gaussian(widths, seed=seed), problem)
    clock = gflow.clocks.LogRisk()
    s_start = clock.read(float(problem.log_risk(weights)), -math.inf)
    return Task(gflow.FlowField(problem, clock), weights, s_start)


class Run(NamedTuple):
    """A solver's run on a task."""

    state: gflow.FlowState
    finished: bool
    log_risk: float
    num_steps: int
    num_rejected: int
    num_iterations: int
    seconds: float
    cpu: float
    """Processor time, all threads together."""


def walk(
    work: Task,
    solver: diffrax.AbstractAdaptiveSolver,
    log_risk: float,
    rtol: float,
    *,
    limit: float | None = None,
    chunk: int = 100,
    max_steps: int = UNLIMITED,
) -> Run:
    """The loop of gflow around a solver, to one target; given up after ``limit`` seconds."""
    began, spent = time.perf_counter(), time.process_time()
    state = gflow.FlowState(work.weights, np.zeros(()))
    atol = default_atol(state, rtol)
    method = method_of(solver, rtol, atol)
    followed = member(work.field, rtol, atol, work.s_end(log_risk), max_steps)
    lane = begun(followed, method, np.float64(work.s_start), state)
    trips = UNLIMITED if limit is None else chunk
    while True:
        lane = marched(followed, method, lane, trips)
        reason = Reason(int(lane.reason))
        late = limit is not None and time.perf_counter() - began > limit
        if reason is not Reason.RUNNING or late:
            break
    jax.block_until_ready(lane)
    took, spent = time.perf_counter() - began, time.process_time() - spent
    _, iterations = method.counts(method.tally(lane.memory), int(lane.num_steps))
    return Run(
        state=lane.state,
        finished=reason is Reason.ARRIVED,
        log_risk=float(work.field.problem.log_risk(lane.state.weights)),
        num_steps=int(lane.num_steps),
        num_rejected=int(lane.num_rejected),
        num_iterations=iterations,
        seconds=took,
        cpu=spent,
    )


def member(field: Any, rtol: Any, atol: Any, s_end: Any, max_steps: int = UNLIMITED) -> Member:
    """What the march follows to one clock value, by itself or under ``vmap``."""
    never = np.iinfo(np.int64).max
    goals = Goals(
        clock=np.full(2, s_end),
        steps=np.full(2, min(max_steps, never)),
        first=np.zeros(2, int),
        count=np.ones(2, int),
        events=np.zeros(0),
        longest=np.full(2, math.inf),
        max_steps=np.int64(never),
    )
    return Member(field, Tolerance(np.float64(rtol), atol), (), goals)


_lanes_at = eqx.filter_jit(lanes_at)
"""Compiled, within the compiled functions of a caller too."""


def begun(followed: Member, method: Any, s: Any, state: Any) -> Lane:
    """The lane of a member at its start."""
    nothing = jax.tree.map(lambda _: None, followed)
    before = np.float64(math.nan), np.int64(0), np.int64(0)
    return _lanes_at(followed, nothing, method, s, state, before)


def marched(followed: Member, method: Any, lane: Lane, trips: int) -> Lane:
    """The lane after at most so many attempts."""
    nothing = jax.tree.map(lambda _: None, followed)
    return march(followed, nothing, method, lane, np.int64(trips), np.int64(1), 1, few=False)[0]


class Observer:
    """Every observable of a state, and how far two states differ in them."""

    def __init__(self, work: Task):
        problem = work.field.problem
        solution = problem.data.max_margin()
        reference = Reference.of(solution, problem, work.weights)
        self._observe = eqx.filter_jit(
            lambda state: {
                **standard(problem, state.weights, reference),
                "log_time": work.field.log_time(state),
            }
        )

    def __call__(self, state: gflow.FlowState) -> dict[str, np.ndarray]:
        """The observables, by name."""
        return {name: np.asarray(value) for name, value in self._observe(state).items()}

    def drift(self, state: gflow.FlowState) -> float:
        """The relative drift of the conserved matrices."""
        return float(self(state)["imbalance_drift"])

    def worst(self, state: gflow.FlowState, reference: gflow.FlowState) -> float:
        """The largest relative error of an observable that float64 weights resolve."""
        return worst(errors(self(state), self(reference)))


def errors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Relative error of each observable; the end-to-end vector's is that of its direction."""
    errors = {}
    for name in sorted(set(found) & set(expected) - set(NOT_COMPARED)):
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        if name == "end_to_end":
            a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
            errors["direction"] = float(np.linalg.norm(a - b))
            continue
        shown = np.abs(b) > 1e-300  # the last layer is a row: its rank-one gap is zero
        if np.any(shown):
            errors[name] = float(np.max(np.abs(a - b)[shown] / np.abs(b)[shown]))
    return errors


def worst(errors: Mapping[str, float]) -> float:
    """The largest error of those that float64 weights can show."""
    return max(error for name, error in errors.items() if name not in AT_THE_LIMIT)


def digits(error: float) -> float:
    """Correct digits."""
    return -math.log10(max(error, 1e-16))


def reference_run(work: Task, log_risk: float, *, quick: bool = False) -> Run:
    """The flow to about twelve digits; ``quick`` saves a compilation and costs a digit."""
    if quick:
        return walk(work, gflow.GaussNewton(), log_risk, 1e-11)
    return walk(work, gflow.GaussNewton(stages=7, tolerance=1e-14), log_risk, 1e-13)


# -------------------------------------------------------------------------------------------------
# Command line and report
# -------------------------------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every script."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--quick", action="store_true", help="less of everything")
    found.add_argument("--tag", default="", help="appended to the names of the files written")
    found.add_argument(
        "--out", type=Path, help="folder of the results; a quick run writes only if it is given"
    )
    found.add_argument(
        "--blas-threads",
        type=int,
        default=1,
        help="threads of BLAS and LAPACK, whose small problems lose time to more than one",
    )
    return found


def begin(found: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; compute in double precision with so many threads of BLAS."""
    options = found.parse_args()
    jax.config.update("jax_enable_x64", True)
    threadpool_limits(options.blas_threads, user_api="blas")
    return options


def _asked() -> list[str]:
    """The options of this run, but where its results go."""
    given = iter(sys.argv[1:])
    return [word for word in given if word != "--out" or not next(given, None)]


class Report:
    """What a script found, with all that is needed to judge it."""

    def __init__(self, script: str, options: argparse.Namespace):
        self.name = Path(script).stem + (f"-{options.tag}" if options.tag else "")
        self.folder = options.out or (None if options.quick else RESULTS)
        self.document: dict[str, Any] = {
            "command": " ".join(["python", f"benchmarks/{Path(script).name}", *_asked()]),
            "quick": options.quick,
            "device": f"{jax.devices()[0]}, {processor()}",
            "cores": os.cpu_count(),
            "blas_threads": options.blas_threads,
            "versions": {
                **versions(),
                "jaxlib_version": jax.lib.__version__,
                "optimistix_version": optx.__version__,
                "scipy_version": scipy.__version__,
            },
            "load_average_before": os.getloadavg(),
        }

    def write(self, figure: Any = None, **found: Any) -> None:
        """Write JSON, and the figure as PNG."""
        self.document |= {"load_average_after": os.getloadavg(), **found}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(self.document), indent=1, allow_nan=False)
        (self.folder / f"{self.name}.json").write_text(text + "\n")
        if figure is not None:
            figure.savefig(self.folder / f"{self.name}.png", dpi=130)
        print(f"wrote {self.folder / self.name}.json")


def two_panels() -> tuple[Any, Any, Any]:
    """A figure and its two panels, side by side."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    return fig, left, right


def dressed(fig: Any) -> Any:
    """The figure, every panel with a grid and its legend."""
    for ax in fig.axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return fig


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def table(rows: list[dict[str, Any]], columns: str) -> None:
    """Print rows; ``columns`` lists keys with their formats, as in "rtol:g median:.3f"."""
    styles = dict(column.split(":") for column in columns.split())
    heads = list(styles)
    cells = [
        ["-" if row.get(key) is None else format(row[key], styles[key]) for key in heads]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in [heads, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def _plain(value: Any) -> Any:
    """JSON's own types; four digits are enough for a time."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        value = float(value)
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value

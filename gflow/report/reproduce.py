"""``gflow reproduce``: the paper's figures and claims, measured in one run.

Ji and Telgarsky's experiment (arXiv 1810.02032, figure 1) is a deep linear network of four layers
beside a linear predictor on separable data in the plane. The paper does not give the number of
points, widths, loss, start or step sizes; the choices made here are those of :func:`experiments`.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffrax
import optax

from gflow.analysis.table import aligned, markdown
from gflow.dynamics.descending.step_sizes import polyak
from gflow.dynamics.stops import LogRisk, Steps
from gflow.problem import datasets, init
from gflow.problem.data import Dataset
from gflow.problem.risk import Problem
from gflow.report import experiment as ex

HIDDEN = (10, 10, 10)
"""The hidden widths of the deep network."""

REAL = "wine-0-1"
"""The real data set unless another is named."""

SHRINK = 0.025
r"""Descent's Polyak scaling for each layer: to first order a step multiplies the risk by
$e^{-0.025 L}$. A step of L layers is L times as long before it oscillates."""

FLOW_STEPS = 500
"""Where the flow ends if the data are not separable."""

RATE = 0.05
"""Descent's constant step size where the data are not separable."""

GOALS = (-1e6, -1e6)
"""Where the flow ends, log R, on synthetic and on real data."""

QUICK_GOALS = (-200.0, -100.0)

STEPS, QUICK_STEPS = 50_000, 10_000
"""Where descent ends if it has not reached the flow's goal."""


def experiments(dataset: str = REAL, *, quick: bool = False) -> list[ex.Experiment]:
    r"""The two experiments: synthetic data in the plane, and a real data set.

    Logistic loss, under which the paper's theorems for descent hold; a Gaussian start, made to
    satisfy the assumption $R(W(0)) \le R(0)$. Descent with Polyak's step size,
    $\eta = 0.025\,L\,R/\lVert\nabla R\rVert^2$, leaves the range in which $R$ itself can be
    represented; with a constant step it would end near $R = 10^{-5}$, where no limit shows.

    Args:
        dataset: a name for ``gflow.datasets.load``.
        quick: stop sooner, and save fewer points.
    """
    synthetic = datasets.separable(n=100, d=2, margin=0.1, seed=0)
    real = datasets.load(dataset)
    far, near = QUICK_GOALS if quick else GOALS
    return [
        _experiment("synthetic", synthetic, far, quick),
        _experiment(dataset, real, near, quick),
    ]


def _experiment(name: str, data: Dataset, goal: float, quick: bool) -> ex.Experiment:
    problem = Problem(data)  # logistic loss, of classes cross-entropy
    outputs = data.num_outputs
    starts = [
        init.admissible(init.gaussian(shape, seed=0), problem)
        for shape in ((data.dim, *HIDDEN, outputs), (data.dim, outputs))
    ]
    options = {"save": 50 if quick else 120}
    # An explicit solver takes more steps but less time to compile, which is most of a short run.
    solver = {"solver": diffrax.Tsit5()} if quick else {}
    # Data that are not separable have a least risk, and no run gets below it.
    until = LogRisk(goal) if data.separable else Steps(FLOW_STEPS)
    until_descent = Steps(QUICK_STEPS if quick else STEPS)
    if data.separable:
        until_descent = LogRisk(goal) | until_descent
    runs = [ex.one_run("flow", weights, until, options=options | solver) for weights in starts]
    runs += [
        ex.one_run(
            "descent", weights, until_descent, optimizer=_optimizer(data, weights), options=options
        )
        for weights in starts
    ]
    return ex.Experiment(name, problem, runs)


def _optimizer(data: Dataset, weights: init.LayerWeights) -> Any:
    """Polyak's step size supposes that the infimum of the risk is zero."""
    if data.separable:
        return polyak(SHRINK * len(weights))
    return optax.sgd(RATE)


CRITERIA = """\
Statements that hold at every time are checked at every saved point, up to round-off. A limit is
judged by its trend over the last decade of -log R: it holds if the distance to the limit falls and
extrapolates to at most half of its last value; "FAILS" says that this record does not show it, and
a run that ends too early cannot. "n/a" marks a claim whose assumptions the run does not meet."""


def reproduce(
    folder: str | Path,
    *,
    dataset: str = REAL,
    quick: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> list[ex.Outcome]:
    """Measure the paper's claims and write figures, records and ``report.md`` to a folder.

    Args:
        folder: created if need be; that it can be written is checked before computing.
        dataset: the real data set, a name for ``gflow.datasets.load``.
        quick: a smaller version of everything, in a few seconds.
        progress: show progress bars; None shows them on a terminal.
        say: what to do with each line for the terminal.
    """
    folder = ex.check_folder(folder)
    return compute_and_write(
        experiments(dataset, quick=quick),
        folder,
        title="The claims of Ji and Telgarsky (2019), measured",
        progress=progress,
        say=say,
    )


def compute_and_write(
    todo: Sequence[ex.Experiment],
    folder: Path,
    *,
    title: str,
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> list[ex.Outcome]:
    """Follow every experiment, write its files, and the report on all of them."""
    began = time.perf_counter()
    outcomes, sections = [], []
    for experiment in todo:
        place = folder / ex.slug(experiment.name) if len(todo) > 1 else folder
        say(f"{experiment.name}: {experiment.data!r}")
        outcome = ex.follow(experiment, progress=progress, say=say)
        figures = ex.write(outcome, place)
        outcomes.append(outcome)
        sections.append(_section(outcome, [f.relative_to(folder) for f in figures]))
        say("")
        say(aligned(*ex.overview_rows(outcome)))
        say("")
    report = folder / "report.md"
    seconds = time.perf_counter() - began
    report.write_text(_report(title, outcomes, sections, seconds), encoding="utf-8")
    say(ex.conclusion(outcomes))
    say(f"report, figures and records: {report} ({seconds:.0f} s)")
    return outcomes


def _report(
    title: str, outcomes: Sequence[ex.Outcome], sections: Sequence[str], seconds: float
) -> str:
    from gflow.record import versions

    made_by = ", ".join(f"{k.removesuffix('_version')} {v}" for k, v in versions().items())
    head = [
        f"# {title}",
        "",
        ex.conclusion(outcomes),
        "",
        f"Computed in {seconds:.0f} s with {made_by}.",
        "",
        CRITERIA,
        "",
        "",
    ]
    return "\n".join(head) + "\n".join(sections)


def _section(outcome: ex.Outcome, figures: Sequence[Path]) -> str:
    experiment = outcome.experiment
    lines = [
        f"## {experiment.name}",
        "",
        f"`{experiment.data!r}`; loss `{experiment.problem.loss!r}`.",
        "",
        ex.certificate(experiment.problem),
        "",
        "### Runs",
        "",
        markdown(ex.RUN_HEADER, ex.run_rows(outcome)),
        "",
        *(f"* {label}: {text}" for label, texts in outcome.notes.items() for text in texts),
        "",
        "### Claims",
        "",
        markdown(*ex.overview_rows(outcome)),
        "",
        "Value and bound of each:",
        "",
        markdown(ex.CLAIM_HEADER, ex.claim_rows(outcome)),
        "",
        "### Figures",
        "",
        *(f"![{path.stem}]({path.as_posix()})" for path in figures),
        "",
    ]
    return "\n".join(lines)

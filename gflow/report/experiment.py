"""One data set followed by flow and by descent: runs, figures, records and a table of claims.

``gflow reproduce`` and ``gflow run`` both build an :class:`Experiment` and hand it to
:func:`follow` and :func:`write`.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.problem.abstract_data import AbstractData
from gflow.problem.data import Dataset, labelled
from gflow.problem.deep_linear import widths
from gflow.problem.risk import Problem

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Run:
    """One trajectory to compute: a call of ``gradient_flow`` or, with an optimiser, of descent."""

    label: str
    weights: tuple[np.ndarray, ...]
    until: Any
    optimizer: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_descent(self) -> bool:
        """Whether this run is descent."""
        return self.optimizer is not None


@dataclass(frozen=True)
class Experiment:
    """A problem and the runs to make on it."""

    name: str
    problem: Problem
    runs: Sequence[Run]

    @property
    def data(self) -> AbstractData:
        """The data of the problem."""
        return self.problem.data


@dataclass
class Outcome:
    """What an experiment gave: for each run its record, its claims, and the warnings it raised."""

    experiment: Experiment
    records: "dict[str, xr.Dataset]" = field(default_factory=dict)
    claims: dict[str, list[Any]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def failed(self) -> list[tuple[str, Any]]:
        """The applicable claims that do not hold, with the run they belong to."""
        return [
            (label, claim)
            for label, claims in self.claims.items()
            for claim in claims
            if claim.holds is False
        ]

    @property
    def unfinished(self) -> list[str]:
        """The runs that stopped before their goal."""
        return [
            label for label, record in self.records.items() if record.attrs["status"] != "reached"
        ]


def one_run(label: str, weights: tuple[np.ndarray, ...], until: Any, **more: Any) -> Run:
    """A run labelled by its kind and its depth, such as "flow, 4 layers"."""
    depth = len(widths(weights)) - 1
    return Run(f"{label}, {depth} layer{'s' if depth > 1 else ''}", weights, until, **more)


def follow(
    experiment: Experiment, *, progress: bool | None = None, say: Callable[[str], None] = print
) -> Outcome:
    """Compute every run of an experiment and verify the claims on it.

    Args:
        experiment: what to compute.
        progress: passed to the two verbs.
        say: what to do with a line that says how things stand.
    """
    from gflow.analysis.theorems import verify
    from gflow.dynamics.descent import gradient_descent
    from gflow.dynamics.flow import gradient_flow

    outcome = Outcome(experiment)
    for run in experiment.runs:
        began = time.perf_counter()
        options = {"progress": progress, **run.options}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if run.is_descent:
                record = gradient_descent(
                    experiment.problem, run.weights, run.optimizer, until=run.until, **options
                )
            else:
                record = gradient_flow(experiment.problem, run.weights, until=run.until, **options)
        outcome.records[run.label] = record
        outcome.claims[run.label] = list(verify(record))
        # A tuple or a list is no mapping: the same text twice says nothing new.
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        outcome.notes[run.label] = list(dict.fromkeys(texts))
        say(f"  {run.label:<22} {_how_far(record)}   {time.perf_counter() - began:5.1f} s")
        for text in outcome.notes[run.label]:
            say(f"    note: {text}")
    return outcome


def _how_far(record: "xr.Dataset") -> str:
    log_risk = float(record["log_risk"][-1])
    steps = int(record["num_steps"][-1])
    text = f"log R = {log_risk:.6g} after {steps} steps"
    status = record.attrs["status"]
    return text if status == "reached" else f"{text}; {status}: {record.attrs['message']}"


def check_folder(folder: str | Path) -> Path:
    """Create a folder for results, and prove that it can be written, before computing.

    Raises:
        OSError: if it cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".gflow-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"the output folder {folder} cannot be written ({reason}); choose another with --out."
        ) from error
    return folder


# -------------------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------------------


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Write records and figures; returns the figures."""
    from gflow import record as records

    folder.mkdir(parents=True, exist_ok=True)
    for label, record in outcome.records.items():
        records.save(record, folder / f"{slug(label)}.nc")
    return draw(outcome, folder)


def draw(outcome: Outcome, folder: Path) -> list[Path]:
    """The figures of an experiment.

    1a for two-dimensional data, 1b, margins, and a summary; of targets risk and singular values.
    """
    from gflow.report import plot

    figures: list[Path] = []

    def keep(name: str, axes: Any) -> None:
        plot.save_figure(axes, folder / name)
        figures.append(folder / name)

    records = outcome.records
    flows = {label: r for label, r in records.items() if r.attrs["kind"] == "flow"} or records
    if "targets" in outcome.experiment.data.offers:
        keep("risk.png", plot.risk(records, x="log_time"))
        for label, record in flows.items():
            keep(f"modes-{slug(label)}.png", plot.modes(record))
        return figures
    data = labelled(outcome.experiment.data)
    if data.num_classes is not None:
        last = next(iter(flows.values()))
        if data.dim == 2:
            keep("figure_1a.png", plot.decision_regions(data, last))
        keep("figure_1b.png", plot.spectra(last))
        keep("risk.png", plot.risk(records))
        return figures
    if data.dim == 2:
        keep("figure_1a.png", plot.decision_lines(data, flows))
    deep = {label: r for label, r in records.items() if r.sizes.get("layer", 1) > 1}
    keep("figure_1b.png", plot.rank_one(deep or records, x="log_risk"))
    keep("margin_and_direction.png", _margin_and_direction(records, data))
    if deep:
        keep("summary.png", plot.summary(deep))
    return figures


def _margin_and_direction(records: "Mapping[str, xr.Dataset]", data: Dataset) -> Any:
    """Margin and direction error against log t, side by side."""
    import matplotlib.pyplot as plt

    from gflow.report import plot

    _, axes = plt.subplots(1, 2, figsize=(6.8, 2.6), layout="constrained")
    plot.margin(records, ax=axes[0])
    plot.direction_error(records, ax=axes[1])
    return axes


def slug(label: str) -> str:
    """A label as part of a file's name: "flow, 4 layers" becomes "flow-4-layers"."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())


# -------------------------------------------------------------------------------------------------
# Tables
# -------------------------------------------------------------------------------------------------


def verdict(holds: bool | None) -> str:
    """A claim's outcome in words."""
    return {True: "holds", False: "FAILS", None: "n/a"}[holds]


def claim_rows(outcome: Outcome) -> list[list[str]]:
    """One row a claim and run: run, claim, value, what it is held against, verdict."""
    return [
        [label, claim.name, claim.value_text, claim.bound_text, verdict(claim.holds), claim.why]
        for label, claims in outcome.claims.items()
        for claim in claims
    ]


def overview_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """One row a claim, one column a run: the value and whether the claim holds."""
    found: dict[str, list[Any]] = {}
    for claims in outcome.claims.values():
        for claim in claims:
            found.setdefault(claim.name, []).append(claim)
    rows = []
    for name, claims in found.items():
        quantity = _common_start([claim.quantity for claim in claims])
        bound = _common_start([claim.bound_text for claim in claims])
        cells = [_cell(run, name) for run in outcome.claims.values()]
        rows.append([name, quantity, bound, *cells])
    return ["claim", "value", "held against", *outcome.claims], rows


def _cell(claims: Any, name: str) -> str:
    for claim in claims:
        if claim.name == name:
            value = f"{claim.value:.3g} " if np.isfinite(claim.value) else ""
            return verdict(None) if claim.holds is None else value + verdict(claim.holds)
    return ""


def _common_start(texts: Sequence[str]) -> str:
    """What all texts begin with: they differ in a rate or an exponent that comes last."""
    if len(set(texts)) == 1:
        return texts[0]
    heads = [text.split(", ")[0] for text in texts]
    if len(set(heads)) == 1:
        return heads[0]
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*heads, strict=False))
    return "".join(letters[0] for letters in columns).rstrip("0123456789. ") + " …"


CLAIM_HEADER = ("run", "claim", "value", "held against", "verdict", "why")

RUN_HEADER = ("run", "widths", "log R", "log t", "steps", "direction error", "wall time", "status")


def run_rows(outcome: Outcome) -> list[list[str]]:
    """One row a run: how far it went, and why it stopped."""
    rows = []
    for label, record in outcome.records.items():
        last = record.isel(point=-1)
        attrs = record.attrs
        rows.append(
            [
                label,
                ", ".join(str(width) for width in np.ravel(attrs["widths"])),
                f"{float(last['log_risk']):.6g}",
                f"{float(last['log_time']):.6g}",
                str(int(last["num_steps"])),
                f"{float(last['direction_error']):.2e}" if "direction_error" in last else "",
                f"{attrs['wall_time']:.1f} s",
                f"{attrs['status']}: {attrs['message']}",
            ]
        )
    return rows


def certificate(problem: Problem) -> str:
    """Whether the data are separable, and what proves it, in a sentence; of targets the fit."""
    if "targets" in problem.data.offers:
        least = problem.loss.least_log_risk_of(problem.data, problem.data.dim)
        risk = "0: some map fits" if least < problem.loss.least_log_risk else f"{np.exp(least):.6g}"
        return f"The least risk of linear maps is {risk}."
    data = labelled(problem.data)
    solution = data.max_margin()
    of = "support vectors" if data.num_classes is None else "margins"
    if solution.separable:
        return (
            f"Separable through the origin: the max margin lies between "
            f"{solution.margin_lower:.16g} and {solution.margin_upper:.16g}, proven by a direction "
            f"and {len(solution.support)} {of}."
        )
    residual = float(np.linalg.norm(data.signed_inputs.T @ solution.dual))
    known = "Not separable" if solution.inseparable else "Not known whether separable"
    return (
        f"{known} through the origin, so the claims are not applicable: a weighted mean "
        f"of y x over {len(solution.support)} of the points has norm {residual:.1e} (the "
        "weights are `max_margin().dual`), so no direction has a margin above "
        f"{solution.margin_upper:.1e}."
    )


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """All outcomes in a sentence or two."""
    claims = [claim for o in outcomes for found in o.claims.values() for claim in found]
    counts = {h: sum(claim.holds is h for claim in claims) for h in (True, False, None)}
    applicable = counts[True] + counts[False]
    text = f"{counts[True]} of {applicable} applicable claims hold"
    if counts[None]:
        text += f"; {counts[None]} not applicable"
    for o in outcomes:
        for label, claim in o.failed:
            text += f"\nFAILS: {o.experiment.name}, {label}: {claim.name}"
        for label in o.unfinished:
            message = o.records[label].attrs["message"]
            text += f"\nstopped early: {o.experiment.name}, {label}: {message}"
    return text

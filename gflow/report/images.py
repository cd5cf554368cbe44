r"""``gflow reproduce --images``: the paper's last figure, measured on pictures.

Ji and Telgarsky (arXiv 1810.02032) end with the dense layers of a convolutional network that
stochastic descent trains on pictures: as the risk falls the ratios
$\lVert W_k\rVert_2/\lVert W_k\rVert_F$ rise, more cleanly where every dense layer starts at
Frobenius norm 4. The paper gives the network (AlexNet) and the data (CIFAR-10), and neither step
size nor batch nor epochs; what is chosen here is said in ``DIFFERS`` and written into every report.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from gflow.analysis.table import aligned, markdown
from gflow.dynamics.descent import gradient_descent
from gflow.dynamics.flow import gradient_flow
from gflow.dynamics.stops import Epochs, Time
from gflow.problem import datasets, init, settings
from gflow.problem.arguments import positive, positive_count
from gflow.problem.array import as_array
from gflow.problem.class_observables import spectrum, subspace_misalignment
from gflow.problem.data import Dataset
from gflow.problem.frameworks import from_equinox
from gflow.problem.mlp import MLP
from gflow.problem.risk import Problem
from gflow.record import save, versions
from gflow.report import experiment as ex
from gflow.report.convolutional import HIDDEN, Convolutional
from gflow.report.plot.dense import dense_layers, ratios
from gflow.report.plot.style import save_figure

if TYPE_CHECKING:
    import xarray as xr

DATA, EPOCHS, SEEDS = "digits", 60, 3
"""What the command does by default."""

BATCH, RATE, NORM = 64, 0.1, 4.0
"""Pictures in a mini-batch, the step size of plain stochastic descent, and the paper's norm."""

POINTS = 31
"""Saved points of a run, evenly spaced in epochs."""

OWN, SCALED = "the framework's start", f"dense layers at norm {NORM:g}"
"""The two starts."""

SMALL, EACH, UNTIL = 32, 6, 100.0
"""Of the small ReLU network that the exact flow follows: its hidden width, the pictures that it
learns, one in so many, since each neuron has a kink at each of them, and the time t up to which it
is followed."""

SMALL_RTOL = 1e-4
"""Of that flow: the energy identity then holds to some 1e-4, and a step may pass many kinks."""

TIMES = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90)
"""Times of saved points, which a step of descent ends at."""

DIFFERS = f"""\
What differs from the paper's setting: the network has two convolutions and three dense layers of
widths {", ".join(map(str, HIDDEN))} and the classes, an eighth of AlexNet's; the data are not
CIFAR-10 unless you give it; plain stochastic descent with step {RATE:g} and batches of {BATCH}, no
momentum, no augmentation, no dropout, in float32 (the paper says "SGD" and no more); the start at
norm {NORM:g} scales the same random layers that the other start has (uniform entries, equinox's and
PyTorch's own), where the paper draws Gaussian ones."""


@dataclass
class ImageOutcome:
    """What the experiment gave: the records of each start, and those beside the exact flow."""

    problem: Problem
    records: "dict[str, list[xr.Dataset]]" = field(default_factory=dict)
    small: Problem | None = None
    """That of the small network that the exact flow follows, on digits."""
    beside_flow: "dict[str, list[xr.Dataset]]" = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> list[str]:
        """The runs that stopped before their goal."""
        return [
            f"{name}, seed {seed}: {record.attrs['message']}"
            for group in (self.records, self.beside_flow)
            for name, records in group.items()
            for seed, record in enumerate(records)
            if record.attrs["status"] != "reached"
        ]

    @property
    def rises(self) -> dict[str, np.ndarray]:
        """Of each start the last ratio less the first, (seeds, layers)."""
        return {
            name: np.stack([ratios(record)[-1] - ratios(record)[0] for record in records])
            for name, records in self.records.items()
        }

    @property
    def verdict(self) -> tuple[str, str]:
        """Whether the ratios rise, and whether they rise more from the norm, in words."""
        rises = self.rises
        rise = [np.all(each > 0, axis=0) for each in rises.values()]
        more = np.all(rises[SCALED] > rises[OWN], axis=0)
        return (
            f"{_share(np.concatenate(rise))} (the ratios of the dense layers rise, in every seed: "
            + "; ".join(f"{name}: {_numbers(each)}" for name, each in zip(rises, rise, strict=True))
            + ")",
            f"{_share(more)} (they rise more with {SCALED}, in every seed: {_numbers(more)})",
        )


def problem_of(data: Dataset, seed: int) -> tuple[Problem, Any]:
    """The convolutional network on some pictures, and its start."""
    key = jax.random.key(seed)
    model = Convolutional(data.point_shape, data.num_outputs, hidden=HIDDEN, key=key)
    network, weights = from_equinox(model)
    return Problem(data, network), weights


def train(
    problem: Problem, weights: Any, seed: int, epochs: float, progress: bool | None = None
) -> "xr.Dataset":
    """One run of stochastic descent, as the figure shows it."""
    return gradient_descent(
        problem,
        weights,
        optax.sgd(RATE),
        until=Epochs(epochs),
        save=POINTS,
        batch_size=min(BATCH, problem.data.num_points),
        seed=seed,
        precision="float32",
        progress=progress,
    )


def small_problem(data: Dataset) -> tuple[Problem, Any]:
    """A network of two dense layers with ReLU on some of the pictures, and its start."""
    some = Dataset(data.points[::EACH], data.classes[::EACH], num_classes=data.num_classes)
    # The variance of the frameworks' uniform start.
    start = init.gaussian((data.dim, SMALL, data.num_outputs), scale=3**-0.5, seed=0)
    return Problem(some, MLP()), start


def beside_exact_flow(
    data: Dataset, seeds: int = SEEDS, until: float = UNTIL, progress: bool | None = None
) -> "dict[str, list[xr.Dataset]]":
    """Exact flow, descent on all points and stochastic descent, from one start to one time.

    A small network of two dense layers with ReLU, whose kinks the flow crosses or slides along.
    What the three have in common is the flow's doing; what only the last has is that of
    mini-batches.
    """
    import diffrax

    (problem, weights), descent = small_problem(data), optax.sgd(RATE)
    common: dict[str, Any] = {"save": [t for t in TIMES if t < until], "progress": progress}
    common["until"] = Time(until)
    # Explicit: an implicit solver would work in all margins of a network that is no product.
    solver = diffrax.Dopri5()
    flow = gradient_flow(problem, weights, solver=solver, rtol=SMALL_RTOL, **common)
    return {
        "exact flow": [flow],
        "descent on all points": [gradient_descent(problem, weights, descent, **common)],
        "stochastic descent": [
            gradient_descent(problem, weights, descent, batch_size=BATCH, seed=seed, **common)
            for seed in range(seeds)
        ],
    }


def reproduce_images(
    folder: str | Path,
    *,
    data: str | Path = DATA,
    epochs: float = EPOCHS,
    seeds: int = SEEDS,
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> ImageOutcome:
    """Measure the paper's last figure and write figures, records and ``report.md`` to a folder.

    Args:
        folder: created if need be; that it can be written is checked before computing.
        data: as of ``gflow.datasets.images``.
        epochs: of each run.
        seeds: of weights and mini-batches, each from both starts.
        progress: show progress bars; None shows them on a terminal.
        say: what to do with each line for the terminal.
    """
    folder = ex.check_folder(folder)
    epochs, seeds = positive("epochs", epochs), positive_count("seeds", seeds)
    began = time.perf_counter()
    pictures = datasets.images(data)
    outcome = ImageOutcome(problem_of(pictures, 0)[0])
    say(f"{pictures!r}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(seeds):
            problem, weights = problem_of(pictures, seed)
            starts = {OWN: weights, SCALED: init.rescaled(weights, problem, frobenius=NORM)}
            for name, start in starts.items():
                record = train(problem, start, seed, epochs, progress)
                outcome.records.setdefault(name, []).append(record)
                risk = float(np.exp(record["log_risk"][-1]))
                say(f"{name}, seed {seed}: risk {risk:.3g} after {epochs:g} epochs")
        if str(data) == DATA:
            outcome.small = small_problem(pictures)[0]
            outcome.beside_flow = beside_exact_flow(pictures, seeds, progress=progress)
    outcome.notes = sorted({str(each.message) for each in caught})
    _write(outcome, folder)
    text = _report(outcome, epochs, time.perf_counter() - began)
    (folder / "report.md").write_text(text, encoding="utf-8")
    say("")
    say(aligned(RATIO_HEADER, ratio_rows(outcome.problem, outcome.records)))
    say("")
    for line in outcome.verdict:
        say(line)
    say(f"report, figures and records: {folder / 'report.md'}")
    return outcome


def _write(outcome: ImageOutcome, folder: Path) -> None:
    """The figures and the records."""
    save_figure(dense_layers(outcome.records), folder / "dense_layers.png")
    if outcome.beside_flow:
        axes = dense_layers(outcome.beside_flow, "time", together=True)
        save_figure(axes, folder / "beside_exact_flow.png")
    for group in (outcome.records, outcome.beside_flow):
        for name, records in group.items():
            for seed, record in enumerate(records):
                save(record, folder / f"{ex.slug(name)}_{seed}.nc")


# -------------------------------------------------------------------------------------------------
# Tables
# -------------------------------------------------------------------------------------------------

RATIO_HEADER = ("run", "layer", "shape", "least", "first", "last", "leading K-1, first", "last")


def ratio_rows(
    problem: Problem, groups: "Mapping[str, Sequence[xr.Dataset]]"
) -> list[tuple[str, ...]]:
    r"""First and last ratio of each dense layer, mean and range over seeds.

    The last columns are the part of $\lVert W_k\rVert_F^2$ that its K - 1 largest singular values
    have, which tends to one where a layer becomes of rank K - 1.
    """
    rows = []
    for name, records in groups.items():
        ends = np.stack([ratios(record)[[0, -1]] for record in records])
        parts = np.stack([leading_parts(problem, record) for record in records])
        shapes = [np.shape(layer) for layer in dense_of(problem, records[0], "final")]
        for k, (height, width) in enumerate(shapes):
            rows.append(
                (
                    name,
                    str(k + 1),
                    f"{height} x {width}",
                    f"{float(records[0]['least_ratio'][k]):.3f}",
                    *(_range(ends[:, end, k]) for end in (0, 1)),
                    *(_range(parts[:, end, k]) for end in (0, 1)),
                )
            )
    return rows


def dense_of(problem: Problem, record: "xr.Dataset", which: str) -> tuple[np.ndarray, ...]:
    """The dense layers of the "initial" or "final" weights of a record."""
    network: Any = problem.network
    return network.dense_layers(network.weights_of(record, which))


def leading_parts(problem: Problem, record: "xr.Dataset") -> np.ndarray:
    r"""The part of $\lVert W_k\rVert_F^2$ in its K - 1 largest singular values, (2, layers)."""
    rank = max(1, problem.data.num_outputs - 1)
    found = []
    for which in ("initial", "final"):
        squares = [
            np.linalg.svd(m, compute_uv=False) ** 2 for m in dense_of(problem, record, which)
        ]
        found.append([float(np.sum(each[:rank]) / np.sum(each)) for each in squares])
    return np.array(found)


ALIGNMENT_HEADER = ("run", "layers", "vectors, first", "last", "leading K-1, first", "last")


def alignment_rows(
    problem: Problem, groups: "Mapping[str, Sequence[xr.Dataset]]"
) -> list[tuple[str, ...]]:
    r"""First and last alignment of neighbouring dense layers, mean and range over seeds.

    Of the leading vectors $|\langle v_{k+1}, u_k\rangle|$, and of the K - 1 leading ones the cosine
    of the largest angle between the subspaces that they span.
    """
    rows = []
    for name, records in groups.items():
        ends = np.stack([record["alignment"].values[[0, -1]] for record in records])
        spaces = np.stack([subspace_alignment(problem, record) for record in records])
        rows += [
            (
                name,
                f"{k + 1}, {k + 2}",
                *(_range(t[:, end, k]) for t in (ends, spaces) for end in (0, 1)),
            )
            for k in range(ends.shape[2])
        ]
    return rows


def subspace_alignment(problem: Problem, record: "xr.Dataset") -> np.ndarray:
    """The cosine of the largest angle between neighbours' leading subspaces, (2, pairs)."""
    rank = max(1, problem.data.num_outputs - 1)
    found = []
    with settings.own():
        for which in ("initial", "final"):
            layers = [np.float64(layer) for layer in dense_of(problem, record, which)]
            spaces = [spectrum(as_array(layer), min([rank, *layer.shape])) for layer in layers]
            apart = [float(subspace_misalignment(a, b)) for a, b in pairwise(spaces)]
            found.append([1 - each for each in apart])
    return np.array(found)


def _range(values: np.ndarray) -> str:
    """The mean, and the range where there are several."""
    if len(values) == 1 or np.ptp(values) < 5e-4:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def _share(holds: np.ndarray) -> str:
    return "yes" if holds.all() else "partly" if holds.any() else "no"


def _numbers(holds: np.ndarray) -> str:
    if holds.all():
        return "all layers"
    numbers = ", ".join(str(k + 1) for k in np.flatnonzero(holds))
    return f"layer{'s' if holds.sum() > 1 else ''} {numbers}" if numbers else "none"


def _report(outcome: ImageOutcome, epochs: float, seconds: float) -> str:
    made_by = ", ".join(f"{k.removesuffix('_version')} {v}" for k, v in versions().items())
    rise, cleaner = outcome.verdict
    classes = outcome.problem.data.num_outputs
    first = next(iter(outcome.records.values()))
    lines = [
        "# Dense layers of a convolutional network, after Ji and Telgarsky (2019)",
        "",
        f"`{outcome.problem.data!r}`. {len(first)} seeds, {epochs:g} epochs of stochastic descent; "
        f"computed in {seconds:.0f} s with {made_by}.",
        "",
        f"* Do the ratios rise? {rise}",
        f"* More cleanly from norm {NORM:g}? {cleaner}",
        *(f"* Unfinished: {each}" for each in outcome.unfinished),
        "",
        DIFFERS,
        "",
        *(f"* {note}" for note in outcome.notes),
        "",
        "![dense layers](dense_layers.png)",
        "",
        "Mean, and range over seeds. With K classes theory lets layers become of rank K - 1, not "
        f"one: a layer with {classes - 1} equal singular values and no others has the ratio "
        f"{(classes - 1) ** -0.5:.3f}, the dashed line of the figure.",
        "",
        markdown(RATIO_HEADER, ratio_rows(outcome.problem, outcome.records)),
        "",
        "Alignment of neighbouring dense layers:",
        "",
        markdown(ALIGNMENT_HEADER, alignment_rows(outcome.problem, outcome.records)),
        "",
    ]
    if outcome.small is not None:
        (flow,) = outcome.beside_flow["exact flow"]
        lines += [
            "## Beside the exact flow",
            "",
            f"Two dense layers of width {SMALL} with ReLU between them, on one picture in {EACH}, "
            f"from one start to t = {UNTIL:g}; descent takes steps of {RATE:g}. The flow meets "
            f"{int(flow.num_kinks[-1]):,} kinks, at the end {int(flow.num_sliding[-1])} units "
            f"slide, and the energy identity holds to {float(flow.clock_error[-1]):.1g}.",
            "",
            "![beside the exact flow](beside_exact_flow.png)",
            "",
            markdown(RATIO_HEADER, ratio_rows(outcome.small, outcome.beside_flow)),
            "",
            markdown(ALIGNMENT_HEADER, alignment_rows(outcome.small, outcome.beside_flow)),
            "",
        ]
    return "\n".join(lines)

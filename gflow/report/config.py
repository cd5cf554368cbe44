"""``gflow run CONFIG.toml``: from a configuration file to an experiment.

A file has the tables ``[data]``, ``[network]``, ``[loss]``, ``[start]``, ``[flow]`` and
``[descent]``; ``examples/two_species.toml`` documents every key. A key that is not known is an
error that lists those that are, so that a misspelled setting is never silently ignored.
"""

import contextlib
import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gflow.dynamics import clocks, stops as rules
from gflow.problem import datasets, init
from gflow.problem.data import Dataset
from gflow.problem.losses import AbstractLoss, Exponential, Logistic
from gflow.problem.polynomial_tail import PolynomialTail
from gflow.problem.risk import Problem
from gflow.report.experiment import Experiment, Run, one_run
from gflow.report.table import REQUIRED, Table, choose

LOSSES: dict[str, type[AbstractLoss]] = {
    "exponential": Exponential,
    "logistic": Logistic,
    "polynomial_tail": PolynomialTail,
}

STARTS: dict[str, Callable[..., init.LayerWeights]] = {
    "gaussian": init.gaussian,
    "xavier": init.xavier,
    "he": init.he,
    "orthogonal": init.orthogonal,
    "balanced": init.balanced,
    "zero_first": init.zero_first,
}

RULES: dict[str, Callable[[Any], rules.AbstractRule]] = {
    "log_risk": rules.LogRisk,
    "time": rules.Time,
    "log_time": rules.LogTime,
    "steps": rules.Steps,
    "misalignment": rules.Misalignment,
    "margin_gap": rules.MarginGap,
    "kkt": rules.KKT,
}

CLOCKS: dict[str, Callable[[], clocks.AbstractClock]] = {
    "time": clocks.Time,
    "log_time": clocks.LogTime,
    "risk": clocks.Risk,
    "log_risk": clocks.LogRisk,
}

MAKERS: tuple[Callable[..., Dataset], ...] = (
    datasets.separable,
    datasets.two_point,
    datasets.one_datum,
    datasets.digits,
    datasets.iris,
    datasets.wine,
    datasets.breast_cancer,
)
"""Data sets whose arguments a file may set."""

GFLOW_OPTIMIZERS = ("loss_scaled", "polyak", "loss_line_search", "paper_steps")


def read(path: str | Path) -> Experiment:
    """The experiment that a configuration file describes.

    Args:
        path: a TOML file; paths inside it are relative to its folder.

    Raises:
        OSError: if the file, or the data file it names, cannot be read.
        ValueError: if it is malformed, with line and column; or has an unknown key or name.
    """
    path = Path(path)
    document = parsed(path)
    if "sweep" in document:
        raise ValueError(f"{path} has a table [sweep]: run it with `gflow sweep {path}`.")
    return build(document, folder=path.parent, name=path.stem)


def parsed(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}).") from error


def build(
    document: Mapping[str, Any],
    *,
    folder: Path,
    name: str,
    read_data: "Callable[[Table, Path], Dataset] | None" = None,
) -> Experiment:
    """The experiment that a parsed configuration describes.

    Args:
        document: the tables of the file.
        folder: what paths inside are relative to.
        name: of the experiment unless the document has one.
        read_data: what makes the data of their table, unless it is `data_of`.
    """
    top = Table(document, "")
    name = top.get("name", str, name)
    tables = {key: top.table(key, REQUIRED) for key in ("data", "network")}
    loss, start = top.table("loss", {}), top.table("start", {})
    flow, descent = top.table("flow", None), top.table("descent", None)
    top.done()
    data = (read_data or data_of)(tables["data"], folder)
    problem = Problem(data, loss=_loss(loss))
    network = tables["network"]
    shapes = [_widths(network, data)]
    if network.get("one_layer", bool, False):
        shapes.append((data.dim, 1))
    network.done()
    starts = [_start(start, folder, shape, problem) for shape in shapes]
    start.done()
    if flow is None and descent is None:
        raise ValueError(
            "neither [flow] nor [descent] is there; expected at least one of them, such as\n"
            "[flow]\nuntil = { log_risk = -1e4 }"
        )
    runs = [
        run
        for table, kind in ((flow, _flow), (descent, _descent))
        if table is not None
        for run in kind(table, problem, starts)
    ]
    return Experiment(name, problem, runs)


def data_of(table: Table, folder: Path) -> Dataset:
    """The data that a table describes."""
    file = table.get("file", str, None)
    name = table.get("dataset", str, None)
    scale = table.get("scale", bool, file is not None)
    bias = table.get("bias", float, None)
    if (file is None) == (name is None):
        raise ValueError(
            "[data] needs one of `file`, the path of a .csv, .tsv, .txt or .npz file, and "
            "`dataset`, the name of one that gflow has."
        )
    if file is not None:
        reader = Dataset.from_npz if file.endswith(".npz") else Dataset.from_csv
        options = table.rest(_options(reader))
        table.done()
        with named("[data]"):
            data = Dataset.from_file(folder / file, **options)
    else:
        written = str(name).replace("-", "_")
        maker = next((maker for maker in MAKERS if maker.__name__ == written), None)
        options = {} if maker is None else table.rest(_options(maker))
        table.done()
        with named("[data]"):
            data = datasets.load(str(name)) if maker is None else maker(**options)
        if "bias" in options:  # it is there already
            bias = None
    if bias is not None:
        with named("[data] bias"):
            data = data.with_bias(bias)
    return data.scaled() if scale else data


def _loss(table: Table) -> AbstractLoss:
    kind = choose("[loss] name", table.get("name", str, "logistic"), LOSSES)
    options = table.rest(_options(kind.__init__) if kind is PolynomialTail else ())
    table.done()
    with named("[loss]"):
        return kind(**options)


def _widths(network: Table, data: Dataset) -> tuple[int, ...]:
    depth, width = network.get("depth", int, None), network.get("width", int, None)
    if depth is not None and width is not None and "widths" not in network.values:
        if depth < 1 or width < 1:
            raise ValueError(
                f"[network] depth is {depth} and width {width}; expected at least 1 of each."
            )
        return (data.dim, *[width] * (depth - 1), 1)
    if depth is not None or width is not None:
        raise ValueError("[network] needs either `widths`, or both `depth` and `width`.")
    widths = network.get("widths", list, REQUIRED)
    if not all(isinstance(width, int) and width > 0 for width in widths) or len(widths) < 2:
        raise ValueError(
            f"[network] widths is {widths}; expected positive whole numbers from the dimension of "
            f"the inputs to one output, such as [{data.dim}, 10, 10, 10, 1]."
        )
    if widths[0] != data.dim or widths[-1] != 1:
        raise ValueError(
            f"[network] widths is {widths}; the first must be {data.dim}, the number of features "
            "of the data (a bias counts), and the last 1, the one output."
        )
    return tuple(widths)


def _start(
    table: Table, folder: Path, widths: tuple[int, ...], problem: Problem
) -> init.LayerWeights:
    file = table.get("file", str, None)
    admissible = table.get("admissible", bool, True)
    method = table.get("method", str, "gaussian")
    if file is not None and len(widths) > 2:
        weights = _stored_weights(folder / file, widths)
    else:
        maker = choose("[start] method", method, STARTS)
        options = table.rest(_options(maker))
        options.setdefault("seed", 0)
        with named("[start]"):
            weights = maker(widths, **options)
    if admissible:
        with named("[start]"):
            weights = init.admissible(weights, problem)
    return weights


def _stored_weights(path: Path, widths: tuple[int, ...]) -> init.LayerWeights:
    """Weights of an NPZ file, under the names ``weights_1``, ``weights_2``, … from the input."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[f"weights_{k}"] for k in range(1, len(widths))]
    except (KeyError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(
            f"[start] file: {path} does not hold the arrays weights_1 … weights_{len(widths) - 1}; "
            "expected an NPZ file made by numpy.savez."
        ) from error
    weights = init.from_arrays(arrays)
    shapes = [layer.shape for layer in weights]
    wanted = list(zip(widths[1:], widths[:-1], strict=True))
    if shapes != wanted:
        raise ValueError(f"[start] file: {path} has shapes {shapes}; `widths` asks for {wanted}.")
    return weights


def _flow(table: Table, problem: Problem, starts: "list[init.LayerWeights]") -> list[Run]:
    until = _until(table)
    options = _common(table)
    for key in ("rtol", "atol"):
        options[key] = table.get(key, float, None)
    options["max_steps"] = table.get("max_steps", int, None)
    for key in ("certify", "function_space"):
        options[key] = table.get(key, bool, None)
    clock = table.get("clock", str, None)
    options["clock"] = None if clock is None else choose("[flow] clock", clock, CLOCKS)()
    solver = table.get("solver", str, None)
    options["solver"] = None if solver is None else _solver(solver)
    table.done()
    given = {key: value for key, value in options.items() if value is not None}
    return [one_run("flow", weights, until, options=given) for weights in starts]


def _descent(table: Table, problem: Problem, starts: "list[init.LayerWeights]") -> list[Run]:
    from gflow.dynamics.descending.step_sizes import on_log_risk

    until = _until(table)
    options = _common(table)
    optimizer = table.get("optimizer", str, "loss_scaled")
    in_log_domain = table.get("on_log_risk", bool, False)
    maker = _optimizer(optimizer)
    settings = table.rest(_options(maker))
    table.done()
    if optimizer == "loss_scaled":
        settings.setdefault("rate", 0.1)
    with named(f"[descent] optimizer = {optimizer!r}:"):
        made = maker(problem, **settings) if optimizer == "paper_steps" else maker(**settings)
    if in_log_domain:
        made = on_log_risk(made)
    given = {key: value for key, value in options.items() if value is not None}
    return [one_run("descent", weights, until, optimizer=made, options=given) for weights in starts]


def _common(table: Table) -> dict[str, Any]:
    return {
        "save": table.get("save", int, None),
        "keep_weights": table.get("keep_weights", bool, None),
    }


def _until(table: Table) -> Any:
    wanted = table.table("until", REQUIRED)
    found = []
    for key in wanted.names():
        rule = choose(f"{wanted.where} until", key, RULES)
        kind = int if key == "steps" else float
        with named(f"{wanted.where} {key}:"):
            found.append(rule(wanted.get(key, kind, REQUIRED)))
    if not found:
        raise ValueError(
            f"{wanted.where} is empty; expected one or more of {', '.join(RULES)}, such as "
            "{ log_risk = -1e4 }."
        )
    joined = found[0]
    for rule in found[1:]:
        joined = joined | rule
    return joined


def _optimizer(name: str) -> Callable[..., Any]:
    import gflow

    ours = {key: getattr(gflow, key) for key in GFLOW_OPTIMIZERS}
    if name in ours:
        return ours[name]
    import optax

    theirs = {
        key: value
        for key, value in vars(optax).items()
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
    }
    return choose("[descent] optimizer", name, ours | theirs)


def _solver(name: str) -> Any:
    import diffrax

    import gflow

    ours = {
        key: value
        for key, value in vars(gflow).items()
        if inspect.isclass(value) and issubclass(value, diffrax.AbstractSolver)
    }
    theirs = {key: getattr(diffrax, key) for key in ("Dopri5", "Dopri8", "Tsit5", "Kvaerno5")}
    return choose("[flow] solver", name, ours | theirs)()


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of what a file's values are given to, with the place in the file."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where} {error}") from error


def _options(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments that a file may set."""
    hidden = {"self", "cls", "path", "widths", "problem", "options"}
    return tuple(key for key in inspect.signature(function).parameters if key not in hidden)

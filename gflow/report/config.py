"""``gflow run CONFIG.toml``: from a configuration file to an experiment.

A file has the tables ``[data]``, ``[network]``, ``[loss]``, ``[start]``, ``[flow]`` and
``[descent]``; ``examples/two_species.toml`` documents every key. A key that is not known is an
error that lists those that are, so that a misspelled setting is never silently ignored.
"""

import contextlib
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import diffrax
import numpy as np
import optax

import gflow
from gflow.dynamics import clocks, stops as rules
from gflow.problem import datasets, init
from gflow.problem.abstract_data import AbstractData
from gflow.problem.data import Dataset
from gflow.problem.regression import Regression
from gflow.problem.risk import Problem
from gflow.problem.terms import AbstractJointLoss
from gflow.report.experiment import Experiment, Run, one_run
from gflow.report.toml_table import REQUIRED, TomlTable, choose

# What a file may name is what gflow has: a new loss, rule, clock, start or option of a run needs no
# line here. Names are those in Python, in lower case: LogRisk is log_risk.


def _kinds(kind: type, names: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a kind, those to build, by name."""
    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): found
        for name, found in names.items()
        if inspect.isclass(found) and issubclass(found, kind) and not inspect.isabstract(found)
    }


def _makers(module: Any, first: str | None = None) -> dict[str, Callable[..., Any]]:
    """The public functions of a module, those whose first argument is ``first`` if it is given."""
    return {
        name: found
        for name, found in vars(module).items()
        if inspect.isfunction(found)
        and found.__module__ == module.__name__
        and not name.startswith("_")
        and (first is None or next(iter(inspect.signature(found).parameters)) == first)
    }


LOSSES: dict[str, type[AbstractJointLoss]] = _kinds(AbstractJointLoss, vars(gflow))
RULES: dict[str, Callable[[Any], rules.AbstractRule]] = _kinds(rules.AbstractRule, vars(gflow))
CLOCKS: dict[str, Callable[[], clocks.AbstractClock]] = _kinds(clocks.AbstractClock, vars(clocks))
STARTS: dict[str, Callable[..., init.LayerWeights]] = _makers(init, first="widths")
MAKERS: dict[str, Callable[..., AbstractData]] = {
    name: maker for name, maker in _makers(datasets).items() if maker is not datasets.load
}
"""Data sets whose arguments a file may set, beside those that ``datasets.load`` knows by name."""

GFLOW_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    name: found
    for name, found in vars(gflow).items()
    if inspect.isfunction(found)
    and inspect.signature(found).return_annotation is optax.GradientTransformationExtraArgs
    and "optimizer" not in inspect.signature(found).parameters
}

OF_THE_CALL = ("progress", "checkpoint")
"""Options of a run that the command line has, not the file."""


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
    read_data: "Callable[[TomlTable, Path], AbstractData] | None" = None,
) -> Experiment:
    """The experiment that a parsed configuration describes.

    Args:
        document: the tables of the file.
        folder: what paths inside are relative to.
        name: of the experiment unless the document has one.
        read_data: what makes the data of their table, unless it is `data_of`.
    """
    top = TomlTable(document, "")
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
        shapes.append((data.dim, data.num_outputs))
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


TARGETS = ("target_columns", "targets")
"""Keys of [data] that say that a file has targets."""


def data_of(table: TomlTable, folder: Path) -> AbstractData:
    """The data that a table describes."""
    file = table.get("file", str, None)
    name = table.get("dataset", str, None)
    bias = table.get("bias", float, None)
    if (file is None) == (name is None):
        raise ValueError(
            "[data] needs one of `file`, the path of a .csv, .tsv, .txt or .npz file, and "
            "`dataset`, the name of one that gflow has."
        )
    if file is not None:
        kind = Regression if any(key in table.values for key in TARGETS) else Dataset
        scale = table.get("scale", bool, kind is Dataset)
        options = table.rest(_options(kind.from_npz if file.endswith(".npz") else kind.from_csv))
        table.done()
        with named("[data]"):
            data = kind.from_file(folder / file, **options)
    else:
        scale = table.get("scale", bool, False)
        written = str(name).replace("-", "_")
        maker = MAKERS.get(written)
        options = {} if maker is None else table.rest(_options(maker))
        table.done()
        with named("[data]"):
            data = datasets.load(str(name)) if maker is None else maker(**options)
        if "bias" in options:  # it is there already
            bias = None
    with named("[data]"):
        return data.prepared(bias, scale)


def _loss(table: TomlTable) -> AbstractJointLoss | None:
    """The loss; None for that of the data."""
    name = table.get("name", str, None)
    if name is None:
        table.done()
        return None
    kind = choose("[loss] name", name, LOSSES)
    options = table.rest(tuple(key for key in _options(kind) if key not in FROM_DATA))
    table.done()
    with named("[loss]"):
        return kind(**options)


FROM_DATA = ("targets",)
"""What losses take from the data."""


def _widths(network: TomlTable, data: AbstractData) -> tuple[int, ...]:
    depth, width = network.get("depth", int, None), network.get("width", int, None)
    outputs = data.num_outputs
    if depth is not None and width is not None and "widths" not in network.values:
        if depth < 1 or width < 1:
            raise ValueError(
                f"[network] depth is {depth} and width {width}; expected at least 1 of each."
            )
        return (data.dim, *[width] * (depth - 1), outputs)
    if depth is not None or width is not None:
        raise ValueError("[network] needs either `widths`, or both `depth` and `width`.")
    widths = network.get("widths", list, REQUIRED)
    several = "the one output" if outputs == 1 else f"the {outputs} outputs"
    if not all(isinstance(width, int) and width > 0 for width in widths) or len(widths) < 2:
        raise ValueError(
            f"[network] widths is {widths}; expected positive whole numbers from the dimension of "
            f"the inputs to {several}, such as [{data.dim}, 10, 10, 10, {outputs}]."
        )
    if widths[0] != data.dim or widths[-1] != outputs:
        raise ValueError(
            f"[network] widths is {widths}; the first must be {data.dim}, the number of features "
            f"of the data (a bias counts), and the last {outputs}, {several}."
        )
    return tuple(widths)


def _start(
    table: TomlTable, folder: Path, widths: tuple[int, ...], problem: Problem
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


def _flow(table: TomlTable, problem: Problem, starts: "list[init.LayerWeights]") -> list[Run]:
    until = _until(table)
    options = _plain_options(table, gflow.gradient_flow)
    if (clock := table.get("clock", str, None)) is not None:
        options["clock"] = choose("[flow] clock", clock, CLOCKS)()
    if (solver := table.get("solver", str, None)) is not None:
        options["solver"] = _solver(solver)
    table.done()
    return [one_run("flow", weights, until, options=options) for weights in starts]


def _descent(table: TomlTable, problem: Problem, starts: "list[init.LayerWeights]") -> list[Run]:
    until = _until(table)
    options = _plain_options(table, gflow.gradient_descent)
    optimizer = table.get("optimizer", str, "loss_scaled")
    in_log_domain = table.get("on_log_risk", bool, False)
    maker = _optimizer(optimizer)
    settings = table.rest(_options(maker))
    table.done()
    if optimizer == "loss_scaled":
        settings.setdefault("rate", 0.1)
    with named(f"[descent] optimizer = {optimizer!r}:"):
        for_problem = "problem" in inspect.signature(maker).parameters
        made = maker(problem, **settings) if for_problem else maker(**settings)
    if in_log_domain:
        made = gflow.on_log_risk(made)
    return [
        one_run("descent", weights, until, optimizer=made, options=options) for weights in starts
    ]


def plain_options(verb: Callable[..., Any]) -> dict[str, type]:
    """The options of a verb that are a number, or true or false, and of which kind each is."""
    found = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in OF_THE_CALL:
            allowed = get_args(parameter.annotation) or (parameter.annotation,)
            kinds = [kind for kind in (float, int, bool) if kind in allowed]
            if kinds:
                found[name] = kinds[0]
    return found


def _plain_options(table: TomlTable, verb: Callable[..., Any]) -> dict[str, Any]:
    """Those that a table sets."""
    found = {name: table.get(name, kind, None) for name, kind in plain_options(verb).items()}
    return {name: value for name, value in found.items() if value is not None}


def _until(table: TomlTable) -> Any:
    wanted = table.table("until", REQUIRED)
    found = []
    for key in wanted.names():
        rule = choose(f"{wanted.where} until", key, RULES)
        kind = inspect.signature(rule).parameters["value"].annotation
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
    if name in GFLOW_OPTIMIZERS:
        return GFLOW_OPTIMIZERS[name]
    theirs = {
        key: value
        for key, value in vars(optax).items()
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
    }
    return choose("[descent] optimizer", name, GFLOW_OPTIMIZERS | theirs)


def _solver(name: str) -> Any:
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

r"""``gflow.check()``: the solvers against every closed form, on the machine at hand.

Each row follows one flow at the default tolerances and compares it at every saved point with its
closed form in ``gflow.exact`` (which is checked against 30-digit arithmetic in the tests). The
error of a row is the larger of those of the end-to-end vector, relative to its norm, and of
$\log t$, relative to $\max(1, |\log t|)$.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gflow.analysis import exact
from gflow.analysis.table import Table, line
from gflow.dynamics.flow import gradient_flow
from gflow.dynamics.stops import LogRisk
from gflow.problem import init, settings
from gflow.problem.data import Dataset
from gflow.problem.losses import AbstractLoss, Exponential, Logistic
from gflow.problem.network import Network
from gflow.problem.regression import Regression
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr

DIGITS = 8
"""What the default tolerances promise of every closed form."""

ROUND_OFF = 1e-16
"""An error of zero is told as this."""

DATUM = np.array([0.8, -0.5, 0.3])
FAR, NEAR = -1000.0, -40.0
"""The log risks to which margin losses and square losses are followed."""

HADAMARD = -100.0
"""The same of modes of several classes, whose equation SciPy integrates."""


class Check(NamedTuple):
    """One closed form and how well its flow was met."""

    name: str
    oracle: str
    """The function of ``gflow.exact``."""
    error: float
    seconds: float

    @property
    def digits(self) -> float:
        """Correct decimal digits; none where the flow did not arrive."""
        return -math.log10(max(self.error, ROUND_OFF)) if math.isfinite(self.error) else 0.0

    @property
    def passed(self) -> bool:
        """Whether there are as many as promised."""
        return self.digits >= DIGITS


class Checks(Table[Check]):
    """A table of digits: prints aligned, iterates over its rows; ``passed`` for all of them."""

    header = ("flow", "closed form", "digits", "seconds", "")

    def cells(self, row: Check) -> tuple[str, ...]:
        mark = "" if row.passed else f"fewer than {DIGITS}"
        return row.name, row.oracle, f"{row.digits:6.1f}", f"{row.seconds:7.1f}", mark

    @property
    def passed(self) -> bool:
        """Whether every row has the digits promised."""
        return all(row.passed for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many closed forms are met, and the fewest digits."""
        fewest = min((row.digits for row in self.rows), default=math.nan)
        good = sum(row.passed for row in self.rows)
        met = f"{good} of {len(self.rows)} closed forms to {DIGITS} digits or more"
        return f"{met}; fewest {fewest:.1f}"


@settings.own()
def check(*, show: bool = False) -> Checks:
    """Follow every flow that has a closed form, and count the correct digits.

    Takes about a minute, most of it compilation.

    Args:
        show: print each row as it is found.

    Returns:
        A table: print it, iterate over its rows, or ask whether it has ``passed``.
    """
    rows = []
    ahead = [(name, oracle, "", "", "") for name, oracle, _ in CASES]
    sizes = [max(map(len, column)) for column in zip(Checks.header, *ahead, strict=True)]
    if show:
        print(line(Checks.header, sizes), flush=True)  # noqa: T201
    for name, oracle, flow in CASES:
        began = time.perf_counter()
        rows.append(Check(name, oracle, flow().error(), time.perf_counter() - began))
        if show:
            print(line(Checks(rows).cells(rows[-1]), sizes), flush=True)  # noqa: T201
    return Checks(rows)


# -------------------------------------------------------------------------------------------------
# The flows
# -------------------------------------------------------------------------------------------------

Truth = Callable[["xr.Dataset"], tuple[np.ndarray, np.ndarray]]
"""The end-to-end vector and log t at the saved points of a record, by a closed form."""


class Flow(NamedTuple):
    """A flow and its closed form."""

    problem: Problem
    weights: Weights
    truth: Truth
    found: Callable[["xr.Dataset"], np.ndarray] = lambda flow: flow["end_to_end"].values
    """The same vector by the record."""
    end: float = FAR
    """The log risk that it is followed to."""

    def error(self) -> float:
        """The largest over the saved points after the start; infinite if it does not arrive."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"R\(W\(0\)\)", UserWarning)  # here all arrive
            flow = gradient_flow(
                self.problem,
                self.weights,
                until=LogRisk(self.end),
                save=8,
                keep_weights=True,
                progress=False,
            )
        if flow.attrs["status"] != "reached":
            return math.inf
        flow = flow.isel(point=slice(1, None))
        found, log_time = self.found(flow), flow["log_time"].values
        wanted, log_time_wanted = self.truth(flow)
        wanted = np.reshape(wanted, found.shape)
        of_w = _norms(found - wanted) / _norms(wanted)
        of_time = np.abs(log_time - log_time_wanted) / np.maximum(1.0, np.abs(log_time_wanted))
        return float(max(np.max(of_w), np.max(of_time)))


def _norms(values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(values.reshape(len(values), -1), axis=1)


def _of_layers(product: Callable[..., np.ndarray]) -> Callable[["xr.Dataset"], np.ndarray]:
    """The end-to-end vector of a network of two layers, of which a record holds the weights."""
    return lambda flow: np.array(
        [
            product(*layers)
            for layers in zip(flow["weights_1"].values, flow["weights_2"].values, strict=True)
        ]
    )


def _at_risk(oracle: Callable[..., Any], *arguments: Any, **options: Any) -> Truth:
    """A closed form that is a function of the risk."""

    def truth(flow: "xr.Dataset") -> tuple[np.ndarray, np.ndarray]:
        found = oracle(*arguments, **options, log_risk=flow["log_risk"].values)
        return found.end_to_end, found.log_time

    return truth


def _at_time(oracle: Callable[..., Any], *, of: float = 1.0, **options: Any) -> Truth:
    """A closed form that is a function of the time, of a risk that is so many times ours."""

    def truth(flow: "xr.Dataset") -> tuple[np.ndarray, np.ndarray]:
        log_time = flow["log_time"].values
        return oracle(np.exp(log_time) / of, **options).end_to_end, log_time

    return truth


def _datum(loss: AbstractLoss, network: Network | None = None) -> Problem:
    return Problem(Dataset([DATUM], [1], name="one datum"), network, loss)


def _linear(loss: AbstractLoss) -> Flow:
    start = np.array([0.3, 0.2, -0.4])
    truth = _at_risk(exact.one_datum_linear, DATUM, start, loss=loss)
    return Flow(_datum(loss), (start[None],), truth)


def _two_points() -> Flow:
    start, counts = [0.3, -0.4], (3, 1)
    inputs = np.repeat([[0.8, 0.5], [0.8, -0.5]], counts, axis=0)
    problem = Problem(Dataset(inputs, np.ones(4), name="two points"), loss=Exponential())
    truth = _at_risk(exact.two_point_linear, [0.8, 0.5], counts, start)
    return Flow(problem, (np.array([start]),), truth)


def _balanced(loss: AbstractLoss, depth: int) -> Flow:
    along = DATUM / np.linalg.norm(DATUM)
    weights = init.balanced((3, *[4] * (depth - 1), 1), end_to_end=0.5 * along)
    truth = _at_risk(exact.one_datum_balanced, DATUM, 0.5, depth, loss=loss)
    return Flow(_datum(loss), weights, truth)


def _unbalanced(loss: AbstractLoss) -> Flow:
    """From a start with R(W(0)) > R(0)."""
    layers = (0.4, -1.1)
    weights = (layers[0] * DATUM[None] / np.linalg.norm(DATUM), np.array([[layers[1]]]))
    truth = _at_risk(exact.two_layer_one_datum, DATUM, layers, loss=loss)
    return Flow(_datum(loss), weights, truth)


def _diagonal(depth: int) -> Flow:
    def product(up: Any, down: Any) -> Any:
        return up**depth - down**depth

    network = Network(lambda weights, x: jnp.dot(product(*weights), x))
    truth = _at_risk(exact.one_datum_diagonal, DATUM, scale=0.7, depth=depth)
    scale = np.full(3, 0.7)
    return Flow(_datum(Exponential(), network), (scale, scale), truth, _of_layers(product))


def _convolution(loss: AbstractLoss) -> Flow:
    z = np.array([1.0, 0.5, 0.2, -0.3, 0.6])
    modes = np.fft.fft(z)
    sizes = np.array([0.3, 0.5, 0.2, 0.2, 0.5])  # of both layers' modes
    first = np.fft.ifft(sizes).real
    second = np.fft.ifft(sizes * modes / np.abs(modes)).real
    order = (np.arange(5)[:, None] - np.arange(5)) % 5

    def product(first: Any, second: Any) -> Any:
        return second[order] @ first

    network = Network(lambda weights, x: jnp.dot(product(*weights), x))
    problem = Problem(Dataset([z], [1], name="one datum"), network, loss)
    truth = _at_risk(exact.one_datum_convolution, z, product(first, second), loss=loss)
    return Flow(problem, (first, second), truth, _of_layers(product))


def _square(weights: Weights, oracle: Callable[..., Any], target: float, **options: Any) -> Flow:
    """A square loss of one number."""
    problem = Problem(Regression([[1.0]], [target], name="one mode"))
    return Flow(problem, weights, _at_time(oracle, target=target, **options), end=NEAR)


def _square_mode(depth: int, start: float = 0.05) -> Flow:
    weights = tuple(np.array([[start ** (1 / depth)]]) for _ in range(depth))
    return _square(weights, exact.square_loss_mode, 1.7, start=start, depth=depth)


def _square_unbalanced() -> Flow:
    weights = (np.array([[0.9]]), np.array([[0.1]]))
    return _square(weights, exact.two_layer_square_loss, 1.3, start=(0.9, 0.1))


def _riccati() -> Flow:
    """Two matrices; the risk is the MEAN over two points."""
    target = np.array([[1.0, 0.6], [0.7, 1.2]])
    first = np.array([[0.2, 0.1], [0.1, 0.3]])
    values, vectors = np.linalg.eigh(first @ first.T + 0.3 * np.eye(2))
    weights = (first, (vectors * np.sqrt(values)) @ vectors.T)
    problem = Problem(Regression(np.eye(2), target.T, name="unit vectors"))
    truth = _at_time(exact.two_layer_riccati, of=2, target=target, weights=weights)
    return Flow(problem, weights, truth, end=NEAR)


def _clock() -> Flow:
    """Any network, data and loss: what the clock, asinh(-log R), shows beyond itself is error."""
    data = Dataset([[0.8, 0.3], [0.5, 0.6], [-0.4, -0.9]], [1, 1, -1], name="three points")
    problem = Problem(data, loss=Logistic())
    weights = init.admissible(init.gaussian((2, 4, 3, 1), seed=0), problem)

    def truth(flow: "xr.Dataset") -> tuple[np.ndarray, np.ndarray]:
        return exact.risk_clock(np.sinh(flow["clock_value"].values), 0.0), flow["log_time"].values

    return Flow(problem, weights, truth, found=lambda flow: flow["log_risk"].values)


def _one_point_a_class(num_classes: int) -> Problem:
    data = Dataset(
        np.eye(num_classes), np.arange(num_classes), num_classes=num_classes, name="unit vectors"
    )
    return Problem(data)


def _simplex(num_classes: int, depth: int) -> Flow:
    start = 0.3 ** (1 / depth) * (np.eye(num_classes) - 1 / num_classes)
    truth = _at_risk(exact.simplex_modes, num_classes, 0.3, depth)
    return Flow(_one_point_a_class(num_classes), (start,) * depth, truth)


def _hadamard(depth: int) -> Flow:
    modes = np.array([0.0, 0.9, 0.4, 0.1])
    v = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    truth = _at_risk(exact.hadamard_modes, modes, depth)
    layer = v * modes ** (1 / depth) @ v
    return Flow(_one_point_a_class(4), (layer,) * depth, truth, end=HADAMARD)


CASES: tuple[tuple[str, str, Callable[[], Flow]], ...] = (
    ("one layer, exponential", "one_datum_linear", lambda: _linear(Exponential())),
    ("one layer, logistic", "one_datum_linear", lambda: _linear(Logistic())),
    ("one layer, two weighted points", "two_point_linear", _two_points),
    ("2 balanced layers, exponential", "one_datum_balanced", lambda: _balanced(Exponential(), 2)),
    ("3 balanced layers, logistic", "one_datum_balanced", lambda: _balanced(Logistic(), 3)),
    ("8 balanced layers, exponential", "one_datum_balanced", lambda: _balanced(Exponential(), 8)),
    ("2 unbalanced layers, exponential", "two_layer_one_datum", lambda: _unbalanced(Exponential())),
    ("2 unbalanced layers, logistic", "two_layer_one_datum", lambda: _unbalanced(Logistic())),
    ("2 diagonal layers", "one_datum_diagonal", lambda: _diagonal(2)),
    ("3 diagonal layers", "one_datum_diagonal", lambda: _diagonal(3)),
    ("2 convolutions, exponential", "one_datum_convolution", lambda: _convolution(Exponential())),
    ("2 convolutions, logistic", "one_datum_convolution", lambda: _convolution(Logistic())),
    ("1 layer, square loss", "square_loss_mode", lambda: _square_mode(1)),
    ("3 balanced layers, square loss", "square_loss_mode", lambda: _square_mode(3)),
    ("5 balanced layers, square loss", "square_loss_mode", lambda: _square_mode(5)),
    ("2 layers from 1e-15, square loss", "square_loss_mode", lambda: _square_mode(2, 1e-15)),
    ("2 unbalanced layers, square loss", "two_layer_square_loss", _square_unbalanced),
    ("2 matrices, square loss", "two_layer_riccati", _riccati),
    ("5 classes, 3 layers", "simplex_modes", lambda: _simplex(5, 3)),
    ("4 classes, 2 layers, unequal modes", "hadamard_modes", lambda: _hadamard(2)),
    ("4 layers, logistic, three points", "risk_clock", _clock),
)
"""Name, closed form, and the flow."""

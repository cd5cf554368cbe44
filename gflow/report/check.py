r"""``gflow.check()``: the solvers against every closed form, on the machine at hand.

Each row follows one flow at the default tolerances and compares it at every saved point with its
closed form in ``gflow.exact`` (which is checked against 30-digit arithmetic in the tests). The
error of a row is the larger of those of the end-to-end vector, relative to its norm, and of
$\log t$, relative to $\max(1, |\log t|)$.
"""

import html
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflow.analysis import exact
from gflow.analysis.exact import square_loss_mode, two_layer_riccati, two_layer_square_loss
from gflow.dynamics.flow import gradient_flow
from gflow.dynamics.stops import LogRisk
from gflow.problem import init, settings
from gflow.problem.data import Dataset
from gflow.problem.losses import AbstractLoss, Exponential, Logistic
from gflow.problem.network import Network, Weights
from gflow.problem.risk import Problem

DIGITS = 8
"""What the default tolerances promise of every closed form."""

ROUND_OFF = 1e-16
"""An error of zero is told as this."""

DATUM = np.array([0.8, -0.5, 0.3])
FAR, MIDDLE = -1000.0, -12.0
"""The log risks to which margin losses and square losses are followed: a square loss is a
difference of numbers of order one, whose logarithm loses digits as it falls."""


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


class Checks(Sequence[Check]):
    """A table of digits: prints aligned, iterates over its rows; ``passed`` for all of them."""

    def __init__(self, rows: Sequence[Check]):
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.rows)

    @property
    def passed(self) -> bool:
        """Whether every row has the digits promised."""
        return all(row.passed for row in self.rows)

    @property
    def summary(self) -> str:
        """One line."""
        fewest = min((row.digits for row in self.rows), default=math.nan)
        good = sum(row.passed for row in self.rows)
        met = f"{good} of {len(self.rows)} closed forms to {DIGITS} digits or more"
        return f"{met}; fewest {fewest:.1f}"

    def __str__(self) -> str:
        return "\n".join([_HEAD, *map(_line, self.rows), "", self.summary])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


_HEAD = f"{'flow':<44}  {'closed form':<24}  digits  seconds"


def _line(row: Check) -> str:
    mark = "" if row.passed else f"   fewer than {DIGITS}"
    return f"{row.name:<44}  {row.oracle:<24}  {row.digits:6.1f}  {row.seconds:7.1f}{mark}"


@settings.own()
def check(*, show: bool = False) -> Checks:
    """Follow every flow that has a closed form, and count the correct digits.

    Takes about a minute, most of it compilation.

    Args:
        show: print each row as it is found.

    Returns:
        A table: print it, iterate over its rows, or ask whether it has ``passed``.
    """
    if show:
        print(_HEAD, flush=True)  # noqa: T201
    rows = []
    for name, oracle, error in CASES:
        began = time.perf_counter()
        rows.append(Check(name, oracle, error(), time.perf_counter() - began))
        if show:
            print(_line(rows[-1]), flush=True)  # noqa: T201
    return Checks(rows)


# -------------------------------------------------------------------------------------------------
# The flows
# -------------------------------------------------------------------------------------------------


class SquareLoss(AbstractLoss):
    r"""$\frac12(s - q)^2$ for $q < s$, as a loss of a margin: the closed forms know it, too."""

    target: float = 1.0

    def log_value(self, margin: Any) -> Any:
        return 2 * jnp.log(self.target - margin) - math.log(2)

    def log_slope(self, margin: Any) -> Any:
        return jnp.log(self.target - margin)

    def log_curvature(self, margin: Any) -> Any:
        return jnp.zeros_like(margin)

    def inverse(self, log_value: Any) -> Any:
        return self.target - jnp.exp((log_value + math.log(2)) / 2)

    @property
    def slope_bound(self) -> float:
        return math.inf

    @property
    def smoothness(self) -> float:
        return 1.0

    @property
    def exponential_tail(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return "square"


def _follow(problem: Problem, weights: Weights, end: float) -> tuple[list, np.ndarray, np.ndarray]:
    """Weights, log time and log risk at the saved points after the start."""
    flow = gradient_flow(
        problem, weights, until=LogRisk(end), save=8, keep_weights=True, progress=False
    )
    if flow.attrs["status"] != "reached":
        return [], np.zeros(0), np.zeros(0)
    names = [f"weights_{k + 1}" for k in range(len(jax.tree.leaves(weights)))]
    points = [tuple(flow[name].values[i] for name in names) for i in range(1, flow.sizes["point"])]
    return points, flow["log_time"].values[1:], flow["log_risk"].values[1:]


def _error(found: Any, wanted: Any, log_time: np.ndarray, log_time_wanted: np.ndarray) -> float:
    if len(log_time) == 0:
        return math.inf
    found, wanted = (np.reshape(x, (len(log_time), -1)) for x in (found, wanted))
    of_w = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    of_time = np.abs(log_time - log_time_wanted) / np.maximum(1.0, np.abs(log_time_wanted))
    return float(max(np.max(of_w), np.max(of_time)))


def _against(
    oracle: Callable[..., exact.ExactFlow],
    problem: Problem,
    weights: Weights,
    end_to_end: Callable[[Weights], np.ndarray],
) -> float:
    """The error of a flow whose closed form is a function of the risk."""
    points, log_time, log_risk = _follow(problem, weights, FAR)
    truth = oracle(log_risk=log_risk) if points else None
    if truth is None:
        return math.inf
    return _error([end_to_end(w) for w in points], truth.end_to_end, log_time, truth.log_time)


def _product(weights: Weights) -> np.ndarray:
    matrix = weights[0]
    for following in weights[1:]:
        matrix = following @ matrix
    return np.ravel(matrix)


def _datum(loss: AbstractLoss, network: Network | None = None) -> Problem:
    return Problem(Dataset([DATUM], [1], name="one datum"), network, loss)


def _linear(loss: AbstractLoss) -> float:
    start = np.array([0.3, 0.2, -0.4])
    oracle = _bind(exact.one_datum_linear, DATUM, start, loss=loss)
    return _against(oracle, _datum(loss), (start[None],), _product)


def _two_points() -> float:
    start, counts = [0.3, -0.4], (3, 1)
    inputs = np.repeat([[0.8, 0.5], [0.8, -0.5]], counts, axis=0)
    problem = Problem(Dataset(inputs, np.ones(4), name="two points"), loss=Exponential())
    oracle = _bind(exact.two_point_linear, [0.8, 0.5], counts, start)
    return _against(oracle, problem, (np.array([start]),), _product)


def _balanced(loss: AbstractLoss, depth: int) -> float:
    along = DATUM / np.linalg.norm(DATUM)
    weights = init.balanced((3, *[4] * (depth - 1), 1), end_to_end=0.5 * along)
    oracle = _bind(exact.one_datum_balanced, DATUM, 0.5, depth, loss=loss)
    return _against(oracle, _datum(loss), weights, _product)


def _unbalanced(loss: AbstractLoss) -> float:
    layers = (0.4, -1.1)
    weights = (layers[0] * DATUM[None] / np.linalg.norm(DATUM), np.array([[layers[1]]]))
    oracle = _bind(exact.two_layer_one_datum, DATUM, layers, loss=loss)
    problem = _datum(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the start has R(W(0)) > R(0)
        return _against(oracle, problem, weights, _product)


def _diagonal(depth: int) -> float:
    def apply(weights: Any, x: Any) -> Any:
        up, down = weights
        return jnp.dot(up**depth - down**depth, x)

    scale = np.full(3, 0.7)
    oracle = _bind(exact.one_datum_diagonal, DATUM, scale=0.7, depth=depth)
    problem = _datum(Exponential(), Network(apply))
    return _against(oracle, problem, (scale, scale), lambda w: w[0] ** depth - w[1] ** depth)


def _convolution(loss: AbstractLoss) -> float:
    z = np.array([1.0, 0.5, 0.2, -0.3, 0.6])
    modes = np.fft.fft(z)
    sizes = np.array([0.3, 0.5, 0.2, 0.2, 0.5])  # of both layers' modes
    first = np.fft.ifft(sizes).real
    second = np.fft.ifft(sizes * modes / np.abs(modes)).real
    order = (np.arange(5)[:, None] - np.arange(5)) % 5

    def apply(weights: Any, x: Any) -> Any:
        return jnp.dot(weights[1][order] @ weights[0], x)

    def product(weights: Weights) -> np.ndarray:
        return weights[1][order] @ weights[0]

    problem = Problem(Dataset([z], [1], name="one datum"), Network(apply), loss)
    oracle = _bind(exact.one_datum_convolution, z, product((first, second)), loss=loss)
    return _against(oracle, problem, (first, second), product)


def _square(oracle: Callable[[np.ndarray], Any], weights: Weights, target: float) -> float:
    """A square loss of one number: its closed form is a function of time."""
    problem = Problem(Dataset([[1.0]], [1], name="one mode"), loss=SquareLoss(target))
    points, log_time, _ = _follow(problem, weights, MIDDLE)
    truth = oracle(np.exp(log_time))
    return _error([_product(w) for w in points], truth.end_to_end, log_time, log_time)


def _square_mode() -> float:
    weights = tuple(np.array([[0.05 ** (1 / 3)]]) for _ in range(3))
    return _square(_bind(square_loss_mode, target=1.7, start=0.05, depth=3), weights, 1.7)


def _square_unbalanced() -> float:
    weights = (np.array([[0.9]]), np.array([[0.1]]))
    return _square(_bind(two_layer_square_loss, target=1.3, start=(0.9, 0.1)), weights, 1.3)


def _riccati() -> float:
    """Two matrices, one entry of their product a data point; the risk is the MEAN of four.

    Followed as long as no entry of the residual changes sign, where its logarithm would end.
    """
    target = np.array([[1.0, 0.6], [0.7, 1.2]])
    first = np.array([[0.2, 0.1], [0.1, 0.3]])
    values, vectors = np.linalg.eigh(first @ first.T + 0.3 * np.eye(2))
    weights = (first, (vectors * np.sqrt(values)) @ vectors.T)

    def apply(weights: Any, x: Any) -> Any:
        return 1 - jnp.dot(jnp.ravel(target - weights[1] @ weights[0]), x)

    problem = Problem(
        Dataset(np.eye(4), np.ones(4), name="four entries"), Network(apply), SquareLoss(1.0)
    )
    points, log_time, _ = _follow(problem, weights, -3.0)
    truth = two_layer_riccati(np.exp(log_time) / 4, target=target, weights=weights)
    return _error([w[1] @ w[0] for w in points], truth.end_to_end, log_time, log_time)


def _clock() -> float:
    """Any network, data and loss: what the risk clock shows beyond itself is error."""
    data = Dataset([[0.8, 0.3], [0.5, 0.6], [-0.4, -0.9]], [1, 1, -1], name="three points")
    problem = Problem(data, loss=Logistic())
    weights = init.admissible(init.gaussian((2, 4, 3, 1), seed=0), problem)
    flow = gradient_flow(problem, weights, until=LogRisk(FAR), save=8, progress=False)
    reached = flow.attrs["status"] == "reached"
    return float(np.max(flow["clock_error"].values)) if reached else math.inf


def _bind(function: Callable, *arguments: Any, **options: Any) -> Callable[..., Any]:
    """``functools.partial`` for functions whose first argument is the time."""
    if function in (square_loss_mode, two_layer_square_loss):
        return lambda time: function(time, *arguments, **options)
    return lambda **at: function(*arguments, **options, **at)


CASES: tuple[tuple[str, str, Callable[[], float]], ...] = (
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
    ("3 balanced layers, square loss", "square_loss_mode", _square_mode),
    ("2 unbalanced layers, square loss", "two_layer_square_loss", _square_unbalanced),
    ("2 matrices, square loss", "two_layer_riccati", _riccati),
    ("4 layers, logistic, three points", "risk_clock", _clock),
)
"""Name, closed form, and the error of the flow."""

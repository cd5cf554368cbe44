r"""The ladder: how fast descent tends to the flow, and to the modified flows, as its step shrinks.

With $D_\eta$ the weights of descent at learning rate $\eta$ after the time $T$, $T/\eta$ steps, and
$F_m$ those of the flow of the modified equation of order $m$ (``gflow.ModifiedEquation``; order 0
is gradient flow itself),

$$\lVert D_\eta - F_m\rVert = O(\eta^{m + 1}), \qquad
\lVert 2 D_{\eta/2} - D_\eta - F_0\rVert = O(\eta^2).$$

The second is Richardson's extrapolation, which knows nothing of modified equations: a check.
"""

import math
import time as timer
from collections.abc import Sequence
from typing import TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.flow import gradient_flow
from gflow.dynamics.modified import ORDERS, ModifiedEquation
from gflow.dynamics.stops import Time
from gflow.problem import settings
from gflow.problem.arguments import numbers_of, positive
from gflow.problem.array import Array
from gflow.problem.deep_linear import end_to_end
from gflow.problem.dense import leaves_of
from gflow.problem.risk import Problem
from gflow.problem.weights import Weights
from gflow.record import versions

if TYPE_CHECKING:
    import xarray as xr

MODELS = ("flow", "modified flow", "second-order modified flow")
"""In the order of their modified equations: 0, 1, 2."""

WHOLE = 1e-9
"""The part of itself by which a number of steps may differ from a whole one."""

FLOOR = 10.0
"""A gap below so many times ``rtol``, relative to the weights, may be an error of the solver."""


@settings.own()
def ladder(
    problem: Problem,
    weights: Weights,
    learning_rates: Sequence[float] | np.ndarray,
    time: float,
    *,
    rtol: float = 1e-12,
) -> "xr.Dataset":
    r"""Measure the orders at which descent follows the flow and the two modified flows.

    Runs descent $W \leftarrow W - \eta\nabla R(W)$ at every learning rate and at half of it, the
    flow once, and both modified flows at every learning rate, in float64, from ``weights`` to one
    time. All learning rates share four compiled programs: descent and the three flows.

    Args:
        problem: data, network and loss.
        weights: the start, as for ``gradient_flow``.
        learning_rates: at least two different ones, each a whole part of ``time``. Orders are
            limits: the largest rate should be well below two over the largest curvature of $R$.
        time: the time $T$ of $\dot W = -\nabla R$ at which the runs are compared.
        rtol: relative tolerance of a step of the flows.

    Returns:
        A dataset over ``learning_rate``, ascending, and ``model``: "flow", "modified flow" and
        "second-order modified flow", with

        - ``gap``, $\lVert W_{\text{descent}} - W_{\text{model}}\rVert$ at $T$, over all layers;
        - ``direction_gap``, the distance of the directions $w/\lVert w\rVert$ there, for deep
          linear networks;
        - ``order`` a model, the slope of $\log$ gap against $\log\eta$ by least squares, which
          tends to 1, 2 and 3; ``local_order``, that between neighbouring rates;
        - ``richardson_gap``, $\lVert 2D_{\eta/2} - D_\eta - W_{\text{flow}}\rVert$, and
          ``richardson_order``, which tends to 2;
        - ``num_steps`` of descent.

        Gaps below ``attrs["floor"]`` may be errors of the solver and take no part in an order,
        which is NaN where less than two are left. ``attrs["status"]`` is "reached", or that of the
        first flow that ended early, and ``attrs["message"]`` explains; its gaps are NaN.

    Raises:
        ValueError: when an argument is malformed, a learning rate does not divide ``time``, or a
            modified equation does not lower the risk at the start.

    Warns:
        UserWarning: when $R(W(0)) > R(0)$.
    """
    began = timer.perf_counter()
    horizon = positive("time", time)
    steps = _whole_steps(learning_rates, horizon)
    rates = horizon / steps
    flows = _Flows(problem, weights, horizon, rtol)
    plain = flows.end(None)
    modified = [[flows.end(ModifiedEquation(rate, order)) for order in ORDERS] for rate in rates]
    with jax.enable_x64(True):
        start = problem.check(weights)
        # One after the other, since vmapped every rate takes the steps of the smallest: that costs
        # more than it saves, and either is little beside the flows (benchmarks/orders.py).
        runs = {int(n): descend(problem, start, horizon / n, n) for n in {*steps, *(2 * steps)}}
    descent = [jax.tree.map(np.asarray, runs[int(n)]) for n in steps]
    halved = [jax.tree.map(np.asarray, runs[2 * int(n)]) for n in steps]
    richardson = [
        _distance(jax.tree.map(lambda half, whole: 2 * half - whole, *pair), plain)
        for pair in zip(halved, descent, strict=True)
    ]
    pairs = [
        [(run, end) for end in (plain, *ends)] for run, ends in zip(descent, modified, strict=True)
    ]
    columns = {"gap": np.array([[_distance(*pair) for pair in row] for row in pairs])}
    if problem.network.layers(weights) is not None:
        columns["direction_gap"] = np.array([[_turn(*pair) for pair in row] for row in pairs])
    return _dataset(
        rates,
        steps,
        columns,
        np.array(richardson),
        {
            "time": horizon,
            "rtol": rtol,
            "floor": FLOOR * rtol * _distance(plain, jax.tree.map(np.zeros_like, plain)),
            **flows.facts,
            "loss": repr(problem.loss),
            "dataset": problem.data.name,
            **versions(),
            "wall_time": timer.perf_counter() - began,
        },
    )


class _Flows:
    """The flows from one start to one time, and the first reason why one ended early."""

    def __init__(self, problem: Problem, weights: Weights, horizon: float, rtol: float):
        self.problem, self.weights, self.horizon, self.rtol = problem, weights, horizon, rtol
        self.facts = {"status": "reached", "message": "every flow reached the time"}

    def end(self, modified: ModifiedEquation | None) -> Weights:
        """The weights at the end; NaN if the flow does not reach it."""
        try:
            record = gradient_flow(
                self.problem,
                self.weights,
                until=Time(self.horizon),
                save=2,
                progress=False,
                solver=diffrax.Dopri8(),
                modified=modified,
                rtol=self.rtol,
            )
        except ValueError as error:
            if modified is None:
                raise
            raise ValueError(f"`learning_rates` has {modified.step:.12g}: {error}") from error
        self.facts |= {key: record.attrs[key] for key in ("solver", "clock")}
        leaves, structure = jax.tree.flatten(self.weights)
        ends = leaves_of(record, "final", len(leaves))
        if record.attrs["status"] != "reached":
            if self.facts["status"] == "reached":
                which = "the flow" if modified is None else repr(modified)
                message = f"{which}: {record.attrs['message']}"
                self.facts |= {"status": record.attrs["status"], "message": message}
            ends = [np.full_like(leaf, np.nan) for leaf in ends]
        return jax.tree.unflatten(structure, ends)


@eqx.filter_jit
def descend(problem: Problem, weights: Weights, rate: Array, num_steps: Array) -> Weights:
    """The weights after so many steps of gradient descent on R."""

    def step(_: Array, now: Weights) -> Weights:
        log_risk, gradient = problem.log_risk_and_gradient(now)
        size = rate * jnp.exp(log_risk)
        return jax.tree.map(lambda leaf, slope: leaf - size * slope, now, gradient)

    return jax.lax.fori_loop(0, num_steps, step, jax.tree.map(jnp.asarray, weights))


def _distance(a: Weights, b: Weights) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return math.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in leaves))


def _turn(a: Weights, b: Weights) -> float:
    """The distance of two deep linear networks' directions."""
    with jax.enable_x64(True):
        one, other = (np.asarray(end_to_end(weights)) for weights in (a, b))
    return float(np.linalg.norm(one / np.linalg.norm(one) - other / np.linalg.norm(other)))


def _dataset(
    rates: np.ndarray,
    steps: np.ndarray,
    columns: dict[str, np.ndarray],
    richardson: np.ndarray,
    attrs: dict,
) -> "xr.Dataset":
    import xarray as xr

    meanings = {
        "gap": "|W_descent - W_model| at the time, all layers",
        "direction_gap": "distance of the directions w/|w| at the time",
    }
    floor, both = attrs["floor"], ("learning_rate", "model")
    gaps, logs = columns["gap"], np.log(rates)
    with np.errstate(divide="ignore"):
        local = np.diff(np.log(gaps), axis=0) / np.diff(logs)[:, None]
    local[(gaps[1:] <= floor) | (gaps[:-1] <= floor)] = np.nan
    data = {name: (both, values, meanings[name]) for name, values in columns.items()}
    data |= {
        "order": (
            ("model",),
            np.array([_slope(logs, column, floor) for column in gaps.T]),
            "slope of log gap against log learning rate, least squares",
        ),
        "local_order": (
            ("interval", "model"),
            local,
            "slope of log gap between neighbouring learning rates",
        ),
        "richardson_gap": (
            ("learning_rate",),
            richardson,
            "|2 W_descent(half the rate) - W_descent - W_flow|",
        ),
        "richardson_order": ((), _slope(logs, richardson, floor), "slope of log richardson_gap"),
        "num_steps": (("learning_rate",), steps, "steps of descent"),
    }
    coords = {
        "learning_rate": ("learning_rate", rates, {"long_name": "learning rate", "units": "1"}),
        "model": ("model", list(MODELS), {"long_name": "what descent is compared with"}),
        "interval": (
            "interval",
            np.sqrt(rates[1:] * rates[:-1]),
            {"long_name": "geometric mean of two neighbouring rates", "units": "1"},
        ),
    }
    found = {
        name: (dims, values, {"long_name": meaning, "units": "1"})
        for name, (dims, values, meaning) in data.items()
    }
    return xr.Dataset(found, coords=coords, attrs=attrs)


def _slope(logs: np.ndarray, gaps: np.ndarray, floor: float) -> float:
    """The least-squares slope of log gap over the gaps above the floor; NaN for less than two."""
    seen = np.isfinite(gaps) & (gaps > floor)
    if np.sum(seen) < 2:
        return math.nan
    x, y = logs[seen] - np.mean(logs[seen]), np.log(gaps[seen])
    return float(x @ y / (x @ x))


def _whole_steps(learning_rates: Sequence[float] | np.ndarray, horizon: float) -> np.ndarray:
    """The number of steps of each learning rate, ascending in the rate."""
    rates = np.array(
        [
            positive(f"learning_rates[{i}]", float(rate))
            for i, rate in enumerate(np.ravel(numbers_of("learning_rates", learning_rates)))
        ]
    )
    if len(rates) < 2 or len(np.unique(rates)) < len(rates):
        raise ValueError(
            f"`learning_rates` is {rates.tolist()}; expected at least two different ones, since "
            "an order is a slope over them."
        )
    steps = np.maximum(np.rint(horizon / rates), 1).astype(np.int64)
    for rate, count in zip(rates, steps, strict=True):
        if abs(rate * count / horizon - 1) > WHOLE:
            below = math.floor(horizon / rate)
            nearest = [horizon / n for n in (below + 1, below) if n > 0]
            raise ValueError(
                f"`learning_rates` has {rate:.12g}, of which `time` = {horizon:.12g} is "
                f"{horizon / rate:.6g} steps; expected a whole number of them. The nearest rates "
                f"that divide it are {' and '.join(f'{each:.12g}' for each in nearest)}."
            )
    return np.sort(steps)[::-1].copy()

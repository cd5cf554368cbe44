"""Reads the constants of the asymptotic laws off a problem and a start, or off a record."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gflow.analysis.laws import Conserved, Limits
from gflow.dynamics.split.geometry import Geometry
from gflow.dynamics.split.slow_manifold import SlowManifold
from gflow.dynamics.split.state import SplitState, split
from gflow.problem.data import Dataset
from gflow.problem.deep_linear import check_weights
from gflow.problem.dense import leaves_of
from gflow.problem.observables import imbalance
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr

    from gflow.problem.risk import Problem

FAR = -1e30
"""log R at which the limits of the frames are read; their error there is below round-off."""

HAND_OVER = -1e3
"""log R to which a start is integrated before it continues on the slow manifold."""

RTOL = 1e-10
r"""Of the way to ``FAR``: an $r_k$, a difference, loses the digits by which it is below $D_k$."""

LATE = 1e6
"""Points off the margin that keep their weight beyond this s are reported."""

FADED = 30.0
r"""A point whose margin exceeds the smallest by this has lost its weight, to $10^{-13}$."""

WEIGHTLESS = 1e-9
"""A support vector whose limiting weight is below this is reported."""

EPS = float(np.finfo(np.float64).eps)

ROUND_OFF = 64 * EPS
"""Entries of a conserved matrix below this, relative to the squared layers, count as zero."""


def limits(problem: "Problem", weights: Weights, *, late: Weights | None = None) -> Limits:
    r"""The asymptotic laws of the flow that starts at ``weights``, with their constants.

    With $s = -\log R$ and $\gamma$ the margin, among others

    $$\Bigl(1 - \frac{\lVert W_k\rVert_2}{\lVert W_k\rVert_F}\Bigr)s^{2/L} \to
    \frac{r_k\gamma^{2/L}}2, \qquad
    \Bigl\lVert\frac w{\lVert w\rVert} - \bar u\Bigr\rVert\,s \to \gamma\lVert b^*\rVert,$$

    the constants from the conserved matrices, the limits of the singular vectors and the support
    vectors; ``docs/asymptotics.md`` has all laws and their derivation.

    Args:
        problem: separable data, a deep linear network, a loss with an exponential tail.
        weights: the start, or any later point of the flow: the conserved matrices are read here.
        late: a later point of the same flow, where its margins exceed 40; it saves integrating
            there from ``weights``.

    Returns:
        The constants; its method ``predict(log_risk)`` evaluates the laws with their next order.

    Raises:
        ValueError: for another network or loss, for data that are not separable, and for a flow
            that does not reach risk zero.

    >>> import gflow
    >>> data = gflow.Dataset([[0.8, 0.5], [0.8, 0.5], [0.8, 0.5], [0.8, -0.5]], [1, 1, 1, 1])
    >>> problem = gflow.Problem(data, loss=gflow.Exponential())
    >>> law = limits(problem, (np.array([[3.0, 0.5]]),))
    >>> law.dual.round(12).tolist()  # three copies share one half
    [0.166666666667, 0.166666666667, 0.166666666667, 0.5]
    >>> bool(np.isclose(law.direction_error, 0.8 * np.log(3) / (2 * 0.5)))
    True
    """
    start = check_weights(weights)
    solver = SlowManifold(rtol=RTOL)
    late = start if late is None else check_weights(late)
    if solver.obstacle(problem, late) is not None:
        late = _integrate(problem, late)
    state = solver.start(problem, late, imbalance=_conserved(start))
    state = solver.advance(state, FAR)
    law = _read(state, start)
    settled = _settled_from(law, state.geometry)
    reasons = law.degenerate
    if settled > LATE:
        gaps = state.geometry.gaps
        reasons += (
            f"a point lies off the margin by a relative {gaps[gaps > 0].min():.2g} only: points "
            f"off the margin keep weight until s = {settled:.2g}, and the laws hold from there on",
        )
    return _with_onset(law, settled, reasons)


def limits_of_record(record: "xr.Dataset") -> Limits:
    """The same laws from what a record holds: its first and last weights, its support vectors.

    The last weights are float64, so that all but ``free`` are as good as their distance to the
    limit; see ``_free_from``.

    Raises:
        ValueError: when the record has no support vectors, or its last weights do not separate.
    """
    if "support_vectors" not in record:
        raise ValueError("the record has no support vectors")
    support = np.asarray(record["support_vectors"].values, dtype=np.float64)
    depth = record.sizes["layer"]
    first, last = (leaves_of(record, which, depth) for which in ("initial", "final"))
    row = np.ones(1)
    for matrix in reversed(last):
        row = row @ matrix
    if np.min(support @ row) < 1:
        raise ValueError("the last weights do not separate the data by an unnormalised margin of 1")
    data = Dataset(support, np.ones(len(support)), name="support vectors")
    # The risk only scales the variables that are read back.
    state = split(data, last, -1.0, -np.inf, _conserved(first))
    law = dataclasses.replace(
        _read(state, first),
        num_points=int(record.attrs["num_points"]),
        support=np.asarray(record["support"].values),
    )
    gap = float(record.attrs.get("next_margin_gap", np.inf))
    spans = law.direction_exponent == 1.0
    settled = FADED * max(1.0, gap ** (-1.0 if spans else -float(depth)))
    if depth > 1 and not spans:
        law = _free_from(record, law, state)
    return _with_onset(law, settled, law.degenerate)


def _free_from(record: "xr.Dataset", law: Limits, state: SplitState) -> Limits:
    r"""The law with $(W_1^\top u_1)_N$ from the saved point that knows it best.

    Out of float64 entries of size $\lVert w\rVert$ it has a relative error of about
    $\varepsilon\,\lVert w\rVert^{1/L}$, out of a finite time one of $\lVert w\rVert^{-3/L}$.
    """
    w = np.asarray(record["end_to_end"].values, dtype=np.float64)
    norm = np.linalg.norm(w, axis=1)
    level = np.maximum(norm, 1.0) ** (1 / law.depth)
    at = int(np.argmin(EPS * level + law.imbalance**1.5 * level**-3.0))
    free = state.input_basis[:, 1 + state.geometry.num_tangent :].T @ w[at]
    first = norm[at] ** (2 / law.depth) + law.spectral_shift[0]
    if not first > 0:  # long before the law
        return law
    free = free * np.sqrt(first) / norm[at] + law._free_turn / first
    constant = law.margin ** (1 / law.depth) * float(np.linalg.norm(free))
    return dataclasses.replace(law, free=free, direction_error=constant)


def _integrate(problem: "Problem", weights: Weights) -> Weights:
    """The flow's weights at ``HAND_OVER``."""
    from gflow.dynamics.flow import gradient_flow
    from gflow.dynamics.stops import LogRisk

    record = gradient_flow(
        problem, weights, until=LogRisk(HAND_OVER), save=2, rtol=1e-11, progress=False
    )
    if record.attrs["status"] != "reached":
        raise ValueError(f"The flow has no limits of this kind: {record.attrs['message']}.")
    return tuple(leaves_of(record, "final", len(weights)))


def _conserved(start: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(map(np.asarray, imbalance(tuple(start))))


def _read(state: SplitState, start: Sequence[np.ndarray]) -> Limits:
    """The constants, from a state far out and the start's conserved matrices."""
    geometry, layers, depth = state.geometry, state.layers, state.layout.depth
    matrices = _conserved(start)
    squares = [float(np.sum(matrix**2)) for matrix in start]
    views = state.layout.views(state.slow)
    gamma = geometry.margin
    rounding = np.array([ROUND_OFF * (a + b) for a, b in pairwise(squares)])
    pushing = [layer.below for layer in layers]
    if depth > 1:
        pushing[0] = views["below", 1] * state.minus_log_risk ** (-1 / depth)
    directions, drift, lean = [], np.zeros(state.layout.widths[1]), np.zeros(depth - 1)
    for k in range(1, depth):
        basis, layer, above = views["frame", k], layers[k - 1], layers[k]
        # The frame turns by half the angle that is left (e_k is the right vector of layer k + 1).
        u = basis[:, 0] + basis[:, 1:] @ pushing[k - 1] / (2 * layer.sigma)
        directions.append(u / np.linalg.norm(u))
        if k == 1:
            drift = basis[:, 1:] @ (layer.below - pushing[0]) * layer.sigma / 2
        n = basis[:, 1:].T @ (matrices[k - 1] @ directions[-1])
        if np.linalg.norm(n) > 0:
            n /= np.linalg.norm(n)
            lean[k - 1] = (np.sum((layer.rest.T @ n) ** 2) + np.sum((above.rest @ n) ** 2)) / 2
    conserved = Conserved(matrices, rounding, lean)
    shift, rank_one, turn = conserved.laws(directions)
    points = geometry.across[geometry.support, : geometry.num_tangent]
    tangent, dual = _soft_minimiser(points)
    free = state.across[geometry.num_tangent :]
    pull, free_turn, rest = np.zeros(geometry.num_tangent), np.zeros_like(free), 1.0
    if depth > 1:
        sigma = layers[0].sigma
        moved = sigma * views["rest", 1].T @ pushing[0]
        pull, free_turn = np.split(moved, [geometry.num_tangent])
        free_turn = free_turn / 2
        free = free / np.prod([layer.sigma for layer in layers[1:]]) + free_turn / sigma**2
        rest = float(np.linalg.norm(views["rest", 1]))
    spans = float(np.linalg.norm(free)) <= 1e-14 * rest
    if depth == 1:
        size = float(np.hypot(np.linalg.norm(tangent), np.linalg.norm(free)))
        constant, exponent = gamma * size, 1.0
    elif spans:
        constant, exponent = gamma * float(np.linalg.norm(tangent)), 1.0
    else:
        constant, exponent = gamma ** (1 / depth) * float(np.linalg.norm(free)), 1 / depth
    return Limits(
        margin=gamma,
        depth=depth,
        num_points=geometry.num_points,
        directions=tuple(directions),
        rank_one=rank_one,
        rank_one_gap=rank_one * gamma ** (2 / depth) / 2,
        misalignment=turn**2 * gamma ** (4 / depth) / 2,
        direction_error=constant,
        direction_exponent=exponent,
        spectral_shift=shift,
        tangent=tangent,
        free=free,
        support=geometry.support,
        dual=dual,
        imbalance=max((float(np.linalg.norm(matrix, 2)) for matrix in matrices), default=0.0),
        settled_from=0.0,
        degenerate=_weightless(geometry.support, dual),
        _points=points,
        _conserved=conserved,
        _drift=drift,
        _pull=pull,
        _free_turn=free_turn,
    )


def _soft_minimiser(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""$b^*$ and the limiting weights $p^*$ of the support vectors."""
    b = np.zeros(points.shape[1])
    weights = np.full(len(points), 1 / len(points))
    for _ in range(200 if len(b) else 0):
        bracket = points @ b
        weights = np.exp(bracket.min() - bracket)
        weights /= weights.sum()
        mean = weights @ points
        centred = points - mean
        change = np.linalg.lstsq((centred.T * weights) @ centred, mean, rcond=1e-13)[0]
        largest = float(np.max(np.abs(points @ change)))
        b = b + change * min(1.0, 2 / max(largest, 1e-300))
        if largest < 1e-14:
            break
    return b, weights


def _weightless(support: np.ndarray, dual: np.ndarray) -> tuple[str, ...]:
    idle = support[dual < WEIGHTLESS]
    if len(idle) == 0:
        return ()
    return (
        f"points {idle.tolist()} lie on the margin but carry no weight: w keeps moving across "
        "the margin's direction like log s, and the direction law is off by that logarithm",
    )


def _with_onset(law: Limits, settled: float, reasons: tuple[str, ...]) -> Limits:
    """The law with the s from which it holds, and why that is late if it is."""
    if law.relaxed_from > LATE and not _weightless(law.support, law.dual):
        reasons += (
            "the support vectors nearly lie in a space of fewer dimensions, with a least variance "
            f"of {law.least_variance:.2g}: w turns to its limit from s = {law.relaxed_from:.2g} on "
            "only",
        )
    settled = max(settled, law.relaxed_from)
    return dataclasses.replace(law, settled_from=settled, degenerate=reasons)


def _settled_from(law: Limits, geometry: Geometry) -> float:
    r"""The s beyond which every margin off the support exceeds the least one by ``FADED``.

    By the laws themselves: $q_i - m = m\,\delta_i + \langle w_T + w_N, z_i\rangle$, on a grid of
    ten points a decade. Where the laws have no value yet, nothing has settled.
    """
    off = np.flatnonzero(geometry.gaps > 0)
    tangent = geometry.across[off, : geometry.num_tangent]
    beyond = geometry.across[off, geometry.num_tangent :]
    settled = 1.0
    for s in np.geomspace(1.0, -FAR, 301):
        w = law.product(-s)
        bracket = tangent @ w.tangent + beyond @ w.outside[: beyond.shape[1]]
        ahead = w.along * geometry.gaps[off] + bracket - w.lowest
        if not np.all(ahead >= FADED):
            settled = float(s) * 10**0.1
    return settled

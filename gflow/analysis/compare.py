r"""Descent beside the flow: the gaps between two records at equal time or equal risk.

The saved points of the second record are kept as they are; the first, the smooth one, is read at
their times (or risks). In $x = \log(1 + t)$, or $x = \operatorname{arsinh}(-\log R)$, the flow is
smooth, so it is interpolated there by the polynomial of degree 5 through the six nearest saved
points; its distance from the one of degree 3 through the inner four is the error estimate. At a
saved point of the flow nothing is interpolated: let the flow save where descent did, and what is
left of the error is the flow's own.
"""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from gflow.problem import settings
from gflow.problem.logarithms import log_expm1
from gflow.quantities import QUANTITIES, Kind, quantity

if TYPE_CHECKING:
    import xarray as xr

HIGH, LOW = 6, 4
"""Points that the interpolant passes through, and those of its control."""

COINCIDENT = 1e-9
"""Saved points closer than this in $x$ (relative beyond one) are one point."""

RANGE_SLACK = 1e-8
"""How far beyond the first record's ends a point may lie in $x$: the error of a flow's clock."""

COORDINATES = {
    "time": ("log_time", "log t, equal for both"),
    "log_risk": ("log_risk", "log R, equal for both"),
}


@settings.own()
def compare(
    flow: "xr.Dataset",
    descent: "xr.Dataset",
    *,
    at: Literal["time", "log_risk"] = "time",
    thresholds: Mapping[str, float] | None = None,
) -> "xr.Dataset":
    r"""The gaps between descent and flow at equal time, or at equal risk.

    Every gap is descent minus flow, or the norm of that difference. To compare without
    interpolation let the flow save where descent did::

        times = descent.log_time.values[1:]
        flow = gflow.gradient_flow(problem, weights, until=gflow.LogTime(times[-1]), save=times)
        gaps = gflow.compare(flow, descent)

    Args:
        flow: the record that is read between its saved points: a flow, or any record whose time
            (or risk) is monotone and smooth. It should have many points.
        descent: the record whose saved points are kept. It may be another flow.
        at: "time", where descent's time is the sum of its step sizes, or "log_risk".
        thresholds: for a gap's name the size to watch for. The result then has
            ``NAME_first_above``: the coordinate (``log_time`` or ``log_risk``) of the first point
            where the gap, in absolute value and in any layer, exceeds it; NaN if none does.

    Returns:
        A dataset over those points of ``descent`` that ``flow`` reaches, with coordinate
        ``log_time`` or ``log_risk``, and

        - ``end_to_end_gap`` $\lVert w_d - w_f\rVert$, ``relative_gap``, the same over
          $\lVert w_f\rVert$, ``direction_gap``, the distance of the unit vectors;
        - ``log_risk_gap`` (at equal time) or ``log_time_gap`` (at equal risk);
        - ``margin_gap``, the difference of the normalised margins (a record's own ``margin_gap``
          is something else: the distance of one margin to the maximum);
        - ``misalignment_gap`` a pair, ``frobenius_norm_gap`` and ``spectral_norm_gap`` a layer;
        - ``weights_gap`` a layer, $\lVert W_k^d - W_k^f\rVert_F$, if both records keep weights;

        and for each ``X_gap`` the flow's error bar, ``X_gap_error``: the estimated error of
        interpolating it plus its own, which is that of its certificate if it has one
        (``gradient_flow(..., certify=True)``), else ``attrs["flow_error"]`` (see `own_error`) times
        the size of the quantity; ``attrs["error_bars"]`` says which, "certificate" or "tolerance".
        A gap below its bar says nothing of descent. A variable that either record lacks is left
        out. ``attrs["points_left_out"]`` counts descent's points beyond the flow's reach.

    Raises:
        ValueError: when the records do not belong together, do not overlap, or an argument is
            malformed.

    Warns:
        UserWarning: when the records start from different weights or differ in data or loss.
    """
    import xarray as xr

    if at not in COORDINATES:
        raise ValueError(f"`at` is {at!r}; expected 'time' or 'log_risk'.")
    for name, record in (("flow", flow), ("descent", descent)):
        if getattr(getattr(record, "log_risk", None), "dims", None) != ("point",):
            raise ValueError(
                f"`{name}` is a {type(record).__name__} without saved points of `log_risk`; "
                "expected a gflow record."
            )
    _check_same(flow, descent)
    coordinate, meaning = COORDINATES[at]
    nodes, queries = _clock(flow, at), _clock(descent, at)
    reading = _Reading(nodes, queries, _range_text(flow, descent, coordinate))
    accuracy = own_error(flow)
    gaps = _gaps(flow, descent, reading, at, accuracy)
    kept = descent.isel(point=reading.inside)
    data: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    for name, (dims, gap, error, text) in gaps.items():
        data[f"{name}_gap"] = (dims, gap, {"long_name": text, "units": "1"})
        data[f"{name}_gap_error"] = (
            dims,
            error,
            {"long_name": f"estimated error of the first record in {name}_gap", "units": "1"},
        )
    result = xr.Dataset(data)
    result = result.assign_coords(
        {coordinate: ("point", kept[coordinate].values, {"long_name": meaning, "units": "1"})}
    )
    numbers = {dim: kept[dim] for dim in ("point", "layer", "pair") if dim in kept.coords}
    result = result.assign_coords({k: v for k, v in numbers.items() if k in result.dims})
    if "num_steps" in kept:
        result["num_steps"] = kept["num_steps"]
    for name, size in (thresholds or {}).items():
        result[f"{name}_first_above"] = _first_above(result, name, size, coordinate)
    result.attrs = {
        "at": at,
        "sign": "second record minus first",
        "first": flow.attrs.get("kind", "unknown"),
        "second": descent.attrs.get("kind", "unknown"),
        "flow_error": accuracy,
        "error_bars": "certificate" if "end_to_end_error" in flow else "tolerance",
        "points_left_out": int(np.sum(~reading.inside)),
    }
    return result


def own_error(flow: "xr.Dataset") -> float:
    r"""The relative error of a flow, as its record tells it; zero for a record that has none.

    The greater of its tolerance ``rtol`` and its ``clock_error``, $|-\log R - s|/|\log R|$, which
    is an error that was made. Observables at saved points are right to a few hundredths of the
    tolerance, so that this is a cautious estimate.
    """
    seen = [float(flow.attrs.get("rtol", 0.0))]
    if "clock_error" in flow:
        seen += [float(e) for e in flow["clock_error"].values if math.isfinite(e)]
    return max(seen)


class _Reading:
    """How to read the first record at the second one's points: windows and weights."""

    def __init__(self, nodes: np.ndarray, queries: np.ndarray, ranges: str):
        self.kept = _separate(nodes)
        x = nodes[self.kept]
        if len(x) == 0:
            raise ValueError(f"`flow` has no point with a finite coordinate; {ranges}.")
        slack = RANGE_SLACK * max(1.0, abs(x[-1]))
        with np.errstate(invalid="ignore"):
            self.inside = (queries >= x[0] - slack) & (queries <= x[-1] + slack)
        if not np.any(self.inside):
            raise ValueError(
                f"`flow` and `descent` do not overlap: {ranges}. Run the flow with "
                "`until=gflow.LogTime(descent.log_time[-1])` or to descent's log R."
            )
        at = np.clip(queries[self.inside], x[0], x[-1])
        self.exact = np.isin(at, x)
        self.high = _lagrange(x, at, HIGH)
        self.low = _lagrange(x, at, LOW)

    def read(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The interpolant and its control, shape (queries, …), of values a saved point."""
        values = values[self.kept]
        plain = _apply(self.high, values), _apply(self.low, values)
        known = values[~np.isnan(values)]
        positive = len(known) > 0 and bool(np.all((known > 0) & (known < np.inf)))
        if not positive or known.max() <= 100 * known.min():
            return plain
        # Quantities that fall by orders of magnitude are smooth in their logarithm.
        exact = self.exact.reshape(-1, *[1] * (values.ndim - 1))
        high, low = (np.exp(_apply(rule, np.log(values))) for rule in (self.high, self.low))
        return np.where(exact, plain[0], high), np.where(exact, plain[1], low)

    def widest(self, values: np.ndarray) -> np.ndarray:
        """The largest of the values at the points next to each query."""
        return np.max(values[self.kept][self.low[0]], axis=1)


def _gaps(
    flow: "xr.Dataset", descent: "xr.Dataset", reading: _Reading, at: str, accuracy: float
) -> dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray, str]]:
    found: dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray, str]] = {}

    def both(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        if name not in flow or name not in descent or flow[name].dims != descent[name].dims:
            return None
        if flow[name].shape[1:] != descent[name].shape[1:]:
            return None
        values = np.asarray(descent[name].values, dtype=np.float64)[reading.inside]
        nodes = np.asarray(flow[name].values, dtype=np.float64)
        if name == "log_time":  # minus infinity at the start, where log(1 + t) is smooth
            high, low = reading.read(np.logaddexp(0.0, nodes))
            return values, log_expm1(np.maximum(high, 0.0)), log_expm1(np.maximum(low, 0.0))
        return values, *reading.read(nodes)

    def own(name: str, size: np.ndarray) -> np.ndarray:
        """The flow's own error, by its certificate or as far as that goes."""
        usual = accuracy * size
        if f"{name}_error" not in flow:
            return usual
        proved = reading.widest(np.asarray(flow[f"{name}_error"].values, dtype=np.float64))
        if quantity(name).kind is Kind.VECTOR:
            proved = _norm(proved)
        return np.where(np.isnan(proved), usual, proved)

    if (vectors := both("end_to_end")) is not None:
        values, high, low = (each.reshape(len(each), -1) for each in vectors)
        size = _norm(high)
        own_part = own("end_to_end", size)
        gap, error = _norm(values - high), _norm(high - low) + own_part
        text = "|w - w_flow|"
        found["end_to_end"] = (("point",), gap, error, text)
        found["relative"] = (("point",), gap / size, error / size, f"{text} / |w_flow|")
        unit, exact, control = (v / _norm(v)[:, None] for v in (values, high, low))
        found["direction"] = (
            ("point",),
            _norm(unit - exact),
            _norm(exact - control) + own_part / size,
            "distance of the directions w/|w|",
        )
    for name, row in QUANTITIES.items():
        if not row.compared or name == COORDINATES[at][0]:
            continue
        if (triple := both(name)) is not None:
            values, high, low = triple
            dims = tuple(str(dim) for dim in descent[name].dims)
            with np.errstate(invalid="ignore"):
                # Both start at log t = -inf.
                gap = np.where(values == high, 0.0, values - high)
                error = np.where(high == low, 0.0, np.abs(high - low))
                error = error + own(name, np.where(np.isinf(high), 0.0, np.abs(high)))
            found[name] = (dims, gap, error, f"{row.meaning}: second record minus first")
    layers = [both(f"weights_{k}") for k in range(1, flow.sizes.get("layer", 0) + 1)]
    if layers and all(layer is not None for layer in layers):
        triples = [layer for layer in layers if layer is not None]
        found["weights"] = (
            ("point", "layer"),
            np.stack([_norm(values - high) for values, high, _ in triples], axis=1),
            np.stack(
                [_norm(high - low) + accuracy * _norm(high) for _, high, low in triples], axis=1
            ),
            "|W_k - W_k of the flow|_F",
        )
    return found


def _check_same(flow: "xr.Dataset", descent: "xr.Dataset") -> None:
    if flow.sizes.get("coordinate") != descent.sizes.get("coordinate"):
        raise ValueError(
            f"`flow` has inputs of dimension {flow.sizes.get('coordinate')}, `descent` of "
            f"{descent.sizes.get('coordinate')}; expected two records of one problem."
        )
    names = {"dataset": "data", "num_points": "number of points", "loss": "loss"}
    names["start_sha256"] = "initial weights"
    differing = [
        text
        for key, text in names.items()
        if key in flow.attrs and key in descent.attrs and flow.attrs[key] != descent.attrs[key]
    ]
    if differing:
        warnings.warn(
            f"the two records differ in {', '.join(differing)}, so that their gaps are not "
            "those of discretisation alone.",
            UserWarning,
            stacklevel=4,
        )


def _clock(record: "xr.Dataset", at: str) -> np.ndarray:
    """The coordinate x in which a record is smooth, per saved point; finite at the start."""
    if at == "time":
        return np.logaddexp(0.0, np.asarray(record["log_time"].values, dtype=np.float64))
    return np.arcsinh(-np.asarray(record["log_risk"].values, dtype=np.float64))


def _separate(x: np.ndarray) -> np.ndarray:
    """The points that advance in x by more than rounding, as a mask."""
    kept = np.zeros(len(x), dtype=bool)
    last = -math.inf
    for index, value in enumerate(x):
        if math.isfinite(value) and value > last + COINCIDENT * max(1.0, abs(value)):
            kept[index], last = True, value
    return kept


def _lagrange(x: np.ndarray, at: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, each (queries, points), of local polynomial interpolation."""
    points = min(points, max(1, len(x) - (HIGH - points) // 2))
    right = np.searchsorted(x, at)
    first = np.clip(right - points // 2, 0, len(x) - points)
    indices = first[:, None] + np.arange(points)
    window = x[indices]
    weights = np.ones_like(window)
    for i in range(points):
        for j in range(points):
            if i != j:
                weights[:, i] *= (at - window[:, j]) / (window[:, i] - window[:, j])
    return indices, weights


def _apply(rule: tuple[np.ndarray, np.ndarray], values: np.ndarray) -> np.ndarray:
    indices, weights = rule
    window = values[indices]
    weights = weights.reshape(weights.shape + (1,) * (window.ndim - 2))
    # A weight of zero takes no part, whatever it multiplies: -inf at the start, undefined vectors.
    with np.errstate(invalid="ignore"):
        return np.sum(np.where(weights == 0, 0.0, weights * window), axis=1)


def _norm(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(values.reshape(len(values), -1) ** 2, axis=1))


def _first_above(result: "xr.Dataset", name: str, size: float, coordinate: str) -> "xr.DataArray":
    import xarray as xr

    known = [str(key) for key in result.data_vars if str(key).endswith("_gap")]
    if name not in known:
        raise ValueError(f"`thresholds` names {name!r}; expected one of {', '.join(known)}.")
    if not size > 0:
        raise ValueError(f"`thresholds[{name!r}]` is {size}; expected a positive number.")
    sizes = np.abs(result[name].values).reshape(result.sizes["point"], -1)
    above = np.nonzero(np.any(sizes > size, axis=1))[0]
    value = float(result[coordinate].values[above[0]]) if len(above) else math.nan
    return xr.DataArray(
        value,
        attrs={"long_name": f"{coordinate} where |{name}| first exceeds {size:g}", "units": "1"},
    )


def _range_text(flow: "xr.Dataset", descent: "xr.Dataset", coordinate: str) -> str:
    def ends(record: "xr.Dataset") -> str:
        values = record[coordinate].values
        return f"{float(values[0]):.6g} to {float(values[-1]):.6g}"

    return f"{coordinate} goes from {ends(flow)} in `flow` and from {ends(descent)} in `descent`"

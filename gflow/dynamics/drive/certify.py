r"""The certificate of a flow: how exact its record is, and how it knows.

What any run proves about itself. The conserved matrices (``imbalance_drift``). The energy identity
$R(0) - R(t) = \int\lVert\nabla R\rVert^2dt$, in the log domain
$\log R(0) - \log R = \int\mu\lVert g\rVert^2 ds$ (``clock_error``): in a risk clock
$\mu\lVert g\rVert^2$ is the derivative of $-\log R$ as the clock has it, so that the identity's
defect *is* the clock's error. In a time clock it comes free with $u = tR$: with
$E = \int\mu\lVert g\rVert^2ds$ the equation of $u$ has the solution

$$u(s) = \int_0^s \frac{dt}{ds'}\,R(s')\,e^{E(s') - E(s)}\,ds',$$

which is $t\,R$ for every $s$ if and only if $R\,e^{E}$ is constant; so the error of
$\log u - \log R$ against the clock's own $\log t$ is the defect of the identity, averaged over the
past in time. Then Lemma 2 with its slacks, and what float64 leaves of the margins.

What a second run proves. The error estimate of each observable is 2.5 times its difference from a
run with a tolerance ten times smaller that steps onto the same points, never with the same steps.
The errors of the two are then about in the ratio of the tolerances, so that the difference is about
the error of the first. A looser second run, though cheaper, measures its own error, which is not
the first one's by any constant factor (``benchmarks/certificate.py``).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gflow.dynamics.drive.recorder import Recorder
from gflow.problem.class_observables import class_slacks
from gflow.problem.observables import lemma_slacks
from gflow.quantities import Kind, of_kind, quantity
from gflow.record import CERTIFIED

if TYPE_CHECKING:
    from gflow.dynamics.drive.flow_run import FlowRun

TIGHTER = 10.0
"""Tolerance of the run over that of the second one."""

TIGHTEST = 1e-12
"""A run of a smaller tolerance is compared with a looser one: a tighter one would meet round-off.
The estimate is then the other's error, and larger than that of the run."""

FEW_STEPS, SHORTER = 10, 1.3
"""Between saved points joined by so many steps or fewer it may be the saved points, or what Newton
bears, that shorten the steps, whatever the tolerance. There the second run takes steps
shorter by the second number: at the solvers' orders that is worth the factor of the tolerances."""

SAFETY = 2.5
"""An estimate is the difference of the two runs times this: the second run's own error may take
from it, and at one point of many two runs are closer than either is to the truth."""

NEIGHBOURS = 2
"""Saved points on either side whose relative error a point may have: an error that changes its sign
vanishes at one point by chance, and so does the difference of two."""

NOISE = 1e-12
"""Relative error that rounding and the solvers' own iterations leave at any tolerance, unseen by
two runs that happen to agree."""

ANGLE = 4e-16
"""The same of an angle between float64 vectors, absolute; split coordinates hold it relatively."""

LEMMA = ("frobenius_norm", "spectral_norm", "rank_one_gap", "misalignment")
"""What Lemma 2 speaks of."""

EPSILON = float(np.finfo(np.float64).eps)


def second_tolerance(rtol: float) -> float:
    """The tolerance of the second run."""
    return rtol / TIGHTER if rtol >= TIGHTEST else rtol * TIGHTER


def shorter(steps: int) -> int:
    """How many pieces the second run makes of a way that took so many steps."""
    return math.ceil(SHORTER * steps) if steps <= FEW_STEPS else 1


def certificate(run: "FlowRun", other: "FlowRun") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Error estimates from a second run, and what the record says of it.

    Args:
        run: to certify, at its end.
        other: the second run over the same points, at its end.
    """
    points, again, end = run.recorder.columns(), other.recorder, other.end
    assert end is not None
    rtol = float(other.plan.tolerance.rtol)
    told = f"a second run at rtol = {rtol:.3g}"
    if end.status != "reached":
        done, all_points = again.num_points - 1, run.recorder.num_points - 1
        told += f", which ended at saved point {done} of {all_points}: {end.message}"
    facts = {
        "certificate": told,
        "certificate_rtol": rtol,
        "certificate_num_steps": other.num_steps,
        "certificate_wall_time": again.seconds(),
    }
    recorder = run.recorder
    degree = recorder.problem.network.degree(recorder.start)
    names = tuple(recorder.extra)
    return error_estimates(points, again.columns(recorder.num_points), names, degree), facts


def evidence(recorder: Recorder, *, conserved: bool) -> dict[str, np.ndarray]:
    """The variables of the certificate that need no second run.

    Args:
        recorder: that of the run.
        conserved: whether the flow conserves the imbalance, as gradient flow does.
    """
    start = recorder.start
    offers = recorder.problem.data.offers
    several, lemma = "classes" in offers, ()
    if recorder.layers is not None and "margins" in offers:
        lemma = ("singular_values",) if several else LEMMA
    needed = ("log_risk", "beyond_hand_over", *lemma)
    column = {name: recorder.column(name) for name in needed}
    lost = EPSILON * np.maximum(1.0, -column["log_risk"])
    apart = column["beyond_hand_over"].astype(bool)
    found = {"digits_left": -np.log10(np.where(apart, EPSILON, lost))}
    if not (conserved and lemma):
        return found
    if several:
        rank, values = class_slacks(start, column["singular_values"])
        return found | {"rank_slack": rank, "spectrum_slack": values}
    along = (column[name] for name in LEMMA)
    rank_one, alignment = lemma_slacks(start, *along, spectral_at_start=column["spectral_norm"][0])
    return found | {"rank_one_slack": rank_one, "alignment_slack": alignment}


def error_estimates(
    points: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    names: Sequence[str] = (),
    degree: float | None = None,
) -> dict[str, np.ndarray]:
    """The absolute error of each observable at each saved point, as ``NAME_error``.

    Args:
        points: the observables of the run, by name, with the points on a leading axis.
        others: those of the second run at the same points, fewer where it ended early: NaN there.
        names: further observables that the caller added.
        degree: of homogeneity of the margins, if they have one.
    """
    found, noise = {}, _round_off(points, degree)
    for name in (*CERTIFIED, *names):
        if name not in points:
            continue
        value = points[name].astype(np.float64)
        other = np.full_like(value, np.nan)
        other[: len(others[name])] = others[name]
        error = _error(name, value, other) + noise.get(name, 0.0)
        error[0] = 0.0  # the start is given
        found[f"{name}_error"] = error
    return found


def _error(name: str, value: np.ndarray, other: np.ndarray) -> np.ndarray:
    known = np.isfinite(value) & np.isfinite(other)
    size = _widest(quantity(name).size(np.where(known, value, 0.0)), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(known & (size > 0), SAFETY * np.abs(value - other) / size, 0.0)
    error = np.maximum(_widest(relative, NEIGHBOURS), NOISE) * size
    return np.where(known, error, np.where(value == other, 0.0, np.nan))  # log t starts at -inf


def _round_off(points: Mapping[str, np.ndarray], degree: float | None) -> dict[str, np.ndarray]:
    r"""Round-off, absolute, of the observables that are small differences of large numbers.

    Angles are known to ``ANGLE``, halves of their squares accordingly. Margins of size s are known
    to $10^{-16}s$, and so, relatively, are the softmax weights $\lambda_i$ and with them the KKT
    slackness. The KKT residual sets the direction of $\nabla R$ against that of $W$, times
    $\lVert\tilde W\rVert$: of one layer it is no more than the difference of two weighted means,
    about $\lVert\tilde W\rVert$ times the direction error; where more layers make it larger, what
    they add is orthogonal to that part and does not see its round-off.
    """

    def column(name: str) -> np.ndarray:
        return np.nan_to_num(points[name])

    far = column("beyond_hand_over").astype(bool)
    angle = np.where(far, 0.0, ANGLE)
    found = {}
    for name in points.keys() & set(of_kind(Kind.ANGLE, Kind.ANGLE_SQUARED)):
        value = column(name)
        lost_angle = _each(angle, value)
        if quantity(name).kind is Kind.ANGLE_SQUARED:  # (a + e)^2/2 - a^2/2
            found[name] = np.sqrt(2 * value) * lost_angle + lost_angle**2 / 2
        else:
            found[name] = lost_angle
    if degree is None or "kkt_residual" not in points:
        return found
    lost = np.where(far, ANGLE, EPSILON * np.maximum(1.0, -column("log_risk")))
    if "direction_error" in points:
        norm = np.linalg.norm(column("frobenius_norm"), axis=1)
        smallest = column("margin") * np.linalg.norm(column("end_to_end"), axis=1)
    else:
        norm, smallest = column("norm"), column("min_margin")
    smallest = np.where(smallest > 0, smallest, np.inf)  # before the data are separated
    size, seen = norm / smallest ** (1 / degree), 1.0
    if "direction_error" in points:
        residual = column("kkt_residual")
        turned = size * column("direction_error") / np.where(residual > 0, residual, np.inf)
        seen = np.minimum(1.0, turned)
    found["kkt_residual"] = lost * size * seen
    found["kkt_slackness"] = lost * column("kkt_slackness")
    return found


def _each(angle: np.ndarray, value: np.ndarray) -> np.ndarray:
    """An angle a point beside several values a point."""
    return np.broadcast_to(angle.reshape(-1, *[1] * (value.ndim - 1)), value.shape)


def _widest(values: np.ndarray, reach: int) -> np.ndarray:
    """The largest of each value and of so many neighbours on either side, along the first axis."""
    padded = np.pad(values, [(reach, reach), *[(0, 0)] * (values.ndim - 1)])
    return np.max([padded[i : i + len(values)] for i in range(2 * reach + 1)], axis=0)

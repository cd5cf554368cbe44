"""Anything goes in: each flow ends right by its own certificate, or with an error that names why.

The programs (shape, loss, clock, rules) are drawn from a short list, so that they compile once;
everything else is free: data in all positions, starts of all sizes, tolerances, horizons, budgets.
Few examples run by default, the same ones each time. For many others set how many:

    GFLOW_FUZZ=2000 python -m pytest -n1 -x tests/test_fuzz.py
"""

import os
import warnings
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

import gflow
from gflow.record import CERTIFIED

MANY = int(os.environ.get("GFLOW_FUZZ", "0"))

STATUSES = {"reached", "max_steps", "stalled", "precision_lost"}

LOOSE = 1e5
"""Errors over a whole run may be so many times the tolerance of one step: a layer of zeros beside
large ones is held to their tolerance."""


ALWAYS = (
    "risk decreases",
    "margin below its bound",
    "imbalance is conserved",
    "Lemma 2: rank one",
    "Lemma 2: alignment",
    "smoothed margin grows",
)
"""What holds at every time of every flow, so that no record may speak against it."""


class Program(NamedTuple):
    """What a compiled program depends on."""

    widths: tuple[int, ...]
    num_points: int
    loss: Any
    clock: Any
    rule: Any


FEW = [
    Program((2, 3, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((3, 2, 1, 1), 4, gflow.Logistic(), gflow.clocks.LogTime(), gflow.LogTime),
]
MORE = [
    Program((3, 2, 2, 1), 4, gflow.Logistic(), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((2, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((2, 3, 1), 5, gflow.Exponential(), gflow.clocks.LogTime(), gflow.LogTime),
    Program((2, 3, 1), 5, gflow.Exponential(), gflow.clocks.Risk(), gflow.LogRisk),
    Program((2, 3, 1), 5, gflow.Logistic(), gflow.clocks.Time(), gflow.Time),
    Program((6, 4, 1), 3, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((2, 3, 1), 5, gflow.PolynomialTail(2.0), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((1, 1, 1), 2, gflow.Logistic(), gflow.clocks.LogRisk(), gflow.LogRisk),
    Program((2, 3, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.Steps),
    Program((2, 3, 3, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.Misalignment),
    Program((2, 3, 1), 5, gflow.Logistic(), gflow.clocks.LogRisk(), gflow.MarginGap),
    Program((2, 3, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.KKT),
    Program((2, *[2] * 7, 1), 5, gflow.Exponential(), gflow.clocks.LogRisk(), gflow.LogRisk),
]


def powers(low: float, high: float):
    """Numbers even in their logarithm."""
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


GOALS = {
    gflow.LogRisk: powers(-1, 9).map(lambda size: -size),
    gflow.LogTime: st.floats(-5, 300),
    gflow.Time: powers(-3, 3),
    gflow.Steps: st.integers(1, 300),
    gflow.Misalignment: powers(-12, -0.1),
    gflow.MarginGap: powers(-9, 0),
    gflow.KKT: powers(-6, 0),
}

DATA = ("separable", "one class", "duplicates", "collinear", "any")
STARTS = ("gaussian", "orthogonal", "zero_first", "balanced")


@st.composite
def recipes(draw):
    """A flow as plain numbers and names."""
    program = draw(st.sampled_from([*FEW, *MORE] if MANY else FEW))
    depth = len(program.widths) - 1
    options = {
        "clock": program.clock,
        "rtol": draw(powers(-13, -3)),
        "save": draw(st.integers(2, 8)),
        "max_steps": draw(st.sampled_from([1, 30, 2000])),
        "certify": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["atol"] = draw(powers(-16, -4))
    return {
        "program": program,
        "goal": draw(GOALS[program.rule]),
        "options": options,
        "seed": draw(st.integers(0, 10**6)),
        "data": draw(st.sampled_from(DATA)),
        "margin": draw(powers(-8, -0.7)),
        "data_scale": draw(powers(-3, 3)),
        "start": draw(st.sampled_from(STARTS)),
        "scale": draw(powers(-12, 1)),
        "scales": draw(st.none() | st.lists(powers(-8, 8), min_size=depth, max_size=depth)),
        "admissible": draw(st.booleans()),
    }


def dataset(recipe) -> gflow.Dataset:
    """Separable or not, of one class or two, of any size, with duplicates or in one line."""
    program, seed, kind = recipe["program"], recipe["seed"], recipe["data"]
    n, d = program.num_points, program.widths[0]
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1.0, 1.0], n)
    if kind in ("separable", "one class"):
        data = gflow.datasets.separable(n=n, d=d, margin=recipe["margin"], seed=seed)
        inputs, labels = data.inputs, data.labels
        if kind == "one class":
            inputs, labels = data.signed_inputs, np.ones(n)
    elif kind == "duplicates":
        inputs = labels[:, None] * np.abs(rng.normal(size=(1, d)))
    elif kind == "collinear":
        inputs = (labels * rng.uniform(0.1, 2.0, n))[:, None] * np.abs(rng.normal(size=(1, d)))
    else:
        inputs = rng.normal(size=(n, d))
    return gflow.Dataset(inputs * recipe["data_scale"], labels, name="fuzz")


def start(recipe):
    """Of any size, the layers of one size or not, balanced, with a layer of zeros or not."""
    weights = getattr(gflow.init, recipe["start"])(recipe["program"].widths, seed=recipe["seed"])
    scales = recipe["scales"] or [1.0] * len(weights)
    return tuple(recipe["scale"] * a * matrix for a, matrix in zip(scales, weights, strict=True))


@settings(
    max_examples=MANY or 25,
    derandomize=not MANY,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(recipes())
def test_a_flow_ends_right_or_says_why_not(recipe):
    program, options = recipe["program"], dict(recipe["options"])
    problem = gflow.Problem(dataset(recipe), loss=program.loss)
    options["until"] = program.rule(recipe["goal"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of R(W(0)) > R(0)
        try:
            weights = start(recipe)
            if recipe["admissible"]:
                weights = gflow.init.admissible(weights, problem)
            record = gflow.gradient_flow(problem, weights, keep_weights=True, **options)
        except ValueError as error:
            record, message = None, str(error)
    if record is None:
        assert "`" in message
    else:
        judge(record, problem, options)


def judge(record, problem, options):
    """Everything that is true of a right record."""
    status, message = record.attrs["status"], record.attrs["message"]
    assert status in STATUSES and message
    assert record.num_steps[-1] <= options["max_steps"]
    undefined = undefined_by_definition(record, problem)
    for name, variable in record.data_vars.items():
        bad = ~np.isfinite(np.asarray(variable.values, dtype=np.float64))
        assert not (bad & ~undefined(name, bad.shape)).any(), name
    allowed = LOOSE * options["rtol"] + 1e-9
    log_risk = record.log_risk.values
    assert (np.diff(log_risk) <= allowed * np.maximum(1.0, abs(log_risk[1:]))).all()
    log_time = record.log_time.values
    assert (np.diff(log_time) >= -1e-12 * np.maximum(1.0, abs(log_time[1:]))).all()
    assert (record.clock_error <= allowed).all()
    squares = record.frobenius_norm.values.max(axis=1) ** 2
    largest = np.maximum.accumulate(squares)
    assert (record.imbalance_drift.values * squares <= allowed * largest).all()
    for name in ("rank_one_slack", "alignment_slack"):
        slack = record[name].values
        assert (np.isnan(slack) | (slack >= -allowed * largest[:, None])).all()
    if problem.data.separable:
        margin = record.margin.values[~np.isnan(record.margin.values)]
        bound = record.attrs["margin_upper_bound"]
        assert (margin <= bound + 1e-12 * max(1.0, bound)).all()
    if status == "reached" and record.num_steps[-1] > 0:
        rule = options["until"]
        end = record.isel(point=-1)
        found = {
            gflow.LogRisk: lambda: end.log_risk,
            gflow.LogTime: lambda: end.log_time,
            gflow.Time: lambda: np.exp(end.log_time),
            gflow.Steps: lambda: end.num_steps,
            gflow.Misalignment: lambda: end.misalignment.max(),
            gflow.MarginGap: lambda: end.margin_gap,
            gflow.KKT: lambda: end.kkt_residual,
        }[type(rule)]()
        if isinstance(rule, gflow.KKT | gflow.MarginGap | gflow.Misalignment):
            # Margins are sums of terms of size |z| |w|: what of them is left on the margin's scale.
            lost = 1e-13 / min(1.0, record.attrs.get("max_margin", 1.0))
            assert found <= rule.value + allowed + lost
        else:
            assert abs(float(found) - rule.value) <= allowed * max(1.0, abs(rule.value)) + 1e-15
    claims = gflow.verify(record)
    for name in ALWAYS:
        assert claims[name].holds is not False, str(claims)
    assert str(record) and str(claims)


def undefined_by_definition(record, problem):
    """Where each variable has no value: a function of its name and shape."""
    layers = range(1, record.sizes["layer"] + 1)
    spectra = [np.linalg.svd(record[f"weights_{k}"].values, compute_uv=False) for k in layers]
    first = np.stack([values[:, 0] for values in spectra], axis=1)
    second = np.stack(
        [values[:, 1] if values.shape[1] > 1 else 0 * values[:, 0] for values in spectra], axis=1
    )
    tie = first - second <= 1e-14 * first
    pair = tie[:, 1:] | tie[:, :-1]
    none = (np.linalg.norm(record.end_to_end.values, axis=1) == 0) | (first == 0).any(axis=1)
    apart = none | (not problem.data.separable)
    unseparated = none | ~(record.margin.values > 0)
    where = {
        "log_time": record.num_steps.values == 0,
        "margin": none,
        "layer_margin": none,
        "smoothed_margin": none,
        "margin_gap": apart,
        "direction_error": apart,
        "kkt_residual": unseparated,
        "kkt_slackness": unseparated,
        "perpendicular_cosine": np.full(none.shape, not problem.data.separable),
        "direction_alignment": none | tie[:, 0],
        "rank_one_gap": first == 0,
        "rank_one_residual": first == 0,
        **dict.fromkeys(("alignment", "misalignment", "alignment_slack"), pair),
    }
    ended_early = "ended at" in record.attrs.get("certificate", "")

    def undefined(name, shape):
        if name == "max_margin_direction":
            return np.full(shape, not problem.data.separable)
        of = name.removesuffix("_error")
        if name not in where and of in CERTIFIED and ended_early:
            return np.full(shape, True)
        return np.broadcast_to(where.get(name, where.get(of, np.zeros(shape, bool))), shape)

    return undefined

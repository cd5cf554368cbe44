import diffrax
import matplotlib as mpl
import numpy as np
import pytest

import gflow
from gflow.report import plot
from gflow.report.plot import style

mpl.use("Agg")

X_AXES = ["log_time", "log_risk", "num_steps"]
PANELS = ["risk", "margin", "direction_error", "alignment", "rank_one", "norms"]


@pytest.fixture(scope="module")
def data():
    return gflow.datasets.separable(n=20, d=2, margin=0.2, seed=0)


@pytest.fixture(scope="module")
def records(data):
    problem = gflow.Problem(data)
    found = {}
    for widths in ((2, 3, 3, 1), (2, 1)):
        weights = gflow.init.admissible(gflow.init.gaussian(widths, seed=1), problem)
        found[f"{len(widths) - 1}"] = gflow.gradient_flow(
            problem,
            weights,
            until=gflow.LogRisk(-120),
            save=12,
            rtol=1e-6,
            solver=diffrax.Tsit5(),  # quick to compile
        )
    # Descent has the same variables; a shorter flow under its name will do here.
    descent = found["3"].isel(point=slice(0, 8))
    return {
        "flow": found["3"],
        "linear": found["1"],
        "descent": descent.assign_attrs(kind="descent"),
    }


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def curves(ax):
    """The curves with data, the empty ones of the legend left out."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2]


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("x", X_AXES)
def test_every_panel_draws_every_record_against_every_axis(records, panel, x):
    ax = getattr(plot, panel)(records, x)
    expected = 3 if panel in ("risk", "margin", "direction_error") else 3 + 3 + 1
    if panel == "alignment":
        expected = 2 + 2  # a single layer has no pair
    assert len(curves(ax)) == expected
    assert ax.get_xlabel() and ax.get_ylabel()
    ax.figure.canvas.draw()


def test_figure_1b_shows_the_ratio_of_norms_against_minus_log_risk(records):
    ax = plot.rank_one(records["flow"])
    flow = records["flow"]
    for curve, k in zip(curves(ax), flow.layer.values, strict=True):
        layer = flow.sel(layer=k)
        np.testing.assert_allclose(curve.get_xdata(), -layer.log_risk)
        ratio = layer.spectral_norm / layer.frobenius_norm
        np.testing.assert_allclose(curve.get_ydata(), ratio, rtol=1e-12)


def test_the_axis_of_the_risk_reaches_what_the_flow_reached(records):
    low, high = plot.rank_one(records["flow"]).get_xlim()
    assert high > 100 > low


def test_figure_1a_ends_on_the_last_direction_and_shows_the_max_margin_line(records, data):
    ax = plot.decision_lines(data, records["flow"])
    lines = {line.get_label(): line for line in ax.get_lines()}
    along = np.ptp(np.stack(lines["max margin"].get_data()), axis=1)
    direction = data.max_margin().direction
    assert abs(along @ np.abs(direction[::-1])) / np.linalg.norm(along) == pytest.approx(1)
    last = records["flow"].end_to_end.values[-1]
    drawn = [np.stack(line.get_data()) for line in ax.get_lines() if line.get_label() == "_"]
    assert min(np.abs(last @ ends).max() / np.linalg.norm(last) for ends in drawn) < 1e-12


def test_decision_lines_are_for_the_plane(records):
    with pytest.raises(ValueError, match="4 features"):
        plot.decision_lines(gflow.datasets.iris(), records["flow"])


def test_summary_has_six_panels_and_every_figure_fits_a_column(records):
    assert plot.summary(records["flow"]).shape == (2, 3)
    width, _ = plot.risk(records["flow"]).figure.get_size_inches()
    assert width == pytest.approx(3.4)


def test_a_figure_is_drawn_on_the_axes_it_is_given(records):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert plot.norms(records["flow"], ax=ax) is ax


def test_records_are_named_by_kind_and_depth_and_stay_apart(records):
    flow = records["flow"]
    ax = plot.risk([flow, flow, records["linear"]])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["flow, 3 layers", "flow, 3 layers (2)", "flow, 1 layer"]


def test_long_axes_show_powers_of_ten_up_to_the_largest_value():
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    ax.plot([-0.5, 1e16], [0, 1])
    style.long_scale(ax, "x")
    ticks = ax.get_xticks()
    assert 0 in ticks and ticks.max() >= 1e14 and len(ticks) <= 8


def test_an_unknown_axis_lists_the_known_ones(records):
    with pytest.raises(ValueError, match="'log_time', 'log_risk', 'num_steps'"):
        plot.risk(records["flow"], "time")


def test_what_is_no_record_is_named(records):
    with pytest.raises(ValueError, match="holds a int"):
        plot.risk([1])
    with pytest.raises(ValueError, match="empty"):
        plot.risk([])

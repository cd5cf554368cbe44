from types import SimpleNamespace

import diffrax
import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

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
            keep_weights=True,
            certify=len(widths) > 2,
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


# -------------------------------------------------------------------------------------------------
# Figures of one purpose
# -------------------------------------------------------------------------------------------------


def test_every_singular_value_of_a_layer_is_drawn_and_only_where_it_is_resolved(records):
    flow = records["flow"]
    ax = plot.singular_values(flow)
    assert len(curves(ax)) == 2 + 3 + 1
    first = curves(plot.singular_values(flow, layer=2))[0]
    np.testing.assert_allclose(first.get_ydata(), flow.spectral_norm.sel(layer=2), rtol=1e-12)
    with pytest.raises(ValueError, match="`layer` is 4; expected 1 to 3"):
        plot.singular_values(flow, layer=4)
    with pytest.raises(ValueError, match="keep_weights"):
        plot.singular_values(flow.drop_vars([f"weights_{k}" for k in (1, 2, 3)]))


def test_a_certificate_shows_each_observable_and_the_estimate_of_its_error(records):
    flow = records["flow"]
    ax = plot.certificate(flow, ["direction_error"])
    value, error = curves(ax)
    np.testing.assert_array_equal(value.get_ydata(), flow.direction_error)
    shown = flow.direction_error_error.values
    np.testing.assert_array_equal(error.get_ydata(), shown[shown > 0])
    low, high = ax.get_ylim()
    assert low < shown[shown > 0].min() and high > float(flow.direction_error.max())
    with pytest.raises(ValueError, match=r"'direction_error'.*certify=True"):
        plot.certificate(records["linear"], ["direction_error"])


def test_the_ladder_shows_orders_and_the_floor_of_the_solver():
    rate = np.array([0.01, 0.02, 0.04])
    models = ["flow", "modified flow"]
    found = xr.Dataset(
        {
            "gap": (("learning_rate", "model"), np.stack([rate, rate**2], axis=1)),
            "order": ("model", [1.0, 2.0]),
            "richardson_gap": ("learning_rate", 2 * rate**2),
            "richardson_order": ((), 2.0),
        },
        {"learning_rate": rate, "model": models},
        {"floor": 2e-4},
    )
    ax = plot.orders(found)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["flow: order 1.00", "modified flow: order 2.00", "Richardson: order 2.00"]
    np.testing.assert_array_equal(curves(ax)[1].get_ydata(), rate**2)
    assert [patch.get_y() + patch.get_height() for patch in ax.patches] == [2e-4]
    with pytest.raises(ValueError, match=r"gflow\.ladder"):
        plot.orders(found.drop_vars("gap"))


def test_the_asymptotes_are_those_of_the_laws(records):
    law = lambda log_risk: {  # noqa: E731
        "rank_one_gap": np.array([1.0, 2.0, 0.0]) * (-log_risk) ** (-2 / 3),
        "direction_error": np.asarray(-0.3 / log_risk),
    }
    limits = SimpleNamespace(predict=law)
    axes = plot.asymptotes(records["flow"], limits, ("rank_one_gap", "direction_error"))
    assert axes.shape == (2,)
    dots, line, _, _ = curves(axes[0])  # layers 1 and 2, dots and law; the last has no gap
    late = -records["flow"].log_risk.values > 1
    np.testing.assert_array_equal(dots.get_ydata(), records["flow"].rank_one_gap[late, 0])
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata() ** (-2 / 3))
    with pytest.raises(ValueError, match="no_law"):
        plot.asymptotes(records["flow"], limits, ("no_law",))


def members(flow, factors):
    """An ensemble whose members are a record, its direction error times these numbers."""
    each = [flow.assign(direction_error=factor * flow.direction_error) for factor in factors]
    return xr.concat(each, "member", data_vars="all", combine_attrs="override")


def test_an_ensemble_is_its_median_in_the_band_of_its_members(records):
    flow = records["flow"]
    ax = plot.ensemble(members(flow, (1, 2, 4, 8, 16)), within=0.5)
    (median,) = curves(ax)
    middle = np.interp(-flow.log_risk[-3], median.get_xdata(), median.get_ydata())
    assert middle == pytest.approx(4 * float(flow.direction_error[-3]), rel=0.05)
    band = ax.collections[0].get_paths()[0].vertices
    here = np.abs(band[:, 0] - median.get_xdata()[150]) < 1e-9 * band[:, 0].max()
    np.testing.assert_allclose(np.ptp(np.log(band[here, 1])), np.log(4))


def test_an_ensemble_shows_layers_apart_and_leaves_out_where_most_members_are_gone(records):
    flow = records["flow"]
    many = members(flow, (1, 1, 1))
    assert len(curves(plot.ensemble(many, "rank_one_gap"))) == 2
    gone = many.where((many.member < 1) | (many.point < 6))
    (median,) = curves(plot.ensemble(gone))
    assert median.get_xdata().max() <= -float(flow.log_risk[5]) * (1 + 1e-9)
    labels = plot.ensemble({"a": many, "b": many}, "margin").get_legend().get_texts()
    assert [text.get_text() for text in labels] == ["a", "b"]
    with pytest.raises(ValueError, match="no dimension `member`"):
        plot.ensemble(flow)
    with pytest.raises(ValueError, match="`within` is 1"):
        plot.ensemble(many, within=1)


def test_gaps_are_drawn_above_the_band_of_the_flows_own_error(records):
    compared = gflow.compare(records["flow"], records["descent"])
    ax = plot.gaps(compared, "margin_gap")
    assert len(ax.collections) == 1 and ax.get_xlabel() == r"$\log\,t$"
    with pytest.raises(ValueError, match=r"expected one of .*direction_gap"):
        plot.gaps(compared, "nothing")


def test_an_animation_ends_on_the_last_direction(records, data, tmp_path):
    from PIL import Image

    found = plot.animation(data, records["flow"], num_frames=4)
    found.save(tmp_path / "flow.gif", writer="pillow")
    with Image.open(tmp_path / "flow.gif") as picture:
        assert picture.n_frames == 4
    _, line = [line for line in found._fig.axes[0].get_lines() if line.get_zorder() == 3]
    last = records["flow"].end_to_end.values[-1]
    assert np.abs(last @ np.stack(line.get_data())).max() < 1e-12 * np.linalg.norm(last)
    with pytest.raises(ValueError, match="`num_frames` is 1"):
        plot.animation(data, records["flow"], num_frames=1)

"""Data with targets: files, measurements of a matrix, completion, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest

import gflow
from gflow.__main__ import main
from gflow.problem.nuclear import least_nuclear

RNG = np.random.default_rng(3)
QUIET = {"progress": False}
TABLE = """\
length,width,red,blue
0.5,1.0,1.0,-0.5
1.5,-0.25,0.0,2.0
-1.0,0.75,0.5,0.25
"""


def table(folder, text=TABLE, name="targets.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_columns_of_a_table_become_targets_in_the_order_asked_for(tmp_path):
    path = table(tmp_path)
    one = gflow.Regression.from_file(path)
    assert one.output_shape == () and one.dim == 3 and one.name == "targets"
    np.testing.assert_array_equal(one.targets, [-0.5, 2.0, 0.25])
    two = gflow.Regression.from_csv(path, target_columns=["blue", "red"])
    np.testing.assert_array_equal(two.targets, [[-0.5, 1.0], [2.0, 0.0], [0.25, 0.5]])
    np.testing.assert_array_equal(two.inputs, [[0.5, 1.0], [1.5, -0.25], [-1.0, 0.75]])
    np.savez(tmp_path / "a.npz", x=two.inputs, targets=two.targets)
    again = gflow.Regression.from_file(tmp_path / "a.npz", inputs="x")
    np.testing.assert_array_equal(again.targets, two.targets)
    assert two.with_bias(2.0).inputs[:, -1].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (TABLE, ["red", "green"], r"`target_columns` is 'green', which does not occur"),
        (TABLE, ["red", 2], r"names a column twice"),
        (TABLE, [0, 1, 2, 3], r"every column is a target"),
        (TABLE, [], r"`target_columns` is empty"),
        (TABLE.replace("2.0", "nan"), -1, r"line 3, column 4 \('blue'\): got 'nan'"),
        (TABLE.replace("2.0", ""), -1, r"line 3, column 4 \('blue'\): got ''"),
    ],
)
def test_a_malformed_table_of_targets_is_reported_with_its_place(tmp_path, text, columns, message):
    with pytest.raises(ValueError, match=message):
        gflow.Regression.from_csv(table(tmp_path, text), target_columns=columns)


def test_no_target_is_taken_for_the_name_of_a_column(tmp_path):
    path = table(tmp_path, "1,2,3\n3.5,4,1\n5,6,1\n")
    with pytest.raises(ValueError, match=r"line 1: '1,2,3' may be names of columns, or a point"):
        gflow.Regression.from_csv(path)
    assert gflow.Regression.from_csv(path, header=False).targets.tolist() == [3, 1, 1]


CONFIG = """
[data]
file = "targets.csv"
target_columns = ["red", "blue"]
[network]
widths = [2, 3, 2]
[start]
scale = 0.1
[flow]
solver = "GaussNewton"
until = { log_time = 5 }
save = 6
"""


def test_targets_in_a_file_are_followed_from_the_command_line(tmp_path, capsys):
    table(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "run.toml"), "--out", str(out), "--no-progress"]) == 0
    record = gflow.load(out / "flow-2-layers.nc")
    assert record.attrs["status"] == "reached" and record.sizes["output"] == 2
    assert {"risk.png", "modes-flow-2-layers.png"} <= {path.name for path in out.iterdir()}
    assert "The least risk of linear maps is" in (out / "report.md").read_text()
    for old, new, message in (
        ("[2, 3, 2]", "[2, 3, 1]", "the last 2, the 2 outputs"),
        ("[network]", "scale = true\n[network]", "`scale` is true, and the data have targets"),
        ("[flow]", "[loss]\nname = 'logistic'\n[flow]", "gflow.Squared()"),
    ):
        (tmp_path / "run.toml").write_text(CONFIG.replace(old, new), encoding="utf-8")
        assert main(["run", str(tmp_path / "run.toml"), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Measurements of a matrix
# ---------------------------------------------------------------------------------------------

HALF = np.array([[1.0, 0.5, np.nan], [np.nan, 2.0, 1.0], [0.3, np.nan, 1.0]])
SMALL = gflow.init.gaussian((3, 3, 3), scale=0.5, seed=0)


def test_measurements_of_points_are_their_regression():
    # <e_k x_i^T, W> is output k at point i; a mean over twice as many measurements is half as much.
    x, y = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2))
    matrices = np.einsum("kl,ia->ikla", np.eye(2), x).reshape(8, 2, 3)
    sensed = gflow.Problem(gflow.Sensing(matrices, y.ravel()))
    regression = gflow.Problem(gflow.Regression(x, y))
    start = gflow.init.gaussian((3, 3, 2), scale=0.5, seed=0)
    (one, slopes), (other, wanted) = (p.log_risk_and_gradient(start) for p in (sensed, regression))
    assert float(one) == pytest.approx(float(other) - math.log(2), rel=1e-13)
    for found, expected in zip(slopes, wanted, strict=True):  # of log R
        np.testing.assert_allclose(found, expected, atol=1e-13)
    blocks = np.stack([b @ b.T for b in RNG.normal(size=(8, 1, 1))])
    a = sensed.design
    for found in (a.gram_of_blocks(blocks), a.gram_of_diagonal(blocks.ravel())):
        dense = np.asarray(a.matrix).T @ np.diag(blocks.ravel()) @ np.asarray(a.matrix)
        np.testing.assert_allclose(found, dense, atol=1e-13)
    np.testing.assert_allclose(sensed.data.least_squares(), regression.data.least_squares())


def test_a_completion_takes_what_is_not_nan_and_a_network_of_matrices_agrees():
    data = gflow.datasets.completion(HALF)
    assert data.num_points == 6 and data.output_shape == () and data.num_outputs == 3
    np.testing.assert_array_equal(data.least_squares(), np.nan_to_num(HALF))
    hidden = gflow.datasets.completion(np.nan_to_num(HALF), ~np.isnan(HALF))
    np.testing.assert_array_equal(hidden.matrices, data.matrices)
    network = gflow.Network(lambda w, matrix: (matrix * (w[1] @ w[0])).sum(), homogeneity=2)
    linear, free = gflow.Problem(data), gflow.Problem(data, network)
    assert float(linear.log_risk(SMALL)) == pytest.approx(float(free.log_risk(SMALL)), rel=1e-13)


def test_a_row_of_which_nothing_is_observed_is_said_and_allowed():
    gone = np.where(np.arange(3)[:, None] == 1, np.nan, HALF)
    with pytest.warns(UserWarning, match=r"nothing is observed in row 1 of `matrix`"):
        assert gflow.datasets.completion(gone).num_points == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gflow.Sensing(np.ones(4), np.ones(4)), r"`matrices` has shape \(4,\)"),
        (lambda: gflow.Sensing(np.ones((4, 2, 2)), np.ones(3)), r"there are 4 `matrices`"),
        (lambda: gflow.Sensing(np.ones((4, 2, 2)), np.ones((4, 1))), r"one number a measurement"),
        (lambda: gflow.Sensing([[[np.inf]]], [1.0]), r"`matrices\[0, 0, 0\]` is inf"),
        (lambda: gflow.Sensing([[[1.0]]], [np.nan]), r"`values\[0\]` is nan"),
        (lambda: gflow.Sensing(np.zeros((1, 2, 2)), [1.0]), r"`matrices\[0\]` is zero"),
        (lambda: gflow.datasets.completion(np.ones(3)), r"expected two dimensions"),
        (lambda: gflow.datasets.completion(HALF, np.ones((3, 3))), r"the type float64"),
        (lambda: gflow.datasets.completion(HALF, HALF > 9), r"no entry that is true"),
        (lambda: gflow.datasets.completion(HALF, np.ones((3, 3), bool)), r"\[0, 2\]` is nan"),
        (
            lambda: gflow.Problem(gflow.datasets.completion(HALF), loss=gflow.Logistic()),
            r"gflow\.Squared\(\)",
        ),
        (
            lambda: gflow.Problem(gflow.datasets.completion(HALF)).check((np.ones((2, 3)),)),
            r"3 rows, as the matrices of the measurements have",
        ),
    ],
)
def test_measurements_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_start_for_targets_is_admissible_as_it_is():
    problem = gflow.Problem(gflow.datasets.completion(HALF))
    large = tuple(10 * w for w in SMALL)
    for one, other in zip(gflow.init.admissible(large, problem), large, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------------------------------
# Saddles, modes and references
# ---------------------------------------------------------------------------------------------

STRENGTHS = np.array([5.0, 3.0, 1.2])
TINY = 1e-15


@pytest.fixture(scope="module")
def staircase():
    """Three modes of an aligned start of 1e-15, rotated; saved in time."""
    left, right = (np.linalg.qr(RNG.normal(size=(3, 3)))[0] for _ in range(2))
    target = (left * STRENGTHS) @ right.T
    problem = gflow.Problem(gflow.Regression(math.sqrt(3) * np.eye(3), math.sqrt(3) * target.T))
    weights = gflow.init.balanced((3, 3, 3), TINY * left @ right.T)
    options = {"save": 60, "solver": gflow.GaussNewton(), "progress": False}
    extra = {
        "strengths": gflow.observables.mode_strengths(left, right),
        "to_target": gflow.observables.distance_to(target),
        "kernel": gflow.observables.kernel_movement(weights),
    }
    flow = gflow.gradient_flow(
        problem, weights, until=gflow.Time(20.0), observables=extra, **options
    )
    return problem, weights, flow, options


def test_plateaus_lie_between_the_times_of_the_closed_form(staircase):
    *_, flow, _ = staircase
    table = gflow.saddles(flow)
    assert [row.rank for row in table] == [0, 1, 2, 3]
    wanted = np.log(gflow.exact.saddle_times(STRENGTHS, TINY, depth=2))
    np.testing.assert_allclose([row.log_passed for row in table][:3], wanted, atol=1e-7)
    levels = [math.log(np.sum(STRENGTHS[rank:] ** 2) / 2) for rank in range(3)]
    np.testing.assert_allclose([row.log_risk for row in table][:3], levels, atol=0.02)
    for before, after in pairwise(table):
        assert before.log_left < before.log_passed < after.log_reached
    assert table[1].effective_rank == pytest.approx(1, abs=0.05)
    assert "3 saddles passed" in str(table)


def test_a_run_lands_on_each_saddle_at_its_time(staircase, unchecked):
    problem, weights, _, options = staircase
    found = gflow.gradient_flow(
        problem, weights, until=gflow.Saddle(3), **{**options, "save": [1, 2]}
    )
    assert found.attrs["status"] == "reached"
    wanted = gflow.exact.saddle_times(STRENGTHS, TINY, depth=2)
    np.testing.assert_allclose(np.exp(found.log_time.values[1:]), wanted, rtol=1e-9)
    np.testing.assert_allclose(np.diag(found.mode_values.values[1:]), STRENGTHS / 2, rtol=1e-8)
    with pytest.raises(ValueError, match=r"the data have 3 modes to learn; expected at most"):
        gflow.gradient_flow(problem, weights, until=gflow.Saddle(4))
    with pytest.raises(ValueError, match=r"Saddle\(0\.5\).*whole number from 1 on"):
        gflow.Saddle(0.5)
    labelled, start = gflow.Problem(gflow.datasets.two_point()), gflow.init.gaussian((2, 3, 1))
    with pytest.raises(ValueError, match=r"Saddle\(1\), which is of targets; the data have labels"):
        gflow.gradient_flow(labelled, start, until=gflow.Saddle(1))


def test_observables_on_request_are_what_they_say(staircase):
    *_, flow, _ = staircase
    times = np.exp(flow.log_time.values[1:])
    for column, s in zip(flow.strengths.values[1:].T, STRENGTHS, strict=True):
        wanted = gflow.exact.square_loss_mode(times, target=s, start=TINY, depth=2)
        np.testing.assert_allclose(column, wanted.end_to_end, atol=1e-8)
    assert float(flow.kernel[0]) == 0 and float(flow.kernel[-1]) > 1e10
    np.testing.assert_allclose(
        flow.to_target[1:], flow.solution_distance[1:], rtol=1e-8, atol=1e-13
    )
    last = flow.isel(point=-1)
    share = STRENGTHS / STRENGTHS.sum()
    entropy = -np.sum(share * np.log(share))
    assert float(last.effective_rank) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert float(last.nuclear_norm) == pytest.approx(STRENGTHS.sum(), rel=1e-6)
    assert float(flow.gram_misalignment.max()) < 1e-12
    claims = gflow.verify(flow)
    assert claims.summary == "5 of 5 applicable claims hold; 1 not applicable"
    assert claims["exponential convergence"].value == pytest.approx(4 * 1.2, rel=0.02)  # 2s twice


def test_the_least_nuclear_norm_is_certified_and_met_by_the_fit():
    # Rank one with every entry's square seen: the diagonal alone has many fits of the same norm.
    factor = np.array([1.0, -0.5, 2.0, 0.7])
    matrix = np.outer(factor, factor)
    mask = ~np.eye(4, dtype=bool)
    mask[0, 0] = True
    found = least_nuclear(gflow.datasets.completion(matrix, mask))
    assert found.lower <= found.norm * (1 + 1e-14)
    assert found.norm - found.lower < 1e-9 * found.norm
    np.testing.assert_allclose(found.matrix[mask], matrix[mask], atol=1e-12)
    assert found.norm <= np.linalg.norm(matrix, "nuc") * (1 + 1e-9)
    assert least_nuclear(gflow.Regression(np.eye(2), np.eye(2))) is None


def test_a_completion_from_a_small_start_ends_near_a_fit_of_low_rank():
    problem = gflow.Problem(gflow.datasets.completion(HALF))
    start = gflow.init.gaussian((3, 3, 3), scale=0.01, seed=0)
    options = {"save": 20, "solver": gflow.GaussNewton(), "progress": False}
    flow = gflow.gradient_flow(problem, start, until=gflow.LogTime(8.0), **options)
    assert float(flow.effective_rank.min()) < 1.1  # on the plateau of rank one
    bound = flow.attrs["nuclear_norm_bound"]
    assert bound <= float(flow.nuclear_norm[-1]) < 1.05 * bound
    assert all(claim.holds is not False for claim in gflow.verify(flow))
    w = np.asarray(flow.end_to_end[-1])
    np.testing.assert_allclose(w[~np.isnan(HALF)], HALF[~np.isnan(HALF)], atol=1e-12)

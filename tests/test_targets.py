"""Data with targets: files, measurements of a matrix, completion, and what is refused."""

import math

import numpy as np
import pytest

import gflow
from gflow.__main__ import main

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

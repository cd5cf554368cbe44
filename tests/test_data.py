import gc
import re
from decimal import Decimal
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import gflow.problem.data as module
from gflow import datasets
from gflow.problem.data import Dataset

INPUTS = np.array([[0.5, 0.1], [-0.2, 0.9], [0.3, -0.4]])
LABELS = np.array([1.0, -1.0, 1.0])


@pytest.fixture
def data():
    return Dataset(INPUTS, LABELS, name="three points")


def write(tmp_path, text, name="points.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


# -- what a data set is ---------------------------------------------------------------------------


def test_signed_inputs_are_the_inputs_times_their_labels(data):
    np.testing.assert_array_equal(data.signed_inputs, [[0.5, 0.1], [0.2, -0.9], [0.3, -0.4]])
    assert (data.num_points, data.dim, data.name) == (3, 2, "three points")


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray])
def test_any_real_array_becomes_read_only_float64(kind):
    data = Dataset(kind([[1, 2], [3, 4]]), kind([1, -1]))
    assert data.inputs.dtype == data.labels.dtype == np.float64
    assert isinstance(data.inputs, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        data.inputs[0, 0] = 5.0


def test_a_data_set_does_not_follow_the_array_it_was_made_from():
    inputs = INPUTS.copy()
    data = Dataset(inputs, LABELS)
    inputs[0, 0] = 99.0
    assert data.inputs[0, 0] == 0.5


def test_a_data_set_is_a_pytree_that_passes_through_jit_grad_and_vmap(data):
    assert len(jax.tree.leaves(data)) == 2
    signed = eqx.filter_jit(lambda d: d.signed_inputs)(data)
    np.testing.assert_array_equal(signed, data.signed_inputs)
    traced = jax.jit(lambda d: jnp.sum(d.signed_inputs) + d.num_points * d.dim)(data)
    assert float(traced) == pytest.approx(data.signed_inputs.sum() + 6)
    gradient = jax.grad(lambda d: jnp.sum(d.signed_inputs))(data)
    np.testing.assert_array_equal(gradient.inputs, np.repeat(LABELS[:, None], 2, axis=1))
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), data)
    sums = jax.vmap(lambda d: jnp.sum(d.inputs))(copies)
    np.testing.assert_allclose(sums, [INPUTS.sum(), 2 * INPUTS.sum()])


def test_margin_is_solved_once_and_is_no_part_of_the_tree(data, monkeypatch):
    calls = []
    solve = module.max_margin
    monkeypatch.setattr(module, "max_margin", lambda d: calls.append(1) or solve(d))
    before = jax.tree.structure(data)
    assert data.max_margin() is data.max_margin()
    assert data.separable
    assert len(calls) == 1
    assert jax.tree.structure(data) == before
    assert data == Dataset(INPUTS, LABELS, name="three points")


def test_solving_the_margin_compiles_nothing_again(data):
    traces = []
    function = jax.jit(lambda d: traces.append(1) or jnp.sum(d.inputs))
    function(data)
    data.max_margin()
    function(data)
    assert len(traces) == 1


def test_a_solution_is_forgotten_with_its_data_set():
    data = Dataset(INPUTS, LABELS)
    data.max_margin()
    key = id(data)
    assert key in module._SOLUTIONS
    del data
    gc.collect()
    assert key not in module._SOLUTIONS


def test_scaling_puts_the_largest_input_on_the_unit_sphere_and_keeps_the_direction(data):
    for factor in (1.0, 1e200, 1e-200):
        scaled = Dataset(factor * INPUTS, LABELS).scaled()
        norms = np.linalg.norm(scaled.inputs, axis=1)
        assert norms.max() == pytest.approx(1.0, abs=1e-15) and norms.max() <= 1.0
        np.testing.assert_allclose(
            scaled.max_margin().direction, data.max_margin().direction, rtol=1e-13
        )


def test_scaling_leaves_zero_inputs_alone():
    assert Dataset([[0.0]], [1.0]).scaled().inputs.tolist() == [[0.0]]


def test_a_bias_is_one_more_constant_feature(data):
    biased = data.with_bias(0.5)
    np.testing.assert_array_equal(biased.inputs, np.column_stack([INPUTS, [0.5] * 3]))
    np.testing.assert_array_equal(biased.labels, LABELS)
    with pytest.raises(ValueError, match=r"`value` is 0; expected a finite number other than"):
        data.with_bias(0)


def test_repr_tells_counts_and_the_margin_once_it_is_known(data):
    assert "3 points (2 positive, 1 negative), 2 features" in repr(data)
    assert "margin" not in repr(data)
    data.max_margin()
    assert "max margin" in repr(data)
    assert "traced" not in str(jax.make_jaxpr(lambda d: (repr(d), d.inputs)[1])(data))


# -- bad arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (INPUTS, [0, 1, 1], r"`labels\[0\]` is 0; .* 2 \* labels - 1"),
        (INPUTS, [1, 2, 2], r"`labels\[1\]` is 2; .* np.where\(labels == 2, 1.0, -1.0\)"),
        (INPUTS, [1, 2, 3], r"3 values 1, 2, 3: number the classes from 0"),
        (INPUTS, [0.5, 0.5, 0.5], r"They take the value 0.5"),
        (INPUTS, [True, False, True], r"booleans; .* 2.0 \* labels - 1.0"),
        (INPUTS, ["a", "b", "a"], r"`labels` has the type <U1; expected real numbers"),
        (INPUTS, [[1.0], [-1.0], [1.0]], r"shape \(3, 1\); .* labels.ravel\(\)"),
        (INPUTS, np.ones((3, 2)), r"shape \(3, 2\); .* One label, not a row"),
        (INPUTS, [1.0, -1.0], r"2 entries and `inputs` has 3 rows"),
        (INPUTS, [1.0, np.nan, 1.0], r"`labels\[1\]` is nan"),
        ([[0.0, 1.0], [np.nan, np.inf]], [1, 1], r"`inputs\[1, 0\]` is nan; .*\(2 such entries\)"),
        (INPUTS[0], [1.0], r"shape \(2,\); expected two dimensions.*inputs\[None, :\]"),
        (np.ones((0, 2)), [], r"shape \(0, 2\); expected at least one point"),
        (np.ones((2, 0)), [1, 1], r"shape \(2, 0\); expected at least one point and one feature"),
        ([[1.0], [1.0, 2.0]], [1, 1], r"`inputs` is not a table: .*rows of equal length"),
        (np.array([[1j]]), [1], r"`inputs` has the type complex128; expected real numbers"),
    ],
)
def test_bad_arrays_are_refused_with_what_to_do(inputs, labels, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Dataset(inputs, labels)


# -- files ----------------------------------------------------------------------------------------


def test_csv_with_a_header_words_for_labels_and_comments(tmp_path):
    text = "height,kind,weight\n# measured\n1.5, cat ,2\n\n-0.5,dog,1e-3\n"
    data = Dataset.from_csv(write(tmp_path, text), label_column="kind", positive="cat")
    np.testing.assert_array_equal(data.inputs, [[1.5, 2.0], [-0.5, 1e-3]])
    np.testing.assert_array_equal(data.labels, [1.0, -1.0])
    assert data.name == "points"


def test_csv_without_a_header_takes_the_last_column_as_the_label(tmp_path):
    path = write(tmp_path, "\ufeff1,2,-1\r\n3,4,+1\r\n")
    data = Dataset.from_csv(path)
    np.testing.assert_array_equal(data.signed_inputs, [[-1.0, -2.0], [3.0, 4.0]])
    first = Dataset.from_csv(
        write(tmp_path, "0;2\n1;4\n"), label_column=0, positive=1, delimiter=";"
    )
    np.testing.assert_array_equal(first.signed_inputs, [[-2.0], [4.0]])


def test_csv_round_trips_every_bit(tmp_path):
    data = datasets.separable(n=20, d=3, seed=4)
    lines = [
        ",".join(map(repr, row)) for row in np.column_stack([data.inputs, data.labels]).tolist()
    ]
    again = Dataset.from_file(write(tmp_path, "\n".join(lines)))
    np.testing.assert_array_equal(again.inputs, data.inputs)
    np.testing.assert_array_equal(again.labels, data.labels)


def test_suffix_chooses_the_reader(tmp_path):
    assert Dataset.from_file(write(tmp_path, "1\t1\n", "a.tsv")).dim == 1
    np.savez(tmp_path / "a.npz", inputs=INPUTS, labels=LABELS)
    assert Dataset.from_file(tmp_path / "a.npz", name="mine").name == "mine"
    with pytest.raises(ValueError, match=r"suffix '.xlsx'; expected .csv, .tsv, .txt or .npz"):
        Dataset.from_file(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b,y\n1,2,1\n3,x,1\n", {}, r"csv, line 3, column 2 \('b'\): got 'x', expected a finite"),
        ("1,2,1\n3,,1\n", {}, r"line 2, column 2: got '', expected a finite number"),
        ("1,2,1\n\n3,nan,1\n", {}, r"line 3, column 2: got 'nan'"),
        ("1,2,1\n3,4\n", {}, r"line 2: it has 2 columns; expected 3, as in line 1"),
        ("1,2,1\n3,4,5,1\n", {}, r"line 2: it has 4 columns; expected 3"),
        ("1,2,0\n3,4,1\n", {}, r"line 1, column 3: the label is '0'.*`positive='1'`"),
        ("a,y\n1,no\n2,yes\n", {}, r"line 2, column 2 \('y'\): the label is 'no'.*'no', 'yes'"),
        ("1,0\n2,1\n", {"positive": 7}, r"`positive` is 7.*The labels are 0.0, 1.0"),
        ("a,y\n1,no\n2,no\n", {"positive": "no"}, r"`positive` is 'no'; expected one of several"),
        ("a,y\n1,1\n", {"label_column": "z"}, r"'z', which does not occur in the header.*'a', 'y'"),
        ("y,y\n1,1\n", {"label_column": "y"}, r"'y', which occurs more than once"),
        ("1,1\n", {"label_column": "y"}, r"has no header line; expected a position from 0 to 1"),
        ("1,1\n", {"label_column": 2}, r"`label_column` is 2; expected a position from -2 to 1"),
        ("1;1\n", {}, r"got '1;1'|one column|header"),
        ("1\n-1\n", {}, r"it has one column, the labels.*`delimiter`"),
        ("", {}, r"it holds nothing"),
        ("a,b\n", {}, r"it holds only a header"),
        ('1,"2,1\n', {}, r"line 1: unexpected end of data"),
        ("1,1\n", {"delimiter": ", "}, r"`delimiter` is ', '; expected one character"),
    ],
)
def test_malformed_tables_are_refused_with_line_and_column(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        Dataset.from_csv(write(tmp_path, text), **options)


def test_a_binary_file_is_not_taken_for_a_table(tmp_path):
    path = tmp_path / "image.csv"
    path.write_bytes(b"1,2,1\n\xff\xd8\xff\n")
    with pytest.raises(ValueError, match="byte 0xff is not UTF-8 text"):
        Dataset.from_csv(path)


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_a_missing_file_is_an_os_error_that_names_it(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=re.escape(f"nowhere.{suffix}")):
        Dataset.from_file(tmp_path / f"nowhere.{suffix}")


def test_npz_is_read_with_its_keys_and_labels_converted(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, x=INPUTS, digit=[3, 5, 3])
    data = Dataset.from_npz(path, inputs="x", labels="digit", positive=3)
    np.testing.assert_array_equal(data.labels, [1.0, -1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"`inputs` is 'inputs', which .* does not have; it has 'x'"
    ):
        Dataset.from_npz(path)
    with pytest.raises(ValueError, match=r"`labels\[0\]` is 3; .* np.where\(labels == 5"):
        Dataset.from_npz(path, inputs="x", labels="digit")
    with pytest.raises(ValueError, match=r"`positive` is 4.*The labels are 3, 5"):
        Dataset.from_npz(path, inputs="x", labels="digit", positive=4)


def test_what_is_no_npz_file_is_refused(tmp_path):
    path = write(tmp_path, "1,2\n", "text.npz")
    with pytest.raises(ValueError, match=r"text.npz: it is not an NPZ file"):
        Dataset.from_npz(path)
    objects = tmp_path / "objects.npz"
    np.savez(objects, inputs=np.array([[None]]), labels=[1.0])
    with pytest.raises(ValueError, match=r"an array cannot be read.*plain numbers"):
        Dataset.from_npz(objects)
    whole = tmp_path / "whole.npz"
    np.savez_compressed(whole, inputs=np.random.default_rng(0).normal(size=(50, 9)), labels=LABELS)
    damaged = bytearray(whole.read_bytes())
    damaged[300:400] = bytes(100)
    whole.write_bytes(damaged)
    with pytest.raises(ValueError, match="an array cannot be read"):
        Dataset.from_npz(whole)


# -- generated and real sets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "margin", "seed"),
    [(100, 2, 0.1, 0), (100, 2, 0.1, 1), (40, 12, 0.4, 2), (500, 30, 1e-3, 3), (9, 1, 0.5, 4)],
)
def test_separable_data_have_exactly_the_margin_asked_for(n, d, margin, seed):
    data = datasets.separable(n, d, margin, seed)
    solution = data.max_margin()
    # Rounding the points to float64 moves the margin by about 1e-16.
    assert solution.margin == pytest.approx(margin, abs=4e-16)
    assert solution.relative_gap < 1e-12
    assert np.linalg.norm(data.inputs, axis=1).max() <= 1.0
    # Generic: the support spans the space, and its weights are unequal.
    assert len(solution.support) == np.linalg.matrix_rank(data.inputs[solution.support]) == d
    weights = solution.dual[solution.support]
    assert d == 1 or weights.max() > 1.8 * weights.min()
    others = np.delete(data.signed_inputs @ solution.direction, solution.support)
    assert others.min() > margin * (1 + 1e-6)


def test_separable_data_follow_their_seed_and_may_be_few():
    assert datasets.separable(seed=5) == datasets.separable(seed=5)
    assert datasets.separable(seed=5) != datasets.separable(seed=6)
    few = datasets.separable(n=3, d=10, margin=0.2)
    assert few.max_margin().margin == pytest.approx(0.2, abs=1e-15)


def test_two_point_data_have_the_margin_a_and_the_direction_of_the_first_axis():
    data = datasets.two_point(0.8, 0.5, (3, 1))
    assert data.num_points == 4 and set(data.labels) == {1.0, -1.0}
    np.testing.assert_array_equal(data.signed_inputs[[0, 3]], [[0.8, 0.5], [0.8, -0.5]])
    np.testing.assert_allclose(data.max_margin().direction, [1.0, 0.0], atol=1e-15)
    assert data.max_margin().margin == pytest.approx(0.8, rel=1e-15)


def test_one_datum_has_its_own_direction():
    data = datasets.one_datum()
    z = data.signed_inputs[0]
    np.testing.assert_allclose(data.max_margin().direction, z / np.linalg.norm(z), rtol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.separable(margin=1), r"`margin` is 1; expected a number between 0"),
        (lambda: datasets.separable(n=0), "`n` is 0; expected at least 1"),
        (lambda: datasets.separable(d=0), "`d` is 0; expected at least 1"),
        (lambda: datasets.two_point(b=0), "`b` is 0; expected a positive number"),
        (lambda: datasets.two_point(multiplicities=(0, 1)), "`multiplicities` is"),
        (lambda: datasets.digits(3, 10), "`second` is 10; expected a class of digits, 0 to 9"),
        (lambda: datasets.iris(1, 1), "both 1; expected two classes"),
        (lambda: datasets.load("mnist"), "`name` is 'mnist'; expected one of "),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Sizes are those of the sets; separability is the certificate's, asserted in test_max_margin.
@pytest.mark.parametrize(
    ("name", "points", "dim", "separable"),
    [
        ("separable", 100, 2, True),
        ("two-point", 4, 2, True),
        ("one-datum", 1, 3, True),
        ("digits-3-5", 365, 64, True),
        ("iris-0-1", 100, 4, True),
        ("iris-1-2", 100, 4, False),
        ("wine-0-1", 130, 13, True),
        ("breast-cancer", 569, 31, True),
        ("breast-cancer-without-bias", 569, 30, False),
    ],
)
def test_named_sets_are_in_the_unit_ball_and_separable_as_stated(name, points, dim, separable):
    data = datasets.load(name)
    assert (data.num_points, data.dim, data.separable) == (points, dim, separable)
    if name != "one-datum":
        assert np.linalg.norm(data.inputs, axis=1).max() <= 1.0


def test_options_of_the_real_sets_standardise_and_add_a_bias():
    data = datasets.wine(0, 2, standardise=True, bias=1.0)
    features, constant = data.inputs[:, :-1], data.inputs[:, -1]
    assert np.ptp(constant) == 0.0
    np.testing.assert_allclose(features.mean(axis=0), 0.0, atol=1e-14)
    np.testing.assert_allclose(features.std(axis=0), constant[0], rtol=1e-12)
    assert np.linalg.norm(data.inputs, axis=1).max() == pytest.approx(1.0, abs=1e-15)


# -- which cells are data, and which labels are there ---------------------------------------------

POINTS = pd.DataFrame({"a": [1.5, -2.0, 3.0, 0.5, 2.5], "b": [0.3, 0.4, 0.5, 0.6, 0.1]})
NUMBERS, WORDS = POINTS.assign(y=[1, -1, 1, -1, 1]), POINTS.assign(y=["p", "n", "p", "n", "p"])


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("frame", "options"), [(NUMBERS, {}), (WORDS, {"positive": "p"})])
def test_what_pandas_writes_is_read_as_it_was(tmp_path, frame, options, index):
    for columns in (["a", "b", "y"], [0, 1, 2], [2019, 2020, 2021]):
        path = tmp_path / "points.csv"
        frame.set_axis(columns, axis=1).to_csv(path, index=index)
        data = Dataset.from_csv(path, **options)
        np.testing.assert_array_equal(data.inputs, POINTS)
        np.testing.assert_array_equal(data.labels, [1, -1, 1, -1, 1])


@pytest.mark.parametrize(
    ("text", "options", "points"),
    [
        ("2019,2020,label\n1.5,2,1\n-1,-2,-1\n", {}, 2),
        ("2019,2020,label\n1.5,2,yes\n-1,-2,no\n", {"positive": "yes", "header": True}, 2),
        ("2019,2020,label\n1.5,2,yes\n-1,-2,no\n", {"positive": "yes", "label_column": "label"}, 2),
        ("x,2,y\n1.5,2,1\n-1,-2,-1\n", {}, 2),
        ("1.5,2,yes\n-1,-2,no\n", {"positive": "no"}, 2),
        ("1,2,yes\n-1,-2,no\n", {"positive": "yes"}, 2),
        ("0,1\n1.5,1\n-2.0,-1\n", {"header": True}, 2),
        ("0,1\n1.5,1\n-2.0,-1\n", {"header": False}, 3),
        ('"","x1","y"\n"1",0.5,1\n"2",-1,-1\n', {}, 2),
        ("1,2,3\n3,4,1\n5,6,1\n3,7,2\n", {"classes": True, "header": False}, 4),
        ("1,2,4\n3,4,1\n5,6,1\n3,7,2\n", {"classes": True}, 4),
        ("0,1,2\n.3,4,7\n.5,6,8\n", {"classes": [8, 7]}, 2),
        ("1.5,2.5,none of it\n3,4,1\n2,2,0\n", {"classes": True, "header": True}, 2),
        ("x,y\n3,0\n2,1\n1,2\n", {"classes": range(3)}, 3),
    ],
)
def test_the_first_row_is_taken_for_what_it_is(tmp_path, text, options, points):
    assert Dataset.from_csv(write(tmp_path, text), **options).num_points == points


COUNTED = "".join(f"{k},{k / 3},{(-1) ** k}\n" for k in range(8))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("0,1\n1.5,1\n-2,-1\n", {}, r"line 1: '0,1' may be names.*`header=True` or `header=False`"),
        ("2019,2020,y\n1.5,2,yes\n-1,-2,no\n", {"positive": "yes"}, r"line 1: .*`header=True` or"),
        ("NA,NA,y\n1.5,2,yes\n-1,-2,no\n", {"positive": "yes"}, r"line 1: .*`header=True` or"),
        ("NA,NA,yes\n1.5,2,yes\n-1,-2,no\n", {"positive": "yes"}, r"line 1, column 1: got 'NA'"),
        ("1,2,3\n3,4,1\n5,6,1\n3,7,2\n", {"classes": True}, r"line 1: '1,2,3' may be names"),
        ("1.0,2.0,3\n.3,4,1\n5,6,2\n", {"classes": True}, r"line 1: .* may be names"),
        ("1.5,2.5,none of it\n3,4,1\n2,2,0\n", {"classes": True}, r"line 1: .*has a word above"),
        ("10%,2,1\n3,4,1\n2,2,-1\n", {}, r"line 1: '10%,2,1' has a word above numbers, and a"),
        ("inf,2,1\n2,3,-1\n", {}, r"line 1, column 1: got 'inf', expected a finite number"),
        (",x,y\n" + COUNTED, {"label_column": 0}, r"column 1 .* numbers the rows, .*labels"),
        ("x,y\n1,a\n2,b\n", {"classes": {"a", "b"}}, r"`classes` is a set; .*list of labels"),
        ("0,1,2\n.3,4,7\n.5,6,8\n", {"classes": True}, r"line 1: '0,1,2' may be names"),
        ("1,2,3\n3,4,1\n5,6,-1\n", {}, r"line 1: '1,2,3' may be names"),
        (COUNTED, {}, r"column 1 counts the rows.*`header=False`"),
        (f"id,x,y\n{COUNTED}", {}, r"column 1 \('id'\) counts the rows.*`header=True`"),
        (",x,y\na,1,1\nb,2,-1\n", {}, r"column 1 has no name and does not number"),
        ('"x" "y"\n"1" 2 1\n"2" 3 -1\n', {"delimiter": " "}, r"write.table.*row.names=FALSE"),
        ("1,5;2;1\n2,5;3;-1\n", {"delimiter": ";"}, r"line 1, column 1: .*decimal comma"),
        ("1 1:0.5 2:3\n-1 1:2\n", {"delimiter": " "}, r"libsvm's format.*load_svmlight_file"),
        ("@RELATION r\n@ATTRIBUTE a NUMERIC\n", {}, r"ARFF file.*loadarff"),
        ("1,2,1,\n2,3,-1,\n", {}, r"line 1, column 4: the column of labels is empty.*delimiter"),
        ("1,2,1\n", {"header": "yes"}, r"`header` is 'yes'; expected None, True or False"),
        ("1,2,1\n", {"label_column": None}, r"`label_column` is None; expected a name"),
        ("1,2,1\n", {"label_column": 1.5}, r"`label_column` is 1.5; expected a name"),
        ("1,2,1\n", {"delimiter": None}, r"`delimiter` is None; expected one character"),
    ],
)
def test_what_cannot_be_told_of_a_table_is_asked(tmp_path, text, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Dataset.from_csv(write(tmp_path, text), **options)


@pytest.mark.parametrize("gap", ["", "NA", "N/A", "nan", "?", "None", "#N/A", "<NA>"])
def test_a_missing_label_is_no_class(tmp_path, gap):
    words = write(tmp_path, f"a,y\n1,yes\n-1,no\n3,{gap}\n")
    for options in ({"positive": "yes"}, {"positive": "yes", "negative": "no"}, {}):
        with pytest.raises(ValueError, match=r"line 4, column 2 \('y'\): the label is missing"):
            Dataset.from_csv(words, **options)
    with pytest.raises(ValueError, match=r"line 4, column 2 .*the label is missing"):
        Dataset.from_csv(write(tmp_path, f"a,y\n1,1\n-1,0\n3,{gap}\n"), positive=1)
    np.savez(tmp_path / "a.npz", inputs=np.eye(3), labels=np.array(["yes", "no", gap]))
    with pytest.raises(ValueError, match=r"`labels\[2\]` is .*no label"):
        Dataset.from_npz(tmp_path / "a.npz", positive="yes")


def test_a_missing_number_among_the_labels_of_an_npz_is_no_class(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.eye(3), labels=[1, 0, np.nan])
    with pytest.raises(ValueError, match=r"`labels\[2\]` is nan, no label"):
        Dataset.from_npz(tmp_path / "a.npz", positive=1)


def test_a_label_that_is_asked_for_is_there_whatever_it_is_called(tmp_path):
    path = write(tmp_path, "a,y\n1,none\n-1,mild\n3,none\n")
    assert Dataset.from_csv(path, positive="none").labels.tolist() == [1, -1, 1]
    assert Dataset.from_csv(path, positive="mild", negative="none").labels.tolist() == [-1, 1, -1]


def test_of_more_than_two_labels_the_second_is_asked_for(tmp_path):
    path = write(tmp_path, "x,kind\n1,a\n2,b\n3,c\n4,a\n")
    with pytest.raises(ValueError, match=r"2 other labels: 'b', 'c'.*`negative='b'`"):
        Dataset.from_csv(path, positive="a")
    two = Dataset.from_csv(path, positive="a", negative="b")
    assert two.inputs.ravel().tolist() == [1, 2, 4] and two.labels.tolist() == [1, -1, 1]
    rest = Dataset.from_csv(path, positive="a", negative=["b", "c"])
    assert rest.labels.tolist() == [1, -1, -1, 1]
    with pytest.raises(ValueError, match=r"`negative` is 'd'; expected one of several labels"):
        Dataset.from_csv(path, positive="a", negative="d")


# -- arrays of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        POINTS[:3].convert_dtypes(),
        POINTS[:3].assign(c=[True, False, True]),
        np.array([[Decimal("1.5")], [Fraction(1, 3)], [2]], dtype=object),
        jnp.eye(3, dtype=jnp.bfloat16),
        np.ma.masked_array(np.eye(3)),
    ],
    ids=["nullable", "a column of booleans", "objects", "bfloat16", "nothing masked"],
)
def test_numbers_of_any_kind_are_taken(inputs, unchecked):
    data = Dataset(inputs, pd.Series([1, -1, 1], dtype="Int64"))
    np.testing.assert_array_equal(data.inputs, np.asarray(inputs).astype(float))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.ma.masked_array(np.eye(3), np.eye(3)), [1, -1, 1], r"`inputs\[0, 0\]` is masked \(3"),
        ([np.ma.masked_array([1.0, 2.0], [0, 1])], [1], r"`inputs\[0\]\[1\]` is masked"),
        (INPUTS, np.ma.masked_array([1, -1, 1], [0, 1, 0]), r"`labels\[1\]` is masked"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), [1, -1], r"`inputs\[1, 0\]` is"),
        (scipy.sparse.csr_array(np.eye(3)), [1, -1, 1], r"is a sparse csr_array.*inputs.toarray"),
        ([["1.5"], ["2"]], [1, -1], r"the type <U3; .*np.asarray\(values, dtype=float\)"),
        (INPUTS, ["yes", "no", "yes"], r"np.where\(np.asarray\(labels\) == 'yes', 1.0, -1.0\)"),
        (INPUTS, np.array(["a", None, "b"], dtype=object), r"`labels\[1\]` is None; .*every point"),
    ],
)
def test_what_is_no_number_is_told_how_to_become_one(inputs, labels, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Dataset(inputs, labels)


def test_the_size_of_data_near_the_end_of_the_range_is_told():
    assert "max |x| = 1.414e+200" in repr(Dataset([[1e200, 1e200]], [1]))

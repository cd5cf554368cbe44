"""Which names a record has: none is given twice, and none is found out too late to be illegal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow import names
from gflow.names import check_names, is_taken, merged
from gflow.record import variables
from gflow.report.variation import read_sweep

PROBLEM = gflow.Problem(gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0))
START = gflow.init.zero_first((2, 3, 1), seed=0)
BATCH = tuple(np.stack([layer, layer]) for layer in START)
UNTIL = gflow.LogRisk(-5)


def flow(**options):
    return gflow.gradient_flow(PROBLEM, START, until=UNTIL, save=3, **options)


def test_every_name_of_every_kind_of_record_is_taken():
    records = [
        flow(keep_weights=True, certify=True),
        gflow.gradient_descent(PROBLEM, START, optax.sgd(0.1), until=gflow.Steps(3), save=2),
        gflow.ensemble(PROBLEM, BATCH, until=UNTIL, save=3),
    ]
    for record in records:
        found = {str(name) for name in (*record.variables, *record.dims)}
        assert {name for name in found if not is_taken(name)} == set()


@pytest.mark.parametrize(
    "name",
    [
        *("margin", "margin_error", "support", "layer", "point", "coordinate", "dual_weights"),
        *("status", "clock_error", "final_weights_1", "initial_weights_2_0", "weights_1"),
        *("support_vectors", "wall_time"),
    ],
)
def test_an_observable_cannot_hide_what_the_record_has(name):
    with pytest.raises(ValueError, match=r"does not use already, such as 'my_"):
        flow(observables={name: lambda problem, weights: jnp.float64(42.0)})


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("train/margin", "has a '/'.*'train_margin'"),
        (" lead", "begins or ends with a blank"),
        ("trail ", "begins or ends with a blank"),
        ("", "is empty"),
        ("two\nlines", "control character"),
        ("@x", "begins with '@'"),
        ("a" * 300, "longer than"),
        ("e\N{COMBINING ACUTE ACCENT}", "normal form"),
    ],
)
def test_names_that_no_file_can_hold_are_refused_before_the_run(name, fault):
    for argument, call in {
        "observables": lambda: flow(observables={name: lambda problem, weights: 1.0}),
        "coordinates": lambda: gflow.ensemble(
            PROBLEM, BATCH, until=UNTIL, coordinates={name: [1, 2]}
        ),
        "grid": lambda: gflow.sweep(lambda **_: (PROBLEM, START), {name: [1]}, until=UNTIL),
    }.items():
        with pytest.raises(ValueError, match=f"`{argument}.*{fault}"):
            call()


def test_an_odd_but_legal_name_can_be_saved(tmp_path):
    name = "Größe, 1. Lage (a+b)"
    record = flow(observables={name: lambda problem, weights: jnp.sum(weights[0] ** 2)})
    assert gflow.load(gflow.save(record, tmp_path / "a.nc"))[name].shape == (3,)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("observables", "words"),
    [
        ([len], "is a list; expected a mapping"),
        ({3: len}, "has the key 3; expected text"),
        ({"a": 3}, "is 3; expected a function"),
        ({"a": lambda p: 1.0}, "raises TypeError"),
        ({"a": lambda p, w: np.linalg.norm(w[0])}, "uses NumPy"),
        ({"a": lambda p, w: {"b": 1.0}}, "returns a dict; expected one real number"),
        ({"a": lambda p, w: None}, "returns a NoneType"),
        ({"a": lambda p, w: jax.lax.complex(w[0], w[0])}, "of type complex128"),
        ({"a": lambda p, w: jax.random.key(0)}, "returns an array of type key"),
        ({"a": lambda p, w: w[0], "a_1": lambda p, w: 1.0}, "`observables\\['a_1'\\]"),
    ],
)
def test_what_a_record_cannot_hold_is_refused_before_the_run(observables, words):
    with pytest.raises(ValueError, match=words):
        flow(observables=observables)


def test_short_numbers_and_truth_values_are_stored_as_what_a_file_knows(tmp_path):
    record = flow(
        observables={
            "short": lambda problem, weights: jnp.sum(weights[0]).astype(jnp.bfloat16),
            "positive": lambda problem, weights: weights[0] > 0,
            "pair_of": lambda problem, weights: [1.0, 2.0],
        }
    )
    loaded = gflow.load(gflow.save(record, tmp_path / "a.nc"))
    assert loaded.short.dtype == np.float32 and loaded.pair_of.shape == (3, 2)
    assert set(np.unique(loaded.positive)) <= {0, 1}


def test_labels_of_members_cannot_replace_what_was_measured():
    for name in ("margin", "status", "admissible", "point"):
        with pytest.raises(ValueError, match=f"`coordinates\\['{name}'\\]` has a name"):
            gflow.ensemble(PROBLEM, BATCH, until=UNTIL, coordinates={name: [1, 2]})
        with pytest.raises(ValueError, match=f"`grid\\['{name}'\\]` has a name"):
            gflow.sweep(lambda **_: (PROBLEM, START), {name: [1, 2]}, until=UNTIL)
    mine = {"scale": lambda problem, weights: 1.0}
    with pytest.raises(ValueError, match="scale"):
        gflow.ensemble(PROBLEM, BATCH, until=UNTIL, observables=mine, coordinates={"scale": [1, 2]})
    # What a run is given may name an axis; the run's own words are kept beside it.
    found = gflow.ensemble(PROBLEM, BATCH, until=UNTIL, save=3, coordinates={"loss": ["a", "b"]})
    assert found.loss.values.tolist() == ["a", "b"]
    assert found.loss_used.values.tolist() == [repr(PROBLEM.loss)] * 2


def test_a_record_with_a_name_twice_is_an_error():
    with pytest.raises(ValueError, match="'support' twice"):
        variables({"support": [1.0]}, {"support": ((), 2.0, "")})
    with pytest.raises(ValueError, match="'a' twice"):
        merged({"a": 1}, {"b": 2}, {"a": 3})


def test_an_axis_of_a_file_whose_key_a_record_uses_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(
        '[data]\ndataset = "separable"\n[network]\nwidths = [2, 3, 1]\n'
        "[flow]\nuntil = { log_risk = -5 }\n"
        "[sweep]\ndata.margin = [0.1, 0.2]\nstart.scale = [1.0]\nflow.rtol = [1e-9]\n"
    )
    assert list(read_sweep(path).grid) == ["data_margin", "scale", "rtol"]


def test_the_proposal_of_a_name_is_one_that_may_be_had():
    for name in ("a/b", "@", "margin/", "\n", "ä/ö"):
        with pytest.raises(ValueError, match="such as '") as refused:
            check_names("x", [name])
        proposed = str(refused.value).split("such as ")[1].strip("'.")
        assert names.fault_of(proposed) is None and not is_taken(proposed)

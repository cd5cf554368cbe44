"""The declared rows of the variables: records hold what they say, and nothing else."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow.quantities import QUANTITIES, Kind, quantity

DATA = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)


def deep():
    problem = gflow.Problem(DATA)
    return problem, gflow.init.admissible(gflow.init.gaussian((2, 3, 1), seed=1), problem)


def other(homogeneity):
    network = gflow.Network(lambda w, x: jnp.dot(w["a"], x), homogeneity=homogeneity)
    return gflow.Problem(DATA, network=network), {"a": np.array([0.3, 0.1])}


@pytest.fixture(scope="module")
def records():
    few = gflow.LogTime(1)
    return {
        "flow": gflow.gradient_flow(*deep(), until=few, save=2, certify=True),
        "descent": gflow.gradient_descent(*deep(), optax.sgd(0.1), until=gflow.Steps(2), save=2),
        "homogeneous": gflow.gradient_flow(*other(1), until=few, save=2, certify=True),
        "any network": gflow.gradient_flow(*other(None), until=few, save=2),
    }


def of_the_run(record):
    return {str(n) for n in record.variables if "weights_" not in n or n == "dual_weights"}


def test_every_variable_of_a_record_is_declared_with_its_dimensions_and_meaning(records):
    for record in records.values():
        for name in of_the_run(record) - set(record.dims) | ({"support"} & set(record.dims)):
            row = QUANTITIES[name if name in QUANTITIES else name.removesuffix("_error")]
            assert record[name].dims == row.dims
            if name in QUANTITIES:
                assert record[name].attrs["long_name"] == row.meaning


def test_a_certified_flow_has_errors_of_exactly_the_certified_variables(records):
    for flow in (records["flow"], records["homogeneous"]):
        there = {name for name in QUANTITIES if name in flow.variables}
        certified = {f"{name}_error" for name in there if QUANTITIES[name].certified}
        estimates = {str(name) for name in flow if str(name).endswith("_error")} - there
        assert estimates == certified


def test_a_record_holds_nothing_that_its_network_cannot_give(records):
    def needs(record):
        return {need for name in record if name in QUANTITIES for need in QUANTITIES[name].needs}

    everything = {"layers", "reference", "homogeneity", "one output", "margins"}
    assert needs(records["flow"]) == everything
    assert needs(records["homogeneous"]) == {"homogeneity", "margins"}
    assert needs(records["any network"]) == {"margins"}


def test_the_size_that_errors_are_relative_to_depends_on_the_kind():
    values = np.array([[3.0, -4.0], [0.0, 0.5]])
    assert QUANTITIES["end_to_end"].kind is Kind.VECTOR
    np.testing.assert_array_equal(quantity("end_to_end").size(values), [[5, 5], [0.5, 0.5]])
    np.testing.assert_array_equal(quantity("log_time").size(values), [[3, 4], [1, 1]])
    np.testing.assert_array_equal(quantity("margin").size(values), abs(values))


def test_a_callers_own_variable_is_a_logarithm_if_its_name_says_so():
    assert quantity("log_sharpness").kind is Kind.LOG
    assert quantity("sharpness").kind is Kind.PLAIN


def test_what_tends_to_zero_says_below_which_size_it_is_zero():
    for name, row in QUANTITIES.items():
        assert (row.zero > 0) == (row.kind in (Kind.ANGLE, Kind.ANGLE_SQUARED)), name

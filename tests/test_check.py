"""``gflow.check()``: its table, and closed forms that no other test follows a flow onto."""

import math
from types import SimpleNamespace

import pytest

import gflow
from gflow.report import check as checks

# At the default tolerances every closed form is met to eight digits.
ERROR = 1e-8


@pytest.mark.parametrize("name", ["2 diagonal layers", "2 matrices, square loss"])
def test_a_flow_meets_its_closed_form(name):
    (flow,) = [case[2] for case in checks.CASES if case[0] == name]
    assert flow().error() < ERROR


def test_every_case_names_a_closed_form():
    assert all(callable(getattr(gflow.exact, oracle)) for _, oracle, _ in checks.CASES)


def test_the_table_says_what_passed(monkeypatch, capsys):
    def with_error(error):
        return lambda: SimpleNamespace(error=lambda: error)

    cases = (("good", "risk_clock", with_error(1e-12)), ("bad", "limits", with_error(1e-5)))
    monkeypatch.setattr(checks, "CASES", cases)
    found = checks.check(show=True)
    assert not found.passed
    assert [row.passed for row in found] == [True, False]
    assert found.summary.startswith("1 of 2 closed forms to 8 digits")
    assert "fewer than 8" in capsys.readouterr().out
    assert "12.0" in str(found)


def test_a_flow_that_does_not_arrive_has_no_digits():
    row = gflow.Check("lost", "risk_clock", math.inf, 0.0)
    assert row.digits == 0.0
    assert not row.passed

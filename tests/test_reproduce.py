"""The main job, run once at its quick size, and its promises to who reads the result."""

import re
from pathlib import Path
from types import SimpleNamespace

import diffrax
import matplotlib.image
import pytest

import gflow
from gflow.__main__ import main
from gflow.analysis.table import markdown
from gflow.analysis.theorems import verify
from gflow.report import experiment as ex, reproduce

RUNS = ["flow, 4 layers", "flow, 1 layer", "descent, 4 layers", "descent, 1 layer"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder, the exit code and the terminal's text of `gflow reproduce --quick`."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("reproduction")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(["reproduce", "--quick", "--out", str(folder), "--dataset", "iris-0-1"])
    return folder, code, text.getvalue()


def test_every_applicable_claim_holds(quick):
    _, code, text = quick
    assert code == 0, text
    counted = re.search(r"(\d+) of (\d+) applicable claims hold", text)
    assert counted is not None and counted[1] == counted[2] and int(counted[1]) >= 60


def test_the_terminal_shows_a_table_with_every_claim_and_run(quick):
    _, _, text = quick
    (*_, header) = [line for line in text.splitlines() if line.startswith("claim ")]
    assert all(run in header for run in RUNS)
    for claim in ("risk vanishes", "every norm grows", "layers become rank one", "layers align"):
        assert re.search(rf"^{claim} .*holds", text, re.MULTILINE)


def test_the_report_has_every_claim_with_value_bound_and_verdict(quick):
    folder, _, _ = quick
    report = (folder / "report.md").read_text(encoding="utf-8")
    for dataset in ("synthetic", "iris-0-1"):
        for run in RUNS:
            record = gflow.load(folder / dataset / f"{ex.slug(run)}.nc")
            for claim in verify(record):
                row = markdown([run, claim.name, claim.value_text], []).splitlines()[0]
                assert row.removesuffix("|") in report
    assert "max margin lies between" in report
    for figure in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (folder / figure).is_file()


def test_figures_are_there_and_not_blank(quick):
    folder, _, _ = quick
    names = ["figure_1b.png", "margin_and_direction.png", "summary.png"]
    wanted = [folder / "synthetic" / "figure_1a.png"]
    wanted += [folder / part / name for part in ("synthetic", "iris-0-1") for name in names]
    for path in wanted:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05


def test_records_reach_the_goal_of_the_flow_and_say_how_they_were_made(quick):
    folder, _, _ = quick
    flow = gflow.load(folder / "synthetic" / "flow-4-layers.nc")
    assert float(flow.log_risk[-1]) == pytest.approx(reproduce.QUICK_GOALS[0])
    assert flow.attrs["status"] == "reached" and flow.attrs["kind"] == "flow"
    assert gflow.load(folder / "synthetic" / "descent-1-layer.nc").attrs["kind"] == "descent"


def test_data_that_are_not_separable_give_a_certificate_and_no_claim(tmp_path):
    data = gflow.Dataset([[1.0, 0.0], [2.0, 0.1], [1.0, 0.2]], [1, -1, 1], name="mixed")
    weights = gflow.init.zero_first((2, 2, 1))
    quick_to_compile = {"solver": diffrax.Tsit5(), "save": 10}
    until = gflow.LogRisk(-5) | gflow.Steps(20)
    run = ex.one_run("flow", weights, until, options=quick_to_compile)
    todo = ex.Experiment("mixed", gflow.Problem(data), [run])
    said = []
    (outcome,) = reproduce.compute_and_write([todo], tmp_path, title="test", say=said.append)
    assert outcome.failed == []
    holds = {claim.name: claim.holds for claim in outcome.claims["flow, 2 layers"]}
    for claim in ("risk vanishes", "layers align", "direction is max margin", "margin is maximal"):
        assert holds[claim] is None
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Not separable through the origin" in report and "max_margin().dual" in report


def test_a_failing_claim_and_an_early_stop_are_in_the_conclusion():
    failing = SimpleNamespace(name="risk vanishes", holds=False)
    record = SimpleNamespace(attrs={"status": "stalled", "message": "the step size vanished"})
    problem = gflow.Problem(gflow.datasets.one_datum())
    outcome = ex.Outcome(ex.Experiment("e", problem, []))
    outcome.claims, outcome.records = {"flow": [failing]}, {"flow": record}
    text = ex.conclusion([outcome])
    assert "0 of 1 applicable claims hold" in text
    assert "FAILS: e, flow: risk vanishes" in text
    assert "stopped early: e, flow: the step size vanished" in text


def test_folders_are_named_by_the_experiment():
    assert ex.slug("flow, 4 layers") == "flow-4-layers"
    assert Path(ex.slug("digits 3/5")).name == "digits-3-5"

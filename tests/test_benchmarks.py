"""The benchmarks run, and what the README says of them is what they found."""

import ast
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import users
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the quick run of the runner leaves: peers by wall time, the cheapest to run."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--only", "reach"]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True, text=True)
    return folder


def test_a_quick_run_measures_gflow_and_a_peer_on_the_same_path(quick):
    found = json.loads((quick / "reach.json").read_text())
    rows = {row["method"]: row for row in found["summary"]}
    assert {"gflow", "SciPy DOP853"} == set(rows)
    for row in rows.values():
        assert row["why"] == "done" and row["reached"] == found["goal"] == -50
        assert row["direction_gap"] < 1e-5 and row["seconds_there"] > 0


def test_a_run_leaves_a_figure_and_a_table_of_everything(quick):
    assert (quick / "reach.png").stat().st_size > 10_000
    table = (quick / "README.md").read_text()
    assert "How far does each method get" in table and "[png](reach.png)" in table


FOUND = {
    "work_precision": lambda found: [
        row["error"] < 1e-3
        for row in found["panels"][0]["rows"]
        if row["method"].startswith("GaussNewton")
    ],
    "scaling": lambda found: [row["finished"] for row in found["rows"]["width"]],
    "descent_throughput": lambda found: [row["difference"] <= 1e-12 for row in found["rows"]],
    "start_up": lambda found: [row["warm_s"] < row["first_call_s"] for row in found["calls"]],
    "ensembles": lambda found: [found["largest_difference"] < 1e-8, found["utilisation"] > 0],
    "memory": lambda found: [row["peak_mib"] > 0 for row in found["weights"]],
}
"""Name of a comparison: what is true of each row of its result, on any machine."""


@pytest.mark.parametrize("name", FOUND)
def test_every_comparison_has_a_quick_run(name, tmp_path, monkeypatch):
    # As scripts, but in this process: they share what they import and compile.
    script = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(script.parent)
    with users.settings(tmp_path), jax.enable_x64(True), threadpool_limits():
        runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["quick"]
    true = FOUND[name](found)
    assert true and all(true)


def test_the_readme_shows_what_the_benchmark_found():
    readme = imported(ROOT / "docs" / "readme.py")
    table = readme.peers_table(json.loads((RESULTS / "reach.json").read_text()))
    assert f"<!-- peers -->\n{table}\n<!-- end of peers -->" in readme.README.read_text()


def test_no_peer_comes_within_ten_times_of_gflow_far_out():
    found = json.loads((RESULTS / "reach.json").read_text())
    assert found["goal"] == -1e4 and not found["quick"] and len(found["summary"]) >= 16
    for row in found["summary"]:
        if not row["method"].startswith("gflow") and "gflow's clock" not in row["method"]:
            assert row["times_ours"] is None or row["times_ours"] >= 10


def test_every_result_says_how_it_was_made():
    for path in RESULTS.glob("*.json"):
        document = json.loads(path.read_text())
        script = ROOT / document["command"].split()[1]
        assert script.exists() and script.stem == path.stem.split("-")[0]
        assert document["versions"] and not document["quick"]


def test_every_benchmark_is_listed_with_a_question():
    runner = imported(ROOT / "benchmarks" / "run.py")
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    for name, path in runner.scripts().items():
        assert f"`{name}.py`" in listed
        assert "?" in runner.question(path)


def test_every_name_that_a_benchmark_takes_from_gflow_is_there():
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gflow"):
                names = ", ".join(each.name for each in node.names)
                exec(f"from {node.module} import {names}", {})

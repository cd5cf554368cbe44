import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gflow
from gflow.__main__ import BAD_INPUT, main
from gflow.report import config

EXAMPLE = Path(__file__).parent.parent / "examples" / "two_species.toml"

GOOD = """
[data]
dataset = "two-point"
[network]
widths = [2, 3, 1]
[flow]
until = { log_risk = -20 }
"""


@pytest.fixture
def said(tmp_path, capsys):
    """Run a configuration that is at fault; what it says, which is one error and no traceback."""

    def say(text, *arguments):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        code = main(["run", str(path), "--out", str(tmp_path / "out"), *arguments])
        err = capsys.readouterr().err
        assert code == BAD_INPUT
        assert err.startswith("gflow: error: ") and "Traceback" not in err
        return err

    return say


def test_version_names_what_a_result_depends_on(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert {"gflow", "jax", "diffrax"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    }


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == BAD_INPUT
    assert "reproduce" in capsys.readouterr().out


def test_the_module_runs_as_a_program_and_help_imports_nothing_heavy():
    code = (
        "import sys; from gflow.__main__ import _parser; _parser().format_help(); "
        "print([m for m in ('matplotlib', 'sklearn', 'scipy.optimize') if m in sys.modules])"
    )
    root = Path(gflow.__file__).parent.parent
    for arguments, expected in ((["-m", "gflow", "--help"], "reproduce"), (["-c", code], "[]")):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=root, check=True
        )
        assert expected in done.stdout


def test_malformed_toml_is_reported_with_line_and_column(said):
    assert "line 2, column" in said("[data]\nfile = \n")


def test_an_unreadable_configuration_is_named(capsys):
    assert main(["run", "/nowhere/config.toml"]) == BAD_INPUT
    assert "/nowhere/config.toml" in capsys.readouterr().err


def test_a_configuration_that_is_not_text_is_reported(tmp_path, capsys):
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["run", str(path)]) == BAD_INPUT
    assert "UTF-8" in capsys.readouterr().err


def test_a_data_file_that_does_not_exist_is_named(said):
    assert "nothing.csv" in said(GOOD.replace('dataset = "two-point"', 'file = "nothing.csv"'))


def test_a_malformed_data_file_is_reported_with_its_line(said, tmp_path):
    (tmp_path / "bad.csv").write_text("a,b,y\n1,2,1\n3,x,-1\n")
    assert "line 3" in said(GOOD.replace('dataset = "two-point"', 'file = "bad.csv"'))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[flow]", "[flwo]", ["`flwo`", "data, network", "flow"]),
        ("widths =", "widhts =", ["[network] widths is missing"]),
        ("until =", "save = 3\nuntill =", ["[flow] until is missing"]),
        ("[flow]", "[loss]\nname = 'logistc'\n[flow]", ["logistc", "exponential", "Did you mean"]),
        ("[flow]", "[start]\nmethod = 'xaver'\n[flow]", ["xaver", "'xavier'"]),
        ("[flow]", "[flow]\nclock = 'risky'", ["risky", "log_risk", "log_time"]),
        ("[flow]", "[flow]\nsolver = 'Euler'", ["Euler", "Dopri8"]),
        ("[flow]", "[flow]\nrtoll = 1e-9", ["`rtoll`", "[flow]", "rtol"]),
        ("[flow]", "[flow]\nsave = 'many'", ["[flow] save is 'many'", "whole number"]),
        ("[flow]", "[flow]\nsave = true", ["[flow] save is True", "whole number"]),
        ("[flow]", "[descent]\nuntil = { steps = 3 }\noptimizer = 'sdg'\n[flow]", ["sdg", "'sgd'"]),
        ("log_risk", "log_rsk", ["log_rsk", "log_time", "steps", "Did you mean 'log_risk'"]),
        ("two-point", "three-point", ["three-point", "separable"]),
        ("[2, 3, 1]", "[4, 3, 1]", ["the first must be 2"]),
        ("[2, 3, 1]", "[2, 3, 2]", ["the last 1"]),
        ("[2, 3, 1]", "[2, 0, 1]", ["positive whole numbers"]),
        ("[flow]", "[start]\nseed = -1\n[flow]", ["[start] `seed` is -1; expected a whole number"]),
        ("log_risk = -20", "steps = -3", ["[flow] until steps: `Steps(-3)`"]),
        ("[flow]\nuntil = { log_risk = -20 }", "", ["neither [flow] nor [descent]"]),
    ],
)
def test_a_fault_names_its_place_and_what_is_known(said, old, new, expected):
    assert old in GOOD
    err = said(GOOD.replace(old, new))
    for text in expected:
        assert text in err


def test_until_asks_for_a_table_until_it_gets_one(said):
    assert "expected a table" in said(GOOD.replace("{ log_risk = -20 }", "-20"))


def test_optimizer_settings_that_do_not_fit_are_reported(said):
    text = GOOD.replace("[flow]", "[descent]\noptimizer = 'sgd'")  # without a learning rate
    assert "learning_rate" in said(text)


def test_a_folder_that_cannot_be_written_is_reported_before_computing(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    for command in (["reproduce"], ["run", str(EXAMPLE)]):
        assert main([*command, "--out", out]) == BAD_INPUT
        captured = capsys.readouterr()
        assert "cannot be written" in captured.err and "--out" in captured.err
        assert "log R" not in captured.out


def test_an_unknown_data_set_lists_the_known_ones_before_computing(tmp_path, capsys):
    assert main(["reproduce", "--out", str(tmp_path), "--dataset", "mnist"]) == BAD_INPUT
    captured = capsys.readouterr()
    assert "'mnist'" in captured.err and "digits-A-B" in captured.err and captured.out == ""


def test_the_example_documents_every_key_and_is_read():
    experiment = config.read(EXAMPLE)
    assert [run.label for run in experiment.runs] == [
        "flow, 3 layers",
        "flow, 1 layer",
        "descent, 3 layers",
        "descent, 1 layer",
    ]
    assert experiment.data.separable and experiment.data.dim == 3
    assert np.linalg.norm(experiment.data.inputs, axis=1).max() == pytest.approx(1)
    text = EXAMPLE.read_text(encoding="utf-8")
    for known in (config.LOSSES, config.STARTS, config.RULES, config.CLOCKS):
        assert all(name in text for name in known)
    assert all(name in text for name in config.GFLOW_OPTIMIZERS)
    flow, descent = text.split("[descent]")
    assert all(name in flow for name in config.plain_options(gflow.gradient_flow))
    assert all(name in descent for name in config.plain_options(gflow.gradient_descent))


def test_a_file_may_set_every_plain_option_of_a_run():
    document = {
        "data": {"dataset": "two-point"},
        "network": {"widths": [2, 3, 1]},
        "flow": {"until": {"log_risk": -5}, "atol": 1e-8, "certify": True, "clock": "time"},
        "descent": {"until": {"steps": 4}, "optimizer": "polyak", "batch_size": 2, "seed": 7},
    }
    flow, descent = config.build(document, folder=Path(), name="all").runs
    assert flow.options == {"atol": 1e-8, "certify": True, "clock": gflow.clocks.Time()}
    assert descent.options == {"batch_size": 2, "seed": 7}


def test_stored_weights_and_arrays_of_an_npz_file_are_used(tmp_path):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(3, 2)), rng.normal(size=(1, 3))]
    np.savez(tmp_path / "w.npz", weights_1=weights[0], weights_2=weights[1])
    np.savez(tmp_path / "d.npz", x=np.eye(2), labels=np.array([1.0, -1.0]))
    document = {
        "data": {"file": "d.npz", "inputs": "x"},
        "network": {"widths": [2, 3, 1]},
        "start": {"file": "w.npz", "admissible": False},
        "flow": {"until": {"steps": 5, "time": 1.0}},
    }
    experiment = config.build(document, folder=tmp_path, name="stored")
    for stored, used in zip(weights, experiment.runs[0].weights, strict=True):
        np.testing.assert_array_equal(stored, used)
    document["network"]["widths"] = [2, 4, 1]
    with pytest.raises(ValueError, match="shapes"):
        config.build(document, folder=tmp_path, name="stored")


def test_every_kind_of_optimizer_can_be_named(tmp_path):
    for table in (
        {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "on_log_risk": True},
        {"optimizer": "adam", "learning_rate": 1e-3},
        {"optimizer": "loss_scaled"},
        {"optimizer": "paper_steps", "sharper": True},
    ):
        document = {
            "data": {"dataset": "separable", "n": 10, "margin": 0.2},
            "network": {"widths": [2, 3, 1]},
            "descent": {"until": {"steps": 3}, **table},
        }
        (run,) = config.build(document, folder=tmp_path, name="x").runs
        assert run.is_descent


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert config.read(path).name == "c"


def test_a_file_with_a_column_of_classes_runs_with_cross_entropy(tmp_path, capsys):
    rows = ["x,y,kind"]
    for i in range(15):
        angle = 2.1 * (i % 3) + 0.05 * (i - 7)
        rows.append(f"{math.cos(angle):.3f},{math.sin(angle):.3f},{['oak', 'elm', 'ash'][i % 3]}")
    (tmp_path / "trees.csv").write_text("\n".join(rows) + "\n")
    text = """
        data = { file = "trees.csv", classes = true }
        network = { widths = [2, 3] }
        flow = { save = 12, until = { log_risk = -30 } }
    """
    (tmp_path / "trees.toml").write_text(text)
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "trees.toml"), "--out", str(out), "--no-progress"]) == 0
    assert "3 classes" in (said := capsys.readouterr().out) and "layers become rank K - 1" in said
    record = gflow.load(next(out.glob("*.nc")))
    assert record.attrs["loss"].startswith("CrossEntropy") and record.attrs["num_classes"] == 3
    assert record.log_risk[-1] == pytest.approx(-30)
    (tmp_path / "one.toml").write_text(text.replace("[2, 3]", "[2, 1]"))
    assert main(["run", str(tmp_path / "one.toml"), "--out", str(out)]) == BAD_INPUT
    assert "the last 3, the 3 outputs" in capsys.readouterr().err

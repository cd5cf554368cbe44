import re
from pathlib import Path

import matplotlib as mpl

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs_in_twelve_lines_and_every_claim_holds(capsys):
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names = {}
    exec(compile(code, str(README), "exec"), names)
    plt.close("all")
    assert names["flow"].attrs["status"] == "reached"
    assert (
        "FAILS" not in capsys.readouterr().out and not names["gflow"].verify(names["flow"]).failed
    )


def test_the_picture_of_the_readme_is_small():
    picture = README.parent / "docs" / "figures" / "figure_1.png"
    assert 10_000 < picture.stat().st_size < 150_000

"""How long does a newcomer wait? From a clone to the first figure, and notebook 01 in Jupyter.

The committed project is cloned into a new folder, its environment made there by make as the README
says, then the README's twelve lines run, which draw a figure. After that Jupyter is installed, and
notebook 01 runs unchanged through `jupyter nbconvert --execute`. Wall times; packages come from
whatever index and cache pip and uv are set up with.

    python benchmarks/newcomer.py [--quick] [--out FOLDER]
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent


def step(rows, what, command, folder):
    """Run and time one step; its output is shown only if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    rows.append({"step": what, "seconds": time.perf_counter() - began})
    if done.returncode:
        raise SystemExit(f"{what} fails:\n{done.stdout}{done.stderr}")
    return done.stdout


def first_lines(clone):
    """The README's example, which saves its figure."""
    (code,) = re.findall(r"```python\n(.*?)```", (clone / "README.md").read_text(), re.DOTALL)
    save = "import matplotlib.pyplot as plt\nplt.savefig('first.png')\n"
    (clone / "first.py").write_text(f"import matplotlib\nmatplotlib.use('Agg')\n{code}{save}")


def main():
    options = common.begin(common.parser(__doc__))
    report = common.Report(__file__, options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "gflow"
        step(rows, "git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], folder)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        environment = clone / f".venv-{version}"
        stamp = f"{environment.name}/.with-core"
        python = f"PYTHON={sys.executable}"
        step(rows, "set-up", ["make", stamp, python, f"VERSION={version}"], clone)
        first_lines(clone)
        own = str(environment / "bin" / "python")
        step(rows, "first figure", [own, "first.py"], clone)
        size = (clone / "first.png").stat().st_size
        until_figure = sum(row["seconds"] for row in rows)
        step(rows, "import gflow, again", [own, "-c", "import gflow"], clone)
        if not options.quick:
            uv = [str(environment / "bin" / "uv"), "pip", "install", "--quiet", "--python", own]
            step(rows, "Jupyter's set-up", [*uv, "-e", ".[notebooks]"], clone)
            jupyter = [own, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
            book = "notebooks/01_first_flow.ipynb"
            step(rows, "notebook 01", [*jupyter, "--output", "run.ipynb", book], clone)
            cells = json.loads((clone / "notebooks" / "run.ipynb").read_text())["cells"]
            same = json.loads((clone / book).read_text())["cells"]
            assert [cell["source"] for cell in cells] == [cell["source"] for cell in same]
    common.table(rows, "step:s seconds:.1f")
    print(f"clone to first figure: {until_figure:.1f} s, {size} bytes of PNG")
    report.write(None, rows=rows, clone_to_figure_s=until_figure, figure_bytes=size)


if __name__ == "__main__":
    main()

"""Make the README's picture and its table of results: ``python docs/readme.py``.

The picture is the paper's figure 1 on synthetic data, the table the claims on the same runs; both
come from the first experiment of ``gflow reproduce``. The README is rewritten between its markers.
"""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from gflow.report import experiment as ex, plot, reproduce

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "figures" / "figure_1.png"
README = ROOT / "README.md"


def draw(outcome: ex.Outcome) -> None:
    """Figures 1a and 1b side by side."""
    flows = {k: r for k, r in outcome.records.items() if r.attrs["kind"] == "flow"}
    deep = {k: r for k, r in outcome.records.items() if r.sizes["layer"] > 1}
    _, axes = plt.subplots(1, 2, figsize=(7.4, 3.1), layout="constrained")
    plot.decision_lines(outcome.experiment.data, flows, ax=axes[0])
    plot.rank_one(deep, ax=axes[1])
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    plot.save_figure(axes, PICTURE, dpi=150)


def fill(outcome: ex.Outcome) -> None:
    """Put the table of claims between the README's markers."""
    header, rows = ex.overview_rows(outcome)
    code = [[row[0], *(f"`{cell}`" for cell in row[1:3]), *row[3:]] for row in rows]
    table = ex.markdown_table(header, code)
    text = README.read_text(encoding="utf-8")
    block = f"<!-- results -->\n{table}\n<!-- end of results -->"
    pattern = r"<!-- results -->.*?<!-- end of results -->"
    README.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    mpl.use("Agg")
    synthetic = ex.follow(reproduce.experiments()[0])
    draw(synthetic)
    fill(synthetic)

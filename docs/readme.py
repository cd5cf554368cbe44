"""Make the README's picture and the documentation's tables: ``python docs/readme.py``.

The picture is the paper's figure 1 on synthetic data, the table of results the claims on the same
runs; both come from the first experiment of ``gflow reproduce``. The table of peers comes from
``benchmarks/results/reach.json``; ``--benchmarks`` renews it alone. The table of variables in
``docs/api.md`` comes from ``gflow/quantities.py``; ``--variables`` renews it alone. Pages are
rewritten between their markers.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from gflow.analysis.table import markdown
from gflow.quantities import QUANTITIES
from gflow.report import experiment as ex, plot, reproduce

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "figures" / "figure_1.png"
README, API = ROOT / "README.md", ROOT / "docs" / "api.md"
REACH = ROOT / "benchmarks" / "results" / "reach.json"


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
    table = markdown(header, code)
    put("results", table)


def put(marker: str, block: str, page: Path = README) -> None:
    """Replace what stands between two markers of a page."""
    text = page.read_text(encoding="utf-8")
    whole = f"<!-- {marker} -->\n{block}\n<!-- end of {marker} -->"
    pattern = rf"<!-- {marker} -->.*?<!-- end of {marker} -->"
    page.write_text(re.sub(pattern, lambda _: whole, text, flags=re.DOTALL), encoding="utf-8")


def variables_table() -> str:
    """What a record may hold, one row a variable."""
    rows = [
        (
            f"`{name}`",
            ", ".join(row.dims),
            f"`{row.meaning}`",
            "yes" if row.certified else "",
            ", ".join(row.needs),
        )
        for name, row in QUANTITIES.items()
    ]
    # Not `markdown`: in code the site's Markdown takes bars as they are.
    header = ("variable", "dimensions", "meaning", "certified", "needs")
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def peers_table(found: dict[str, Any]) -> str:
    """The table of peers from what ``benchmarks/reach.py`` wrote, and who is faster where."""
    rows = found["summary"]
    lent = ", gflow's clock"
    mine = {row["method"]: row for row in rows}
    body = []
    for row in rows:
        against = "gflow's solver alone" if lent in row["method"] else "gflow"
        ratio = row["times_ours"]
        if row["method"] == against:
            times = ""
        elif ratio is None:
            times = "unable" if row["reached"] is not None else row["why"]
        else:
            times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
        name = row["method"].replace(lent, "")
        body.append(
            [
                f"{name}, lent gflow's clock" if lent in row["method"] else name,
                *(_seconds(row[key]) for key in ("to_-10", "to_-100", "to_goal")),
                times,
                "" if row["reached"] is None else f"{row['reached']:g}",
                "" if row["why"] == "done" else row["why"],
            ]
        )
    header = [
        "method",
        "to -10",
        "to -100",
        f"to {found['goal']:g}",
        "over gflow",
        "reached",
        "why",
    ]
    sooner = {
        target: [
            row["method"]
            for row in rows
            if lent not in row["method"]
            and not row["method"].startswith("gflow")
            and row[key] is not None
            and row[key] < mine["gflow"][key]
        ]
        for target, key in (("-10", "to_-10"), ("-100", "to_-100"))
    }
    told = [
        f"Seconds to a log R, warm, {found['cores']} cores at load average "
        f"{found['load_average_before'][0]:.0f}; made by `{found['command']}`. "
        f"A run of a peer may take {found['limit_s']:g} s. Peers lent gflow's clock are held "
        "against its solver alone, which like them returns final weights only.",
        "",
        markdown(header, body),
        "",
        *(
            f"- To log R = {target} sooner than gflow's whole call: {', '.join(names)}."
            for target, names in sooner.items()
            if names
        ),
    ]
    return "\n".join(told)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmarks", action="store_true", help="renew the table of peers alone")
    parser.add_argument("--variables", action="store_true", help="renew that of variables alone")
    options = parser.parse_args()
    mpl.use("Agg")
    if not options.benchmarks:
        put("variables", variables_table(), API)
    if not options.variables:
        put("peers", peers_table(json.loads(REACH.read_text(encoding="utf-8"))))
    if not (options.benchmarks or options.variables):
        synthetic = ex.follow(reproduce.experiments()[0])
        draw(synthetic)
        fill(synthetic)

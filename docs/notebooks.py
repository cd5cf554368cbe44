"""The notebooks as pages of the site, and a gallery of their figures that links to them.

A hook of MkDocs: pages and pictures are made from `notebooks/` when the site is built, with the
outputs that are stored in the files; nothing is run.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parent.parent / "notebooks"


class Notebook(NamedTuple):
    """A notebook as a page."""

    name: str
    title: str
    question: str
    text: str
    figures: dict[str, bytes]
    """The pictures by file name, in order."""


def page_of(path: Path) -> Notebook:
    """A notebook's cells and stored outputs as Markdown."""
    content = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in content["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if cell["cell_type"] == "code" and source:
            parts.append(_fenced(source, "python"))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(figures) + 1}.png"
                figures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure {len(figures)} of this notebook]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                if text:
                    parts.append(_fenced(text, "text"))
    told = re.search(r"\*\*Question\.\*\*\s*(.*?)(?:\n\n|$)", parts[0], re.DOTALL)
    return Notebook(
        name=path.stem,
        title=parts[0].splitlines()[0].lstrip("# "),
        question=" ".join(told[1].split()) if told else "",
        text="\n\n".join(parts),
        figures=figures,
    )


def gallery(notebooks: list[Notebook]) -> str:
    """The page with all figures, each of which leads to its notebook."""
    parts = ["# Gallery", "Every figure of the notebooks; each leads to the page that makes it."]
    for notebook in notebooks:
        parts.append(f"## [{notebook.title}](notebooks/{notebook.name}.md)")
        parts.append(notebook.question)
        parts += [
            f"[![Figure {number}: {_plain(notebook.title)}](notebooks/{name})]"
            f"(notebooks/{notebook.name}.md)"
            for number, name in enumerate(notebook.figures, start=1)
        ]
    return "\n\n".join(parts)


def on_config(config: Any) -> Any:
    """Called by MkDocs first: the menu gets the pages."""
    listed = [{_plain(each.title): f"notebooks/{each.name}.md"} for each in _all()]
    config.nav = [*config.nav, {"Notebooks": [{"Gallery": "gallery.md"}, *listed]}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Called by MkDocs when it has the files of `docs/`: those made here join them."""
    notebooks = _all()
    files.append(File.generated(config, "gallery.md", content=gallery(notebooks)))
    for notebook in notebooks:
        place = f"notebooks/{notebook.name}.md"
        files.append(File.generated(config, place, content=notebook.text))
        for name, picture in notebook.figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def _all() -> list[Notebook]:
    return [page_of(path) for path in sorted(FOLDER.glob("*.ipynb"))]


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(title: str) -> str:
    """A title without equations and marks, for menus and descriptions."""
    plain = re.sub(r"\$\\log R = -10\^(\d)\$", r"log R = -1e\1", title)
    return re.sub(r"[$\\`*]", "", plain)

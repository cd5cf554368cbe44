import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_the_documentation_runs(page, tmp_path, monkeypatch):
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, str(page), "exec"), {})
    plt.close("all")


def test_every_page_is_in_the_menu_and_every_public_name_in_the_api():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {page.name}" in menu for page in PAGES)
    names = set(re.findall(r"(\w+) as \1", (ROOT / "gflow/__init__.py").read_text()))
    listed = set(re.findall(r"^::: gflow\.(\w+)", (ROOT / "docs/api.md").read_text(), re.M))
    assert listed <= names
    returned = {"Claim", "Claims", "Check", "Checks", "FlowState"}  # by functions listed there
    assert names - listed <= returned

import re
import runpy
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
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: gflow\.(\w+)", api, re.M))
    assert listed == names
    plots = (ROOT / "gflow/report/plot/__init__.py").read_text()
    drawn = set(re.findall(r"([a-z_]+) as \1", plots))  # constants are not in lower case
    assert drawn == set(
        re.findall(r"^::: gflow\.plot\.(\w+)", (ROOT / "docs/api.md").read_text(), re.M)
    )


def test_the_api_lists_the_variables_that_records_declare():
    table = runpy.run_path(str(ROOT / "docs/readme.py"))["variables_table"]()
    assert table in (ROOT / "docs/api.md").read_text(encoding="utf-8")

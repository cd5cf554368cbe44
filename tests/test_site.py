import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest

pytest.importorskip("mkdocs", reason="the site is built with the extra `docs` only")

ROOT = Path(__file__).parent.parent
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src"}
"""What a browser fetches by itself; a `link` it fetches if it is a style or an icon."""


class Page(HTMLParser):
    """The anchors of a page, its links and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")):
            self.loads.append(given[LOADED[tag]])
        if tag == "link" and {"stylesheet", "icon"} & set((given.get("rel") or "").split()):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_notebook_is_a_page_and_its_figures_are_in_the_gallery(site, pages):
    gallery = pages[site / "gallery.html"]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = pages[site / "notebooks" / f"{notebook.stem}.html"]
        figures = [source for source in page.loads if source.startswith(notebook.stem)]
        assert figures
        assert {f"notebooks/{source}" for source in figures} <= set(gallery.loads)
        assert f"notebooks/{notebook.stem}.html" in gallery.links
    # And the menu of every page leads to all of them.
    assert "notebooks/01_first_flow.html" in pages[site / "index.html"].links


def test_links_and_anchors_of_the_site_lead_somewhere_and_nothing_is_loaded_from_elsewhere(pages):
    broken = defaultdict(list)
    for path, page in pages.items():
        for target in {*page.links, *page.loads}:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    broken[path.name].append(f"loads {target}")
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                broken[path.name].append(target)
            elif parts.fragment and there in pages:
                known = unquote(parts.fragment) in pages[there].anchors | {"__skip"}
                broken[path.name] += [] if known else [target]
    assert not any(broken.values()), dict(broken)


@pytest.mark.skipif(
    browser.CHROMIUM is None,
    reason="no Chromium or Chrome here; without one, links, anchors and images are checked in the "
    "HTML alone (Debian: apt install chromium)",
)
def test_every_page_opens_in_a_browser_without_an_error(pages, tmp_path):
    opened = browser.Browser(tmp_path)
    try:
        faults = {path.name: found for path in pages if (found := opened.faults(path))}
    finally:
        opened.close()
    assert not faults, faults

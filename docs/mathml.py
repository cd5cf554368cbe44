"""Equations of the site become MathML when it is built: no script, no font, no network.

A hook of MkDocs; `pymdownx.arithmatex` marks what is mathematics, here it is converted.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
WITHIN = re.compile(r'\$<span class="arithmatex">\\\((.*?)\\\)</span>\$', re.DOTALL)
"""A displayed equation within a paragraph, which the extension takes for an inline one."""
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def mathml(text: str) -> str:
    """A page of HTML with its equations converted."""
    text = BLOCK.sub(lambda found: f'<div class="equation">{_display(found)}</div>', text)
    text = WITHIN.sub(lambda found: f'<span class="equation">{_display(found)}</span>', text)
    return INLINE.sub(lambda found: _convert(found.group(1), "inline"), text)


def _display(found: "re.Match[str]") -> str:
    return _convert(found.group(1), "block")


def _convert(latex: str, display: str) -> str:
    # The converter knows \lvert and \lVert by their plain names only.
    latex = html.unescape(latex)
    for name, plain in ((r"\\[lr]vert(?![a-z])", r"\\vert "), (r"\\[lr]Vert(?![a-z])", r"\\Vert ")):
        latex = re.sub(name, plain, latex)
    return convert(latex, display=display)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return mathml(html)

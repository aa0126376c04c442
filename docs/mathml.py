"""Formulas of the site as MathML, made when it is built: a page fetches and runs nothing to show them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""

    def render(match: re.Match[str]) -> str:
        latex = unescape(match[3]).strip().replace("{aligned}", "{align*}")  # the one that the converter knows
        mathml = convert(latex, display="block" if match[2] == "[" else "inline")
        mathml = mathml.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em" />')
        return re.sub(r'columnalign="(left|right)"', r'style="text-align: \1"', mathml)  # which browsers read

    html = _FORMULA.sub(render, html)
    return html.replace("::</p>", ":</p>")  # docstrings mark literal blocks as reStructuredText does

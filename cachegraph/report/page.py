"""The report as one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_SCRIPTS = ("util", "plan", "graph", "compare", "cost", "tokens", "quality", "main")


def page(data: Mapping[str, Any]) -> str:
    """The page that draws :func:`cachegraph.report.data.report_data`.

    Names are data to it, never markup: what could end the element that holds the data is escaped.
    """
    folder = files("cachegraph.report") / "page"
    script = "\n".join((folder / f"{name}.js").read_text() for name in _SCRIPTS)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    parts = {
        "/*STYLE*/": (folder / "page.css").read_text(),
        "/*SCRIPT*/": script,
        "/*DATA*/": text.replace("<", "\\u003c").replace("\u2028", "\\u2028"),
    }
    # Parts are put in one by one between what surrounds them, so that none is searched for others.
    rest, made = (folder / "page.html").read_text(), ""
    for mark, part in sorted(parts.items(), key=lambda item: rest.index(item[0])):
        before, _, rest = rest.partition(mark)
        made += before + part
    return made + rest

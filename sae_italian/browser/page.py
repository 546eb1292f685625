"""The page: one script and one style sheet, each joined from the files of `static/`, for a folder, a server, a notebook.

Pages on `file://` may load scripts but no modules, and a notebook hands a front end as one text. So the files of
`static/` are plain scripts that share one scope: joined in the order below, no name may be declared twice. Before them
stand the words of `base/labels.yaml` and the columns of the list.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from sae_italian.base.labels import page_labels
from sae_italian.browser.columns import COLUMNS

SCRIPTS = (
    *("base", "select", "route", "marks", "charts", "contexts", "overview", "list", "scores", "card"),
    *("scatter", "compare", "home", "main"),
)
HOSTS = {"disk": ("disk",), "served": ("live", "remote", "served"), "widget": ("live", "remote", "widget")}
STYLES = ("base.css", "views.css", "live.css")
# What a notebook's rules may reach: every element that the page uses but for its own blocks and spans.
_RESET = (
    "a, b, button, caption, code, dd, details, dl, dt, fieldset, figcaption, figure, h1, h2, h3, h4, input, kbd, label, "
    "legend, li, mark, ol, p, pre, select, small, strong, summary, table, tbody, td, textarea, th, thead, tr, ul"
)


def static_text(name: str) -> str:
    """Return a file of `static/`. Raises: FileNotFoundError."""
    return (resources.files("sae_italian.browser") / "static" / name).read_text(encoding="utf-8")


@cache
def joined(host: str) -> str:
    """Return the scripts of a host (disk, served or widget), to be put into a scope of their own."""
    shown = {name: {"show": column.show, "range": column.range} for name, column in COLUMNS.items() if column.show}
    data = {"LABELS": page_labels(), "COLUMNS": shown}
    head = "".join(f"const {name} = {json.dumps(value, ensure_ascii=False)};\n" for name, value in data.items())
    return head + "\n".join(static_text(f"{name}.js") for name in (*SCRIPTS, *HOSTS[host]))


def script(host: str) -> str:
    """Return the page's classic script."""
    return f'"use strict";\n(() => {{\n{joined(host)}}})();\n'


def module() -> str:
    """Return the notebook's ES module, as anywidget wants it."""
    return f"{joined('widget')}export default {{ render }};\n"


@cache
def style() -> str:
    """Return the style sheet, every rule of it under `.sae-italian`."""
    return "\n".join(static_text(name) for name in STYLES)


def notebook_style() -> str:
    """Return the style sheet for an element inside a notebook's page, whose own rules reach into what cells show.

    JupyterLab floats every `dt` at a fifth of the width, takes the line from under links and more: at twice our weight
    all of that goes back to what the browser does by itself, and at three times stand our own rules.
    """
    root = ".sae-italian"
    reset = f"{2 * root} :is({_RESET}) {{ all: revert; }}\n"
    return reset + style().replace(root, 3 * root)


def page(run: Mapping[str, Any], *, policy: str = "") -> str:
    """Return the page with the facts of a run, escaped; `policy` is a meta element."""
    facts = {key: html.escape(str(run[key])) for key in ("title", "model", "sae", "corpus")}
    return Template(static_text("page.html")).substitute(facts, policy=policy)

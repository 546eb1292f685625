"""One script out of the modules in `static/`: for pages on `file://`, which may load scripts but no modules, and for a
notebook, which hands a front end as one text.

The modules keep to a narrow form, so that this needs no parser: an import stands on one line and names what it takes,
`import { a, b } from "./name.js";`; what is exported is a function, a class or a constant declared at the left margin.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Template
from typing import Any

STYLES = ("base.css", "views.css", "live.css")  # live.css comes with live work, where it is
_RESET = (
    *(
        "a",
        "button",
        "caption",
        "code",
        "dd",
        "details",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "h1",
        "h2",
        "h3",
    ),
    *("h4", "input", "kbd", "label", "legend", "li", "mark", "ol", "p", "pre", "select", "small", "summary", "table"),
    *("tbody", "td", "textarea", "th", "thead", "tr", "ul"),
)
_IMPORT = re.compile(r'^import \{ ([^}]*) \} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|class|const) (\w+)", re.MULTILINE)
_LATER = re.compile(r'\bimport\("\./([\w-]+\.js)"\)')


def static_text(name: str) -> str:
    """Return a file of `static/`. Raises: FileNotFoundError."""
    return (resources.files("sae_italian.browser") / "static" / name).read_text(encoding="utf-8")


@cache
def script(entry: str, *, live: bool = False) -> str:
    """Return a module and all that it imports as one classic script.

    With `live`, modules that are imported on demand are part of it too; without, asking for one fails in the browser.
    """
    parts: dict[str, str] = {}
    _collect(entry, live, parts, [])
    return '"use strict";\n(() => {\nconst modules = {};\n' + "".join(parts.values()) + "})();\n"


@cache
def module(entry: str) -> str:
    """Return a module and all that it imports, on demand too, as one ES module; its default export holds the entry's."""
    parts: dict[str, str] = {}
    _collect(entry, True, parts, [])
    return "const modules = {};\n" + "".join(parts.values()) + f'export default modules["{entry}"];\n'


@cache
def style() -> str:
    """Return the style sheet, every rule of it under `.sae-italian`."""
    static = resources.files("sae_italian.browser") / "static"
    return "\n".join(static_text(name) for name in STYLES if (static / name).is_file())


@cache
def notebook_style() -> str:
    """Return the style sheet for an element inside a notebook's page, whose own rules reach into what cells show.

    JupyterLab floats every `dt` at a fifth of the width, takes the line from under links and more: at twice our weight
    all of that goes back to what the browser does by itself, and at three times stand our own rules.
    """
    root = ".sae-italian"
    reset = f"{2 * root} :is({', '.join(_RESET)}) {{ all: revert; }}\n"
    return reset + style().replace(root, 3 * root)


def page(run: Mapping[str, Any], *, script: str, policy: str = "") -> str:
    """Return the page with the facts of a run, escaped; `script` is the element that loads the script, `policy` a meta element."""
    facts = {key: html.escape(str(run[key])) for key in ("title", "model", "sae", "corpus")}
    return Template(static_text("page.html")).substitute(facts, script=script, policy=policy)


def _exports(text: str) -> list[str]:
    return [match[2] for match in _EXPORT.finditer(text)]


def _collect(name: str, live: bool, parts: dict[str, str], above: list[str]) -> None:
    if name in parts:
        return
    if name in above:
        raise ValueError(f"modules import each other in a circle: {' > '.join([*above, name])}")
    text = static_text(name)
    wanted = [match[2] for match in _IMPORT.finditer(text)]
    if live:
        wanted += _LATER.findall(text)
        text = _LATER.sub(r'Promise.resolve(modules["\1"])', text)
    for other in wanted:
        _collect(other, live, parts, [*above, name])
    exports = ", ".join(_exports(text))
    text = _IMPORT.sub(lambda match: f'const {{ {match[1].replace(" as ", ": ")} }} = modules["{match[2]}"];\n', text)
    text = _EXPORT.sub(r"\1 \2", text)
    parts[name] = f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {exports} }};\n}})();\n'

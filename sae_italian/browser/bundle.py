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
    """Return a module and all that it imports, on demand too, as one ES module with the entry's exports."""
    parts: dict[str, str] = {}
    _collect(entry, True, parts, [])
    names = ", ".join(_exports(static_text(entry)))
    return "const modules = {};\n" + "".join(parts.values()) + f'export const {{ {names} }} = modules["{entry}"];\n'


@cache
def style() -> str:
    """Return the style sheet, every rule of it under `.sae-italian`."""
    static = resources.files("sae_italian.browser") / "static"
    return "\n".join(static_text(name) for name in STYLES if (static / name).is_file())


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

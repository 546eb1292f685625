"""One way to show a result: as a Markdown table, as plain values for JSON, as a folder that holds both, as a page."""

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.labels import label
from sae_italian.base.pace import cut_short
from sae_italian.base.statistics import Estimate
from sae_italian.base.storage import utc_now, write_json, write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-top: 1px solid #d7dbe0; padding-top: 1rem; }
div { overflow-x: auto; } [lang=it] { color: #4a525c; } th[role] { cursor: pointer; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; } svg { max-width: 100%; height: auto; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { background: #16191d; color: #e6e8eb; } [lang=it] { color: #aab2bc; } h2, th, td { border-color: #353b43; }
}
"""


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; its head is `one | two | three`, its cells are shown as `str` shows them."""
    lines = [f"| {head} |", "|---" * len(head.split(" | ")) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def shown(found: Estimate, form: str = ".2f") -> str:
    """Return `0.81 (0.78 to 0.84)`: the value alone where its interval is not known, `-` where there is no value."""
    if isnan(found.value):
        return "-"
    interval = "" if isnan(found.lo) else f" ({found.lo:{form}} to {found.hi:{form}})"
    return f"{found.value:{form}}{interval}"


def plain(value: Any) -> Any:
    """Return a value as JSON wants it: records as dicts of their fields, arrays as lists, NaN and infinities as None.

    A dataclass' field that its `repr` leaves out (`field(repr=False)`) is working material and is left out here too.
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.repr}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        plainly = value.dtype.kind in "biu" or (value.dtype.kind == "f" and np.isfinite(value).all())
        return value.tolist() if plainly else plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def save_result(folder: Path, name: str, value: dict[str, Any], parts: Sequence[str] = (), **pictures: str) -> None:
    """Write `name`.json with the time of writing, and each picture as its name.svg.

    With the parts of a text, `name`.md holds these, the pictures, and the legend that `labels.yaml` has under the name.
    Both say what a time bound has cut short.
    """
    cut = cut_short()
    write_json(folder / f"{name}.json", {**value, "created": utc_now(), **({"cut_short": cut} if cut else {})})
    if parts:
        images = [f"![{picture}]({picture}.svg)" for picture in pictures]
        legend = [label(f"legends.{name}", language) for language in ("en", "it")]
        write_text(
            folder / f"{name}.md", "\n\n".join([*parts, *(f"Note: {what}." for what in cut), *images, *legend]) + "\n"
        )
    for picture, svg in pictures.items():
        write_text(folder / f"{picture}.svg", svg)


def page(
    title: str,
    parts: Iterable[str],
    *,
    pictures: Mapping[str, str] | None = None,
    italian: Collection[str] = (),
    script: str = "",
) -> str:
    """Return parts of Markdown as one HTML file that needs nothing else; they hold text and tables, no mark-up or link.

    pictures: the SVG that stands in the place of a part. italian: which of the parts are in Italian.
    """
    from markdown_it import MarkdownIt

    render, blocks = MarkdownIt("zero").enable(["heading", "table", "emphasis"]).render, []
    for part in parts:
        drawn = (pictures or {}).get(part, "")
        language = ' lang="it"' if part in italian else ""
        blocks.append(f"<div{language}>{drawn[drawn.index('<svg') :] if drawn else render(part)}</div>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([*blocks, f"<script>{script}</script>" if script else ""])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


@contextlib.contextmanager
def no_bars_in_a_pipe() -> Iterator[None]:
    """Keep transformers' progress bars for terminals: in a log file they are noise."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()

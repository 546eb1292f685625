"""A report as sections of text, tables and pictures, written as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from sae_italian.base import report
from sae_italian.base.labels import label
from sae_italian.base.storage import write_text

LONGEST = 240  # characters of a cell in the form `short`; report.json has the whole
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-top: 1px solid #d7dbe0; padding-top: 1rem; }
.it { color: #4a525c; } .skipped { color: #8a4b00; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #16191d; color: #e6e8eb; } .it { color: #aab2bc; } .skipped { color: #e0a458; }
  h2, th, td { border-color: #353b43; } figure { background: #fff; padding: 0.5rem; }
}
"""


class ReportTable(NamedTuple):
    """Cells are plain text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report; titles and texts are (English, Italian)."""

    title: tuple[str, str]
    text: tuple[str, str] = ("", "")
    tables: Sequence[ReportTable] = ()
    pictures: Sequence[tuple[str, str]] = ()  # file name without .svg, and the SVG
    skipped: str = ""  # why there is nothing else


@dataclass(frozen=True)
class ReportPages:
    title: tuple[str, str]
    text: tuple[str, str]
    sections: Sequence[Section] = field(default_factory=tuple)

    def write(self, out: Path) -> None:
        """Write report.md, report.html and pictures/*.svg into `out`."""
        for section in self.sections:
            for name, svg in section.pictures:
                write_text(out / "pictures" / f"{name}.svg", svg)
        write_text(out / "report.md", self.markdown())
        write_text(out / "report.html", self.html())

    def markdown(self) -> str:
        parts = [f"# {self.title[0]}", f"*{self.title[1]}*"]
        for section in (Section(("", ""), self.text), *self.sections):
            parts += [f"## {section.title[0]} · {section.title[1]}"] if section.title[0] else []
            parts += [paragraph for paragraph in section.text if paragraph]
            parts += [f"Not done · Non svolto: {section.skipped}"] if section.skipped else []
            parts += [markdown_table(table) for table in section.tables]
            parts += [f"![{name}](pictures/{name}.svg)" for name, _ in section.pictures]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        safe = html.escape
        parts = [f"<h1>{safe(self.title[0])}</h1>", f'<p class="it" lang="it">{safe(self.title[1])}</p>']
        for section in (Section(("", ""), self.text), *self.sections):
            (english, italian), text = section.title, section.text
            if english:
                parts.append(f"<h2>{safe(english)} · <span lang='it'>{safe(italian)}</span></h2>")
            parts += [f"<p>{safe(text[0])}</p>"] if text[0] else []
            parts += [f'<p class="it" lang="it">{safe(text[1])}</p>'] if text[1] else []
            if section.skipped:
                parts.append(f'<p class="skipped">Not done · Non svolto: {safe(section.skipped)}</p>')
            parts += [_html_table(table) for table in section.tables]
            parts += [f"<figure>{svg[svg.index('<svg') :]}</figure>" for _, svg in section.pictures]
        head = f'<meta charset="utf-8"><title>{safe(self.title[0])}</title><style>{_STYLE}</style>'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        body = "\n".join(parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def markdown_table(table: ReportTable) -> str:
    """Return a table and its caption; a bar inside a cell does not end it."""
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    caption = f"**{table.caption}**\n\n" if table.caption else ""
    return caption + report.table(" | ".join(table.head), rows)


def _html_table(table: ReportTable) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    rows = "".join(cells(row, "td") for row in table.rows)
    head = f"<thead>{cells(table.head, 'th')}</thead>"
    return f'<div class="wide"><table>{caption}{head}<tbody>{rows}</tbody></table></div>'


# --- tables that a YAML describes ------------------------------------------------------------------------------------


@cache
def shared_tables() -> dict[str, Any]:
    """Return the descriptions of tables that several reports have, by name."""
    import yaml

    return yaml.safe_load(resources.files("sae_italian.papers").joinpath("tables.yaml").read_text(encoding="utf-8"))


def tables_of(described: dict[str, Any] | str, result: dict[str, Any]) -> list[ReportTable]:
    """Return the tables of a result that a description stands for (or the name of a shared one).

    `rows` is the path to a list (empty: the result is the one row), `columns` the heads with the path and form of each
    cell. Or `facts` are rows with their paths, and `of` the columns' heads with the part of the result each is about (a
    part that is not there has none). Or `markdown` is the path to a table's lines. `each` repeats the table for every item
    of a list; `shared` names a shared table to repeat.
    """
    spec = shared_tables()[described] if isinstance(described, str) else described
    spec = spec | shared_tables()[spec["shared"]] if "shared" in spec else spec
    found = []
    for part in lookup(result, spec["each"]) if "each" in spec else [result]:
        caption = spec.get("caption", "").format_map(part)
        if "markdown" in spec:
            lines = [
                [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
                for line in lookup(part, spec["markdown"])
            ]
            found.append(ReportTable(caption, lines[0], lines[2:]))
        elif "facts" in spec:
            parts = {name: lookup(part, path) for name, path in spec["of"].items()}
            parts = {name: value for name, value in parts.items() if value is not None}
            rows = [
                (label(name) if name.startswith("card.") else name, *(cell(value, path) for value in parts.values()))
                for name, path in spec["facts"].items()
            ]
            found.append(ReportTable(caption, (spec.get("head", ""), *parts), rows))
        else:
            rows = lookup(part, spec["rows"]) if spec["rows"] else [part]
            rows = [[cell(row, path) for path in spec["columns"].values()] for row in rows]
            found.append(ReportTable(caption, list(spec["columns"]), rows))
    return found


def lookup(results: Any, path: str) -> Any:
    """Return what lies at a dotted path of dicts and lists; None where it is not there.

    `*` gives a list of all, an empty path the results themselves.
    """
    for i, key in enumerate(parts := path.split(".") if path else []):
        if key == "*":
            rest = ".".join(parts[i + 1 :])
            return [lookup(item, rest) for item in results or ()]
        try:
            results = results[int(key)] if isinstance(results, list) else results[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return results


def cell(row: Any, path: str) -> str:
    """Return a value as text. A form may follow the path: `|2` decimals, `|%`, `|short`, or Python's, as `|.3g`."""
    path, _, form = path.partition("|")
    value = lookup(row, path)
    if form == "short":
        return shorten(value, LONGEST, placeholder=" ...")
    if form == "%" or form.isdigit() or not form:
        return shown(value, int(form) if form.isdigit() else 3, percent=form == "%")
    return format(value, form)


def shown(value: Any, digits: int = 3, *, percent: bool = False) -> str:
    """Return a number, a text, or an estimate {value, lo, hi} as a cell; a dash where nothing was measured."""
    if isinstance(value, dict) and "value" in value:
        middle = shown(value["value"], digits, percent=percent)
        if middle == "-" or value.get("lo") is None or value.get("hi") is None:
            return middle
        low, high = (shown(value[key], digits, percent=percent) for key in ("lo", "hi"))
        return f"{middle} ({low} to {high})"
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if percent:
        return f"{round(100 * value, 1) + 0.0:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"

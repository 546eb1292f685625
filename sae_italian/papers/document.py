"""A report as sections of text, tables and pictures, written as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.storage import write_text

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


class Table(NamedTuple):
    """Cells are plain text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report; titles and texts are (English, Italian)."""

    title: tuple[str, str]
    text: tuple[str, str] = ("", "")
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()  # file name without .svg, and the SVG
    skipped: str = ""  # why there is nothing else


@dataclass(frozen=True)
class Document:
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
        lines = [f"# {self.title[0]}", "", f"*{self.title[1]}*", "", *_paragraphs(self.text)]
        for section in self.sections:
            lines += [f"## {section.title[0]} · {section.title[1]}", "", *_paragraphs(section.text)]
            if section.skipped:
                lines += [f"Not done · Non svolto: {section.skipped}", ""]
            for table in section.tables:
                lines += [*markdown_table(table), ""]
            lines += [line for name, _ in section.pictures for line in (f"![{name}](pictures/{name}.svg)", "")]
        return "\n".join(lines).rstrip() + "\n"

    def html(self) -> str:
        parts = [f"<h1>{_safe(self.title[0])}</h1>", f'<p class="it" lang="it">{_safe(self.title[1])}</p>']
        parts += _html_paragraphs(self.text)
        for section in self.sections:
            parts.append(f"<h2>{_safe(section.title[0])} · <span lang='it'>{_safe(section.title[1])}</span></h2>")
            parts += _html_paragraphs(section.text)
            if section.skipped:
                parts.append(f'<p class="skipped">Not done · Non svolto: {_safe(section.skipped)}</p>')
            parts += [_html_table(table) for table in section.tables]
            parts += [f"<figure>{svg[svg.index('<svg') :]}</figure>" for _, svg in section.pictures]
        head = f'<meta charset="utf-8"><title>{_safe(self.title[0])}</title><style>{_STYLE}</style>'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
        )


def _paragraphs(text: tuple[str, str]) -> list[str]:
    return [line for paragraph in text if paragraph for line in (paragraph, "")]


def _html_paragraphs(text: tuple[str, str]) -> list[str]:
    english, italian = text
    found = [f"<p>{_safe(english)}</p>"] if english else []
    return found + ([f'<p class="it" lang="it">{_safe(italian)}</p>'] if italian else [])


def _safe(text: str) -> str:
    return html.escape(str(text))


def markdown_table(table: Table) -> list[str]:
    """Return a table's lines; a bar inside a cell does not end it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    caption = [f"**{table.caption}**", ""] if table.caption else []
    return [*caption, line(table.head), "|" + "---|" * len(table.head), *(line(row) for row in table.rows)]


def from_markdown(lines: Sequence[str], caption: str = "") -> Table:
    """Return the table of such lines, bold cells as plain ones."""
    cells = [[cell.strip().strip("*") for cell in line.strip().strip("|").split("|")] for line in lines]
    return Table(caption, cells[0], cells[2:])


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    caption = f"<caption>{_safe(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


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

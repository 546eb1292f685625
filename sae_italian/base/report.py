"""One way to show a result: a Markdown table, plain values for JSON, a picture, a folder that holds them, a page.

A picture is panels of matplotlib axes as SVG text, in the look of `house.mplstyle`. A legend stands below the panels, never
over the data, whichever axes asked for it. The SVG has its own ground and ink, light or dark as the reader's screen is; a
viewer that knows no style sheets shows it light.
"""

import base64
import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

INK, GROUND = "#1b1f24", "#ffffff"
OURS, REFERENCE = "#0b6e4f", "#8a8f98"
WARNING = "#b3261e"
OTHERS = ("#0072b2", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's, without the yellow
COLOURS = (OURS, *OTHERS)
MARKERS = "osD^vPX"  # a series is told by its marker too
DARK = {  # each colour on a dark ground: 4.5 : 1 for ink, 3 : 1 for marks
    GROUND: "#16191d", INK: "#e6e8eb", OURS: "#4cc19a", REFERENCE: "#9aa0a8", WARNING: "#ff8a80",
    **dict(zip(OTHERS, ("#58a6e0", "#ff8c42", "#e39cc3", "#7cc7f0", "#f0b429"), strict=True)),
}  # fmt: skip
_CLASS = "sae-italian"
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
    """Return a Markdown table; its head is `one | two | three`, its cells are what `str` shows, which no bar or line ends."""
    cells = ([" ".join(str(cell).replace("|", "\\|").splitlines()) for cell in row] for row in rows)
    lines = [f"| {head} |", "|---" * len(head.split(" | ")) + "|", *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join(lines)


def shown(found: Estimate, form: str = ".2f") -> str:
    """Return `0.81 (0.78 to 0.84)`: the value alone where its interval is not known, `-` where there is no value."""
    if isnan(found.value):
        return "-"
    return f"{found.value:{form}}" + ("" if isnan(found.lo) else f" ({found.lo:{form}} to {found.hi:{form}})")


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
    """Write `name`.json, made `plain`, with the time of writing, and each picture as its name.svg.

    With the parts of a text, `name`.md holds these, the pictures, and the legend that `labels.yaml` has under the name.
    Both say what a time bound has cut short.
    """
    cut = cut_short()
    write_json(folder / f"{name}.json", {**plain(value), "created": utc_now(), **({"cut_short": cut} if cut else {})})
    if parts:
        images = [f"![{picture}]({picture}.svg)" for picture in pictures]
        legend = [label(f"legends.{name}", language) for language in ("en", "it")]
        write_text(
            folder / f"{name}.md", "\n\n".join([*parts, *(f"Note: {what}." for what in cut), *images, *legend]) + "\n"
        )
    for picture, drawn in pictures.items():
        write_text(folder / f"{picture}.svg", drawn)


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
    head = (
        f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    body = "\n".join([*blocks, f"<script>{script}</script>" if script else ""])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


class Picture(str):
    """SVG text, which a notebook shows as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)


def framed(words: str, picture: str) -> str:
    """Return what a notebook shows of an object: its `repr` and a picture, in one piece of HTML without scripts.

    The picture is an image of its own, so that the styles of two of them do not meet; it is light or dark as the
    reader's screen is.
    """
    data = base64.b64encode(picture.encode()).decode()
    style = "margin:0;font:14px/1.5 system-ui,sans-serif"
    image = f'<img alt="" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
    return f'<figure style="{style}"><figcaption>{escape(words)}</figcaption>{image}</figure>'


def svg(draw: Callable[[Any], None], n_panels: int, size: tuple[float, float]) -> Picture:
    """Return what `draw` draws on its axes; the same numbers give the same bytes."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(Path(__file__).with_name("house.mplstyle")):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, n_panels, squeeze=False)[0])
        legend_below(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(in_light_and_dark(buffer.getvalue()))


def legend_below(figure: Any) -> None:
    """Put what the figure's and its axes' legends say into one legend below all panels, each label once."""
    known: dict[str, Any] = {}
    drawn = {name: it for axis in figure.axes for it, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    for legend in legends:
        title = legend.get_title().get_text()
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            name = text.get_text()
            known.setdefault(f"{title}: {name}" if title else name, drawn.get(name, handle))
        legend.remove()
    if known:
        columns = max(1, min(len(known), int(12 * figure.get_figwidth() / max(map(len, known)))))
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns)


def in_light_and_dark(text: str) -> str:
    """Return an SVG whose house colours follow the reader's colour scheme; what it says without a style sheet stays."""
    number = {colour: i for i, colour in enumerate(DARK)}
    known = "|".join(DARK)

    def follow(match: re.Match[str]) -> str:
        name, colour = match.groups()
        return f"{name}: {colour}; {name}: var(--c{number[colour]}, {colour})"

    text = re.sub(rf"\b(fill|stroke): ({known})\b", follow, text)
    dark = "".join(f"--c{number[colour]}:{other};" for colour, other in DARK.items())
    style = (
        f"<style>.{_CLASS}{{background:var(--c{number[GROUND]},{GROUND})}}"
        f"@media(prefers-color-scheme:dark){{.{_CLASS}{{{dark}}}}}</style>"
    )
    return re.sub(r"<svg ([^>]*)>", rf'<svg class="{_CLASS}" \1>{style}', text, count=1)

"""One way to draw: panels of matplotlib axes as SVG text, for every room that has a picture to show.

The look is `house.mplstyle`. A legend stands below the panels, never over the data, whichever axes asked for it. The SVG
has its own ground and ink, light or dark as the reader's screen is; a viewer that knows no style sheets shows it light.
"""

import base64
import io
import re
from collections.abc import Callable
from html import escape
from importlib import resources
from typing import Any

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

    style = resources.files("sae_italian.base") / "house.mplstyle"
    with resources.as_file(style) as file, matplotlib.style.context(file):
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
    ground = number[GROUND]
    style = (
        f"<style>.{_CLASS}{{background:var(--c{ground},{GROUND})}}"
        f"@media(prefers-color-scheme:dark){{.{_CLASS}{{{dark}}}}}</style>"
    )
    return re.sub(r"<svg ([^>]*)>", rf'<svg class="{_CLASS}" \1>{style}', text, count=1)

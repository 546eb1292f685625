"""One way to draw: panels of matplotlib axes as SVG text, for every room that has a picture to show."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sae_italian",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
OURS, REFERENCE = "#0b6e4f", "#8a8f98"
WARNING = "#b3261e"


class Picture(str):
    """SVG text, which a notebook shows as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)


def svg(draw: Callable[[Any], None], n_panels: int, size: tuple[float, float]) -> Picture:
    """Return what `draw` draws on its axes; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, n_panels, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(buffer.getvalue())

"""The pictures of the geometry: how good best matches are against chance, and the map, still and to be explored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.analysis.geometry.compare import EDGES, Comparison, Distribution
from sae_italian.base.pictures import OURS, REFERENCE, WARNING, svg

COLOURS = (OURS, "#d17b0f", "#3b5bdb", "#a61e4d", "#5f3dc4", "#495057")
MOST_PANELS = 6


def matches_svg(comparisons: Sequence[Comparison]) -> str:
    """Return the cumulative distribution of best matches of each comparison, random ones beside it (the first six)."""
    shown = comparisons[:MOST_PANELS]

    def draw(axes: Any) -> None:
        for axis, item in zip(axes, shown, strict=True):
            for distribution, colour, style, label in (
                (item.matches, OURS, "-", "decoder"),
                (item.random_like, REFERENCE, "--", "random, same covariance · caso, stessa covarianza"),
                (item.random, REFERENCE, "-", "random · caso"),
            ):
                axis.plot(EDGES[1:], _cumulative(distribution), color=colour, linestyle=style, label=label)
            axis.axvline(
                item.used, color=WARNING, linewidth=1, linestyle=":", label=f"threshold · soglia {item.used:.2f}"
            )
            axis.set_xlim(min(0.0, _lowest(item)), 1)
            axis.set_title(f"{item.source} → {'itself' if item.within else item.target}", fontsize=9)
            axis.set_xlabel("cosine with the nearest · coseno col più prossimo", fontsize=8)
        axes[0].set_ylabel("share of latents · quota di latenti")
        axes[0].legend(frameon=False, fontsize=7)

    return svg(draw, len(shown), (3.6 * len(shown), 3.4))


def _cumulative(distribution: Distribution) -> Float[np.ndarray, " bins"]:
    counts = np.asarray(distribution.histogram, dtype=float)
    return counts.cumsum() / counts.sum()


def _lowest(item: Comparison) -> float:
    return float(EDGES[np.flatnonzero(item.matches.histogram)[0]])


def map_svg(names: Sequence[str], points: Sequence[Float[np.ndarray, "n 2"]]) -> str:
    """Return the map of all latents, one colour per SAE; points are pixels of a picture inside, so it stays small."""

    def draw(axes: Any) -> None:
        (axis,) = axes
        for number, (name, places) in enumerate(zip(names, points, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            axis.scatter(
                places[:, 0], places[:, 1], s=4, color=colour, alpha=0.4, linewidths=0, label=name, rasterized=True
            )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(frameon=False, fontsize=8, markerscale=3, loc="upper right")

    return svg(draw, 1, (6.5, 6.0))


def map_html(page: dict[str, Any]) -> str:
    """Return the explorable map as one HTML file that needs nothing else: move, zoom, search, read what a point is."""
    text = json.dumps(page | {"colours": COLOURS}, ensure_ascii=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (files("sae_italian.analysis.geometry") / "map.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", safe)

"""The geometry of some SAEs as one result: every pair compared, written as JSON, Markdown, Parquet, pictures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from sae_italian.analysis.directions import EDGES, Comparison, MapMethod, Set, compare, map_of
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced
from sae_italian.base.pictures import MARKERS, OTHERS, OURS, REFERENCE, WARNING, svg
from sae_italian.base.report import plain, save_result, shown, table
from sae_italian.base.storage import atomic_path, write_text

COLOURS = (OURS, *OTHERS)
MOST_PANELS = 6
_HEAD = (
    "latents of | against | D | sqrt(12 ln F / D) | largest random | median cosine | (random) | neighbours | new | "
    "above random | mutual | splits"
)


@dataclass(frozen=True)
class Geometry:
    """What `geometry` found: each SAE within itself, each ordered pair, and the map of all latents that took part."""

    within: list[Comparison]
    between: list[Comparison]
    seeds: dict[str, float]  # means over pairs of SAEs of one width, {} without any
    notes: list[str]
    map: MapMethod
    sets: list[Set] = field(repr=False)
    points: list[Float[np.ndarray, "n 2"]] = field(repr=False)
    texts: Mapping[str, dict[int, str]] = field(repr=False)

    @property
    def comparisons(self) -> list[Comparison]:
        return [*self.within, *self.between]

    def comparison(self, source: str, target: str) -> Comparison:
        """Return the comparison of one SAE with another, or with itself. Raises: KeyError."""
        return {(item.source, item.target): item for item in self.comparisons}[source, target]

    def table(self) -> str:
        """Return a Markdown table, one row per comparison."""
        return table(_HEAD, map(_cells, self.comparisons))

    def save(self, folder: Path) -> None:
        """Write geometry.json, geometry.md, matches.parquet, matches.svg, map.svg and map.html."""
        import pyarrow as pa
        import pyarrow.parquet

        parts = ["# Geometry of the decoder directions · Geometria delle direzioni", self.table()]
        if self.seeds:
            named = ", ".join(f"{name} {value:.3g}" for name, value in self.seeds.items())
            parts.append(f"SAEs of one width, means over ordered pairs: {named}.")
        for item in self.between:
            for split in item.splits[:5]:
                into = ", ".join(f"{i} ({c:.2f})" for i, c in zip(split.into[:6], split.cosines, strict=False))
                parts.append(f"- latent {split.latent} of {item.target} splits in {item.source}: {into}")
        parts += [f"Note: {note}." for note in self.notes]
        save_result(folder, "geometry", plain(self), parts, matches=matches_svg(self.comparisons), map=map_svg(self))
        write_text(folder / "map.html", map_html(self))
        rows = []
        for item in self.comparisons:
            names = {"source": [item.source] * item.n_source, "target": [item.target] * item.n_source}
            rows.append(pa.table({**names, **item.rows._asdict()}))
        with atomic_path(folder / "matches.parquet") as temporary:
            pyarrow.parquet.write_table(pa.concat_tables(rows), temporary)


def _cells(item: Comparison) -> tuple[object, ...]:
    return (
        f"{item.source} ({item.n_source:,})",
        "itself" if item.within else f"{item.target} ({item.n_target:,})",
        item.d,
        f"{item.threshold:.3f}" + ("" if item.used == item.threshold else f" (used {item.used:.3f})"),
        f"{item.random.largest:.3f}",
        f"{item.matches.quantiles['50 %']:.3f}",
        f"{item.random.quantiles['50 %']:.3f}",
        shown(item.neighbours, ".1%"),
        "-" if item.within else shown(item.new, ".1%"),
        shown(item.above_random, ".1%"),
        shown(item.mutual, ".1%"),
        "-" if item.within else shown(item.split, ".1%"),
    )


def geometry(
    saes: Mapping[str, Any],
    *,
    alive: Mapping[str, Bool[np.ndarray, " d_sae"]] | None = None,
    texts: Mapping[str, dict[int, str]] | None = None,
    method: MapMethod = "pca",
    seed: int = 0,
    **settings: Any,
) -> Geometry:
    """Return the geometry of some SAEs by name: each within itself, each ordered pair, and one map of all.

    `alive` says per SAE which latents take part (default: all; a dead latent keeps its random start and counts as new),
    `texts` what is known of latents, for the map; `method` as in `map_of`, `seed` and the other settings as in `compare`.
    Raises: UsageError when there is no SAE, or their decoders write into spaces of different dimensions.
    """
    notes = _check(saes)
    sets = [Set.of(name, sae, (alive or {}).get(name)) for name, sae in saes.items()]
    pairs = paced(product(sets, repeat=2), "geometry", len(sets) ** 2, "pair of SAE")
    found = [compare(a, b, seed=seed, **settings) for a, b in pairs]
    within, between = ([item for item in found if item.within == own] for own in (True, False))
    width = {name: sae.W_dec.shape[0] for name, sae in saes.items()}
    seeds = _means([item for item in between if width[item.source] == width[item.target]])
    places = map_of(torch.cat([item.units.cpu() for item in sets]), method, seed)
    points = np.split(places, np.cumsum([len(item.latent) for item in sets])[:-1])
    return Geometry(within, between, seeds, notes, method, sets, points, texts or {})


def _check(saes: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know of SAEs that are compared: other models, other hooks. Raises: as `geometry`."""
    if not saes:
        raise UsageError("no SAE was given; the geometry needs one or more.")
    (first, reference), *others = saes.items()
    notes = []
    for name, sae in others:
        d, expected = sae.W_dec.shape[1], reference.W_dec.shape[1]
        if d != expected:
            raise UsageError(
                f"{name} writes {d} dimensions (d_in), {first} {expected}: their directions cannot be compared. "
                "Compare SAEs of one model and site."
            )
        for key in ("model_name", "hook_name"):
            here, there = getattr(sae.cfg.metadata, key, None), getattr(reference.cfg.metadata, key, None)
            if here != there:
                notes.append(f"{name} has {key} {here!r}, {first} {there!r}")
    return notes


def _means(pairs: Sequence[Comparison]) -> dict[str, float]:
    """Return means over ordered pairs of SAEs: the share of latents that another seed finds again, and how."""
    if not pairs:
        return {}
    shares = ("neighbours", "above_random", "alike", "mutual")
    found = {name: np.mean([getattr(item, name).value for item in pairs]) for name in shares}
    found |= {"mean_cosine": np.mean([item.matches.mean for item in pairs])}
    found |= {"mean_cosine_random": np.mean([item.random.mean for item in pairs])}
    return {"pairs": len(pairs), **{name: float(value) for name, value in found.items()}}


# --- pictures --------------------------------------------------------------------------------------------------------


def matches_svg(comparisons: Sequence[Comparison]) -> str:
    """Return the cumulative distribution of best matches of each comparison, random ones beside it (the first six)."""
    panels = comparisons[:MOST_PANELS]

    def draw(axes: Any) -> None:
        for axis, item in zip(axes, panels, strict=True):
            for distribution, colour, style, label in (
                (item.matches, OURS, "-", "decoder"),
                (item.random_like, REFERENCE, "--", "random, same covariance · caso, stessa covarianza"),
                (item.random, REFERENCE, "-", "random · caso"),
            ):
                counts = np.cumsum(distribution.histogram, dtype=float)
                axis.plot(EDGES[1:], counts / counts[-1], color=colour, linestyle=style, label=label)
            label = f"threshold · soglia {item.used:.2f}"
            axis.axvline(item.used, color=WARNING, linewidth=1, linestyle=":", label=label)
            axis.set_xlim(min(0.0, float(EDGES[np.flatnonzero(item.matches.histogram)[0]])), 1)
            axis.set_title(f"{item.source} → {'itself' if item.within else item.target}", fontsize=9)
            axis.set_xlabel("cosine with the nearest · coseno col più prossimo", fontsize=8)
        axes[0].set_ylabel("share of latents · quota di latenti")
        axes[0].legend()

    return svg(draw, len(panels), (3.6 * len(panels), 3.4))


def map_svg(found: Geometry) -> str:
    """Return the map of all latents, one colour per SAE; points are pixels of a picture inside, so it stays small."""

    def draw(axes: Any) -> None:
        style = {"s": 4, "alpha": 0.4, "linewidths": 0, "rasterized": True}
        for number, (item, places) in enumerate(zip(found.sets, found.points, strict=True)):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes[0].scatter(*places.T, **look, **style)
            axes[0].scatter([], [], **look, label=item.name)  # one of full size for the legend
        axes[0].set(xticks=[], yticks=[], xlabel="first component · prima componente")
        axes[0].set_ylabel("second component · seconda componente")
        axes[0].legend()

    return svg(draw, 1, (6.5, 6.0))


def map_html(found: Geometry) -> str:
    """Return the explorable map as one HTML file that needs nothing else: move, zoom, search, read what a point is."""
    groups = []
    for item, points in zip(found.sets, found.points, strict=True):
        latents, texts, nearest = item.latent.tolist(), found.texts.get(item.name, {}), []
        for other in (other for other in found.comparisons if other.source == item.name):
            rows = zip(*(column.tolist() for column in other.rows[:3]), strict=True)
            known = {latent: (index, round(cosine, 3)) for latent, index, cosine in rows}
            own = [known.get(latent) for latent in latents]  # None: not compared
            nearest.append({"target": other.target, "used": other.used, "rows": own})
        x, y = np.round(points.T, 4).tolist()
        text = [texts.get(latent, "") for latent in latents] if texts else []
        groups.append({"name": item.name, "latent": latents, "x": x, "y": y, "text": text, "nearest": nearest})
    page = {"method": found.map, "groups": groups, "colours": COLOURS}
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":"))
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (files("sae_italian.analysis") / "data" / "map.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", safe)

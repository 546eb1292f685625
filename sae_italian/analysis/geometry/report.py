"""The geometry of some SAEs as one result: every pair compared, written as JSON, Markdown, Parquet, pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from sae_italian.analysis.geometry.compare import (
    Comparison,
    Set,
    check_comparable,
    compare,
    seeds_compared,
)
from sae_italian.analysis.geometry.map import Method, map_of
from sae_italian.analysis.geometry.pictures import map_html, map_svg, matches_svg
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate
from sae_italian.base.storage import atomic_path, utc_now, write_json, write_text

RESULT, MARKDOWN, MATCHES = "geometry.json", "geometry.md", "matches.parquet"
MATCHES_PICTURE, MAP_PICTURE, MAP_PAGE = "matches.svg", "map.svg", "map.html"
_LEGEND = (
    "A latent is a neighbour of another when the cosine of their decoder directions is at or above the threshold. New: "
    "without a neighbour in the other SAE. Split: the nearest, and a neighbour, of two latents or more of the first SAE. "
    "Random: as many directions drawn uniformly. Shares with 95 % intervals (Wilson, over latents).",
    "Un latente è vicino di un altro quando il coseno delle loro direzioni di decodifica raggiunge la soglia. Nuovo: senza "
    "vicini nell'altra SAE. Diviso: il più prossimo, e vicino, di due o più latenti della prima SAE. Caso: altrettante "
    "direzioni estratte uniformemente. Quote con intervalli al 95 % (Wilson, sui latenti).",
)


@dataclass(frozen=True)
class Geometry:
    """What `geometry` found; `within` and `between` are Comparisons, `points` the map of all latents that took part."""

    within: list[Comparison]
    between: list[Comparison]
    seeds: dict[str, float]  # means over pairs of SAEs of one width, {} without any
    notes: list[str]
    sets: list[Set] = field(repr=False)
    points: list[Float[np.ndarray, "n 2"]] = field(repr=False)
    texts: dict[str, dict[int, str]] = field(repr=False)
    method: str = "pca"

    def comparison(self, source: str, target: str) -> Comparison:
        """Return the comparison of one SAE with another, or with itself. Raises: KeyError."""
        found = {(item.source, item.target): item for item in [*self.within, *self.between]}
        return found[source, target]

    def as_dict(self) -> dict[str, Any]:
        return {
            "within": [item.as_dict() for item in self.within],
            "between": [item.as_dict() for item in self.between],
            "seeds": self.seeds,
            "notes": self.notes,
            "map": self.method,
            "created": utc_now(),
        }

    def table(self) -> list[str]:
        """Return the lines of a Markdown table, one row per comparison."""
        lines = [
            "| latents of | against | D | sqrt(12 ln F / D) | largest random | median cosine | (random) | neighbours | new "
            "| above random | mutual | splits |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for item in [*self.within, *self.between]:
            target = "itself" if item.within else f"{item.target} ({item.n_target:,})"
            cells = (
                f"{item.source} ({item.n_source:,})",
                target,
                f"{item.d}",
                f"{item.threshold:.3f}" + ("" if item.used == item.threshold else f" (used {item.used:.3f})"),
                f"{item.random.largest:.3f}",
                f"{item.matches.quantiles['50 %']:.3f}",
                f"{item.random.quantiles['50 %']:.3f}",
                _share(item.neighbours),
                "-" if item.within else _share(item.new),
                _share(item.above_random),
                _share(item.mutual),
                "-" if item.within else _share(item.split),
            )
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def markdown(self) -> str:
        lines = ["# Geometry of the decoder directions · Geometria delle direzioni", "", *self.table(), ""]
        if self.seeds:
            named = ", ".join(f"{name} {value:.3g}" for name, value in self.seeds.items())
            lines += [f"SAEs of one width, means over ordered pairs: {named}.", ""]
        for item in self.between:
            for split in item.splits[:5]:
                shown = ", ".join(f"{i} ({c:.2f})" for i, c in zip(split.into[:6], split.cosines, strict=False))
                lines.append(f"- latent {split.latent} of {item.target} splits in {item.source}: {shown}")
        lines += ["", *(f"Note: {note}." for note in self.notes), f"![best matches]({MATCHES_PICTURE})", ""]
        lines += [f"![map of the latents]({MAP_PICTURE})", "", *(paragraph + "\n" for paragraph in _LEGEND)]
        return "\n".join(lines).rstrip() + "\n"

    def save(self, folder: Path) -> None:
        """Write geometry.json, geometry.md, matches.parquet, matches.svg, map.svg and map.html."""
        write_json(folder / RESULT, self.as_dict())
        write_text(folder / MARKDOWN, self.markdown())
        write_text(folder / MATCHES_PICTURE, matches_svg([*self.within, *self.between]))
        names = [item.name for item in self.sets]
        write_text(folder / MAP_PICTURE, map_svg(names, self.points))
        write_text(folder / MAP_PAGE, map_html(self.page()))
        self._save_rows(folder / MATCHES)

    def page(self) -> dict[str, Any]:
        """Return what the explorable map shows: per SAE the latents, their places, nearest others and explanations."""
        groups = []
        for item, points in zip(self.sets, self.points, strict=True):
            near = [c for c in [*self.within, *self.between] if c.source == item.name and c.rows is not None]
            texts = self.texts.get(item.name, {})
            nearest = []
            for comparison in near:
                assert comparison.rows is not None
                places = np.searchsorted(item.latent, comparison.rows.latent)
                found = [None] * len(item.latent)
                rows = zip(comparison.rows.nearest.tolist(), comparison.rows.cosine.tolist(), strict=True)
                for place, (index, cosine) in zip(places.tolist(), rows, strict=True):
                    found[place] = [index, round(cosine, 3)]  # pyright: ignore[reportArgumentType]
                nearest.append({"target": comparison.target, "used": comparison.used, "rows": found})
            groups.append(
                {
                    "name": item.name,
                    "latent": item.latent.tolist(),
                    "x": np.round(points[:, 0], 4).tolist(),
                    "y": np.round(points[:, 1], 4).tolist(),
                    "text": [texts.get(latent, "") for latent in item.latent.tolist()] if texts else [],
                    "nearest": nearest,
                }
            )
        return {"method": self.method, "groups": groups}

    def _save_rows(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        parts = []
        for item in [*self.within, *self.between]:
            if item.rows is not None:
                names = {"source": [item.source] * item.n_source, "target": [item.target] * item.n_source}
                parts.append(pa.table({**names, **item.rows._asdict()}))
        with atomic_path(path) as temporary:
            pyarrow.parquet.write_table(pa.concat_tables(parts), temporary)


def geometry(
    saes: Mapping[str, Any],
    *,
    alive: Mapping[str, Bool[np.ndarray, " d_sae"]] | None = None,
    texts: Mapping[str, dict[int, str]] | None = None,
    sample: int | None = None,
    above: float | None = None,
    method: Method = "pca",
    seed: int = 0,
) -> Geometry:
    """Return the geometry of some SAEs by name: each within itself, each ordered pair, and one map of all.

    `alive` says per SAE which latents take part (default: all; a dead latent keeps its random start and counts as new),
    `texts` what is known of latents, for the map. `sample`, `above` and `seed` as in `compare`, `method` as in
    `latent_map`.
    Raises: UsageError when there is no SAE, or their decoders write into spaces of different dimensions.
    """
    if not saes:
        raise UsageError("no SAE was given; the geometry needs one or more.")
    notes = check_comparable(dict(saes))
    sets = [Set.of(name, sae, (alive or {}).get(name)) for name, sae in saes.items()]
    pairs = list(product(sets, repeat=2))
    settings: dict[str, Any] = {"sample": sample, "above": above, "seed": seed}
    within = [compare(item, item, **settings) for item in sets]
    between = [compare(a, b, **settings) for a, b in pairs if a is not b]
    width = {name: sae.W_dec.shape[0] for name, sae in saes.items()}
    alike = [item for item in between if width[item.source] == width[item.target]]
    places = map_of(torch.cat([item.units.cpu() for item in sets]), method, seed)
    points = np.split(places, np.cumsum([len(item.latent) for item in sets])[:-1])
    return Geometry(within, between, seeds_compared(alike), notes, sets, points, dict(texts or {}), method)


def _share(value: Estimate) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.lo:.1f} to {100 * value.hi:.1f})"

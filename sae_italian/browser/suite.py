"""The overview of a suite: layers x sites x widths with the numbers of every SAE, as a page, a picture and JSON."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pictures import svg
from sae_italian.base.storage import atomic_path, read_json, write_json, write_text
from sae_italian.browser.bundle import style
from sae_italian.models import parse_hook_name

CARD, RESULTS = "card.json", "results.json"
OVERVIEW = "overview.json"


class Column(NamedTuple):
    key: str
    part: str  # card (of the SAE) or autointerp (of its cache)
    italian: str
    english: str
    scale: float
    digits: int
    good: int  # 1: more is better, -1: less is, 0: neither


COLUMNS = (
    Column("l0", "card", "L0", "L0", 1, 1, 0),
    Column("explained_variance", "card", "Varianza spiegata, %", "Explained variance, %", 100, 1, 1),
    Column("ce_loss_recovered", "card", "CE recuperata, %", "CE recovered, %", 100, 1, 1),
    Column("dead", "card", "Morti, %", "Dead, %", 100, 1, -1),
    Column("detection", "autointerp", "Detection media", "Mean detection", 1, 3, 1),
    Column("share_detected", "autointerp", "Detection ≥ 0,8, %", "Detection ≥ 0.8, %", 100, 1, 1),
)


def read_suite(folder: Path, caches: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Return one row per SAE of a suite's folder that has a card: name, layer, site, width, numbers with intervals.

    Scores are those of the cache that was built with the SAE: among `caches`, and in the SAE's own folder. Rows are
    ordered by layer, site and width. Raises: UsageError when no SAE has a card, DataError naming a card cut short.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; the folder of a suite was expected.")
    cards = sorted(folder.glob(f"*/{CARD}"))
    if not cards:
        raise UsageError(f"{folder} holds no SAE with a {CARD}. Evaluate its SAEs: sae-italian evaluate {folder}/NAME")
    rows = [_row(card.parent, _results(card.parent, caches)) for card in cards]
    return sorted(rows, key=lambda row: (row["layer"], row["site"], row["d_sae"], row["name"]))


def _results(sae: Path, caches: Sequence[Path]) -> tuple[Path | None, dict[str, Any]]:
    """Return the cache that was built with an SAE, and its results; nothing where there is none."""
    for cache in (*caches, *(path.parent for path in sae.glob("*/manifest.json"))):
        manifest = read_json(cache / "manifest.json") if (cache / "manifest.json").is_file() else {}
        if "sae" in manifest and Path(manifest["sae"]).resolve() == sae.resolve() or cache.parent == sae:
            file = cache / RESULTS
            return cache, read_json(file) if file.is_file() else {}
    return None, {}


def _row(sae: Path, found: tuple[Path | None, dict[str, Any]]) -> dict[str, Any]:
    cache, results = found
    try:
        card = read_json(sae / CARD)
        hook = parse_hook_name(card["hook_name"])
        parts = {"card": card, "autointerp": results.get("autointerp") or {}}
        row: dict[str, Any] = {"name": sae.name, "layer": hook.layer, "site": hook.site or "", "d_sae": card["d_sae"]}
        row["hook_name"], row["cache"] = card["hook_name"], None if cache is None else str(cache)
        for column in COLUMNS:
            estimate = parts[column.part].get(column.key) or {"value": None, "lo": None, "hi": None}
            row[column.key] = {end: estimate[end] for end in ("value", "lo", "hi")}
        return row
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{sae / CARD} cannot be read ({error}). Make it again: sae-italian evaluate {sae}") from error


def write_overview(rows: list[dict[str, Any]], out: Path, title: str) -> Path:
    """Write `index.html`, `overview.svg` and `overview.json` into `out`, each whole; return the page's path.

    Raises: UsageError if `out` holds anything else.
    """
    ours = {"index.html", "overview.svg", OVERVIEW}
    if out.exists() and (not out.is_dir() or {child.name for child in out.iterdir()} - ours):
        raise UsageError(f"{out} holds something else than an overview. Give a new or an empty folder.")
    write_json(out / OVERVIEW, {"title": title, "rows": rows})
    write_text(out / "overview.svg", picture(rows))
    with atomic_path(out / "index.html") as temporary:
        temporary.write_text(page(rows, title, out), encoding="utf-8")
    return out / "index.html"


def _tint(rows: list[dict[str, Any]], column: Column) -> list[float | None]:
    """Return how good each row is in a column, 0 the worst of the suite and 1 the best; None where nothing was measured."""
    values = [row[column.key]["value"] for row in rows]
    known = [value for value in values if value is not None]
    if not column.good or not known or max(known) == min(known):
        return [None] * len(rows)
    lo, hi = min(known), max(known)
    return [None if v is None else (v - lo if column.good > 0 else hi - v) / (hi - lo) for v in values]


def page(rows: list[dict[str, Any]], title: str, out: Path) -> str:
    """Return the page: a table without a script, in both languages, the better the cell the stronger its tint."""
    tints = {column.key: _tint(rows, column) for column in COLUMNS}
    head = "".join(f'<th scope="col" class="num">{c.italian}<small lang="en">{c.english}</small></th>' for c in COLUMNS)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(_cell(row[column.key], column, tints[column.key][index]) for column in COLUMNS)
        body.append(
            f'<tr><th scope="row">{_linked(row, out)}</th><td class="num">{row["layer"]}</td>'
            f'<td>{html.escape(row["site"])}</td><td class="num">{row["d_sae"]}</td>{cells}</tr>'
        )
    return f"""<!doctype html>
<html lang="it"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:">
<title>{html.escape(title)}</title><style>
{style()}
.sae-italian .run p {{ margin-bottom: 16px; }}
.sae-italian .overview td, .sae-italian .overview th {{ padding: 7px 10px; }}
.sae-italian .overview small {{ display: block; color: inherit; opacity: 0.8; }}
.sae-italian .overview td.tint {{ background: color-mix(in srgb, var(--accent) calc(var(--good) * 38%), transparent); }}
</style></head><body><div class="sae-italian"><main class="page">
<header class="run"><h1>{html.escape(title)}</h1>
<p class="muted">{len(rows)} SAE; intervalli al 95 %. <span lang="en">{len(rows)} SAEs; 95 % intervals.</span></p></header>
<section class="panel scroll" tabindex="0" role="region" aria-label="Suite"><table class="overview"><thead><tr><th scope="col">SAE</th>
<th scope="col" class="num">Strato<small lang="en">Layer</small></th><th scope="col">Sito<small lang="en">Site</small></th>
<th scope="col" class="num">Latenti<small lang="en">Latents</small></th>{head}</tr></thead><tbody>
{chr(10).join(body)}
</tbody></table></section></main></div></body></html>
"""


def _cell(estimate: dict[str, Any], column: Column, tint: float | None) -> str:
    if estimate["value"] is None:
        return '<td class="num muted">–</td>'
    value, lo, hi = (
        None if estimate[end] is None else f"{column.scale * estimate[end]:.{column.digits}f}"
        for end in ("value", "lo", "hi")
    )
    interval = "" if lo is None or hi is None else f"<small>[{lo}, {hi}]</small>"
    shade = "" if tint is None else f' style="--good: {tint:.2f}"'
    return f'<td class="num{"" if tint is None else " tint"}"{shade}>{value}{interval}</td>'


def _linked(row: dict[str, Any], out: Path) -> str:
    """Return the SAE's name, linked to the browser of its cache where that was written beside it."""
    name = html.escape(row["name"])
    cache = row["cache"] and Path(row["cache"])
    for report in (cache.with_name(f"{cache.name}-report"), cache.with_name("report")) if cache else ():
        if (report / "index.html").is_file():
            return f'<a href="{html.escape(os.path.relpath(report / "index.html", out))}">{name}</a>'
    return name


def picture(rows: list[dict[str, Any]]) -> str:
    """Return one panel per number that was measured: layers across, sites and widths down, as SVG."""
    shown = [column for column in COLUMNS if any(row[column.key]["value"] is not None for row in rows)]
    layers = sorted({row["layer"] for row in rows})
    kinds = sorted({(row["site"], row["d_sae"]) for row in rows})

    def draw(axes: Any) -> None:
        for axis, column in zip(axes, shown, strict=True):
            grid = np.full((len(kinds), len(layers)), np.nan)
            for row in rows:
                if row[column.key]["value"] is not None:
                    place = kinds.index((row["site"], row["d_sae"])), layers.index(row["layer"])
                    grid[place] = column.scale * row[column.key]["value"]
            axis.imshow(grid, aspect="auto", alpha=0.6, cmap="YlGn" if column.good >= 0 else "YlOrBr")
            for (down, across), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    axis.text(across, down, f"{value:.{column.digits}f}", ha="center", va="center", fontsize=8)
            axis.set_title(column.english, fontsize=9)
            axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
            axis.set_yticks(range(len(kinds)), [f"{site} {width}" for site, width in kinds] if axis is axes[0] else [])
            axis.set_xlabel("layer")

    return svg(draw, max(1, len(shown)), (2.2 * max(1, len(shown)) + 1, 1.2 + 0.45 * len(kinds)))


def overview_text(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["| SAE | " + " | ".join(column.english for column in COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        values = [(row[c.key]["value"], c) for c in COLUMNS]
        shown = ["–" if value is None else f"{c.scale * value:.{c.digits}f}" for value, c in values]
        lines.append(f"| {row['name']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)

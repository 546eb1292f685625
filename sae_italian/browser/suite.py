"""The overview of a suite: layers x sites x widths with the numbers of every SAE, as a page, a picture and JSON."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sae_italian.base.errors import UsageError
from sae_italian.base.labels import label
from sae_italian.base.report import svg, table
from sae_italian.base.storage import LOCK_FILE, locked, read_json, understood, write_json, write_text
from sae_italian.browser.graph import report_beside
from sae_italian.browser.opening import loaded_sae, open_pages
from sae_italian.browser.page import static_text, style, template
from sae_italian.browser.source import RESULTS
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import parse_hook_name
from sae_italian.saes import model_of

CARD, OVERVIEW = "card.json", "overview.json"
PER_SAE = 5  # latents of a sentence that are shown of each SAE
Row = dict[str, Any]

# in both languages; the better a cell the stronger its tint
_TABLES = template("""\
{% macro name(own, place, shown) %}
{% set address = links.get(own.cache) %}
{% if address %}<a href="{{ address }}{{ place }}">{{ shown }}</a>{% else %}{{ shown }}{% endif %}
{% endmacro %}
{% macro both(key) %}{{ label(key, "it") }}<small lang="en">{{ label(key, "en") }}</small>{% endmacro %}
<section class="panel scroll" tabindex="0" role="region" aria-label="Suite">
<table class="overview"><thead><tr>
<th scope="col">SAE</th><th scope="col" class="num">Strato<small lang="en">Layer</small></th>
<th scope="col">Sito<small lang="en">Site</small></th>
<th scope="col" class="num">Latenti<small lang="en">Latents</small></th>
{% for number in numbers %}
<th scope="col" class="num">{{ both("suite." ~ number.key) }}</th>
{% endfor %}
</tr></thead><tbody>
{% for row, cells in rows %}
<tr><th scope="row">{{ name(row, "", row.name) }}</th><td class="num">{{ row.layer }}</td>
<td>{{ row.site }}</td><td class="num">{{ row.d_sae }}</td>
{% for number, tint in cells %}
{% set own = row[number.key] %}
<td class="num{{ " muted" if own.value is none }}{{ " tint" if tint == tint }}"
{%- if tint == tint %} style="--good: {{ "%.2f" % tint }}"{% endif %}>
{{- number.text(own.value) }}
{%- if own.lo is not none and own.hi is not none %}
<small>[{{ number.text(own.lo) }}, {{ number.text(own.hi) }}]</small>
{%- endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></section>
{% if found %}
<section class="panel scroll"><table class="overview">
<caption><b>«{{ sentence }}»</b> {{ label("suite.sentence", "it") }}
<span lang="en">{{ label("suite.sentence", "en") }}</span></caption>
{% for own in found %}
<tr><th scope="row">{{ own.name }}</th><td>{{ name(own, "#latent=" ~ own.latent, own.latent) }}</td>
<td class="num">{{ "{:.0%}".format(own.share) }}</td><td>«{{ own.token }}»</td>
<td>{{ own.title_it }}<small lang="en">{{ own.title_en }}</small></td></tr>
{% endfor %}
</table></section>
{% endif %}
""")


class Number(NamedTuple):
    """A column of the overview; its label is `suite.<key>`."""

    key: str
    part: str  # card (of the SAE) or autointerp (of its cache)
    scale: float
    digits: int
    good: int  # 1: more is better, -1: less is, 0: neither

    def text(self, value: float | None) -> str:
        return "–" if value is None else f"{self.scale * value:.{self.digits}f}"


NUMBERS = (
    Number("l0", "card", 1, 1, 0),
    Number("explained_variance", "card", 100, 1, 1),
    Number("ce_loss_recovered", "card", 100, 1, 1),
    Number("dead", "card", 100, 1, -1),
    Number("detection", "autointerp", 1, 3, 1),
    Number("share_detected", "autointerp", 100, 1, 1),
)


def read_suite(folder: Path, caches: Sequence[Path] = ()) -> list[Row]:
    """Return one row per SAE of a suite's folder that has a card: name, layer, site, width, numbers with intervals.

    Scores are those of the cache that was built with the SAE: among `caches`, and in the SAE's own folder. Rows are
    ordered by layer, site and width. Raises: UsageError when no SAE has a card or none of `caches` is of one of them,
    DataError naming a card cut short, and for what is no cache of today's schema.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; the folder of a suite was expected.")
    built = {Path(Manifest.load(cache).sae).resolve(): cache for cache in reversed(caches)}
    rows = [_row(card.parent, built.get(card.parent.resolve())) for card in folder.glob(f"*/{CARD}")]
    if not rows:
        raise UsageError(f"{folder} holds no SAE with a {CARD}. Evaluate its SAEs: sae-italian evaluate {folder}/NAME")
    if caches and not {row["cache"] for row in rows} & {*map(str, caches)}:
        raise UsageError(
            f"{caches[0]} was built with an SAE that is not in {folder}. If that was moved: "
            f"sae-italian cache build {folder}/NAME --out {caches[0]} --resume, with the options of then."
        )
    return sorted(rows, key=lambda row: (row["layer"], row["site"], row["d_sae"], row["name"]))


def _row(sae: Path, cache: Path | None) -> Row:
    cache = cache or next((file.parent for file in sae.glob("*/manifest.json")), None)
    results = read_json(cache / RESULTS) if cache and (cache / RESULTS).is_file() else {}
    with understood(sae / CARD, f"Make it again: sae-italian evaluate {sae}"):
        card = read_json(sae / CARD)
        hook = parse_hook_name(card["hook_name"])
        parts = {"card": card, "autointerp": results.get("autointerp") or {}}
        row: Row = {"name": sae.name, "layer": hook.layer, "site": hook.site or "", "d_sae": card["d_sae"]}
        row["hook_name"], row["cache"] = card["hook_name"], None if cache is None else str(cache)
        for number in NUMBERS:
            estimate = parts[number.part].get(number.key) or {"value": None, "lo": None, "hi": None}
            row[number.key] = {end: estimate[end] for end in ("value", "lo", "hi")}
        return row


def latents_of(sentence: str, rows: Sequence[Row]) -> list[Row]:
    """Return the latents that a sentence wakes most in every SAE of the suite that has a cache, as shares of their maximum.

    Raises: UsageError for a text that is too long, and when no SAE has its cache, and itself and its model at hand.
    """
    found, model = [], None
    for row in rows:
        cache = row["cache"] and FeatureCache.open(row["cache"])
        sae = cache and loaded_sae(cache)
        if not sae:
            continue
        model = model or model_of(sae, cache.manifest.model)
        pages = open_pages(cache.folder, weights={"sae": sae, "model": model}, live=True)
        said = pages.live.call("tokens", {"sentence": sentence}) if pages.live else {"strongest": []}
        fired = (own for own in said["strongest"] if own["share"])  # else never seen to fire
        for own in sorted(fired, key=lambda own: -own["share"])[:PER_SAE]:
            told = pages.source.row(own["latent"])
            names = {f"title_{lang}": told[f"title_{lang}"] or told[f"explanation_{lang}"] for lang in ("it", "en")}
            piece = said["tokens"][own["token"]]["text"].strip()
            found.append({"name": row["name"], "cache": row["cache"], **own, "token": piece, **names})
    if not found:
        raise UsageError(
            f"no SAE here has a cache, and itself and its model at hand: {', '.join(r['name'] for r in rows)}."
        )
    return found


def write_overview(rows: list[Row], out: Path, title: str, found: Sequence[Row] = (), sentence: str = "") -> Path:
    """Write `index.html`, `overview.svg` and `overview.json` into `out`, each whole; return the page's path.

    Raises: UsageError if `out` holds anything else, or another process writes it.
    """
    with locked(out):
        if {child.name for child in out.iterdir()} - {"index.html", "overview.svg", OVERVIEW, LOCK_FILE}:
            raise UsageError(f"{out} holds something else than an overview. Give a new or an empty folder.")
        write_json(out / OVERVIEW, {"title": title, "rows": rows, "sentence": sentence, "latents": list(found)})
        write_text(out / "overview.svg", picture(rows))
        write_text(out / "index.html", overview_page(rows, title, out, found, sentence))
    return out / "index.html"


def overview_page(rows: list[Row], title: str, out: Path, found: Sequence[Row] = (), sentence: str = "") -> str:
    """Return the page: tables without a script, of the suite and of the latents that were `found` for a sentence."""
    good = _values(rows)[[number.key for number in NUMBERS]] * [number.good for number in NUMBERS]
    best, worst = good.max(), good.min()
    tints = ((good - worst) / (best - worst).where(best > worst)).to_numpy()
    tables = _TABLES.render(
        rows=[(row, [*zip(NUMBERS, own, strict=True)]) for row, own in zip(rows, tints, strict=True)],
        numbers=NUMBERS,
        found=found,
        sentence=sentence,
        links={row["cache"]: report_beside(Path(row["cache"]), out) for row in rows if row["cache"]},
        label=label,
    )
    return Template(static_text("suite.html")).substitute(
        title=escape(title), style=style(), n=len(rows), tables=tables
    )


def _values(rows: Sequence[Row]) -> pd.DataFrame:
    """Return place and numbers of each SAE, a column each; NaN where nothing was measured."""
    places = [{name: row[name] for name in ("site", "d_sae", "layer")} for row in rows]
    values = [{number.key: row[number.key]["value"] for number in NUMBERS} for row in rows]
    return pd.DataFrame(places).join(pd.DataFrame(values, dtype=float))


def picture(rows: list[Row]) -> str:
    """Return one panel per number that was measured: layers across, sites and widths down, as SVG."""
    grids = _values(rows).groupby(["site", "d_sae", "layer"]).last()
    shown = [number for number, known in zip(NUMBERS, grids.notna().any(), strict=True) if known]

    def draw(axes: Any) -> None:
        for axis, number in zip(axes, shown, strict=True):
            grid = pd.DataFrame(grids[number.key].unstack())
            for (down, across), value in np.ndenumerate(grid.to_numpy()):
                if not np.isnan(value):
                    axis.text(across, down, number.text(value), ha="center", va="center", fontsize=8, color="black")
            axis.set_facecolor("#fefefe")  # no house colour: the cells stay light in the dark
            axis.imshow(number.scale * grid, aspect="auto", alpha=0.6, cmap="YlGn" if number.good >= 0 else "YlOrBr")
            axis.set_title(label(f"suite.{number.key}"), fontsize=9)
            axis.set_xticks(range(grid.shape[1]), map(str, grid.columns))
            names = [f"{site} {width}" for site, width in grid.index] if axis is axes[0] else []
            axis.set_yticks(range(len(grid)), names)
            axis.set_xlabel("layer")

    n_kinds = len(grids.groupby(["site", "d_sae"]))
    return svg(draw, max(1, len(shown)), (2.2 * max(1, len(shown)) + 1, 1.2 + 0.45 * n_kinds))


def overview_text(rows: list[Row], found: Sequence[Row] = ()) -> str:
    """Return the table as Markdown, and that of a sentence's latents."""
    heads = " | ".join(label(f"suite.{number.key}") for number in NUMBERS)
    cells = ([row["name"], *(number.text(row[number.key]["value"]) for number in NUMBERS)] for row in rows)
    told = [(own["name"], own["latent"], f"{own['share']:.0%}", own["token"], own["title_it"] or "-") for own in found]
    more = table("SAE | latent | of its maximum | strongest on | what it is", told) if told else ""
    return f"{table(f'SAE | {heads}', cells)}\n\n{more}".strip()

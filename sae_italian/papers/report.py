"""A report as sections of text, tables and pictures, written as Markdown and as one HTML page that needs nothing else."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd

from sae_italian.base.labels import filled, label
from sae_italian.base.report import COLOURS, INK, MARKERS, OTHERS, OURS, REFERENCE, page, svg, table
from sae_italian.base.storage import read_yaml, write_text
from sae_italian.saes.baselines import TOPK

NOT_DONE = "Not done · Non svolto"
LONGEST = 240  # characters of a cell in the form `short`; report.json has the whole


Parts = list[tuple[str, str]]
"""Of a report: headings, texts and tables in Markdown, each with its language, `en` or `it`."""


def write_report(out: Path, parts: Parts, pictures: dict[str, str]) -> None:
    """Write report.md, report.html and pictures/*.svg into `out`; a picture is an SVG by its file's name without .svg."""
    for name, picture in pictures.items():
        write_text(out / "pictures" / f"{name}.svg", picture)
    texts, italian = [text for text, _ in parts], {text for text, language in parts if language == "it"}
    drawn = {image_of(name): picture for name, picture in pictures.items()}
    write_text(out / "report.md", "\n\n".join(texts) + "\n")
    write_text(out / "report.html", page(texts[0].removeprefix("# "), texts, pictures=drawn, italian=italian))


def image_of(name: str) -> str:
    """Return the Markdown of a report's picture."""
    return f"![{name}](pictures/{name}.svg)"


# --- tables that a YAML describes ------------------------------------------------------------------------------------


# Tables and sections that several reports have, by name.
SHARED: dict[str, Any] = read_yaml(Path(__file__).with_name("shared.yaml"))


def section_of(words: dict[str, Any], result: dict[str, Any], head: bool = False) -> Parts:
    """Return a section (or a report's head) in the words of a YAML, their {names} filled in from a result.

    `text_given` is said in the place of `text` where an SAE was given.
    """
    text = words["text_given"] if result.get("given") and "text_given" in words else words["text"]
    title, text = ({key: filled(said, result, key) for key, said in each.items()} for each in (words["title"], text))
    tables = [(table, "en") for described in words.get("tables", ()) for table in tables_of(described, result)]
    heads = [(f"# {title['en']}", "en"), (f"*{title['it']}*", "it")]
    return [*(heads if head else heading(title)), *((said, key) for key, said in text.items()), *tables]


def heading(title: dict[str, str]) -> Parts:
    """Return the heading of a section in both languages."""
    return [(f"## {title['en']} · {title['it']}", "en")]


def tables_of(described: dict[str, Any] | str, result: dict[str, Any]) -> list[str]:
    """Return the tables of a result, in Markdown with their captions, that a description stands for (or the name of a shared one).

    `rows` is the path to a list (empty: the result is the one row), `columns` the heads with the path and form of each
    cell. Or `facts` are rows with their paths, and `of` the columns' heads with the part of the result each is about (a
    part that is not there has none). Or `markdown` is the path to a table's lines. `each` repeats the table for every item
    of a list.
    """
    spec = SHARED[described] if isinstance(described, str) else described
    parts = lookup(result, spec["each"]) if "each" in spec else [result]
    return [_table_of(spec, part) for part in parts]


def _table_of(spec: dict[str, Any], part: Any) -> str:
    caption = spec.get("caption", "").format_map(part)
    above = f"**{caption}**\n\n" if caption else ""
    if "markdown" in spec:
        return above + "\n".join(lookup(part, spec["markdown"]))
    if "facts" in spec:
        parts = {name: lookup(part, path) for name, path in spec["of"].items()}
        parts = {name: value for name, value in parts.items() if value is not None}
        names = {name: label(name) if name.startswith("card.") else name for name in spec["facts"]}
        rows = [(names[name], *(cell(value, path) for value in parts.values())) for name, path in spec["facts"].items()]
        return above + table(" | ".join([spec.get("head", ""), *parts]), rows)
    rows = lookup(part, spec["rows"]) if spec["rows"] else [part]
    cells = [[cell(row, path) for path in spec["columns"].values()] for row in rows]
    return above + table(" | ".join(spec["columns"]), cells)


def lookup(results: Any, path: str) -> Any:
    """Return what lies at a dotted path of dicts and lists; None where it is not there.

    `*` gives a list of all, an empty path the results themselves.
    """
    for i, key in enumerate(parts := path.split(".") if path else []):
        if key == "*":
            return [lookup(item, ".".join(parts[i + 1 :])) for item in results or ()]
        try:
            results = results[int(key)] if isinstance(results, list) else results[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return results


def cell(row: Any, path: str) -> str:
    """Return a value as text of a table's cell.

    A form may follow the path: `|2` decimals, `|%`, `|short`, or Python's, as `|.3g`.
    """
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
        middle, low, high = (shown(value.get(key), digits, percent=percent) for key in ("value", "lo", "hi"))
        return middle if "-" in (middle, low, high) else f"{middle} ({low} to {high})"
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if percent:
        return f"{round(100 * value, 1) + 0.0:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"


# --- pictures, as SVG ------------------------------------------------------------------------------------------------


_LOOKS = [{"color": colour, "marker": marker} for colour, marker in zip(COLOURS, MARKERS, strict=False)]
LOOKS = {  # name, colour and marker of a dictionary
    "sae": ("SAE", OURS, "o"),
    "pca": ("PCA", OTHERS[0], "s"),
    "ica": ("ICA", OTHERS[4], "^"),
    "nmf": ("NMF", OTHERS[2], "D"),
    "random": ("random directions", REFERENCE, "X"),
    "identity": ("neurons", OTHERS[1], "v"),
}


def dictionary_name(name: str) -> str:
    """Return what tables and pictures call a dictionary."""
    kind, _, suffix = name.partition("-")
    return LOOKS[kind][0] + (", top-k" if suffix else "")


def look(name: str) -> dict[str, str]:
    """Return the colour and the marker of a dictionary, as matplotlib's lines take them; a ring for a top-k one."""
    _, colour, marker = LOOKS[name.partition("-")[0]]
    return {"color": colour, "marker": marker, "markerfacecolor": "none" if name.endswith(TOPK) else colour}


def baselines_svg(layers: Sequence[dict[str, Any]]) -> str:
    """Return scores by layer (top and random, random only), the curve of the middle layer, perplexity by layer."""
    layers = sorted(layers, key=lambda layer: layer["layer"])
    dots: Any = pd.DataFrame([{**row, "place": str(layer["layer"])} for layer in layers for row in layer["rows"]])
    dots["series"], looks = dots["dictionary"].map(dictionary_name), [*map(look, dots["dictionary"].unique())]
    panels = {
        "simulation": "simulation, top and random · simulazione, forti e casuali",
        "simulation_random": "simulation, random only · solo casuali",
        "perplexity": "perplexity · perplessità",
    }

    def draw(axes: Any) -> None:
        first, second, third, last = axes
        for axis, (key, title) in zip((first, second, last), panels.items(), strict=True):
            _beside(axis, dots, key, title, looks)
            axis.set_xlabel("layer · strato")
        _curves(third, layers[len(layers) // 2])
        own, places = [layer["rows"][0]["perplexity_of_model"]["value"] for layer in layers], np.arange(len(layers))
        named = {"color": INK, "linestyle": ":", "label": "the model · il modello"}
        line = last.hlines(own, places - 0.45, places + 0.45, **named)
        last.set_yscale("log")
        last.legend(handles=[line])
        first.legend()

    return svg(draw, 4, (15.0, 4.4))


def _beside(axis: Any, dots: Any, key: str, title: str = "", looks: Sequence[dict[str, str]] = _LOOKS) -> None:
    """Draw series side by side; a row of `dots` is a dot's `series`, its `place` on the axis, and its estimate at `key`."""
    places, series = dots["place"].unique().tolist(), dots.groupby("series", sort=False)
    for i, (name, some) in enumerate(series):
        value, low, high = pd.DataFrame(some[key].tolist())[["value", "lo", "hi"]].to_numpy(dtype=float).T
        # what was not measured is NaN, and not drawn
        around = np.nan_to_num([value - low, high - value]).clip(0)
        x = [places.index(place) + 0.8 * ((i + 0.5) / len(series) - 0.5) for place in some["place"]]
        style = {"linestyle": "none", "markersize": 4.5, "elinewidth": 1, "label": name, **looks[i % len(looks)]}
        axis.errorbar(x, value, yerr=around, **style)
    axis.set_xticks(range(len(places)), places)
    axis.set_title(title, fontsize=9)


def _curves(axis: Any, layer: dict[str, Any]) -> None:
    for name, points in layer["curves"].items():
        x, y = ([point[key] for point in points] for key in ("l0", "explained_variance"))
        axis.plot(x, y, **look(name), markersize=3, linewidth=1.2)
    row = layer["rows"][0]
    axis.plot(row["l0"]["value"], row["explained_variance"]["value"], "*", color=OURS, markersize=11)
    axis.set_xscale("log", base=2)
    axis.set_ylim(max(-0.1, axis.get_ylim()[0]), 1.02)
    axis.set_xlabel("L0 (k strongest kept · i k più forti)")
    axis.set_title(f"explained variance, layer {layer['layer']} · varianza spiegata", fontsize=9)


def sweep_svg(points: Sequence[dict[str, Any]], layer: dict[str, Any]) -> str:
    """Return FVU against L0 of SAEs trained at several sparsities, with the baselines' curves of that layer."""

    def draw(axes: Any) -> None:
        (axis,) = axes
        for name, curve in layer["curves"].items():
            x, y = [p["l0"] for p in curve], [1 - p["explained_variance"] for p in curve]
            label = dictionary_name(name) + (", k strongest · i k più forti" if name == "sae" else "")
            axis.plot(x, y, **look(name), markersize=3, linewidth=1, alpha=0.8, label=label)
        x, y = ([point[key]["value"] for point in points] for key in ("l0", "fvu"))
        axis.plot(x, y, color=OURS, marker="*", markersize=10, linewidth=1.6, label="SAE, L1")
        axis.set_xscale("log", base=2)
        axis.set_ylim(-0.02, min(1.1, max(1.0, *y)))
        axis.set_xlabel("L0")
        axis.set_ylabel("FVU")
        axis.legend()

    return svg(draw, 1, (6.5, 4.2))


def scores_svg(auto: dict[str, Any], random: dict[str, Any]) -> str:
    """Return detection, fuzzing and simulation of an SAE beside its shuffled explanations, token lookup and random SAE."""
    series = {
        "SAE": (auto, ""),
        "token lookup · solo il token": (auto, "lookup_"),
        "shuffled · scambiate": (auto, "shuffled_"),
        "random SAE · SAE casuale": (random, ""),
    }
    dots = [
        {"series": name, "place": part, "score": of[f"{prefix}{part}"]}
        for name, (of, prefix) in series.items()
        for part in ("detection", "fuzzing", "simulation")
    ]

    def draw(axes: Any) -> None:
        _beside(axes[0], pd.DataFrame(dots), "score")
        axes[0].axhline(0.5, color=INK, linewidth=0.7, linestyle=":")
        axes[0].set_ylabel("balanced accuracy; correlation of the simulation")
        axes[0].legend()

    return svg(draw, 1, (7.0, 3.8))


def suite_svg(rows: Sequence[dict[str, Any]]) -> str:
    """Return explained variance (uncentred), delta LM loss and dead latents by site, one colour a width."""
    panels = {
        "explained_variance_uncentred": "explained variance · varianza spiegata",
        "delta_lm_loss": "delta LM loss (nats)",
        "dead": "dead latents · latenti morti",
    }
    dots: Any = pd.DataFrame(sorted(rows, key=lambda row: row["expansion"]))
    dots["series"] = [f"{width:g}x" for width in dots["expansion"]]
    dots["place"] = "L" + dots["layer"].astype(str) + dots["site"]

    def draw(axes: Any) -> None:
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            _beside(axis, dots, key, title)
            axis.set_xlabel("layer and site · strato e sito")
        axes[0].legend()

    return svg(draw, 3, (11.0, 3.6))

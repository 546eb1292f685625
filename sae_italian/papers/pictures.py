"""The pictures of the papers' comparisons, as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sae_italian.base.pictures import INK, OTHERS, OURS, REFERENCE, svg
from sae_italian.saes.baselines import TOPK

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


def colour(name: str) -> str:
    return LOOKS[name.partition("-")[0]][1]


def marker(name: str) -> str:
    return LOOKS[name.partition("-")[0]][2]


def baselines_svg(result: dict[str, Any]) -> str:
    """Return scores by layer (top and random, random only), the curve of the middle layer, perplexity by layer."""
    layers = sorted(result["layers"], key=lambda layer: layer["layer"])

    def draw(axes: Any) -> None:
        first, second, third, last = axes
        _by_layer(first, layers, "simulation", "simulation, top and random · simulazione, forti e casuali")
        _by_layer(second, layers, "simulation_random", "simulation, random only · solo casuali")
        _curves(third, layers[len(layers) // 2])
        _by_layer(last, layers, "perplexity", "perplexity · perplessità")
        own, places = [layer["rows"][0]["perplexity_of_model"]["value"] for layer in layers], np.arange(len(layers))
        look = {"color": INK, "linestyle": ":", "label": "the model · il modello"}
        line = last.hlines(own, places - 0.45, places + 0.45, **look)
        last.set_yscale("log")
        last.legend(handles=[line])
        first.legend()

    return svg(draw, 4, (15.0, 4.4))


def _by_layer(axis: Any, layers: Sequence[dict[str, Any]], key: str, title: str) -> None:
    """Draw one dot with its interval for each dictionary and layer, side by side."""
    names = [row["dictionary"] for row in layers[0]["rows"]]
    for i, name in enumerate(names):
        found = [next((row for row in layer["rows"] if row["dictionary"] == name), None) for layer in layers]
        known = {j: row[key] for j, row in enumerate(found) if row is not None and row[key]["value"] is not None}
        values, around = _bars(known.values())
        hollow = name.endswith(TOPK)
        marks = {"fmt": marker(name), "markerfacecolor": "none" if hollow else colour(name)}
        look = {"markersize": 4.5, "elinewidth": 1, "color": colour(name), "label": dictionary_name(name), **marks}
        axis.errorbar([j + 0.7 * (i / max(len(names) - 1, 1) - 0.5) for j in known], values, yerr=around, **look)
    axis.set_xticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axis.set_xlabel("layer · strato")
    axis.set_title(title, fontsize=9)


def _bars(estimates: Iterable[dict[str, Any]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Return values, and how far their intervals reach below and above; nothing measured is 0, no interval none."""
    found = [(e["value"] or 0.0, e["lo"], e["hi"]) for e in estimates]
    below = [0.0 if low is None else max(0.0, value - low) for value, low, _ in found]
    above = [0.0 if high is None else max(0.0, high - value) for value, _, high in found]
    return [value for value, _, _ in found], (below, above)


def _beside(axis: Any, found: dict[int, dict[str, Any]], i: int, n: int, **look: Any) -> None:
    """Draw the bars of one of n series, its estimates by their places on the axis."""
    value, around = _bars(found.values())
    axis.bar([place + 0.8 * ((i + 0.5) / n - 0.5) for place in found], value, 0.75 / n, yerr=around, ecolor=INK, **look)


def _curves(axis: Any, layer: dict[str, Any]) -> None:
    for name, points in layer["curves"].items():
        x, y = ([point[key] for point in points] for key in ("l0", "explained_variance"))
        axis.plot(x, y, color=colour(name), marker=marker(name), markersize=3, linewidth=1.2)
    row = layer["rows"][0]
    axis.plot(row["l0"]["value"], row["explained_variance"]["value"], "*", color=colour("sae"), markersize=11)
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
            axis.plot(x, y, color=colour(name), marker=marker(name), markersize=3, linewidth=1, alpha=0.8, label=label)
        x, y = ([point[key]["value"] for point in points] for key in ("l0", "fvu"))
        axis.plot(x, y, color=colour("sae"), marker="*", markersize=10, linewidth=1.6, label="SAE, L1")
        axis.set_xscale("log", base=2)
        axis.set_ylim(-0.02, min(1.1, max(1.0, *y)))
        axis.set_xlabel("L0")
        axis.set_ylabel("FVU")
        axis.legend()

    return svg(draw, 1, (6.5, 4.2))


def scores_svg(auto: dict[str, Any], random: dict[str, Any]) -> str:
    """Return detection, fuzzing and simulation of an SAE beside its shuffled explanations, token lookup and random SAE."""
    parts = ("detection", "fuzzing", "simulation")
    series = (
        ("SAE", auto, "{}", OURS),
        ("token lookup · solo il token", auto, "lookup_{}", OTHERS[4]),
        ("shuffled · scambiate", auto, "shuffled_{}", REFERENCE),
        ("random SAE · SAE casuale", random, "{}", OTHERS[0]),
    )

    def draw(axes: Any) -> None:
        (axis,) = axes
        for i, (label, source, key, shade) in enumerate(series):
            found = {j: source[key.format(part)] for j, part in enumerate(parts)}
            _beside(axis, found, i, len(series), color=shade, label=label)
        axis.axhline(0.5, color=INK, linewidth=0.7, linestyle=":")
        axis.set_xticks(range(len(parts)), parts)
        axis.set_ylabel("balanced accuracy; correlation of the simulation")
        axis.legend()

    return svg(draw, 1, (7.0, 3.8))


def suite_svg(rows: Sequence[dict[str, Any]]) -> str:
    """Return explained variance (uncentred), delta LM loss and dead latents by site, one colour a width."""
    sites = list(dict.fromkeys(f"L{row['layer']}{row['site']}" for row in rows))
    widths = sorted({row["expansion"] for row in rows})
    shades = (OURS, *OTHERS)
    panels = {
        "explained_variance_uncentred": "explained variance · varianza spiegata",
        "delta_lm_loss": "delta LM loss (nats)",
        "dead": "dead latents · latenti morti",
    }

    def draw(axes: Any) -> None:
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            for i, width in enumerate(widths):
                own = [row for row in rows if row["expansion"] == width]
                found = {sites.index(f"L{row['layer']}{row['site']}"): row[key] for row in own}
                _beside(axis, found, i, len(widths), color=shades[i % len(shades)], label=f"{width:g}x")
            axis.set_xticks(range(len(sites)), sites)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("layer and site · strato e sito")
        axes[0].legend()

    return svg(draw, 3, (11.0, 3.6))

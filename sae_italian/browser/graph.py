"""The page of an attribution graph: one file that opens from disk, with the contexts and explanations of its latents."""

import html
import json
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from sae_italian.autointerp.choose import EXPLAINER
from sae_italian.base.errors import UsageError
from sae_italian.base.labels import label, page_labels
from sae_italian.base.storage import record_in, understood, write_text
from sae_italian.browser.directions import rounded
from sae_italian.browser.page import static_text
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache
from sae_italian.circuits import Graph, influence, prune
from sae_italian.circuits.check import Checked, check_svg
from sae_italian.circuits.show import id_of, sentence, standing

MOST_NODES = 2000  # on a page, the most influential ones
NODE_SHARE = 0.95  # of all influence; the page begins at 80 % and goes up to what it holds
CONTEXTS = 4  # of each latent
Latents = Mapping[tuple[int, int], Mapping[str, Any]]
"""By layer and latent: label_it, label_en, contexts, and href where its card stands in a browser."""


def caches_of(folder: Path, transcoders: Sequence[Any]) -> dict[int, FeatureCache]:
    """Return by layer the feature caches under a folder that were built with these transcoders. Raises: UsageError if none."""
    found: dict[int, FeatureCache] = {}
    caches = [path.parent for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}manifest.json"))]
    known = {(sae.cfg.metadata.hook_name, sae.cfg.d_sae): sae for sae in transcoders}
    for manifest, cache in [(FeatureCache.open(path).manifest, path) for path in caches]:
        sae, layer = known.get((manifest.hook_name, manifest.d_sae)), int(manifest.hook_name.split(".")[1])
        if sae is not None and layer not in found:
            found[layer] = FeatureCache.open(cache, sae=sae)
    if not found:
        raise UsageError(
            f"{folder} holds no feature cache of these transcoders. Build one for each layer: sae-italian cache build "
            "TRANSCODER --out FOLDER/LAYER; then sae-italian autointerp FOLDER/LAYER."
        )
    return found


def latents_of(folder: Path, transcoders: Sequence[Any], graph: Graph, out: Path, tokenizer: Any) -> Latents:
    """Return what the feature caches under a folder say of a graph's latents; `out` is where the page will stand.

    Raises: UsageError as `caches_of`.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    nodes = graph.nodes[graph.latents]
    for layer, cache in caches_of(folder, transcoders).items():
        source, href = LatentSource(cache, tokenizer), report_beside(cache.folder, out)
        for latent in np.unique(nodes.index[nodes.layer == layer]).tolist():
            found[layer, latent] = _told(source, latent, href)
    return found


def _told(source: LatentSource, latent: int, href: str) -> dict[str, Any]:
    explained = source.llm_explanation(latent) or source.explained(EXPLAINER, latent)
    contexts = [
        {"max": c["max"], "segments": [*map(list, c["segments"])]}
        for group in source.card(latent)["groups"][:1]
        for c in group["contexts"][:CONTEXTS]
    ]
    return {
        **{f"label_{lang}": getattr(explained, f"text_{lang}") for lang in ("it", "en")},
        "contexts": rounded(contexts, 3),
        "href": f"{href}#latent={latent}" if href else "",
    }


def report_beside(cache: Path, out: Path) -> str:
    """Return the address of a cache's browser from a page's folder; empty where none was written beside it."""
    for report in (cache.with_name(f"{cache.name}-report"), cache.with_name("report")):
        if (report / "index.html").is_file():
            return os.path.relpath(report / "index.html", out)
    return ""


def graphs_beside(cache: FeatureCache, out: Path) -> dict[int, list[dict[str, str]]]:
    """Return by latent the graphs beside a cache, or a folder further up, in which it is a node.

    Each has its prompt, and its address from `out`, where the cache's browser will stand.
    """
    found: dict[int, list[dict[str, str]]] = {}
    layer, sae = int(cache.manifest.hook_name.split(".")[1]), Path(cache.manifest.sae).resolve()
    for file in (file for up in cache.folder.resolve().parents[:2] for file in sorted(up.glob("*/graph.json"))):
        with understood(file.parent, "Remove that folder, or make the graph again."):
            spec = record_in(file.parent).get("spec", {})
            if Path(str(spec.get("transcoders", ""))).resolve() in (sae, sae.parent):
                graph = Graph.load(file.parent)
                page = os.path.relpath(file.with_name("index.html"), out.resolve())
                nodes = {one.index.item(): one for one in graph.nodes[graph.latents] if one.layer == layer}
                for latent, node in nodes.items():
                    address = f"{page}#node={id_of(node, graph.n_layers)}"
                    found.setdefault(latent, []).append({"prompt": graph.prompt, "href": address})
    return found


def write_graph_page(out: Path, graph: Graph, latents: Latents | None = None, checked: Checked | None = None) -> Path:
    """Write `index.html` into a folder: the graph, and what is known of its latents; return its path.

    The page is one text: words, script and data are in it, and it asks for nothing else.
    """
    data = _data(graph, latents or {}, checked)
    told = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    words = json.dumps(page_labels(), ensure_ascii=False)
    parts = (static_text(f"{name}.js") for name in ("base", "graph"))
    script = "\n".join((f'"use strict";\n(() => {{\nconst LABELS = {words};', *parts, "})();")).replace("</", "<\\/")
    text = Template(static_text("graph.html")).substitute(
        title=html.escape(graph.prompt),
        sentence=html.escape(data["sentence_it"]),
        digest=b64encode(sha256(script.encode()).digest()).decode(),
        style=static_text("base.css") + static_text("graph.css"),
        script=script,
        data=told,
    )
    write_text(out / "index.html", text)
    return out / "index.html"


def _data(graph: Graph, latents: Latents, checked: Checked | None) -> dict[str, Any]:
    reached = influence(graph)
    before = standing(reached) - reached / max(reached.sum(), 1e-10)  # what more influential nodes hold
    keep, small = prune(graph, NODE_SHARE)
    kept = np.flatnonzero(keep)
    order = np.argsort(np.where(small.of_kind("embedding", "logit"), -np.inf, -reached[kept]), kind="stable")
    shown = np.isin(np.arange(len(kept)), order[:MOST_NODES])
    kept, small = kept[shown], small.only(shown)
    nodes, (target, source, weight) = small.nodes, small.edges()
    # what is no latent has another layer, or index
    keys = [*zip(nodes.layer.tolist(), nodes.index.tolist(), strict=True)]
    labels = {lang: {key: told[f"label_{lang}"] for key, told in latents.items()} for lang in ("it", "en")}
    random = checked.scores["random"] if checked else None
    return {
        "prompt": graph.prompt,
        "model": graph.model,
        "tokens": graph.tokens,
        "n_layers": graph.n_layers,
        "nodes": {
            "id": [id_of(node, graph.n_layers) for node in nodes],
            **{name: nodes[name].tolist() for name in ("kind", "layer", "position", "index", "text")},
            **{f"label_{lang}": [told.get(key, "") for key in keys] for lang, told in labels.items()},
            "value": rounded(nodes.value.tolist(), 4),
            "influence": rounded(reached[kept].tolist(), 4),
            "before": rounded(before[kept].tolist(), 4),
        },
        "edges": {
            "target": target.tolist(),
            "source": source.tolist(),
            "weight": rounded(weight.tolist(), 4),
        },
        "cards": {f"{key[0]}_{key[1]}": latents[key] for key in keys if key in latents},
        "check": "data:image/svg+xml;base64," + b64encode(check_svg(checked).encode()).decode() if checked else "",
        **{f"sentence_{lang}": sentence(graph, labels[lang], lang, random) for lang in ("it", "en")},
        **{
            f"verdict_{lang}": checked.verdict(lang) if checked else label("graph.verdict.unchecked", lang)
            for lang in ("it", "en")
        },
    }

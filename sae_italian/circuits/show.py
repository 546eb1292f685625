"""A graph for people and for other tools: a table, a picture, Neuronpedia's graph JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sae_italian.base import pictures
from sae_italian.base.report import table
from sae_italian.base.storage import utc_now
from sae_italian.circuits.graph import UNEXPECTED, Graph, GraphNode, influence, prune, scores

Labels = Mapping[tuple[int, int], str]
"""By layer and latent what explains it."""
TYPES = {
    "latent": "cross layer transcoder",  # what Neuronpedia calls those of one layer too
    "error": "mlp reconstruction error",
    "rest": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}


def name_of(node: GraphNode, labels: Labels | None = None) -> str:
    """Return a node in words: `L1 latent 12 on «gatto»`, with its explanation where there is one."""
    if node.kind == "latent":
        told = (labels or {}).get((node.layer, node.index), "")
        return f"L{node.layer} latent {node.index} on «{node.text}»" + (f": {told}" if told else "")
    if node.kind == "logit":
        return f"«{node.text}» ({node.value:.0%})"
    where = {"error": f"L{node.layer} error on", "embedding": "input", "bias": f"L{node.layer} bias on"}
    return f"L{node.layer} other latents" if node.kind == "rest" else f"{where.get(node.kind, node.kind)} «{node.text}»"


def summary(graph: Graph, labels: Labels | None = None, top: int = 10) -> str:
    """Return what the graph says: its logits, its scores, its most influential nodes and what each gets most from."""
    found, reached, keep = scores(graph), influence(graph), prune(graph)[0]
    targets = [node for node in graph.nodes if node.kind == "logit"]
    logits = ", ".join(map(name_of, targets))
    head = (
        f"{graph.prompt} … {logits}\n"
        f"replacement score {found.replacement:.2f}, completeness {found.completeness:.2f}; {int(graph.of_kind('latent').sum())} "
        f"of {graph.n_active} active latents are nodes, {int((keep & graph.of_kind('latent')).sum())} stay when pruned"
    )
    if sum(node.value for node in targets) < UNEXPECTED:
        head += (
            "\nThe model does not expect what is explained here: the graph tells what speaks for it and against it, "
            "not why it would be written."
        )
    row_of = {target: row for row, target in enumerate(graph.targets.tolist())}
    rows = []
    for i in np.argsort(-reached, kind="stable")[:top].tolist():
        node, sources = graph.nodes[i], ""
        if i in row_of:
            edges = np.abs(graph.weights[row_of[i]]) * ~graph.of_kind("bias", "constant")
            sources = ", ".join(name_of(graph.nodes[s]) for s in np.argsort(-edges)[:2].tolist() if edges[s] > 0)
        rows.append((name_of(node, labels), f"{reached[i]:.3f}", sources))
    return f"{head}\n\n{table('node | influence | most from', rows)}"


def svg(graph: Graph, labels: Labels | None = None, most: int = 60) -> str:
    """Return a picture of what stays when the graph is pruned: tokens across, layers up, circles as large as the influence."""
    keep, square = prune(graph)
    kept = np.flatnonzero(keep).tolist()
    edges = [(kept[t], kept[s], float(square[t, s])) for t, s in np.argwhere(square).tolist()]
    reached = influence(graph)
    order = [i for i in np.argsort(-reached, kind="stable").tolist() if keep[i] and graph.nodes[i].kind != "logit"][
        :most
    ]
    chosen = [*order, *np.flatnonzero(graph.of_kind("logit")).tolist()]
    place = _places([graph.nodes[i] for i in chosen], chosen, len(graph.tokens))
    colours = {"latent": pictures.OURS, "logit": "black"}

    def draw(axes: Any) -> None:
        axis = axes[0]
        shown = [edge for edge in edges if edge[0] in place and edge[1] in place]
        largest = max((abs(weight) for *_, weight in shown), default=1.0)
        for target, source, weight in shown:
            (x0, y0), (x1, y1) = place[source], place[target]
            colour = pictures.OURS if weight > 0 else pictures.WARNING
            width = 0.3 + 3 * abs(weight) / largest
            axis.plot((x0, x1), (y0, y1), color=colour, linewidth=width, alpha=0.35, zorder=0)
        for i in chosen:
            node, (x, y) = graph.nodes[i], place[i]
            mark = {"latent": "o", "logit": "D", "embedding": "s"}.get(node.kind, "X")
            size = 25 + 500 * reached[i] / max(reached.max(), 1e-10)
            axis.scatter([x], [y], s=size, marker=mark, color=colours.get(node.kind, pictures.REFERENCE), zorder=1)
            if node.kind in ("latent", "logit"):
                text = str(node.index) if node.kind == "latent" else f"«{node.text}» {node.value:.0%}"
                axis.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        axis.set_xticks(range(len(graph.tokens)), [f"«{token}»" for token in graph.tokens], rotation=45, ha="right")
        layers = [f"layer {layer}" for layer in range(graph.n_layers)]
        axis.set_yticks(range(-1, graph.n_layers + 1), ["input", *layers, "next token"])
        axis.set_title("circles: latents; crosses: errors; green adds, red takes away", fontsize=8)

    return pictures.svg(draw, 1, (max(6.0, 0.9 * len(graph.tokens)), 1.5 + 1.1 * (graph.n_layers + 2)))


def _places(nodes: list[GraphNode], numbers: list[int], n_pos: int) -> dict[int, tuple[float, float]]:
    """Return where each node is drawn: side by side where several share a layer and a token."""
    groups: dict[tuple[int, int], list[int]] = {}
    for node, number in zip(nodes, numbers, strict=True):
        groups.setdefault((node.position if node.position >= 0 else n_pos, node.layer), []).append(number)
    found = {}
    for (position, layer), members in groups.items():
        for i, number in enumerate(members):
            found[number] = position + 0.8 * ((i + 0.5) / len(members) - 0.5), layer + 0.12 * (i % 3)
    return found


def neuronpedia(graph: Graph, slug: str, labels: Labels | None = None, node_share: float = 0.8) -> dict[str, Any]:
    """Return the pruned graph as Neuronpedia's and circuit-tracer's page read it (graph-schema.json, schema 1).

    Node ids are our own words for errors: circuit-tracer's `0_layer_pos` is also a latent's id, and links are joined by it.
    """
    keep, square = prune(graph, node_share)
    reached = influence(graph)
    order = np.argsort(-reached, kind="stable")
    cumulative = np.empty(len(reached))
    cumulative[order] = np.cumsum(reached[order]) / max(reached.sum(), 1e-10)
    kept = np.flatnonzero(keep).tolist()
    ids = {i: _id(graph.nodes[i], graph.n_layers) for i in kept}
    nodes = [_node(graph.nodes[i], ids[i], float(cumulative[i]), graph.n_layers, labels) for i in kept]
    links = [
        {"source": ids[kept[source]], "target": ids[kept[target]], "weight": float(square[target, source])}
        for target, source in np.argwhere(square).tolist()
    ]
    metadata = {
        "slug": re.sub(r"[^a-z0-9-]+", "-", slug.lower()).strip("-") or "graph",
        "scan": graph.model,
        "transcoder_list": [],
        "prompt": graph.prompt,
        "prompt_tokens": list(graph.tokens),
        "node_threshold": node_share,
        "schema_version": 1,
        "info": {"generator": {"name": "sae_italian"}, "create_time": utc_now()},
    }
    settings = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": settings, "nodes": nodes, "links": links}


def _id(node: GraphNode, n_layers: int) -> str:
    return {
        "latent": f"{node.layer}_{node.index}_{node.position}",
        "error": f"error_{node.layer}_{node.position}",
        "rest": f"rest_{node.layer}",
        "embedding": f"E_{node.position}",
        "logit": f"{n_layers + 1}_{node.index}_{node.position}",
    }[node.kind]


def _node(node: GraphNode, id_: str, cumulative: float, n_layers: int, labels: Labels | None) -> dict[str, Any]:
    logit, latent = node.kind == "logit", node.kind == "latent"
    feature = cantor(node.layer, node.index) if latent else node.index if logit else node.position
    token = node.text.replace('"', "'")  # the page cuts the token out between quotes
    told = f'Output "{token}" (p={node.value:.3f})' if logit else (labels or {}).get((node.layer, node.index), "")
    return {
        "node_id": id_,
        "jsNodeId": f"{id_}-0",
        "feature": -1 if node.kind in ("error", "rest") else feature,
        "layer": "E" if node.kind == "embedding" else str(n_layers + 1 if logit else node.layer),
        "ctx_idx": max(node.position, 0),
        "feature_type": TYPES[node.kind],
        "token_prob": node.value if logit else 0.0,
        "is_target_logit": logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": told or (name_of(node) if not latent else ""),
        "influence": None if logit else cumulative,
        "activation": node.value if latent else None,
    }


def cantor(layer: int, latent: int) -> int:
    """Return the one number by which circuit-tracer names a latent of a layer (Cantor's pairing)."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent

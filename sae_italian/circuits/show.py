"""A graph for people and for other tools: a table, a picture, Neuronpedia's graph JSON."""

import re
from collections import Counter
from collections.abc import Mapping
from time import time
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.base.labels import Language, label
from sae_italian.base.report import INK, OURS, REFERENCE, WARNING, svg, table
from sae_italian.circuits.graph import EDGE_SHARE, UNEXPECTED, Graph, GraphNode, influence, prune, scores

Labels = Mapping[tuple[int, int], str]
"""By layer and latent what explains it."""
TYPES = {
    "latent": "cross layer transcoder",  # what Neuronpedia calls those of one layer too
    "error": "mlp reconstruction error",
    "rest": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}


def name_of(node: GraphNode, labels: Labels | None = None, language: Language = "en") -> str:
    """Return a node in words: `L1 latent 12 on «gatto»`, with its explanation where there is one."""
    facts = {"layer": node.layer, "index": node.index, "text": node.text.strip()}
    told = (labels or {}).get((node.layer, node.index), "") if node.kind == "latent" else ""
    said = label(f"graph.{node.kind}", language).format(**facts, value=_percent(node.value, language))
    return said + (f": {told}" if told else "")


def _percent(share: float, language: Language) -> str:
    return f"{100 * share:.0f} %" if language == "it" else f"{share:.0%}"


def sentence(
    graph: Graph, labels: Labels | None = None, language: Language = "en", random: tuple[float, float] | None = None
) -> str:
    """Return what the graph says: what is expected, the strongest path to it, and how much of it is explained.

    `random` is the replacement score and the completeness of a graph of random transcoders.
    """

    def said(what: str, **facts: str) -> str:
        return label(f"graph.said.{what}", language).format(**facts)

    logits = [node for node in graph.nodes if node.kind == "logit"]
    expected = ", ".join(f"«{node.text.strip()}» ({_percent(node.value, language)})" for node in logits)
    end = "".join(graph.tokens[-4:]).strip()
    found = [said("expects" if graph.against is None else "against", end=end, logits=expected)]
    path, share = strongest_path(graph)
    if len(path) > 1:
        steps = " → ".join(name_of(graph.nodes[i], labels, language) for i in path[:-1])
        found.append(said("path", token=logits[0].text.strip(), path=steps, share=_percent(share, language)))
    mine = scores(graph)
    for what, pair in (("scores", mine[:2]), ("random", random)):
        if pair:
            told = [_percent(each, language) for each in pair]
            found.append(said(what, replacement=told[0], completeness=told[1]))
    if sum(node.value for node in logits) < UNEXPECTED:
        found.append(said("unexpected"))
    return " ".join(found)


def strongest_path(graph: Graph) -> tuple[list[int], float]:
    """Return the nodes of the first logit's strongest path, from an input on, and the share of its last edge.

    Each step goes to the latent or input whose edge is largest; the share is of all that some input decides.
    """
    row_of, some = graph.row_of, graph.of_kind("latent", "embedding")
    path, share = [int(graph.targets[graph.of_kind("logit")[graph.targets]][0])], 0.0
    while path[0] in row_of:
        edges = np.abs(graph.weights[row_of[path[0]]])
        if not (edges * some).any():
            break
        step = int((edges * some).argmax())
        share = share if len(path) > 1 else float(edges[step] / edges[graph.decided].sum())
        path.insert(0, step)
    return path, share


def summary(graph: Graph, labels: Labels | None = None, top: int = 10) -> str:
    """Return what the graph says: its logits, its scores, its most influential nodes and what each gets most from."""
    found, reached, keep = scores(graph), influence(graph), prune(graph)[0]
    head = (
        f"{sentence(graph, labels)}\n"
        f"replacement score {found.replacement:.2f}, completeness {found.completeness:.2f}; {len(graph.latents)} "
        f"of {graph.n_active} active latents are nodes, {int(keep[graph.latents].sum())} stay when pruned"
    )
    rows = []
    for i in (i for i in np.argsort(-reached, kind="stable")[:top].tolist() if reached[i]):
        edges = np.abs(graph.weights[graph.row_of[i]]) * graph.decided if i in graph.row_of else np.zeros(1)
        sources = ", ".join(name_of(graph.nodes[s]) for s in np.argsort(-edges)[:2].tolist() if edges[s] > 0)
        rows.append((name_of(graph.nodes[i], labels), f"{reached[i]:.3f}", sources))
    return f"{head}\n\n{table('node | influence | most from', rows)}"


def graph_svg(graph: Graph, most: int = 60) -> str:
    """Return a picture of what stays when the graph is pruned: tokens across, layers up, circles as large as the influence."""
    (keep, square), reached = prune(graph), influence(graph)
    kept = np.flatnonzero(keep)
    order = kept[np.argsort(-np.where(graph.of_kind("logit"), np.inf, reached)[kept], kind="stable")]
    place = _places(graph, order[: most + int(graph.of_kind("logit").sum())].tolist())
    edges = [(*kept[list(pair)].tolist(), float(square[pair])) for pair in zip(*square.nonzero(), strict=True)]
    edges = [edge for edge in edges if edge[0] in place and edge[1] in place]
    colours, marks = {"latent": OURS, "logit": INK}, {"latent": "o", "logit": "D", "embedding": "s"}

    def draw(axes: Any) -> None:
        axis, largest = axes[0], max((abs(weight) for *_, weight in edges), default=1.0)
        for target, source, weight in edges:
            colour = OURS if weight > 0 else WARNING
            width = 0.3 + 3 * abs(weight) / largest
            ends = zip(place[source], place[target], strict=True)
            axis.plot(*ends, color=colour, linewidth=width, alpha=0.35, zorder=0)
        for i, (x, y) in place.items():
            node, size = graph.nodes[i], 25 + 500 * reached[i] / max(reached.max(), 1e-10)
            colour = colours.get(node.kind, REFERENCE)
            axis.scatter([x], [y], s=size, marker=marks.get(node.kind, "X"), color=colour, zorder=1)
            if node.kind in colours:
                text = str(node.index) if node.kind == "latent" else f"«{node.text}» {node.value:.0%}"
                axis.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        axis.set_xticks(range(len(graph.tokens)), [f"«{token}»" for token in graph.tokens], rotation=45, ha="right")
        layers = [f"layer {layer}" for layer in range(graph.n_layers)]
        axis.set_yticks(range(-1, graph.n_layers + 1), ["input", *layers, "next token"])
        axis.set_title("circles: latents; crosses: errors; green adds, red takes away", fontsize=8)

    return svg(draw, 1, (max(6.0, 0.9 * len(graph.tokens)), 1.5 + 1.1 * (graph.n_layers + 2)))


def _places(graph: Graph, chosen: list[int]) -> dict[int, tuple[float, float]]:
    """Return where each node is drawn: side by side where several share a layer and a token."""
    cells = [(graph.nodes[i].position % (len(graph.tokens) + 1), graph.nodes[i].layer) for i in chosen]
    found, beside = {}, Counter()
    for i, cell in zip(chosen, cells, strict=True):
        x, y = cell[0] + 0.8 * ((beside[cell] + 0.5) / cells.count(cell) - 0.5), cell[1] + 0.12 * (beside[cell] % 3)
        beside[cell] += 1
        found[i] = x, y
    return found


def neuronpedia(graph: Graph, slug: str, labels: Labels | None = None, node_share: float = 0.8) -> dict[str, Any]:
    """Return the pruned graph as Neuronpedia's and circuit-tracer's page read it (graph-schema.json, schema 1).

    Node ids are our own words for errors: circuit-tracer's `0_layer_pos` is also a latent's id, and links are joined by it.
    """
    keep, square = prune(graph, node_share)
    cumulative = standing(influence(graph))
    kept = np.flatnonzero(keep).tolist()
    ids = {i: id_of(graph.nodes[i], graph.n_layers) for i in kept}
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
        "info": {"generator": {"name": "sae_italian"}, "create_time_ms": int(1000 * time())},
        "pruning_settings": {"node_threshold": node_share, "edge_threshold": EDGE_SHARE},
    }
    settings = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": settings, "nodes": nodes, "links": links}


def standing(reached: Float[np.ndarray, " nodes"]) -> Float[np.ndarray, " nodes"]:
    """Return for each node the share of all influence that it and the more influential ones hold together."""
    order, found = np.argsort(-reached, kind="stable"), np.empty(len(reached))
    found[order] = np.cumsum(reached[order]) / max(reached.sum(), 1e-10)
    return found


def id_of(node: GraphNode, n_layers: int) -> str:
    """Return the id of a node that Neuronpedia's JSON and the page know it by."""
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

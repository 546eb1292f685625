"""A graph for people and for other tools: a table, a picture, Neuronpedia's graph JSON."""

import re
from collections.abc import Mapping
from time import time
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_italian.base.labels import Language, label
from sae_italian.base.report import INK, OURS, REFERENCE, WARNING, svg, table
from sae_italian.circuits.graph import EDGE_SHARE, UNEXPECTED, Graph, influence, prune, scores

Labels = Mapping[tuple[int, int], str]
"""By layer and latent what explains it."""
TYPES = {
    "latent": "cross layer transcoder",  # what Neuronpedia calls those of one layer too
    "error": "mlp reconstruction error",
    "rest": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}


def name_of(node: Any, labels: Labels | None = None, language: Language = "en") -> str:
    """Return a node in words: `L1 latent 12 on «gatto»`, with its explanation where there is one."""
    facts = {"layer": node.layer, "index": node.index, "text": node.text.strip()}
    told = (labels or {}).get((node.layer, node.index), "")  # what is no latent has another layer, or index
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

    logits = graph.nodes[graph.of_kind("logit")]
    expected = ", ".join(f"«{node.text.strip()}» ({_percent(node.value, language)})" for node in logits)
    end = "".join(graph.tokens[-4:]).strip()
    found = [said("expects" if graph.against is None else "against", end=end, logits=expected)]
    path, share = strongest_path(graph)
    if len(path) > 1:
        steps = " → ".join(name_of(graph.nodes[i], labels, language) for i in path[:-1])
        found.append(said("path", token=logits[0].text.strip(), path=steps, share=_percent(share, language)))
    for what, pair in (("scores", scores(graph)[:2]), ("random", random)):
        if pair:
            told = [_percent(each, language) for each in pair]
            found.append(said(what, replacement=told[0], completeness=told[1]))
    if logits.value.sum() < UNEXPECTED:
        found.append(said("unexpected"))
    return " ".join(found)


def strongest_path(graph: Graph) -> tuple[list[int], float]:
    """Return the nodes of the first logit's strongest path, from an input on, and the share of its last edge.

    Each step goes to the latent or input whose edge is largest; the share is of all that some input decides.
    """
    row_of, some = graph.row_of, graph.of_kind("latent", "embedding")
    path, share = np.flatnonzero(graph.of_kind("logit"))[:1].tolist(), 0.0
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
    from matplotlib.collections import LineCollection

    keep, small = prune(graph)
    logit, reached = small.of_kind("logit"), influence(graph)[keep]
    order = np.argsort(-np.where(logit, np.inf, reached), kind="stable")
    drawn = np.isin(np.arange(len(order)), order[: most + logit.sum()])
    small, reached = small.only(drawn), reached[drawn]
    nodes, place, (target, source, weight) = small.nodes, _places(small), small.edges()
    ends: Any = np.stack([place[source], place[target]], axis=1)
    width = 0.3 + 3 * np.abs(weight) / np.abs(weight).max(initial=1e-10)
    colours: Any = np.where(weight > 0, OURS, WARNING)
    looks = {"latent": ("o", OURS), "logit": ("D", INK), "embedding": ("s", REFERENCE)}

    def draw(axes: Any) -> None:
        axis, size = axes[0], 25 + 500 * reached / max(reached.max(), 1e-10)
        axis.add_collection(LineCollection(ends, colors=colours, linewidths=width, alpha=0.35, zorder=0))
        for kind in np.unique(nodes.kind):
            some, (mark, colour) = nodes.kind == kind, looks.get(kind, ("X", REFERENCE))
            axis.scatter(*place[some].T, s=size[some], marker=mark, color=colour, zorder=1)
        for node, at in zip(nodes, place, strict=True):
            if node.kind in ("latent", "logit"):
                text = str(node.index) if node.kind == "latent" else f"«{node.text}» {node.value:.0%}"
                axis.annotate(text, at, xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        axis.set_xticks(range(len(graph.tokens)), [f"«{token}»" for token in graph.tokens], rotation=45, ha="right")
        layers = (f"layer {layer}" for layer in range(graph.n_layers))
        axis.set_yticks(range(-1, graph.n_layers + 1), ["input", *layers, "next token"])
        axis.set_title("circles: latents; crosses: errors; green adds, red takes away", fontsize=8)

    return svg(draw, 1, (max(6.0, 0.9 * len(graph.tokens)), 1.5 + 1.1 * (graph.n_layers + 2)))


def _places(graph: Graph) -> Float[np.ndarray, "nodes 2"]:
    """Return where each node is drawn: side by side where several share a layer and a token."""
    x, y = graph.nodes.position % (len(graph.tokens) + 1), graph.nodes.layer
    cells = pd.Series(x).groupby([x, y])
    beside, size = cells.cumcount().to_numpy(), cells.transform("size").to_numpy()
    return np.stack([x + 0.8 * ((beside + 0.5) / size - 0.5), y + 0.12 * (beside % 3)], axis=1)


def neuronpedia(graph: Graph, slug: str, labels: Labels | None = None, node_share: float = 0.8) -> dict[str, Any]:
    """Return the pruned graph as Neuronpedia's and circuit-tracer's page read it (graph-schema.json, schema 1).

    Node ids are our own words for errors: circuit-tracer's `0_layer_pos` is also a latent's id, and links are joined by it.
    """
    keep, small = prune(graph, node_share)
    ids = [id_of(node, graph.n_layers) for node in small.nodes]
    told = zip(ids, small.nodes, standing(influence(graph))[keep].tolist(), strict=True)
    nodes = [_node(id_, node, share, graph.n_layers, labels or {}) for id_, node, share in told]
    edges = zip(*(column.tolist() for column in small.edges()), strict=True)
    links = [{"source": ids[source], "target": ids[target], "weight": weight} for target, source, weight in edges]
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


def id_of(node: Any, n_layers: int) -> str:
    """Return the id of a node that Neuronpedia's JSON and the page know it by."""
    return {
        "latent": f"{node.layer}_{node.index}_{node.position}",
        "error": f"error_{node.layer}_{node.position}",
        "rest": f"rest_{node.layer}",
        "embedding": f"E_{node.position}",
        "logit": f"{n_layers + 1}_{node.index}_{node.position}",
    }[node.kind]


def _node(id_: str, node: Any, cumulative: float, n_layers: int, labels: Labels) -> dict[str, Any]:
    kind, layer, position, index, value, text = node.item()
    feature = {"latent": cantor(layer, index), "logit": index, "embedding": position}
    token = text.replace('"', "'")  # the page cuts the token out between quotes
    says = {"latent": labels.get((layer, index), ""), "logit": f'Output "{token}" (p={value:.3f})'}
    return {
        "node_id": id_,
        "jsNodeId": f"{id_}-0",
        "feature": feature.get(kind, -1),
        "layer": {"embedding": "E", "logit": str(n_layers + 1)}.get(kind, str(layer)),
        "ctx_idx": max(position, 0),
        "feature_type": TYPES[kind],
        "token_prob": value if kind == "logit" else 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": says[kind] if kind in says else name_of(node),
        "influence": None if kind == "logit" else cumulative,
        "activation": value if kind == "latent" else None,
    }


def cantor(layer: int, latent: int) -> int:
    """Return the one number by which circuit-tracer names a latent of a layer (Cantor's pairing)."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent

"""The attribution graph of a prompt: what of the model's next token each latent, error and input token wrote, and through what.

The edge from source s to target t is A[t, s] = v_s . J_s^T g_t: v_s what the source wrote (a latent's activation times its
direction, an MLP's error, the first block's input), J_s the frozen model between them, g_t the target's own direction (its
encoder row; for a logit its unembedding less the mean of all). The target is the pre-activation, so every row adds up to it:

    sum of a row = W_enc . x  (for a logit: the centred logit)

with a bias node per layer and position (what no input decides: the decoder's bias, the MLP's output at special tokens), one for
the biases of attention and norms, and a rest node per layer for latents that were not visited. Rows are targets.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Int

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import path_of, read_json, understood, write_json

NODE_SHARE, EDGE_SHARE = 0.8, 0.98  # of all influence, kept when a graph is pruned
ROWS_AT_ONCE = 256  # of the edges that are weighed together, so that no copy of all is made
UNEXPECTED = 1e-4  # probability of all logits, below which the model does not expect them
# Columns of the nodes: `index` is of the latent, or the id of the token; `value` a latent's activation, a logit's probability;
# `text` a token. What a kind does not have is -1, 0 or empty.
NODE = np.dtype(
    [("kind", "U9"), ("layer", "i8"), ("position", "i8"), ("index", "i8"), ("value", "f8"), ("text", object)]
)
Nodes = Any  # an np.recarray of these columns, of which pyright knows none


def nodes_of(
    kind: str, layer: Any = -1, position: Any = -1, index: Any = -1, value: Any = 0.0, text: Any = ""
) -> Nodes:
    """Return nodes of one kind from columns; a column may be one value for all of them."""
    columns = np.broadcast_arrays([kind], layer, position, index, value, np.array(text, dtype=object))
    return np.rec.fromarrays(columns, dtype=NODE)


def joined(parts: Sequence[Nodes]) -> Nodes:
    """Return the nodes of all parts, one after the other."""
    return np.concatenate(parts).view(np.recarray)


@dataclass(frozen=True)
class Graph:
    """A prompt's nodes and the edges between them; `weights[t, s]` is what source s adds to target t.

    Of the nodes a column is `nodes.layer`, one node `nodes[i]`, with the same names.
    """

    prompt: str
    model: str
    tokens: tuple[str, ...]
    n_layers: int
    nodes: Nodes
    targets: Int[np.ndarray, " rows"]  # the node of each row: latents in the order of nodes, then logits
    weights: Float[np.ndarray, "rows nodes"]
    own: Float[np.ndarray, " rows"]  # each target's value without its own bias: what its row adds up to
    n_active: int  # latents that are active on the prompt, visited or not
    against: int | None = None  # id of the token whose logit is taken from the others'; None: the mean

    def of_kind(self, *kinds: str) -> np.ndarray:
        """Return which nodes are of these kinds."""
        return np.isin(self.nodes.kind, kinds)

    def only(self, which: np.ndarray) -> Graph:
        """Return the graph of some of the nodes (a mask), its edges a copy in float64."""
        rows, number = which[self.targets], np.cumsum(which) - 1
        weights = self.weights[np.ix_(rows, which)].astype(np.float64)
        some = {"nodes": self.nodes[which], "targets": number[self.targets[rows]], "own": self.own[rows]}
        return replace(self, weights=weights, **some)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return target, source and weight of every edge that is not 0."""
        row, source = self.weights.nonzero()
        return self.targets[row], source, self.weights[row, source]

    @cached_property
    def latents(self) -> Int[np.ndarray, " latents"]:
        """The numbers of the nodes that are latents."""
        return np.flatnonzero(self.of_kind("latent"))

    @cached_property
    def ranked(self) -> Int[np.ndarray, " latents"]:
        """The same, the most influential first."""
        return self.latents[np.argsort(-influence(self)[self.latents], kind="stable")]

    @cached_property
    def decided(self) -> np.ndarray:
        """Which nodes some input decides: all but bias and constant."""
        return ~self.of_kind("bias", "constant")

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of each node that has one."""
        return {target: row for row, target in enumerate(self.targets.tolist())}

    def save(self, folder: str | Path) -> None:
        """Write graph.npz and graph.json; nothing is pickled."""
        (folder := path_of(folder)).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "graph.npz", targets=self.targets, weights=self.weights, own=self.own)
        told = {name: getattr(self, name) for name in ("prompt", "model", "tokens", "n_layers", "n_active", "against")}
        write_json(folder / "graph.json", {"kind": "graph", **told, "nodes": self.nodes.tolist()})

    @classmethod
    def load(cls, folder: str | Path) -> Graph:
        """Read what `save` wrote, by its folder or one of the two files. Raises: DataError where there is no graph."""
        folder = folder.parent if (folder := path_of(folder)).is_file() else folder
        with understood(folder, "Make it with `sae-italian graph`.", OSError, RuntimeError, BadZipFile, zlib.error):
            told = read_json(folder / "graph.json")
            arrays = np.load(folder / "graph.npz", allow_pickle=False)
            del told["kind"]
            told["tokens"] = tuple(told["tokens"])
            told["nodes"] = np.array([tuple(node) for node in told["nodes"]], dtype=NODE).view(np.recarray)
            return cls(**told, **{name: arrays[name] for name in ("targets", "weights", "own")})


# --- what matters in it --------------------------------------------------------------------------------------------------


class GraphScores(NamedTuple):
    """How much of the graph goes through latents; shares of absolute influence, as circuit-tracer's (graph.py:352)."""

    replacement: float  # influence of input tokens against that of errors
    completeness: float  # share of what nodes receive that is no error, weighted by their influence
    visited: float  # share of the active latents that are nodes


def _importance(graph: Graph) -> Float[np.ndarray, " nodes"]:
    """Return the weight of each logit, its probability; the same for all, 1 together, where the model expects none."""
    logit = graph.of_kind("logit")
    found = np.where(logit, graph.nodes.value, 0.0)
    return found if found.sum() > UNEXPECTED else logit / max(logit.sum(), 1)


def influence(graph: Graph) -> Float[np.ndarray, " nodes"]:
    """Return each node's share in the logits through all paths: w N + w N^2 + ..., w the logits' probabilities.

    N is |A| by rows, without the nodes that no input decides (bias and constant). Each target passes on what it has, in the
    shares of its edges. One pass is enough, layer by layer downwards: a latent writes to later layers alone, so what
    reaches it is known when its turn comes. Targets may be in any order, and some may be missing.
    """
    found, own = np.zeros(len(graph.nodes)), _importance(graph)
    layer = graph.nodes.layer[graph.targets]
    for place in (np.flatnonzero(layer == each) for each in np.unique(layer)[::-1]):
        for some in np.split(place, range(ROWS_AT_ONCE, len(place), ROWS_AT_ONCE)):
            size = np.abs(graph.weights[some]) * graph.decided
            share = (own + found)[graph.targets[some]] / np.maximum(size.sum(axis=1), 1e-10)
            found += share.astype(size.dtype) @ size
    return found


def scores(graph: Graph) -> GraphScores:
    """Return how complete the graph is; latents that were not visited count as errors."""
    found, missing = influence(graph), graph.of_kind("error", "rest")
    tokens, errors = found[graph.of_kind("embedding")].sum(), found[missing].sum()
    received = np.array([(size[graph.decided].sum(), size[missing].sum()) for size in map(np.abs, graph.weights)])
    total, lost = received.reshape(-1, 2).astype(np.float64).T
    weight = (found + _importance(graph))[graph.targets] * (total > 0)
    complete = (weight * (1 - lost / np.maximum(total, 1e-10))).sum() / max(weight.sum(), 1e-10)
    return GraphScores(
        tokens / max(tokens + errors, 1e-10), float(complete), len(graph.latents) / max(graph.n_active, 1)
    )


def prune(graph: Graph, node_share: float = NODE_SHARE, edge_share: float = EDGE_SHARE) -> tuple[np.ndarray, Graph]:
    """Return which nodes stay, and the graph of these with the edges that do (others 0).

    The most influential latents and errors stay until they hold `node_share` of all influence, input tokens and logits
    always; then edges, by share of their target's influence, until `edge_share`. A latent left without an edge in or out
    goes, and an error without an edge out. Raises: UsageError for shares outside 0 to 1.
    """
    if not (0 <= node_share <= 1 and 0 <= edge_share <= 1):
        raise UsageError(f"node_share {node_share} and edge_share {edge_share} must be shares, 0 to 1.")
    keep = (_largest(influence(graph), node_share) | graph.of_kind("embedding", "logit")) & graph.decided
    small = graph.only(keep)
    weights, size, reached = small.weights, np.abs(small.weights), influence(small) + _importance(small)
    edges = size / np.maximum(size.sum(axis=1, keepdims=True), 1e-10) * reached[small.targets, None]
    weights[~_largest(edges.ravel(), edge_share).reshape(edges.shape)] = 0
    latent, error = small.of_kind("latent"), small.of_kind("error", "rest")
    stays, fed = np.ones(len(latent), dtype=bool), np.zeros(len(latent), dtype=bool)
    while True:
        fed[small.targets] = weights.any(axis=1)
        lost = stays & ((latent & ~fed) | ((latent | error) & ~weights.any(axis=0)))
        if not lost.any():
            keep[keep] = stays
            return keep, small.only(stays)
        stays &= ~lost
        weights[lost[small.targets]], weights[:, lost] = 0, 0


def _largest(values: Float[np.ndarray, " n"], share: float) -> np.ndarray:
    """Return which values are among the largest that together hold a share of the sum."""
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(values[order]) - values[order]
    kept = np.zeros(len(values), dtype=bool)
    kept[order[before < share * values.sum()]] = True
    return kept & (values > 0)

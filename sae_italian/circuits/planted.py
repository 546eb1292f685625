"""What a graph names against what is known: latents that the grammar says carry a feature, and attribution patching.

A latent carries number (or gender) when MicroItaliano's gold labels say so of the words it fires on: nearly all of those that
have the feature have one value of it, over several word forms. A node's patching effect is what the logits' difference
loses, to first order in the live model, when its activation becomes that of the counterfactual prompt:

    (z' - z) W_dec . dL/d(MLP output), L = logit of the right token - logit of the wrong one
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian import micro_italiano
from sae_italian.analysis.latent import codes, special, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import wilson
from sae_italian.circuits.graph import Graph
from sae_italian.models.activations import logits_at, read_many, replaced

PURE = 0.9  # share of one value among the words a latent fires on: its lower bound at 95 %
LEAST_FORMS = 3  # different words: a latent of one word knows that word
DOCUMENTS = 400


class Found(NamedTuple):
    """How well some nodes are found among all latents that are active: of `k` named, those that are true."""

    precision: float  # among the k most influential nodes
    recall: float
    average_precision: float  # over the whole order; by chance, the share that is true
    share: float  # of the active latents that are true


def carriers(
    model: Any, by_layer: Mapping[int, Any], feature: str, *, documents: int = DOCUMENTS, seed: int = 7
) -> dict[int, Bool[np.ndarray, " d_sae"]]:
    """Return by layer which latents carry a feature (`number`, `gender`) of MicroItaliano's words.

    Raises: UsageError for a feature that its words do not have.
    """
    words = [_words(model, micro_italiano.document(i, seed), feature) for i in range(documents)]
    words = [found for found in words if found is not None]
    if not words:
        raise UsageError(f"no word of MicroItaliano has {feature!r}; use number or gender.")
    values = sorted({value for *_, own in words for _, value, _ in own})
    counts = {layer: np.zeros((len(values), sae.cfg.d_sae), dtype=int) for layer, sae in by_layer.items()}
    forms = {layer: [set() for _ in range(sae.cfg.d_sae)] for layer, sae in by_layer.items()}
    for tokens, own in words:
        reads = read_many(model, tokens.to(model.device), [sae.cfg.metadata.hook_name for sae in by_layer.values()])
        for layer, sae in by_layer.items():
            active = codes(sae, reads[sae.cfg.metadata.hook_name][0]) > 0
            for position, value, form in own:
                for latent in active[position].nonzero()[:, 0].tolist():
                    counts[layer][values.index(value), latent] += 1
                    forms[layer][latent].add(form)
    return {layer: _pure(counts[layer], forms[layer]) for layer in by_layer}


def _words(model: Any, document: Any, feature: str) -> tuple[Int[Tensor, "1 pos"], list[tuple[int, str, str]]] | None:
    """Return a document's tokens, and (position, value, form) of the last token of each word that has the feature."""
    encoded = model.tokenizer(document.text, return_tensors="pt", return_offsets_mapping=True)
    limit = getattr(model.config, "max_position_embeddings", 512)
    tokens, ends = encoded.input_ids[:, :limit], encoded.offset_mapping[0, :limit, 1].tolist()
    at = {end: position for position, end in enumerate(ends)}
    found = [
        (at[word.end], word.labels[feature], document.text[word.start : word.end].lower())
        for word in document.words
        if feature in word.labels and word.end in at
    ]
    return (tokens, found) if found else None


def _pure(counts: Int[np.ndarray, "values d_sae"], forms: list[set[str]]) -> Bool[np.ndarray, " d_sae"]:
    largest, total = counts.max(axis=0), counts.sum(axis=0)
    return np.array(
        [
            len(own) >= LEAST_FORMS and wilson(int(most), int(all_)).lo > PURE
            for most, all_, own in zip(largest, total, forms, strict=True)
        ]
    )


def patching_effects(
    model: Any, by_layer: Mapping[int, Any], graph: Graph, counterfactual: str, pair: tuple[int, int]
) -> Float[np.ndarray, " nodes"]:
    """Return each latent node's attribution-patching effect on the difference of two tokens' logits; 0 for other nodes.

    Raises: UsageError when the counterfactual has another number of tokens than the graph's prompt.
    """
    tokens, other = (model.tokenizer(text, return_tensors="pt").input_ids for text in (graph.prompt, counterfactual))
    if tokens.shape != other.shape:
        raise UsageError(f"{counterfactual!r} has {other.shape[1]} tokens; {graph.prompt!r} has {tokens.shape[1]}.")
    gradient = _live_gradient(model, tokens.to(model.device), list(by_layer), pair)
    names = [sae.cfg.metadata.hook_name for sae in by_layer.values()]
    both = [read_many(model, each.to(model.device), names) for each in (tokens, other)]
    silent = special(tokens, model.tokenizer)[0]
    found = np.zeros(len(graph.nodes))
    with torch.no_grad():
        for layer, sae in by_layer.items():
            before, after = (codes(sae, read[sae.cfg.metadata.hook_name][0]) for read in both)
            change = (after - before).masked_fill(silent[:, None].to(after.device), 0.0)
            chosen = [i for i, node in enumerate(graph.nodes) if node.kind == "latent" and node.layer == layer]
            places = torch.tensor([graph.nodes[i].position for i in chosen], dtype=torch.int64)
            latents = torch.tensor([graph.nodes[i].index for i in chosen], dtype=torch.int64)
            if chosen:
                written = written_directions(sae, latents).to(gradient[layer])
                effect = change[places, latents].to(written) * (written * gradient[layer][places]).sum(-1)
                found[chosen] = effect.cpu().double().numpy()
    return found


def _live_gradient(
    model: Any, tokens: Int[Tensor, "1 pos"], layers: list[int], pair: tuple[int, int]
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """Return by layer the gradient of the difference of two logits at its MLP's output, nothing frozen."""
    leaves: dict[int, Tensor] = {}

    def added(layer: int, out: Tensor) -> Tensor:
        leaves[layer] = torch.zeros_like(out).requires_grad_()
        return out + leaves[layer]

    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", partial(added, layer)))
        last = torch.arange(tokens.shape[1], device=tokens.device)[None] == tokens.shape[1] - 1
        logits = logits_at(model, tokens, last)[0]
        found = torch.autograd.grad(logits[pair[0]] - logits[pair[1]], list(leaves.values()))
    return {layer: gradient[0] for layer, gradient in zip(leaves, found, strict=True)}


def found_among(order: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"], k: int) -> Found:
    """Return how well an order (largest first) finds what is true; NaN where nothing or everything is."""
    if not true.any() or true.all():
        none = float("nan")
        return Found(none, none, none, float(true.mean()) if len(true) else none)
    ranked = true[np.argsort(-order, kind="stable")]
    hits = np.cumsum(ranked)
    precision = hits / np.arange(1, len(ranked) + 1)
    k = min(k, len(ranked))
    return Found(hits[k - 1] / k, hits[k - 1] / true.sum(), float(precision[ranked].mean()), float(true.mean()))

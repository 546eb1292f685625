"""What a graph names against what is known: latents that the grammar says carry a feature, and attribution patching.

A latent carries number (or gender) when MicroItaliano's gold labels say so of the words it fires on: nearly all of those that
have the feature have one value of it, over several word forms. A node's patching effect is what the logits' difference
loses, to first order in the live model, when its activation becomes that of the counterfactual prompt:

    (z' - z) W_dec . dL/d(MLP output), L = logit of the right token - logit of the wrong one
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_italian.analysis.latent import codes, written_directions
from sae_italian.analysis.treebank import encode_words, label_names, micro_treebank, read_words, with_forms
from sae_italian.base.statistics import wilson
from sae_italian.circuits.edges import Prompt
from sae_italian.circuits.graph import Graph
from sae_italian.models.activations import logits_at, read_many, replaced

PURE = 0.9  # share of one value among the words a latent fires on: its lower bound at 95 %
LEAST_FORMS = 3  # different words: a latent of one word knows that word
DOCUMENTS = 400


def carriers(
    model: Any, by_layer: Mapping[int, Any], feature: str, *, documents: int = DOCUMENTS, seed: int = 7
) -> dict[int, Bool[np.ndarray, " d_sae"]]:
    """Return by layer which latents carry a feature (`number`, `gender`) of MicroItaliano's words."""
    bank, forms = with_forms(micro_treebank(documents, seed))
    values = [name for name in label_names([bank]) if name.partition("=")[0] == feature.capitalize()]
    found, context = {}, getattr(model.config, "max_position_embeddings", 512)
    for layer, sae in by_layer.items():
        words = read_words(model, sae.cfg.metadata.hook_name, bank, [*values, *forms], context_size=context)
        have = words.labels[:, : len(values)].sum(axis=1) > 0
        fired = (encode_words(sae, words.x[have]) > 0).astype(int)  # pyright: ignore[reportAttributeAccessIssue]
        counts = (words.labels[have].T @ fired).toarray()  # [values and forms, d_sae]
        most, told = counts[: len(values)].max(axis=0), counts[: len(values)].sum(axis=0)
        pure = [wilson(*pair).lo > PURE for pair in zip(most.tolist(), told.tolist(), strict=True)]
        found[layer] = ((counts[len(values) :] > 0).sum(axis=0) >= LEAST_FORMS) & np.array(pure)
    return found


def patching_effects(
    prompt: Prompt, graph: Graph, counterfactual: str, pair: tuple[int, int]
) -> Float[np.ndarray, " latents"]:
    """Return what patching each latent of a graph, from a counterfactual of as many tokens, does to a difference of logits."""
    other = Prompt(prompt.model, list(prompt.by_layer.values()), counterfactual)
    gradient, found = _live_gradient(prompt, pair), []
    names = [sae.cfg.metadata.hook_name for sae in prompt.by_layer.values()]
    before, after = (read_many(prompt.model, each.tokens, names) for each in (prompt, other)) if names else ({}, {})
    nodes = [graph.nodes[i] for i in graph.latents.tolist()]
    with torch.no_grad():
        for layer, some in ((layer, list(some)) for layer, some in groupby(nodes, lambda node: node.layer)):
            sae = prompt.by_layer[layer]
            change = codes(sae, after[name := sae.cfg.metadata.hook_name][0]) - codes(sae, before[name][0])
            places, latents = (torch.tensor([getattr(node, of) for node in some]) for of in ("position", "index"))
            written = written_directions(sae, latents).to(gradient[layer])
            found.append(change[places, latents].to(written) * (written * gradient[layer][places]).sum(-1))
    return torch.cat(found).cpu().double().numpy() if found else np.zeros(0)


def _live_gradient(prompt: Prompt, pair: tuple[int, int]) -> dict[int, Float[Tensor, "pos d_model"]]:
    """Return by layer the gradient of the difference of two logits at its MLP's output, nothing frozen."""
    leaves: dict[int, Tensor] = {}

    def added(layer: int, out: Tensor) -> Tensor:
        leaves[layer] = torch.zeros_like(out).requires_grad_()
        return out + leaves[layer]

    with ExitStack() as stack, torch.enable_grad():
        for layer in prompt.by_layer:
            stack.enter_context(replaced(prompt.model, f"blocks.{layer}.hook_mlp_out", partial(added, layer)))
        last = torch.arange(prompt.tokens.shape[1], device=prompt.tokens.device)[None] == prompt.tokens.shape[1] - 1
        logits = logits_at(prompt.model, prompt.tokens, last)[0]
        found = torch.autograd.grad(logits[pair[0]] - logits[pair[1]], list(leaves.values()))
    return {layer: gradient[0] for layer, gradient in zip(leaves, found, strict=True)}


def found_among(order: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"], k: int) -> dict[str, float]:
    """Return how well an order (largest first) finds what is true: of the first k, and over the whole order.

    `share` is how much is true, the precision of chance; without anything true, or false, it is all that is returned.
    """
    from sklearn.metrics import average_precision_score

    share = float(true.mean()) if len(true) else float("nan")
    if not true.any() or true.all():
        return {"share": share}
    named = true[np.argsort(-order, kind="stable")[:k]]
    told = {"precision": named.mean(), "recall": named.sum() / true.sum(), "share": share}
    told["over_chance"] = told["precision"] - share
    return {name: float(value) for name, value in told.items()} | {
        "average_precision": float(average_precision_score(true, order))
    }

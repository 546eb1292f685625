"""The edges of a prompt's graph, by one gradient a target: which latent, error, input or bias wrote how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.analysis.latent import codes, edit_hooks, special, token_text, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.circuits.graph import Graph, GraphNode
from sae_italian.circuits.linear import Linear, Target, linearise
from sae_italian.models.activations import check_context
from sae_italian.saes.fit import decoded

COVERED = 0.95  # probability that the logit nodes hold together
MOST_LOGITS = 10
FIRST_LOOK, GROWTH = 4, 4  # batches before the next are chosen by influence; then again when a quarter more was visited


@dataclass
class _Written:
    """What one layer's MLP wrote at the prompt's positions, taken apart."""

    latents: list[GraphNode]
    vectors: Float[Tensor, "n d_model"]  # what each latent wrote
    encoders: Float[Tensor, "n d_in"]
    error: Float[Tensor, "pos d_model"]
    bias: Float[Tensor, "pos d_model"]


def layers_of(transcoders: Sequence[Any], model: Any) -> dict[int, Any]:
    """Return the transcoders by layer.

    Raises: UsageError for an SAE that is no transcoder of an MLP, two of one layer, and what does not fit the model.
    """
    found: dict[int, Any] = {}
    for sae in transcoders:
        read, write = edit_hooks(sae, model)
        layer = int(read.split(".")[1])
        if read not in (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.ln2.hook_normalized") or not write.endswith(
            f"blocks.{layer}.hook_mlp_out"
        ):
            raise UsageError(
                f"{read} to {write}: a graph needs transcoders, which read an MLP's input and write its output; this is an "
                "SAE. Train some with `sae-italian train mini/transcoders`."
            )
        if layer in found:
            raise UsageError(f"two transcoders are of layer {layer}; give one for each layer.")
        found[layer] = sae
    return found


@torch.no_grad()
def _take_apart(sae: Any, layer: int, read: Tensor, written: Tensor, texts: list[str], silent: Tensor) -> _Written:
    """Write an MLP's output as latents + bias + error; at special tokens, where no transcoder is applied, all is bias."""
    d_model = written.shape[-1]
    if sae is None:
        keep = (~silent)[:, None]
        none = written.new_zeros(0, d_model)
        return _Written([], none, none, written * keep, written * ~keep)
    z = codes(sae, read).to(written)
    z[silent] = 0
    position, latent = (part.tolist() for part in z.nonzero(as_tuple=True))
    value = z[position, latent]
    unique, where = np.unique(latent, return_inverse=True)
    directions = written_directions(sae, unique.tolist()).to(written)[where]
    constant = sae.decode(torch.zeros_like(z[:1], dtype=sae.dtype)).to(written)
    told = decoded(sae, z.to(sae.dtype), read.to(sae.dtype)).to(written)
    skipped = told - sae.decode(z.to(sae.dtype)).to(
        written
    )  # what a skip connection writes is neither latent nor error
    live = (~silent)[:, None].to(written)
    norm = sae.W_dec.norm(dim=-1)[latent] if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
    encoders = (sae.W_enc[:, latent] * norm).T.to(written).detach()
    nodes = [
        GraphNode("latent", layer, p, i, v, texts[p]) for p, i, v in zip(position, latent, value.tolist(), strict=True)
    ]
    error = (written - told) * live
    bias = (written - skipped) * (1 - live) + constant * live
    return _Written(nodes, directions * value[:, None], encoders, error, bias)


class _Rows:
    """Edges of targets to every source of a prompt: latents, then errors, inputs and biases by position."""

    def __init__(self, linear: Linear, embedding: Tensor, sources: list[_Written]):
        self.linear, self.embedding, self.sources = linear, embedding, sources

    def __call__(self, targets: Sequence[Target]) -> Float[np.ndarray, "targets sources"]:
        first, *writes = self.linear.gradients(targets)
        latents, errors, biases = [], [], []
        for source, gradient in zip(self.sources, writes, strict=True):
            position = torch.tensor([node.position for node in source.latents], dtype=torch.int64)
            latents.append(_dot(gradient, position, source.vectors))
            errors.append((gradient * source.error).sum(-1))
            biases.append((gradient * source.bias).sum(-1))
        parts = [*latents, *errors, (first * self.embedding).sum(-1), *biases]
        return torch.cat(parts, dim=1).detach().cpu().double().numpy()


def _dot(gradient: Tensor, position: Tensor, vectors: Tensor) -> Float[Tensor, "targets n"]:
    """Return gradient[:, position[i]] . vectors[i] for each i; position by position, so that nothing is copied."""
    found = gradient.new_zeros(len(gradient), len(vectors))
    for place in position.unique().tolist():
        mine = position == place
        found[:, mine] = gradient[:, place] @ vectors[mine].T
    return found


def attribute(
    model: Any,
    transcoders: Sequence[Any],
    prompt: str,
    *,
    max_nodes: int = 4096,
    batch: int = 16,
    logits: Sequence[int] | None = None,
) -> Graph:
    """Return the attribution graph of a prompt.

    At most `max_nodes` latents become nodes, chosen by their influence as it is known so far; `batch` targets share a
    backward pass. `logits` are the ids of the tokens to explain; default: the likeliest that cover 95 %, at most 10.
    Raises: UsageError for a prompt of one token or beyond the model's context, and as `layers_of` and `linearise`.
    """
    tokenizer, by_layer = model.tokenizer, layers_of(transcoders, model)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    silent = special(tokens, tokenizer)[0]
    if int((~silent).sum()) < 2:
        raise UsageError(f"{prompt!r} has fewer than two tokens, so nothing leads to anything. Give a longer prompt.")
    check_context(tokens.shape[1], model.config)
    texts = token_text(tokenizer, tokens[0].tolist())
    hooks = {layer: edit_hooks(sae, model)[0] for layer, sae in by_layer.items()}
    skips = {layer: sae.W_skip for layer, sae in by_layer.items() if getattr(sae, "W_skip", None) is not None}
    linear = linearise(model, tokens, hooks, batch=batch, skips=skips)
    n_layers, n_pos = model.config.num_hidden_layers, tokens.shape[1]
    reads = {layer: read[0].detach() for layer, read in linear.reads.items()}
    embedding = linear.leaves[0][0].detach()
    sources = [
        _take_apart(
            by_layer.get(layer), layer, reads.get(layer, embedding), linear.constants.written[layer][0], texts, silent
        )
        for layer in range(n_layers)
    ]
    rows = _Rows(linear, embedding, sources)
    active = [node for source in sources for node in source.latents]
    nodes, targets, own = _logit_targets(model, tokenizer, reads[n_layers][-1], n_pos, n_layers, logits)
    encoders = torch.cat([source.encoders for source in sources if len(source.latents)] or [embedding[:0]])
    visited, weights = _visit(rows, active, encoders, targets, [node.value for node in nodes], max_nodes, batch)
    own += [float(encoders[i] @ reads[active[i].layer][active[i].position].to(encoders)) for i in visited]
    return _assembled(prompt, model, texts, n_layers, active, visited, nodes, weights, np.array(own))


def _logit_targets(
    model: Any, tokenizer: Any, final: Tensor, n_pos: int, n_layers: int, wanted: Sequence[int] | None
) -> tuple[list[GraphNode], list[Target], list[float]]:
    """Return the logits that are explained: nodes, targets, and their values centred on all logits, without a bias."""
    unembedding = model.get_output_embeddings()
    weight = unembedding.weight.detach()
    raw = torch.nn.functional.linear(final, weight)
    shown = raw if unembedding.bias is None else raw + unembedding.bias.detach()
    cap = getattr(model.config, "final_logit_softcapping", None)
    probability = (torch.tanh(shown / cap) * cap if cap else shown).softmax(-1)
    if wanted is None:
        top, ids = probability.topk(min(MOST_LOGITS, len(probability)))
        ids = ids[: int((top.cumsum(0) < COVERED).sum()) + 1].tolist()
    else:
        ids = list(wanted)
        if unknown := [i for i in ids if not 0 <= i < len(probability)]:
            raise UsageError(f"token {unknown[0]} does not exist; the model has tokens 0 to {len(probability) - 1}.")
    texts = token_text(tokenizer, ids)
    nodes = [
        GraphNode("logit", n_layers, n_pos - 1, i, float(probability[i]), text)
        for i, text in zip(ids, texts, strict=True)
    ]
    targets = [Target(n_layers, n_pos - 1, weight[i] - weight.mean(0)) for i in ids]
    return nodes, targets, [float(raw[i] - raw.mean()) for i in ids]


def _visit(
    rows: _Rows,
    active: list[GraphNode],
    encoders: Tensor,
    logits: list[Target],
    importance: list[float],
    most: int,
    batch: int,
) -> tuple[list[int], Float[np.ndarray, "rows sources"]]:
    """Return which latents were visited, and the rows of the logits and of these: the most influential first."""
    found = [rows(logits[i : i + batch]) for i in range(0, len(logits), batch)]
    visited: list[int] = []
    most = min(most, len(active))
    with progress("edges", total=most, unit="latent") as bar:
        while len(visited) < most:
            n = min(most - len(visited), max(FIRST_LOOK * batch, len(visited) // GROWTH))
            ranked = np.argsort(-_reach(np.concatenate(found), visited, importance, len(active)), kind="stable")
            seen = set(visited)
            for chosen in _batches([i for i in ranked.tolist() if i not in seen][:n], batch):
                targets = [Target(active[i].layer, active[i].position, encoders[i]) for i in chosen]
                found.append(rows(targets))
                visited += chosen
                bar.update(len(chosen))
    return visited, np.concatenate(found)


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _reach(
    rows: Float[np.ndarray, "rows sources"], visited: list[int], importance: list[float], n_latents: int
) -> Float[np.ndarray, " latents"]:
    """Return the influence of each latent on the logits through the rows that are known."""
    shares = np.abs(rows)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-10)
    reach = np.zeros(n_latents)
    step = np.array(importance) @ shares[: len(importance), :n_latents]
    while step.any():
        reach += step
        step = step[visited] @ shares[len(importance) :, :n_latents] if visited else np.zeros(0)
    return reach


def _assembled(
    prompt: str,
    model: Any,
    texts: list[str],
    n_layers: int,
    active: list[GraphNode],
    visited: list[int],
    logits: list[GraphNode],
    rows: Float[np.ndarray, "rows sources"],
    own: Float[np.ndarray, " rows"],
) -> Graph:
    """Put the nodes in order (latents by layer and position first, logits last) and book what was not visited."""
    n_pos, order = len(texts), np.sort(np.array(visited, dtype=np.int64))
    row_of = {latent: len(logits) + row for row, latent in enumerate(visited)}
    rows_in_order = [*(row_of[i] for i in order.tolist()), *range(len(logits))]
    rows, own = rows[rows_in_order], own[rows_in_order]
    left = np.setdiff1d(np.arange(len(active)), order)
    layer_of = np.array([node.layer for node in active], dtype=np.int64)
    rest = np.stack([rows[:, left[layer_of[left] == layer]].sum(axis=1) for layer in range(n_layers)], axis=1)
    others = rows[:, len(active) :]
    constant = own - rows.sum(axis=1)  # what the biases of attention and norms add; zero where there are none
    ends = np.zeros((len(rows), len(logits)))
    weights = np.concatenate([rows[:, order], others, rest, constant[:, None], ends], axis=1)
    places = [(layer, p) for layer in range(n_layers) for p in range(n_pos)]
    nodes = (
        *(active[i] for i in order.tolist()),
        *(GraphNode("error", layer, p, text=texts[p]) for layer, p in places),
        *(GraphNode("embedding", -1, p, text=texts[p]) for p in range(n_pos)),
        *(GraphNode("bias", layer, p, text=texts[p]) for layer, p in places),
        *(GraphNode("rest", layer) for layer in range(n_layers)),
        GraphNode("constant"),
        *logits,
    )
    targets = np.array([*range(len(order)), *range(len(nodes) - len(logits), len(nodes))])
    name = getattr(model, "loaded_from", None) or model.config._name_or_path
    return Graph(prompt, str(name), tuple(texts), n_layers, nodes, targets, weights, own, len(active))

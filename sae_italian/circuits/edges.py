"""The edges of a prompt's graph, by one gradient a target: which latent, error, input or bias wrote how much of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.analysis.latent import codes, edit_hooks, special, token_text, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import Pace
from sae_italian.base.storage import read_json, write_json
from sae_italian.circuits.graph import Graph, GraphNode, weights_of
from sae_italian.circuits.linear import Linear, Target, linearise
from sae_italian.models.activations import check_context
from sae_italian.saes.fit import decoded

COVERED = 0.95  # probability that the logit nodes hold together
MOST_LOGITS = 10
ROWS_AT_ONCE = 256  # of the edges that are weighed together, so that no copy of all is made
SAID_FROM = 1.0  # 10^9 bytes of edges, from which the memory is told before they are computed
FIRST_LOOK, GROWTH = 4, 4  # batches before the next are chosen by influence; then again when a quarter more was visited
log = logging.getLogger(__name__)


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
        n_pos, n_layers = len(embedding), len(sources)
        places = [torch.tensor([node.position for node in source.latents], dtype=torch.int64) for source in sources]
        self.counts = [torch.bincount(place, minlength=n_pos).tolist() for place in places]
        self.n_latents = sum(map(len, places))
        self.n_sources = self.n_latents + (2 * n_layers + 1) * n_pos

    def __call__(self, targets: Sequence[Target], out: Float[np.ndarray, "targets sources"]) -> None:
        """Write the targets' rows into `out`; what no target reads stays 0."""
        first, *writes = self.linear.gradients(targets)
        assert first is not None  # every target reads the first block's input
        n_pos, at, error = len(self.embedding), 0, self.n_latents
        token = error + len(self.sources) * n_pos
        bias = token + n_pos
        out[:] = 0
        out[:, token:bias] = _array((first * self.embedding).sum(-1))
        for source, gradient, counts in zip(self.sources, writes, self.counts, strict=True):
            if gradient is not None:
                out[:, error : error + n_pos] = _array((gradient * source.error).sum(-1))
                out[:, bias : bias + n_pos] = _array((gradient * source.bias).sum(-1))
                parts = source.vectors.split(counts)  # latents come position by position
                told = [gradient[:, p] @ part.T for p, part in enumerate(parts) if len(part)]
                if told:
                    out[:, at : at + len(source.latents)] = _array(torch.cat(told, dim=1))
            at, error, bias = at + len(source.latents), error + n_pos, bias + n_pos


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def attribute(
    model: Any,
    transcoders: Sequence[Any],
    prompt: str,
    *,
    max_nodes: int = 4096,
    batch: int = 16,
    logits: Sequence[int] | None = None,
    against: int | None = None,
    memory: float | None = None,
    resume: Path | None = None,
) -> Graph:
    """Return the attribution graph of a prompt.

    At most `max_nodes` latents become nodes, chosen by their influence as it is known so far; `batch` targets share a
    backward pass. `logits` are the ids of the tokens to explain; default: the likeliest that cover 95 %, at most 10.
    A logit is explained less the mean of all, or less that of the token `against`: what makes the difference of the two.
    `memory` (10^9 bytes; default: what is free) is what edges may take. With a folder `resume` the edges that are known are
    kept in it, and a graph of the same model, transcoders and prompt that was interrupted goes on there.
    Raises: UsageError for a prompt of one token or beyond the model's context, for more active latents than the memory
    holds, and as `layers_of` and `linearise`.
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
    nodes, targets, own = _logit_targets(model, tokenizer, reads[n_layers][-1], n_pos, n_layers, logits, against)
    rows, active = _Rows(linear, embedding, sources), [node for source in sources for node in source.latents]
    most = min(max_nodes, len(active))
    _check_memory(rows.n_sources * embedding.element_size(), len(nodes), len(active), most, memory)
    encoders = torch.cat([source.encoders for source in sources if len(source.latents)] or [embedding[:0]])
    values = [node.value for node in nodes]
    with _kept(resume, (most + len(nodes), rows.n_sources), (reads[n_layers], encoders, embedding), own) as kept:
        visited = _visit(rows, active, encoders, targets, values, most, batch, kept)
        own += [float(encoders[i] @ reads[active[i].layer][active[i].position].to(encoders)) for i in visited]
        found = _assembled(prompt, model, texts, n_layers, active, visited, nodes, kept.rows, np.array(own))
    return found if against is None else replace(found, against=against)


def _check_memory(row: int, n_logits: int, n_active: int, most: int, memory: float | None) -> None:
    """Raise UsageError when rows of so many bytes, held twice at the end, need more than is given or free (10^9 bytes)."""
    free = psutil.virtual_memory().available / 1e9 if memory is None else memory
    need = 2 * row * (most + n_logits) / 1e9
    if need > SAID_FROM:
        log.warning("%d latents are active, %d become nodes: %.1f GB of memory", n_active, most, need)
    if need > free:
        bound = max(1, int(0.95 * free * 1e9 / (2 * row)) - n_logits)
        raise UsageError(
            f"{n_active} latents are active; a graph with {most} of them needs {need:.2g} GB, and {free:.2g} GB are there. "
            f"Use max_nodes={bound}, a shorter prompt, or transcoders with fewer active latents."
        )


def _logit_targets(
    model: Any,
    tokenizer: Any,
    final: Tensor,
    n_pos: int,
    n_layers: int,
    wanted: Sequence[int] | None,
    against: int | None,
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
        if unknown := [i for i in (*ids, against or 0) if not 0 <= i < len(probability)]:
            raise UsageError(f"token {unknown[0]} does not exist; the model has tokens 0 to {len(probability) - 1}.")
    texts = token_text(tokenizer, ids)
    if against is not None:
        texts = [f"{text} − {token_text(tokenizer, [against])[0].strip()}" for text in texts]
    nodes = [
        GraphNode("logit", n_layers, n_pos - 1, i, float(probability[i]), text)
        for i, text in zip(ids, texts, strict=True)
    ]
    less, base = (weight.mean(0), raw.mean()) if against is None else (weight[against], raw[against])
    targets = [Target(n_layers, n_pos - 1, weight[i] - less) for i in ids]
    return nodes, targets, [float(raw[i] - base) for i in ids]


class _Kept(NamedTuple):
    """Rows that are known: of the logits, then of the latents in the order in which they were visited."""

    rows: Float[np.ndarray, "rows sources"]
    visited: list[int]
    save: Callable[[], None]


@contextmanager
def _kept(
    folder: Path | None, shape: tuple[int, int], tensors: Sequence[Tensor], values: Sequence[float]
) -> Iterator[_Kept]:
    """Yield room for rows, with those that an interrupted run of the same work left in the folder; removed at the end."""
    kind = _array(tensors[0][:0]).dtype
    if folder is None:
        yield _Kept(np.empty(shape, dtype=kind), [], lambda: None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256(repr((shape, *values)).encode())
    for tensor in tensors:
        digest.update(_array(tensor).tobytes())
    told, file, key = folder / "visited.json", folder / "rows.partial", digest.hexdigest()
    before = read_json(told) if told.is_file() and file.is_file() else {}
    goes_on = before.get("key") == key
    rows = np.memmap(file, dtype=kind, mode="r+" if goes_on else "w+", shape=shape)
    visited = list(before["visited"]) if goes_on else []

    def save() -> None:
        rows.flush()
        write_json(told, {"key": key, "visited": visited})

    yield _Kept(rows, visited, save)
    told.unlink(missing_ok=True)
    file.unlink()


def _visit(
    rows: _Rows,
    active: list[GraphNode],
    encoders: Tensor,
    logits: list[Target],
    importance: list[float],
    most: int,
    batch: int,
    kept: _Kept,
) -> list[int]:
    """Return which latents were visited, the most influential first, with the rows of the logits and theirs in `kept`.

    What a look chooses goes by layer: a batch's backward pass then begins no higher than it must.
    """
    n, visited = len(logits), kept.visited
    if not visited:
        for some in _batches(range(n), batch):
            rows([logits[i] for i in some], kept.rows[some[0] : some[-1] + 1])
    layer = np.array([node.layer for node in active], dtype=np.int64)
    pace = Pace("edges", most, "latent")
    with pace.bar:
        pace.skip(len(visited))
        while len(visited) < most:
            wanted = min(most - len(visited), max(FIRST_LOOK * batch, len(visited) // GROWTH))
            reached = _reach(kept.rows[: n + len(visited)], np.array(visited, dtype=np.int64), importance, layer)
            reached[visited] = -1
            ranked = np.argsort(-reached, kind="stable")[:wanted].tolist()
            for chosen in _batches(sorted(ranked, key=lambda i: (active[i].layer, i)), batch):
                targets = [Target(active[i].layer, active[i].position, encoders[i]) for i in chosen]
                at = n + len(visited)
                rows(targets, kept.rows[at : at + len(chosen)])
                visited += chosen
                pace.step(len(chosen))
            kept.save()
    return visited


def _batches(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _reach(
    rows: Float[np.ndarray, "rows sources"],
    visited: Int[np.ndarray, " visited"],
    importance: list[float],
    layer: Int[np.ndarray, " latents"],
) -> Float[np.ndarray, " latents"]:
    """Return the influence of each latent on the logits through the rows that are known.

    From the logits down, layer by layer: what a latent reaches is known when its own layer's turn comes.
    """
    n, reach = len(importance), np.zeros(len(layer))
    places = [
        np.arange(n),
        *(n + np.flatnonzero(layer[visited] == each) for each in range(layer.max(initial=-1), -1, -1)),
    ]
    for place in places:
        for some in np.split(place, range(ROWS_AT_ONCE, len(place), ROWS_AT_ONCE)):
            size = np.abs(rows[some])
            own = weights_of(importance)[some] if place is places[0] else reach[visited[some - n]]
            share = own / np.maximum(size.sum(axis=1), 1e-10)
            reach += share.astype(rows.dtype) @ size[:, : len(layer)]
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
    own, n_others = own[rows_in_order], rows.shape[1] - len(active)
    left = np.setdiff1d(np.arange(len(active)), order)
    layer_of = np.array([active[i].layer for i in left.tolist()], dtype=np.int64)
    by_layer = [left[layer_of == layer] for layer in range(n_layers)]
    first = len(order) + n_others
    weights = np.zeros((len(rows), first + n_layers + 1 + len(logits)), dtype=rows.dtype)
    for at, row in enumerate(rows_in_order):
        told = rows[row]
        weights[at, : len(order)], weights[at, len(order) : first] = told[order], told[len(active) :]
        weights[at, first : first + n_layers] = [told[some].sum() for some in by_layer]
        # what the biases of attention and norms add; zero where there are none
        weights[at, first + n_layers] = own[at] - told.sum(dtype=np.float64)
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
    name = getattr(model, "loaded_from", {}).get("name") or model.config._name_or_path
    return Graph(prompt, str(name), tuple(texts), n_layers, nodes, targets, weights, own, len(active))

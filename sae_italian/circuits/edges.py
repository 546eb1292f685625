"""The edges of a prompt's graph, by one gradient a target: which latent, error, input or bias wrote how much of it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.analysis.latent import codes, edit_hooks, special, token_text, written_directions
from sae_italian.base.errors import UsageError, check_whole
from sae_italian.base.pace import Pace, is_bounded
from sae_italian.base.storage import path_of, read_json, write_json
from sae_italian.circuits.graph import ROWS_AT_ONCE, Graph, Nodes, influence, joined, nodes_of
from sae_italian.circuits.linear import Linear, Targets
from sae_italian.models.activations import check_context, read_many
from sae_italian.saes.fit import decoded

COVERED = 0.95  # probability that the logit nodes hold together
MOST_LOGITS = 10
SITES = ("mlp.hook_in", "ln2.hook_normalized")  # that a transcoder may read
SAID_FROM = 1.0  # 10^9 bytes of edges, from which the memory is told before they are computed
LENGTHS, SHORT = 4, 16  # passes of a prompt's beginning, the whole as the last; tokens of the shortest
BATCH, MOST_BATCH, NUMBERS = 16, 128, 2**18  # targets of a backward pass, more where a read is small
FIRST_LOOK, GROWTH = 4, 4  # batches until a choice by influence; then, a quarter more each time


def layers_of(transcoders: Sequence[Any], model: Any) -> dict[int, Any]:
    """Return the transcoders by layer.

    Raises: UsageError for an SAE that is no transcoder of an MLP, two of one layer, mixed sites, and what does not fit the
    model.
    """
    found: dict[int, Any] = {}
    sites: dict[str, int] = {}
    for sae in transcoders:
        read, write = edit_hooks(sae, model)
        layer, site = int(read.split(".")[1]), read.split(".", 2)[2]
        if site not in SITES or not write.endswith(f"blocks.{layer}.hook_mlp_out"):
            raise UsageError(
                f"{read} to {write}: a graph needs transcoders, which read an MLP's input and write its output; this is an "
                "SAE. Train some with `sae-italian train mini/transcoders`."
            )
        if layer in found:
            raise UsageError(f"two transcoders are of layer {layer}; give one for each layer.")
        found[layer] = sae
        sites.setdefault(site, layer)
    if len(sites) > 1:
        told = ", ".join(f"{site} in layer {layer}" for site, layer in sites.items())
        raise UsageError(f"the transcoders read mixed sites: {told}. Use a set that reads one site in all layers.")
    return found


class Prompt:
    """A prompt on a model, and the transcoders by layer: what every question about a graph begins with."""

    def __init__(self, model: Any, transcoders: Sequence[Any], text: str):
        """Raises: UsageError for a prompt of one token or beyond the model's context, and as `layers_of`."""
        self.model, self.text, self.by_layer = model, text, layers_of(transcoders, model)
        self.hooks = {layer: sae.cfg.metadata.hook_name for layer, sae in self.by_layer.items()}
        self.tokens: Int[Tensor, "1 pos"] = model.tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        self.silent = special(self.tokens, model.tokenizer)[0]
        if int((~self.silent).sum()) < 2:
            raise UsageError(f"{text!r} has fewer than two tokens, so nothing leads to any. Give a longer prompt.")
        check_context(self.tokens.shape[1], model.config)

    def read(self) -> dict[int, Float[Tensor, "pos d"]]:
        """Return by layer what its transcoder reads, nothing frozen."""
        found = read_many(self.model, self.tokens, [*self.hooks.values()]) if self.hooks else {}
        return {layer: found[hook][0] for layer, hook in self.hooks.items()}

    def frozen(self, n_tokens: int | None = None, **more: Any) -> Linear:
        """Return the linear pass of the prompt, or of its beginning; `more` as `Linear`, and what it raises."""
        skips = {layer: sae.W_skip for layer, sae in self.by_layer.items() if getattr(sae, "W_skip", None) is not None}
        return Linear(self.model, self.tokens[:, :n_tokens], self.hooks, skips=skips, **more)

    @torch.no_grad()
    def targets(self, nodes: Nodes, against: int | None = None) -> list[Targets]:
        """Return what the rows of latents and logits are about, layer by layer, in which order the nodes must stand."""
        found, unembedding = [], self.model.get_output_embeddings().weight
        for layer in np.unique(nodes.layer).tolist():
            some = nodes[nodes.layer == layer]
            index = some.index.tolist()
            if some.kind[0] == "logit":
                vectors = unembedding[index] - (unembedding.mean(0) if against is None else unembedding[against])
            else:
                vectors = self.by_layer[layer].W_enc[:, index].T.to(unembedding)
            found.append(Targets(layer, torch.tensor(some.position.tolist()), vectors))
        return found

    def writes(self, nodes: Nodes) -> Float[Tensor, "n d_model"]:
        """Return what each latent writes at its position."""
        found = torch.zeros(len(nodes), self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)
        for layer in np.unique(nodes.layer).tolist():
            own = np.flatnonzero(nodes.layer == layer)
            value = torch.tensor(nodes.value[own].tolist())[:, None].to(found)
            found[own] = value * written_directions(self.by_layer[layer], nodes.index[own].tolist()).to(found)
        return found


@torch.no_grad()
def _take_apart(prompt: Prompt, layer: int, read: Tensor, written: Tensor) -> tuple[Nodes, Float[Tensor, "n d_model"]]:
    """Return the nodes of an MLP's output, position by position, and what each wrote: latents + bias + error.

    At special tokens, where no transcoder is applied, all is bias.
    """
    sae, live = prompt.by_layer.get(layer), (~prompt.silent)[:, None].to(written)
    told = skipped = constant = torch.zeros_like(written)
    nodes = [nodes_of(kind, layer, range(len(written))) for kind in ("error", "bias")]
    vectors = written[:0]
    if sae is not None:
        z = codes(sae, read).to(written)
        z[prompt.silent] = 0
        position, latent = z.nonzero(as_tuple=True)
        value = z[position, latent]
        unique, where = latent.unique(return_inverse=True)
        vectors = written_directions(sae, unique).to(written)[where] * value[:, None]
        nodes.insert(0, nodes_of("latent", layer, *(part.tolist() for part in (position, latent, value))))
        constant = sae.decode(torch.zeros_like(z[:1], dtype=sae.dtype)).to(written)
        told = decoded(sae, z.to(sae.dtype), read.to(sae.dtype)).to(written)
        skipped = told - sae.decode(z.to(sae.dtype)).to(written)  # by a skip: neither latent nor error
    bias = (written - skipped) * (1 - live) + constant * live
    found = joined(nodes)
    order = np.argsort(found.position, kind="stable")
    return found[order], torch.cat([vectors, (written - told) * live, bias])[order]


class _Rows:
    """Edges of targets to every source of a prompt; sources stand by layer, the input first, and then by position.

    Nothing looks ahead, so targets at early positions go back through a pass of the prompt's beginning alone.
    """

    def __init__(self, prompt: Prompt, batch: int | None, against: int | None):
        self.prompt, self.against, n_pos = prompt, against, prompt.tokens.shape[1]
        most = NUMBERS // (n_pos * prompt.model.config.hidden_size)
        self.batch = min(batch or max(BATCH, most), MOST_BATCH)
        self.linear = cache(prompt.frozen)  # by the number of tokens
        step = max(SHORT, -(-n_pos // LENGTHS))
        self.ends = [*range(step, n_pos, step), n_pos]
        whole, self.texts = self.linear(n_pos), token_text(prompt.model.tokenizer, prompt.tokens[0].tolist())
        self.reads = {layer: read.detach() for layer, read in whole.reads.items()}
        sources = [(nodes_of("embedding", -1, range(n_pos)), whole.leaves[0][0].detach())]
        for layer, written in sorted(whole.written.items()):
            read = self.reads[layer][0] if layer in prompt.by_layer else written[0]
            sources.append(_take_apart(prompt, layer, read, written[0]))
        self.vectors = [vectors for _, vectors in sources]
        self.parts = [vectors.split(np.bincount(nodes.position).tolist()) for nodes, vectors in sources]
        self.nodes = joined([nodes for nodes, _ in sources])
        self.nodes.text[:] = np.array(self.texts, dtype=object)[self.nodes.position]

    def __call__(self, nodes: Nodes, out: Float[np.ndarray, "targets sources"]) -> None:
        """Write the rows of nodes, which stand by layer; what no target reads is 0."""
        out[:] = 0  # an interrupted run may have left rows of others there
        end, at = next(end for end in self.ends if end > nodes.position.max()), 0
        gradients = self.linear(end).gradients(self.prompt.targets(nodes, self.against))
        for parts, vectors, gradient in zip(self.parts, self.vectors, gradients, strict=True):
            if gradient is not None:
                by_position = zip(gradient.unbind(1), parts[:end], strict=True)
                told = torch.cat([of @ part.T for of, part in by_position], dim=1)
                out[:, at : at + told.shape[1]] = _array(told)
            at += len(vectors)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def attribute(
    model: Any,
    transcoders: Sequence[Any],
    prompt: str,
    *,
    max_nodes: int = 4096,
    batch: int | None = None,
    logits: Sequence[int] | None = None,
    against: int | None = None,
    memory: float | None = None,
    resume: str | Path | None = None,
) -> Graph:
    """Return the attribution graph of a prompt.

    At most `max_nodes` latents become nodes, chosen by their influence as it is known so far; `batch` targets share a
    backward pass, at most 128 (default: 16, more for a short prompt on a small model). `logits` are the ids of the tokens to
    explain; default: the likeliest that cover 95 %, at most 10.
    A logit is explained less the mean of all, or less that of the token `against`: what makes the difference of the two.
    `memory` (10^9 bytes; default: what is free) is what edges may take. With a folder `resume` the edges that are known are
    kept in it, and a graph of the same model, transcoders and prompt that was interrupted goes on there.
    Raises: UsageError for more active latents than the memory holds, and as `Prompt` and `Linear`.
    """
    check_whole(1, batch=batch, max_nodes=max_nodes, n_logits=np.array(logits, dtype=object).size)
    rows, n_layers = _Rows(Prompt(model, transcoders, prompt), batch, against), model.config.num_hidden_layers
    final = rows.reads[n_layers]
    ends = _logit_nodes(model, final[0], logits, against)
    nodes = joined([rows.nodes, nodes_of("rest", range(n_layers)), nodes_of("constant"), ends])
    n_active = int((nodes.kind == "latent").sum())
    most = min(max_nodes, n_active)
    shape = (most + len(ends), len(nodes))
    _check_memory(shape, rows.vectors[0].element_size(), n_active, most, memory)
    name = str(getattr(model, "loaded_from", {}).get("name") or model.config._name_or_path)
    nothing = np.zeros(0, dtype=np.int64)
    graph = Graph(prompt, name, tuple(rows.texts), n_layers, nodes, nothing, nothing, nothing, n_active, against)
    with _kept(resume, shape, most, [final, *rows.vectors], (*ends.index.tolist(), against)) as kept:
        return _whole(_visited(graph, rows, *kept), rows)


def _check_memory(shape: tuple[int, int], size: int, n_active: int, most: int, memory: float | None) -> None:
    """Raise UsageError when edges of so many bytes each need more than is given or free (10^9 bytes).

    Where latents are left out, the edges to those that stay are held once more, at the end.
    """
    free = psutil.virtual_memory().available / 1e9 if memory is None else memory
    if not free > 0:  # nor what is no number
        raise UsageError(f"memory is {free:g}; 10^9 bytes above 0 were expected.")
    row, n_logits = size * shape[1] / 1e9, shape[0] - most
    need = shape[0] * (row + (size * (shape[1] - n_active + most) / 1e9 if most < n_active else 0))
    if need > SAID_FROM:
        sys.stderr.write(f"{n_active:,} latents are active, {most:,} become nodes: {need:.1f} GB.\n")
    if need > free:
        bound = max(1, int(0.95 * free / (2 * row)) - n_logits)
        raise UsageError(
            f"{n_active} latents are active; a graph with {most} of them needs {need:.2g} GB, and {free:.2g} GB are there. "
            f"Use max_nodes={bound}, a shorter prompt, or transcoders with fewer active latents."
        )


def _logit_nodes(
    model: Any, final: Float[Tensor, "pos d_model"], wanted: Sequence[int] | None, against: int | None
) -> Nodes:
    """Return the logits that are explained, the wanted ones or the likeliest."""
    with torch.no_grad():
        logits = model.get_output_embeddings()(final[-1])
    cap = getattr(model.config, "final_logit_softcapping", None)
    probability = (torch.tanh(logits / cap) * cap if cap else logits).softmax(-1)
    top, likeliest = probability.topk(min(MOST_LOGITS, len(probability)))
    likeliest = likeliest[: int((top.cumsum(0) < COVERED).sum()) + 1]
    ids = list(dict.fromkeys(np.ravel(likeliest.tolist() if wanted is None else wanted).tolist()))
    if unknown := [i for i in (*ids, against or 0) if i not in range(len(probability))]:
        raise UsageError(f"token {unknown[0]} does not exist; the model has tokens 0 to {len(probability) - 1}.")
    texts = token_text(model.tokenizer, ids)
    if against is not None:
        other = token_text(model.tokenizer, [against])[0].strip()
        if against in ids:
            raise UsageError(f"the token {other!r} is explained less itself, which is nothing. Give another.")
        texts = [f"{text} − {other}" for text in texts]
    place = model.config.num_hidden_layers, len(final) - 1
    return nodes_of("logit", *place, ids, probability[ids].tolist(), texts)


# Rows of the latents that are known, and behind them those of the logits; what is told of them; and what keeps both.
_Kept = tuple[Float[np.ndarray, "rows nodes"], dict[str, Any], Callable[[], None]]


@contextmanager
def _kept(
    folder: str | Path | None, shape: tuple[int, int], n_latents: int, tensors: list[Tensor], asked: tuple
) -> Iterator[_Kept]:
    """Yield room for rows, with those that an interrupted run of the same work left in the folder; removed once whole.

    Told are the nodes that were `visited`, in the order of the rows, and those `planned` by the last look.
    """
    kind, state = _array(tensors[0][:0]).dtype, {"visited": [], "planned": []}
    if folder is None:
        yield np.zeros(shape, dtype=kind), state, lambda: None
        return
    (folder := path_of(folder)).mkdir(parents=True, exist_ok=True)
    digest = sha256(repr(("from the end", shape, *asked)).encode())
    for tensor in tensors:
        digest.update(_array(tensor).tobytes())
    told, file, key = folder / "visited.json", folder / "rows.partial", digest.hexdigest()
    before = read_json(told) if told.is_file() and file.is_file() else {}
    goes_on = before.get("key") == key and file.stat().st_size == np.prod(shape) * kind.itemsize
    rows = np.memmap(file, dtype=kind, mode="r+" if goes_on else "w+", shape=shape)
    state |= before if goes_on else {"key": key}

    def save() -> None:
        rows.flush()
        write_json(told, state)

    yield rows, state, save
    if len(state["visited"]) == n_latents:  # else the time was over, and the same command goes on
        told.unlink(missing_ok=True)
        file.unlink()


def _visited(
    graph: Graph, rows: _Rows, weights: np.ndarray, state: dict[str, list[int]], save: Callable[[], None]
) -> Graph:
    """Return the graph with the rows of its logits and of as many latents as there is room, or time, for.

    Where not all can be visited, or not in time, the most influential of what is known are next. What a look chooses goes by
    layer and position, so that a batch's backward pass begins no higher, and ends no later in the prompt, than it must.
    The last of it is first, as rows are filled upwards from those of the logits.
    """
    visited, planned, logits = state["visited"], state["planned"], np.flatnonzero(graph.of_kind("logit"))
    most, batch, over = len(weights) - len(logits), rows.batch, False

    def known() -> Graph:
        return replace(graph, targets=np.array([*visited, *logits]), weights=weights[most - len(visited) :])

    for at in range(0, 0 if visited else len(logits), batch):
        rows(graph.nodes[logits[at : at + batch]], weights[most + at :][:batch])
    pace = Pace("edges", most, "latent")
    with pace.bar:
        pace.skip(len(visited))
        while len(visited) < most and not over:
            if not planned:
                left = np.setdiff1d(graph.latents, visited)
                wanted = min(most - len(visited), batch * max(FIRST_LOOK, len(visited) // (GROWTH * batch)))
                if most < graph.n_active or is_bounded():
                    left = np.sort(left[np.argsort(-influence(known())[left], kind="stable")[:wanted]])
                planned += left[-wanted:].tolist()
            chosen, at = planned[-batch:], most - len(visited)
            rows(graph.nodes[chosen], weights[at - len(chosen) : at])
            visited[:0], planned[-batch:] = chosen, []
            over = pace.step(len(chosen))
            if over or not planned:
                save()
    return known()


def _whole(graph: Graph, rows: _Rows) -> Graph:
    """Return the graph of those latents that have a row, in the order of its nodes; the others are the rest of their layer.

    Where all have one, the rows themselves are the weights. The constant is what the biases of attention and norms add.
    """
    order, weights = np.argsort(graph.targets), graph.weights
    left = np.setdiff1d(graph.latents, graph.targets)
    chosen = np.setdiff1d(np.arange(len(graph.nodes)), left)
    if len(left) or isinstance(weights, np.memmap):
        weights = np.empty((len(order), len(chosen)), dtype=weights.dtype)
        rest = np.flatnonzero(graph.of_kind("rest"))
        of_layer = (graph.nodes.layer[left, None] == np.arange(graph.n_layers)).astype(weights.dtype)
        for at in range(0, len(order), ROWS_AT_ONCE):
            told = graph.weights[order[at : at + ROWS_AT_ONCE]]
            told[:, rest] = told[:, left] @ of_layer
            weights[at : at + ROWS_AT_ONCE] = told[:, chosen]
    nodes, targets = graph.nodes[chosen], np.searchsorted(chosen, graph.targets[order])
    values = [each.of(rows.reads) for each in rows.prompt.targets(nodes[targets], rows.against)]
    own = _array(torch.cat(values)).astype(np.float64)
    weights[:, nodes.kind == "constant"] = (own - weights.sum(axis=1, dtype=np.float64))[:, None]
    return replace(graph, nodes=nodes, targets=targets, weights=weights, own=own)

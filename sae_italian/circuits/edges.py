"""The edges of a prompt's graph, by one gradient a target: which latent, error, input or bias wrote how much of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
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
SITES = ("mlp.hook_in", "ln2.hook_normalized")  # that a transcoder may read
ROWS_AT_ONCE = 256  # of the edges that are weighed together, so that no copy of all is made
SAID_FROM = 1.0  # 10^9 bytes of edges, from which the memory is told before they are computed
LENGTHS, SHORT = 4, 16  # passes of a prompt's beginning, the whole as the last; tokens of the shortest
FIRST_LOOK, GROWTH = 4, 4  # batches before the next are chosen by influence; then again when a quarter more was visited


class _Written(NamedTuple):
    """What was written into the residual stream at one place, the first block's input or an MLP, taken apart."""

    nodes: list[GraphNode]  # position by position
    vectors: Float[Tensor, "n d_model"]  # what each wrote
    counts: list[int]  # of nodes at each position


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


@torch.no_grad()
def _take_apart(sae: Any, layer: int, read: Tensor, written: Tensor, texts: list[str], silent: Tensor) -> _Written:
    """Write an MLP's output as latents + bias + error; at special tokens, where no transcoder is applied, all is bias."""
    told = skipped = constant = torch.zeros_like(written)
    nodes, vectors, live = [], written[:0], (~silent)[:, None].to(written)
    if sae is not None:
        z = codes(sae, read).to(written)
        z[silent] = 0
        position, latent = (part.tolist() for part in z.nonzero(as_tuple=True))
        value = z[position, latent]
        unique, where = np.unique(latent, return_inverse=True)
        vectors = written_directions(sae, unique.tolist()).to(written)[where] * value[:, None]
        nodes = [GraphNode("latent", layer, *at) for at in zip(position, latent, value.tolist(), strict=True)]
        constant = sae.decode(torch.zeros_like(z[:1], dtype=sae.dtype)).to(written)
        told = decoded(sae, z.to(sae.dtype), read.to(sae.dtype)).to(written)
        skipped = told - sae.decode(z.to(sae.dtype)).to(written)  # by a skip connection: neither latent nor error
    places = range(len(texts))
    nodes += [GraphNode(kind, layer, position) for kind in ("error", "bias") for position in places]
    bias = (written - skipped) * (1 - live) + constant * live
    vectors = torch.cat([vectors, (written - told) * live, bias])
    at = np.array([node.position for node in nodes])
    order = np.argsort(at, kind="stable").tolist()
    ordered = [nodes[i]._replace(text=texts[at[i]]) for i in order]
    return _Written(ordered, vectors[order], np.bincount(at).tolist())


def frozen(model: Any, by_layer: Mapping[int, Any], tokens: Int[Tensor, "1 pos"], **more: Any) -> Linear:
    """Return the prompt's linear pass for these transcoders; `more` as `linearise`, and what it raises."""
    hooks = {layer: edit_hooks(sae, model)[0] for layer, sae in by_layer.items()}
    skips = {layer: sae.W_skip for layer, sae in by_layer.items() if getattr(sae, "W_skip", None) is not None}
    return linearise(model, tokens, hooks, skips=skips, **more)


@torch.no_grad()
def target_of(model: Any, by_layer: Mapping[int, Any], node: GraphNode, against: int | None = None) -> Target:
    """Return what the row of a latent, or of a logit, is about."""
    if node.kind == "latent":
        sae = by_layer[node.layer]
        norm = sae.W_dec[node.index].norm() if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
        vector = sae.W_enc[:, node.index] * norm
    else:
        weight = model.get_output_embeddings().weight
        vector = weight[node.index] - (weight.mean(0) if against is None else weight[against])
    return Target(node.layer, node.position, vector)


class _Rows:
    """Edges of targets to every source of a prompt; sources stand by layer, the input first, and then by position.

    Nothing looks ahead, so targets at early positions go back through a pass of the prompt's beginning alone.
    """

    def __init__(self, linear: Callable[[int], Linear], sources: Sequence[_Written]):
        self.linear, self.sources, n_pos = linear, sources, len(sources[0].counts)
        step = max(SHORT, -(-n_pos // LENGTHS))
        self.ends = [*range(step, n_pos, step), n_pos]
        self.n_sources = sum(len(source.nodes) for source in sources)

    def __call__(self, targets: Sequence[Target], out: Float[np.ndarray, "targets sources"]) -> None:
        """Write the targets' rows into `out`; what no target reads stays 0."""
        end, at = next(end for end in self.ends if end > max(target.position for target in targets)), 0
        out[:] = 0
        for source, gradient in zip(self.sources, self.linear(end).gradients(targets), strict=True):
            if gradient is not None:
                parts = source.vectors.split(source.counts)[:end]
                told = torch.cat([gradient[:, p] @ part.T for p, part in enumerate(parts)], dim=1)
                out[:, at : at + told.shape[1]] = _array(told)
            at += len(source.nodes)


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

    @cache
    def linear(end: int) -> Linear:
        return frozen(model, by_layer, tokens[:, :end], batch=batch)

    whole, n_layers, n_pos = linear(tokens.shape[1]), model.config.num_hidden_layers, tokens.shape[1]
    reads = {layer: read[0].detach() for layer, read in whole.reads.items()}
    embedding = whole.leaves[0][0].detach()
    inputs = [GraphNode("embedding", -1, position, text=text) for position, text in enumerate(texts)]
    sources = [_Written(inputs, embedding, [1] * n_pos)]
    for layer, written in sorted(whole.constants.written.items()):
        sae, read = by_layer.get(layer), reads.get(layer, embedding)
        sources.append(_take_apart(sae, layer, read, written[0], texts, silent))
    target = partial(target_of, model, by_layer)
    logit_nodes, own = _logit_nodes(model, tokenizer, reads[n_layers][-1], n_pos, logits, against)
    targets = [target(node, against) for node in logit_nodes]
    rows, nodes = _Rows(linear, sources), [node for source in sources for node in source.nodes]
    most = min(max_nodes, n_active := sum(node.kind == "latent" for node in nodes))
    _check_memory(rows.n_sources * embedding.element_size(), len(targets), n_active, most, memory)
    written = [reads[n_layers], *(source.vectors for source in sources)]
    with _kept(resume, (most + len(targets), rows.n_sources), written, own) as kept:
        visited = _visit(rows, nodes, target, targets, [node.value for node in logit_nodes], most, batch, kept)
        for each in (target(nodes[i]) for i in visited):
            own.append(float(each.vector.to(embedding) @ reads[each.layer][each.position]))
        found = _assembled(nodes, visited, logit_nodes, kept.rows, np.array(own), n_layers)
    against = -1 if against is None else against
    return Graph(prompt, _name(model), tuple(texts), n_layers, *found, n_active, against)


def _name(model: Any) -> str:
    return str(getattr(model, "loaded_from", {}).get("name") or model.config._name_or_path)


def _check_memory(row: int, n_logits: int, n_active: int, most: int, memory: float | None) -> None:
    """Raise UsageError when rows of so many bytes, held twice at the end, need more than is given or free (10^9 bytes)."""
    free = psutil.virtual_memory().available / 1e9 if memory is None else memory
    need = 2 * row * (most + n_logits) / 1e9
    if need > SAID_FROM:
        sys.stderr.write(f"{n_active:,} latents are active, {most:,} become nodes: {need:.1f} GB of memory.\n")
    if need > free:
        bound = max(1, int(0.95 * free * 1e9 / (2 * row)) - n_logits)
        raise UsageError(
            f"{n_active} latents are active; a graph with {most} of them needs {need:.2g} GB, and {free:.2g} GB are there. "
            f"Use max_nodes={bound}, a shorter prompt, or transcoders with fewer active latents."
        )


def _logit_nodes(
    model: Any,
    tokenizer: Any,
    final: Tensor,
    n_pos: int,
    wanted: Sequence[int] | None,
    against: int | None,
) -> tuple[list[GraphNode], list[float]]:
    """Return the logits that are explained, and their values centred on all logits, without a bias."""
    unembedding, n_layers = model.get_output_embeddings(), model.config.num_hidden_layers
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
    base = raw.mean() if against is None else raw[against]
    return nodes, [float(raw[i] - base) for i in ids]


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
    nodes: Sequence[GraphNode],
    target: Callable[[GraphNode], Target],
    logits: Sequence[Target],
    importance: Sequence[float],
    most: int,
    batch: int,
    kept: _Kept,
) -> list[int]:
    """Return which nodes, all latents, were visited, with the rows of the logits and theirs in `kept`.

    The most influential of what is known are next. What a look chooses goes by layer and position, so that a batch's
    backward pass begins no higher, and ends no later in the prompt, than it must.
    """
    n, visited = len(logits), kept.visited
    if not visited:
        for some in _batches(range(n), batch):
            rows([logits[i] for i in some], kept.rows[some[0] : some[-1] + 1])
    layer = np.array([node.layer if node.kind == "latent" else -1 for node in nodes], dtype=np.int64)
    pace = Pace("edges", most, "latent")
    with pace.bar:
        pace.skip(len(visited))
        while len(visited) < most:
            wanted = min(most - len(visited), max(FIRST_LOOK * batch, len(visited) // GROWTH))
            reached = _reach(kept.rows[: n + len(visited)], np.array(visited, dtype=np.int64), importance, layer)
            reached[layer < 0] = -2
            reached[visited] = -1
            ranked = np.argsort(-reached, kind="stable")[:wanted].tolist()
            for chosen in _batches(sorted(ranked), batch):  # nodes stand by layer and position
                at = n + len(visited)
                rows([target(nodes[i]) for i in chosen], kept.rows[at : at + len(chosen)])
                visited += chosen
                pace.step(len(chosen))
            kept.save()
    return visited


def _batches(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _reach(
    rows: Float[np.ndarray, "rows sources"],
    visited: Int[np.ndarray, " visited"],
    importance: Sequence[float],
    layer: Int[np.ndarray, " sources"],
) -> Float[np.ndarray, " sources"]:
    """Return the influence of each source on the logits through the rows that are known.

    From the logits down, layer by layer: what a latent reaches is known when its own layer's turn comes.
    """
    n, reach = len(importance), np.zeros(len(layer))
    downwards = range(layer.max(initial=-1), -1, -1)
    places = [np.arange(n), *(n + np.flatnonzero(layer[visited] == each) for each in downwards)]
    for place in places:
        for some in np.split(place, range(ROWS_AT_ONCE, len(place), ROWS_AT_ONCE)):
            size = np.abs(rows[some])
            own = weights_of(importance)[some] if place is places[0] else reach[visited[some - n]]
            share = own / np.maximum(size.sum(axis=1), 1e-10)
            reach += share.astype(rows.dtype) @ size
    return reach


def _assembled(
    nodes: Sequence[GraphNode],
    visited: Sequence[int],
    logits: Sequence[GraphNode],
    rows: Float[np.ndarray, "rows sources"],
    own: Float[np.ndarray, " rows"],
    n_layers: int,
) -> tuple[tuple[GraphNode, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Return a graph's nodes, targets, weights and own, in order: latents by layer and position first, logits last.

    What was not visited is booked as the rest of its layer.
    """
    n, order = len(logits), np.sort(np.array(visited, dtype=np.int64))
    others = [i for kind in ("error", "embedding", "bias") for i, node in enumerate(nodes) if node.kind == kind]
    chosen = np.concatenate([order, np.array(others, dtype=np.int64)])
    layer = np.array([node.layer if node.kind == "latent" else -1 for node in nodes], dtype=np.int64)
    layer[order] = -1
    left = [np.flatnonzero(layer == each) for each in range(n_layers)]
    row_of = dict(zip(visited, range(n, len(rows)), strict=True))
    in_order = [*(row_of[i] for i in order.tolist()), *range(n)]
    own, first = own[in_order], len(chosen)
    weights = np.zeros((len(rows), first + n_layers + 1 + n), dtype=rows.dtype)
    for at, row in enumerate(in_order):
        told = rows[row]
        weights[at, :first] = told[chosen]
        weights[at, first : first + n_layers] = [told[some].sum() for some in left]
        # what the biases of attention and norms add; zero where there are none
        weights[at, first + n_layers] = own[at] - told.sum(dtype=np.float64)
    rest = [GraphNode("rest", layer) for layer in range(n_layers)]
    found = (*(nodes[i] for i in chosen.tolist()), *rest, GraphNode("constant"), *logits)
    targets = np.array([*range(len(order)), *range(len(found) - n, len(found))])
    return found, targets, weights, own

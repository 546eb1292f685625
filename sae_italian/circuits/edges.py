"""The edges of a prompt's graph, by one gradient a target: which latent, error, input or bias wrote how much of it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from itertools import groupby
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
from sae_italian.circuits.graph import ROWS_AT_ONCE, Graph, GraphNode, reach, weights_of
from sae_italian.circuits.linear import Linear, Targets
from sae_italian.models.activations import check_context
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
        self.tokens: Int[Tensor, "1 pos"] = model.tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        self.silent = special(self.tokens, model.tokenizer)[0]
        if int((~self.silent).sum()) < 2:
            raise UsageError(f"{text!r} has fewer than two tokens, so nothing leads to any. Give a longer prompt.")
        check_context(self.tokens.shape[1], model.config)

    def frozen(self, n_tokens: int | None = None, **more: Any) -> Linear:
        """Return the linear pass of the prompt, or of its beginning; `more` as `Linear`, and what it raises."""
        hooks = {layer: sae.cfg.metadata.hook_name for layer, sae in self.by_layer.items()}
        skips = {layer: sae.W_skip for layer, sae in self.by_layer.items() if getattr(sae, "W_skip", None) is not None}
        return Linear(self.model, self.tokens[:, :n_tokens], hooks, skips=skips, **more)

    @torch.no_grad()
    def targets(self, nodes: Sequence[GraphNode], against: int | None = None) -> list[Targets]:
        """Return what the rows of latents and logits are about, layer by layer, in which order the nodes must stand."""
        found, unembedding = [], self.model.get_output_embeddings().weight
        for layer, some in ((layer, list(some)) for layer, some in groupby(nodes, lambda node: node.layer)):
            index = torch.tensor([node.index for node in some], device=self.tokens.device)
            if some[0].kind == "logit":
                vectors = unembedding[index] - (unembedding.mean(0) if against is None else unembedding[against])
            else:
                sae = self.by_layer[layer]
                vectors = sae.W_enc[:, index].T.to(unembedding)
            found.append(Targets(layer, torch.tensor([node.position for node in some]), vectors))
        return found

    def write(self, node: GraphNode) -> Float[Tensor, " d_model"]:
        """Return what a latent writes at its position."""
        return node.value * written_directions(self.by_layer[node.layer], [node.index])[0]


@torch.no_grad()
def _take_apart(
    sae: Any, layer: int, read: Tensor, written: Tensor, texts: list[str], silent: Tensor
) -> tuple[list[GraphNode], Float[Tensor, "n d_model"]]:
    """Return the nodes of an MLP's output, position by position, and what each wrote: latents + bias + error.

    At special tokens, where no transcoder is applied, all is bias.
    """
    told = skipped = constant = torch.zeros_like(written)
    nodes, vectors, live = [], written[:0], (~silent)[:, None].to(written)
    if sae is not None:
        z = codes(sae, read).to(written)
        z[silent] = 0
        position, latent = (part.tolist() for part in z.nonzero(as_tuple=True))
        value = z[position, latent]
        unique, where = np.unique(latent, return_inverse=True)
        vectors = written_directions(sae, unique.tolist()).to(written)[where] * value[:, None]
        found = zip(position, latent, value.tolist(), strict=True)
        nodes = [GraphNode("latent", layer, at, index, each, texts[at]) for at, index, each in found]
        constant = sae.decode(torch.zeros_like(z[:1], dtype=sae.dtype)).to(written)
        told = decoded(sae, z.to(sae.dtype), read.to(sae.dtype)).to(written)
        skipped = told - sae.decode(z.to(sae.dtype)).to(written)  # by a skip: neither latent nor error
    nodes += [GraphNode(kind, layer, at, text=text) for kind in ("error", "bias") for at, text in enumerate(texts)]
    bias = (written - skipped) * (1 - live) + constant * live
    vectors = torch.cat([vectors, (written - told) * live, bias])
    order = sorted(range(len(nodes)), key=lambda i: nodes[i].position)
    return [nodes[i] for i in order], vectors[order]


class _Rows:
    """Edges of targets to every source of a prompt; sources stand by layer, the input first, and then by position.

    Nothing looks ahead, so targets at early positions go back through a pass of the prompt's beginning alone.
    """

    def __init__(self, prompt: Prompt, batch: int | None, against: int | None):
        self.prompt, self.against, n_pos = prompt, against, prompt.tokens.shape[1]
        most = NUMBERS // (n_pos * prompt.model.config.hidden_size)
        self.batch = min(batch or max(BATCH, most), MOST_BATCH)
        self.linear = cache(partial(prompt.frozen, batch=self.batch))  # by the number of tokens
        step = max(SHORT, -(-n_pos // LENGTHS))
        self.ends = [*range(step, n_pos, step), n_pos]
        whole, self.texts = self.linear(n_pos), token_text(prompt.model.tokenizer, prompt.tokens[0].tolist())
        self.reads = {layer: read[:1].detach() for layer, read in whole.reads.items()}
        inputs = [GraphNode("embedding", -1, at, text=text) for at, text in enumerate(self.texts)]
        sources = [(inputs, whole.leaves[0][0].detach())]
        for layer, written in sorted(whole.written.items()):
            read = self.reads[layer][0] if layer in prompt.by_layer else written[0]
            sae = prompt.by_layer.get(layer)
            sources.append(_take_apart(sae, layer, read, written[0], self.texts, prompt.silent))
        self.nodes = [node for nodes, _ in sources for node in nodes]
        self.vectors = [vectors for _, vectors in sources]
        counts = (np.bincount([node.position for node in nodes]).tolist() for nodes, _ in sources)
        self.parts = [vectors.split(each) for vectors, each in zip(self.vectors, counts, strict=True)]
        self.layer = np.array([node.layer if node.kind == "latent" else -1 for node in self.nodes], dtype=np.int64)
        self.decided = np.array([node.kind != "bias" for node in self.nodes])

    def __call__(self, nodes: Sequence[GraphNode], out: Float[np.ndarray, "targets sources"]) -> None:
        """Write the rows of nodes, which stand by layer; what no target reads is 0."""
        out[:] = 0  # an interrupted run may have left rows of others there
        end, at = next(end for end in self.ends if end > max(node.position for node in nodes)), 0
        gradients = self.linear(end).gradients(self.prompt.targets(nodes, self.against))
        for parts, vectors, gradient in zip(self.parts, self.vectors, gradients, strict=True):
            if gradient is not None:
                by_position = zip(gradient.unbind(1), parts[:end], strict=True)
                told = torch.cat([of @ part.T for of, part in by_position], dim=1)
                out[:, at : at + told.shape[1]] = _array(told)
            at += len(vectors)

    def values(self, nodes: Sequence[GraphNode]) -> list[float]:
        """Return what the rows of nodes, which stand by layer, add up to."""
        return [value for each in self.prompt.targets(nodes, self.against) for value in each.of(self.reads).tolist()]


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
    resume: Path | None = None,
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
    rows, n_layers = _Rows(Prompt(model, transcoders, prompt), batch, against), model.config.num_hidden_layers
    targets = _logit_nodes(model, rows.reads[n_layers][0], logits, against)
    most = min(max_nodes, n_active := int((rows.layer >= 0).sum()))
    shape = (most + len(targets), len(rows.nodes) + n_layers + 1 + len(targets))
    _check_memory(shape, rows.vectors[0].element_size(), n_active, most, memory)
    told = [rows.reads[n_layers], *rows.vectors]
    with _kept(resume, shape, most, told, (*(node.index for node in targets), against)) as kept:
        _visit(rows, targets, most, kept)
        found = _assembled(rows, targets, kept)
    name = str(getattr(model, "loaded_from", {}).get("name") or model.config._name_or_path)
    return Graph(prompt, name, tuple(rows.texts), n_layers, *found, n_active, against)


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
) -> list[GraphNode]:
    """Return the logits that are explained, the wanted ones or the likeliest."""
    with torch.no_grad():
        logits = model.get_output_embeddings()(final[-1])
    cap = getattr(model.config, "final_logit_softcapping", None)
    probability = (torch.tanh(logits / cap) * cap if cap else logits).softmax(-1)
    top, likeliest = probability.topk(min(MOST_LOGITS, len(probability)))
    ids = likeliest[: int((top.cumsum(0) < COVERED).sum()) + 1].tolist() if wanted is None else list(wanted)
    if unknown := [i for i in (*ids, against or 0) if not 0 <= i < len(probability)]:
        raise UsageError(f"token {unknown[0]} does not exist; the model has tokens 0 to {len(probability) - 1}.")
    if against is not None and against in ids:
        told = token_text(model.tokenizer, [against])[0].strip()
        raise UsageError(f"the token {told!r} is explained less itself, which leaves nothing. Give another against it.")
    texts = token_text(model.tokenizer, ids)
    if against is not None:
        texts = [f"{text} − {token_text(model.tokenizer, [against])[0].strip()}" for text in texts]
    place = model.config.num_hidden_layers, len(final) - 1
    found = zip(ids, probability[ids].tolist(), texts, strict=True)
    return [GraphNode("logit", *place, *each) for each in found]


class _Kept(NamedTuple):
    """Rows that are known: of the latents in the order in which they were visited, and at the end of the logits."""

    rows: Float[np.ndarray, "rows sources"]
    visited: list[int]
    planned: list[int]  # chosen by the last look, and not visited yet
    save: Callable[[], None]


@contextmanager
def _kept(
    folder: Path | None, shape: tuple[int, int], n_latents: int, tensors: Sequence[Tensor], asked: Sequence[Any]
) -> Iterator[_Kept]:
    """Yield room for rows, with those that an interrupted run of the same work left in the folder; removed once whole."""
    kind = _array(tensors[0][:0]).dtype
    if folder is None:
        yield _Kept(np.zeros(shape, dtype=kind), [], [], lambda: None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256(repr((shape, *asked)).encode())
    for tensor in tensors:
        digest.update(_array(tensor).tobytes())
    told, file, key = folder / "visited.json", folder / "rows.partial", digest.hexdigest()
    before = read_json(told) if told.is_file() and file.is_file() else {}
    goes_on = before.get("key") == key and file.stat().st_size == np.prod(shape) * kind.itemsize
    rows = np.memmap(file, dtype=kind, mode="r+" if goes_on else "w+", shape=shape)
    visited, planned = (list(before.get(name, ())) if goes_on else [] for name in ("visited", "planned"))

    def save() -> None:
        rows.flush()
        write_json(told, {"key": key, "visited": visited, "planned": planned})

    yield _Kept(rows, visited, planned, save)
    if len(visited) == n_latents:  # else the time was over, and the same command goes on
        told.unlink(missing_ok=True)
        file.unlink()


def _visit(rows: _Rows, logits: Sequence[GraphNode], most: int, kept: _Kept) -> None:
    """Find the rows of the logits and of `most` latents.

    Where not all can be visited, or not in time, the most influential of what is known are next. What a look chooses goes by
    layer and position, so that a batch's backward pass begins no higher, and ends no later in the prompt, than it must.
    """
    n, batch, weight = len(logits), rows.batch, weights_of([node.value for node in logits])
    visited, planned, over = kept.visited, kept.planned, False
    edges = kept.rows[:, : len(rows.nodes)]
    for at in range(0, 0 if visited else n, batch):
        rows(logits[at : at + batch], edges[most + at : most + min(at + batch, n)])
    pace = Pace("edges", most, "latent")
    with pace.bar:
        pace.skip(len(visited))
        while len(visited) < most and not over:
            if not planned:
                left = np.setdiff1d(np.flatnonzero(rows.layer >= 0), visited)
                wanted = min(most - len(visited), batch * max(FIRST_LOOK, len(visited) // (GROWTH * batch)))
                if len(visited) + len(left) > most or pace.work.ends < np.inf:
                    known, targets = np.r_[: len(visited), most : most + n], [*visited, *[len(rows.nodes)] * n]
                    layer = np.array([*rows.layer[visited], *(node.layer for node in logits)])
                    weights = np.r_[np.zeros(len(visited)), weight]
                    reached = reach(edges, known, np.array(targets), layer, weights, rows.decided)
                    left = np.sort(left[np.argsort(-reached[left], kind="stable")[:wanted]])
                planned += left[:wanted].tolist()
            while planned and not over:
                chosen = planned[:batch]
                rows([rows.nodes[i] for i in chosen], edges[len(visited) : len(visited) + len(chosen)])
                visited += chosen
                del planned[:batch]
                over = pace.step(len(chosen))
            kept.save()


def _assembled(
    rows: _Rows, logits: Sequence[GraphNode], kept: _Kept
) -> tuple[tuple[GraphNode, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Return a graph's nodes, targets, weights and own, in the order of the sources; the rest, the constant, logits last.

    What was not visited is booked as the rest of its layer. Where all was, the rows themselves are the weights.
    """
    n, n_layers, weights = len(logits), len(rows.vectors) - 1, kept.rows
    visited, n_known = np.array(kept.visited, dtype=np.int64), len(kept.visited) + n
    left = np.setdiff1d(np.flatnonzero(rows.layer >= 0), visited)
    chosen = np.setdiff1d(np.arange(len(rows.nodes)), left)
    if len(left) or isinstance(weights, np.memmap):
        weights = np.zeros((n_known, len(chosen) + n_layers + 1 + n), dtype=weights.dtype)
        of_layer = (rows.layer[left, None] == np.arange(n_layers)).astype(weights.dtype)
        in_order = np.concatenate([np.argsort(visited), np.arange(len(kept.rows) - n, len(kept.rows))])
        for at in range(0, len(weights), ROWS_AT_ONCE):
            told, some = kept.rows[in_order[at : at + ROWS_AT_ONCE]], weights[at : at + ROWS_AT_ONCE]
            some[:, : len(chosen)] = told[:, chosen]
            some[:, len(chosen) : len(chosen) + n_layers] = told[:, left] @ of_layer
    latents = [rows.nodes[i] for i in np.sort(visited).tolist()]
    own = np.array([*rows.values(latents), *rows.values(logits)])
    # what the biases of attention and norms add; zero where there are none
    weights[:, len(chosen) + n_layers] = own - weights.sum(axis=1, dtype=np.float64)
    rest = [GraphNode("rest", layer) for layer in range(n_layers)]
    found = (*(rows.nodes[i] for i in chosen.tolist()), *rest, GraphNode("constant"), *logits)
    targets = np.concatenate([np.flatnonzero(rows.layer[chosen] >= 0), np.arange(len(found) - n, len(found))])
    return found, targets, weights, own

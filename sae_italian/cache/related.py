"""What stands near a latent: latents that fire on the same tokens, decoder directions, and the tokens these promote."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_italian.cache.layout import LatentRange
from sae_italian.cache.read import FeatureCache
from sae_italian.cache.transpose import places

TOP = 10  # of each kind that are listed
SAMPLE = 2048  # activations looked at, evenly spaced, of a latent that has more
ENTRIES = 2**22  # about as many entries are gathered at a time
BLOCK_BYTES = 2**27  # of a product with the decoder


def arrow(array: np.ndarray, offsets: np.ndarray | None = None) -> Any:
    """Return a column as an Arrow array: numbers, lists of equal length [rows, n], or flat lists cut at `offsets`."""
    import pyarrow as pa

    if array.ndim == 2:
        offsets = np.arange(len(array) + 1) * array.shape[1]
    if offsets is None:
        return pa.array(array)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(array.ravel()))


# --- latents that fire together --------------------------------------------------------------------------------------


def cofiring_neighbours(
    cache: FeatureCache, item: LatentRange, counts: Int[np.ndarray, " d_sae"]
) -> dict[str, np.ndarray]:
    """Return for each latent of a range the ids and Jaccard indices of the 10 latents that share most tokens with it.

    Jaccard is tokens with both / tokens with either: exact for a latent with at most SAMPLE activations, else the
    shared tokens are estimated from that many. Latents that share no token are not listed. `counts` is how often every
    latent fires; only the tokens on which a latent fires are looked at.
    """
    arrays = cache.map_file(item.file)
    indptr = arrays["indptr"].astype(np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    per_token = max(1.0, cache.manifest.nnz / max(1, cache.manifest.n_positions))
    at_once = max(1, int(ENTRIES / (SAMPLE * per_token))) * SAMPLE
    taken = [_evenly(int(a), int(b)) for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
    held = np.cumsum([0, *(len(entry) for entry in taken)])
    first = 0
    while first < len(taken):  # as many latents as together have about ENTRIES / per_token activations
        last = max(first + 1, int(np.searchsorted(held, held[first] + at_once, side="right")) - 1)
        shared = _shared(cache, [arrays["position"][entry].astype(np.int64) for entry in taken[first:last]])
        for row in range(last - first):
            here = slice(shared.indptr[row], shared.indptr[row + 1])
            latent = item.first + first + row
            scale = counts[latent] / max(1, len(taken[first + row]))
            found.append(_nearest(latent, shared.indices[here], shared.data[here] * scale, counts))
        first = last
    ids, scores = zip(*found, strict=True)
    offsets = np.cumsum([0, *(len(own) for own in ids)])
    return {
        "cofiring_ids": arrow(np.concatenate(ids).astype(np.int64), offsets),
        "cofiring_jaccard": arrow(np.concatenate(scores).astype(np.float64), offsets),
    }


def _evenly(begin: int, end: int) -> Int[np.ndarray, " n"]:
    if end - begin <= SAMPLE:
        return np.arange(begin, end)
    return begin + np.arange(SAMPLE) * (end - begin) // SAMPLE


def _shared(cache: FeatureCache, positions: list[np.ndarray]) -> csr_matrix:
    """Return [latents, d_sae]: on how many of each latent's positions every other latent fires."""
    where, row = np.unique(np.concatenate(positions), return_inverse=True)
    per_row, latents = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for shard, _, place in cache.by_shard(where):
        arrays = cache.shard_acts(shard)
        begin = arrays["indptr"][place].astype(np.int64)
        per_row.append(arrays["indptr"][place + 1].astype(np.int64) - begin)
        latents.append(arrays["latent"][places(begin, per_row[-1])].astype(np.int32))
    latent, rows = np.concatenate(latents), np.cumsum(np.concatenate(per_row))
    d_sae = cache.manifest.d_sae
    on_token = csr_matrix((np.ones(len(latent), dtype=np.int32), latent, rows), shape=(len(where), d_sae))
    pointers = np.cumsum([0, *(len(position) for position in positions)])
    ones = np.ones(len(row), dtype=np.int32)
    return csr_matrix((ones, row.astype(np.int32), pointers), shape=(len(positions), len(where))) @ on_token


def _nearest(
    latent: int, other: Int[np.ndarray, " n"], both: np.ndarray, counts: Int[np.ndarray, " d_sae"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and Jaccard indices of the nearest others, nearest first; the lower id first where two are equal."""
    both = np.minimum(both, counts[other])
    jaccard = np.where(other == latent, -1.0, both / (counts[latent] + counts[other] - both))
    n = min(TOP, len(other))
    if n == 0:
        return other, jaccard
    near = np.flatnonzero(jaccard >= np.partition(jaccard, len(jaccard) - n)[len(jaccard) - n])
    near = near[np.lexsort((other[near], -jaccard[near]))][:n]
    near = near[jaccard[near] >= 0]
    return other[near], jaccard[near]


# --- decoder directions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_columns(sae: Any, model: Any, d_sae: int) -> dict[str, Any]:
    """Return the 10 latents with the nearest decoder directions (cosines), and the tokens these raise and lower most.

    The logit lens of a direction d is W_U (gain * d), gain being the final norm's; the norm's division by the
    residual's scale is left out, so values compare within a latent, not with real logits. All lists are empty where SAE
    or model is None.
    """
    import pyarrow as pa

    if sae is None or model is None:
        kinds = {"ids": pa.int64(), "values": pa.float32(), "cosines": pa.float32()}
        names = "decoder_ids decoder_cosines promoted_ids promoted_values suppressed_ids suppressed_values"
        return {name: pa.array([[]] * d_sae, pa.list_(kinds[name.split("_")[1]])) for name in names.split()}
    lists: dict[str, list[Tensor]] = {}
    unit = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    for first, block in _blocks(unit, len(unit)):
        cosine = block @ unit.T
        cosine[torch.arange(len(block)), torch.arange(first, first + len(block))] = -2.0
        _append(lists, "decoder_ids", "decoder_cosines", cosine.topk(min(TOP, len(unit) - 1)))
    unembed: Float[Tensor, "vocab d_in"] = model.get_output_embeddings().weight.float()
    gain, n = final_gain(model), min(TOP, len(unembed))
    for _, block in _blocks(sae.W_dec.float(), len(unembed)):
        logits = (block * gain) @ unembed.T
        _append(lists, "promoted_ids", "promoted_values", logits.topk(n))
        _append(lists, "suppressed_ids", "suppressed_values", logits.topk(n, largest=False))
    return {name: arrow(torch.cat(parts).numpy()) for name, parts in lists.items()}


def _blocks(directions: Tensor, width: int) -> list[tuple[int, Tensor]]:
    """Return the directions in blocks, each with the index of its first, whose product with `width` others fits."""
    step = max(1, BLOCK_BYTES // (4 * width))
    return [(number * step, block) for number, block in enumerate(directions.split(step))]


def _append(lists: dict[str, list[Tensor]], ids: str, values: str, top: Any) -> None:
    lists.setdefault(ids, []).append(top.indices.cpu())
    lists.setdefault(values, []).append(top.values.cpu())


def final_gain(model: Any) -> Tensor | float:
    """Return the gain of the norm before the unembedding, 1 where the family keeps it elsewhere."""
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"):
        try:
            return model.get_submodule(path).weight.float()
        except AttributeError:
            continue
    return 1.0

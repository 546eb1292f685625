"""The latents that fire together, from the token-major shards: only the tokens on which a latent fires are looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_matrix

from sae_italian.cache.latent_stats import arrow
from sae_italian.cache.layout import LatentRange
from sae_italian.cache.transpose import places

N_NEIGHBOURS = 10
SAMPLE = 2048  # activations looked at, evenly spaced, of a latent that has more
ENTRIES = 2**22  # about as many entries are gathered at a time


def cofiring_neighbours(cache: Any, item: LatentRange, counts: Int[np.ndarray, " d_sae"]) -> dict[str, Any]:
    """Return for each latent of a range the ids and Jaccard indices of the 10 latents that share most tokens with it.

    Jaccard is tokens with both / tokens with either: exact for a latent with at most SAMPLE activations, else the
    shared tokens are estimated from that many. Latents that share no token are not listed.
    """
    arrays = cache.map_file(item.file)
    indptr = arrays["indptr"].astype(np.int64)
    ids: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    per_token = max(1.0, cache.manifest.nnz / max(1, cache.manifest.n_positions))
    step = max(1, int(ENTRIES / (SAMPLE * per_token)))
    taken = [_evenly(int(a), int(b)) for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
    held = np.cumsum([0, *(len(entry) for entry in taken)])
    first = 0
    while first < len(taken):  # as many latents as together have about ENTRIES / per_token activations
        last = max(first + 1, int(np.searchsorted(held, held[first] + step * SAMPLE, side="right")) - 1)
        sampled = taken[first:last]
        positions = [arrays["position"][entry].astype(np.int64) for entry in sampled]
        shared = _shared(cache, positions)
        for offset, entry in enumerate(sampled):
            row = slice(shared.indptr[offset], shared.indptr[offset + 1])
            latent = item.first + first + offset
            scale = counts[latent] / max(1, len(entry))
            found = _nearest(latent, shared.indices[row], shared.data[row] * scale, counts)
            ids.append(found[0])
            scores.append(found[1])
        first = last
    offsets = np.cumsum([0, *(len(found) for found in ids)])
    return {
        "cofiring_ids": arrow(np.concatenate(ids).astype(np.int64), offsets),
        "cofiring_jaccard": arrow(np.concatenate(scores).astype(np.float64), offsets),
    }


def _evenly(begin: int, end: int) -> Int[np.ndarray, " n"]:
    if end - begin <= SAMPLE:
        return np.arange(begin, end)
    return begin + np.arange(SAMPLE) * (end - begin) // SAMPLE


def _shared(cache: Any, positions: list[np.ndarray]) -> csr_matrix:
    """Return [latents, d_sae]: on how many of each latent's positions every other latent fires."""
    where, row = np.unique(np.concatenate(positions), return_inverse=True)
    per_row, latents = [], []
    for shard, _, place in cache.by_shard(where):
        arrays = cache.shard_acts(shard)
        begin = arrays["indptr"][place].astype(np.int64)
        number = arrays["indptr"][place + 1].astype(np.int64) - begin
        latents.append(arrays["latent"][places(begin, number)].astype(np.int32))
        per_row.append(number)
    nothing = np.empty(0, dtype=np.int32)
    latent = np.concatenate([nothing, *latents])
    rows = np.cumsum(np.concatenate([[0], *per_row])).astype(np.int64)
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
    n = min(N_NEIGHBOURS, len(other))
    if n == 0:
        return other, jaccard
    near = np.flatnonzero(jaccard >= np.partition(jaccard, len(jaccard) - n)[len(jaccard) - n])
    near = near[np.lexsort((other[near], -jaccard[near]))][:n]
    near = near[jaccard[near] >= 0]
    return other[near], jaccard[near]

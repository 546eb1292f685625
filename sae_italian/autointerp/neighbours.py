"""The latents nearest to a latent: those that fire on the same tokens, and those whose decoder direction is close."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from sae_italian.base.errors import DataError
from sae_italian.cache import FeatureCache
from sae_italian.cache.layout import shard_file

N_NEIGHBOURS = 5
_COLUMNS = {  # of the cache's table of statistics
    "cofiring": ("cofiring_neighbours", "cofiring_ids"),
    "decoder": ("decoder_neighbours", "decoder_ids"),
}
SAMPLE = 100_000  # tokens on which firing together is counted


@dataclass
class Neighbours:
    """By latent, the nearest others, nearest first; a latent without any in one sense is missing there."""

    cofiring: dict[int, Int[np.ndarray, " k"]] = field(default_factory=dict)
    decoder: dict[int, Int[np.ndarray, " k"]] = field(default_factory=dict)


def find_neighbours(cache: FeatureCache, latents: Sequence[int], sae: Any = None, n: int = N_NEIGHBOURS) -> Neighbours:
    """Return the neighbours of some latents: from the cache's table where it has them, else computed.

    Without the table the decoder's come from `sae`; when that is None too, there are none.
    """
    found = Neighbours()
    for name, columns in _COLUMNS.items():
        column = next((column for column in columns if column in cache.statistics), None)
        if column is not None:
            rows = cache.statistics[column]
            setattr(found, name, _nonempty({latent: np.asarray(rows[latent])[:n] for latent in latents}))
    if not found.cofiring:
        found.cofiring = cofiring(cache, latents, n)
    if not found.decoder and sae is not None:
        found.decoder = decoder(sae.W_dec, latents, n)
    return found


def cofiring(cache: FeatureCache, latents: Sequence[int], n: int = N_NEIGHBOURS) -> dict[int, Int[np.ndarray, " k"]]:
    """Return the latents of largest Jaccard index with each: tokens on which both fire, over tokens on which either does."""
    acts = _token_major(cache)
    if acts is None or len(latents) == 0:
        return {}
    chosen = np.asarray(latents)
    together = scipy.sparse.csr_array(acts[:, chosen].T @ acts)
    count = np.asarray(acts.sum(axis=0)).ravel()
    rows = {}
    for row, latent in enumerate(chosen.tolist()):
        here = slice(together.indptr[row], together.indptr[row + 1])
        other, both = together.indices[here], together.data[here]
        other, both = other[other != latent], both[other != latent]
        jaccard = both / (count[latent] + count[other] - both)
        rows[latent] = other[np.argsort(-jaccard, kind="stable")[:n]].astype(np.int64)
    return _nonempty(rows)


def decoder(w_dec: torch.Tensor, latents: Sequence[int], n: int = N_NEIGHBOURS) -> dict[int, Int[np.ndarray, " k"]]:
    """Return the latents of largest cosine between decoder rows, w_dec [d_sae, d_in]."""
    directions = torch.nn.functional.normalize(w_dec.detach().float(), dim=-1)
    rows = {}
    n = min(n, len(directions) - 1)
    for block in torch.as_tensor(list(latents), dtype=torch.int64).split(1024):
        cosine = directions[block] @ directions.T
        cosine[torch.arange(len(block)), block] = -2.0
        nearest = cosine.topk(n, dim=-1).indices.cpu().numpy()
        rows |= dict(zip(block.tolist(), nearest, strict=True))
    return _nonempty(rows)


def _token_major(cache: FeatureCache) -> scipy.sparse.csr_array | None:
    """Return the first shards' firings, SAMPLE tokens of them, as a 0/1 matrix [tokens, d_sae]; None without the files."""
    parts, n = [], 0
    for shard in cache.manifest.shards:
        file = cache.folder / shard_file("acts", shard.index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="numpy") as handle:
                indptr, latent = (handle.get_tensor(name).astype(np.int64) for name in ("indptr", "latent"))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} cannot be read ({error}). Build the cache again.") from error
        rows = min(len(indptr) - 1, SAMPLE - n)
        latent = latent[: indptr[rows]]
        shape = (rows, cache.manifest.d_sae)
        parts.append(
            scipy.sparse.csr_array((np.ones(len(latent), dtype=np.float32), latent, indptr[: rows + 1]), shape=shape)
        )
        n += rows
        if n >= SAMPLE:
            break
    return scipy.sparse.csr_array(scipy.sparse.vstack(parts)) if parts else None


def _nonempty(rows: dict[int, np.ndarray]) -> dict[int, Int[np.ndarray, " k"]]:
    return {latent: others.astype(np.int64) for latent, others in rows.items() if len(others)}

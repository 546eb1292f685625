"""The latents nearest to a latent: those that fire on the same tokens, and those whose decoder direction is close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae_italian.cache import FeatureCache

N_NEIGHBOURS = 5
_BLOCK = 1024  # latents whose cosines with all others are worked out at once


class Neighbours(NamedTuple):
    """By latent, the nearest others, nearest first; a latent without any in one sense is missing there."""

    cofiring: Mapping[int, Int[np.ndarray, " k"]] = {}
    decoder: Mapping[int, Int[np.ndarray, " k"]] = {}


def find_neighbours(cache: FeatureCache, latents: Sequence[int], sae: Any = None) -> Neighbours:
    """Return the neighbours of some latents, from the cache's table of statistics.

    A cache that was made without its SAE knows no directions; the decoder's neighbours then come from `sae`.
    """
    cofiring, near = (cache.statistics[name] for name in ("cofiring_ids", "decoder_ids"))
    if sae is not None and not any(len(own) for own in near):
        near = nearest_directions(sae.W_dec, latents)
    return Neighbours(*({n: _few(rows[n]) for n in latents if len(rows[n])} for rows in (cofiring, near)))


def nearest_directions(w_dec: Tensor, latents: Sequence[int]) -> dict[int, list[int]]:
    """Return for some latents the others of largest cosine between decoder rows, w_dec [d_sae, d_in]."""
    directions = torch.nn.functional.normalize(w_dec.detach().float(), dim=-1)
    rows: dict[int, list[int]] = {}
    for block in torch.as_tensor(list(latents), dtype=torch.int64).split(_BLOCK):
        cosine = directions[block] @ directions.T
        cosine[torch.arange(len(block)), block] = -2.0
        nearest = cosine.topk(min(N_NEIGHBOURS, len(directions) - 1), dim=-1).indices
        rows |= dict(zip(block.tolist(), nearest.tolist(), strict=True))
    return rows


def _few(ids: Any) -> Int[np.ndarray, " k"]:
    return np.asarray(ids, dtype=np.int64)[:N_NEIGHBOURS]

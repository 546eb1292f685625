"""What the page needs of the decoder itself: each latent's logits over the whole vocabulary, and a map of directions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae_italian.analysis.geometry.directions import map_of, nearest_directions
from sae_italian.base.errors import UsageError
from sae_italian.browser.schema import Record
from sae_italian.cache.stats import final_gain

BINS = 40
BLOCK = 64  # latents whose logits are counted at a time


class Decoder:
    """The decoder of an SAE, with the unembedding of its model where that is at hand."""

    def __init__(self, sae: Any, model: Any = None):
        self.directions: Float[torch.Tensor, "d_sae d_in"] = sae.W_dec.detach().float().cpu()
        self.unembed = None if model is None else model.get_output_embeddings().weight.detach().float().cpu()
        self.gain = 1.0 if model is None else torch.as_tensor(final_gain(model)).detach().cpu()
        self._block = lru_cache(4)(self._histograms)

    def logits(self, latent: int) -> Record:
        """Return the histogram of the logits that a latent adds, in 40 equal bins; empty without the model."""
        if self.unembed is None:
            return {"edges": [], "counts": []}
        edges, counts = self._block(latent // BLOCK)
        return {"edges": edges[latent % BLOCK], "counts": counts[latent % BLOCK]}

    @torch.no_grad()
    def _histograms(self, block: int) -> tuple[list[list[float]], list[list[int]]]:
        assert self.unembed is not None
        rows = self.directions[block * BLOCK : (block + 1) * BLOCK]
        logits = (rows * self.gain) @ self.unembed.T
        lo, hi = logits.min(dim=1, keepdim=True).values, logits.max(dim=1, keepdim=True).values
        width = (hi - lo).clamp_min(1e-12)
        index = ((logits - lo) * (BINS / width)).to(torch.int32).clamp_(0, BINS - 1)
        index += BINS * torch.arange(len(rows), dtype=torch.int32)[:, None]
        counts = torch.bincount(index.flatten(), minlength=len(rows) * BINS).reshape(-1, BINS)
        return (lo + width * torch.arange(BINS + 1) / BINS).tolist(), counts.tolist()

    @torch.no_grad()
    def plane(self) -> Float[np.ndarray, "d_sae 2"]:
        """Return the latents' map (`analysis.geometry`), each axis within -1 and 1."""
        plane = map_of(torch.nn.functional.normalize(self.directions, dim=1))
        return plane / np.abs(plane).max(axis=0).clip(min=1e-12)

    @torch.no_grad()
    def matches(self, other: Decoder) -> tuple[np.ndarray, np.ndarray]:
        """Return for each direction the index of the nearest one of the other decoder, and their cosine.

        Raises: UsageError when the two decoders do not write into spaces of the same size.
        """
        ours, theirs = (torch.nn.functional.normalize(d.directions, dim=1) for d in (self, other))
        if ours.shape[1] != theirs.shape[1]:
            raise UsageError(
                f"the SAEs write {ours.shape[1]} and {theirs.shape[1]} numbers: only SAEs of one model can be compared."
            )
        found = nearest_directions(ours, theirs)
        return found.index, found.cosine

"""What is read off an SAE's decoder and its model: what a latent adds to the logits, and a map of the latents."""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae_italian.analysis.directions import map_of
from sae_italian.browser.page import Record
from sae_italian.models.activations import logit_lens

BINS, BLOCK = 40, 64  # of the page's histogram; latents whose logits are made at a time


def rounded(value: Any, digits: int = 6) -> Any:
    """Return a fraction with that many significant digits, those in a list, a dict or an array too; the rest as it is.

    A file of millions of them is a third of the size.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [float(f"{x:.{digits}g}") if type(x) is float else rounded(x, digits) for x in value]
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


class Decoder:
    """The decoder of an SAE, with the unembedding of its model where that is at hand."""

    def __init__(self, sae: Any, model: Any = None):
        self.directions: Float[torch.Tensor, "d_sae d_in"] = sae.W_dec.detach().float().cpu()
        self.units = torch.nn.functional.normalize(self.directions, dim=1)
        self.lens: Any = None if model is None else logit_lens(model)
        self._block = lru_cache(1)(self._logits)

    @torch.no_grad()
    def _logits(self, block: int) -> Float[torch.Tensor, "latents vocab"]:
        return self.lens(self.directions[block * BLOCK : (block + 1) * BLOCK]).cpu()

    def logits(self, latent: int) -> Float[torch.Tensor, " vocab"]:
        """Return what a latent adds to every token's logit; nothing without the model."""
        return torch.empty(0) if self.lens is None else self._block(latent // BLOCK)[latent % BLOCK]

    def histogram(self, latent: int) -> Record:
        """Return the histogram of these logits, in 40 equal bins; empty without the model."""
        logits = self.logits(latent)
        if len(logits) == 0:
            return {"edges": [], "counts": []}
        edges = torch.linspace(logits.min(), logits.max(), BINS + 1)
        return {"edges": edges.tolist(), "counts": torch.histc(logits, BINS).int().tolist()}

    @cached_property
    def plane(self) -> Float[np.ndarray, "d_sae 2"]:
        """The latents' map (`analysis.geometry`), each axis within -1 and 1."""
        plane = map_of(self.units)
        return plane / np.abs(plane).max(axis=0).clip(min=1e-12)

"""What is read off an SAE's decoder and its model: logits, a map, and the neighbours that Neuronpedia shows."""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_matrix, csr_matrix

from sae_italian.analysis.directions import map_of
from sae_italian.browser.page import Record
from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import logit_lens, read_activations

BINS, BLOCK = 40, 64  # of the page's histogram; latents whose logits are made at a time
N_BARS, N_TABLE = 50, 3  # Neuronpedia's
SAMPLE_TOKENS = 32_768
SAMPLE_FLOATS = 2**26  # of the model's activations held in memory
FORWARD_WINDOWS = 16


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


def bars(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return centres and heights of 50 equal bars over the values' range; none when there are no values."""
    if len(values) == 0:
        return [], []
    heights, edges = np.histogram(values.astype(np.float64), bins=N_BARS)
    return rounded((edges[:-1] + edges[1:]) / 2), rounded(heights.astype(np.float64))


Neighbours = tuple[Any, Any, Any]
"""Those of Neuronpedia: their ids, what it calls L1, and its second number; the nearest first."""
NONE: Neighbours = [], [], []


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
        lo, hi = logits.min(), logits.max()
        width = (hi - lo).clamp_min(1e-12)
        index = ((logits - lo) * (BINS / width)).to(torch.int32).clamp_(0, BINS - 1)
        edges = lo + width * torch.arange(BINS + 1) / BINS
        return {"edges": edges.tolist(), "counts": torch.bincount(index, minlength=BINS).tolist()}

    def alignment(self, latent: int) -> Neighbours:
        """Return the dimensions with the largest decoder weights: the weight's share of the L1 norm, and the weight."""
        direction = self.directions[latent]
        value, index = direction.topk(min(N_TABLE, len(direction)))
        return index.numpy(), (value / direction.abs().sum()).numpy(), value.numpy()

    @cached_property
    def plane(self) -> Float[np.ndarray, "d_sae 2"]:
        """The latents' map (`analysis.geometry`), each axis within -1 and 1."""
        plane = map_of(self.units)
        return plane / np.abs(plane).max(axis=0).clip(min=1e-12)


class Correlations:
    """What goes with a latent of a cache: other latents, over the whole cache; neurons of the model, on a sample."""

    def __init__(self, cache: FeatureCache, model: Any = None):
        self.cache, self.model = cache, model
        count, density = cache.statistics["count"], cache.statistics["density"]
        most = int(np.argmax(count))
        # what densities are shares of: the tokens of documents, not the special ones
        self.n_tokens = round(float(count[most]) / float(density[most])) if count[most] else cache.n_positions

    def latents(self, latent: int) -> Neighbours:
        """Return the latents that go with this one, with cosine and Pearson over the whole cache.

        Candidates are the latents that fire on most of the same tokens, of all latents: not those of one batch.
        """
        position, value = self.cache.latent(latent)
        others, products = self.cache.statistics["cofiring_ids"][latent], []
        for other in others.tolist():
            their_position, theirs = self.cache.latent(other)
            _, mine, same = np.intersect1d(position, their_position, assume_unique=True, return_indices=True)
            theirs = theirs.astype(np.float64)
            products.append((value[mine].astype(np.float64) @ theirs[same], theirs.sum(), theirs @ theirs))
        cross, sums, squares = np.array(products).reshape(-1, 3).T
        return _alike(value, cross, sums, squares, self.n_tokens, others)

    def neurons(self, latent: int) -> Neighbours:
        """Return the dimensions of the model's activation that go with the latent, with cosine and Pearson.

        There are none without the model, nor for a latent that is silent on the sample.
        """
        if self.model is None:
            return NONE
        x, sums, squares, acts = self._sample
        column = acts[:, latent]
        if column.nnz == 0:
            return NONE
        cross = column.data.astype(np.float64) @ x[column.indices]
        return _alike(column.data, cross, sums, squares, len(x), np.arange(x.shape[1]))

    @cached_property
    def _sample(self) -> tuple[Float[np.ndarray, "n d_in"], np.ndarray, np.ndarray, csc_matrix]:
        """The model's activations on the cache's first windows, their sums and the cache's latents there."""
        manifest = self.cache.manifest
        most = min(SAMPLE_TOKENS, SAMPLE_FLOATS // manifest.d_in) // manifest.context_size
        n_windows = max(1, min(most, manifest.shards[0].n_windows))
        n = n_windows * manifest.context_size
        arrays, acts = self.cache.shard_tokens(0), self.cache.shard_acts(0)
        tokens = torch.from_numpy(arrays["tokens"][:n].astype(np.int64)).reshape(n_windows, -1).to(self.model.device)
        counted = arrays["doc"][:n] != NO_DOCUMENT
        parts = [read_activations(self.model, part, manifest.hook_name) for part in tokens.split(FORWARD_WINDOWS)]
        x = torch.cat(parts).flatten(0, 1).float().cpu().numpy()[counted]
        indptr = acts["indptr"][: n + 1].astype(np.int64)
        here = slice(0, int(indptr[-1]))
        values = acts["value"][here].astype(np.float32), acts["latent"][here].astype(np.int32), indptr
        latents = csr_matrix(values, shape=(n, manifest.d_sae))[counted].tocsc()
        return x, x.sum(axis=0, dtype=np.float64), np.einsum("ij,ij->j", x, x).astype(np.float64), latents


def _alike(
    value: np.ndarray, cross: np.ndarray, sums: np.ndarray, squares: np.ndarray, n: int, ids: np.ndarray
) -> Neighbours:
    """Return ids, cosines and Pearson correlations of what goes best with a latent of these activations over n tokens.

    Of each candidate are given the sum of its products with the latent, of its values and of their squares; where a
    correlation is not defined it is 0.
    """
    value = value.astype(np.float64)
    total, square = value.sum(), value @ value
    length, spread = square * squares, (square - total**2 / n) * (squares - sums**2 / n)
    cosine = cross / np.sqrt(np.where(length > 0, length, np.inf))
    pearson = (cross - total * sums / n) / np.sqrt(np.where(spread > 0, spread, np.inf))
    best = np.lexsort((ids, -pearson))[:N_TABLE]
    return ids[best], cosine[best], pearson[best]

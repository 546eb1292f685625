"""What is read off the SAE's weights and a sample of the model's activations: logits, alignment and correlations."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from sae_italian.cache import FeatureCache
from sae_italian.cache.stats import final_gain
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import read_activations

N_BARS, N_TABLE = 50, 3
SAMPLE_TOKENS = 32_768
SAMPLE_FLOATS = 2**26  # of the model's activations held in memory
FORWARD_WINDOWS = 16


class NeuronTable(NamedTuple):
    """Three of Neuronpedia's neighbours: their ids, what it calls L1, and its second number."""

    indices: list[int] = []
    l1: list[float] = []
    other: list[float] = []


def histogram(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return centres and heights of 50 equal bars over the values' range; none when there are no values."""
    if len(values) == 0:
        return [], []
    heights, edges = np.histogram(values.astype(np.float64), bins=N_BARS)
    return [rounded(value) for value in (edges[:-1] + edges[1:]) / 2], [rounded(value) for value in heights]


def rounded(value: float, digits: int = 6) -> float:
    """Return a number with that many significant digits: a file of millions of them is a third of the size."""
    return float(f"{float(value):.{digits}g}")


def counted_tokens(cache: FeatureCache) -> int:
    """Return how many tokens the densities of a cache are shares of: those of documents, not the special ones."""
    count, density = cache.statistics["count"], cache.statistics["density"]
    most = int(np.argmax(count))
    return round(float(count[most]) / float(density[most])) if count[most] else cache.n_positions


class DecoderSide:
    """The decoder's side of a cache's latents. `sae` and `model` may be absent: then it answers with nothing."""

    def __init__(self, cache: FeatureCache, sae: Any = None, model: Any = None):
        self.cache, self.sae, self.model = cache, sae, model
        self.n_tokens = counted_tokens(cache)

    @torch.no_grad()
    def logits(self, latent: int) -> tuple[list[float], list[float]]:
        """Return the histogram of the logits that the direction adds to the vocabulary (as `cache.stats.decoder_columns`)."""
        if self.sae is None or self.model is None:
            return [], []
        unembed: Float[Tensor, "vocab d_in"] = self.model.get_output_embeddings().weight.float()
        logits = unembed @ (self.sae.W_dec[latent].float() * final_gain(self.model))
        return histogram(logits.cpu().numpy())

    @torch.no_grad()
    def alignment(self, latent: int) -> NeuronTable:
        """Return the dimensions with the largest decoder weights: the weight, and its share of the L1 norm."""
        if self.sae is None:
            return NeuronTable()
        direction = self.sae.W_dec[latent].float()
        value, index = direction.topk(min(N_TABLE, len(direction)))
        return NeuronTable(index.tolist(), (value / direction.abs().sum()).tolist(), value.tolist())

    @cached_property
    def _sample(self) -> _Sample:
        return _Sample(self.cache, self.model)

    def correlated_neurons(self, latent: int) -> NeuronTable:
        """Return the dimensions of the activation that go with the latent, with cosine and Pearson, on a sample."""
        return NeuronTable() if self.sae is None or self.model is None else self._sample.correlated(latent)

    def correlated_latents(self, latent: int) -> NeuronTable:
        """Return the latents that go with this one, with cosine and Pearson over the whole cache.

        Candidates are the latents that fire on most of the same tokens, of all latents: not those of one batch.
        """
        position, value = self.cache.latent(latent)
        found = []
        for other in self.cache.statistics["cofiring_ids"][latent].tolist():
            their_position, their_value = self.cache.latent(other)
            _, mine, theirs = np.intersect1d(position, their_position, assume_unique=True, return_indices=True)
            cross = float(value[mine].astype(np.float64) @ their_value[theirs].astype(np.float64))
            found.append((*_similar(cross, _sums(value), _sums(their_value), self.n_tokens), other))
        best = sorted(found, key=lambda row: (-row[1], row[2]))[:N_TABLE]
        return NeuronTable([row[2] for row in best], [row[0] for row in best], [row[1] for row in best])


def _sums(value: np.ndarray) -> tuple[float, float]:
    wide = value.astype(np.float64)
    return float(wide.sum()), float(wide @ wide)


def _similar(cross: float, one: tuple[float, float], two: tuple[float, float], n: int) -> tuple[float, float]:
    """Return cosine and Pearson correlation from the sums of products, of values and of squares; 0 where undefined."""
    spread = (one[1] - one[0] ** 2 / n) * (two[1] - two[0] ** 2 / n)
    cosine = cross / np.sqrt(one[1] * two[1]) if one[1] * two[1] > 0 else 0.0
    return float(cosine), float((cross - one[0] * two[0] / n) / np.sqrt(spread)) if spread > 0 else 0.0


class _Sample:
    """The model's activations and the cache's latents on its first windows, special tokens left out."""

    def __init__(self, cache: FeatureCache, model: Any):
        manifest = cache.manifest
        n = min(SAMPLE_TOKENS, SAMPLE_FLOATS // manifest.d_in, manifest.shards[0].n_windows * manifest.context_size)
        n_windows = max(1, n // manifest.context_size)
        n = n_windows * manifest.context_size
        arrays = cache.shard_tokens(0)
        tokens = arrays["tokens"][:n].astype(np.int64).reshape(n_windows, -1)
        counted = arrays["doc"][:n] != NO_DOCUMENT
        self.n = int(counted.sum())
        parts = [
            read_activations(model, torch.from_numpy(part).to(model.device), manifest.hook_name).flatten(0, 1)
            for part in np.array_split(tokens, -(-n_windows // FORWARD_WINDOWS))
        ]
        self.x: Float[np.ndarray, "n d_in"] = torch.cat(parts).float().cpu().numpy()[counted]
        acts = cache.shard_acts(0)
        indptr = acts["indptr"][: n + 1].astype(np.int64)
        here = slice(0, int(indptr[-1]))
        value, latent = acts["value"][here].astype(np.float32), acts["latent"][here].astype(np.int32)
        self.f: csc_matrix = csr_matrix((value, latent, indptr), shape=(n, manifest.d_sae))[counted].tocsc()
        self.sum, self.squares = self.x.sum(axis=0, dtype=np.float64), np.einsum("ij,ij->j", self.x, self.x)

    def correlated(self, latent: int) -> NeuronTable:
        column = slice(self.f.indptr[latent], self.f.indptr[latent + 1])
        row, value = self.f.indices[column], self.f.data[column].astype(np.float64)
        if len(value) == 0:
            return NeuronTable()
        cross = value @ self.x[row]
        total, square = _sums(value)
        spread = (square - total**2 / self.n) * (self.squares - self.sum**2 / self.n)
        pearson = (cross - total * self.sum / self.n) / np.sqrt(np.maximum(spread, 1e-30))
        cosine = cross / np.sqrt(np.maximum(square * self.squares, 1e-30))
        best = np.argsort(-pearson, kind="stable")[:N_TABLE]
        return NeuronTable(best.tolist(), cosine[best].tolist(), pearson[best].tolist())

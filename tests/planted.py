"""Caches whose latents are planted: the tokens of a real cache, activations of our choosing."""

from __future__ import annotations

import shutil
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array

from sae_italian.analysis.labels import GoldWords
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.cache.build import transpose
from sae_italian.cache.shards import write_activations
from sae_italian.cache.stats import write_statistics


def planted_cache(
    base: FeatureCache, folder: Path, positions: Sequence[np.ndarray], model, values: Sequence[np.ndarray] | None = None
) -> FeatureCache:
    """Write a cache over the tokens of `base` in which latent i fires exactly at `positions[i]`."""
    manifest = Manifest(
        **{**base.manifest.model_dump(), "d_sae": len(positions), "ranges": [], "k": None, "complete": True}
    )
    shutil.copytree(base.folder / "tokens", folder / "tokens")
    (folder / "acts").mkdir()
    position = np.concatenate(positions)
    latent = np.repeat(np.arange(len(positions)), [len(p) for p in positions])
    value = np.concatenate(values) if values is not None else np.ones(len(position))
    acts = csr_array((value.astype(np.float32), (position, latent)), (base.n_positions, len(positions)))
    size = manifest.windows_per_shard * manifest.context_size
    manifest.shards = [
        write_activations(folder, shard, acts[shard.index * size : (shard.index + 1) * size])
        for shard in manifest.shards
    ]
    transpose(folder, manifest)
    sae = types.SimpleNamespace(W_dec=torch.randn(len(positions), model.config.hidden_size))
    write_statistics(folder, manifest, sae, model)
    manifest.save(folder)
    return FeatureCache.open(folder, check=True)


def gold_positions(base: FeatureCache, categories: Sequence[str], least: int = 200) -> dict[str, np.ndarray]:
    """Return by gold label of MicroItaliano the positions of the last token of every word that bears it."""
    words = GoldWords(base)
    labels = words.labels.tocsc()
    last = np.flatnonzero(np.append(words.word_of_position[1:] != words.word_of_position[:-1], True))
    last = last[words.word_of_position[last] >= 0]
    word = words.word_of_position[last]
    found = {}
    for (category, label), column in words.names.items():
        if category in categories:
            bearing = labels.indices[labels.indptr[column] : labels.indptr[column + 1]]
            positions = last[np.isin(word, bearing)]
            if least <= len(positions) <= len(last) // 3:
                found[label] = positions
    return found


def noisy(positions: np.ndarray, counted: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return the positions with a share of them left out and as many others put in."""
    kept = rng.permutation(positions)[round(share * len(positions)) :]
    others = np.setdiff1d(counted, positions)
    return np.sort(np.concatenate([kept, rng.choice(others, len(positions) - len(kept), replace=False)]))

"""Caches whose latents are planted: the tokens of a real cache, activations of our choosing."""

from __future__ import annotations

import shutil
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_italian.cache import FeatureCache, Manifest
from sae_italian.cache.build import _transpose
from sae_italian.cache.layout import acts_file
from sae_italian.cache.stats import write_statistics
from sae_italian.storage import sha256_file


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
    order = np.lexsort((latent, position))
    position, latent, value = position[order], latent[order], value[order]
    first = 0
    for shard in manifest.shards:
        n = shard.n_windows * manifest.context_size
        here = (position >= first) & (position < first + n)
        counts = np.bincount(position[here] - first, minlength=n)
        arrays = {
            "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
            "latent": latent[here].astype(np.uint16),
            "value": value[here].astype(np.float16),
        }
        save_file(arrays, folder / acts_file(shard.index))
        shard.nnz = int(here.sum())
        shard.sha256[acts_file(shard.index)] = sha256_file(folder / acts_file(shard.index))
        first += n
    _transpose(folder, manifest)
    sae = types.SimpleNamespace(W_dec=torch.randn(len(positions), model.config.hidden_size))
    write_statistics(folder, manifest, sae, model)
    manifest.save(folder)
    return FeatureCache.open(folder, check=True)

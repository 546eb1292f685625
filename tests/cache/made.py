"""Small caches made without a model: any tokens, documents and activations, in the real layout."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array

from sae_italian.cache import FeatureCache, Manifest
from sae_italian.cache.build import transpose
from sae_italian.cache.shards import write_activations, write_token_shard
from sae_italian.cache.stats import write_statistics
from sae_italian.corpora import PackedBlock, TextDocument
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.bench.synthetic_cache import _Model

VOCABULARY, D_IN = 7, 5


def made_cache(folder: Path, acts: np.ndarray, doc: np.ndarray, tokens: np.ndarray, per_shard: int) -> FeatureCache:
    """Write a cache of `acts` [windows, context, d_sae] over `tokens` and `doc` [windows, context], and open it."""
    n, context, d_sae = acts.shape
    manifest = Manifest(
        model="made", sae="made", sae_hash="", tokenizer_hash="", hook_name="h", d_in=D_IN, d_sae=d_sae, k=None,
        corpus="made", text_column="text", split="all", n_tokens_asked=n * context, context_size=context,
        windows_per_shard=per_shard, versions={}, tokens_complete=True, complete=True,
    )  # fmt: skip
    seen = 0
    for index, first in enumerate(range(0, n, per_shard)):
        here = slice(first, first + per_shard)
        known = doc[here][doc[here] != NO_DOCUMENT]
        last = int(known.max(initial=seen - 1)) + 1
        documents = [TextDocument("abcdefg" * context * n, str(i), "made") for i in range(seen, last)]
        start = np.cumsum(np.ones_like(tokens[here]), axis=1) - 1
        block = PackedBlock(tokens[here], doc[here], start, start + 1, documents, seen)
        seen = last
        shard = write_token_shard(folder, index, block)
        flat = acts[here].reshape(-1, d_sae).astype(np.float32)
        manifest.shards.append(write_activations(folder, shard, csr_array(flat)))
    transpose(folder, manifest)
    torch.manual_seed(0)
    sae = types.SimpleNamespace(W_dec=torch.randn(d_sae, D_IN))
    write_statistics(folder, manifest, sae, _Model(types.SimpleNamespace(weight=torch.randn(VOCABULARY, D_IN))))
    manifest.save(folder)
    return FeatureCache.open(folder, check=True)

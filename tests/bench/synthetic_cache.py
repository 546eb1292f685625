"""A feature cache of any size with the real layout and made-up activations, to measure reading and statistics on."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from sae_italian.cache.build import transpose
from sae_italian.cache.layout import Manifest
from sae_italian.cache.shards import write_activations, write_token_shard
from sae_italian.corpora import PackedBlock, TextDocument
from sae_italian.corpora.packing import NO_DOCUMENT

VOCABULARY = 4096
LETTERS = 5  # of every word, with its space
CONTEXT = 128
WINDOWS_PER_SHARD = 512


def write_synthetic(
    folder: Path, *, n_non_zeros: int, d_sae: int, per_token: int = 16, d_in: int = 256, seed: int = 0
) -> tuple[Manifest, Any, Any]:
    """Write the token shards, activations and latent-major files; return the manifest and stand-ins for SAE and model.

    Words and latents are drawn with frequencies like 1 / rank^0.8, one document a window, so the densities of latents
    span about four powers of ten. Statistics are not written.
    """
    n_windows = max(1, round(n_non_zeros / (per_token * (CONTEXT - 1))))
    manifest = Manifest(
        model="synthetic", sae="synthetic", sae_hash="", tokenizer_hash="", hook_name="blocks.0.hook_resid_post",
        d_in=d_in, d_sae=d_sae, k=per_token, corpus="synthetic", text_column="text", split="all",
        n_tokens_asked=n_windows * CONTEXT, context_size=CONTEXT, windows_per_shard=WINDOWS_PER_SHARD, versions={},
        tokens_complete=True,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    for index, first in enumerate(range(0, n_windows, WINDOWS_PER_SHARD)):
        block = _block(rng, first, min(WINDOWS_PER_SHARD, n_windows - first))
        shard = write_token_shard(folder, index, block)
        acts = _activations(rng, block.doc.ravel(), d_sae, per_token)
        manifest.shards.append(write_activations(folder, shard, acts))
    transpose(folder, manifest)
    return manifest, *_stand_ins(d_sae, d_in, seed)


def _stand_ins(d_sae: int, d_in: int, seed: int) -> tuple[Any, Any]:
    """Return what stands in for the SAE and the model: random directions."""
    generator = torch.Generator().manual_seed(seed)
    sae = types.SimpleNamespace(W_dec=torch.randn(d_sae, d_in, generator=generator))
    unembed = types.SimpleNamespace(weight=torch.randn(VOCABULARY, d_in, generator=generator))
    return sae, _Model(unembed)


class _Model:
    """A model of Mistral's family whose last norm changes nothing."""

    def __init__(self, unembed: Any):
        from transformers import MistralConfig

        self._unembed = unembed
        self.config = MistralConfig(architectures=["MistralForCausalLM"])

    def get_output_embeddings(self) -> Any:
        return self._unembed

    def get_submodule(self, _path: str) -> Any:
        return torch.nn.RMSNorm(self._unembed.weight.shape[1], eps=1e-6)


def _ranks(rng: np.random.Generator, n: int, size: tuple[int, ...]) -> np.ndarray:
    """Return draws from 0 to n - 1 with probability falling like 1 / rank^0.8."""
    return np.minimum((rng.random(size, dtype=np.float32) ** 5 * n).astype(np.int32), n - 1)


def _block(rng: np.random.Generator, first: int, n: int) -> PackedBlock:
    tokens = _ranks(rng, VOCABULARY - 1, (n, CONTEXT)).astype(np.int64) + 1
    tokens[:, 0] = 0
    doc = np.repeat(np.arange(first, first + n)[:, None], CONTEXT, axis=1)
    doc[:, 0] = NO_DOCUMENT
    start = np.broadcast_to((np.arange(CONTEXT) - 1).clip(min=0) * LETTERS, (n, CONTEXT)).copy()
    texts = ["".join(f"{token:04d} " for token in row) for row in tokens[:, 1:].tolist()]
    documents = [TextDocument(text, str(first + i), "synthetic") for i, text in enumerate(texts)]
    end = start + LETTERS
    end[:, 0] = 0
    return PackedBlock(tokens, doc, start, end, documents, first)


def _activations(rng: np.random.Generator, doc: np.ndarray, d_sae: int, per_token: int) -> csr_array:
    latents = np.sort(_ranks(rng, d_sae, (len(doc), per_token)), axis=1)
    keep = np.diff(latents, prepend=-1, axis=1) != 0
    keep[doc == NO_DOCUMENT] = False
    value = rng.gamma(2.0, 1.0, int(keep.sum())).astype(np.float32)
    begins = np.append(0, np.cumsum(keep.sum(axis=1)))
    return csr_array((value + np.float32(0.01), latents[keep], begins), (len(doc), d_sae))


def write_explained(folder: Path, *, d_sae: int, n_non_zeros: int) -> None:
    """Write a finished synthetic cache in which every latent is explained and scored."""
    from sae_italian.autointerp.run import EXPLAINER, LOOKUP, STORE_FILE
    from sae_italian.autointerp.store import Explanation, Store
    from sae_italian.cache.stats import write_statistics

    manifest, sae, model = write_synthetic(folder, n_non_zeros=n_non_zeros, d_sae=d_sae)
    write_statistics(folder, manifest, sae, model)
    manifest.complete = True
    manifest.save(folder)
    rng = np.random.default_rng(0)
    rule = {"family": "token", "threshold": 0.5, "precision": 0.9, "recall": 0.8, "shown": ["0001", "0002"]}
    numbers = rng.integers(VOCABULARY, size=(d_sae, 6))
    texts = ["su " + ", ".join(f"«{number:04d}»" for number in row) + " (93 % dell'attivazione)" for row in numbers]
    with Store(folder / STORE_FILE, {}) as store:
        for name in (EXPLAINER, LOOKUP):
            store.add_explanations(Explanation(i, name, "ok", text, text, rule) for i, text in enumerate(texts))
            ids = {latent: found.id for latent, found in store.explanations(name).items()}
            scores = rng.uniform(0.5, 1.0, size=(d_sae, 2)).round(3).tolist()
            kinds = (("detection", "random"), ("fuzzing", "same-token"))
            store.add_scores(
                (
                    ids[i],
                    i,
                    "",
                    scorer,
                    "rule",
                    negatives,
                    "balanced_accuracy",
                    value,
                    value - 0.1,
                    value + 0.1,
                    50,
                    50,
                    0,
                )
                for i, row in enumerate(scores)
                for (scorer, negatives), value in zip(kinds, row, strict=True)
            )


def explained_source(folder: Path, d_sae: int) -> Any:
    """Return the browser's source of a cache that `write_explained` wrote."""
    from sae_italian.browser.source import LatentSource
    from sae_italian.cache.read import FeatureCache

    cache = FeatureCache.open(folder)
    sae, model = _stand_ins(d_sae, cache.manifest.d_in, 0)
    return LatentSource(cache, _tokenizer(), sae=sae, model=model)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"{i:04d}": i for i in range(VOCABULARY)}, unk_token="0000"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

"""The second pass of a build: one shard of tokens through the model once, and its activations through every SAE, sparse.

`encode_shard` is a unit of work: it depends on the token shard alone, and writing it twice gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.base.errors import DataError
from sae_italian.cache.layout import ShardRecord, halves, map_arrays, shard_file, smallest_uint, write_arrays
from sae_italian.cache.transpose import write_run
from sae_italian.corpora.packing import special_mask
from sae_italian.models.activations import read_many
from sae_italian.saes.sparse_products import top_positive

FORWARD_WINDOWS = 32
FORWARD_TOKENS = 8192
CHUNK_BYTES = 2**23  # of pre-activations at a time: they stay in the processor's cache


class ActsRecord(NamedTuple):
    """What the manifest of one cache must learn of an encoded shard."""

    folder: Path
    index: int
    nnz: int
    n_wide: int
    sha256: str

    def enter(self, shard: ShardRecord) -> None:
        """Write it into the shard's record of the manifest."""
        shard.nnz, shard.n_wide = self.nnz, self.n_wide
        shard.sha256[shard_file("acts", self.index)] = self.sha256


@dataclass(frozen=True)
class EncodeJob:
    """What all shards of a build share: the cache folders, the SAE of each, and the model. It can be pickled."""

    folders: tuple[Path, ...]
    saes: tuple[Any, ...]
    model: Any

    def __reduce__(self) -> tuple[Any, ...]:
        parts = [(type(sae), sae.cfg, sae.state_dict()) for sae in self.saes]  # the object itself holds a lambda
        return _unpickled, (self.folders, parts, self.model)


def _unpickled(folders: tuple[Path, ...], parts: list[tuple[Any, Any, Any]], model: Any) -> EncodeJob:
    saes = []
    for kind, config, weights in parts:
        sae = kind(config)
        sae.load_state_dict(weights)
        saes.append(sae.eval())
    return EncodeJob(folders, tuple(saes), model)


class Sparse(NamedTuple):
    """The non-zero latents of some tokens, row by row, latents ascending in a row."""

    counts: Int[np.ndarray, " tokens"]
    latent: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]


@torch.no_grad()
def encode_shard(job: EncodeJob, index: int) -> list[ActsRecord]:
    """Write the activations of one shard for every SAE of the job; return a record for each.

    Raises: DataError for a token shard that cannot be read, and for an SAE that gives NaN or infinity.
    """
    tokens = map_arrays(job.folders[0] / shard_file("tokens", index))["tokens"].astype(np.int64)
    special = special_mask(tokens, job.model.tokenizer)
    hooks = [sae.cfg.metadata.hook_name for sae in job.saes]
    parts: list[list[Sparse]] = [[] for _ in job.saes]
    step = max(1, min(FORWARD_WINDOWS, FORWARD_TOKENS // tokens.shape[1]))
    for first in range(0, len(tokens), step):
        here = slice(first, first + step)
        acts = read_many(job.model, torch.from_numpy(tokens[here]).to(job.model.device), hooks)
        silent = special[here].ravel()
        for hook, sae, found in zip(hooks, job.saes, parts, strict=True):
            found.append(encode_sparse(sae, acts[hook].flatten(0, 1), silent))
    return [
        write_activations(folder, index, joined(found), sae.cfg.d_sae)
        for folder, sae, found in zip(job.folders, job.saes, parts, strict=True)
    ]


def joined(parts: list[Sparse]) -> Sparse:
    return Sparse(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def write_activations(folder: Path, index: int, sparse: Sparse, d_sae: int) -> ActsRecord:
    """Write a shard's activations by token, and the same sorted by latent for the transposition."""
    if not np.isfinite(sparse.value).all():
        raise DataError(f"the SAE of {folder} gives NaN or infinity on shard {index}; check it with `saes doctor`.")
    arrays = {
        "indptr": np.concatenate([[0], np.cumsum(sparse.counts)]).astype(smallest_uint(max(2**17, len(sparse.value)))),
        "latent": sparse.latent.astype(smallest_uint(d_sae - 1)),
        **halves(sparse.value),
    }
    digest = write_arrays(folder, shard_file("acts", index), arrays)
    write_run(folder, index, arrays, d_sae)
    return ActsRecord(folder, index, len(sparse.value), len(arrays["wide_at"]), digest)


# --- from activations to non-zero latents ----------------------------------------------------------------------------


def encode_sparse(sae: Any, x: Float[Tensor, "tokens d_in"], silent: np.ndarray) -> Sparse:
    """Return the positive latents of `sae.encode(x)`, none at the tokens that are `silent`, a chunk of tokens at a time.

    A TopK SAE is read before its activation function: the k largest are taken as they are, and the dense result with
    its zeros is never made.
    """
    rows, k = max(1, CHUNK_BYTES // (4 * sae.cfg.d_sae)), topk_of(sae)
    activation, parts = getattr(sae, "activation_fn", None), []
    try:
        if k:
            sae.activation_fn = torch.nn.Identity()
        for first in range(0, max(1, len(x)), rows):
            mute = silent[first : first + rows]
            dense = sae.encode(x[first : first + rows].to(sae.device, sae.dtype))
            parts.append(Sparse(*top_positive(dense, k, mute)) if k else _positive(dense, mute))
    finally:
        if k:
            sae.activation_fn = activation
    return joined(parts)


def topk_of(sae: Any) -> int | None:
    """Return k if the SAE's latents are the k largest pre-activations, else None."""
    from sae_lens.saes.topk_sae import TopK, TopKSAE

    plain = isinstance(sae, TopKSAE) and type(sae).encode is TopKSAE.encode
    return int(sae.activation_fn.k) if plain and type(sae.activation_fn) is TopK else None


def _positive(acts: Float[Tensor, "tokens d_sae"], mute: Bool[np.ndarray, " tokens"]) -> Sparse:
    acts = acts.clamp_(min=0)
    acts[torch.from_numpy(mute).to(acts.device)] = 0
    rows, columns = acts.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(acts)).cpu().numpy()
    return Sparse(counts, columns.cpu().numpy(), acts[rows, columns].float().cpu().numpy())

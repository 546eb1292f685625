"""The first three passes of a build: documents packed into token shards, their activations, and these sorted by latent.

Tokens are written in order, with their text; the other passes read these files, so any shard can be encoded without
redoing those before it. `encode_shard` takes one shard through the model once, and its activations through every SAE,
sparse. The transposition is an external counting sort: each shard is sorted by latent on its own while it is in memory
(its run), and `transpose_range` takes a range of latents out of every run: one pass over the runs in all, one range in
memory at a time. Both are units of work: done twice, they write the same bytes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor
from tqdm import tqdm

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import remove
from sae_italian.cache.decoded import decoded_blocks
from sae_italian.cache.layout import (
    LatentRange,
    Manifest,
    ShardRecord,
    halves,
    map_arrays,
    shard_file,
    smallest_uint,
    write_arrays,
)
from sae_italian.corpora import PackedBlock, TextDocument, iter_documents, pack
from sae_italian.corpora.packing import special_mask, take_tokens
from sae_italian.models.activations import read_many
from sae_italian.models.cached import CachedActivations
from sae_italian.saes.sparse import top_positive

FORWARD_WINDOWS = 32
FORWARD_TOKENS = 8192
CHUNK_BYTES = 2**23  # of pre-activations at a time: they stay in the processor's cache
LATENTS_PER_RANGE = 512
NON_ZEROS_PER_RANGE = 2**22  # unless one latent alone has more; the statistics need about 70 bytes of memory for each


def write_token_shards(out: Path, manifest: Manifest, tokenizer: Any, cached: CachedActivations | None = None) -> None:
    """Write the token shards that the manifest does not name yet, and name them; `cached` has windows of its own.

    Packing starts from the first document again: it is a small part of the work, and the same each time.
    Raises: UsageError when the corpus is shorter than asked for, or holds no full window.
    """
    if cached is None:
        documents = iter_documents(manifest.corpus, manifest.split, text_column=manifest.text_column)  # pyright: ignore[reportArgumentType]
        blocks = pack(documents, tokenizer, manifest.context_size, windows_per_block=manifest.windows_per_shard)
    else:
        blocks = decoded_blocks(cached.blocks(manifest.windows_per_shard), tokenizer)
    if manifest.n_tokens_asked is not None:
        blocks = take_tokens(blocks, manifest.n_tokens_asked, f"the {manifest.split} split of {manifest.corpus}")
    done = len(manifest.shards)
    with tqdm(total=manifest.n_tokens_asked, unit="tok", unit_scale=True, desc="tokens", disable=None) as bar:
        for index, block in enumerate(blocks):
            if index >= done:
                manifest.shards.append(write_token_shard(out, index, block))
                manifest.save(out)
            bar.update(block.tokens.size)
    if not manifest.shards:
        raise UsageError(
            f"the {manifest.split} split of {manifest.corpus} fills no window of {manifest.context_size} tokens. "
            "Use more text, or a smaller --context-size."
        )
    manifest.tokens_complete = True
    manifest.save(out)


def write_token_shard(out: Path, index: int, block: PackedBlock) -> ShardRecord:
    """Write one shard's tokens and documents; return its record, without activations as yet."""
    context = block.tokens.shape[1]
    arrays = {
        "tokens": block.tokens.astype(smallest_uint(int(block.tokens.max()))),
        "doc": block.doc.astype(np.uint32),
        "start": block.start.astype(np.uint32),
        "end": block.end.astype(np.uint32),
        "run": run_starts(block.doc).astype(smallest_uint(context - 1)),
        **_document_arrays(block.documents),
    }
    file = shard_file("tokens", index)
    digests = {file: write_arrays(out, file, arrays)}
    return ShardRecord(index=index, n_windows=len(block.tokens), n_documents=len(block.documents), sha256=digests)


def run_starts(doc: Int[np.ndarray, "windows context"]) -> Int[np.ndarray, "windows context"]:
    """Return for every token the place in its window where the stretch of one document that holds it begins."""
    places = np.broadcast_to(np.arange(doc.shape[1]), doc.shape)
    begins = np.ones(doc.shape, dtype=bool)
    begins[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def _document_arrays(documents: list[TextDocument]) -> dict[str, np.ndarray]:
    """Return texts, ids and sources as UTF-8 bytes with pointers: `text`, `text_ptr`, `doc_id`, ..."""
    arrays = {}
    for name in ("text", "doc_id", "source"):
        encoded = [getattr(document, name).encode("utf-8", "surrogatepass") for document in documents]
        arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{name}_ptr"] = np.cumsum([0, *(len(part) for part in encoded)], dtype=np.uint64)
    return arrays


def share_tokens(source: Path, shards: list[ShardRecord], out: Path, manifest: Manifest) -> None:
    """Give another cache of the same text the token shards of `source`: hard links where the disk has them, else copies."""
    if manifest.tokens_complete:
        return
    (out / "tokens").mkdir(exist_ok=True)
    manifest.shards = []
    for shard in shards:
        file = shard_file("tokens", shard.index)
        remove(out / file)
        try:
            os.link(source / file, out / file)
        except OSError:
            shutil.copyfile(source / file, out / file)
        unencoded = {"nnz": 0, "n_wide": 0, "sha256": {file: shard.sha256[file]}}
        manifest.shards.append(shard.model_copy(update=unencoded))
    manifest.tokens_complete = True
    manifest.save(out)


# --- activations ------------------------------------------------------------------------------------------------------


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
    """What all shards of a build share: the cache folders, the SAE of each, the model. It can be pickled.

    Where the activations are `cached`, the model is not run.
    """

    folders: tuple[Path, ...]
    saes: tuple[Any, ...]
    model: Any
    windows_per_shard: int
    cached: CachedActivations | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        parts = [(type(sae), sae.cfg, sae.state_dict()) for sae in self.saes]  # the object itself holds a lambda
        return _unpickled, (self.folders, parts, self.model, self.windows_per_shard, self.cached)


def _unpickled(folders: tuple[Path, ...], parts: list[tuple[Any, Any, Any]], *rest: Any) -> EncodeJob:
    saes = []
    for kind, config, weights in parts:
        sae = kind(config)
        sae.load_state_dict(weights)
        saes.append(sae.eval())
    return EncodeJob(folders, tuple(saes), *rest)


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
        if job.cached is None:
            acts = read_many(job.model, torch.from_numpy(tokens[here]).to(job.model.device), hooks)
        else:
            start = index * job.windows_per_shard + first
            acts = {hook: job.cached.read(hook, start, len(tokens[here])) for hook in hooks}
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


# --- from shards to ranges of latents ---------------------------------------------------------------------------------


def write_run(folder: Path, index: int, arrays: dict[str, np.ndarray], d_sae: int) -> None:
    """Write a shard's activations sorted by latent, in corpus order within a latent: indptr, row, value."""
    nnz, n_rows = len(arrays["value"]), len(arrays["indptr"]) - 1
    entry = np.arange(nnz, dtype=np.int64 if nnz > 2**31 - 1 else np.int32)
    by_row = csr_matrix((entry, arrays["latent"], arrays["indptr"]), shape=(n_rows, d_sae))
    by_latent: Any = by_row.tocsc()  # a counting sort
    order: np.ndarray = by_latent.data
    run = {
        "indptr": by_latent.indptr.astype(np.uint64),
        "row": by_latent.indices.astype(smallest_uint(max(n_rows - 1, 0))),
        "value": arrays["value"][order],
    }
    wide_at = arrays.get("wide_at", ())
    if len(wide_at):
        place = np.empty(nnz, dtype=np.int64)
        place[order] = np.arange(nnz)
        at = place[wide_at]
        run |= {"wide_at": np.sort(at).astype(np.uint64), "wide_value": arrays["wide_value"][np.argsort(at)]}
    write_arrays(folder, shard_file("runs", index), run)


def plan_ranges(folder: Path, manifest: Manifest) -> list[tuple[int, int]]:
    """Return (first, last) of every range: at most LATENTS_PER_RANGE latents and NON_ZEROS_PER_RANGE entries."""
    counts = np.zeros(manifest.d_sae, dtype=np.int64)
    for shard in manifest.shards:
        counts += np.diff(map_arrays(folder / shard_file("runs", shard.index))["indptr"]).astype(np.int64)
    ranges, first, held = [], 0, 0
    for latent, count in enumerate(counts.tolist()):
        if latent > first and (latent - first == LATENTS_PER_RANGE or held + count > NON_ZEROS_PER_RANGE):
            ranges.append((first, latent - 1))
            first, held = latent, 0
        held += count
    return [*ranges, (first, manifest.d_sae - 1)]


def transpose_range(folder: Path, manifest: Manifest, bounds: tuple[int, int]) -> LatentRange:
    """Write the latent-major file of latents `bounds` (inclusive) and return its record.

    Raises: DataError naming a run that cannot be read.
    """
    first, last = bounds
    # one run is mapped at a time: each holds a file open, and there may be thousands
    runs = [folder / shard_file("runs", shard.index) for shard in manifest.shards]
    pointers = np.stack([map_arrays(run)["indptr"][first : last + 2].astype(np.int64) for run in runs])
    counts = np.diff(pointers, axis=1)
    indptr = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    # 32 bits are enough for four billion positions
    position = np.empty(indptr[-1], dtype=smallest_uint(max(2**32, manifest.n_positions) - 1))
    value = np.empty(indptr[-1], dtype=np.float16)
    wide: list[tuple[np.ndarray, np.ndarray]] = []
    before = np.cumsum(counts, axis=0) - counts  # of the same latent, in earlier shards
    base = 0
    for shard, file, own, number, earlier in zip(manifest.shards, runs, pointers, counts, before, strict=True):
        run, to, here = map_arrays(file), places(indptr[:-1] + earlier, number), slice(own[0], own[-1])
        position[to] = run["row"][here].astype(position.dtype) + position.dtype.type(base)
        value[to] = run["value"][here]
        at = run.get("wide_at", np.empty(0)).astype(np.int64)
        mine = (at >= own[0]) & (at < own[-1])
        wide.append((to[at[mine] - own[0]], run.get("wide_value", np.empty(0, np.float32))[mine]))
        base += shard.n_windows * manifest.context_size
    at, wide_value = (np.concatenate(part) for part in zip(*wide, strict=True))
    order = np.argsort(at)
    arrays = {
        "indptr": indptr.astype(np.uint64),
        "position": position,
        "value": value,
        "wide_at": at[order].astype(np.uint64),
        "wide_value": wide_value[order],
    }
    item = LatentRange(first=first, last=last, nnz=len(value), sha256="")
    return item.model_copy(update={"sha256": write_arrays(folder, item.file, arrays)})


def places(starts: Int[np.ndarray, " latents"], counts: Int[np.ndarray, " latents"]) -> Int[np.ndarray, " entries"]:
    """Return starts[i], starts[i] + 1, ... (counts[i] of them) for every i, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)

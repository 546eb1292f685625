"""The first three passes of a build: documents packed into token shards, their activations, and these sorted by latent.

Tokens are written in order, with their text; the other passes read these files, so any shard can be encoded without
redoing those before it. `encode_shard` takes one shard through the model once, and its activations through every SAE,
sparse. The transposition is an external sort: each shard is sorted by latent on its own while it is in memory
(its run), and `transpose_range` takes a range of latents out of every run: one pass over the runs in all, one range in
memory at a time. Both are units of work: done twice, they write the same bytes.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import remove
from sae_italian.cache.layout import (
    MANIFEST,
    Csr,
    Manifest,
    ShardRecord,
    halves,
    map_arrays,
    shard_file,
    smallest_uint,
    write_arrays,
)
from sae_italian.corpora import PackedBlock, TextDocument, iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT, TooShort, special_mask, take_tokens
from sae_italian.corpora.pretokenize import CachedActivations
from sae_italian.models.activations import read_many
from sae_italian.saes.sparse import top_positive

FORWARD_WINDOWS = 32
FORWARD_TOKENS = 8192
CHUNK_BYTES = 2**23  # of pre-activations at a time: they stay in the processor's cache


def write_token_shards(
    out: Path, manifest: Manifest, tokenizer: Any, cached: CachedActivations | None = None, *, at_most: bool = False
) -> None:
    """Write the token shards that the manifest does not name yet, and name them; `cached` has windows of its own.

    Packing starts from the first document again: it is a small part of the work, and the same each time.
    Raises: UsageError when the corpus is shorter than asked for (unless `at_most`), or holds no full window.
    """
    if cached is None:
        documents = iter_documents(manifest.corpus, manifest.split, text_column=manifest.text_column)  # pyright: ignore[reportArgumentType]
        blocks = pack(documents, tokenizer, manifest.context_size, windows_per_block=manifest.windows_per_shard)
    else:
        blocks = decoded_blocks(cached.blocks(manifest.windows_per_shard), tokenizer)
    if manifest.n_tokens_asked is not None:
        what = f"the {manifest.split} split of {manifest.corpus}"
        blocks = take_tokens(blocks, manifest.n_tokens_asked, what, at_most=at_most)
    try:
        with progress("tokens", total=manifest.n_tokens_asked) as bar:
            for index, block in enumerate(blocks):
                if index == len(manifest.shards):
                    manifest.shards.append(write_token_shard(out, index, block))
                    manifest.save(out)
                bar.update(block.tokens.size)
    except TooShort:  # less is to be asked for, or more text given: no build goes on from here
        for left in ("tokens", MANIFEST):
            remove(out / left)
        raise
    manifest.tokens_complete = True
    manifest.save(out)


def write_token_shard(out: Path, index: int, block: PackedBlock) -> ShardRecord:
    """Write one shard's tokens and documents; return its record, without activations as yet."""
    context = block.tokens.shape[1]
    arrays = {
        "tokens": block.tokens.astype(smallest_uint(int(block.tokens.max()))),
        **{name: getattr(block, name).astype(np.uint32) for name in ("doc", "start", "end")},
        "run": run_starts(block.doc).astype(smallest_uint(context - 1)),
        **_document_arrays(block.documents),
    }
    file = shard_file("tokens", index)
    digests = {file: write_arrays(out, file, arrays)}
    return ShardRecord(index=index, n_windows=len(block.tokens), n_documents=len(block.documents), sha256=digests)


def run_starts(doc: Int[np.ndarray, "windows context"]) -> Int[np.ndarray, "windows context"]:
    """Return for every token the place in its window where the stretch of one document that holds it begins."""
    begins = np.diff(doc, axis=1, prepend=-1) != 0
    return np.maximum.accumulate(np.where(begins, np.arange(doc.shape[1]), 0), axis=1)


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
        manifest.shards.append(shard.model_copy(update={"nnz": 0, "n_wide": 0, "sha256": {file: shard.sha256[file]}}))
    manifest.tokens_complete = True
    manifest.save(out)


# --- activations ------------------------------------------------------------------------------------------------------


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
        parts = [(type(sae), sae.cfg, sae.state_dict()) for sae in self.saes]  # the object holds a lambda
        return _unpickled, (self.folders, parts, self.model, self.windows_per_shard, self.cached)


def _unpickled(folders: tuple[Path, ...], parts: list[tuple[Any, Any, Any]], *rest: Any) -> EncodeJob:
    saes = []
    for kind, config, weights in parts:
        sae = kind(config)
        sae.load_state_dict(weights)
        saes.append(sae.eval())
    return EncodeJob(folders, tuple(saes), *rest)


@torch.no_grad()
def encode_shard(job: EncodeJob, shard: ShardRecord) -> list[ShardRecord]:
    """Write the activations of one shard for every SAE of the job; return the shard's record in the manifest of each.

    Raises: DataError for a token shard that cannot be read, and for an SAE that gives NaN or infinity.
    """
    tokens = map_arrays(job.folders[0] / shard_file("tokens", shard.index))["tokens"].astype(np.int64)
    special = special_mask(tokens, job.model.tokenizer)
    hooks = [sae.cfg.metadata.hook_name for sae in job.saes]
    parts: list[list[Csr]] = [[] for _ in job.saes]
    step = max(1, min(FORWARD_WINDOWS, FORWARD_TOKENS // tokens.shape[1]))
    for first in range(0, len(tokens), step):
        here = slice(first, first + step)
        if job.cached is None:
            acts = read_many(job.model, torch.from_numpy(tokens[here]).to(job.model.device), hooks)
        else:
            start = shard.index * job.windows_per_shard + first
            acts = {hook: job.cached.read(hook, start, len(tokens[here])) for hook in hooks}
        silent = special[here].ravel()
        for hook, sae, found in zip(hooks, job.saes, parts, strict=True):
            found.append(encode_sparse(sae, acts[hook].flatten(0, 1), silent))
    whole = (vstack(found, "csr") for found in parts)
    return [write_activations(folder, shard, acts) for folder, acts in zip(job.folders, whole, strict=True)]


def write_activations(folder: Path, shard: ShardRecord, acts: Csr) -> ShardRecord:
    """Write a shard's activations [tokens, d_sae] by token, and by latent for the transposition; return its record."""
    if not np.isfinite(acts.data).all():
        raise DataError(
            f"the SAE of {folder} gives NaN or infinity on shard {shard.index}; check it with `saes doctor`."
        )
    arrays = {
        "indptr": acts.indptr.astype(smallest_uint(max(2**17, acts.nnz))),
        "latent": acts.indices.astype(smallest_uint(acts.shape[1] - 1)),
        **halves(acts.data),
    }
    file, by_latent = shard_file("acts", shard.index), acts.tocsc()
    sha256 = {**shard.sha256, file: write_arrays(folder, file, arrays)}
    run = {"indptr": by_latent.indptr, "row": by_latent.indices, **halves(by_latent.data)}
    write_arrays(folder, shard_file("runs", shard.index), run)
    return shard.model_copy(update={"nnz": acts.nnz, "n_wide": len(arrays["wide_at"]), "sha256": sha256})


# --- from activations to non-zero latents ----------------------------------------------------------------------------


def encode_sparse(sae: Any, x: Float[Tensor, "tokens d_in"], silent: np.ndarray) -> Csr:
    """Return the positive latents of `sae.encode(x)` [tokens, d_sae], none at the tokens that are `silent`, in chunks.

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
            parts.append(csr_array(top_positive(dense, k, mute) if k else _positive(dense, mute), dense.shape))
    finally:
        if k:
            sae.activation_fn = activation
    return vstack(parts, "csr")


def topk_of(sae: Any) -> int | None:
    """Return k if the SAE's latents are the k largest pre-activations, else None."""
    from sae_lens.saes.topk_sae import TopK, TopKSAE

    plain = isinstance(sae, TopKSAE) and type(sae).encode is TopKSAE.encode
    return int(sae.activation_fn.k) if plain and type(sae.activation_fn) is TopK else None


def _positive(
    acts: Float[Tensor, "tokens d_sae"], mute: Bool[np.ndarray, " tokens"]
) -> tuple[Float[np.ndarray, " nnz"], Int[np.ndarray, " nnz"], Int[np.ndarray, " tokens+1"]]:
    """Return what `top_positive` does, of all latents."""
    if (acts < 0).any():
        raise UsageError("latents below 0, as an abstopk has, are not kept in a cache. Use another architecture.")
    acts[torch.from_numpy(mute).to(acts.device)] = 0
    rows, columns = acts.nonzero(as_tuple=True)
    indptr = np.append(0, torch.bincount(rows, minlength=len(acts)).cumsum(0).cpu().numpy())
    return acts[rows, columns].float().cpu().numpy(), columns.cpu().numpy(), indptr


# --- windows of which only the tokens are known ----------------------------------------------------------------------


UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


def decoded_blocks(blocks: Iterable[Int[np.ndarray, "windows context"]], tokenizer: Any) -> Iterator[PackedBlock]:
    """Yield blocks whose documents are the stretches between special tokens of a window, decoded as a whole.

    Without a tokenizer every window is a document without text. Raises: UsageError for a token that it does not have.
    """
    n_documents = n_windows = 0
    for tokens in blocks:
        if tokenizer is not None and tokens.max() >= len(tokenizer):
            raise UsageError(
                f"the windows hold token {tokens.max()}, the tokenizer has {len(tokenizer)}: it is another model's. "
                "Give the model that they were made with."
            )
        special = np.zeros(tokens.shape, bool) if tokenizer is None else special_mask(tokens, tokenizer)
        begins = ~special & np.diff(special, axis=1, prepend=True)
        stretches = np.split(tokens[~special], np.flatnonzero(begins[~special])[1:]) if begins.any() else []
        texts, own = _decoded([ids.tolist() for ids in stretches], tokenizer)
        spans = np.zeros((*tokens.shape, 2), dtype=np.int64)
        spans[~special] = np.concatenate([np.zeros((0, 2), np.int64), *own])
        doc = np.where(special, NO_DOCUMENT, n_documents + np.cumsum(begins).reshape(tokens.shape) - 1)
        at = "" if tokenizer is None else ", token {}"
        names = [f"window {n_windows + row}" + at.format(place) for row, place in np.argwhere(begins).tolist()]
        documents = [TextDocument(text, name, "") for text, name in zip(texts, names, strict=True)]
        yield PackedBlock(tokens, doc, spans[..., 0], spans[..., 1], documents, n_documents)
        n_documents += len(documents)
        n_windows += len(tokens)


def _decoded(stretches: list[list[int]], tokenizer: Any) -> tuple[list[str], list[Any]]:
    """Return each stretch's text and its tokens' spans: the tokenizer's own where it gives the same tokens again."""
    if tokenizer is None or not stretches:
        return [""] * len(stretches), [np.zeros((len(ids), 2), np.int64) for ids in stretches]
    texts = tokenizer.batch_decode(stretches, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    found = zip(stretches, texts, again["input_ids"], again["offset_mapping"], strict=True)
    return texts, [
        spans if ids == same else spans_by_prefixes(ids, text, tokenizer) for ids, text, same, spans in found
    ]


def spans_by_prefixes(ids: list[int], text: str, tokenizer: Any) -> Int[np.ndarray, "tokens 2"]:
    """Return the span of each token: what the decoded text grows by with it.

    The tokens of one character that is split over several share its span.
    """
    prefixes = tokenizer.batch_decode([ids[: i + 1] for i in range(len(ids))], clean_up_tokenization_spaces=False)
    lengths = [len(prefix.rstrip(UNFINISHED)) for prefix in prefixes]
    ends = np.minimum(np.maximum.accumulate(lengths), len(text))
    starts = np.concatenate([[0], ends[:-1]])
    unfinished = [i for i, prefix in enumerate(prefixes) if prefix.endswith(UNFINISHED) and ends[i] < len(text)]
    ends[unfinished] += 1
    return np.stack([starts, ends], axis=1)

"""Build a feature cache: sparse latents of a corpus, shard by shard, then turned latent-major.

A shard is written whole or not at all and then named in the manifest, so a killed build continues after the last
finished shard and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from sae_italian.cache.layout import (
    FP16_MAX,
    MANIFEST,
    LatentRange,
    Manifest,
    Shard,
    acts_file,
    smallest_uint,
    tokens_file,
)
from sae_italian.corpora import PackedBlock, Split, TextDocument, iter_documents, pack
from sae_italian.corpora.documents import check_corpus
from sae_italian.corpora.packing import special_mask, take_tokens
from sae_italian.errors import DataError
from sae_italian.models.activations import check_context, read_activations
from sae_italian.saes import check_fits, weights_hash
from sae_italian.storage import atomic_path, claim_folder, package_versions, sha256_file

KIND = "cache"
LATENTS_PER_RANGE = 512
FORWARD_WINDOWS = 32


@torch.no_grad()
def build_cache(
    sae: Any,
    model: Any,
    corpus: str,
    out: str | Path,
    *,
    n_tokens: int,
    split: Split = "all",
    context_size: int | None = None,
    windows_per_shard: int = 512,
    text_column: str = "text",
    sae_name: str = "",
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Cache the latents of `sae` on `n_tokens` tokens of a corpus in the folder `out`; return it.

    `model` is a Hugging Face model with its tokenizer (`load_model(name)`). BOS and other special tokens have no
    latents. Raises: UsageError when SAE and model do not fit, the corpus is too short, or `out` holds another run.
    """
    out = Path(out)
    hook_name = check_fits(sae, model)
    check_corpus(corpus, text_column=text_column)
    manifest = Manifest(
        model=str(sae.cfg.metadata.model_name),
        sae=sae_name or "in memory",
        sae_hash=weights_hash(sae),
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        hook_name=hook_name,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        k=getattr(sae.cfg, "k", None),
        corpus=str(corpus),
        text_column=text_column,
        split=split,
        n_tokens_asked=n_tokens,
        context_size=check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config),
        windows_per_shard=windows_per_shard,
        versions=package_versions(),
    )
    if claim_folder(out, KIND, manifest.identity(), resume=resume, overwrite=overwrite) and (out / MANIFEST).is_file():
        manifest = Manifest.load(out)
    if not manifest.complete:
        _encode_shards(sae, model, out, manifest)
        _transpose(out, manifest)
        from sae_italian.cache.stats import write_statistics

        write_statistics(out, manifest, sae, model)
        manifest.complete = True
        manifest.save(out)
    return out


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 of the fast tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _encode_shards(sae: Any, model: Any, out: Path, manifest: Manifest) -> None:
    documents = iter_documents(manifest.corpus, manifest.split, text_column=manifest.text_column)  # pyright: ignore
    packed = pack(documents, model.tokenizer, manifest.context_size, windows_per_block=manifest.windows_per_shard)
    what = f"the {manifest.split} split of {manifest.corpus}"
    done = len(manifest.shards)
    bar = tqdm(total=manifest.n_tokens_asked, unit="tok", unit_scale=True, desc="cache", disable=None)
    with bar:
        for index, block in enumerate(take_tokens(packed, manifest.n_tokens_asked, what)):
            if index >= done:
                manifest.shards.append(_encode_shard(sae, model, out, manifest, index, block))
                manifest.save(out)
            bar.update(block.tokens.size)


def _encode_shard(sae: Any, model: Any, out: Path, manifest: Manifest, index: int, block: PackedBlock) -> Shard:
    counts, latents, values = [], [], []
    for tokens in torch.from_numpy(block.tokens).split(FORWARD_WINDOWS):
        x = read_activations(model, tokens.to(model.device), manifest.hook_name)
        acts = sae.encode(x.to(sae.dtype)).clamp_(min=0)
        acts[torch.from_numpy(special_mask(tokens.numpy(), model.tokenizer)).to(acts.device)] = 0
        flat = acts.flatten(0, 1)
        rows, columns = flat.nonzero(as_tuple=True)
        counts.append(torch.bincount(rows, minlength=len(flat)).cpu().numpy())
        latents.append(columns.cpu().numpy())
        values.append(flat[rows, columns].float().cpu().numpy())
    value = np.concatenate(values)
    n_clipped = int((value > FP16_MAX).sum())
    acts_arrays = {
        "indptr": np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.uint32),
        "latent": np.concatenate(latents).astype(smallest_uint(manifest.d_sae - 1)),
        "value": np.minimum(value, FP16_MAX).astype(np.float16),
    }
    largest_id = int(block.tokens.max())
    token_arrays = {
        "tokens": block.tokens.astype(smallest_uint(largest_id)),
        "doc": block.doc.astype(np.uint32),
        "start": block.start.astype(np.uint32),
        "end": block.end.astype(np.uint32),
        **_document_arrays(block.documents),
    }
    checksums = {}
    for file, arrays in ((tokens_file(index), token_arrays), (acts_file(index), acts_arrays)):
        with atomic_path(out / file) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        checksums[file] = sha256_file(out / file)
    return Shard(
        index=index,
        n_windows=len(block.tokens),
        n_documents=len(block.documents),
        nnz=len(value),
        n_clipped=n_clipped,
        sha256=checksums,
    )


def _document_arrays(documents: list[TextDocument]) -> dict[str, np.ndarray]:
    """Return texts, ids and sources as UTF-8 bytes with pointers: `text`, `text_ptr`, `doc_id`, ..."""
    arrays = {}
    for name, strings in (
        ("text", [d.text for d in documents]),
        ("doc_id", [d.doc_id for d in documents]),
        ("source", [d.source for d in documents]),
    ):
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{name}_ptr"] = np.cumsum([0, *(len(part) for part in encoded)], dtype=np.uint64)
    return arrays


# --- token-major to latent-major -------------------------------------------------------------------------------------


def _transpose(out: Path, manifest: Manifest) -> None:
    """Write the latent-major files, one range of latents in memory at a time, skipping those already written."""
    bounds = range(0, manifest.d_sae, LATENTS_PER_RANGE)
    for first in tqdm(bounds, desc="transpose", unit="range", disable=None):
        if any(item.first == first for item in manifest.ranges):
            continue
        last = min(first + LATENTS_PER_RANGE, manifest.d_sae) - 1
        parts = list(_entries_in_range(out, manifest, first, last))
        latent = np.concatenate([part[0] for part in parts])
        order = np.argsort(latent, kind="stable")  # positions stay in corpus order within a latent
        position = np.concatenate([part[1] for part in parts])[order]
        arrays = {
            "indptr": np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=last - first + 1))]).astype(
                np.uint64
            ),
            "position": position.astype(smallest_uint(max(2**32 - 1, manifest.n_windows * manifest.context_size))),
            "value": np.concatenate([part[2] for part in parts])[order],
        }
        item = LatentRange(first=first, last=last, nnz=len(latent), sha256="")
        with atomic_path(out / item.file) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        item.sha256 = sha256_file(out / item.file)
        manifest.ranges.append(item)
        manifest.save(out)


def _entries_in_range(
    out: Path, manifest: Manifest, first: int, last: int
) -> Iterator[tuple[Int[np.ndarray, " nnz"], Int[np.ndarray, " nnz"], np.ndarray]]:
    """Yield per shard the entries of latents first to last: latent - first, position, value, in corpus order."""
    base = 0
    for shard in manifest.shards:
        try:
            with safe_open(out / acts_file(shard.index), framework="numpy") as handle:
                latent, indptr, value = (handle.get_tensor(name) for name in ("latent", "indptr", "value"))
        except OSError as error:
            raise DataError(
                f"{out / acts_file(shard.index)} cannot be read ({error}). Build the cache again."
            ) from error
        wanted = np.flatnonzero((latent >= first) & (latent <= last))
        row = np.searchsorted(indptr, wanted, side="right") - 1
        yield latent[wanted].astype(np.int64) - first, row + base, value[wanted]
        base += shard.n_windows * manifest.context_size

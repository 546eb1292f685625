"""Delphi's cache (eai-delphi 0.1.3): written so that its own loader reads it, and read.

    <folder>/<hookpoint>/<first>_<last>.safetensors     a split: latents first to last, inclusive
        locations    uint16 [nnz, 3], uint32 where a sequence or local latent is 65,536 or more:
                     (sequence, place in it, latent - first), in the order of the text
        activations  float16 [nnz]
        tokens       int64 [sequences, context], the same in every split
    <folder>/<hookpoint>/config.json                    Delphi's CacheConfig and model_name

Delphi keeps |activation| > 1e-5, so an export leaves out what is smaller; where it would write infinity (beyond fp16)
an export writes 65504. A split without activations, on which Delphi's writer fails, is written with none, which its
loader reads.   Source: delphi/latents/cache.py and loader.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path, claim_folder, write_text
from sae_italian.cache.layout import Manifest, read_arrays, tokens_file
from sae_italian.models.hooks import parse_hook_name

THRESHOLD = 1e-5
MIN_SPLITS = 5  # Delphi's own default
NON_ZEROS_PER_SPLIT = 2**23  # held in memory at a time


def export_delphi(
    cache: str | Path,
    out: str | Path,
    *,
    latents: tuple[int, int] | None = None,
    n_splits: int | None = None,
    hookpoint: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a finished cache as `out`/`hookpoint` in Delphi's format; return that folder.

    `latents` (first, last, inclusive; default all) are divided into `n_splits` as Delphi divides them (default: 5, or
    more so that a split fits in memory). `hookpoint` defaults to the module's path as Delphi spells it (`layers.5`).
    Raises: UsageError for an unfinished cache, latents that do not exist, and when the folder holds another run.
    """
    cache = Path(cache)
    manifest = finished(cache)
    first, last = latent_bounds(manifest, latents)
    bounds = split_bounds(first, last, n_splits or _default_splits(manifest, last - first + 1))
    folder = Path(out) / (hookpoint or hookpoint_of(manifest.hook_name))
    spec = {"manifest": manifest.identity(), "latents": [first, last], "splits": bounds}
    claim_folder(folder, "Delphi export", spec, resume=resume, overwrite=overwrite)
    for begin, end in tqdm(bounds, desc="Delphi splits", unit="split", disable=None):
        file = folder / f"{begin}_{end}.safetensors"
        if not file.is_file():
            _write_split(file, cache, manifest, begin, end)
    write_text(folder / "config.json", json.dumps(_config(manifest, len(bounds)), indent=4))
    return folder


def finished(cache: Path) -> Manifest:
    """Return the manifest of a finished cache. Raises UsageError when it is not finished."""
    manifest = Manifest.load(cache)
    if not manifest.complete:
        raise UsageError(f"{cache} is an unfinished cache; run `sae-italian cache build` again with --resume.")
    return manifest


def latent_bounds(manifest: Manifest, latents: tuple[int, int] | None) -> tuple[int, int]:
    """Return the first and last latent wanted. Raises UsageError when they are not of this cache."""
    first, last = latents or (0, manifest.d_sae - 1)
    if not 0 <= first <= last < manifest.d_sae:
        raise UsageError(f"latents {first} to {last} do not exist: this SAE has latents 0 to {manifest.d_sae - 1}.")
    return first, last


def hookpoint_of(hook_name: str) -> str:
    """Return Delphi's name of a hook, `layers.5` or `layers.5.mlp`; an unknown name as it is."""
    try:
        hook = parse_hook_name(hook_name)
    except UsageError:
        return hook_name
    return hook.llama_path


def split_bounds(first: int, last: int, n_splits: int) -> list[tuple[int, int]]:
    """Return Delphi's division of latents first to last: `torch.linspace(...).long()`, ends inclusive."""
    import torch

    width = last - first + 1
    if not 1 <= n_splits <= width:
        raise UsageError(f"--splits is {n_splits}; {width} latents can be divided into 1 to {width} splits.")
    edges = (torch.linspace(0, width, steps=n_splits + 1).long() + first).tolist()
    return [(begin, end - 1) for begin, end in zip(edges[:-1], edges[1:], strict=True)]


def _default_splits(manifest: Manifest, width: int) -> int:
    share = manifest.nnz * width / manifest.d_sae
    return min(width, max(MIN_SPLITS, -(-int(share) // NON_ZEROS_PER_SPLIT)))


def entries(
    cache: Path, manifest: Manifest, first: int, last: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, file by file, what latents first to last have: the first of them, indptr, position, value (fp32)."""
    for item in manifest.ranges:
        begin, end = max(first, item.first), min(last, item.last)
        if begin > end:
            continue
        arrays = read_arrays(cache, item.file)
        indptr = arrays["indptr"][begin - item.first : end - item.first + 2].astype(np.int64)
        value = arrays["value"].astype(np.float32)
        if "wide_at" in arrays:
            value[arrays["wide_at"]] = arrays["wide_value"]
        here = slice(indptr[0], indptr[-1])
        yield begin, indptr - indptr[0], arrays["position"][here], value[here]


def _write_split(file: Path, cache: Path, manifest: Manifest, first: int, last: int) -> None:
    positions, latents, values = [], [], []
    for begin, indptr, position, value in entries(cache, manifest, first, last):
        keep = value > THRESHOLD
        local = np.repeat(np.arange(len(indptr) - 1) + (begin - first), np.diff(indptr))
        positions.append(position[keep].astype(np.int64))
        latents.append(local[keep])
        values.append(np.minimum(value[keep], np.finfo(np.float16).max).astype(np.float16))
    position, latent = np.concatenate(positions), np.concatenate(latents)
    order = np.argsort(position, kind="stable")  # latents ascend within a position, as torch.nonzero gives them
    position, latent = position[order], latent[order]
    sequence, place = np.divmod(position, manifest.context_size)
    largest = max(sequence.max(initial=0), latent.max(initial=0))
    kind = np.uint16 if largest < 2**16 else np.uint32
    arrays = {
        "locations": np.stack([sequence, place, latent], axis=1).astype(kind),
        "activations": np.concatenate(values)[order],
    }
    tokens = (read_arrays(cache, tokens_file(shard.index), ("tokens",))["tokens"] for shard in manifest.shards)
    with atomic_path(file) as temporary:
        _save_with_tokens(temporary, arrays, (manifest.n_windows, manifest.context_size), tokens)


_ORDER = {"I64": 0, "U32": 1, "F16": 2, "U16": 3}  # safetensors puts wider types first
_NAMES = {np.dtype(np.uint32): "U32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "U16"}


def _save_with_tokens(
    path: Path, arrays: dict[str, np.ndarray], shape: tuple[int, int], tokens: Iterable[np.ndarray]
) -> None:
    """Write the bytes that `safetensors.numpy.save_file` would, with the tokens of one shard in memory at a time."""
    kinds = {name: (_NAMES[array.dtype], array.shape, array.nbytes) for name, array in arrays.items()}
    kinds["tokens"] = ("I64", shape, 8 * shape[0] * shape[1])
    header, offset = {}, 0
    for name in sorted(kinds, key=lambda name: (_ORDER[kinds[name][0]], name)):
        kind, dimensions, size = kinds[name]
        header[name] = {"dtype": kind, "shape": list(dimensions), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            parts = tokens if name == "tokens" else [arrays[name]]
            for part in parts:
                handle.write(np.ascontiguousarray(part, dtype=np.int64 if name == "tokens" else None).data)


def _config(manifest: Manifest, n_splits: int) -> dict[str, Any]:
    """Return Delphi's CacheConfig of this cache, in its order, with the model's name."""
    return {
        "dataset_repo": manifest.corpus,
        "dataset_split": manifest.split,
        "dataset_name": "",
        "dataset_column": manifest.text_column,
        "batch_size": 32,
        "cache_ctx_len": manifest.context_size,
        "n_tokens": manifest.n_positions,
        "n_splits": n_splits,
        "model_name": manifest.model,
    }

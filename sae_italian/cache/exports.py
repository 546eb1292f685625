"""A cache for other programs: Delphi's own format, and Hugging Face datasets.

Delphi (eai-delphi 0.1.3; its own loader reads what is written here):

    <folder>/<hookpoint>/<first>_<last>.safetensors     a split: latents first to last, inclusive
        locations    uint16 [nnz, 3], uint32 where a sequence or local latent is 65,536 or more:
                     (sequence, place in it, latent - first), in the order of the text
        activations  float16 [nnz]
        tokens       int64 [sequences, context], the same in every split
    <folder>/<hookpoint>/config.json                    Delphi's CacheConfig and model_name

Delphi keeps |activation| > 1e-5, so an export leaves out what is smaller; where it would write infinity (beyond fp16)
an export writes 65504. A split without activations, on which Delphi's writer fails, is written with none, which its
loader reads.   Source: delphi/latents/cache.py and loader.py.

Datasets, each read with `datasets.load_from_disk`; a position is `window * context_size + place in the window`:

    <folder>/latents      one row per latent: latent, positions, values (float32) and every statistic of the cache
    <folder>/windows      one row per window: tokens, doc, start, end (document and character span of each token)
    <folder>/documents    one row per document: text, doc_id, source, shard
    <folder>/manifest.json    what the cache was built from
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, claimed, write_text
from sae_italian.cache.layout import FP16_MAX, write_arrays
from sae_italian.cache.read import FeatureCache
from sae_italian.cache.stats import arrow
from sae_italian.models.hooks import parse_hook_name

THRESHOLD = 1e-5  # of an activation that Delphi keeps
MIN_SPLITS = 5  # Delphi's own default
NON_ZEROS_PER_SPLIT = 2**23  # held in memory at a time
PER_TOKEN = ("tokens", "doc", "start", "end")
TEXTS = ("text", "doc_id", "source")


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
    opened = FeatureCache.open(cache)
    manifest = opened.manifest
    first, last = manifest.latent_bounds(latents)
    share = manifest.nnz * (last - first + 1) // manifest.d_sae
    default = min(last - first + 1, max(MIN_SPLITS, -(-share // NON_ZEROS_PER_SPLIT)))
    bounds = split_bounds(first, last, n_splits or default)
    folder = Path(out) / (hookpoint or _hookpoint(manifest.hook_name))
    spec = {"manifest": manifest.identity(), "latents": [first, last], "splits": bounds}
    with claimed(folder, "Delphi export", spec, resume=resume, overwrite=overwrite):
        for begin, end in progress("Delphi splits", bounds, unit="split"):
            file = f"{begin}_{end}.safetensors"
            if not (folder / file).is_file():
                write_arrays(folder, file, _split(opened, begin, end))
        config = {  # Delphi's CacheConfig, in its order, with the model's name
            "dataset_repo": manifest.corpus,
            "dataset_split": manifest.split,
            "dataset_name": "",
            "dataset_column": manifest.text_column,
            "batch_size": 32,
            "cache_ctx_len": manifest.context_size,
            "n_tokens": manifest.n_positions,
            "n_splits": len(bounds),
            "model_name": manifest.model,
        }
        write_text(folder / "config.json", json.dumps(config, indent=4))
        return folder


def _hookpoint(hook_name: str) -> str:
    """Return Delphi's name of a hook, `layers.5` or `layers.5.mlp`; an unknown name as it is."""
    try:
        return parse_hook_name(hook_name).llama_path
    except UsageError:
        return hook_name


def split_bounds(first: int, last: int, n_splits: int) -> list[tuple[int, int]]:
    """Return Delphi's division of latents first to last: `torch.linspace(...).long()`, ends inclusive."""
    import torch

    width = last - first + 1
    if not 1 <= n_splits <= width:
        raise UsageError(f"splits={n_splits}: {width} latents can be divided into 1 to {width} splits.")
    edges = (torch.linspace(0, width, steps=n_splits + 1).long() + first).tolist()
    return [(begin, end - 1) for begin, end in pairwise(edges)]


def _split(cache: FeatureCache, first: int, last: int) -> dict[str, np.ndarray]:
    positions, latents, values = [], [], []
    for begin, indptr, position, value in cache.entries(first, last):
        keep = value > THRESHOLD
        local = np.repeat(np.arange(len(indptr) - 1) + (begin - first), np.diff(indptr))
        positions.append(position[keep].astype(np.int64))
        latents.append(local[keep])
        values.append(np.minimum(value[keep], FP16_MAX).astype(np.float16))
    position, latent = np.concatenate(positions), np.concatenate(latents)
    order = np.argsort(position, kind="stable")  # latents ascend within a position, as torch.nonzero gives them
    locations = np.stack([*np.divmod(position[order], cache.manifest.context_size), latent[order]], axis=1)
    return {
        "locations": locations.astype(np.uint16 if locations.max(initial=0) < 2**16 else np.uint32),
        "activations": np.concatenate(values)[order],
        "tokens": cache.tokens.astype(np.int64).reshape(-1, cache.manifest.context_size),
    }


# --- datasets --------------------------------------------------------------------------------------------------------


def export_rows(
    cache: str | Path,
    out: str | Path,
    *,
    latents: tuple[int, int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a finished cache as datasets in the folder `out`, for latents first to last (inclusive; default all).

    Raises: UsageError for an unfinished cache, latents that do not exist, and when the folder holds another run.
    """
    opened, out = FeatureCache.open(cache), Path(out)
    manifest = opened.manifest
    first, last = manifest.latent_bounds(latents)
    spec = {"manifest": manifest.identity(), "latents": [first, last]}
    with claimed(out, "datasets export", spec, resume=resume, overwrite=overwrite):
        tables = (_documents(opened), _windows(opened), _latents(opened, first, last))
        for name, batches in zip(("documents", "windows", "latents"), tables, strict=True):
            if not (out / name).is_dir():
                _write_dataset(out / name, batches)
        manifest.save(out)
        return out


def _write_dataset(folder: Path, batches: Iterator[Any]) -> None:
    """Write tables one after the other as one dataset on disk, with one of them in memory at a time."""
    import pyarrow as pa
    from datasets import Dataset

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as scratch:
        file = Path(scratch) / "rows.arrow"
        writer = None
        for table in progress(folder.name, batches, unit="batch"):
            writer = writer or pa.ipc.new_stream(str(file), table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        with atomic_path(folder) as temporary:
            Dataset.from_file(str(file)).save_to_disk(str(temporary))


def _latents(cache: FeatureCache, first: int, last: int) -> Iterator[Any]:
    for begin, indptr, position, value in cache.entries(first, last):
        rows = cache.table.slice(begin, len(indptr) - 1).combine_chunks()
        rows = rows.append_column("positions", arrow(position, indptr))
        yield rows.append_column("values", arrow(value, indptr))


def _windows(cache: FeatureCache) -> Iterator[Any]:
    import pyarrow as pa

    for shard in cache.manifest.shards:
        arrays = cache.shard_tokens(shard.index)
        shape = (shard.n_windows, cache.manifest.context_size)
        yield pa.table({name: arrow(arrays[name].astype(np.uint32).reshape(shape)) for name in PER_TOKEN})


def _documents(cache: FeatureCache) -> Iterator[Any]:
    import pyarrow as pa

    first = 0
    for shard in cache.manifest.shards:
        texts = [cache.document(first + own) for own in range(shard.n_documents)]
        first += len(texts)
        columns = {name: pa.array([getattr(text, name) for text in texts], pa.large_string()) for name in TEXTS}
        yield pa.table({**columns, "shard": pa.array(np.full(len(texts), shard.index, dtype=np.uint32))})

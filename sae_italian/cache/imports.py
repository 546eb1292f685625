"""A cache made of activations that were computed elsewhere: they become shards, and the usual passes do the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from tqdm import tqdm

from sae_italian.base.storage import claim_folder, locked, remove, sha256_file
from sae_italian.cache.build import KIND, WINDOWS_PER_SHARD, in_this_process
from sae_italian.cache.build import _transpose as transpose
from sae_italian.cache.encode import Sparse, write_activations
from sae_italian.cache.layout import MANIFEST, STATS, Manifest, acts_file, smallest_uint, write_arrays
from sae_italian.cache.tokens import write_token_shard
from sae_italian.corpora import PackedBlock


class Part(NamedTuple):
    """Some of the activations, in any order: of some latents over the whole text."""

    position: Int[np.ndarray, " nnz"]
    latent: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]  # positive


def import_cache(
    out: Path,
    manifest: Manifest,
    blocks: Callable[[], Iterable[PackedBlock]],
    parts: Callable[[], Iterable[Part]],
    statistics: Callable[[Path, Manifest], None],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the cache that `manifest` describes in `out` and return it; one part or one shard is in memory at a time.

    `blocks` gives the text, `windows_per_shard` windows each, and `statistics` writes the table of statistics.
    Raises: UsageError when `out` holds another run or is being written.
    """
    with locked([out]):
        earlier = claim_folder(out, KIND, manifest.identity(), resume=resume, overwrite=overwrite)
        if earlier and (out / MANIFEST).is_file():
            manifest = Manifest.load(out)
        if manifest.complete:
            return out
        if not manifest.tokens_complete:
            blocks_left = tqdm(blocks(), desc="tokens", unit="shard", disable=None)
            manifest.shards = [write_token_shard(out, index, block) for index, block in enumerate(blocks_left)]
            manifest.tokens_complete = True
            manifest.save(out)
        _write_activations(out, manifest, parts)
        transpose(out, manifest, in_this_process)
        statistics(out, manifest)
        manifest.stats_sha256 = sha256_file(out / STATS)
        manifest.complete = True
        manifest.save(out)
        remove(out / "runs")
    return out


def windows_per_shard(context_size: int) -> int:
    return max(1, min(WINDOWS_PER_SHARD, 2**17 // context_size))


def _write_activations(out: Path, manifest: Manifest, parts: Callable[[], Iterable[Part]]) -> None:
    """Sort every part by position into a file of its own, then take from all of them shard after shard."""
    if all(shard.encoded for shard in manifest.shards):
        return
    edges = np.cumsum([0, *(shard.n_windows * manifest.context_size for shard in manifest.shards)])
    pointers = [
        _write_sorted(out, number, part, edges)
        for number, part in enumerate(tqdm(parts(), desc="activations", unit="part", disable=None))
    ]
    for shard in tqdm(manifest.shards, desc="shards", unit="shard", disable=None):
        taken = list(_of_shard(out, pointers, shard.index))
        position = np.concatenate([part.position for part in taken]).astype(np.int64) - edges[shard.index]
        latent = np.concatenate([part.latent for part in taken]).astype(np.int64)
        order = np.lexsort((latent, position))
        counts = np.bincount(position, minlength=shard.n_windows * manifest.context_size)
        value = np.concatenate([part.value for part in taken])[order]
        record = write_activations(out, shard.index, Sparse(counts, latent[order], value), manifest.d_sae)
        shard.nnz, shard.n_wide = record.nnz, record.n_wide
        shard.sha256[acts_file(shard.index)] = record.sha256
    manifest.save(out)


def _part_file(number: int) -> str:
    return f"runs/part_{number:05d}.safetensors"


def _write_sorted(out: Path, number: int, part: Part, edges: np.ndarray) -> Int[np.ndarray, " shards+1"]:
    """Write one part in the order of the text; return where each shard begins in it."""
    order = np.argsort(part.position, kind="stable")
    arrays = {
        "position": part.position[order].astype(np.uint64),
        "latent": part.latent[order].astype(smallest_uint(int(part.latent.max(initial=0)))),
        "value": part.value[order].astype(np.float32),
    }
    write_arrays(out, _part_file(number), arrays)
    return np.searchsorted(arrays["position"], edges)


def _of_shard(out: Path, pointers: list[np.ndarray], shard: int) -> Iterator[Part]:
    for number, pointer in enumerate(pointers):
        here = slice(int(pointer[shard]), int(pointer[shard + 1]))
        with safe_open(out / _part_file(number), framework="numpy") as handle:
            if here.start == here.stop:
                yield Part(np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.float32))
                continue
            yield Part(*(handle.get_slice(name)[here] for name in Part._fields))

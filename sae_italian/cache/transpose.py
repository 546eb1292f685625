"""The third pass of a build: from token-major shards to latent-major files, by external counting sort.

Each shard is sorted by latent on its own while it is in memory (its run). A range of latents then takes its slice of
every run: one pass over the runs in all, one range in memory at a time. `transpose_range` is a unit of work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_matrix

from sae_italian.cache.layout import LatentRange, Manifest, map_arrays, shard_file, smallest_uint, write_arrays

LATENTS_PER_RANGE = 512
NON_ZEROS_PER_RANGE = 2**22  # unless one latent alone has more; the statistics need about 70 bytes of memory for each


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

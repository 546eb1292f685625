"""The third pass of a build: from token-major shards to latent-major files, by external counting sort.

Each shard is sorted by latent on its own while it is in memory (its run). A range of latents then takes its slice of
every run: one pass over the runs in all, one range in memory at a time. `transpose_range` is a unit of work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from scipy.sparse import csr_matrix

from sae_italian.base.errors import DataError
from sae_italian.cache.layout import (
    LatentRange,
    Manifest,
    acts_file,
    latents_file,
    position_dtype,
    read_arrays,
    run_file,
    smallest_uint,
    write_arrays,
)

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
    write_arrays(folder, run_file(index), run)


def write_missing_runs(folder: Path, manifest: Manifest) -> None:
    """Sort the shards that have no run yet, as when their activations came from elsewhere."""
    for shard in manifest.shards:
        if not (folder / run_file(shard.index)).is_file():
            write_run(folder, shard.index, read_arrays(folder, acts_file(shard.index)), manifest.d_sae)


def plan_ranges(folder: Path, manifest: Manifest) -> list[tuple[int, int]]:
    """Return (first, last) of every range: at most LATENTS_PER_RANGE latents and NON_ZEROS_PER_RANGE entries."""
    counts = np.zeros(manifest.d_sae, dtype=np.int64)
    for shard in manifest.shards:
        counts += np.diff(read_arrays(folder, run_file(shard.index), ("indptr",))["indptr"]).astype(np.int64)
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
    pointers = np.stack(
        [_pointers(folder, shard.index, first, last) for shard in manifest.shards]
    )  # [shards, latents+1]
    counts = np.diff(pointers, axis=1)
    indptr = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    nnz = int(indptr[-1])
    position = np.empty(nnz, dtype=position_dtype(manifest.n_positions))
    value = np.empty(nnz, dtype=np.float16)
    wide: list[tuple[np.ndarray, np.ndarray]] = []
    before = np.cumsum(counts, axis=0) - counts  # of the same latent, in earlier shards
    base = 0
    for shard, own, number, earlier in zip(manifest.shards, pointers, counts, before, strict=True):
        to = places(indptr[:-1] + earlier, number)
        rows, values, wide_at, wide_value = _slice(folder, shard.index, int(own[0]), int(own[-1]))
        position[to] = rows.astype(position.dtype) + position.dtype.type(base)
        value[to] = values
        wide.append((to[wide_at], wide_value))
        base += shard.n_windows * manifest.context_size
    at = np.concatenate([pair[0] for pair in wide])
    order = np.argsort(at)
    arrays = {
        "indptr": indptr.astype(np.uint64),
        "position": position,
        "value": value,
        "wide_at": at[order].astype(np.uint64),
        "wide_value": np.concatenate([pair[1] for pair in wide])[order],
    }
    return LatentRange(first=first, last=last, nnz=nnz, sha256=write_arrays(folder, latents_file(first, last), arrays))


def places(starts: Int[np.ndarray, " latents"], counts: Int[np.ndarray, " latents"]) -> Int[np.ndarray, " entries"]:
    """Return starts[i], starts[i] + 1, ... (counts[i] of them) for every i, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _pointers(folder: Path, shard: int, first: int, last: int) -> Int[np.ndarray, " latents+1"]:
    try:
        with safe_open(folder / run_file(shard), framework="numpy") as handle:
            return handle.get_slice("indptr")[first : last + 2].astype(np.int64)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / run_file(shard)} cannot be read ({error}). Build the cache again.") from error


def _slice(folder: Path, shard: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return row and value of entries begin to end of a run, and the places (from begin) and values beyond fp16."""
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    if begin == end:
        return np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.float16), *nothing
    try:
        with safe_open(folder / run_file(shard), framework="numpy") as handle:
            row, value = (handle.get_slice(name)[begin:end] for name in ("row", "value"))
            if "wide_at" not in handle.keys():  # noqa: SIM118
                return row, value, *nothing
            at = handle.get_tensor("wide_at").astype(np.int64)
            here = (at >= begin) & (at < end)
            return row, value, at[here] - begin, handle.get_tensor("wide_value")[here]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / run_file(shard)} cannot be read ({error}). Build the cache again.") from error

"""A cache as Hugging Face datasets, one row per latent, and such datasets as a cache again.

    <folder>/latents      one row per latent: latent, positions, values (float32) and every statistic of the cache
    <folder>/windows      one row per window: tokens, doc, start, end (document and character span of each token)
    <folder>/documents    one row per document: text, doc_id, source, shard
    <folder>/manifest.json    what the cache was built from

Each of the three is read with `datasets.load_from_disk`. A position is `window * context_size + place in the window`.
Nothing is lost: a cache made of an export of all latents has the bytes of the first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import atomic_path, claim_folder
from sae_italian.cache.delphi import entries, finished, latent_bounds
from sae_italian.cache.imports import Part, import_cache
from sae_italian.cache.layout import MANIFEST, STATS, Manifest, read_arrays, tokens_file
from sae_italian.corpora import PackedBlock, TextDocument

LATENTS, WINDOWS, DOCUMENTS = "latents", "windows", "documents"
PER_TOKEN = ("tokens", "doc", "start", "end")
TEXTS = ("text", "doc_id", "source")
NON_ZEROS_PER_BATCH = 2**22


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
    cache, out = Path(cache), Path(out)
    manifest = finished(cache)
    first, last = latent_bounds(manifest, latents)
    spec = {"manifest": manifest.identity(), "latents": [first, last]}
    claim_folder(out, "datasets export", spec, resume=resume, overwrite=overwrite)
    for name, batches in (
        (DOCUMENTS, lambda: _documents(cache, manifest)),
        (WINDOWS, lambda: _windows(cache, manifest)),
        (LATENTS, lambda: _latents(cache, manifest, first, last)),
    ):
        if not (out / name).is_dir():
            _write_dataset(out / name, batches)
    manifest.save(out)
    return out


def _write_dataset(folder: Path, batches: Callable[[], Iterator[Any]]) -> None:
    """Write tables one after the other as one dataset on disk, with one of them in memory at a time."""
    import pyarrow as pa
    from datasets import Dataset

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as scratch:
        file = Path(scratch) / "rows.arrow"
        writer = None
        for table in tqdm(batches(), desc=folder.name, unit="batch", disable=None):
            writer = writer or pa.ipc.new_stream(str(file), table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        with atomic_path(folder) as temporary:
            Dataset.from_file(str(file)).save_to_disk(str(temporary))


def _latents(cache: Path, manifest: Manifest, first: int, last: int) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    statistics = parquet.read_table(cache / STATS)
    for begin, indptr, position, value in entries(cache, manifest, first, last):
        for start, stop in _batches(indptr):
            here = slice(int(indptr[start]), int(indptr[stop]))
            pointers = indptr[start : stop + 1] - indptr[start]
            rows = statistics.slice(begin + start, stop - start).combine_chunks()
            rows = rows.append_column("positions", _lists(pointers, position[here]))
            yield rows.append_column("values", _lists(pointers, value[here]))


def _batches(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive rows with at most NON_ZEROS_PER_BATCH entries, or one row."""
    start, n_rows = 0, len(indptr) - 1
    while start < n_rows:
        fitting = int(np.searchsorted(indptr, indptr[start] + NON_ZEROS_PER_BATCH, side="right")) - 1
        stop = min(n_rows, max(start + 1, fitting))
        yield start, stop
        start = stop


def _lists(pointers: np.ndarray, values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(pointers.astype(np.int32)), pa.array(values))


def _windows(cache: Path, manifest: Manifest) -> Iterator[Any]:
    import pyarrow as pa

    for shard in manifest.shards:
        arrays = read_arrays(cache, tokens_file(shard.index), PER_TOKEN)
        pointers = np.arange(shard.n_windows + 1) * manifest.context_size
        yield pa.table({name: _lists(pointers, arrays[name].ravel().astype(np.uint32)) for name in PER_TOKEN})


def _documents(cache: Path, manifest: Manifest) -> Iterator[Any]:
    import pyarrow as pa

    for shard in manifest.shards:
        arrays = read_arrays(cache, tokens_file(shard.index))
        columns: dict[str, Any] = {name: pa.array(_strings(arrays, name), pa.large_string()) for name in TEXTS}
        yield pa.table({**columns, "shard": pa.array(np.full(shard.n_documents, shard.index, dtype=np.uint32))})


def _strings(arrays: dict[str, np.ndarray], name: str) -> list[str]:
    data, pointers = arrays[name].tobytes(), arrays[f"{name}_ptr"].tolist()
    return [data[begin:end].decode("utf-8", "replace") for begin, end in zip(pointers[:-1], pointers[1:], strict=True)]


# --- and back --------------------------------------------------------------------------------------------------------


def import_rows(source: str | Path, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a cache in the folder `out` of what `export_rows` wrote for all latents.

    Raises: UsageError when `source` holds something else or not all latents, DataError naming what is damaged.
    """
    source, out = Path(source), Path(out)
    if not (source / MANIFEST).is_file():
        raise UsageError(f"{source} is no export of a cache: {MANIFEST} is missing. Give the folder that holds it.")
    made_from = Manifest.load(source)
    progress = {"shards": [], "ranges": [], "tokens_complete": False, "stats_sha256": "", "complete": False}
    manifest = made_from.model_copy(update=progress, deep=True)
    latents, windows, documents = (_load(source / name) for name in (LATENTS, WINDOWS, DOCUMENTS))
    if len(latents) != manifest.d_sae or latents.data["latent"].to_numpy().tolist() != list(range(manifest.d_sae)):
        raise UsageError(
            f"{source / LATENTS} has {len(latents)} rows, the SAE {manifest.d_sae} latents: a cache needs all of them, "
            "in order. Export without --latents."
        )
    if len(windows) != made_from.n_windows or len(documents) != made_from.n_documents:
        raise DataError(
            f"{source} holds {len(windows)} windows and {len(documents)} documents, its {MANIFEST} says "
            f"{made_from.n_windows} and {made_from.n_documents}. Export again."
        )
    return import_cache(
        out,
        manifest,
        lambda: _blocks(made_from, windows, documents),
        lambda: _parts(latents, made_from),
        lambda folder, _: _write_statistics(folder, latents),
        resume=resume,
        overwrite=overwrite,
    )


def _load(folder: Path) -> Any:
    from datasets import load_from_disk

    expected = {LATENTS: ("latent", "positions", "values"), WINDOWS: PER_TOKEN, DOCUMENTS: (*TEXTS, "shard")}
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} cannot be read as a dataset ({str(error).splitlines()[0]}). Export again."
        ) from error
    missing = [name for name in expected[folder.name] if name not in dataset.column_names]
    if missing:
        raise DataError(f"{folder} has no column {missing[0]!r}. Columns: {', '.join(dataset.column_names)}.")
    return dataset.with_format("arrow")


def _blocks(manifest: Manifest, windows: Any, documents: Any) -> Iterator[PackedBlock]:
    first_window = first_doc = 0
    for shard in manifest.shards:
        table = windows[first_window : first_window + shard.n_windows]
        shape = (shard.n_windows, manifest.context_size)
        arrays: dict[str, np.ndarray] = {}
        for name in PER_TOKEN:
            flat = table[name].combine_chunks().flatten().to_numpy()
            if flat.size != shape[0] * shape[1]:
                raise DataError(f"column {name!r} of the windows of shard {shard.index} is not {list(shape)}.")
            arrays[name] = flat.reshape(shape).astype(np.int64)
        rows = documents[first_doc : first_doc + shard.n_documents]
        texts = [TextDocument(*values) for values in zip(*(rows[name].to_pylist() for name in TEXTS), strict=True)]
        yield PackedBlock(**arrays, documents=texts, first_doc=first_doc)
        first_window, first_doc = first_window + shard.n_windows, first_doc + shard.n_documents


def _parts(latents: Any, manifest: Manifest) -> Iterator[Part]:
    counts = np.concatenate([[0], np.cumsum(latents.data["count"].to_numpy())]).astype(np.int64)
    for start, stop in _batches(counts):
        table = latents[start:stop]
        lists, values = (table[name].combine_chunks() for name in ("positions", "values"))
        sizes = np.diff(lists.offsets.to_numpy())
        position, value = lists.flatten().to_numpy(), values.flatten().to_numpy()
        wrong = len(position) != len(value) or not (np.isfinite(value) & (value > 0)).all()
        if wrong or (len(position) and int(position.max()) >= manifest.n_positions):
            raise DataError(
                f"latents {start} to {stop - 1}: positions below {manifest.n_positions} with as many positive values "
                "were expected. Export again."
            )
        yield Part(position.astype(np.int64), np.repeat(np.arange(start, stop), sizes), value)


def _write_statistics(folder: Path, latents: Any) -> None:
    import pyarrow.parquet as parquet

    with atomic_path(folder / STATS) as temporary:
        table = latents.data.table.drop_columns(["positions", "values"]).replace_schema_metadata(None)
        parquet.write_table(table, temporary, compression="zstd")

"""A cache for other programs, Delphi's own format and Hugging Face datasets, and a Delphi cache read into one.

What Delphi does not keep, an import cannot give back.

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

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from scipy.sparse import csr_array, vstack

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, claimed, fingerprint, package_versions, path_of, read_json, write_text
from sae_italian.cache.build import as_they_come, claimed_cache, default_windows, finish_cache, sae_facts
from sae_italian.cache.layout import FP16_MAX, Csr, Manifest, map_arrays, tokenizer_hash, write_arrays
from sae_italian.cache.read import FeatureCache
from sae_italian.cache.shards import decoded_blocks, write_activations, write_token_shard
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
    bounds = split_bounds(first, last, default if n_splits is None else n_splits)
    folder = path_of(out) / (hookpoint or _spelled(manifest.hook_name, "llama_path"))
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


def _spelled(hook_name: str, form: Literal["name", "llama_path"]) -> str:
    """Return our name of a hook, or Delphi's (`layers.5` or `layers.5.mlp`); an unknown name as it is."""
    try:
        return getattr(parse_hook_name(hook_name), form)
    except UsageError:
        return hook_name


def split_bounds(first: int, last: int, n_splits: int) -> list[tuple[int, int]]:
    """Return Delphi's division of latents first to last: `torch.linspace(...).long()`, ends inclusive."""
    width = last - first + 1
    if not 1 <= n_splits <= width:
        raise UsageError(f"splits={n_splits}: {width} latents can be divided into 1 to {width} splits.")
    edges = (torch.linspace(0, width, steps=n_splits + 1).long() + first).tolist()
    return [(begin, end - 1) for begin, end in pairwise(edges)]


def _split(cache: FeatureCache, first: int, last: int) -> dict[str, np.ndarray]:
    acts: Any = vstack([acts for _, acts in cache.entries(first, last)]).tocsc().tocoo()  # by token, latents ascending
    keep = acts.data > THRESHOLD
    locations = np.stack([*np.divmod(acts.col, cache.manifest.context_size), acts.row], axis=1)[keep]
    return {
        "locations": locations.astype(np.uint16 if locations.max(initial=0) < 2**16 else np.uint32),
        "activations": np.minimum(acts.data[keep], FP16_MAX).astype(np.float16),
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
    opened, out = FeatureCache.open(cache), path_of(out)
    manifest = opened.manifest
    bounds = manifest.latent_bounds(latents)
    spec = {"manifest": manifest.identity(), "latents": list(bounds)}
    with claimed(out, "datasets export", spec, resume=resume, overwrite=overwrite):
        tables = {"documents": _documents(opened), "windows": _windows(opened), "latents": _latents(opened, *bounds)}
        for name, batches in tables.items():
            if not (out / name).is_dir():
                _write_dataset(out / name, batches)
        manifest.save(out)
        return out


def _write_dataset(folder: Path, batches: Iterator[Any]) -> None:
    """Write tables one after the other as one dataset on disk, with one of them in memory at a time."""
    from datasets import Dataset

    # a file, no folder: one that is still mapped would keep its folder on NFS
    file, first = folder.with_name(f".{folder.name}.arrow.tmp"), next(batches)
    with pa.ipc.new_stream(str(file), first.schema) as writer:
        for table in progress(folder.name, chain([first], batches), unit="batch"):
            writer.write_table(table)
    with atomic_path(folder) as temporary:
        Dataset.from_file(str(file)).save_to_disk(str(temporary))
    file.unlink()


def _latents(cache: FeatureCache, first: int, last: int) -> Iterator[Any]:
    for begin, acts in cache.entries(first, last):
        rows = cache.table.slice(begin, acts.shape[0]).combine_chunks()
        rows = rows.append_column("positions", arrow(acts.indices.astype(np.uint32), acts.indptr))
        yield rows.append_column("values", arrow(acts.data, acts.indptr))


def _windows(cache: FeatureCache) -> Iterator[Any]:
    for shard in cache.manifest.shards:
        arrays = cache.shard_tokens(shard.index)
        yield pa.table({name: arrow(arrays[name].astype("u4").reshape(shard.n_windows, -1)) for name in PER_TOKEN})


def _documents(cache: FeatureCache) -> Iterator[Any]:
    documents = map(cache.document, range(cache.n_documents))
    for shard in cache.manifest.shards:
        texts = list(islice(documents, shard.n_documents))
        columns = {name: pa.array([getattr(text, name) for text in texts], pa.large_string()) for name in TEXTS}
        yield pa.table({**columns, "shard": pa.array(np.full(len(texts), shard.index, dtype=np.uint32))})


# --- a Delphi cache, read --------------------------------------------------------------------------------------------


LOST = (
    "documents: Delphi keeps none, so every stretch of text between special tokens of a window stands as "
    "a document, and no split by document is a true one",
    "activations at or below 1e-5",
    "the corpus's revision, and for values beyond fp16 their size",
)
NO_TEXT = "text and offsets: give --model, whose tokenizer decodes the windows"
NO_SAE = "the SAE's weights hash, decoder neighbours and promoted tokens: give --sae and --model"


class Imported(NamedTuple):
    """The cache, and what is not in it that was in the run it comes from, one line each."""

    folder: Path
    lost: list[str]


class DelphiSplit:
    """One file of a Delphi cache, mapped: latents first to last (inclusive) over the whole text."""

    def __init__(self, file: Path):
        named = re.fullmatch("([0-9]+)_([0-9]+)", file.stem)
        if named is None:
            raise DataError(f"{file} is no split of a Delphi cache: FIRST_LAST.safetensors was expected.")
        self.file, self.first, self.last = file, int(named[1]), int(named[2])

    def load(self, name: str, kinds: tuple[str, ...]) -> np.ndarray:
        """Return one array. Raises DataError naming the file when it cannot be read or has another type."""
        arrays = map_arrays(self.file, "Copy it again from where it was made.")
        if name not in arrays:
            hint = " Save it again with save_tokens=True." if name == "tokens" else ""
            raise DataError(f"{self.file} holds no {name}.{hint}")
        if arrays[name].dtype.name not in kinds:
            raise DataError(f"{self.file}: {name} is {arrays[name].dtype.name}, {' or '.join(kinds)} was expected.")
        return arrays[name]

    def check(self, n_windows: int, context: int, windows_per_shard: int) -> None:
        """Read locations and values, and find where each shard begins.

        Raises: DataError for what lies outside of the tokens or the split, and for another order than the text's.
        """
        self.locations = self.load("locations", ("uint16", "uint32", "int32", "int64"))
        self.values = self.load("activations", ("float16", "float32"))
        found = self.locations.shape
        if self.values.ndim != 1 or found != (len(self.values), 3):
            raise DataError(f"{self.file}: locations {list(found)} do not fit {list(self.values.shape)} activations.")
        limits, largest = (n_windows, context, self.last - self.first + 1), self.locations.max(axis=0, initial=0)
        if self.locations.min(initial=0) < 0 or (largest >= limits).any():
            raise DataError(
                f"{self.file}: locations reach {largest.tolist()}, beyond {limits[0]} windows of "
                f"{limits[1]} tokens and {limits[2]} latents."
            )
        if n_nan := int(np.isnan(self.values).sum()):
            raise DataError(f"{self.file}: {n_nan} activations are NaN.")
        window = self.locations[:, 0].astype(np.int64)
        if (np.diff(window) < 0).any():
            raise DataError(f"{self.file}: its locations are not in the order of the text, as Delphi writes them.")
        self.edges = np.searchsorted(window, np.arange(0, n_windows + windows_per_shard, windows_per_shard)).tolist()


def import_delphi(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: Any = None,
    sae: Any = None,
    sae_name: str = "",
    model: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Imported:
    """Read the cache of one hookpoint (the folder with its splits and config.json) into the folder `out`.

    With `tokenizer` (or `model`, which has one) text and offsets are rebuilt by decoding whole windows; without, tokens
    have no text. With `sae` and `model` the statistics hold decoder neighbours and promoted tokens.
    Raises: UsageError when `source` is no Delphi cache or does not fit; DataError naming a damaged or mismatched file.
    """
    source, out = path_of(source), path_of(out)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    splits, config = find_splits(source), _config(source)
    tokens, d_sae = _tokens(splits, config, source), splits[-1].last + 1
    if sae is not None and sae.cfg.d_sae != d_sae:
        raise UsageError(f"{source} holds {d_sae} latents, the SAE {sae.cfg.d_sae}: it is another SAE.")
    manifest = _manifest(source, config, tokens, d_sae, sae, sae_name, tokenizer)
    (n_windows, context), size = tokens.shape, manifest.windows_per_shard
    for split in splits:
        split.check(n_windows, context, size)
    with claimed_cache(out, manifest, resume=resume, overwrite=overwrite) as manifest:
        if not manifest.tokens_complete:
            parts = (tokens[first : first + size] for first in range(0, n_windows, size))
            blocks = enumerate(decoded_blocks(parts, tokenizer))
            manifest.shards = [write_token_shard(out, index, block) for index, block in blocks]
            manifest.tokens_complete = True
            manifest.save(out)
        missing = [shard for shard in manifest.shards if not shard.encoded]
        written = (write_activations(out, shard, _shard(splits, manifest, shard.index)) for shard in missing)
        for record in as_they_come(written, "activations", "shard", len(missing), {out: manifest}):
            manifest.shards[record.index] = record
        if not manifest.complete:
            finish_cache(out, manifest, sae, model)
    lost = [*LOST, *[NO_TEXT] * (tokenizer is None), *[NO_SAE] * (sae is None)]
    if n_silent := sum(int((split.values <= 0).sum()) for split in splits):
        lost.append(f"{n_silent:,} activations that are not positive")
    if n_infinite := sum(int(np.isposinf(split.values).sum()) for split in splits):
        lost.append(f"the size of {n_infinite:,} infinite activations, which stand as {FP16_MAX:.0f}")
    return Imported(out, lost)


def find_splits(source: Path) -> list[DelphiSplit]:
    """Return the splits in order. Raises UsageError when there are none, DataError when latents are missing."""
    files = source.glob("*.safetensors") if source.is_dir() else ()
    splits = sorted((DelphiSplit(file) for file in files), key=lambda split: split.first)
    if not splits:
        raise UsageError(
            f"{source} holds no split of a Delphi cache (FIRST_LAST.safetensors). Give the folder of one "
            "hookpoint, such as results/NAME/latents/layers.5."
        )
    for split, first in zip(splits, [0, *(each.last + 1 for each in splits)], strict=False):
        if split.first != first or split.last < first:
            raise DataError(f"{source}: latent {first} should begin a split, {split.file.name} comes next.")
    return splits


def _config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if not file.is_file():
        raise DataError(f"{file} is missing: Delphi writes one beside the splits, with the model's name.")
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_name"), str):
        raise DataError(f"{file} is damaged: an object with model_name was expected.")
    return config


def _tokens(splits: list[DelphiSplit], config: dict[str, Any], source: Path) -> Int[np.ndarray, "windows context"]:
    """Return the windows, the same in every split."""
    tokens, *others = (split.load("tokens", ("int64", "int32", "uint32", "uint16")) for split in splits)
    for split, theirs in zip(splits[1:], others, strict=True):
        if not np.array_equal(theirs, tokens):
            raise DataError(f"{split.file}: its tokens differ from those of {splits[0].file.name}.")
    if tokens.ndim != 2 or not tokens.size or tokens.min() < 0:
        raise DataError(f"{splits[0].file}: tokens of shape {list(tokens.shape)}; [windows, context] was expected.")
    said = config.get("cache_ctx_len", config.get("ctx_len"))
    if said not in (None, tokens.shape[1]):
        raise DataError(f"{source / 'config.json'} says a context of {said}, the splits have {tokens.shape[1]} tokens.")
    return tokens


def _shard(splits: list[DelphiSplit], manifest: Manifest, index: int) -> Csr:
    """Return a shard's positive activations [tokens, d_sae] out of all splits."""
    parts = [(split, slice(*split.edges[index : index + 2])) for split in splits]
    value = np.concatenate([split.values[here].astype(np.float32) for split, here in parts])
    locations = [split.locations[here].astype(np.int64) + (0, 0, split.first) for split, here in parts]
    window, place, latent = np.concatenate(locations)[value > 0].T
    position = (window - index * manifest.windows_per_shard) * manifest.context_size + place
    value = np.where(np.isposinf(value), np.float32(FP16_MAX), value)[value > 0]
    shape = manifest.shards[index].n_windows * manifest.context_size, manifest.d_sae
    return csr_array((value, (position, latent)), shape)


def _manifest(
    source: Path, config: dict[str, Any], tokens: np.ndarray, d_sae: int, sae: Any, sae_name: str, tokenizer: Any
) -> Manifest:
    said = {"tokens": hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest(), "config": config}
    facts = {"sae_hash": "", "d_in": 0, "d_sae": d_sae, "k": None} if sae is None else sae_facts(sae)
    return Manifest(
        **{**facts, "model": config["model_name"], "hook_name": _spelled(source.name, "name")},
        sae=sae_name or f"Delphi's cache {source.resolve()}",
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "",
        corpus=str(config.get("dataset_repo", "")),
        corpus_hash=fingerprint(said),
        text_column=str(config.get("dataset_column", "text")),
        split=str(config.get("dataset_split", "all")),
        n_tokens_asked=tokens.size,
        context_size=tokens.shape[1],
        windows_per_shard=default_windows(tokens.shape[1]),
        versions=package_versions(),
    )

"""A Delphi cache (see exports.py) read into a feature cache. What Delphi does not keep, an import cannot give back."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import fingerprint, package_versions, read_json
from sae_italian.cache.build import as_they_come, claimed_cache, default_windows, finish_cache, sae_facts
from sae_italian.cache.decoded import decoded_blocks
from sae_italian.cache.layout import FP16_MAX, Manifest, map_arrays, tokenizer_hash
from sae_italian.cache.shards import Sparse, write_activations, write_token_shard
from sae_italian.models.hooks import parse_hook_name

LOST = (
    "documents: Delphi keeps none, so every stretch of text between special tokens of a window stands as a document, "
    "and no split by document is a true one",
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
    source, out = Path(source), Path(out)
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
        missing = [shard.index for shard in manifest.shards if not shard.encoded]
        written = (write_activations(out, n, _shard(splits, manifest, n), d_sae) for n in missing)
        for record in as_they_come(written, "activations", "shard", len(missing), {out: manifest}):
            record.enter(manifest.shards[record.index])
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
            f"{source} holds no split of a Delphi cache (FIRST_LAST.safetensors). Give the folder of one hookpoint, "
            "such as results/NAME/latents/layers.5."
        )
    expected = 0
    for split in splits:
        if split.first != expected or split.last < split.first:
            raise DataError(f"{source}: latent {expected} should begin a split, {split.file.name} comes next.")
        expected = split.last + 1
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


def _shard(splits: list[DelphiSplit], manifest: Manifest, index: int) -> Sparse:
    """Return a shard's positive activations out of all splits, token by token."""
    parts = [(split, slice(*split.edges[index : index + 2])) for split in splits]
    value = np.concatenate([split.values[here].astype(np.float32) for split, here in parts])
    locations = [split.locations[here].astype(np.int64) + (0, 0, split.first) for split, here in parts]
    window, place, latent = np.concatenate(locations)[value > 0].T
    value = np.where(np.isposinf(value), np.float32(FP16_MAX), value)[value > 0]
    position = (window - index * manifest.windows_per_shard) * manifest.context_size + place
    order = np.lexsort((latent, position))
    counts = np.bincount(position, minlength=manifest.shards[index].n_windows * manifest.context_size)
    return Sparse(counts, latent[order], value[order])


def _manifest(
    source: Path, config: dict[str, Any], tokens: np.ndarray, d_sae: int, sae: Any, sae_name: str, tokenizer: Any
) -> Manifest:
    try:
        hook_name = parse_hook_name(source.name).name
    except UsageError:
        hook_name = source.name
    said = {"tokens": hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest(), "config": config}
    facts = {"sae_hash": "", "d_in": 0, "d_sae": d_sae, "k": None} if sae is None else sae_facts(sae)
    return Manifest(
        **{**facts, "model": config["model_name"], "hook_name": hook_name},
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

"""A Delphi cache read into a feature cache. What Delphi does not keep, an import cannot give back, and says so."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import fingerprint, package_versions
from sae_italian.cache.build import config_hash, tokenizer_hash
from sae_italian.cache.decode import decoded_blocks, plain_blocks
from sae_italian.cache.imports import Part, import_cache, windows_per_shard
from sae_italian.cache.layout import FP16_MAX, Manifest
from sae_italian.cache.stats import write_statistics
from sae_italian.models.hooks import parse_hook_name
from sae_italian.saes import weights_hash

LOST = (
    "documents: Delphi keeps none, so every stretch of text between special tokens of a window stands as a document, "
    "and no split by document is a true one",
    "activations at or below 1e-5",
    "the corpus's revision, and for values beyond fp16 their size",
)


class Imported(NamedTuple):
    """The cache, and what is not in it that was in the run it comes from, one line each."""

    folder: Path
    lost: list[str]


class Split(NamedTuple):
    """One file of a Delphi cache; `last` is inclusive."""

    file: Path
    first: int
    last: int


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
    tokens = _tokens(splits, config, source)
    if tokenizer is not None and int(tokens.max(initial=0)) >= len(tokenizer):
        raise UsageError(
            f"{source} holds token {int(tokens.max())}, the tokenizer has {len(tokenizer)}: it is another model's. "
            f"Give that of {config['model_name']}."
        )
    d_sae = splits[-1].last + 1
    if sae is not None and sae.cfg.d_sae != d_sae:
        raise UsageError(f"{source} holds {d_sae} latents, the SAE {sae.cfg.d_sae}: it is another SAE.")
    manifest = _manifest(source, config, tokens, d_sae, sae, sae_name, tokenizer)
    blocks = partial(decoded_blocks, tokenizer=tokenizer) if tokenizer is not None else plain_blocks
    left_out = {"negative": 0, "infinite": 0}
    import_cache(
        out,
        manifest,
        lambda: blocks(tokens, manifest.windows_per_shard),
        lambda: (_part(split, tokens.shape, left_out) for split in splits),
        lambda folder, finished: write_statistics(folder, finished, sae, model),
        resume=resume,
        overwrite=overwrite,
    )
    return Imported(out, _lost(left_out, sae, tokenizer))


def _lost(left_out: dict[str, int], sae: Any, tokenizer: Any) -> list[str]:
    lost: list[str] = list(LOST)
    if tokenizer is None:
        lost.append("text and offsets: give --model, whose tokenizer decodes the windows")
    if sae is None:
        lost.append("the SAE's weights hash, decoder neighbours and promoted tokens: give --sae and --model")
    if left_out["negative"]:
        lost.append(f"{left_out['negative']:,} activations that are not positive")
    if left_out["infinite"]:
        lost.append(f"the size of {left_out['infinite']:,} infinite activations, which stand as {FP16_MAX:.0f}")
    return lost


def find_splits(source: Path) -> list[Split]:
    """Return the splits in order. Raises UsageError when there are none, DataError when latents are missing."""
    splits = []
    for file in source.glob("*.safetensors") if source.is_dir() else ():
        first, _, last = file.stem.partition("_")
        if not (first.isdigit() and last.isdigit()):
            raise DataError(f"{file} is no split of a Delphi cache: FIRST_LAST.safetensors was expected.")
        splits.append(Split(file, int(first), int(last)))
    splits.sort(key=lambda split: split.first)
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["model_name"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: an object with model_name was expected ({error}).") from error
    return config


def _load(file: Path, name: str, kinds: tuple[str, ...]) -> np.ndarray:
    """Return one array of a split. Raises DataError naming the file when it cannot be read or has another type."""
    try:
        with safe_open(file, framework="numpy") as handle:
            if name not in handle.keys():  # noqa: SIM118
                hint = " Save it again with save_tokens=True." if name == "tokens" else ""
                raise DataError(f"{file} holds no {name}.{hint}")
            array = handle.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read ({error}). Copy it again from where it was made.") from error
    if array.dtype.name not in kinds:
        raise DataError(f"{file}: {name} is {array.dtype.name}, {' or '.join(kinds)} was expected.")
    return array


def _tokens(splits: list[Split], config: dict[str, Any], source: Path) -> Int[np.ndarray, "windows context"]:
    """Return the windows, the same in every split."""
    tokens = None
    for split in splits:
        here = _load(split.file, "tokens", ("int64", "int32", "uint32", "uint16"))
        if tokens is None:
            tokens = np.ascontiguousarray(here)
        if here.shape != tokens.shape or not np.array_equal(here, tokens):
            raise DataError(f"{split.file}: its tokens differ from those of {splits[0].file.name}.")
    assert tokens is not None
    if tokens.ndim != 2 or not tokens.size or tokens.min() < 0:
        raise DataError(f"{splits[0].file}: tokens of shape {list(tokens.shape)}; [windows, context] was expected.")
    said = config.get("cache_ctx_len", config.get("ctx_len"))
    if said not in (None, tokens.shape[1]):
        raise DataError(f"{source / 'config.json'} says a context of {said}, the splits have {tokens.shape[1]} tokens.")
    return tokens


def _part(split: Split, shape: tuple[int, ...], left_out: dict[str, int]) -> Part:
    """Return a split's positive activations. Raises DataError for what lies outside of the tokens or the split."""
    kinds = ("uint16", "uint32", "int32", "int64")
    locations = _load(split.file, "locations", kinds).astype(np.int64)
    values = _load(split.file, "activations", ("float16", "float32")).astype(np.float32)
    if locations.ndim != 2 or locations.shape[1:] != (3,) or len(locations) != len(values) or values.ndim != 1:
        raise DataError(f"{split.file}: locations {list(locations.shape)} do not fit {list(values.shape)} activations.")
    limits = (*shape, split.last - split.first + 1)
    if len(locations) and (locations.min() < 0 or (locations.max(axis=0) >= limits).any()):
        raise DataError(
            f"{split.file}: locations reach {locations.max(axis=0).tolist()}, beyond {limits[0]} windows of "
            f"{limits[1]} tokens and {limits[2]} latents."
        )
    if np.isnan(values).any():
        raise DataError(f"{split.file}: {int(np.isnan(values).sum())} activations are NaN.")
    positive = values > 0
    left_out["negative"] += int((~positive).sum())
    left_out["infinite"] += int(np.isposinf(values).sum())
    values[np.isposinf(values)] = FP16_MAX
    sequence, place, latent = locations[positive].T
    return Part(sequence * shape[1] + place, latent + split.first, values[positive])


def _manifest(
    source: Path, config: dict[str, Any], tokens: np.ndarray, d_sae: int, sae: Any, sae_name: str, tokenizer: Any
) -> Manifest:
    try:
        hook_name = parse_hook_name(source.name).name
    except UsageError:
        hook_name = source.name
    return Manifest(
        model=config["model_name"],
        sae=sae_name or f"Delphi's cache {source.resolve()}",
        sae_hash=weights_hash(sae) if sae is not None else "",
        sae_config_hash=config_hash(sae) if sae is not None else "",
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "",
        hook_name=hook_name,
        d_in=sae.cfg.d_in if sae is not None else 0,
        d_sae=d_sae,
        k=getattr(sae.cfg, "k", None) if sae is not None else None,
        corpus=str(config.get("dataset_repo", "")),
        corpus_hash=fingerprint({"tokens": hashlib.sha256(tokens.data).hexdigest(), "config": config}),
        text_column=str(config.get("dataset_column", "text")),
        split=str(config.get("dataset_split", "all")),
        n_tokens_asked=tokens.size,
        context_size=tokens.shape[1],
        windows_per_shard=windows_per_shard(tokens.shape[1]),
        versions=package_versions(),
    )

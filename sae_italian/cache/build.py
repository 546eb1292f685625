"""Build feature caches in four passes: token shards, their activations, the transposition, the statistics.

The second and third consist of independent units of work (`encode_shard`, `transpose_range`), each a function of the
folder and a number that writes one file whole. A unit is done when the manifest names its file, so a killed build
continues after the last finished unit, and ends with the same bytes wherever and in whatever order units were run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import claim_folder, disk_errors, fingerprint, locked, package_versions, remove
from sae_italian.cache.encode import EncodeJob, encode_shard
from sae_italian.cache.layout import MANIFEST, Manifest, acts_file
from sae_italian.cache.tokens import share_tokens, write_token_shards
from sae_italian.cache.transpose import plan_ranges, transpose_range, write_missing_runs
from sae_italian.corpora import Split
from sae_italian.corpora.documents import check_corpus
from sae_italian.corpora.stream import CorpusStream, Reader
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits, weights_hash

KIND = "cache"
WINDOWS_PER_SHARD, TOKENS_PER_SHARD = 512, 2**17
SAVE_EVERY = 2.0  # seconds between two writings of the manifest

Unit = TypeVar("Unit")
Record = TypeVar("Record")


class UnitMap(Protocol):
    """Does `function` on every unit, anywhere and in any order; yields the records as they come."""

    def __call__(self, function: Callable[[Unit], Record], units: Sequence[Unit]) -> Iterable[Record]: ...


def in_this_process(function: Callable[[Unit], Record], units: Sequence[Unit]) -> Iterable[Record]:
    return map(function, units)


def build_cache(
    sae: Any, model: Any, corpus: str, out: str | Path, *, n_tokens: int | None, sae_name: str = "", **options: Any
) -> Path:
    """Cache the latents of `sae` on `n_tokens` tokens of a corpus (None: all) in the folder `out`; return it.

    `model` is a Hugging Face model with its tokenizer (`load_model(name)`). Options and errors as `build_caches`.
    """
    names = [sae_name] if sae_name else None
    return build_caches([sae], model, corpus, [out], n_tokens=n_tokens, sae_names=names, **options)[0]


def build_caches(
    saes: Sequence[Any],
    model: Any,
    corpus: str,
    outs: Sequence[str | Path],
    *,
    n_tokens: int | None,
    split: Split = "all",
    context_size: int | None = None,
    windows_per_shard: int | None = None,
    text_column: str = "text",
    sae_names: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    run_units: UnitMap = in_this_process,
) -> list[Path]:
    """Cache the latents of several SAEs of one model on the same text, with one forward pass for all; return the folders.

    BOS and other special tokens have no latents. `run_units` does the work on them.
    Raises: UsageError when SAE and model do not fit, the corpus is too short, or a folder of `outs` holds another run
    or is being written by another process; DataError for a row without text.
    """
    folders = [Path(out) for out in outs]
    sae_names = sae_names or ["in memory"] * len(saes)
    if not saes or not len(saes) == len(folders) == len(sae_names) == len({path.resolve() for path in folders}):
        raise UsageError(f"{len(saes)} SAEs need as many different folders; {len(set(folders))} were given.")
    if n_tokens is None and "micro-italiano" in str(corpus):
        raise UsageError("micro-italiano has no end: say how many tokens (--tokens).")
    contexts = {int(context_size or sae.cfg.metadata.context_size or 128) for sae in saes}
    if len(contexts) > 1:
        raise UsageError(f"the SAEs were trained on contexts of {sorted(contexts)} tokens; choose with --context-size.")
    context = check_context(contexts.pop(), model.config)
    for sae in saes:
        check_fits(sae, model)
    check_corpus(corpus, text_column=text_column)
    shared = {
        "corpus": str(corpus),
        "corpus_hash": fingerprint(CorpusStream(corpus, Reader(split=split, text_column=text_column)).spec()),
        "model_revision": getattr(model, "loaded_from", {}).get("revision"),
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
        "text_column": text_column,
        "split": split,
        "n_tokens_asked": n_tokens,
        "context_size": context,
        "windows_per_shard": windows_per_shard or max(1, min(WINDOWS_PER_SHARD, TOKENS_PER_SHARD // context)),
        "versions": package_versions(),
    }
    manifests = [_manifest(sae, name, shared) for sae, name in zip(saes, sae_names, strict=True)]
    with locked(folders), disk_errors(folders[0]):
        for i, folder in enumerate(folders):
            earlier = claim_folder(folder, KIND, manifests[i].identity(), resume=resume, overwrite=overwrite)
            if earlier and (folder / MANIFEST).is_file():
                manifests[i] = Manifest.load(folder)
        _tokens(folders, manifests, model.tokenizer)
        _encode(folders, manifests, saes, model, run_units)
        for sae, folder, manifest in zip(saes, folders, manifests, strict=True):
            if not manifest.complete:
                _finish(sae, model, folder, manifest, run_units)
            remove(folder / "runs")
    return folders


def folder_names(saes: Sequence[Any]) -> list[str]:
    """Return a folder name for each of several SAEs: where it reads, its width and its weights' hash."""
    return [f"{sae.cfg.metadata.hook_name}-{sae.cfg.d_sae}-{weights_hash(sae)[:8]}" for sae in saes]


def _manifest(sae: Any, name: str, shared: dict[str, Any]) -> Manifest:
    return Manifest(
        model=str(sae.cfg.metadata.model_name),
        sae=name,
        sae_hash=weights_hash(sae),
        sae_config_hash=config_hash(sae),
        hook_name=sae.cfg.metadata.hook_name,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        k=getattr(sae.cfg, "k", None),
        **shared,
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 of the fast tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def config_hash(sae: Any) -> str:
    """Return a hash of an SAE's configuration: what decides its latents beside the weights, such as k."""
    values = {key: value for key, value in sae.cfg.to_dict().items() if key not in ("metadata", "device")}
    return fingerprint(values)


def _tokens(folders: list[Path], manifests: list[Manifest], tokenizer: Any) -> None:
    """Write the token shards once, and give them to every cache."""
    source = next((i for i, manifest in enumerate(manifests) if manifest.tokens_complete), 0)
    if not manifests[source].tokens_complete:
        write_token_shards(folders[source], manifests[source], tokenizer)
    for folder, manifest in zip(folders, manifests, strict=True):
        share_tokens(folders[source], manifests[source].shards, folder, manifest)


def _encode(
    folders: list[Path], manifests: list[Manifest], saes: Sequence[Any], model: Any, run_units: UnitMap
) -> None:
    """Encode the shards that some cache lacks, for all the caches that lack any."""
    todo = [i for i, manifest in enumerate(manifests) if not all(shard.encoded for shard in manifest.shards)]
    if not todo:
        return
    job = EncodeJob(tuple(folders[i] for i in todo), tuple(saes[i] for i in todo), model)
    shards = manifests[todo[0]].shards
    missing = [n for n in range(len(shards)) if not all(manifests[i].shards[n].encoded for i in todo)]
    of_folder = {folders[i]: manifests[i] for i in todo}
    n_tokens = manifests[todo[0]].n_positions
    with _Progress("encode", n_tokens, "tok", {folders[i]: manifests[i] for i in todo}) as progress:
        progress.bar.update(n_tokens - sum(shards[n].n_windows for n in missing) * manifests[todo[0]].context_size)
        for records in run_units(partial(encode_shard, job), missing):
            for record in records:
                shard = of_folder[record.folder].shards[record.index]
                shard.nnz, shard.n_wide = record.nnz, record.n_wide
                shard.sha256[acts_file(record.index)] = record.sha256
            progress.done(shards[records[0].index].n_windows * manifests[todo[0]].context_size)


def _transpose(out: Path, manifest: Manifest, run_units: UnitMap = in_this_process) -> None:
    """Write the latent-major files that the manifest does not name yet."""
    write_missing_runs(out, manifest)
    there = {item.first for item in manifest.ranges}
    missing = [bounds for bounds in plan_ranges(out, manifest) if bounds[0] not in there]
    with _Progress("transpose", len(missing), "range", {out: manifest}) as progress:
        for item in run_units(partial(transpose_range, out, manifest.model_copy(deep=True)), missing):
            manifest.ranges = sorted([*manifest.ranges, item], key=lambda item: item.first)
            progress.done(1)


def _finish(sae: Any, model: Any, out: Path, manifest: Manifest, run_units: UnitMap) -> None:
    from sae_italian.cache.stats import write_statistics

    _transpose(out, manifest, run_units)
    write_statistics(out, manifest, sae, model)
    manifest.complete = True
    manifest.save(out)


class _Progress:
    """A bar, and the manifests saved every SAVE_EVERY seconds and at the end: what is lost with a kill is done again."""

    def __init__(self, what: str, total: int, unit: str, manifests: dict[Path, Manifest]):
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "tok", disable=None)
        self.manifests, self.saved = manifests, time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def done(self, amount: int) -> None:
        self.bar.update(amount)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        for folder, manifest in self.manifests.items():
            manifest.save(folder)
        self.saved = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self._save()

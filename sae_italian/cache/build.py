"""Build feature caches in four passes: token shards, their activations, the transposition, the statistics.

The second and third consist of independent units of work (`encode_shard`, `transpose_range`), each a function of the
folder and a number that writes one file whole. A unit is done when the manifest names its file, so a killed build
continues after the last finished unit, and ends with the same bytes wherever and in whatever order units were run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array, hstack

from sae_italian.base.errors import UsageError, check_whole
from sae_italian.base.pace import progress
from sae_italian.base.storage import check_claim, claimed, fingerprint, package_versions, path_of, remove
from sae_italian.cache import layout
from sae_italian.cache.layout import Csr, LatentRange, Manifest, full_values, map_arrays, shard_file, write_arrays
from sae_italian.cache.shards import EncodeJob, encode_shard, share_tokens, write_token_shards
from sae_italian.cache.stats import write_statistics
from sae_italian.corpora import Split
from sae_italian.corpora.pretokenize import CachedActivations, holds_activations
from sae_italian.corpora.stream import CorpusStream, Reader, check_corpus, check_ends
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits, weights_hash
from sae_italian.saes.loading import full_name, open_sae

KIND = "cache"
WINDOWS_PER_SHARD, TOKENS_PER_SHARD = 512, 2**17
LATENTS_PER_RANGE = 512
NON_ZEROS_PER_RANGE = 2**22  # unless one latent alone has more; the statistics need about 70 bytes of memory for each

# Does a function on every unit, anywhere and in any order; yields the records as they come. `map` is one.
UnitMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def build_cache(
    sae: Any,
    model: Any = None,
    corpus: str | None = None,
    out: str | Path | None = None,
    *,
    n_tokens: int | None = 300_000,
    sae_name: str = "",
    **options: Any,
) -> Path:
    """Cache the latents of `sae` on `n_tokens` tokens of a corpus (None: all) in the folder `out`; return it.

    An SAE is given as it is, as a folder or as release:sae_id; a Hugging Face model as it is or by name; model and corpus
    are, if they are not given, those that the SAE names, and `out` is caches/<name of the SAE>: `build_cache("runs/x")`.
    Options and errors as `build_caches`.
    """
    loaded, model, corpus = open_sae(sae, model, corpus)
    name = sae_name or full_name(sae)
    folder = out or Path("caches") / Path(name.replace(" ", "-")).name
    return build_caches([loaded], model, corpus, [folder], n_tokens=n_tokens, sae_names=[name], **options)[0]


def build_caches(
    saes: Sequence[Any],
    model: Any,
    corpus: str,
    outs: Sequence[str | Path],
    *,
    n_tokens: int | None,
    at_most: bool = False,
    split: Split = "all",
    context_size: int | None = None,
    windows_per_shard: int | None = None,
    text_column: str = "text",
    sae_names: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    run_units: UnitMap = map,
) -> list[Path]:
    """Cache the latents of several SAEs of one model on the same text, with one forward pass for all; return the folders.

    BOS and other special tokens have no latents. Where `corpus` is a folder of SAELens' CacheActivationsRunner, its windows
    and activations are read and the model is not run. `run_units` does the work.
    Raises: UsageError when SAE and model do not fit, the corpus is too short (`at_most`: fills no window), or a folder of
    `outs` holds another run or is being written by another process; DataError for a row without text.
    """
    check_whole(1, n_tokens=n_tokens, context_size=context_size, windows_per_shard=windows_per_shard)
    folders, sae_names = [path_of(out) for out in outs], sae_names or ["in memory"] * len(saes)
    if not saes or not len(saes) == len(folders) == len(sae_names) == len({path.resolve() for path in folders}):
        raise UsageError(f"{len(saes)} SAEs need as many different folders; {len(set(folders))} were given.")
    for sae in saes:
        check_fits(sae, model)
    hooks, d_in = [sae.cfg.metadata.hook_name for sae in saes], model.config.hidden_size
    cached = CachedActivations(corpus, hooks, d_in, context_size) if holds_activations(corpus) else None
    if cached:
        context_size, split = cached.context_size, "all"
    contexts = {int(context_size or sae.cfg.metadata.context_size or 128) for sae in saes}
    if len(contexts) > 1:
        raise UsageError(f"the SAEs were trained on contexts of {sorted(contexts)} tokens; choose with --context-size.")
    context = check_context(contexts.pop(), model.config)
    shared = {
        "corpus": str(corpus),
        "corpus_hash": cached.identity if cached else _identity(corpus, split, text_column, n_tokens),
        "model_revision": getattr(model, "loaded_from", {}).get("revision"),
        "model_dtype": "float32" if cached else str(model.dtype).removeprefix("torch."),
        "tokenizer_hash": layout.tokenizer_hash(model.tokenizer),
        "text_column": text_column,
        "split": split,
        "n_tokens_asked": n_tokens,
        "context_size": context,
        "windows_per_shard": windows_per_shard or default_windows(context),
        "versions": package_versions(),
    }
    manifests = [Manifest(sae=name, **sae_facts(sae), **shared) for sae, name in zip(saes, sae_names, strict=True)]
    how: Any = {"resume": resume, "overwrite": overwrite}
    for folder, manifest in zip(folders, manifests, strict=True):  # before the first of them is emptied
        check_claim(folder, KIND, manifest.identity(), **how)
    with ExitStack() as stack:
        manifests = [stack.enter_context(claimed_cache(*one, **how)) for one in zip(folders, manifests, strict=True)]
        job = EncodeJob(tuple(folders), tuple(saes), model, manifests[0].windows_per_shard, cached)
        _build(job, manifests, run_units, at_most)
    return folders


def _identity(corpus: str, split: Split, text_column: str, n_tokens: int | None) -> str:
    """Return a hash of what decides the documents. Raises: UsageError, DataError for a corpus that cannot be cached."""
    check_ends(corpus, n_tokens, "say how many tokens (--tokens)")
    check_corpus(corpus, text_column=text_column)
    return fingerprint(CorpusStream(corpus, Reader(split=split, text_column=text_column)).spec())


def default_windows(context_size: int) -> int:
    """Return how many windows a shard has by default: a shard is the unit of work and of memory."""
    return max(1, min(WINDOWS_PER_SHARD, TOKENS_PER_SHARD // context_size))


def sae_facts(sae: Any) -> dict[str, Any]:
    """Return what the manifest says of the SAE itself."""
    return {
        "model": str(sae.cfg.metadata.model_name),
        "hook_name": sae.cfg.metadata.hook_name,
        "sae_hash": weights_hash(sae),
        "sae_config_hash": layout.config_hash(sae),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "k": getattr(sae.cfg, "k", None),
    }


@contextmanager
def claimed_cache(folder: Path, manifest: Manifest, *, resume: bool, overwrite: bool) -> Iterator[Manifest]:
    """Hold `folder` while the block builds a cache there; yield its manifest as an earlier build left it."""
    with claimed(folder, KIND, manifest.identity(), resume=resume, overwrite=overwrite) as continued:
        if continued and (folder / layout.MANIFEST).is_file():
            here = {"sae": manifest.sae} if Path(manifest.sae).is_dir() else {}  # it may have been moved
            manifest = Manifest.load(folder).model_copy(update=here)
        yield manifest
        manifest.save(folder)
        remove(folder / "runs")


def _build(job: EncodeJob, manifests: list[Manifest], run_units: UnitMap, at_most: bool) -> None:
    """Do all four passes: tokens once for all caches; the shards that some cache lacks for all that lack any."""
    source = next((i for i, manifest in enumerate(manifests) if manifest.tokens_complete), 0)
    if not manifests[source].tokens_complete:
        write_token_shards(job.folders[source], manifests[source], job.model.tokenizer, job.cached, at_most=at_most)
    for folder, manifest in zip(job.folders, manifests, strict=True):
        share_tokens(job.folders[source], manifests[source].shards, folder, manifest)
    todo = [i for i, each in enumerate(manifests) if not all(shard.encoded for shard in each.shards)]
    of_folder = {job.folders[i]: manifests[i] for i in todo}
    of_shard = zip(*(manifest.shards for manifest in of_folder.values()), strict=True)
    missing = [each[0] for each in of_shard if not all(shard.encoded for shard in each)]
    part = replace(job, folders=tuple(of_folder), saes=tuple(job.saes[i] for i in todo))
    found = run_units(partial(encode_shard, part), missing) if missing else ()
    for records in as_they_come(found, "encode", "shard", len(missing), of_folder):
        for manifest, record in zip(of_folder.values(), records, strict=True):
            manifest.shards[record.index] = record
    for sae, folder, manifest in zip(job.saes, job.folders, manifests, strict=True):
        if not manifest.complete:
            finish_cache(folder, manifest, sae, job.model, run_units)


def transpose(out: Path, manifest: Manifest, run_units: UnitMap = map) -> None:
    """Write the latent-major files that the manifest does not name yet."""
    there = {item.first for item in manifest.ranges}
    missing = [bounds for bounds in plan_ranges(out, manifest) if bounds[0] not in there]
    items = run_units(partial(transpose_range, out, manifest.model_copy(deep=True)), missing)
    for item in as_they_come(items, "transpose", "range", len(missing), {out: manifest}):
        manifest.ranges = sorted([*manifest.ranges, item], key=lambda item: item.first)


def finish_cache(out: Path, manifest: Manifest, sae: Any, model: Any, run_units: UnitMap = map) -> None:
    """Do the third and fourth pass, after which the cache is complete; without SAE and model no decoder is read."""
    transpose(out, manifest, run_units)
    write_statistics(out, manifest, sae, model)
    manifest.complete = True
    manifest.save(out)


def as_they_come(
    records: Iterable[Any], what: str, unit: str, total: int, manifests: dict[Path, Manifest]
) -> Iterator[Any]:
    """Yield the records behind a bar; the manifests are saved when one has been entered into them."""
    for record in progress(what, records, total=total, unit=unit):
        yield record
        for folder, manifest in manifests.items():
            manifest.save(folder)


# --- from shards to ranges of latents ---------------------------------------------------------------------------------


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
    (first, last), parts = bounds, []
    for shard in manifest.shards:
        run = map_arrays(folder / shard_file("runs", shard.index))
        indptr = run["indptr"][first : last + 2].astype(np.int64)
        begin, end = indptr[[0, -1]].tolist()
        found = full_values(run, begin, end), run["row"][begin:end], indptr - begin
        # a copy: what is mapped holds its file open, and there may be thousands
        parts.append(csr_array(found, (last + 1 - first, shard.n_windows * manifest.context_size), copy=True))
    acts: Csr = hstack(parts, "csr")
    arrays = {
        "indptr": acts.indptr.astype(np.uint64),
        # 32 bits are enough for four billion positions
        "position": acts.indices.astype(layout.smallest_uint(max(2**32, manifest.n_positions) - 1)),
        **layout.halves(acts.data),
    }
    item = LatentRange(first=first, last=last, nnz=acts.nnz, sha256="")
    return item.model_copy(update={"sha256": write_arrays(folder, item.file, arrays)})

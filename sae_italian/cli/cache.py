"""The commands of the feature cache: build one, look into one, ask it about a sentence, make one of Delphi's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.base.report import table
from sae_italian.cli.options import POSITIVE, Folder, Result, Source, Workers, own_words


def build(
    *saes: str,
    out: Path,
    tokens: Annotated[int | Literal["all"], POSITIVE] = 300_000,
    source: Source = Source(),
    folder: Folder = Folder(),
    workers: Workers = Workers(),
) -> Result:
    """Cache the latents of an SAE over a corpus, or of several SAEs of one model with one forward pass.

    Args:
        saes: SAEs, each a folder or release:sae_id. Rare settings stand among them as key=value: split=train, heldout
            or all (heldout), windows_per_shard=N (a shard is the unit of work and of memory; 131,072 tokens of at most
            512 windows).
        out: The cache's folder; of several SAEs, the folder that theirs go into.
        tokens: How many tokens of the split, or all of it.
    """
    from sae_italian.saes import full_name, weights_hash

    settings, names = own_words(saes, {"split": "heldout", "windows_per_shard": 0})
    if not names:
        raise UsageError("an SAE was expected: a folder, or release:sae_id.")
    sae, model, corpus = source.load(names[0])
    loaded = [sae, *map(sae_italian.load_sae, names[1:])]
    out = out.resolve()  # a worker may have another working directory
    outs = [out]
    if len(loaded) > 1:
        outs = [out / f"{each.cfg.metadata.hook_name}-{each.cfg.d_sae}-{weights_hash(each)[:8]}" for each in loaded]
    sae_italian.build_caches(
        loaded,
        model,
        corpus,
        outs,
        n_tokens=None if tokens == "all" else tokens,
        split=settings["split"],
        windows_per_shard=settings["windows_per_shard"] or None,
        sae_names=[full_name(name) for name in names],
        **source.reading,
        **asdict(folder),
        run_units=workers.map(out, gpus=float(model.device.type == "cuda")),
    )
    paths = [str(path) for path in outs]
    return Result({"cache": paths[0], "caches": paths}, "\n".join(f"cache: {path}" for path in paths))


def info(cache: Path, /, *, verify: bool = False) -> dict[str, Any]:
    """Show what a cache holds.

    Args:
        cache: The cache's folder.
        verify: Compare every file with its checksum first.
    """
    from sae_italian.cache import Manifest
    from sae_italian.cache import verify as verify_files

    manifest = Manifest.load(cache)
    verify_files(cache, manifest, contents=verify)
    size = sum((cache / file).stat().st_size for file in manifest.files())
    latents = sum((cache / item.file).stat().st_size for item in manifest.ranges)
    facts = {
        **manifest.model_dump(exclude={"shards", "ranges", "versions"}),
        "shards": len(manifest.shards),
        "windows": manifest.n_windows,
        "tokens": manifest.n_positions,
        "documents": sae_italian.FeatureCache(cache, manifest).documents_read(),
        "non_zeros": manifest.nnz,
        "values_beyond_fp16": manifest.n_wide,
        "latent_bytes_per_non_zero": round(latents / max(1, manifest.nnz), 3),
        "bytes": size,
    }
    return facts | ({"checked": "every file is as the manifest says"} if verify else {})


def import_cache(
    source: Path,
    /,
    *,
    out: Path,
    model: str | None = None,
    sae: str | None = None,
    folder: Folder = Folder(),
) -> Result:
    """Make a feature cache of one that Delphi wrote; what Delphi does not keep is listed.

    Args:
        source: The folder of one hookpoint, with its splits and config.json.
        out: The cache's folder.
        model: Name, hub id or folder of the model, whose tokenizer decodes the windows; without it there is no text.
        sae: The SAE's folder or release:sae_id, for decoder statistics; without it there are none.
    """
    from sae_italian.cache.imports import import_delphi
    from sae_italian.saes import full_name

    if sae and not model:
        raise UsageError("--sae is given without --model: decoder statistics need both. Add --model, or leave it out.")
    given: dict[str, Any] = asdict(folder)
    if sae:
        loaded, subject, _ = sae_italian.open_sae(sae, model, "none")
        given |= {"sae": loaded, "model": subject, "sae_name": full_name(sae)}
    elif model:
        given["tokenizer"] = sae_italian.load_tokenizer(model)
    made, lost = import_delphi(source, out, **given)
    text = "\n".join([f"cache: {made}", "not in it:", *(f"  {line}" for line in lost)])
    return Result({"cache": str(made), "lost": lost}, text)


def latents(cache: Path, sentence: str, /, *, sae: str | None = None, model: str | None = None) -> Result:
    """Show which latents fire on a sentence, strongest first: on which of its tokens, and what explains them.

    Args:
        cache: The cache's folder.
        sentence: The text, in quotes.
        sae: The cache's SAE: a folder, or release:sae_id; default: the one that the cache names.
        model: Name, hub id or folder of the model; default: the one that the cache was built with.
    """
    from sae_italian.browser.opening import open_pages

    pages = open_pages(cache, sae_name=sae, model_name=model, live=True)
    if pages.live is None:
        raise UsageError(f"the SAE of {cache} or its model is not here; give --sae and --model.")
    found, rows = pages.live.tokens(sentence), []
    for own in found["strongest"]:
        own["explanation"] = pages.source.row(own["latent"])["explanation_it"]
        share = "-" if own["share"] is None else f"{own['share']:.0%}"
        place = f"«{found['tokens'][own['token']]['text'].strip()}»"
        rows.append((own["latent"], f"{own['value']:.2f}", share, place, own["count"], own["explanation"] or "-"))
    cut = f"\n\nread are its first {found['n_tokens']} tokens" if found["truncated"] else ""
    head = "latent | activation | of its maximum | strongest on | tokens | explanation"
    return Result(found, table(head, rows) + cut)

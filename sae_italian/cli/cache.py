"""The commands of the feature cache."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import (
    Commands,
    Result,
    engine_options,
    folder_options,
    load_sources,
    positive,
    source_options,
    unit_map,
)


def add_commands(root: Commands) -> None:
    cache = root.group("cache", "the feature cache: latents of a corpus on disk")
    sub = cache.add("build", _cache_build, "build a cache")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    source_options(sub)
    sub.add_argument("--split", default="heldout", choices=("train", "heldout", "all"))
    sub.add_argument("--tokens", type=int, default=300_000)
    sub.add_argument("--out", type=Path, required=True)
    folder_options(sub)
    engine_options(sub)
    cache.add("info", _cache_info, "what a cache holds").add_argument("cache", type=Path)
    cache.add("verify", _cache_verify, "compare every file with its checksum").add_argument("cache", type=Path)


def _cache_build(options: argparse.Namespace) -> Result:
    from sae_italian.cache import build_cache

    positive("--workers", options.workers)
    sae, model, corpus = load_sources(options)
    folder = Path(options.sae)
    out = options.out.resolve()  # workers may have another working directory
    ray = unit_map(options, out, gpus=float(model.device.type == "cuda"))
    build_cache(
        sae,
        model,
        corpus,
        out,
        n_tokens=options.tokens,
        split=options.split,
        context_size=options.context_size,
        text_column=options.text_column,
        sae_name=str(folder.resolve()) if folder.is_dir() else options.sae,
        resume=options.resume,
        overwrite=options.overwrite,
        workers=options.workers or 1,
        **({"run_units": ray} if options.engine == "ray" else {}),
    )
    return {"cache": str(options.out)}, f"cache: {options.out}"


def _cache_info(options: argparse.Namespace) -> Result:
    from sae_italian.cache import Manifest

    manifest = Manifest.load(options.cache)
    size = sum(file.stat().st_size for file in options.cache.rglob("*") if file.is_file())
    facts = {
        **manifest.model_dump(exclude={"shards", "ranges", "versions"}),
        "windows": manifest.n_windows,
        "documents": manifest.n_documents,
        "non_zeros": manifest.nnz,
        "values_beyond_fp16": sum(shard.n_wide for shard in manifest.shards),
        "bytes": size,
    }
    return facts, "\n".join(f"{key:18} {value}" for key, value in facts.items())


def _cache_verify(options: argparse.Namespace) -> Result:
    from sae_italian.cache import Manifest, verify

    manifest = Manifest.load(options.cache)
    verify(options.cache, manifest)
    return {"ok": True}, f"{options.cache}: every file is as the manifest says"

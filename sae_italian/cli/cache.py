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
    sae_name,
    source_options,
    unit_map,
)


def add_commands(root: Commands) -> None:
    cache = root.group("cache", "the feature cache: latents of a corpus on disk")
    sub = cache.add("build", _cache_build, "build a cache, or one for each of several SAEs from one forward pass")
    sub.add_argument("sae", nargs="+", help="an SAE's folder, or release:sae_id; several of the same model")
    source_options(sub)
    sub.add_argument("--split", default="heldout", choices=("train", "heldout", "all"))
    sub.add_argument("--tokens", type=tokens_or_all, default=300_000, help="how many, or `all` of the split")
    sub.add_argument("--out", type=Path, required=True, help="the cache's folder; of several, the folder they go into")
    sub.add_argument("--windows-per-shard", type=int, help="a shard is the unit of work and of memory")
    folder_options(sub)
    engine_options(sub, "processes that tokenise; with --engine ray also the CPUs of a cluster started here")
    cache.add("info", _cache_info, "what a cache holds").add_argument("cache", type=Path)
    cache.add("verify", _cache_verify, "compare every file with its checksum").add_argument("cache", type=Path)


def tokens_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _cache_build(options: argparse.Namespace) -> Result:
    from sae_italian.cache import build_caches
    from sae_italian.cache.build import folder_names
    from sae_italian.saes import load_sae

    positive("--windows-per-shard", options.windows_per_shard)
    positive("--workers", options.workers)
    given = list(options.sae)
    options.sae = given[0]
    sae, model, corpus = load_sources(options)
    saes = [sae, *(load_sae(name) for name in given[1:])]
    out = options.out.resolve()  # a worker may have another working directory
    outs = [out] if len(given) == 1 else [out / name for name in folder_names(saes)]
    on_ray = {"run_units": unit_map(options, out, gpus=float(model.device.type == "cuda"))}
    build_caches(
        saes,
        model,
        corpus,
        outs,
        n_tokens=options.tokens,
        split=options.split,
        context_size=options.context_size,
        windows_per_shard=options.windows_per_shard,
        text_column=options.text_column,
        sae_names=[sae_name(name) for name in given],
        resume=options.resume,
        overwrite=options.overwrite,
        **(on_ray if options.engine == "ray" else {}),
    )
    paths = [str(path) for path in outs]
    return {"cache": paths[0], "caches": paths}, "\n".join(f"cache: {path}" for path in paths)


def _cache_info(options: argparse.Namespace) -> Result:
    from sae_italian.cache import Manifest

    manifest = Manifest.load(options.cache)
    size = sum((options.cache / file).stat().st_size for file in manifest.files() if (options.cache / file).is_file())
    latents = sum((options.cache / item.file).stat().st_size for item in manifest.ranges)
    facts = {
        **manifest.model_dump(exclude={"shards", "ranges", "versions"}),
        "shards": len(manifest.shards),
        "windows": manifest.n_windows,
        "tokens": manifest.n_positions,
        "documents": manifest.n_documents,
        "non_zeros": manifest.nnz,
        "values_beyond_fp16": manifest.n_wide,
        "latent_bytes_per_non_zero": round(latents / max(1, manifest.nnz), 3),
        "bytes": size,
    }
    return facts, "\n".join(f"{key:18} {value}" for key, value in facts.items())


def _cache_verify(options: argparse.Namespace) -> Result:
    from sae_italian.cache import Manifest, verify

    manifest = Manifest.load(options.cache)
    verify(options.cache, manifest)
    return {"ok": True}, f"{options.cache}: every file is as the manifest says"

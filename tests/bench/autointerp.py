"""The speed of explanations and scores by rule, in latents a second from a cache of one's own."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def measure(
    folder: Path, *, latents: int = 300, repeats: int = 3, workers: int = 2, model: str | None = None
) -> dict[str, Any]:
    """Return the seconds it takes to open the cache for explaining, and latents explained and scored a second (median).

    Every repetition explains and scores the same latents anew, into a store that is thrown away.
    """
    from sae_italian.autointerp.run import AutointerpConfig, Run, Work
    from sae_italian.autointerp.store import Store
    from sae_italian.cache import FeatureCache
    from sae_italian.models.loading import load_tokenizer

    cache = FeatureCache.open(folder)
    tokenizer = load_tokenizer(model or cache.manifest.model)
    opening, rates, n_scored = [], [], 0
    with tempfile.TemporaryDirectory() as temporary:
        for repeat in range(repeats):
            with Store(Path(temporary) / f"{repeat}.sqlite", {}) as store:
                begun = time.perf_counter()
                run = Run(Work(cache, tokenizer, AutointerpConfig(latents=latents)), store)
                run.work.prepare()
                opened = time.perf_counter()
                run.rules(workers)
                rates.append(len(run.work.latents) / (time.perf_counter() - opened))
                opening.append(opened - begun)
                n_scored = len(store.scored("rules", "rule"))
    manifest = cache.manifest
    return {
        "cache": str(folder),
        "n_tokens": cache.n_positions,
        "nnz": manifest.nnz,
        "d_sae": manifest.d_sae,
        "n_latents": len(run.work.latents),
        "n_scored": n_scored,
        "workers": workers,
        "opening_seconds": float(np.median(opening)),
        "latents_per_second": float(np.median(rates)),
        "all_latents_per_second": rates,
    }


def table_of(result: dict[str, Any]) -> str:
    """Return the measurement as a Markdown table."""
    size = f"{result['n_tokens']:,} tokens, {result['nnz']:,} activations, {result['d_sae']:,} latents"
    spread = f"{min(result['all_latents_per_second']):.1f} to {max(result['all_latents_per_second']):.1f}"
    return "\n".join(
        [
            "| rules: explain and score | |",
            "|---|---|",
            f"| cache | {size} |",
            f"| opened for explaining in | {result['opening_seconds']:.1f} s |",
            f"| latents drawn, of them scored | {result['n_latents']:,}, {result['n_scored']:,} |",
            f"| latents a second, {result['workers']} processes | {result['latents_per_second']:.1f} ({spread}) |",
        ]
    )

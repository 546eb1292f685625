"""The command `autointerp`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.cli.base import Commands, Result, positive


def add_commands(root: Commands) -> None:
    text = "explain and score the latents of a cache, with controls; resumes by itself"
    sub = root.add("autointerp", _autointerp, text)
    sub.add_argument("cache", type=Path)
    sub.add_argument("--latents", type=int, help="this many live latents, drawn at random (default: all)")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--workers", type=int, default=1, help="processes for the rules (default 1)")
    sub.add_argument("--no-random-control", action="store_true", help="leave out the randomly initialised SAE")
    sub.add_argument("--overwrite", action="store_true", help="forget earlier explanations and scores")


def _autointerp(options: argparse.Namespace) -> Result:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_model
    from sae_italian.quickstart import analyse, forget_scores, table_of

    positive("--latents", options.latents)
    cache = FeatureCache.open(options.cache)
    model = load_model(options.model or cache.manifest.model)
    positive("--workers", options.workers)
    sae = _sae_of(cache, needed=not options.no_random_control)
    if options.overwrite:
        forget_scores(cache)
    results = analyse(
        cache,
        sae,
        model,
        card_tokens=None,
        latents=options.latents,
        random_control=not options.no_random_control,
        workers=options.workers,
    )
    return results, table_of(results)


def _sae_of(cache: Any, needed: bool) -> Any:
    """Return the cache's SAE: for the random control, and for the decoder neighbours where it is still at hand."""
    from sae_italian.errors import SaeItalianError
    from sae_italian.saes import load_sae

    try:
        return load_sae(cache.manifest.sae)
    except SaeItalianError:
        if needed:
            raise
        return None

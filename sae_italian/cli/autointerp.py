"""The command `autointerp`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result, positive


def add_commands(root: Commands) -> None:
    text = "explain and score the latents of a cache, with controls; resumes by itself"
    sub = root.add("autointerp", _autointerp, text)
    sub.add_argument("cache", type=Path)
    sub.add_argument("--latents", type=int, help="this many live latents, drawn at random (default: all)")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--no-random-control", action="store_true", help="leave out the randomly initialised SAE")
    sub.add_argument("--overwrite", action="store_true", help="forget earlier explanations and scores")


def _autointerp(options: argparse.Namespace) -> Result:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_model
    from sae_italian.quickstart import analyse, forget_scores, table_of
    from sae_italian.saes import load_sae

    positive("--latents", options.latents)
    cache = FeatureCache.open(options.cache)
    model = load_model(options.model or cache.manifest.model)
    sae = None if options.no_random_control else load_sae(cache.manifest.sae)
    if options.overwrite:
        forget_scores(cache)
    results = analyse(cache, sae, model, card_tokens=None, latents=options.latents, random_control=sae is not None)
    return results, table_of(results)

"""The command `autointerp`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sae_italian.cli.base import Commands, Result, engine_options, positive, unit_map
from sae_italian.cli.llm import llm_options, settings_of


def add_commands(root: Commands) -> None:
    text = "explain and score the latents of a cache, with controls; resumes by itself"
    sub = root.add("autointerp", _autointerp, text)
    sub.add_argument("cache", help="the cache")
    sub.add_argument("--latents", type=int, help="this many live latents, drawn at random (default: all)")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--no-random-control", action="store_true", help="leave out the randomly initialised SAE")
    sub.add_argument("--overwrite", action="store_true", help="forget earlier explanations and scores")
    engine_options(sub, "processes for the rules (default 1); with --engine ray the CPUs of a cluster started here")
    llm_options(sub)


def _autointerp(options: argparse.Namespace) -> Result:
    from sae_italian.autointerp import AutointerpConfig
    from sae_italian.autointerp.llm.beside import beside_text, estimate_beside, run_beside
    from sae_italian.autointerp.llm.client import Client
    from sae_italian.autointerp.run import STORE_FILE
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_model
    from sae_italian.quickstart import analyse, forget_scores, table_of

    positive("--latents", options.latents)
    settings = settings_of(options)
    llm = settings.wants_llm
    cache = FeatureCache.open(options.cache)
    if llm and not options.estimate:
        Client(settings, cache.folder / STORE_FILE)  # what cannot be is said before the rules' minutes
    model = load_model(options.model or cache.manifest.model)
    positive("--workers", options.workers)
    sae = _sae_of(cache, needed=not options.no_random_control)
    if options.overwrite:
        forget_scores(cache)
    config, control = AutointerpConfig(latents=options.latents), not options.no_random_control
    if llm and options.estimate:
        found = estimate_beside(cache, model.tokenizer, config, sae, settings, control=control)
        return asdict(found), found.text()
    results = analyse(
        cache,
        sae,
        model,
        card_tokens=None,
        latents=options.latents,
        random_control=control,
        workers=options.workers or 1,
        run_units=unit_map(options, cache.folder) if options.engine == "ray" else None,
    )
    if not llm:
        return results, table_of(results)
    results["llm"] = run_beside(cache, model, config, sae, settings, control=control)
    return results, f"{table_of(results)}\n\n{beside_text(results['llm'], cache.folder / STORE_FILE)}"


def _sae_of(cache: Any, needed: bool) -> Any:
    """Return the cache's SAE: for the random control, and for the decoder neighbours where it is still at hand."""
    from sae_italian.base.errors import SaeItalianError
    from sae_italian.saes import load_sae

    try:
        return load_sae(cache.manifest.sae)
    except SaeItalianError:
        if needed:
            raise
        return None

"""The command `browse`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result


def add_commands(root: Commands) -> None:
    sub = root.add("browse", _browse, "write the latent browser of a cache: a folder that opens from disk")
    sub.add_argument("cache", type=Path)
    sub.add_argument("--out", type=Path, help="default: <cache>-report beside the cache")
    sub.add_argument("--latent", type=int, help="print this latent's card here instead of writing the folder")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--sae", help="for the map and the logits (default: the SAE that the cache names, if it is there)")


def _browse(options: argparse.Namespace) -> Result:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    cache = FeatureCache.open(options.cache)
    tokenizer = load_tokenizer(options.model or cache.manifest.model)
    if options.latent is not None:
        from sae_italian.browser.report import latent_card
        from sae_italian.browser.text import card_text

        row, card = latent_card(cache, tokenizer, options.latent)
        return {**row, **card}, card_text(row, card)
    from sae_italian.browser.report import write_report

    out = options.out or options.cache.resolve().with_name(f"{options.cache.resolve().name}-report")
    index = write_report(cache, tokenizer, out, decoder=True, sae_name=options.sae)
    return {"report": str(index)}, f"Report: {index}"

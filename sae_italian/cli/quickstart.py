"""The command `quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result, folder_options, positive


def add_commands(root: Commands) -> None:
    text = "the whole way on the embedded model: train, cache, explain, score, report"
    sub = root.add("quickstart", _quickstart, text)
    sub.add_argument("config", nargs="?", default="mini/topk.yaml", help="a training config (default: mini/topk.yaml)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), help="output folder (default: quickstart)")
    sub.add_argument("--cache-tokens", type=int, default=300_000, help="held-out tokens to cache")
    sub.add_argument("--card-tokens", type=int, default=50_000, help="held-out tokens for the evaluation card")
    sub.add_argument("--latents", type=int, help="explain this many live latents, drawn at random (default: all)")
    folder_options(sub)


def _quickstart(options: argparse.Namespace) -> Result:
    from sae_italian.quickstart import quickstart, table_of

    positive("--latents", options.latents)
    results = quickstart(
        options.out,
        options.config,
        *options.overrides,
        cache_tokens=options.cache_tokens,
        card_tokens=options.card_tokens,
        latents=options.latents,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    return results, f"\n{table_of(results)}\n\nReport: {results['report']}"

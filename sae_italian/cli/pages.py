"""The commands `browse-compare` and `browse-suite`: pages about several SAEs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result


def add_commands(root: Commands) -> None:
    sub = root.add(
        "browse-compare", _compare, "write the browser of a cache with the best matches in another SAE beside it"
    )
    sub.add_argument("cache", type=Path)
    sub.add_argument("other", type=Path, help="the cache of another SAE of the same model: layer, width or seed")
    sub.add_argument("--sae", help="the first cache's SAE (default: the one it names, if it is there)")
    sub.add_argument("--other-sae", help="the other cache's SAE")
    sub.add_argument("--out", type=Path, required=True)
    sub = root.add(
        "browse-suite", _suite, "write the overview of a suite: every SAE's numbers as a table and a picture"
    )
    sub.add_argument("suite", type=Path, help="the folder that `train` wrote, one folder per SAE with its card")
    sub.add_argument("--caches", type=Path, nargs="*", default=[], help="caches of these SAEs, for their scores")
    sub.add_argument("--out", type=Path, required=True)


def _compare(options: argparse.Namespace) -> Result:
    from sae_italian.browser.compare import write_comparison
    from sae_italian.browser.report import open_source
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    caches = [FeatureCache.open(folder) for folder in (options.cache, options.other)]
    sources = [
        open_source(cache, load_tokenizer(cache.manifest.model), decoder=True, sae_name=sae)
        for cache, sae in zip(caches, (options.sae, options.other_sae), strict=True)
    ]
    index, facts = write_comparison(sources[0], sources[1], options.out)
    return {"report": str(index), **facts}, (
        f"Best matches: mean cosine {facts['mean_cosine']:.2f}, {100 * facts['share_near']:.0f} % of 0.7 or more, "
        f"{100 * facts['share_mutual']:.0f} % mutual.\nReport: {index}"
    )


def _suite(options: argparse.Namespace) -> Result:
    from sae_italian.browser.suite import overview_text, read_suite, write_overview

    rows = read_suite(options.suite, options.caches)
    index = write_overview(rows, options.out, f"Suite: {options.suite.resolve().name}")
    return {"overview": str(index), "rows": rows}, f"{overview_text(rows)}\n\nOverview: {index}"

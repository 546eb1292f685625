"""The commands that measure speed against other libraries, in one run on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result, positive


def add_commands(root: Commands) -> None:
    group = root.group("bench", "the speed tables of the README, measured on this machine")
    sub = group.add("corpora", _bench_corpora, "tokenising and packing against SAELens")
    sub.add_argument("corpus", help="a local corpus, or micro-italiano")
    sub.add_argument("--model", required=True, help="the model whose tokenizer is used")
    sub.add_argument("--context-size", type=int, default=128)
    sub.add_argument("--characters", type=int, default=20_000_000, help="of text to read")
    sub.add_argument("--repeats", type=int, default=3)
    sub.add_argument("--workers", type=int, default=2)
    sub.add_argument("--memory-bytes", type=int, default=0, help="also measure the memory over a stream this long")
    sub = group.add(
        "autointerp",
        _bench_autointerp,
        "rules in latents a second, and how much of its concurrency the LLM client uses",
    )
    sub.add_argument("cache", type=Path)
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--latents", type=int, default=300, help="live latents, drawn at random")
    sub.add_argument("--repeats", type=int, default=3)
    sub.add_argument("--workers", type=int, default=2)


def _bench_corpora(options: argparse.Namespace) -> Result:
    from sae_italian.bench.corpora import measure, table_of

    result = measure(
        options.corpus,
        options.model,
        context_size=options.context_size,
        n_characters=options.characters,
        repeats=options.repeats,
        workers=options.workers,
        memory_bytes=options.memory_bytes,
    )
    return result, table_of(result)


def _bench_autointerp(options: argparse.Namespace) -> Result:
    from sae_italian.bench.autointerp import measure, table_of
    from sae_italian.bench.llm import llm_table, measure_llm

    for name in ("latents", "repeats", "workers"):
        positive(f"--{name}", getattr(options, name))
    result = measure(
        options.cache,
        latents=options.latents,
        repeats=options.repeats,
        workers=options.workers,
        model=options.model,
    )
    result["llm"] = measure_llm()
    return result, f"{table_of(result)}\n\n{llm_table(result['llm'])}"

"""The commands that measure speed against other libraries, in one run on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from sae_italian.cli.base import Commands, Result


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
    sub = group.add("cache", _bench_cache, "building and reading a feature cache, against Delphi's way of building it")
    sub.add_argument("sae", nargs="?", help="an SAE's folder, or release:sae_id; without it only reading is measured")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on")
    sub.add_argument("--tokens", type=int, default=131_072, help="for the speed of building")
    sub.add_argument("--memory-tokens", type=int, default=0, help="also measure the memory over so many tokens")
    sub.add_argument(
        "--non-zeros", type=int, default=0, help="also write, summarise and read a synthetic cache this big"
    )
    sub.add_argument("--d-sae", type=int, default=65_536, help="of the synthetic cache")
    sub.add_argument("--repeats", type=int, default=3)


def _bench_cache(options: argparse.Namespace) -> Result:
    import os
    import tempfile
    from pathlib import Path

    from sae_italian.bench.cache import measure_build, measure_memory, measure_reading, table_of
    from sae_italian.cli.base import load_sources, positive

    positive("--repeats", options.repeats)
    result: dict[str, Any] = {"load": os.getloadavg()[0]}
    if options.sae:
        sae, model, corpus = load_sources(options)
        result["build"] = measure_build(sae, model, corpus, n_tokens=options.tokens, repeats=options.repeats)
        if options.memory_tokens:
            name = options.model or sae.cfg.metadata.model_name
            result["memory"] = measure_memory(options.sae, name, corpus, n_tokens=options.memory_tokens)
    if options.non_zeros:
        with tempfile.TemporaryDirectory() as folder:
            result["reading"] = measure_reading(Path(folder), n_non_zeros=options.non_zeros, d_sae=options.d_sae)
    return result, table_of(result)


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

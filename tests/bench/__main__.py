"""Speed against other libraries, in one run on this machine: `make bench TABLE=training`, or

python -m tests.bench training|gpu|start|corpora|cache|autointerp|browser|pictures|circuits|mutants|probing|processes|real|kept|titles
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_italian.base.errors import SaeItalianError, UsageError, nearest
from sae_italian.cli import Source

Result = tuple[Any, str]

# What `bench training` prints, in this order; each takes the command's options and returns (value, text).
TRAINING_TABLES: dict[str, Callable[[argparse.Namespace], tuple[Any, str]]] = {
    "step": lambda options: _step_table(options),
    "trainer": lambda options: _trainer_table(options),
    "memory": lambda options: _memory_table(options),
    "run": lambda options: _run_table(options),
    "group": lambda options: _group_table(options),
}


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    subparsers = parser.add_subparsers(required=True)

    def add(name: str, function: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(command=function)
        return sub

    sub = add("corpora", _bench_corpora, "tokenising and packing against SAELens")
    sub.add_argument("corpus", help="a local corpus, or micro-italiano")
    sub.add_argument("--model", required=True, help="the model whose tokenizer is used")
    sub.add_argument("--context-size", type=int, default=128)
    sub.add_argument("--characters", type=int, default=20_000_000, help="of text to read")
    sub.add_argument("--repeats", type=int, default=3)
    sub.add_argument("--memory-bytes", type=int, default=0, help="also measure the memory over a stream this long")
    sub = add(
        "start", _bench_start, "an SAE that starts at zero against one that starts at the mean, on real activations"
    )
    sub.add_argument("corpus", help="a local corpus of Italian text")
    sub.add_argument("--model", default="gemma-3-270m")
    sub.add_argument("--hook-name", default="blocks.8.hook_resid_post")
    sub.add_argument("--d-sae", type=int, default=4_096)
    sub.add_argument("--k", type=int, default=32)
    sub.add_argument("--lr", type=float, default=4e-3)
    sub.add_argument("--steps", type=int, default=120, help="of 2,048 tokens")
    sub.add_argument("--toy", default="", help="a second, small model, e.g. ../shared/models/ita-5m")
    sub.add_argument("--toy-hook-name", default="blocks.2.hook_resid_post")
    sub.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    sub.add_argument(
        "--other-seeds", type=int, default=1, help="how many of them for all but sparse_topk from the mean"
    )
    sub.add_argument("--twin", action="store_true", help="also SAELens' topk started at the mean, by our twin of it")
    sub.add_argument("--train-tokens", type=int, default=147_456, help="whose activations are read, once")
    sub.add_argument("--tokens", type=int, default=8_000, help="held out, for the explained variance")
    sub.add_argument("--loss-tokens", type=int, default=1_000, help="held out, for losses; 0: none")
    sub = add("circuits", _bench_circuits, "an attribution graph beside circuit-tracer's (CIRCUIT_TRACER=FOLDER)")
    sub.add_argument("--model", default="", help="a real model, ours alone, e.g. gemma-3-270m")
    sub.add_argument("--positions", type=int, default=64, help="tokens of its prompt")
    sub.add_argument("--latents", type=int, default=2048, help="of each of its layers")
    sub.add_argument("--l0", type=int, default=32, help="latents of a layer that are active at a token")
    sub.add_argument("--max-nodes", type=int, default=4096)
    sub.add_argument(
        "--batch", type=int, default=0, help="of both; 0: ours by itself, circuit-tracer's 16, its fastest"
    )
    sub.add_argument("--repeats", type=int, default=5, help="turns of each side")
    sub = add("gpu", _bench_gpu, "all that waits for a GPU, in under nine minutes")
    sub.add_argument("words", nargs="*", help="device=cuda|cpu small=true minutes=8 out=gpu-bench.json")
    sub = add("mutants", _bench_mutants, "how many seeded mutants of a room its tests kill (needs mutmut)")
    sub.add_argument("room", help="statistics, scorers, cache or training")
    sub.add_argument("--n", type=int, default=200, help="mutants, drawn at random")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--folder", type=Path, default=Path("mutation"), help="where it works; the same command goes on")
    sub.add_argument("--told", action="store_true", help="print what has been judged there so far, judge nothing")
    sub = add("probing", _bench_probing, "the benchmark's probes against the package sae-probes, on its English sets")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    sub.add_argument(
        "--packages", type=Path, required=True, help="folder of sae-probes (pip install --no-deps --target)"
    )
    sub.add_argument("--model", default="", help="default: the model in the SAE's metadata")
    sub.add_argument("--sets", nargs="+", default=["87_glue_cola", "22_headline_isobama", "125_world_country_Italy"])
    sub.add_argument("--repeats", type=int, default=3, help="turns of each side")
    sub = add("processes", _bench_processes, "one SAE by one process and by two")
    sub.add_argument("--model", default="../shared/models/ita-5m")
    sub.add_argument("--hook-name", default="blocks.2.hook_resid_post")
    sub.add_argument("--corpus", default="../shared/data/italian/wikipedia_wikineural.jsonl.gz")
    sub.add_argument("--d-sae", type=int, default=16_384)
    sub.add_argument("--tokens", type=int, default=2_048, help="of one process in one step")
    sub.add_argument("--steps", type=int, default=8, help="of a round")
    sub.add_argument("--repeats", type=int, default=5, help="rounds of one and of two processes")
    sub = add("real", _bench_real, "a real model: reading activations, whole runs, memory of loading")
    sub.add_argument("corpus", help="a local corpus of Italian text")
    sub.add_argument("--model", default="gemma-3-270m")
    sub.add_argument("--layer", type=int, default=8)
    sub.add_argument("--repeats", type=int, default=5)
    sub = add("kept", _bench_kept, "the same work by another checkout, e.g. git worktree add /tmp/old 2c011dc")
    sub.add_argument("other", type=Path, help="the other checkout's folder")
    sub.add_argument("--tokens", type=int, default=300_000, help="of the training and of the cache")
    sub.add_argument("--repeats", type=int, default=3, help="turns of each side")
    sub.add_argument("--pieces", nargs="+", default=None, help="default: all")
    sub = add("titles", _bench_titles, "how often the morphology behind titles is right on Universal Dependencies")
    sub.add_argument("folder", type=Path, help="of CoNLL-U files, e.g. ../shared/data/ud")
    sub = add("cache", _bench_cache, "building and reading a feature cache, against Delphi's way of building it")
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
    sub = add("training", _bench_training, "the SAE's training step against SAELens' topk")
    sub.add_argument("--tables", default=",".join(TRAINING_TABLES), help="which, with commas between (default: all)")
    sub.add_argument("--device", default="cpu", help="cpu, or cuda for the shapes of Minerva-1B")
    sub.add_argument("--repeats", type=int, default=5)
    sub.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    sub.add_argument("--d-sae", type=int, help="measure the shape of this many latents only")
    sub.add_argument("--model", default="sae-italian-mini", help="of the tables run and group: model and SAE together")
    sub.add_argument("--corpus", default="micro-italiano", help="of the tables run and group")
    sub = add(
        "autointerp",
        _bench_autointerp,
        "rules in latents a second, and how much of its concurrency the LLM client uses",
    )
    sub.add_argument("cache", type=Path)
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--latents", type=int, default=300, help="live latents, drawn at random")
    sub.add_argument("--repeats", type=int, default=3)
    sub.add_argument("--workers", type=int, default=2)
    sub = add("browser", _bench_browser, "the latent browser against SAEDashboard, its bytes, its memory, its page")
    sub.add_argument("sae", nargs="?", help="an SAE's folder, or release:sae_id; without it only the page is measured")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on")
    sub.add_argument("--tokens", type=int, default=65_536)
    sub.add_argument(
        "--dashboard", type=Path, help="folder of SAEDashboard's packages (pip install --no-deps --target)"
    )
    sub.add_argument("--latents", type=int, default=128, help="latents of SAEDashboard's side")
    sub.add_argument("--d-sae", type=int, nargs="*", default=[16_384], help="of synthetic folders, smallest first")
    sub.add_argument("--non-zeros", type=int, default=4_000_000, help="of each synthetic cache")
    sub.add_argument("--repeats", type=int, default=5, help="of the page's times")
    sub.add_argument("--pages", type=Path, nargs=2, metavar="FOLDER", help="only two browsers' pages, side by side")
    sub = add("pictures", _bench_pictures, "the pictures of README.md and docs/browser.md")
    sub.add_argument("report", type=Path, help="what `sae-italian browse` wrote")
    sub.add_argument("--out", type=Path, default=Path("docs/pictures"))
    sub.add_argument("--nth", type=int, default=0, help="which of the six latents worth opening is the card's, from 0")
    return parser


def _bench_pictures(options: argparse.Namespace) -> Result:
    from tests.bench.pictures import take_pictures

    return take_pictures(options)


def _bench_browser(options: argparse.Namespace) -> Result:
    import tempfile

    from tests.bench.browser import compare_pages, measure_export, measure_page, table_of, write_big

    positive("--repeats", options.repeats)
    if options.pages:
        return compare_pages(*options.pages, pairs=options.repeats)
    positive("--latents", options.latents)
    result: dict[str, Any] = {}
    if options.sae:
        sae, model, corpus = load_sources(options)
        result["export"] = measure_export(
            sae, model, corpus, n_tokens=options.tokens, dashboard=options.dashboard, latents=options.latents
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for d_sae in options.d_sae:
            big = write_big(folder / str(d_sae), d_sae=d_sae, n_non_zeros=options.non_zeros)
            result.setdefault("big", []).append(big)
        if options.d_sae:
            result["page"] = measure_page(folder / str(options.d_sae[-1]) / "out", repeats=options.repeats)
    return result, table_of(result)


def _bench_start(options: argparse.Namespace) -> Result:
    from tests.bench.start import bench_start

    return bench_start(options)


def _bench_processes(options: argparse.Namespace) -> Result:
    from tests.bench.processes import bench_processes

    for name in ("tokens", "steps", "repeats"):
        positive(f"--{name}", getattr(options, name))
    return bench_processes(options)


def _bench_probing(options: argparse.Namespace) -> Result:
    from tests.bench.probing import bench_probing

    return bench_probing(options)


def _bench_kept(options: argparse.Namespace) -> Result:
    from tests.bench.kept import bench_kept

    positive("--repeats", options.repeats)
    return bench_kept(options)


def _bench_titles(options: argparse.Namespace) -> Result:
    from tests.bench.titles import bench_titles

    return bench_titles(options.folder)


def _bench_circuits(options: argparse.Namespace) -> Result:
    from tests.bench.circuits import bench_circuits

    positive("--repeats", options.repeats)
    return bench_circuits(options)


def _bench_gpu(options: argparse.Namespace) -> Result:
    from tests.bench.gpu import bench_gpu

    return bench_gpu(options.words)


def _bench_mutants(options: argparse.Namespace) -> Result:
    from tests.bench.mutants import bench_mutants

    positive("--n", options.n)
    return bench_mutants(options)


def _bench_cache(options: argparse.Namespace) -> Result:
    import os
    import tempfile

    from tests.bench.cache import measure_build, measure_memory, measure_reading, table_of

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


def _bench_real(options: argparse.Namespace) -> Result:
    from tests.bench.real_model import measure, table_of

    result = measure(options.model, options.corpus, layer=options.layer, repeats=options.repeats)
    return result, table_of(result)


def _bench_corpora(options: argparse.Namespace) -> Result:
    from tests.bench.corpora import measure, table_of

    result = measure(
        options.corpus,
        options.model,
        context_size=options.context_size,
        n_characters=options.characters,
        repeats=options.repeats,
        memory_bytes=options.memory_bytes,
    )
    return result, table_of(result)


def _bench_training(options: argparse.Namespace) -> Result:
    import torch

    from tests.bench.training import check_device

    positive("--repeats", options.repeats)
    positive("--threads", options.threads)
    names = [name.strip() for name in options.tables.split(",")]
    for name in names:
        if name not in TRAINING_TABLES:
            raise UsageError(f"--tables: {name!r} is unknown. {nearest(name, TRAINING_TABLES)}")
    check_device(options.device)
    _shapes(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    values, texts = {}, []
    for name in names:
        values[name], text = TRAINING_TABLES[name](options)
        texts.append(text)
    return values, "\n\n".join(texts)


def _shapes(options: argparse.Namespace) -> list[Any]:
    from tests.bench.training import SHAPES

    known = SHAPES[options.device]
    chosen = [shape for shape in known if options.d_sae in (None, shape.d_sae)]
    if not chosen:
        widths = ", ".join(str(width) for width in sorted({shape.d_sae for shape in known}))
        raise UsageError(f"--d-sae is {options.d_sae}; on {options.device} the shapes have {widths}.")
    return chosen


def _step_table(options: argparse.Namespace) -> tuple[Any, str]:
    from tests.bench.training import measure_steps, times_table

    results = [measure_steps(shape, device=options.device, repeats=options.repeats) for shape in _shapes(options)]
    return results, times_table("forward and backward", results)


def _trainer_table(options: argparse.Namespace) -> tuple[Any, str]:
    from tests.bench.training import measure_trainer, times_table

    results = [measure_trainer(shape, device=options.device, repeats=options.repeats) for shape in _shapes(options)]
    return results, times_table("SAELens' SAETrainer.step", results)


def _memory_table(options: argparse.Namespace) -> tuple[Any, str]:
    from tests.bench.training import measure_memory, memory_table

    results = [measure_memory(shape, device=options.device) for shape in _shapes(options)]
    return results, memory_table(results)


def _run_table(options: argparse.Namespace) -> tuple[Any, str]:
    from tests.bench.stream import compare_runs, sizes_for, table_of

    result = compare_runs(options.model, corpus=options.corpus, repeats=options.repeats, **sizes_for(options.model))
    return result, table_of(result)


def _group_table(options: argparse.Namespace) -> tuple[Any, str]:
    from tests.bench.stream import group_table, measure_group, sizes_for

    sizes = sizes_for(options.model)
    del sizes["hook_name"]
    result = measure_group(options.model, corpus=options.corpus, repeats=options.repeats, **sizes)
    return result, group_table(result)


def _bench_autointerp(options: argparse.Namespace) -> Result:
    from tests.bench.autointerp import measure, table_of
    from tests.bench.llm import llm_table, measure_llm

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


def load_sources(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Return SAE, model and corpus of the options, the SAE's metadata saying what they do not."""
    return Source(model=options.model, corpus=options.corpus).load(options.sae)


def positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}; it must be 1 or more.")


def main(arguments: list[str] | None = None) -> int:
    """Print a table and return the exit code: 0, or 2 for options that cannot be."""
    options = parser_of().parse_args(arguments)
    try:
        value, text = options.command(options)
    except SaeItalianError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

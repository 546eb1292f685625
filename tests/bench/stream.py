"""Whole training runs, model and SAE: ours against SAELens' stock runner, and several SAEs on one pass of the model.

Stock is what `LanguageModelSAETrainingRunner` trains with: HookedTransformer, SAELens' ActivationsStore, its `topk`. Ours
is the Hugging Face model, our stream and `sparse_topk`. Both take the same documents, sizes and settings, are warmed
up, and alternate in one process, so a busy machine slows both. A round is as many steps as replace half of the buffer,
so that each round holds the model passes its steps need.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from sae_italian.corpora import iter_documents
from sae_italian.training.config import RunSpec

N_DOCUMENTS = 5_000


def sizes_for(model: str) -> dict[str, Any]:
    """Return hook and sizes to measure with: those of the mini recipe, or 16,384 latents for a larger model."""
    if model == "sae-italian-mini":
        return {"hook_name": "blocks.1.hook_resid_post", "d_sae": 2048, "k": 8, "context_size": 128}
    return {"hook_name": "blocks.2.hook_resid_post", "d_sae": 16_384, "k": 32, "context_size": 256}


def compare_runs(
    model: str = "sae-italian-mini",
    hook_name: str = "blocks.1.hook_resid_post",
    corpus: str = "micro-italiano",
    *,
    d_sae: int = 2048,
    k: int = 8,
    batch_size: int = 2048,
    context_size: int = 128,
    buffer_tokens: int = 16_384,
    repeats: int = 3,
    architecture: str = "sparse_topk",
    stock_backend: str = "hooked",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, Any]:
    """Return the tokens per second of the stock run and of ours (each round, and the median) and their ratio.

    The ratio is the median of the ratios of rounds that followed one another.
    """
    with _as_folder(corpus) as folder:
        spec = RunSpec(  # pyright: ignore[reportCallIssue]
            model=model,
            hook_name=hook_name,
            corpus=folder,
            repeat_corpus=True,
            sae={"architecture": architecture, "d_sae": d_sae, "k": k},
            training_tokens=10**9,
            context_size=context_size,
            train_batch_size_tokens=batch_size,
            buffer_tokens=buffer_tokens,
            dtype=dtype,
        )
        n_steps = max(1, buffer_tokens // 2 // batch_size)
        ways = {
            "saelens": _stock(_with(spec, "topk"), stock_backend),
            "ours": _ours(spec, [hook_name], Path(folder) / "out"),
        }
        seconds = _rounds(ways, n_steps, repeats)
    speeds = {name: [n_steps * batch_size / second for second in rounds] for name, rounds in seconds.items()}
    return {
        "model": model,
        "hook_name": hook_name,
        "d_sae": d_sae,
        "k": k,
        "batch_size": batch_size,
        "context_size": context_size,
        "buffer_tokens": buffer_tokens,
        **_machine(),
        "tokens_per_second": {
            name: {"median": statistics.median(rounds), "runs": rounds} for name, rounds in speeds.items()
        },
        "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["saelens"], strict=True)),
    }


def measure_group(
    model: str = "sae-italian-mini",
    hook_names: Sequence[str] = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"),
    corpus: str = "micro-italiano",
    *,
    d_sae: int = 2048,
    k: int = 8,
    batch_size: int = 2048,
    context_size: int = 128,
    buffer_tokens: int = 16_384,
    repeats: int = 3,
) -> dict[str, Any]:
    """Return the seconds of training one SAE a hook on one pass, beside the sum of their parts.

    The parts are the SAE steps alone, on activations at hand, and one pass of the model for all hooks alone, packing
    included.
    """
    from sae_italian.models.activations import read_many

    with _as_folder(corpus) as folder:
        spec = RunSpec(  # pyright: ignore[reportCallIssue]
            model=model,
            hook_name=hook_names[0],
            corpus=folder,
            repeat_corpus=True,
            sae={"architecture": "sparse_topk", "d_sae": d_sae, "k": k},
            training_tokens=10**9,
            context_size=context_size,
            train_batch_size_tokens=batch_size,
            buffer_tokens=buffer_tokens,
        )
        runs, stream = _group(spec, hook_names, Path(folder) / "out")
        batch = next(stream)
        windows = torch.from_numpy(next(stream.windows))
        kept = int(stream._kept(windows.numpy()).sum())
        n_steps = max(1, buffer_tokens // 2 // batch_size)

        def together() -> None:
            taken = next(stream)
            for run in runs:
                run.step(taken)

        def saes() -> None:
            for run in runs:
                run.step(batch)

        def model_pass() -> None:
            read_many(stream.model, windows, list(hook_names))

        ways = {"together": together, "saes": saes, "model": model_pass}
        seconds = _rounds(ways, n_steps, repeats)
    passes = batch_size / kept  # of the model, for one batch of kept tokens
    ratios = [
        whole / (steps + passes * one)
        for whole, steps, one in zip(seconds["together"], seconds["saes"], seconds["model"], strict=True)
    ]
    return {
        "model": model,
        "hook_names": list(hook_names),
        "d_sae": d_sae,
        **_machine(),
        "seconds_per_step": {
            "together": statistics.median(seconds["together"]) / n_steps,
            "saes": statistics.median(seconds["saes"]) / n_steps,
            "model": passes * statistics.median(seconds["model"]) / n_steps,
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _rounds(ways: dict[str, Callable[[], None]], n_steps: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way's rounds of `n_steps` calls, the ways alternating, after one call each."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(n_steps):
                way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _stock(spec: RunSpec, backend: Any) -> Callable[[], None]:
    """Return one step of what SAELens' runner trains, from its own objects."""
    from sae_lens import LanguageModelSAETrainingRunner, SAETrainer

    from sae_italian.models import load_model

    config = spec.to_saelens()
    runner = LanguageModelSAETrainingRunner(
        config, override_model=load_model(spec.model, backend=backend, dtype=spec.dtype)
    )
    provider = runner.activations_store
    trainer = SAETrainer(cfg=config.to_sae_trainer_config(), sae=runner.sae, data_provider=provider)

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(next(provider))
        trainer.n_training_steps += 1

    return step


def _ours(spec: RunSpec, hook_names: Sequence[str], out: Path) -> Callable[[], None]:
    runs, stream = _group(spec, hook_names, out)

    def step() -> None:
        batch = next(stream)
        for run in runs:
            run.step(batch)

    return step


def _group(spec: RunSpec, hook_names: Sequence[str], out: Path) -> tuple[list[Any], Any]:
    """Return one SAERun for each hook, and the stream that feeds them all."""
    from sae_italian.models import load_model
    from sae_italian.training.loop import SAERun
    from sae_italian.training.run import open_stream

    model = load_model(spec.model, dtype=spec.dtype)
    stream = open_stream(spec, model, list(hook_names))
    runs = [SAERun(spec.model_copy(update={"hook_name": name}), model, out / name) for name in hook_names]
    return runs, stream


def _with(spec: RunSpec, architecture: str) -> RunSpec:
    return spec.model_copy(update={"sae": spec.sae | {"architecture": architecture}})


@contextmanager
def _as_folder(corpus: str) -> Iterator[str]:
    """Write the corpus' first documents into a folder that `datasets` reads too."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "train.jsonl").open("w", encoding="utf-8") as handle:
            for document in islice(iter_documents(corpus, "train"), N_DOCUMENTS):
                handle.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
        yield folder


def _machine() -> dict[str, Any]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpus": cpus, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


def table_of(result: dict[str, Any]) -> str:
    """Return the result of `compare_runs` as a table."""
    lines = [
        f"{result['model']}, {result['hook_name']}, d_sae {result['d_sae']:,}, k {result['k']}, "
        f"batch {result['batch_size']:,}, context {result['context_size']}, {result['cpus']} CPUs (load {result['load']:.1f})",
        f"{'model + SAE':20} {'tokens/s':>10} {'ratio':>7}   rounds",
    ]
    for name, speed in result["tokens_per_second"].items():
        ratio = f"{result['ratio']:.2f}" if name == "ours" else "1.00"
        rounds = ", ".join(f"{value:,.0f}" for value in speed["runs"])
        lines.append(f"{name:20} {speed['median']:>10,.0f} {ratio:>7}   {rounds}")
    return "\n".join(lines)


def group_table(result: dict[str, Any]) -> str:
    """Return the result of `measure_group` as a table."""
    seconds = result["seconds_per_step"]
    return "\n".join(
        [
            f"{result['model']}, {len(result['hook_names'])} SAEs of {result['d_sae']:,} latents on one pass, "
            f"{result['cpus']} CPUs (load {result['load']:.1f})",
            f"together {1000 * seconds['together']:.0f} ms a step; SAE steps alone {1000 * seconds['saes']:.0f} ms, "
            f"one model pass {1000 * seconds['model']:.0f} ms; ratio {result['ratio']:.2f} "
            f"({', '.join(f'{ratio:.2f}' for ratio in result['ratios'])})",
        ]
    )

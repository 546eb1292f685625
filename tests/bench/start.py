"""Where an SAE starts, on the activations of a real and of a toy model: from zero or from the mean, ours and SAELens' own.

The activations of a model are read once; all SAEs and seeds are trained on the same batches of them, side by side, and judged
on the same held-out text. The start at the mean has all seeds, the others so many as are asked for: from zero latents die by
the thousand, and the auxiliary loss of dead latents is what takes the time. `median` rows are over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.base.pace import progress
from sae_italian.base.report import table
from sae_italian.corpora import iter_documents, pack
from sae_italian.corpora.packing import special_mask
from sae_italian.evaluation import evaluate
from sae_italian.models import load_model
from sae_italian.models.activations import read_activations
from sae_italian.saes import load_sae
from sae_italian.training import RunSpec, load_spec
from sae_italian.training.loop import SAERun
from sae_italian.training.run import open_stream

SAES = {
    "sparse_topk, zero": ("sparse_topk", "zero"),
    "sparse_topk, mean": ("sparse_topk", "mean"),
    "SAELens' topk, zero": ("topk", "zero"),
    "SAELens' topk, mean": ("topk", "mean"),  # SAELens has no such start: it is our twin of its topk
}
TWIN = "SAELens' topk, mean"
BATCH, CONTEXT = 2048, 128
FIGURES = {
    "explained_variance": "explained variance, centred",
    "per_dimension": "mean over dimensions",
    "dead": "dead for 30 steps",
    "ce_loss_recovered": "CE recovered",
    "kl_recovered": "KL recovered",
}


def bench_start(options: argparse.Namespace) -> tuple[Any, str]:
    """Train the SAEs of each model, judge them on held-out text, and return rows and tables."""
    rows, texts = [], []
    for name, hook_name in ((options.model, options.hook_name), (options.toy, options.toy_hook_name)):
        if name:
            found = _of_one_model(name, hook_name, options)
            rows += found
            texts.append(f"{name}, {hook_name}\n\n{_table(found)}")
    return rows, "\n\n".join(texts)


def mixed(corpus: str) -> str:
    """Return a folder's files as a mixture, a document of each in turn, so that a short training sees all of them."""
    files = sorted(Path(corpus).glob("*.jsonl*")) if Path(corpus).is_dir() else []
    return ",".join(map(str, files)) or corpus


def _of_one_model(name: str, hook_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    corpus = mixed(options.corpus)
    words = (
        f"model={name}", f"corpus={corpus}", f"hook_name={hook_name}", f"sae.d_sae={options.d_sae}", f"sae.k={options.k}",
        f"training_tokens={BATCH * (options.steps + 1)}", f"train_batch_size_tokens={BATCH}", f"lr={options.lr}",
        f"context_size={CONTEXT}", "repeat_corpus=true",
    )  # fmt: skip
    specs: dict[str, RunSpec] = {}
    for which, (architecture, start) in SAES.items():
        seeds = options.seeds if which == "sparse_topk, mean" else options.seeds[: options.other_seeds]
        for seed in seeds if which != TWIN or options.twin else []:
            own = (f"sae.architecture={architecture}", f"sae.start={start}", f"seed={seed}")
            specs[f"{which} | {seed}"] = load_spec("gemma-3-270m", *words, *own)
    model = load_model(name)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {label: Path(scratch) / str(number) for number, label in enumerate(specs)}
        for folder in folders.values():
            folder.mkdir()
        _train(specs, folders, model, options)
        return _judged(model, hook_name, corpus, folders, options)


def _train(specs: Mapping[str, RunSpec], folders: Mapping[str, Path], model: Any, options: argparse.Namespace) -> None:
    """Train all SAEs on the same activations, read again in another order as often as the steps ask for."""
    first = next(iter(specs.values()))
    stream = open_stream(first.model_copy(update={"buffer_tokens": options.train_tokens}), model, first.hook_name)
    with progress("activations", total=options.train_tokens) as bar:
        stream.fill(bar.update)
    x = stream.sample(first.hook_name)
    runs = {label: SAERun(spec, model, folders[label]) for label, spec in specs.items()}
    for run in runs.values():
        run.prepare(stream)
    n_times = -(-BATCH * (options.steps + 1) // len(x))
    orders = torch.cat([torch.randperm(len(x), generator=torch.Generator().manual_seed(n)) for n in range(n_times)])
    with progress("steps", total=options.steps, unit="step") as bar:
        for step in range(options.steps + 1):
            batch = {first.hook_name: x[orders[step * BATCH : (step + 1) * BATCH]]}
            for run in runs.values():
                run.step(batch)
                if step % 10 == 0:
                    run.record()
            bar.update(1)
    for run in runs.values():
        run.finish()


def _judged(
    model: Any, hook_name: str, corpus: str, folders: Mapping[str, Path], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each SAE; losses, which cost three passes of the whole model each, of the first seed's alone."""
    x, rows = _held_out(model, hook_name, corpus, options.tokens), []
    for label, folder in folders.items():
        which, seed = label.split(" | ")
        sae: Any = load_sae(folder)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        row = {"sae": which, "seed": int(seed), "dead": last["sparsity/dead_features"] / options.d_sae, **_fit(sae, x)}
        if int(seed) == options.seeds[0] and options.loss_tokens:
            card = evaluate(sae, model, corpus, n_tokens=options.loss_tokens, context_size=CONTEXT).estimates()
            row |= {key: card[key].value for key in ("ce_loss_recovered", "kl_recovered")}
        rows.append(row)
    return rows


@torch.no_grad()
def _held_out(model: Any, hook_name: str, corpus: str, n_tokens: int) -> Float[Tensor, "tokens d_in"]:
    """Return activations of held-out text, special tokens left out."""
    found: list[Tensor] = []
    for block in pack(iter_documents(corpus, "heldout"), model.tokenizer, CONTEXT, windows_per_block=16):
        keep = torch.from_numpy(~special_mask(block.tokens, model.tokenizer))
        found.append(read_activations(model, torch.from_numpy(block.tokens), hook_name)[keep])
        if sum(map(len, found)) >= n_tokens:
            break
    return torch.cat(found)


@torch.no_grad()
def _fit(sae: Any, x: Float[Tensor, "tokens d_in"]) -> dict[str, float]:
    """Return the centred explained variance, whole and as the mean over dimensions."""
    error = torch.cat([sae(part) - part for part in x.split(BATCH)]).double().pow(2).sum(0)
    variance = (x.double() - x.double().mean(0)).pow(2).sum(0)
    per_dimension = 1 - error / variance
    return {
        "explained_variance": float(1 - error.sum() / variance.sum()),
        "per_dimension": float(per_dimension[variance > 0].mean()),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [[row["sae"], row["seed"], *(_shown(row, key) for key in FIGURES)] for row in rows]
    for which in dict.fromkeys(row["sae"] for row in rows):
        its = [row for row in rows if row["sae"] == which]
        if len(its) > 1:
            middle = {key: median(row[key] for row in its) for key in ("explained_variance", "per_dimension", "dead")}
            cells.append([which, "median", *(_shown(middle, key) for key in FIGURES)])
    return table(f"SAE | seed | {' | '.join(FIGURES.values())}", cells)


def _shown(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    return f"{100 * row[key]:.1f} %" if key == "dead" else f"{row[key]:.3f}"

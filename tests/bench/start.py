"""Where an SAE starts, on real activations: from zero or from the mean, ours and SAELens' own, on one stream of one model."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from sae_italian.base.report import table
from sae_italian.evaluation import evaluate
from sae_italian.models import load_model
from sae_italian.saes import load_sae
from sae_italian.training import load_spec
from sae_italian.training.run import train_together

SAES = {
    "sparse_topk, zero": ("sparse_topk", "zero"),
    "sparse_topk, mean": ("sparse_topk", "mean"),
    "SAELens' topk, zero": ("topk", None),
    "SAELens' topk, mean": ("topk", "mean"),
}


def bench_start(options: argparse.Namespace) -> tuple[Any, str]:
    """Train the SAEs of a table side by side, and judge each on held-out text."""
    which = list(SAES)[: 4 if options.stock else 2]
    sizes = (
        f"model={options.model}", f"corpus={options.corpus}", f"hook_name={options.hook_name}", f"sae.d_sae={options.d_sae}",
        f"sae.k={options.k}", f"training_tokens={2048 * options.steps}", f"lr={options.lr}", "repeat_corpus=true",
    )  # fmt: skip
    rows = []
    for seed in options.seeds:
        specs = {}
        for name in which:
            architecture, start = SAES[name]
            spec = load_spec("gemma-3-270m", *sizes, f"sae.architecture={architecture}", f"seed={seed}")
            sae = {key: value for key, value in spec.sae.items() if key != "start"} | (
                {"start": start} if start else {}
            )
            specs[name] = spec.model_copy(update={"sae": sae})
        model = load_model(options.model)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / str(number) for number, name in enumerate(which)}
            for folder in folders.values():
                folder.mkdir()
            train_together(specs, folders, model, Path(scratch))
            for name, folder in folders.items():
                last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                card = evaluate(
                    load_sae(folder), model, options.corpus, n_tokens=8_000, loss_tokens=2_000, context_size=128
                ).estimates()
                found = {key: card[key].value for key in ("explained_variance", "ce_loss_recovered", "kl_recovered")}
                rows.append(
                    {"sae": name, "seed": seed, **found, "dead": last["sparsity/dead_features"] / options.d_sae}
                )
    text = table(
        "SAE | seed | explained variance, centred | CE recovered | KL recovered | dead (30 steps)",
        [
            [r["sae"], r["seed"], *(f"{value:.3f}" for key, value in r.items() if key not in ("sae", "seed"))]
            for r in rows
        ],
    )
    return rows, text

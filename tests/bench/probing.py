"""Our benchmark's probes against the package sae-probes, on its English sets: seconds of processor time, and the AUCs of both.

Both read the same sentences, train and test on the same rows of them, which sae-probes draws, and probe the last token's
latents of one SAE. sae-probes reads by TransformerLens' HookedTransformer, keeps activations, encodes densely and fits by
scikit-learn's saga; ours reads all tokens of a text by the Hugging Face model, since means are asked too. Its package wants
XGBoost for baselines that are not run here; an empty module stands in for it where it is absent.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_italian.base.errors import UsageError
from sae_italian.base.report import table
from sae_italian.benchmark.probes import CONTEXT, SIZES, Examples, Pooling, read_texts, sparse_probes
from sae_italian.models import load_model
from sae_italian.saes import load_sae

STAGES = ("activations", "latents and probes")
MOST_TRAIN = 1024  # rows, of sae-probes' setting "normal"


def bench_probing(options: argparse.Namespace) -> tuple[Any, str]:
    """Return both sides' seconds and AUCs by set, and a table. Raises: UsageError without sae-probes, or for long texts."""
    sys.path.insert(0, str(options.packages))
    sys.modules.setdefault("xgboost", types.ModuleType("xgboost"))
    try:
        import sae_probes.utils_data as data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{options.packages} holds no sae_probes ({error}). Make it: "
            f"pip install --no-deps --target {options.packages} sae-probes==0.4.2 zstandard"
        ) from None
    torch.set_num_threads(1)
    sae = load_sae(options.sae)
    name = options.model or sae.cfg.metadata.model_name
    model, hooked = load_model(name), load_model(name, backend="hooked")
    result: dict[str, Any] = {}
    for which in options.sets:
        texts = [str(text) for text in data.read_numbered_dataset_df(which)["prompt"]]
        if max(len(ids) for ids in model.tokenizer(texts)["input_ids"]) > CONTEXT:
            raise UsageError(
                f"set {which!r} has texts of more than {CONTEXT} tokens, which the two sides cut differently."
            )
        rounds = [(_theirs(sae, hooked, which), _ours(sae, model, data, which, texts)) for _ in range(options.repeats)]
        result[which] = {
            side: {
                "seconds": {stage: statistics.median(one[i][0][stage] for one in rounds) for stage in STAGES},
                "auc": rounds[0][i][1],
            }
            for i, side in enumerate(("sae-probes", "ours"))
        } | {"texts": len(texts)}
    return result, table_of(result)


def _timed(seconds: dict[str, float], stage: str, act: Callable[[], Any]) -> Any:
    started = time.process_time()
    done = act()
    seconds[stage] = time.process_time() - started
    return done


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what sae-probes and scikit-learn print out of the table."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _theirs(sae: Any, hooked: Any, which: str) -> tuple[dict[str, float], dict[str, float]]:
    from sae_probes.generate_model_activations import ensure_dataset_activations  # pyright: ignore[reportMissingImports]
    from sae_probes.run_sae_evals import run_sae_eval  # pyright: ignore[reportMissingImports]

    seconds: dict[str, float] = {}
    hook_name = sae.cfg.metadata.hook_name
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        at: dict[str, Any] = {"model_name": "model", "model_cache_path": scratch, "device": "cpu"}
        _timed(
            seconds, STAGES[0],
            lambda: ensure_dataset_activations(dataset_short_names=[which], hook_names=[hook_name], model=hooked, **at),
        )  # fmt: skip
        asked: dict[str, Any] = {"reg_type": "l1", "setting": "normal", "ks": list(SIZES), "results_path": scratch}
        _timed(seconds, STAGES[1], lambda: run_sae_eval(sae, which, hook_name, **asked, **at))
        (written,) = Path(scratch).rglob(f"{which}_*.json")
        found = json.loads(written.read_text(encoding="utf-8"))
    return seconds, {str(one["k"]): one["test_auc"] for one in found}


def _ours(sae: Any, model: Any, data: Any, which: str, texts: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    seconds: dict[str, float] = {}
    answers = data.get_yvals(which).astype(bool)
    n_train = min(len(answers) - 100, MOST_TRAIN)
    split = data.get_train_test_indices(answers, n_train, len(answers) - n_train - 1, 0.5, 42)
    with tempfile.TemporaryDirectory() as scratch:
        acts = _timed(
            seconds, STAGES[0],
            lambda: read_texts(model, sae.cfg.metadata.hook_name, texts, Path(scratch)),
        )  # fmt: skip

        def probed() -> dict[int, Any]:
            pooling = Pooling(acts, texts, [*enumerate(map(len, texts))])
            train, test = (np.array([pooling.rows[int(text), len(texts[text])] for text in side]) for side in split)
            latents = pooling.latents(sae, "latents")
            y, truth = (answers[side] for side in split)
            return sparse_probes(Examples(latents[train], y, latents[test], truth))

        found = _timed(seconds, STAGES[1], probed)
    return seconds, {str(k): judged.auc for k, judged in found.items()}


def table_of(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = []
    for which, found in result.items():
        sides = [found[side] for side in ("sae-probes", "ours")]
        times = [[side["seconds"][stage] for stage in STAGES] for side in sides]
        rows.append(
            (
                which,
                found["texts"],
                *(f"{a:.1f} / {b:.1f}" for a, b in zip(*times, strict=True)),
                f"{sum(times[0]) / sum(times[1]):.1f}",
                *(" / ".join(f"{side['auc'][str(k)]:.3f}" for side in sides) for k in (1, 16)),
            )
        )
    stages = " | ".join(f"{stage}, s" for stage in STAGES)
    return table(f"sae-probes / ours | texts | {stages} | ratio | AUC, k = 1 | AUC, k = 16", rows)

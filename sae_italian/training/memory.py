"""What a training takes of memory, reckoned from shapes, and what stands out in its activations: `train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.corpora.packing import special_mask
from sae_italian.evaluation.outliers import Outliers, outliers_of
from sae_italian.models import load_model, load_model_config, load_tokenizer
from sae_italian.models.activations import read_many
from sae_italian.models.loading import weights_are_here
from sae_italian.training.config import RunSpec
from sae_italian.training.stream import WindowBlocks
from sae_italian.training.text import check_length, training_documents

GB = 1e9
COPIES = 4  # of the weights: themselves, the gradient, Adam's two averages
FLOAT = 4  # bytes; SAEs train in float32
SPARSE = ("sparse_topk", "topk_transcoder")
LOOKED_AT = 2048  # tokens whose activations a dry run reads
# [batch, d_sae] matrices that are alive at once: pre-activations, activations, and their gradients and masks.
DENSE_MATRICES, SPARSE_MATRICES = 6, 1


def memory_of(specs: Sequence[RunSpec]) -> dict[str, float]:
    """Return what training these SAEs on one pass of their model takes, in 10^9 bytes by what they hold.

    SAEs are trained one after the other, so `step` is that of the largest. Raises: UsageError as `RunSpec.sae_config`.
    """
    first, saes, steps = specs[0], 0, []
    for spec in specs:
        sae = spec.sae_config()
        both = sae.d_in + getattr(sae, "d_out", sae.d_in)
        matrices = SPARSE_MATRICES if sae.architecture() in SPARSE else DENSE_MATRICES
        saes += COPIES * FLOAT * sae.d_sae * (both + 1)
        steps.append(FLOAT * spec.train_batch_size_tokens * (matrices * sae.d_sae + 4 * both))
    model: Any = load_model_config(first.model)
    width = 2 if first.dtype == "bfloat16" else 4
    hidden = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    hooks = {hook for spec in specs for hook in spec.hook_names}
    forward = first.store_batch_size_prompts * first.context_size * (6 * model.hidden_size + 3 * hidden)
    return {
        "saes_gb": saes / GB,
        "step_gb": max(steps) / GB,
        "model_gb": width * n_parameters(first.model) / GB,
        "forward_gb": width * forward / GB,
        "buffer_gb": width * len(hooks) * first.buffer_tokens * model.hidden_size / GB,
    }


def memory_text(memory: dict[str, float]) -> str:
    """Return `1.25 GB (saes 0.50, step 0.25, ...)`."""
    parts = ", ".join(f"{name.removesuffix('_gb')} {value:.2f}" for name, value in memory.items())
    return f"{sum(memory.values()):.2f} GB ({parts})"


@cache
def n_parameters(model: str) -> int:
    """Return how many parameters a model has, without loading any. Raises: UsageError as `load_model_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_model_config(model))
    return sum(parameter.numel() for parameter in empty.parameters())


def plan(groups: Sequence[Mapping[str, RunSpec]], limit_gb: float | None = None) -> tuple[dict[str, Any], str]:
    """Return what training these groups takes, each on one pass of the model and of the text, as JSON and as text.

    Raises: UsageError as `check_length`.
    """
    first = next(iter(groups[0].values()))
    n_tokens, length = first.training_tokens, check_length(first, load_tokenizer(first.model))
    rows, lines = [], [f"{n_tokens:,} tokens to train on; {length}"]
    for number, group in enumerate(groups):
        memory = memory_of(list(group.values()))
        total = {"memory": memory, "memory_gb": sum(memory.values())}
        rows.append({"names": list(group), "tokens": n_tokens, **total})
        lines += [f"group {number}: SAEs {len(group)}, memory {memory_text(memory)}", f"  {' '.join(group)}"]
    limit = "" if limit_gb is None else f" of {limit_gb:g} GB given"
    largest = max(row["memory_gb"] for row in rows)
    lines.append(f"SAEs {sum(map(len, groups))}, groups {len(groups)}; largest group {largest:.2f} GB{limit}")
    hooks = dict.fromkeys(hook for group in groups for spec in group.values() for hook in spec.hook_names)
    try:
        found = look_at(first, list(hooks))
    except UsageError as error:
        found = {}
        lines.append(f"activations were not looked at: {error}")
    lines += [f"activations at {hook}: {outliers.text()}" for hook, outliers in found.items()]
    result = {"groups": rows, "memory_gb": limit_gb, "corpus": length, "activations": plain(found)}
    return result, "\n".join(lines)


def look_at(spec: RunSpec, hook_names: list[str]) -> dict[str, Outliers]:
    """Return what stands out at some hooks in the first windows of the training text.

    Raises: UsageError when the model's weights would have to be fetched first, or its device is not here.
    """
    if not weights_are_here(spec.model):
        raise UsageError(f"the weights of {spec.model} are not on this machine.")
    if spec.use_cached_activations:
        raise UsageError("they are read from a folder.")
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    n_windows = max(1, LOOKED_AT // spec.context_size)
    windows = next(WindowBlocks(training_documents(spec), model.tokenizer, spec.context_size, n_windows))
    tokens = torch.from_numpy(windows).to(model.device)
    keep = torch.from_numpy(~special_mask(windows, model.tokenizer)).to(model.device)
    acts = read_many(model, tokens, hook_names)
    return {name: outliers_of(acts[name], tokens, keep, model.tokenizer) for name in hook_names}

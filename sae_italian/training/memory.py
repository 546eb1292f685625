"""What a training takes of memory, reckoned from shapes before anything is allocated: `train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from sae_italian.models import load_model_config
from sae_italian.training.config import RunSpec

GB = 1e9
COPIES = 4  # of the weights: themselves, the gradient, Adam's two averages
FLOAT = 4  # bytes; SAEs train in float32
SPARSE = ("sparse_topk", "topk_transcoder")
# [batch, d_sae] matrices that are alive at once: pre-activations, activations, and their gradients and masks.
DENSE_MATRICES, SPARSE_MATRICES = 6, 1


@dataclass(frozen=True)
class Memory:
    """Bytes / 10^9 by what they hold; SAEs are trained one after the other, so `step` is that of the largest."""

    saes_gb: float
    step_gb: float
    model_gb: float
    forward_gb: float
    buffer_gb: float

    @property
    def total_gb(self) -> float:
        return sum(asdict(self).values())

    def text(self) -> str:
        parts = ", ".join(f"{name.removesuffix('_gb')} {value:.2f}" for name, value in asdict(self).items())
        return f"{self.total_gb:.2f} GB ({parts})"


def memory_of(specs: Sequence[RunSpec]) -> Memory:
    """Return what training these SAEs on one pass of their model takes. Raises: UsageError as `RunSpec.sae_config`."""
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
    return Memory(
        saes_gb=saes / GB,
        step_gb=max(steps) / GB,
        model_gb=width * n_parameters(first.model) / GB,
        forward_gb=width * forward / GB,
        buffer_gb=width * len(hooks) * first.buffer_tokens * model.hidden_size / GB,
    )


@cache
def n_parameters(model: str) -> int:
    """Return how many parameters a model has, without loading any. Raises: UsageError as `load_model_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_model_config(model))
    return sum(parameter.numel() for parameter in empty.parameters())


def plan(groups: Sequence[Mapping[str, RunSpec]], limit_gb: float | None = None) -> tuple[dict[str, Any], str]:
    """Return what training these groups takes, each on one pass of the model, as JSON and as text."""
    rows, lines = [], []
    for number, group in enumerate(groups):
        memory, n_tokens = memory_of(list(group.values())), next(iter(group.values())).training_tokens
        parts = {"memory": asdict(memory), "memory_gb": memory.total_gb}
        rows.append({"names": list(group), "tokens": n_tokens, **parts})
        lines.append(f"group {number}: {_count(len(group), 'SAE')}, {n_tokens:,} tokens, memory {memory.text()}")
        lines.append(f"  {' '.join(group)}")
    largest = max(row["memory_gb"] for row in rows)
    limit = "" if limit_gb is None else f" of {limit_gb:g} GB given"
    n_saes = sum(len(group) for group in groups)
    lines.append(f"{_count(n_saes, 'SAE')} in {_count(len(rows), 'group')}; largest group {largest:.2f} GB{limit}")
    return {"groups": rows, "memory_gb": limit_gb}, "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"

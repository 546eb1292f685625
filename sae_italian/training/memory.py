"""What a training run takes of memory, reckoned from shapes before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
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
    configs, first = [_shape(spec) for spec in specs], specs[0]
    config: Any = load_model_config(first.model)
    width = 2 if first.dtype == "bfloat16" else 4
    tokens = first.store_batch_size_prompts * first.context_size
    hidden = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    hooks = {hook for spec in specs for hook in (spec.hook_name, spec.hook_name_out) if hook}
    return Memory(
        saes_gb=sum(COPIES * FLOAT * d_sae * (d_in + d_out + 1) for d_in, d_out, d_sae, _ in configs) / GB,
        step_gb=max(
            FLOAT * spec.train_batch_size_tokens * (matrices * d_sae + 4 * (d_in + d_out))
            for spec, (d_in, d_out, d_sae, matrices) in zip(specs, configs, strict=True)
        )
        / GB,
        model_gb=width * n_parameters(first.model) / GB,
        forward_gb=width * tokens * (6 * config.hidden_size + 3 * hidden) / GB,
        buffer_gb=width * len(hooks) * first.buffer_tokens * config.hidden_size / GB,
    )


def _shape(spec: RunSpec) -> tuple[int, int, int, int]:
    """Return d_in, d_out, d_sae and how many [batch, d_sae] matrices a step holds."""
    config = spec.sae_config()
    matrices = SPARSE_MATRICES if config.architecture() in SPARSE else DENSE_MATRICES
    return config.d_in, getattr(config, "d_out", config.d_in), config.d_sae, matrices


@cache
def n_parameters(model: str) -> int:
    """Return how many parameters a model has, without loading any. Raises: UsageError as `load_model_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_model_config(model))
    return sum(parameter.numel() for parameter in empty.parameters())

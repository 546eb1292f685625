"""Log-probabilities of texts and of answers, in batches, and what share of a task's items a model gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.base import pictures
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.models.activations import check_context

BATCH = 64
CHANCE = 0.5


@dataclass(frozen=True)
class TaskScore:
    """How well a model does a task of two choices; differences are in nats, intervals over the items."""

    n: int
    accuracy: Estimate
    difference: Estimate  # mean of log p(right) - log p(wrong)
    by_kind: dict[str, Estimate]  # accuracy

    def as_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "accuracy": self.accuracy.as_dict(),
            "difference": self.difference.as_dict(),
            "by_kind": {kind: share.as_dict() for kind, share in self.by_kind.items()},
        }

    def svg(self) -> str:
        """Return the accuracies by kind as a picture, chance as a line."""
        return pictures.svg(self._draw, 1, (6, 0.5 * len(self.by_kind) + 1))

    def _draw(self, axes: Any) -> None:
        axis, kinds = axes[0], list(self.by_kind)
        for row, kind in enumerate(kinds):
            share = self.by_kind[kind]
            axis.barh(row, share.value, color=pictures.OURS, height=0.6)
            axis.plot((share.lo, share.hi), (row, row), color="black", linewidth=1)
        axis.axvline(CHANCE, color=pictures.REFERENCE, linestyle=":")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="right, 95 % interval")

    def text(self) -> str:
        """Return accuracy, its interval and the mean difference in one line."""
        low, high = self.accuracy.lo, self.accuracy.hi
        return (
            f"{self.accuracy.value:.1%} of {self.n} right (95 % interval {low:.1%} to {high:.1%}), "
            f"mean difference {self.difference.value:+.2f} nats"
        )


def score(differences: Float[np.ndarray, " n"], kinds: Sequence[str]) -> TaskScore:
    """Return accuracy and mean of log p(right) - log p(wrong); a difference of 0 is not right."""
    right, named = differences > 0, np.array(kinds)
    return TaskScore(
        len(differences),
        wilson(int(right.sum()), len(right)),
        mean_interval(differences),
        {kind: wilson(int(right[named == kind].sum()), int((named == kind).sum())) for kind in dict.fromkeys(kinds)},
    )


def check_able(found: TaskScore, task: str, model: str) -> TaskScore:
    """Return the score. Raises: UsageError when the accuracy is not above chance, its interval considered."""
    if found.accuracy.lo <= CHANCE:
        raise UsageError(
            f"{model} does not do the task ({task}): {found.text()}, where chance is {CHANCE:.0%}. What a latent does to "
            "a skill that is not there cannot be measured; use a model that has it."
        )
    return found


def padded(tokenizer: Any, texts: Sequence[str]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Return the texts' tokens, padded on the right with zeros that a causal model never sees, and their lengths."""
    rows = [tokenizer(text).input_ids for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, lengths


@torch.no_grad()
def log_probs_after(
    model: Any, tokenizer: Any, prefixes: Sequence[str], texts: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Return log p(text | prefix) in nats, where each text begins with its prefix, token for token.

    What is summed is every token after the prefix's. Raises: UsageError for a text beyond the model's positions.
    """
    values = []
    for first in range(0, len(texts), BATCH):
        tokens, lengths = padded(tokenizer, texts[first : first + BATCH])
        check_context(tokens.shape[1], model.config)
        starts = torch.tensor([len(tokenizer(prefix).input_ids) for prefix in prefixes[first : first + BATCH]])
        tokens = tokens.to(model.device)
        log_p = model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        each = log_p.gather(-1, tokens[:, 1:, None])[..., 0].cpu()
        at = torch.arange(1, tokens.shape[1])
        counted = (at >= starts[:, None]) & (at < lengths[:, None])
        values.append((each * counted).sum(-1).double().numpy())
    return np.concatenate(values) if values else np.zeros(0)

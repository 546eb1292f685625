"""What share of a task's items a model gets right: the likelier of two texts, one of which is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian import micro_italiano
from sae_italian.base import pictures
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.models.activations import check_context, continuation_log_probs

CHANCE = 0.5


Choice = tuple[str, str, str, str]  # prefix, the right text, the wrong text, kind of the item


@dataclass(frozen=True)
class TaskScore:
    """How well a model does a task of two choices; differences are in nats, intervals over the items."""

    n: int
    accuracy: Estimate
    difference: Estimate  # mean of log p(right) - log p(wrong)
    by_kind: dict[str, Estimate]  # accuracy

    def svg(self) -> str:
        """Return the accuracies by kind as a picture, chance as a line."""

        def draw(axes: Any) -> None:
            for row, share in enumerate(self.by_kind.values()):
                axes[0].barh(row, share.value, color=pictures.OURS, height=0.6)
                axes[0].plot((share.lo, share.hi), (row, row), color="black", linewidth=1)
            axes[0].axvline(CHANCE, color=pictures.REFERENCE, linestyle=":")
            axes[0].set_yticks(range(len(self.by_kind)), list(self.by_kind))
            axes[0].invert_yaxis()
            axes[0].set(xlim=(0, 1), xlabel="right, 95 % interval")

        return pictures.svg(draw, 1, (6, 0.5 * len(self.by_kind) + 1))

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


def score_choices(model: Any, tokenizer: Any, items: Sequence[Choice]) -> TaskScore:
    """Return how often the right text is likelier than the wrong one, both of which begin with the prefix.

    With "" the texts are compared as a whole. Raises: UsageError for a text beyond the model's positions.
    """
    prefixes, right, wrong, kinds = (list(column) for column in zip(*items, strict=True))
    log_p = [log_probs_after(model, tokenizer, prefixes, texts) for texts in (right, wrong)]
    return score(log_p[0] - log_p[1], kinds)


def check_able(found: TaskScore, task: str, model: str) -> TaskScore:
    """Return the score. Raises: UsageError when the accuracy is not above chance, its interval considered."""
    if found.accuracy.lo <= CHANCE:
        raise UsageError(
            f"{model} does not do the task ({task}): {found.text()}, where chance is {CHANCE:.0%}. What a latent does to "
            "a skill that is not there cannot be measured; use a model that has it."
        )
    return found


def log_probs_after(
    model: Any, tokenizer: Any, prefixes: Sequence[str], texts: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Return log p(rest | prefix) in nats of texts that begin with their prefix, token for token."""
    starts = [len(tokenizer(prefix).input_ids) for prefix in prefixes]
    tokens = [tokenizer(text).input_ids for text in texts]
    check_context(max(map(len, tokens), default=0), model.config)
    pairs = [(ids[:n], ids[n:]) for ids, n in zip(tokens, starts, strict=True)]
    return continuation_log_probs(lambda rows: model(rows.to(model.device), use_cache=False).logits, pairs)


def micro_italiano_scores(model: Any, *, n: int = 300, seed: int = 1001) -> tuple[TaskScore, TaskScore]:
    """Return what a model knows of MicroItaliano on n items each: agreement, by kind; the indirect object, by order."""
    prompts = micro_italiano.ioi_prompts(n, seed=seed)
    names = [(prompt.text, prompt.io, prompt.subject, prompt.order) for prompt in prompts]
    agreement, ioi = (
        score_choices(model, model.tokenizer, [(t, f"{t} {right}", f"{t} {wrong}", k) for t, right, wrong, k in items])
        for items in (micro_italiano.agreement_pairs(n, seed=seed), names)
    )
    return agreement, ioi


def italian_skills(model: Any, *, n: int = 300, seed: int = 1001) -> dict[str, float]:
    """Return `micro_italiano_scores` as shares right, and one mean difference in nats."""
    agreement, ioi = micro_italiano_scores(model, n=n, seed=seed)
    return {
        "agreement, all": agreement.accuracy.value,
        **{f"agreement, {kind}": share.value for kind, share in sorted(agreement.by_kind.items())},
        "indirect object, right": ioi.accuracy.value,
        "indirect object, mean difference": ioi.difference.value,
    }

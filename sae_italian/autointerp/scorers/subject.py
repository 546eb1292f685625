"""Scores by the subject model itself: does the explanation make the latent's text, or the latent's effect, likelier?

Surprisal asks of the input side: is a segment on which the latent is active likelier after its explanation than after a
sentence that says nothing? Intervention asks of the output side: after the latent's direction has been added, is the
explanation likelier to follow what the model writes? Small base models read explanations badly, so both come beside the
behavioural scores (Paulo et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.autointerp.protocols import Example, Score
from sae_italian.autointerp.scorers.embedding import ranking
from sae_italian.errors import UsageError
from sae_italian.statistics import NOTHING, Estimate, mean_interval

EMPTY = {"it": "Varie frasi senza legame fra loro.", "en": "Various unrelated sentences."}
ASKS = {"it": "\nIn breve, si parla di: ", "en": "\nIn short, this is about: "}
N_NEW, N_PROMPTS = 8, 30
TOLERANCE = 0.1  # of the wanted divergence
_BATCH = 32

Replace = Callable[[Tensor], Tensor]


class Forward(Protocol):
    """The subject model as logits; `replace`, where given, changes the activation that the SAE reads."""

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], replace: Replace | None = None
    ) -> Float[Tensor, "batch pos vocab"]: ...


def surprisal(
    forward: Forward,
    tokenizer: Any,
    explanation: str,
    examples: Sequence[Example],
    *,
    language: str = "it",
    context: int = 1024,
) -> list[Score]:
    """Return AUROC of log p(segment | explanation) - log p(segment | nothing said), by negative source.

    Raises: UsageError when explanation and segment do not fit into `context` tokens.
    """
    told, untold = (
        _log_likelihoods(forward, _prefix(tokenizer, text + "\n"), [example.tokens for example in examples], context)
        for text in (explanation, EMPTY[language])
    )
    return ranking("surprisal", told - untold, examples)


def _prefix(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


@torch.no_grad()
def _log_likelihoods(
    forward: Forward, prefix: list[int], continuations: Sequence[Int[np.ndarray, " tokens"]], context: int
) -> Float[np.ndarray, " n"]:
    """Return the log-likelihood in nats of each continuation of one prefix."""
    longest = len(prefix) + max((len(tokens) for tokens in continuations), default=0)
    if longest > context:
        raise UsageError(
            f"the text to score has {longest} tokens, the model's context {context}. Use a shorter explanation."
        )
    totals = []
    for first in range(0, len(continuations), _BATCH):
        batch = continuations[first : first + _BATCH]
        width = max(len(tokens) for tokens in batch)
        rows = torch.zeros((len(batch), len(prefix) + width), dtype=torch.int64)
        rows[:, : len(prefix)] = torch.tensor(prefix)
        inside = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, tokens in enumerate(batch):
            rows[row, len(prefix) : len(prefix) + len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
            inside[row, : len(tokens)] = True  # what is padded comes after, so a causal model never sees it
        logits = forward(rows)[:, len(prefix) - 1 : -1].float().cpu()
        log_p = logits.log_softmax(dim=-1).gather(-1, rows[:, len(prefix) :, None])[..., 0]
        totals.append((log_p * inside).sum(dim=1).numpy())
    return np.concatenate(totals) if totals else np.zeros(0)


def intervention(
    forward: Forward,
    tokenizer: Any,
    direction: Float[Tensor, " d_in"],
    explanation: str,
    prompts: Sequence[Int[np.ndarray, " tokens"]],
    *,
    divergence: float = 0.5,
    language: str = "it",
    seed: int = 0,
    context: int = 1024,
) -> Score:
    """Return by how many nats adding the latent's direction makes its explanation likelier after what is written.

    All latents are compared at the same mean divergence of the next token's distribution from the clean one, in nats; the
    strength that gives it is searched and reported. Both texts are sampled with the same seed. A direction that cannot
    reach the divergence has no score.
    """
    shortest = min((len(prompt) for prompt in prompts), default=0)
    if shortest == 0:
        return Score("intervention", "none", {"log_probability_gain": NOTHING}, 0, 0, len(prompts))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.stack([torch.tensor([*bos, *prompt[:shortest].tolist()]) for prompt in prompts[:N_PROMPTS]])
    strength, reached = _strength(forward, tokens, direction, divergence)
    if strength is None:
        return Score("intervention", "none", {"log_probability_gain": NOTHING}, 0, 0, len(tokens))
    add = _adding(direction, strength)
    gains = [
        _asked(forward, tokenizer, _written(forward, tokens, replace, seed), explanation, language, context)
        for replace in (add, None)
    ]
    return Score(
        "intervention",
        "none",
        {
            "log_probability_gain": mean_interval(gains[0] - gains[1]),
            "strength": Estimate(strength, float("nan"), float("nan")),
            "divergence": Estimate(reached, float("nan"), float("nan")),
        },
        len(tokens),
    )


def _adding(direction: Float[Tensor, " d_in"], strength: float) -> Replace:
    return lambda x: x + strength * direction.to(x)


@torch.no_grad()
def _strength(
    forward: Forward, tokens: Int[Tensor, "batch pos"], direction: Float[Tensor, " d_in"], wanted: float
) -> tuple[float | None, float]:
    """Return the strength at which KL(intervened || clean) of the next token is as wanted to 10 %, and that divergence."""
    clean = forward(tokens)[:, -1].float().log_softmax(dim=-1)

    def at(strength: float) -> float:
        log_p = forward(tokens, _adding(direction, strength))[:, -1].float().log_softmax(dim=-1)
        return float((log_p.exp() * (log_p - clean)).sum(dim=-1).mean())

    low, high = 0.0, 1.0
    while (reached := at(high)) < wanted:
        low, high = high, 2 * high
        if high > 2**20:
            return None, reached
    for _ in range(40):
        middle = (low + high) / 2
        reached = at(middle)
        if abs(reached - wanted) <= TOLERANCE * wanted:
            return middle, reached
        low, high = (middle, high) if reached < wanted else (low, middle)
    return None, reached


@torch.no_grad()
def _written(
    forward: Forward, tokens: Int[Tensor, "batch pos"], replace: Replace | None, seed: int
) -> Int[Tensor, "batch new"]:
    """Return what the model writes after the prompts, sampled."""
    generator = torch.Generator().manual_seed(seed)
    written = tokens
    for _ in range(N_NEW):
        p = forward(written, replace)[:, -1].float().softmax(dim=-1).cpu()
        written = torch.cat([written, torch.multinomial(p, 1, generator=generator)], dim=1)
    return written[:, tokens.shape[1] :]


def _asked(
    forward: Forward, tokenizer: Any, written: Int[Tensor, "batch new"], explanation: str, language: str, context: int
) -> Float[np.ndarray, " batch"]:
    """Return log p(explanation | what was written), a row each."""
    answer = np.array(tokenizer(explanation, add_special_tokens=False)["input_ids"], dtype=np.int64)
    question = ASKS[language]
    prefixes = [_prefix(tokenizer, tokenizer.decode(row.tolist()) + question) for row in written]
    return np.concatenate([_log_likelihoods(forward, prefix, [answer], context) for prefix in prefixes])

"""Scores by the subject model itself: does the explanation make the latent's text, or the latent's effect, likelier?

Surprisal asks of the input side: is a segment on which the latent is active likelier after its explanation than after a
sentence that says nothing? Intervention asks of the output side: after the latent's direction has been added, is the
explanation likelier to follow what the model writes? Small base models read explanations badly, so both come beside the
behavioural scores (Paulo et al. 2024), and mean nothing without their controls: any text before a segment, or after what
was written, changes its likelihood. So both take several texts at once, asked about the same segments and continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.autointerp.protocols import Example, Score
from sae_italian.autointerp.scorers.embedding import ranking
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import NOTHING, Estimate, mean_interval

EMPTY = {"it": "Varie frasi senza legame fra loro.", "en": "Various unrelated sentences."}
ASKS = {"it": "\nIn breve, si parla di:", "en": "\nIn short, this is about:"}
N_NEW, N_PROMPTS = 8, 30
TOLERANCE = 0.1  # of the wanted divergence
_BATCH = 32

Texts = Mapping[str, str]  # explanations by a name of the caller's, such as the control they serve
Replace = Callable[[Tensor], Tensor]


class TooLong(UsageError):
    """An explanation that does not fit into the model's context together with what it is asked about."""


class Forward(Protocol):
    """The subject model as logits; `replace`, where given, changes the activation that the SAE reads."""

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], replace: Replace | None = None
    ) -> Float[Tensor, "batch pos vocab"]: ...


def surprisal(
    forward: Forward,
    tokenizer: Any,
    texts: Texts,
    examples: Sequence[Example],
    *,
    language: str = "it",
    context: int = 1024,
) -> dict[str, list[Score]]:
    """Return for each text AUROC of log p(segment | text) - log p(segment | nothing said), by negative source.

    Raises: TooLong when a text and a segment do not fit into `context` tokens.
    """
    segments = [example.tokens for example in examples]

    def after(text: str) -> Float[np.ndarray, " n"]:
        prefix = list(tokenizer(text + "\n")["input_ids"])
        return _log_likelihoods(forward, [(prefix, segment) for segment in segments], context)

    untold = after(EMPTY[language])
    return {name: ranking("surprisal", after(text) - untold, examples) for name, text in texts.items()}


@torch.no_grad()
def _log_likelihoods(
    forward: Forward, pairs: Sequence[tuple[Sequence[int], Sequence[int] | np.ndarray]], context: int
) -> Float[np.ndarray, " n"]:
    """Return the log-likelihood in nats of the second part of each pair after the first."""
    longest = max((len(prefix) + len(rest) for prefix, rest in pairs), default=0)
    if longest > context:
        raise TooLong(
            f"the text to score has {longest} tokens, the model's context {context}. Use a shorter explanation."
        )
    totals = []
    for first in range(0, len(pairs), _BATCH):
        batch = pairs[first : first + _BATCH]
        width = max(len(prefix) + len(rest) for prefix, rest in batch)
        rows = torch.zeros((len(batch), width), dtype=torch.int64)
        asked = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, (prefix, rest) in enumerate(batch):
            stop = len(prefix) + len(rest)
            rows[row, :stop] = torch.tensor([*prefix, *np.asarray(rest, dtype=np.int64).tolist()])
            asked[row, len(prefix) : stop] = True  # what is padded comes after, so a causal model never sees it
        logits = forward(rows)[:, :-1][asked[:, 1:]].float().cpu()
        log_p = logits.log_softmax(dim=-1).gather(-1, rows[asked][:, None])[:, 0]
        row_of = asked.nonzero()[:, 0]
        totals.append(torch.zeros(len(batch)).index_add_(0, row_of, log_p).numpy())
    return np.concatenate(totals) if totals else np.zeros(0)


def intervention(
    forward: Forward,
    tokenizer: Any,
    direction: Float[Tensor, " d_in"],
    texts: Texts,
    prompts: Sequence[Int[np.ndarray, " tokens"]],
    *,
    divergence: float = 0.5,
    language: str = "it",
    seed: int = 0,
    context: int = 1024,
) -> dict[str, Score]:
    """Return for each text by how many nats adding the latent's direction makes it likelier after what is written.

    All latents are compared at the same mean divergence of the next token's distribution from the clean one, in nats; the
    strength that gives it is searched and reported. Both continuations are sampled with the same seed. A direction that
    cannot reach the divergence has no score. Prompts are cut to the shortest one.
    """
    shortest = min((len(prompt) for prompt in prompts), default=0)
    nothing = Score("intervention", "none", {"log_probability_gain": NOTHING}, 0, 0, len(prompts))
    if shortest == 0:
        return dict.fromkeys(texts, nothing)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.stack([torch.tensor([*bos, *prompt[:shortest].tolist()]) for prompt in prompts[:N_PROMPTS]])
    strength, reached = _strength(forward, tokens, direction, divergence)
    if strength is None:
        return dict.fromkeys(texts, nothing)
    written = [_written(forward, tokens, replace, seed) for replace in (_adding(direction, strength), None)]
    scores = {}
    for name, text in texts.items():
        changed, clean = (_asked(forward, tokenizer, rows, text, language, context) for rows in written)
        metrics = {
            "log_probability_gain": mean_interval(changed - clean),
            "strength": Estimate(strength, float("nan"), float("nan")),
            "divergence": Estimate(reached, float("nan"), float("nan")),
        }
        scores[name] = Score("intervention", "none", metrics, len(tokens))
    return scores


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
    pairs = []
    for row in written:
        before = tokenizer.decode(row.tolist()) + ASKS[language]
        # tokenised in one go: a tokenizer that puts spaces before words does so here as it would in a text
        whole, start = list(tokenizer(f"{before} {explanation}")["input_ids"]), list(tokenizer(before)["input_ids"])
        shared = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
        pairs.append((whole[:shared], whole[shared:]))
    return _log_likelihoods(forward, pairs, context)

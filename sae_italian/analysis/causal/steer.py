"""Steering: what the model writes with one latent's direction added at several strengths, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.analysis.causal.splice import (
    check_latent,
    directions,
    hooks_of,
    latents_at,
    logits_with_added,
    prompt_tokens,
    special,
    token_text,
)
from sae_italian.base.errors import UsageError
from sae_italian.models.activations import replaced

NGRAM = 3  # of the repeat rate


@dataclass(frozen=True)
class Continuation:
    """What the model writes at one strength."""

    strength: float  # in units of the latent's activation, times `unit`
    text: str
    tokens: tuple[str, ...]
    log_prob: float  # mean per new token under the unsteered model, in nats
    cost: float  # the unsteered continuation's log_prob minus this one's: above 0, the text is less fluent
    repeat_rate: float  # share of the new tokens' trigrams that stood among them before
    divergence: float  # KL(steered || unsteered) of the first new token, in nats


@dataclass(frozen=True)
class Steered:
    """One latent's direction added at several strengths."""

    prompt: str
    latent: int
    hook_name: str
    unit: float
    activation: float  # the latent's largest activation on the prompt itself
    unsteered: Continuation
    steered: tuple[Continuation, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Return a Markdown table, the unsteered text first."""
        lines = ["| strength | nats per token | cost | repeats | KL of first | text |", "|---|---|---|---|---|---|"]
        for c in (self.unsteered, *self.steered):
            text = " ".join(c.text.split())
            lines.append(
                f"| {c.strength:g} | {c.log_prob:.2f} | {c.cost:+.2f} | {c.repeat_rate:.0%} | {c.divergence:.2f} | {text} |"
            )
        return "\n".join(lines)


@torch.no_grad()
def steer(
    model: Any,
    tokenizer: Any,
    sae: Any,
    prompt: str,
    latent: int,
    strengths: Sequence[float],
    n_new_tokens: int = 24,
    *,
    unit: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steered:
    """Return what the model (backend `hf`) writes with strength * unit * f added at every token but special ones.

    f is the latent's decoder direction: strength s is what the SAE would add if the latent were s units more active. Give
    the latent's maximum as `unit` to steer in shares of it. All strengths run as one batch. `temperature` 0 takes the
    likeliest token; above, tokens are sampled, with the same seed for each strength. A text ends at the model's EOS.
    Raises: UsageError for an unknown latent, no strengths, an empty or too long prompt, and as `hooks_of`.
    """
    hook_in, hook_out = hooks_of(sae, model)
    direction = directions(sae, [check_latent(sae, latent)])[0]
    if not strengths or n_new_tokens < 1 or temperature < 0:
        raise UsageError("steering needs at least one strength, one new token, and a temperature of 0 or more.")
    tokens = prompt_tokens(tokenizer, model, prompt, n_new_tokens)
    all_strengths = torch.tensor([0.0, *strengths], device=model.device)
    added = (all_strengths * unit)[:, None, None] * direction.to(model.device, torch.float32)
    _, z = latents_at(model, tokens, sae, hook_in)
    keep = ~special(tokens, tokenizer)
    rows = tokens.expand(len(all_strengths), -1)
    clean = model(tokens, use_cache=False).logits[:, -1].float().log_softmax(-1)
    first = logits_with_added(model, rows, hook_out, added * keep[..., None])[:, -1]
    first = first.float().log_softmax(-1)
    divergence = (first.exp() * (first - clean)).sum(-1)
    written = _write(model, tokenizer, rows, hook_out, added, n_new_tokens, temperature, seed)
    log_probs = _mean_log_probs(model, tokenizer, written, tokens.shape[1])
    continuations = [
        Continuation(
            float(strength),
            _text(tokenizer, row, tokens.shape[1]),
            tuple(token_text(tokenizer, new := _until_eos(tokenizer, row[tokens.shape[1] :].tolist()))),
            float(log_prob),
            float(log_probs[0] - log_prob),
            repeat_rate(new),
            float(kl),
        )
        for strength, row, log_prob, kl in zip(all_strengths, written, log_probs, divergence, strict=True)
    ]
    activation = float(z[0, keep[0], latent].max()) if keep.any() else 0.0
    return Steered(prompt, latent, hook_out, float(unit), activation, continuations[0], tuple(continuations[1:]))


def _write(
    model: Any,
    tokenizer: Any,
    tokens: Int[Tensor, "batch pos"],
    hook_name: str,
    added: Float[Tensor, "batch 1 d_out"],
    n_new_tokens: int,
    temperature: float,
    seed: int,
) -> Int[Tensor, "batch pos"]:
    """Return the tokens with what the model writes, each row with its own vector added; row by row as if alone."""
    keep = ~special(tokens, tokenizer)[..., None]

    def add(x: Tensor) -> Tensor:  # the prompt at once, then a token at a time
        return x + (added * keep if x.shape[1] == keep.shape[1] else added).to(x)

    draws = [torch.Generator(device=model.device).manual_seed(seed) for _ in tokens]
    written, cache = tokens, None
    with replaced(model, hook_name, add):
        for step in range(n_new_tokens):
            out = model(written if step == 0 else written[:, -1:], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            written = torch.cat([written, _next(out.logits[:, -1].float(), temperature, draws)], dim=1)
    return written


def _next(
    logits: Float[Tensor, "batch vocab"], temperature: float, draws: list[torch.Generator]
) -> Int[Tensor, "batch 1"]:
    """Return the next token of each row: the likeliest, or sampled with the row's own generator."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p = (logits / temperature).softmax(-1)
    return torch.stack([torch.multinomial(row, 1, generator=draw) for row, draw in zip(p, draws, strict=True)])


def _until_eos(tokenizer: Any, new: list[int]) -> list[int]:
    """Return the new tokens up to the EOS, which counts as written."""
    eos = tokenizer.eos_token_id
    return new[: new.index(eos) + 1] if eos in new else new


def _text(tokenizer: Any, row: Int[Tensor, " pos"], n_prompt: int) -> str:
    """Return what was added to the prompt, from two decodings of the whole: joined pieces would lose spaces."""
    prompt, new = row[:n_prompt].tolist(), _until_eos(tokenizer, row[n_prompt:].tolist())
    before, after = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + new)
    )
    return after[len(before) :]


def _mean_log_probs(
    model: Any, tokenizer: Any, written: Int[Tensor, "batch pos"], n_prompt: int
) -> Float[Tensor, " batch"]:
    """Return each row's mean log-probability per new token under the model as it is, in nats."""
    log_p = model(written, use_cache=False).logits[:, n_prompt - 1 : -1].float().log_softmax(-1)
    taken = log_p.gather(-1, written[:, n_prompt:, None])[..., 0]
    lengths = [len(_until_eos(tokenizer, row)) for row in written[:, n_prompt:].tolist()]
    return torch.stack([row[:length].mean() for row, length in zip(taken, lengths, strict=True)])


def repeat_rate(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of the n-grams that stood in the sequence before; 0 for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

"""What one latent does to a prompt: the logits that move when it is ablated, the text that is written when it is added.

Ablation is that of Cunningham et al. 2023, section 5.2: the activation x is lowered along the latent's direction f only
until the latent is inactive ("less than rank-one"): x' = x - t f with the least t >= 0 for which it does not fire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.analysis.causal.splice import codes, edit_hooks, special, token_text, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import Pace
from sae_italian.base.report import table
from sae_italian.models.activations import (
    check_context,
    continuation_log_probs,
    logits_at,
    read_activations,
    replaced,
)

HALVINGS = 24
FARTHEST = 64.0  # how many times its own activation a latent is pushed down before we say that it cannot be silenced
NGRAM = 3  # of the repeat rate


@dataclass(frozen=True)
class TokenMove:
    """A token whose logit an edit moves."""

    token: str
    id: int
    logit: float  # change, edited minus clean
    log_prob: float  # change
    prob: float  # clean probability


@dataclass(frozen=True)
class AblatedPosition:
    """One position of the prompt where the latent is active, and what its ablation there alone does to the next token."""

    position: int
    token: str
    activation: float
    amount: float  # how far the activation was lowered along the latent's direction
    silenced: bool  # False where no amount makes the latent inactive; then its own contribution was taken away
    divergence: float  # KL(clean || ablated), in nats
    lowered: tuple[TokenMove, ...]
    raised: tuple[TokenMove, ...]


@dataclass(frozen=True)
class Ablated:
    """One latent ablated on one prompt; `positions` are those where it is active, empty when there is none."""

    prompt: str
    latent: int
    hook_name: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]  # of every token; 0 at special tokens, where an SAE is not applied
    positions: tuple[AblatedPosition, ...]

    def table(self) -> str:
        """Return a Markdown table, a row per position where the latent is active."""
        if not self.positions:
            return f"latent {self.latent} is not active on this prompt; give one on which it is."
        rows = []
        for place in self.positions:
            moves = [", ".join(f"«{m.token}» {m.logit:+.2f}" for m in some) for some in (place.lowered, place.raised)]
            amount = f"{place.amount:.2f}" + ("" if place.silenced else " (not silenced)")
            rows.append((f"«{place.token}»", f"{place.activation:.2f}", amount, f"{place.divergence:.2f}", *moves))
        return table("token | activation | lowered by | KL | logits that fall | logits that rise", rows)


class _Start(NamedTuple):
    """A latent on a prompt before anything is edited."""

    hook_in: str
    hook_out: str
    direction: Float[Tensor, " d_out"]
    tokens: Int[Tensor, "1 pos"]
    x: Float[Tensor, "pos d_in"]
    activation: Float[Tensor, " pos"]  # of the latent; 0 at special tokens


def _start(model: Any, tokenizer: Any, sae: Any, prompt: str, latent: int, n_new_tokens: int = 0) -> _Start:
    """Raises: UsageError for an unknown latent, an empty prompt, one beyond the model's positions, and as `edit_hooks`."""
    hook_in, hook_out = edit_hooks(sae, model)
    direction = written_directions(sae, [latent])[0].to(model.device, torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids  # BOS by the tokenizer's own rule
    if not prompt.strip() or tokens.numel() == 0:
        raise UsageError("the prompt is empty. Give some text.")
    check_context(tokens.shape[1] + n_new_tokens, model.config)
    tokens = tokens.to(model.device)
    x = read_activations(model, tokens, hook_in)[0]
    activation = torch.where(special(tokens, tokenizer)[0], 0.0, codes(sae, x)[:, latent])
    return _Start(hook_in, hook_out, direction, tokens, x, activation)


def _logits_with(
    model: Any, start: _Start, added: Float[Tensor, "batch pos d_out"], positions: Int[Tensor, " batch"]
) -> Float[Tensor, "batch vocab"]:
    """Return the logits at a position of the prompt for each row of `added`, which is added to the activation."""
    rows = start.tokens.expand(len(added), -1)
    wanted = torch.arange(rows.shape[1], device=rows.device) == positions[:, None]
    with replaced(model, start.hook_out, lambda x: x + added.to(x)):
        return logits_at(model, rows, wanted).float()


@torch.no_grad()
def ablate(model: Any, tokenizer: Any, sae: Any, prompt: str, latent: int, top: int = 10) -> Ablated:
    """Return the tokens whose logits move most when the latent is ablated, for each position where it is active.

    The least t of the module's x' = x - t f is found by bisection. A transcoder, which reads elsewhere, has its whole
    contribution taken away. Each position is ablated by itself, all as one batch.
    Raises: UsageError for an unknown latent, an empty or too long prompt, and as `edit_hooks`.
    """
    start = _start(model, tokenizer, sae, prompt, latent)
    active = start.activation.nonzero()[:, 0]
    texts, activations = token_text(tokenizer, start.tokens[0].tolist()), start.activation.tolist()
    positions: list[AblatedPosition] = []
    if len(active):
        own = start.activation[active]
        amount, silenced = own, own != 0
        if start.hook_in == start.hook_out:
            amount, silenced = _silencing(sae, start.x[active], latent, start.direction)
        added = torch.zeros(len(active), len(texts), len(start.direction), device=own.device)
        added[torch.arange(len(active)), active] = -amount[:, None] * start.direction
        here = torch.zeros_like(start.tokens, dtype=torch.bool).index_fill_(1, active, True)
        clean, edited = logits_at(model, start.tokens, here).float(), _logits_with(model, start, added, active)
        for row, position in enumerate(active.tolist()):
            before, after = clean[row], edited[row]
            log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
            divergence = float((log_p.exp() * (log_p - log_q)).sum())
            moves = [_moves(tokenizer, before, after, top, rising=rising) for rising in (False, True)]
            numbers = activations[position], float(amount[row]), bool(silenced[row]), divergence
            positions.append(AblatedPosition(position, texts[position], *numbers, *moves))
    return Ablated(prompt, latent, start.hook_out, tuple(texts), tuple(activations), tuple(positions))


def _silencing(
    sae: Any, x: Float[Tensor, "n d_in"], latent: int, direction: Float[Tensor, " d_in"]
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the least t for which the latent is silent at x - t f, and whether there is one; else its activation."""
    x = x.float()
    own = codes(sae, x)[:, latent]

    def silent(t: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        return codes(sae, x - t[:, None] * direction)[:, latent] == 0

    low, high = torch.zeros_like(own), own.clone()
    while bool((~silent(high) & (high.abs() < FARTHEST * own.abs())).any()):
        high = torch.where(silent(high), high, 2 * high)
    found = silent(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        quiet = silent(middle)
        low, high = torch.where(quiet, low, middle), torch.where(quiet, middle, high)
    return torch.where(found, high, own), found


def _moves(
    tokenizer: Any, before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], top: int, *, rising: bool
) -> tuple[TokenMove, ...]:
    """Return the tokens whose logits rise (or fall) most, the largest change first."""
    change, log_p = after - before, before.log_softmax(-1)
    log_change = after.log_softmax(-1) - log_p
    ids = change.topk(min(top, len(change)), largest=rising).indices.tolist()
    return tuple(
        TokenMove(text, i, float(change[i]), float(log_change[i]), float(log_p[i].exp()))
        for i, text in zip(ids, token_text(tokenizer, ids), strict=True)
        if (change[i] > 0) == rising and change[i] != 0
    )


# --- steering --------------------------------------------------------------------------------------------------------


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

    def table(self) -> str:
        """Return a Markdown table, the unsteered text first."""
        rows = [
            (f"{c.strength:g}", f"{c.log_prob:.2f}", f"{c.cost:+.2f}", f"{c.repeat_rate:.0%}", f"{c.divergence:.2f}")
            + (" ".join(c.text.split()),)
            for c in (self.unsteered, *self.steered)
        ]
        return table("strength | nats per token | cost | repeats | KL of first | text", rows)


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
    """Return what the model writes with `strength * unit` times the latent's direction added at every token.

    It is added to all tokens but special ones, the prompt's and the written ones alike; 0 is always among the strengths.
    Temperature 0 takes the likeliest token; above, tokens are sampled, with the same seed for each strength. A text ends
    at the model's EOS.
    Raises: UsageError for an unknown latent, no strengths, an empty or too long prompt, and as `edit_hooks`.
    """
    if not strengths or n_new_tokens < 1 or temperature < 0:
        raise UsageError("steering needs at least one strength, one new token, and a temperature of 0 or more.")
    start = _start(model, tokenizer, sae, prompt, latent, n_new_tokens)
    all_strengths = [0.0, *map(float, strengths)]
    added = torch.tensor(all_strengths, device=model.device)[:, None, None] * unit * start.direction
    everywhere = added * ~special(start.tokens, tokenizer)[..., None]
    last = torch.full((len(added),), start.tokens.shape[1] - 1, device=added.device)
    first = _logits_with(model, start, everywhere, last).log_softmax(-1)
    divergence = (first.exp() * (first - first[0])).sum(-1).tolist()
    settings: dict[str, Any] = {"max_new_tokens": n_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    # rows that are sampled are written one at a time, so that each has the draws that it would have alone
    rows = added.split(1 if temperature > 0 else len(added))
    pace = Pace("texts", n_new_tokens * len(rows), "step")
    with pace.bar:
        written = [new for part in rows for new in _write(model, tokenizer, start, part, seed, pace, **settings)]
    before = start.tokens[0].tolist()
    log_p = continuation_log_probs(partial(logits_at, model), [(before, new) for new in written])

    def decoded(ids: list[int]) -> str:  # always the whole: joined pieces would lose spaces
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    found = []
    for strength, new, total, kl in zip(all_strengths, written, log_p.tolist(), divergence, strict=True):
        cost = float(log_p[0]) / len(written[0]) - total / len(new)
        text, pieces = decoded(before + new)[len(decoded(before)) :], tuple(token_text(tokenizer, new))
        found.append(Continuation(strength, text, pieces, total / len(new), cost, repeat_rate(new), kl))
    activation = float(start.activation.max())
    return Steered(prompt, latent, start.hook_out, float(unit), activation, found[0], tuple(found[1:]))


def _write(
    model: Any,
    tokenizer: Any,
    start: _Start,
    added: Float[Tensor, "batch 1 d_out"],
    seed: int,
    pace: Pace,
    **settings: Any,
) -> list[list[int]]:
    """Return the new tokens of each row, up to the EOS, which counts as written; `settings` are those of `generate`."""
    keep, eos = ~special(start.tokens, tokenizer)[..., None], tokenizer.eos_token_id

    def add(x: Tensor) -> Tensor:  # the prompt at once, then a token at a time
        return x + (added * keep if x.shape[1] == keep.shape[1] else added).to(x)

    def over(some: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((len(some),), pace.step(), device=some.device)

    rows = start.tokens.expand(len(added), -1)
    with replaced(model, start.hook_out, add), torch.random.fork_rng():
        torch.manual_seed(seed)
        settings |= {"attention_mask": torch.ones_like(rows), "eos_token_id": eos, "pad_token_id": eos or 0}
        written = model.generate(rows, stopping_criteria=[over], **settings)
    new = written[:, rows.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in new]


def repeat_rate(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of the n-grams that stood in the sequence before; 0 for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

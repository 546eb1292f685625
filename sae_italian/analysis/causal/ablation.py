"""Ablation of one latent: the tokens whose logits move most (Cunningham et al. 2023, section 5.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_italian.analysis.causal.splice import (
    check_latent,
    codes,
    directions,
    hooks_of,
    latents_at,
    logits_with_added,
    prompt_tokens,
    special,
    token_text,
)

HALVINGS = 24
FARTHEST = 64.0  # how many times its own activation a latent is pushed down before we say that it cannot be silenced


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def ablate(model: Any, tokenizer: Any, sae: Any, prompt: str, latent: int, top: int = 10) -> Ablated:
    """Return the tokens whose logits move most when the latent is ablated, for each position where it is active.

    As in the paper, the activation x is lowered along the latent's direction f only until the latent is inactive ("less
    than rank-one"): x' = x - t f with the least t >= 0 for which it does not fire, found by bisection. A transcoder,
    which reads elsewhere, has its whole contribution taken away. Each position is ablated by itself, all as one batch.
    Raises: UsageError for an unknown latent, an empty or too long prompt, and as `hooks_of`.
    """
    hook_in, hook_out = hooks_of(sae, model)
    direction = directions(sae, [check_latent(sae, latent)])[0]
    tokens = prompt_tokens(tokenizer, model, prompt)
    x, z = latents_at(model, tokens, sae, hook_in)
    activation = torch.where(special(tokens, tokenizer)[0].to(z.device), 0.0, z[0, :, latent])
    active = activation.nonzero()[:, 0]
    texts = token_text(tokenizer, tokens[0].tolist())
    positions: list[AblatedPosition] = []
    if len(active):
        own = activation[active]
        same_hook = hook_in == hook_out
        amount, silenced = (
            silencing(sae, x[0, active.to(x.device)], latent, direction) if same_hook else (own, own != 0)
        )
        added = torch.zeros(len(active), tokens.shape[1], len(direction), device=direction.device)
        added[torch.arange(len(active)), active] = -amount[:, None] * direction
        clean = model(tokens, use_cache=False).logits[0].float()
        edited = logits_with_added(model, tokens.expand(len(active), -1), hook_out, added).float()
        for row, position in enumerate(active.tolist()):
            before, after = clean[position], edited[row, position]
            lowered, raised = _moves(tokenizer, before, after, top)
            log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
            positions.append(
                AblatedPosition(
                    position,
                    texts[position],
                    float(own[row]),
                    float(amount[row]),
                    bool(silenced[row]),
                    float((log_p.exp() * (log_p - log_q)).sum()),
                    lowered,
                    raised,
                )
            )
    return Ablated(prompt, latent, hook_out, tuple(texts), tuple(activation.tolist()), tuple(positions))


def silencing(
    sae: Any, x: Float[Tensor, "n d_in"], latent: int, direction: Float[Tensor, " d_in"]
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the least t for which the latent is silent at x - t f, and whether there is one; else its activation."""
    x = x.to(sae.device, sae.dtype)
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
    tokenizer: Any, before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], top: int
) -> tuple[tuple[TokenMove, ...], tuple[TokenMove, ...]]:
    """Return the tokens whose logits fall and rise most, the largest change first."""
    change, log_p = after - before, before.log_softmax(-1)
    log_change = after.log_softmax(-1) - log_p
    found = []
    for largest in (False, True):
        ids = change.topk(min(top, len(change)), largest=largest).indices.tolist()
        found.append(
            tuple(
                TokenMove(text, i, float(change[i]), float(log_change[i]), float(log_p[i].exp()))
                for i, text in zip(ids, token_text(tokenizer, ids), strict=True)
                if (change[i] > 0) == largest and change[i] != 0
            )
        )
    return found[0], found[1]

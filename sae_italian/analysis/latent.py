"""What one latent does to a prompt: the logits that move when it is ablated, the text that is written when it is added.

The SAE is put into the model with its reconstruction error added back, so that only edits of latents have an effect:
x' = decode(z') + x - decode(z) = x + (z' - z) F, where F holds a row per latent, the direction that one unit of it writes.
A transcoder's z is read at one hook and its edit written at another.

Ablation is that of Cunningham et al. 2023, section 5.2: the activation x is lowered along the latent's direction f only
until the latent is inactive ("less than rank-one"): x' = x - t f with the least t >= 0 for which it does not fire.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.autointerp.places import piece_texts
from sae_italian.base.errors import UsageError, check_whole
from sae_italian.base.pace import Pace
from sae_italian.base.report import table
from sae_italian.corpora.packing import special_mask
from sae_italian.models.activations import check_context, continuation_log_probs, logits_at, read_activations, replaced
from sae_italian.saes import check_fits, hooks_of

HALVINGS = 24
FARTHEST = 64.0  # times its own activation that a latent is pushed down before it is given up
NGRAM = 3  # of the repeat rate


def edit_hooks(sae: Any, model: Any) -> tuple[str, str]:
    """Return the hook the SAE reads and the one it writes, the same for all but transcoders.

    Raises: UsageError when SAE and model do not fit, when the hook can only be read, and for an SAE that rescales each
    activation by its own norm, whose latents write no fixed direction.
    """
    check_fits(sae, model, writes=True)
    normalise = getattr(sae.cfg, "normalize_activations", "none")
    if normalise != "none":  # a scale that could be folded in is refused before
        raise UsageError(
            f"the SAE has normalize_activations {normalise!r}, so a latent writes another direction for "
            "each token. Use an SAE with none."
        )
    return hooks_of(sae)


def one_place(saes: Mapping[str, Any], model: Any) -> str:
    """Return the hook that all SAEs, by name, write at. Raises: UsageError for no names or several hooks, and as `edit_hooks`."""
    hooks = {name: edit_hooks(sae, model)[1] for name, sae in named(saes).items()}
    if len(set(hooks.values())) > 1:
        places = ", ".join(f"{name} writes at {hook}" for name, hook in hooks.items())
        raise UsageError(f"{places}; these compare at one place only. Give SAEs of one hook.")
    return next(iter(hooks.values()))


def named(saes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return SAEs by name as they are given. Raises: UsageError for none, and for one or a list without names."""
    if not isinstance(saes, Mapping) or not saes:
        raise UsageError(f"no SAE was given by name, as {{'mine': sae}}, but a {type(saes).__name__}.")
    return saes


def codes(sae: Any, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
    """Return the SAE's latents of x, dense, where x is."""
    z = sae.encode(x.to(sae.device, sae.dtype))
    return (z.to_dense() if z.is_sparse else z).to(x.device)


@torch.no_grad()
def written_directions(sae: Any, latents: Sequence[int] | Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
    """Return what one unit of each latent adds to the reconstruction: decode is affine, so decode(unit) - decode(0).

    Raises: UsageError when the SAE has no such latent.
    """
    wanted = torch.as_tensor(latents, dtype=torch.int64, device=sae.device)
    for latent in wanted[(wanted < 0) | (wanted >= sae.cfg.d_sae)].tolist():
        raise UsageError(f"latent {latent} does not exist; the SAE has latents 0 to {sae.cfg.d_sae - 1}.")
    units = torch.zeros(len(wanted) + 1, sae.cfg.d_sae, dtype=sae.dtype, device=sae.device)
    units[torch.arange(len(wanted)), wanted] = 1
    written = sae.decode(units)
    return written[:-1] - written[-1]


def special(tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> Bool[Tensor, "batch pos"]:
    """Return where the special tokens are, to which an SAE is not applied."""
    return torch.from_numpy(special_mask(tokens.cpu().numpy(), tokenizer)).to(tokens.device)


_strings = lru_cache(maxsize=4)(piece_texts)


def token_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each id by itself, a leading space kept."""
    strings = _strings(tokenizer, len(tokenizer))
    return [strings[int(i)] for i in ids]


def tokens_inside(tokenizer: Any, words: Sequence[str], language: str = "it") -> list[tuple[int, ...]]:
    """Return the tokens of " " + each word within a sentence: at its start a tokenizer may add a space of its own."""
    before = "and" if language == "en" else "e"
    texts = [before, *(f"{before} {word}" for word in words)]
    alone, *each = tokenizer(texts, add_special_tokens=False).input_ids
    return [tuple(ids[len(alone) :]) for ids in each]


def token_of(tokenizer: Any, text: str) -> int:
    """Return the one token of a text that follows a prompt. Raises: UsageError when it has several."""
    (ids,) = tokens_inside(tokenizer, [text.strip()])
    if len(ids) != 1:
        parts = " + ".join(tokenizer.convert_ids_to_tokens(ids))
        raise UsageError(f"{text} has {len(ids)} tokens ({parts}); one was expected. Give its first.")
    return ids[0]


# --- ablation --------------------------------------------------------------------------------------------------------


class TokenMove(NamedTuple):
    """A token whose logit an edit moves."""

    token: str
    id: int
    logit: float  # change, edited minus clean
    log_prob: float  # change
    prob: float  # clean probability


class AblatedPosition(NamedTuple):
    """One position of the prompt where the latent is active, and what its ablation there alone does to the next token."""

    position: int
    token: str
    activation: float
    amount: float  # how far the activation was lowered along the latent's direction
    silenced: bool  # False: no amount makes it inactive, and its own contribution was taken away
    divergence: float  # KL(clean || ablated), in nats
    lowered: tuple[TokenMove, ...]
    raised: tuple[TokenMove, ...]


class Ablated(NamedTuple):
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


class _Prompt:
    """A latent on a prompt, its BOS by the tokenizer's own rule, before anything is edited.

    Raises: UsageError for an unknown latent, an empty prompt, one beyond the model's positions, and as `edit_hooks`.
    """

    def __init__(self, model: Any, tokenizer: Any, sae: Any, prompt: str, latent: int, n_new_tokens: int = 0):
        self.model, (self.hook_in, self.hook_out) = model, edit_hooks(sae, model)
        if not hasattr(latent, "__index__"):
            raise UsageError(f"latent is {latent!r}; expected a whole number, 0 to {sae.cfg.d_sae - 1}.")
        self.direction: Float[Tensor, " d_out"] = written_directions(sae, [latent])[0].to(model.device, torch.float32)
        encoded: Any = tokenizer(prompt, return_tensors="pt")
        self.tokens: Int[Tensor, "1 pos"] = encoded.input_ids.to(model.device)
        if not prompt.strip() or self.tokens.numel() == 0:
            raise UsageError("the prompt is empty. Give some text.")
        check_context(self.tokens.shape[1] + n_new_tokens, model.config)
        self.keep: Bool[Tensor, " pos"] = ~special(self.tokens, tokenizer)[0]
        self.x: Float[Tensor, "pos d_in"] = read_activations(model, self.tokens, self.hook_in)[0]
        self.activation: Float[Tensor, " pos"] = torch.where(self.keep, codes(sae, self.x)[:, latent], 0.0)

    def logits(
        self, added: Float[Tensor, "batch pos d_out"], positions: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return the logits at a position of the prompt for each row of `added`, which is added to the activation."""
        rows = self.tokens.expand(len(added), -1)
        with replaced(self.model, self.hook_out, lambda x: x + added.to(x)):
            wanted = torch.arange(rows.shape[1], device=rows.device) == positions[:, None]
            return logits_at(self.model, rows, wanted).float()


@torch.no_grad()
def ablate(model: Any, tokenizer: Any, sae: Any, prompt: str, latent: int, top: int | None = 10) -> Ablated:
    """Return the `top` tokens whose logits move most (None: all) when the latent is ablated, by position where it is active.

    The least t of the module's x' = x - t f is found by bisection. A transcoder, which reads elsewhere, has its whole
    contribution taken away. Each position is ablated by itself, all as one batch.
    Raises: UsageError for an unknown latent, an empty or too long prompt, and as `edit_hooks`.
    """
    check_whole(1, top=top)
    start = _Prompt(model, tokenizer, sae, prompt, latent)
    active = start.activation.nonzero()[:, 0]
    texts, activations = token_text(tokenizer, start.tokens[0].tolist()), start.activation.tolist()
    positions: list[AblatedPosition] = []
    if len(active):
        amount, silenced = start.activation[active], torch.ones_like(active, dtype=torch.bool)
        if start.hook_in == start.hook_out:
            amount, silenced = _silencing(sae, start.x[active], latent, start.direction)
        added = torch.zeros(len(active), len(texts), len(start.direction), device=amount.device)
        added[torch.arange(len(active)), active] = (-amount[:, None] * start.direction).to(added)
        clean = logits_at(model, start.tokens, start.activation[None] != 0).float()
        edited = start.logits(added, active)
        log_p, log_q = clean.log_softmax(-1), edited.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        for row, position in enumerate(active.tolist()):
            changes = edited[row] - clean[row], log_q[row] - log_p[row], log_p[row].exp()
            moves = (_moves(tokenizer, *changes, top, rising=rising) for rising in (False, True))
            numbers = activations[position], float(amount[row]), bool(silenced[row]), divergence[row]
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
    tokenizer: Any, logit: Tensor, log_prob: Tensor, prob: Tensor, top: int | None, *, rising: bool
) -> tuple[TokenMove, ...]:
    """Return the tokens whose logits rise (or fall) most, the largest change first; all tensors are [vocab]."""
    ids = logit.argsort(descending=rising, stable=True)[:top].tolist()
    moves = (
        TokenMove(text, i, float(logit[i]), float(log_prob[i]), float(prob[i]))
        for i, text in zip(ids, token_text(tokenizer, ids), strict=True)
    )
    return tuple(move for move in moves if move.logit and (move.logit > 0) == rising)


# --- steering --------------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """What the model writes at one strength."""

    strength: float  # in units of the latent's activation, times `unit`
    text: str
    tokens: tuple[str, ...]
    log_prob: float  # mean per new token under the unsteered model, in nats
    cost: float  # the unsteered continuation's log_prob minus this one's: above 0, the text is less fluent
    repeat_rate: float  # share of the new tokens' trigrams that stood among them before
    divergence: float  # KL(steered || unsteered) of the first new token, in nats


class Steered(NamedTuple):
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
        rows = []
        for c in (self.unsteered, *self.steered):
            numbers = f"{c.log_prob:.2f}", f"{c.cost:+.2f}", f"{c.repeat_rate:.0%}", f"{c.divergence:.2f}"
            rows.append((f"{c.strength:g}", *numbers, " ".join(c.text.split())))
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
    every = [0.0, *map(float, np.ravel(strengths))]
    if len(every) == 1 or not np.isfinite([*every, unit]).all() or n_new_tokens < 1 or not temperature >= 0:
        raise UsageError(
            "steering needs at least one finite strength, a finite unit, one new token, a temperature from 0 on."
        )
    start = _Prompt(model, tokenizer, sae, prompt, latent, n_new_tokens)
    added = torch.tensor(every, device=model.device)[:, None, None] * unit * start.direction
    last = torch.full((len(added),), start.tokens.shape[1] - 1, device=added.device)
    first = start.logits(added * start.keep[:, None], last).log_softmax(-1)
    divergence = (first.exp() * (first - first[0])).sum(-1).tolist()
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    settings: dict[str, Any] = {"max_new_tokens": n_new_tokens, "do_sample": temperature > 0, **drawn}
    # rows that are sampled are written one at a time, so that each has the draws that it would have alone
    rows = added.split(1 if temperature > 0 else len(added))
    pace = Pace("texts", n_new_tokens * len(rows), "step")
    with pace.bar:
        written = [new for part in rows for new in _write(start, part, tokenizer, seed, pace, **settings)]
    before = start.tokens[0].tolist()
    log_p = continuation_log_probs(partial(logits_at, model), [(before, new) for new in written]).tolist()

    def decoded(ids: list[int]) -> str:  # always the whole: joined pieces would lose spaces
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    means = [total / len(new) for new, total in zip(written, log_p, strict=True)]
    found = []
    for strength, new, mean, kl in zip(every, written, means, divergence, strict=True):
        text, pieces = decoded(before + new)[len(decoded(before)) :], tuple(token_text(tokenizer, new))
        found.append(Continuation(strength, text, pieces, mean, means[0] - mean, repeat_rate(new), kl))
    activation = float(start.activation.max())
    return Steered(prompt, latent, start.hook_out, float(unit), activation, found[0], tuple(found[1:]))


def _write(
    start: _Prompt, added: Float[Tensor, "batch 1 d"], tokenizer: Any, seed: int, pace: Pace, **more: Any
) -> list[list[int]]:
    """Return the new tokens of each row, up to the EOS, which counts as written; `more` is for `generate`."""
    keep, eos = start.keep[None], tokenizer.eos_token_id  # of what is read next

    def add(x: Tensor) -> Tensor:
        return x + (added * keep[..., None]).to(x)

    def over(some: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal keep
        keep = ~special(some[:, -1:], tokenizer)
        return torch.full((len(some),), pace.step(), device=some.device)

    rows = start.tokens.expand(len(added), -1)
    with replaced(start.model, start.hook_out, add), torch.random.fork_rng():
        torch.manual_seed(seed)
        more |= {"attention_mask": torch.ones_like(rows), "eos_token_id": eos, "pad_token_id": eos or 0}
        generate = getattr(start.model, "hf_generate", start.model.generate)  # a bridge's own takes no criteria
        written = generate(rows, stopping_criteria=[over], **more)
    return [row[: row.index(eos) + 1] if eos in row else row for row in written[:, rows.shape[1] :].tolist()]


def repeat_rate(tokens: Sequence[int]) -> float:
    """Return the share of the trigrams that stood in the sequence before; 0 for fewer than three tokens."""
    grams = list(zip(*(tokens[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

"""Patch an SAE's latents from a counterfactual run into a base run (Cunningham et al. 2023, section 4).

On the base run x_i becomes x_i + sum_{j in F} (c'_ij - c_ij) f_j at every token i, with c' the latents of the target run:
the base run's reconstruction error stays. Measured is D_KL(edited || target) of the logits at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.analysis.causal.splice import codes, directions, hooks_of
from sae_italian.analysis.tasks.scoring import padded
from sae_italian.base.errors import UsageError
from sae_italian.models.activations import begun_at, check_context, entry_and_edit, read_many, replaced

BATCH_ROWS = 128


class PatchInputs(NamedTuple):
    """Pairs of prompts of equal length in tokens, padded on the right."""

    base: Int[Tensor, "pairs pos"]
    target: Int[Tensor, "pairs pos"]
    lengths: Int[Tensor, " pairs"]
    differ: Bool[Tensor, "pairs pos"]  # from the first token in which the two differ to the last of the prompt


@dataclass
class Cost:
    """What a run cost. A prompt forward is one prompt through the model; passes are calls, each of many prompts."""

    passes: int = 0
    prompt_forwards: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def patch_inputs(tokenizer: Any, model: Any, pairs: Sequence[Any]) -> PatchInputs:
    """Return the tokens of pairs, each with `.base` and `.counterfactual` or a tuple of the two texts.

    Raises: UsageError when there are none, when the two of a pair have different numbers of tokens, or one is too long.
    """
    texts = [(pair.base, pair.counterfactual) if hasattr(pair, "base") else (pair[0], pair[1]) for pair in pairs]
    if not texts:
        raise UsageError("there are no pairs to patch. Give at least one.")
    base, lengths = padded(tokenizer, [text for text, _ in texts])
    target, target_lengths = padded(tokenizer, [text for _, text in texts])
    uneven = (lengths != target_lengths).nonzero()[:, 0].tolist()
    if uneven:
        (first, second), k = texts[uneven[0]], uneven[0]
        raise UsageError(
            f"{first!r} has {int(lengths[k])} tokens, {second!r} {int(target_lengths[k])}; latents are patched token by "
            "token, so both need as many. Use names with equally many tokens."
        )
    check_context(base.shape[1], model.config)
    differ = (base != target).cumsum(-1) > 0
    differ &= torch.arange(base.shape[1]) < lengths[:, None]
    return PatchInputs(base.to(model.device), target.to(model.device), lengths, differ)


@dataclass
class Patcher:
    """One SAE's latents on some pairs, and the model's answer to any edit of them; shapes as in `__post_init__`."""

    model: Any
    sae: Any
    inputs: PatchInputs
    batch_rows: int = BATCH_ROWS
    cost: Cost = field(default_factory=Cost)

    @torch.no_grad()
    def __post_init__(self) -> None:
        self.hook_in, self.hook_out = hooks_of(self.sae, self.model)
        self.entry, self.edit = entry_and_edit(self.model, self.hook_out)
        self.n_pairs = len(self.inputs.base)
        self.target_log_p: Float[Tensor, "pairs vocab"] = self._last_log_p(self.inputs.target)
        names = [self.hook_in, self.hook_out, self.entry]
        base, target = (read_many(self.model, tokens, names) for tokens in (self.inputs.base, self.inputs.target))
        self.residual = base[self.entry]  # no edit changes what lies before
        self.candidates: Int[Tensor, " n"]  # the latents that differ anywhere between the two runs
        self.diff: Float[Tensor, "pairs pos n"]  # c' - c
        self.candidates, self.diff = self._differences(base[self.hook_in], target[self.hook_in])
        self.directions: Float[Tensor, "n d_out"] = directions(self.sae, self.candidates).to(self.diff)
        self.in_play: Bool[Tensor, "pairs n"] = (self.diff != 0).any(1).cpu()
        # the activation's own difference: what patching every latent and the error amounts to
        differ = self.inputs.differ.to(self.model.device)
        self.full: Float[Tensor, "pairs pos d_out"] = (target[self.hook_out] - base[self.hook_out]).float()
        self.full = self.full * differ[..., None]
        self.cost.passes += 3
        self.cost.prompt_forwards += 3 * self.n_pairs
        self.unpatched: Float[Tensor, " pairs"] = self.kl(torch.arange(self.n_pairs), torch.zeros_like(self.full))

    def _differences(
        self, base: Float[Tensor, "pairs pos d_in"], target: Float[Tensor, "pairs pos d_in"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "pairs pos n"]]:
        """Return the latents that differ and by how much; tokens before the first that differs are the same."""
        found = []
        for pair in range(self.n_pairs):  # one at a time: codes of all pairs would not fit for a wide SAE
            here = self.inputs.differ[pair]
            difference = codes(self.sae, target[pair, here]) - codes(self.sae, base[pair, here])
            found.append(difference.float().to_sparse())
        columns = [part.coalesce().indices()[1] for part in found]
        candidates = torch.unique(torch.cat(columns))
        diff = torch.zeros(self.n_pairs, self.inputs.base.shape[1], len(candidates))
        for pair, part in enumerate(found):
            row, column = part.coalesce().indices()
            at = self.inputs.differ[pair].nonzero()[:, 0]
            diff[pair, at[row.cpu()], torch.searchsorted(candidates, column).cpu()] = part.coalesce().values().cpu()
        return candidates.cpu(), diff.to(self.model.device)

    def _last_log_p(self, tokens: Int[Tensor, "rows pos"], rows: Int[Tensor, " rows"] | None = None) -> Tensor:
        """Return the log-probabilities after each row's last token; the vocabulary is computed there alone."""
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        lengths = self.inputs.lengths if rows is None else self.inputs.lengths[rows]
        last = hidden[torch.arange(len(tokens), device=hidden.device), lengths.to(hidden.device) - 1]
        return self.model.get_output_embeddings()(last).float().log_softmax(-1)

    def kl(self, rows: Int[Tensor, " rows"], delta: Float[Tensor, "rows pos d_out"]) -> Float[Tensor, " rows"]:
        """Return D_KL(edited || target) in nats of pair `rows[r]` with `delta[r]` added; gradients pass."""
        parts = []
        for pairs, added in zip(rows.split(self.batch_rows), delta.split(self.batch_rows), strict=True):
            longest = int(self.inputs.lengths[pairs].max())
            self.cost.passes += 1
            self.cost.prompt_forwards += len(pairs)
            begun = begun_at(self.model, self.entry, self.residual[pairs, :longest])
            with begun, replaced(self.model, self.edit, lambda x, a=added[:, :longest]: x + a.to(x)):
                log_p = self._last_log_p(self.inputs.base[pairs, :longest], pairs)
            parts.append((log_p.exp() * (log_p - self.target_log_p[pairs])).sum(-1))
        return torch.cat(parts)

    def delta(self, chosen: Bool[Tensor, " n"] | None = None) -> Float[Tensor, "pairs pos d_out"]:
        """Return what patching the chosen candidates (default: all) adds to the activation."""
        chosen = torch.ones(len(self.candidates), dtype=torch.bool) if chosen is None else chosen
        return self.diff[..., chosen] @ self.directions[chosen]

    def one(self, rows: Int[Tensor, " rows"], columns: Int[Tensor, " rows"]) -> Float[Tensor, "rows pos d_out"]:
        """Return what patching candidate `columns[r]` alone adds to pair `rows[r]`."""
        return self.diff[rows, :, columns][..., None] * self.directions[columns][:, None]

    def magnitude(self, delta: Float[Tensor, "pairs pos d_out"]) -> float:
        """Return the mean over the prompts' tokens of |x' - x|, in the activation's own units."""
        counted = torch.arange(delta.shape[1]) < self.inputs.lengths[:, None]
        return float(delta.norm(dim=-1)[counted.to(delta.device)].mean())

    @torch.no_grad()
    def effects(self) -> Float[Tensor, " n"]:
        """Return by how many nats patching each candidate alone brings the base run nearer: the mean fall of the KL."""
        rows, columns = self.in_play.nonzero(as_tuple=True)
        total = torch.zeros(len(self.candidates))
        for some, these in zip(rows.split(self.batch_rows), columns.split(self.batch_rows), strict=True):
            fall = self.unpatched[some] - self.kl(some, self.one(some, these))
            total.index_add_(0, these.cpu(), fall.cpu())
        return total / self.n_pairs

    def attribution(self, at: Float[Tensor, "pairs pos d_out"] | None = None) -> Float[Tensor, " n"]:
        """Return the first-order estimate of `effects`: minus the KL's gradient times each latent's difference.

        With `at`, the gradient is taken where that has been added: minus the estimate is the rise of the KL when a
        candidate is taken out of it. One forward and one backward pass for all candidates.
        """
        point = (torch.zeros_like(self.full) if at is None else at.clone()).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.kl(torch.arange(self.n_pairs), point).sum(), point)
        slope = torch.einsum("pid,nd,pin->n", gradient, self.directions, self.diff)
        return (-slope / self.n_pairs).cpu()

    @torch.no_grad()
    def patched_kl(self, chosen: Bool[Tensor, " n"] | None = None, *, error: bool = False) -> Float[Tensor, " pairs"]:
        """Return the KL of each pair with the chosen candidates patched; with `error`, everything is: 0 but for rounding."""
        return self.kl(torch.arange(self.n_pairs), self.full if error else self.delta(chosen))

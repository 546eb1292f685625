"""Patch an SAE's latents from a counterfactual run into a base run, and find the few that matter.

As in Cunningham et al. 2023, section 4: on the base run x_i becomes x_i + sum_{j in F} (c'_ij - c_ij) f_j at every token i,
with c' the latents of the target run; the base run's reconstruction error stays. Measured is D_KL(edited || target) of the
logits at the last token.

`eliminate` is ACDC on a flat graph (Conmy et al. 2023, algorithm 4.1), several steps at a time. Start with every latent
patched; for each threshold, visit the latents still patched in random order and un-patch one if the KL to the target rises
by less than the threshold. Each step depends on the one before, so the original runs all prompts once per visit. Here the
outcomes are guessed (first from one gradient, then from each latent's last measured rise), the steps along the guessed path
run as one batch, and what lies behind the first wrong guess is thrown away: the decisions are those of the original. A latent
is run on those prompts alone in which it differs at all, and not again where nothing has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_italian.analysis.causal.splice import codes, edit_hooks, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.models.activations import begun_at, check_context, entry_and_edit, read_many, replaced

BATCH_ROWS = 128
LEAST_ROWS = 16  # of a guessed path after wrong guesses


class PatchInputs(NamedTuple):
    """Pairs of prompts of equal length in tokens, padded on the right."""

    base: Int[Tensor, "pairs pos"]
    target: Int[Tensor, "pairs pos"]
    lengths: Int[Tensor, " pairs"]
    differ: Bool[Tensor, "pairs pos"]  # from the first token in which the two differ to the last of the prompt


def patch_inputs(tokenizer: Any, model: Any, pairs: Sequence[Any]) -> PatchInputs:
    """Return the tokens of pairs whose first two values are the base's text and the counterfactual's (`IoiPair`, tuples).

    Raises: UsageError when there are none, when the two of a pair have different numbers of tokens, or one is too long.
    """
    if not pairs:
        raise UsageError("there are no pairs to patch. Give at least one.")
    sides = [[torch.tensor(tokenizer(pair[side]).input_ids) for pair in pairs] for side in (0, 1)]
    for pair, one, two in zip(pairs, *sides, strict=True):
        if len(one) != len(two):
            raise UsageError(
                f"{pair[0]!r} has {len(one)} tokens, {pair[1]!r} {len(two)}; latents are patched token by token, so both "
                "need as many. Use names with equally many tokens."
            )
    base, target = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in sides)
    lengths = torch.tensor([len(tokens) for tokens in sides[0]])
    check_context(base.shape[1], model.config)
    differ = (base != target).cumsum(-1) > 0
    differ &= torch.arange(base.shape[1]) < lengths[:, None]
    return PatchInputs(base.to(model.device), target.to(model.device), lengths, differ)


class Patcher:
    """One SAE's latents on some pairs, and the model's answer to any edit of them.

    Only the blocks from the edit on are run: what lies before it is the base run's, whatever is patched.
    """

    candidates: Int[Tensor, " n"]  # the latents that differ anywhere between the two runs
    diff: Float[Tensor, "pairs pos n"]  # c' - c of these

    @torch.no_grad()
    def __init__(self, model: Any, sae: Any, inputs: PatchInputs, batch_rows: int = BATCH_ROWS):
        self.model, self.sae, self.inputs, self.batch_rows = model, sae, inputs, batch_rows
        self.hook_in, self.hook_out = edit_hooks(sae, model)
        self.entry, self.edit = entry_and_edit(model, self.hook_out)
        self.n_pairs = len(inputs.base)
        self.target_log_p: Float[Tensor, "pairs vocab"] = self._last_log_p(inputs.target, inputs.lengths)
        names = [self.hook_in, self.hook_out, self.entry]
        base, target = (read_many(model, tokens, names) for tokens in (inputs.base, inputs.target))
        self.residual = base[self.entry]
        self.candidates, self.diff = self._differences(base[self.hook_in], target[self.hook_in])
        self.directions: Float[Tensor, "n d_out"] = written_directions(sae, self.candidates).to(self.diff)
        self.in_play: Bool[Tensor, "pairs n"] = (self.diff != 0).any(1).cpu()
        # the activation's own difference: what patching every latent and the error amounts to
        full = (target[self.hook_out] - base[self.hook_out]).float()
        self.full: Float[Tensor, "pairs pos d_out"] = full * inputs.differ.to(model.device)[..., None]
        self.unpatched: Float[Tensor, " pairs"] = self.kl(torch.arange(self.n_pairs), torch.zeros_like(self.full))

    def _differences(
        self, base: Float[Tensor, "pairs pos d_in"], target: Float[Tensor, "pairs pos d_in"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "pairs pos n"]]:
        """Return the latents that differ and by how much; tokens before the first that differs are the same."""
        found = []
        for pair, here in enumerate(
            self.inputs.differ
        ):  # one at a time: codes of all pairs would not fit for a wide SAE
            difference = codes(self.sae, target[pair, here]) - codes(self.sae, base[pair, here])
            found.append(difference.float().cpu().to_sparse().coalesce())
        candidates = torch.unique(torch.cat([part.indices()[1] for part in found]))
        diff = torch.zeros(*self.inputs.base.shape, len(candidates))
        for pair, part in enumerate(found):
            row, column = part.indices()
            at = self.inputs.differ[pair].nonzero()[:, 0]
            diff[pair, at[row], torch.searchsorted(candidates, column)] = part.values()
        return candidates, diff.to(self.model.device)

    def _last_log_p(
        self, tokens: Int[Tensor, "rows pos"], lengths: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocab"]:
        """Return the log-probabilities after each row's last token; the vocabulary is computed there alone."""
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(tokens), device=hidden.device), lengths.to(hidden.device) - 1]
        return self.model.get_output_embeddings()(last).float().log_softmax(-1)

    def kl(self, rows: Int[Tensor, " rows"], delta: Float[Tensor, "rows pos d_out"]) -> Float[Tensor, " rows"]:
        """Return D_KL(edited || target) in nats of pair `rows[r]` with `delta[r]` added; gradients pass."""
        parts = []
        for pairs, added in zip(rows.split(self.batch_rows), delta.split(self.batch_rows), strict=True):
            lengths = self.inputs.lengths[pairs]
            longest = int(lengths.max())
            begun = begun_at(self.model, self.entry, self.residual[pairs, :longest])
            with begun, replaced(self.model, self.edit, lambda x, a=added[:, :longest]: x + a.to(x)):
                log_p = self._last_log_p(self.inputs.base[pairs, :longest], lengths)
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
    def patched_kl(self, chosen: Bool[Tensor, " n"] | None = None) -> Float[Tensor, " pairs"]:
        """Return the KL of each pair with the chosen candidates patched (default: all)."""
        return self.kl(torch.arange(self.n_pairs), self.delta(chosen))


# --- elimination -----------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """The state after one threshold."""

    threshold: float
    n_patched: int
    kl: Estimate  # mean over pairs, in nats
    magnitude: float


@dataclass(frozen=True)
class Elimination:
    """The curve, and the latents with the most important first: the later a latent is un-patched, the more it matters."""

    points: tuple[Point, ...]
    order: tuple[int, ...]
    survivors: int  # how many of `order` were still patched at the end


class _Step(NamedTuple):
    """One candidate taken out, on the prompts in which it differs."""

    column: int
    rows: Int[Tensor, " rows"]
    stale: Bool[Tensor, " rows"]  # those whose KL has to be measured: something was taken out of them since last time
    guess: bool  # that it will be un-patched


class _State:
    """The patched set: what it adds to each pair, each pair's KL, and every KL measured so far.

    A prompt's version is the number of candidates that were taken out of it: a KL measured at that version still holds.
    """

    def __init__(self, patcher: Patcher):
        self.patcher = patcher
        self.delta = patcher.delta()
        self.kl = patcher.patched_kl().cpu()
        self.rise = patcher.attribution(self.delta)  # of the mean KL when a candidate is taken out, as last seen
        self.rows = [column.nonzero()[:, 0] for column in patcher.in_play.T]
        self.version = torch.zeros(patcher.n_pairs, dtype=torch.int32)
        self.known = torch.zeros(patcher.in_play.shape)  # KL with the candidate taken out
        self.known_at = torch.full(patcher.in_play.shape, -1, dtype=torch.int32)
        self.removed: list[int] = []

    def path(self, columns: Sequence[int], threshold: float, most_rows: int) -> tuple[list[_Step], list[Tensor]]:
        """Return the next steps as they will be if every guess is right, until their prompts fill a batch, and edits.

        Where nothing has to be measured, the guess is certain.
        """
        steps: list[_Step] = []
        edits: list[Tensor] = []
        delta, version, n_rows = self.delta.clone(), self.version.clone(), 0
        for column in columns:
            rows = self.rows[column]
            stale = self.known_at[rows, column] != version[rows]
            n_stale = int(stale.sum())
            if n_rows and n_rows + n_stale > most_rows:
                break
            rise = float(self.rise[column]) if n_stale else self.change(rows, self.known[rows, column])
            without = delta[rows] - self.edit(rows, column)
            edits.append(without[stale])
            steps.append(_Step(column, rows, stale, rise < threshold))
            if rise < threshold:
                delta[rows] = without
                version[rows] += 1
            n_rows += n_stale
        return steps, edits

    def edit(self, rows: Tensor, column: int) -> Float[Tensor, "rows pos d_out"]:
        return self.patcher.one(rows, torch.full_like(rows, column))

    def change(self, rows: Tensor, kl: Float[Tensor, " rows"]) -> float:
        """Return by how much the mean KL over all pairs rises when those of `rows` become `kl`."""
        return float((kl.double() - self.kl[rows].double()).sum()) / self.patcher.n_pairs

    def replay(self, steps: list[_Step], edits: list[Tensor], threshold: float) -> int:
        """Run the guessed steps as one batch and take them up to the first wrong guess, itself included.

        Returns how many guesses were right.
        """
        rows = torch.cat([step.rows[step.stale] for step in steps])
        measured = self.patcher.kl(rows, torch.cat(edits)).cpu() if len(rows) else torch.zeros(0)
        for number, (step, kl) in enumerate(zip(steps, measured.split([len(edit) for edit in edits]), strict=True)):
            at = step.rows[step.stale]
            self.known[at, step.column], self.known_at[at, step.column] = kl, self.version[at]
            found = self.known[step.rows, step.column]
            self.rise[step.column] = change = self.change(step.rows, found)
            if change < threshold:
                self.delta[step.rows] -= self.edit(step.rows, step.column)
                self.kl[step.rows] = found
                self.version[step.rows] += 1
                self.removed.append(step.column)
            if (change < threshold) != step.guess:
                return number
        return len(steps)

    def point(self, threshold: float, n_patched: int) -> Point:
        return Point(threshold, n_patched, mean_interval(self.kl.double().numpy()), self.patcher.magnitude(self.delta))


@torch.no_grad()
def eliminate(patcher: Patcher, thresholds: Sequence[float], *, seed: int = 0) -> Elimination:
    """Return the curve over rising thresholds (nats) and the order of importance."""
    rng = np.random.default_rng(seed)
    state = _State(patcher)
    left = list(range(len(patcher.candidates)))
    points, most_rows = [state.point(0.0, len(left))], patcher.batch_rows
    for threshold in tqdm(thresholds, desc="thresholds", disable=None):
        order = rng.permutation(left).tolist()
        while order:
            steps, edits = state.path(order, threshold, most_rows)
            n_right = state.replay(steps, edits, threshold)
            all_right = n_right == len(steps)
            order = order[n_right if all_right else n_right + 1 :]
            most_rows = min(patcher.batch_rows, 2 * most_rows) if all_right else max(LEAST_ROWS, most_rows // 2)
        gone = set(state.removed)
        left = [column for column in left if column not in gone]
        points.append(state.point(float(threshold), len(left)))
    survivors = sorted(left, key=lambda column: -float(state.rise[column]))
    ranked = patcher.candidates[torch.tensor(survivors + state.removed[::-1], dtype=torch.int64)]
    return Elimination(tuple(points), tuple(ranked.tolist()), len(survivors))

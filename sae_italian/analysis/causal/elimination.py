"""ACDC on a flat graph (Conmy et al. 2023, algorithm 4.1; Cunningham et al. 2023, section 4), several steps at a time.

Start with every latent patched; for each threshold, visit the latents still patched in random order and un-patch one if
the KL to the target rises by less than the threshold. Each step depends on the one before, so the original runs all
prompts once per visit. Here the outcomes are guessed (first from one gradient, then from each latent's last measured
rise), the steps along the guessed path run as one batch, and what lies behind the first wrong guess is thrown away: the
decisions are those of the original. A latent is run on those prompts alone in which it differs at all, and not again
where nothing has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_italian.analysis.causal.patching import Patcher
from sae_italian.base.statistics import Estimate, mean_interval

LEAST_ROWS = 16  # of a guessed path after wrong guesses


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
    visits: int


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
        self.kl = patcher.kl(torch.arange(patcher.n_pairs), self.delta).cpu()
        self.rows = [patcher.in_play[:, column].nonzero()[:, 0] for column in range(len(patcher.candidates))]
        self.version = torch.zeros(patcher.n_pairs, dtype=torch.int32)
        self.known = torch.zeros(patcher.in_play.shape)  # KL with the candidate taken out
        self.known_at = torch.full(patcher.in_play.shape, -1, dtype=torch.int32)

    def path(
        self, columns: Sequence[int], rise: Tensor, threshold: float, most_rows: int
    ) -> tuple[list[_Step], list[Tensor]]:
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
            guess = (
                bool(rise[column] < threshold) if n_stale else self.change(rows, self.known[rows, column]) < threshold
            )
            if n_stale or guess:
                without = delta[rows] - self.patcher.one(rows, torch.full_like(rows, column))
                edits.append(without[stale])
            if guess:
                delta[rows] = without
                version[rows] += 1
            steps.append(_Step(column, rows, stale, guess))
            n_rows += n_stale
        return steps, edits

    def change(self, rows: Tensor, kl: Float[Tensor, " rows"]) -> float:
        """Return by how much the mean KL over all pairs rises when those of `rows` become `kl`."""
        return float((kl.double() - self.kl[rows].double()).sum()) / self.patcher.n_pairs

    def measure(self, steps: list[_Step], edits: list[Tensor]) -> list[Float[Tensor, " stale"]]:
        """Return the KL of every step's stale prompts, from one batch."""
        rows = torch.cat([step.rows[step.stale] for step in steps])
        if len(rows) == 0:
            return [torch.zeros(0) for _ in steps]
        sizes = [int(step.stale.sum()) for step in steps]
        return list(self.patcher.kl(rows, torch.cat(edits)).cpu().split(sizes))

    def learn(self, step: _Step, measured: Float[Tensor, " stale"]) -> Float[Tensor, " rows"]:
        """Write down what was measured and return the KL of all the step's prompts with its candidate taken out."""
        at = step.rows[step.stale]
        self.known[at, step.column], self.known_at[at, step.column] = measured, self.version[at]
        return self.known[step.rows, step.column]

    def remove(self, step: _Step, kl: Float[Tensor, " rows"]) -> None:
        self.delta[step.rows] -= self.patcher.one(step.rows, torch.full_like(step.rows, step.column))
        self.kl[step.rows] = kl
        self.version[step.rows] += 1

    def point(self, threshold: float, n_patched: int) -> Point:
        values = self.kl.double().numpy()
        return Point(threshold, n_patched, mean_interval(values), self.patcher.magnitude(self.delta))


@torch.no_grad()
def eliminate(patcher: Patcher, thresholds: Sequence[float], *, seed: int = 0) -> Elimination:
    """Return the curve over rising thresholds (nats) and the order of importance."""
    rng = np.random.default_rng(seed)
    state = _State(patcher)
    rise = patcher.attribution(state.delta)
    left = list(range(len(patcher.candidates)))
    points, removed, visits = [state.point(0.0, len(left))], [], 0
    most_rows = patcher.batch_rows
    for threshold in tqdm(thresholds, desc="thresholds", disable=None):
        order = rng.permutation(left).tolist()
        visits += len(order)
        gone: set[int] = set()
        while order:
            steps, edits = state.path(order, rise, threshold, most_rows)
            n_right = _replay(state, steps, edits, threshold, rise, gone, removed)
            all_right = n_right == len(steps)
            order = order[n_right if all_right else n_right + 1 :]
            most_rows = min(patcher.batch_rows, 2 * most_rows) if all_right else max(LEAST_ROWS, most_rows // 2)
        left = [column for column in left if column not in gone]
        points.append(state.point(float(threshold), len(left)))
    survivors = sorted(left, key=lambda column: -float(rise[column]))
    ranked = patcher.candidates[torch.tensor(survivors + removed[::-1], dtype=torch.int64)]
    return Elimination(tuple(points), tuple(ranked.tolist()), len(survivors), visits)


def _replay(
    state: _State,
    steps: list[_Step],
    edits: list[Tensor],
    threshold: float,
    rise: Tensor,
    gone: set[int],
    removed: list[int],
) -> int:
    """Run the guessed steps and take them up to the first wrong guess, itself included; return how many were right."""
    for number, (step, measured) in enumerate(zip(steps, state.measure(steps, edits), strict=True)):
        kl = state.learn(step, measured)
        rise[step.column] = change = state.change(step.rows, kl)
        if change < threshold:
            state.remove(step, kl)
            gone.add(step.column)
            removed.append(step.column)
        if (change < threshold) != step.guess:
            return number
    return len(steps)

"""Negatives: for each positive of a latent one silent segment per source, as long as it to four tokens.

Longer segments are likelier to hold any token at all, so a judge must not be able to go by length. A segment is silent
when the cache shows no activation of the latent in it, nor in any other segment of the same tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.autointerp.examples import LENGTH_STEP, Activity, Draw, ExampleSource
from sae_italian.autointerp.protocols import SEGMENT_NEGATIVES, Negatives
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS, Part

TRIES = 16  # draws per positive before the source counts as exhausted
MARK_SHARE = 0.3  # a token of a positive is marked from this share of its segment's maximum on
PER_NEIGHBOUR = 64  # segments of one neighbour that are kept per part
LOOKED_AT = 8192  # activations of a neighbour, evenly over the corpus, from which these are drawn
N_NEIGHBOURS = 5  # of a latent, in each sense
KEPT = 8192  # neighbours whose segments are kept in memory

_BLOCK = 1024  # latents whose cosines with all others are worked out at once
_Silent = Callable[[Int[np.ndarray, " n"]], Bool[np.ndarray, " n"]]


class Neighbours(NamedTuple):
    """By latent, the nearest others, nearest first; a latent without any in one sense is missing there."""

    cofiring: Mapping[int, Int[np.ndarray, " k"]] = {}
    decoder: Mapping[int, Int[np.ndarray, " k"]] = {}


def find_neighbours(cache: FeatureCache, latents: Sequence[int], sae: Any = None) -> Neighbours:
    """Return the neighbours of some latents, from the cache's table of statistics.

    A cache that was made without its SAE knows no directions; the decoder's neighbours then come from `sae`.
    """
    cofiring, near = (cache.statistics[name] for name in ("cofiring_ids", "decoder_ids"))
    if sae is not None and not any(len(own) for own in near):
        near = nearest_directions(sae.W_dec, latents)
    return Neighbours(
        *(
            {n: np.asarray(rows[n], dtype=np.int64)[:N_NEIGHBOURS] for n in latents if len(rows[n])}
            for rows in (cofiring, near)
        )
    )


def nearest_directions(w_dec: Tensor, latents: Sequence[int]) -> dict[int, list[int]]:
    """Return for some latents the others of largest cosine between decoder rows, w_dec [d_sae, d_in]."""
    directions = torch.nn.functional.normalize(w_dec.detach().float(), dim=-1)
    rows: dict[int, list[int]] = {}
    for block in torch.as_tensor(list(latents), dtype=torch.int64).split(_BLOCK):
        cosine = directions[block] @ directions.T
        cosine[torch.arange(len(block)), block] = -2.0
        nearest = cosine.topk(min(N_NEIGHBOURS, len(directions) - 1), dim=-1).indices
        rows |= dict(zip(block.tolist(), nearest.tolist(), strict=True))
    return rows


class NegativeSource:
    """Draws the negatives of every latent of a cache."""

    def __init__(self, source: ExampleSource, neighbours: Neighbours | None = None):
        self.source, self.neighbours = source, neighbours or Neighbours()
        self.bucket = source.length // LENGTH_STEP
        self._kept: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def prepare(self) -> None:
        """Compute the indices now."""
        _ = self._pools, self._occurrences, self.source.usable_part

    @cached_property
    def _pools(self) -> dict[tuple[int, int], Int[np.ndarray, " n"]]:
        """The usable segments of each part and length."""
        usable, n_buckets = np.flatnonzero(self.source.usable_part >= 0), int(self.bucket.max(initial=0)) + 1
        key = self.source.usable_part[usable].astype(np.int64) * n_buckets + self.bucket[usable]
        known, first = np.unique(np.sort(key), return_index=True)
        groups = np.split(usable[np.argsort(key, kind="stable")], first[1:])
        return {divmod(int(k), n_buckets): group for k, group in zip(known, groups, strict=True)}

    @cached_property
    def _occurrences(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " keys"]]:
        """The segments of all tokens sorted by (part, token), and where each pair begins."""
        part = np.append(self.source.usable_part, np.int8(-1))[self.source.segment_of]  # -1 reads the last
        here = np.flatnonzero(part >= 0)
        key = part[here].astype(np.int64) * self.source.vocab + self.source.tokens[here]
        order = np.argsort(key, kind="stable")
        counts = np.bincount(key, minlength=len(PARTS) * self.source.vocab)
        return self.source.segment_of[here][order], np.concatenate([[0], np.cumsum(counts)])

    def draw(
        self,
        latent: int,
        activity: Activity,
        part: Part,
        n: int,
        sources: Sequence[Negatives] = SEGMENT_NEGATIVES,
    ) -> Draw:
        """Return up to n positives from all tenths of the latent's maxima, with their negatives of these sources.

        Random and same-token negatives are always drawn; they are the same whatever else is asked for.
        """
        positive, decile = self.source.positives(latent, activity, part, n)
        silent = _silent(self.source, activity)
        rng = self.source.rng(latent, part)
        negative: dict[Negatives, np.ndarray] = {
            "random": self._random(positive, part, silent, rng),
            "same-token": self._same_token(positive, activity, part, silent, rng),
        }
        for name, others in (("cofiring", self.neighbours.cofiring), ("decoder", self.neighbours.decoder)):
            if name in sources and latent in others:
                negative[name] = self._of_neighbours(positive, others[latent], part, silent, rng)  # pyright: ignore[reportArgumentType]
        return Draw(positive, decile, negative)

    def _by_length(self, positive: Int[np.ndarray, " n"]) -> list[tuple[int, np.ndarray]]:
        """Return the rows of the positives of each length, to LENGTH_STEP tokens."""
        bucket = self.bucket[positive]
        return [(number, np.flatnonzero(bucket == number)) for number in np.unique(bucket).tolist()]

    def _random(
        self, positive: Int[np.ndarray, " n"], part: Part, silent: _Silent, rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        taken = np.full(len(positive), -1)
        for bucket, rows in self._by_length(positive):
            pool = self._pools[PARTS.index(part), bucket]
            few = len(pool) <= TRIES * len(rows)
            candidates = rng.permutation(pool) if few else pool[rng.integers(len(pool), size=TRIES * len(rows))]
            candidates = _distinct(candidates[silent(candidates)])[: len(rows)]
            if len(candidates) < len(rows) and not few:  # a latent that is active nearly everywhere
                candidates = rng.permutation(pool[silent(pool)])[: len(rows)]
            taken[rows[: len(candidates)]] = candidates
        return taken

    def _same_token(
        self, positive: Int[np.ndarray, " n"], activity: Activity, part: Part, silent: _Silent, rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """For each positive a segment with the token that the positive is strongest on."""
        taken = np.full(len(positive), -1)
        if len(positive) == 0:
            return taken
        grid = self.source.grid(positive)
        strongest = grid[np.arange(len(grid)), self.source.values(activity, grid).argmax(axis=1)]
        segments, first = self._occurrences
        key = PARTS.index(part) * self.source.vocab + self.source.tokens[strongest]
        begin, count = first[key], first[key + 1] - first[key]
        at = begin[:, None] + (rng.random((len(positive), TRIES)) * count[:, None]).astype(np.int64)
        candidates = segments[at]
        good = silent(candidates.ravel()).reshape(candidates.shape)
        good &= self.bucket[candidates] == self.bucket[positive][:, None]
        seen: set[int] = set()
        for row in np.flatnonzero(good.any(axis=1)).tolist():
            options = [segment for segment in candidates[row][good[row]].tolist() if segment not in seen]
            if options:
                taken[row] = options[0]
                seen.add(options[0])
        return taken

    def _of_neighbours(
        self,
        positive: Int[np.ndarray, " n"],
        neighbours: Int[np.ndarray, " k"],
        part: Part,
        silent: _Silent,
        rng: np.random.Generator,
    ) -> Int[np.ndarray, " n"]:
        """Segments of the neighbours in turn: the first of each, then the second of each, and so on."""
        lists = [self._segments_of(int(neighbour))[PARTS.index(part)] for neighbour in neighbours]
        pooled = np.concatenate([np.empty(0, dtype=np.int64), *lists])
        turn = np.concatenate([np.empty(0), *(rng.permutation(len(segments)) for segments in lists)])
        pooled = pooled[np.argsort(turn, kind="stable")]
        pooled = _distinct(pooled[silent(pooled)])
        taken = np.full(len(positive), -1)
        for bucket, rows in self._by_length(positive):
            candidates = pooled[self.bucket[pooled] == bucket][: len(rows)]
            taken[rows[: len(candidates)]] = candidates
        return taken

    def _segments_of(self, latent: int) -> list[Int[np.ndarray, " n"]]:
        """Return a few usable segments per part on which a latent is active."""
        if latent not in self._kept:
            position = self.source.cache.positions(latent)
            segments = self.source.segment_of[position[:: max(1, len(position) // LOOKED_AT)]]
            segments = segments[np.append(True, segments[1:] != segments[:-1])] if len(segments) else segments
            segments = segments[segments >= 0].astype(np.int64)
            parts = self.source.usable_part[segments]
            rng = self.source.rng(latent, "neighbour")
            here = [segments[parts == number] for number in range(len(PARTS))]
            self._kept[latent] = [
                h if len(h) <= PER_NEIGHBOUR else h[rng.integers(len(h), size=PER_NEIGHBOUR)] for h in here
            ]
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[latent]

    # --- marks ---------------------------------------------------------------------------------------------------

    def marked(self, latent: int, activity: Activity, draw: Draw) -> dict[Negatives, Marked]:
        """Return for each source equally many marked tokens in each positive and in the negative paired with it.

        In a positive the tokens from 0.3 of its maximum on are marked. `silent-token` marks silent tokens of the same
        segment; in other negatives as many tokens are marked, those first that the positive's marks stand on too.
        """
        grid = self.source.grid(draw.positive)
        values = self.source.values(activity, grid)
        marks = (values > 0) & (values >= MARK_SHARE * values.max(axis=1, keepdims=True, initial=0.0))
        n_marks = marks.sum(axis=1)
        tokens, rng = self.source.tokens, self.source.rng(latent, "fuzzing")
        wanted = np.where(marks, tokens[grid], -1)
        silent = (values == 0) & (grid >= 0)
        decoys = _mark(silent, rng.random(grid.shape), n_marks)
        found: dict[Negatives, Marked] = {"silent-token": Marked(silent.sum(axis=1) >= n_marks, marks, decoys)}
        for name, segments in draw.negative.items():
            other = self.source.grid(segments)
            same = (tokens[other][:, :, None] == wanted[:, None, :]).any(axis=2) & (other >= 0)
            decoys = _mark(other >= 0, rng.random(grid.shape) - same, n_marks)
            found[name] = Marked((segments >= 0) & ((other >= 0).sum(axis=1) >= n_marks), marks, decoys)
        return found


class Marked(NamedTuple):
    """Marks on the tokens of a draw's positives and of their negatives; only `rows` have as many in both."""

    rows: Bool[np.ndarray, " n"]
    positive: Bool[np.ndarray, "n width"]
    negative: Bool[np.ndarray, "n width"]


def _silent(source: ExampleSource, activity: Activity) -> _Silent:
    """Return what says of segments whether the latent is silent on them and on their copies."""
    active = np.zeros(len(source.content), dtype=bool)
    active[source.content[activity.active]] = True
    return lambda segments: ~active[source.content[segments]]


def _distinct(items: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Return the items without repetitions, in their order."""
    return items[np.sort(np.unique(items, return_index=True)[1])]


def _mark(
    allowed: Bool[np.ndarray, "n width"], preference: Float[np.ndarray, "n width"], n_marks: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, "n width"]:
    """Mark in each row the n allowed tokens of lowest preference value."""
    preference = np.where(allowed, preference, np.inf)
    last = np.sort(preference, axis=1)[np.arange(len(preference)), n_marks.clip(max=preference.shape[1]) - 1]
    return allowed & (preference <= last[:, None]) & (n_marks > 0)[:, None]

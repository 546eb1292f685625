"""Examples of a latent at work and at rest, for explaining it, for choosing the explanation, and for scoring it.

An example is a segment: at most `width` consecutive tokens of one document. Documents are divided once, by a seeded
hash, into train (explain), val (choose) and test (score), so no document serves two purposes. Of segments of equal
tokens only the first counts, in whatever document the others are. Every positive is paired with one negative of each
source (see negatives.py), of the same length to four tokens and verified silent in the cache.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.protocols import Negatives
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS, Part
from sae_italian.cache.shards import places
from sae_italian.corpora.packing import NO_DOCUMENT

LENGTH_STEP = MIN_LENGTH = 4  # tokens
Order = Literal["deciles", "top", "random"]


class Activity(NamedTuple):
    """One latent's activations with the segment of each; those outside any segment are left out."""

    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]
    segment: Int[np.ndarray, " nnz"]
    active: Int[np.ndarray, " active"]  # the segments with an activation, ascending
    maximum: Float[np.ndarray, " active"]  # the largest activation in each


class Draw(NamedTuple):
    """Positives of one latent and one part, and by source the negative paired with each (-1 where there is none)."""

    positive: Int[np.ndarray, " n"]  # segment indices
    decile: Int[np.ndarray, " n"]  # of their maximum among the latent's segments of the part, 0 the weakest
    negative: dict[Negatives, Int[np.ndarray, " n"]]

    def pairs(self, source: Negatives) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Return the positives that have a negative of a source, and these negatives."""
        there = self.negative[source] >= 0
        return self.positive[there], self.negative[source][there]


class ExampleSource:
    """The segments of a cache, their division by document, and draws from them. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, *, width: int = 32, seed: int = 0):
        self.cache, self.width, self.seed = cache, width, seed
        self._last_ranked: tuple[Activity, Part, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        segments = cache.segments(width)
        long_enough = segments.length >= MIN_LENGTH
        self.start, self.length, self.doc = (array[long_enough] for array in segments)
        self.tokens = cache.tokens.astype(np.int64)
        self.vocab = int(self.tokens.max()) + 1  # ids that the text has
        # True where the position before is of the same document and window
        place = np.arange(cache.n_positions) % cache.manifest.context_size
        self.linked: Bool[np.ndarray, " positions"] = (place != cache.whole("run")) & (cache.doc != NO_DOCUMENT)
        self.segment_part = cache.document_parts(seed)[self.doc]
        # the segment of each position; -1 in segments too short to be an example, and at special tokens
        self.segment_of: Int[np.ndarray, " positions"] = np.full(cache.n_positions, -1, dtype=np.int32)
        self.segment_of[places(self.start, self.length)] = np.repeat(np.arange(len(self.start)), self.length)
        self.position_part = np.append(self.segment_part, np.int8(-1))[self.segment_of]  # -1 reads the last

    @cached_property
    def content(self) -> Int[np.ndarray, " segments"]:
        """One number per segment, equal for segments of equal tokens."""
        starts = zip(self.start.tolist(), self.length.tolist(), strict=True)
        hashes = [hash(self.tokens[start : start + length].tobytes()) for start, length in starts]
        return np.unique(np.array(hashes, dtype=np.int64), return_inverse=True)[1]

    @cached_property
    def usable_part(self) -> Int[np.ndarray, " segments"]:
        """The part of each segment that may become an example, -1 for all but the first of each content in the cache."""
        part = np.full(len(self.start), -1, dtype=np.int8)
        first = np.unique(self.content, return_index=True)[1]
        part[first] = self.segment_part[first]
        return part

    def activity(self, latent: int) -> Activity:
        position, value = self.cache.latent(latent)
        segment = self.segment_of[position]
        inside = segment >= 0
        position, value, segment = position[inside], value[inside], segment[inside].astype(np.int64)
        first = np.flatnonzero(np.append(True, segment[1:] != segment[:-1])) if len(segment) else np.empty(0, np.int64)
        maximum = np.maximum.reduceat(value, first) if len(first) else value
        return Activity(position, value, segment, segment[first], maximum)

    def rng(self, latent: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, latent, *purpose.encode()])

    def n_positives(self, activity: Activity) -> dict[Part, int]:
        """Return on how many usable segments of each part the latent is active."""
        counts = np.bincount(self.usable_part[activity.active] + 1, minlength=len(PARTS) + 1)
        return {part: int(count) for part, count in zip(PARTS, counts[1:], strict=True)}

    def positives(
        self, latent: int, activity: Activity, part: Part, n: int, order: Order = "deciles"
    ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Return up to n segments the latent is active on, and the tenth of its maxima each lies in.

        `deciles` draws equally from the ten tenths, `top` takes the strongest, `random` draws from all.
        """
        segments, ascending, decile = self._ranked(activity, part)
        if order == "top":
            chosen = ascending[::-1][:n]
        else:
            chosen = self.rng(latent, part + order).permutation(len(segments))
            if order == "deciles" and len(segments) > n:
                chosen = _in_turn(chosen, decile[chosen], n)
            chosen = chosen[:n]
        return segments[chosen], decile[chosen].astype(np.int64)

    def _ranked(self, activity: Activity, part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the part's segments, their order by maximum, and the tenth of each; remembers the last one asked for."""
        last = self._last_ranked
        if last is None or last[0] is not activity or last[1] != part:
            mine = self.usable_part[activity.active] == PARTS.index(part)
            segments, ascending = activity.active[mine], np.argsort(activity.maximum[mine], kind="stable")
            decile = np.empty(len(segments), dtype=np.uint8)
            decile[ascending] = np.arange(len(segments)) * 10 // max(len(segments), 1)
            last = self._last_ranked = activity, part, (segments, ascending, decile)
        return last[2]

    def grid(self, segments: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n width"]:
        """Return the positions of the segments' tokens, -1 after their end (and everywhere for segment -1)."""
        offsets = np.arange(self.width)
        positions = self.start[segments, None] + offsets
        inside = (offsets < self.length[segments, None]) & (segments[:, None] >= 0)
        return np.where(inside, positions, -1)

    def values(self, activity: Activity, grid: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """Return the latent's activations on a grid of positions, whose rows are segments."""
        values = np.zeros(grid.shape, dtype=activity.value.dtype)
        if values.size == 0:
            return values
        start, length = grid[:, 0], (grid >= 0).sum(axis=1)
        begin = np.searchsorted(activity.position, start)
        count = np.searchsorted(activity.position, start + length) - begin
        row, index = np.repeat(np.arange(len(grid)), count), places(begin, count)
        values[row, activity.position[index] - start[row]] = activity.value[index]
        return values


def _in_turn(items: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], n: int) -> Int[np.ndarray, " m"]:
    """Return n of the items: the first of each group, then the second of each, and so on, in their order."""
    by_group = np.argsort(group, kind="stable")
    first = np.searchsorted(group[by_group], np.arange(int(group.max()) + 1))
    turn = np.empty(len(items), dtype=np.int64)
    turn[by_group] = np.arange(len(items)) - first[group[by_group]]
    early = np.flatnonzero(turn < n)
    return items[early[np.argsort(turn[early], kind="stable")]][:n]

"""Examples of a latent at work and at rest, for explaining it, for choosing the explanation, and for scoring it.

An example is a segment: at most `width` consecutive tokens of one document. Documents are divided once, by a seeded
hash, into train (explain), val (choose) and test (score), so no document serves two purposes. Negatives are segments in
which the cache shows no activation of the latent at all, of the same lengths as the positives. Segments of equal tokens
count once.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.cache import FeatureCache
from sae_italian.cache.splits import PARTS, Part, document_parts

LENGTH_STEP = 4  # tokens


class Examples(NamedTuple):
    """Segments of one latent and one part: `positive` is active somewhere, `negative` verified silent."""

    positive: Int[np.ndarray, " n"]  # segment indices
    negative: Int[np.ndarray, " m"]


class Activity(NamedTuple):
    """One latent's activations with the segment of each; those outside any segment are left out."""

    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]
    segment: Int[np.ndarray, " nnz"]


class ExampleSource:
    """The segments of a cache, their division by document, and draws from them. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, *, width: int = 32, min_length: int = 4, seed: int = 0):
        self.cache, self.width, self.seed = cache, width, seed
        segments = cache.segments(width)
        long_enough = segments.length >= min_length
        self.start, self.length, self.doc = (array[long_enough] for array in segments)
        self.tokens = cache.tokens.astype(np.int64)
        # The token before each token; the BOS at the start of a document or window stands in for nothing.
        self.previous = np.concatenate([self.tokens[:1], self.tokens[:-1]])
        part_of_doc = document_parts(cache, seed)
        self.segment_part = part_of_doc[self.doc]
        self.position_part = np.full(len(self.tokens), -1, dtype=np.int8)
        edges = np.zeros(len(self.tokens) + 1, dtype=np.int64)
        edges[self.start] += 1
        edges[self.start + self.length] -= 1
        counted = np.cumsum(edges[:-1]) > 0  # the rest lies in segments too short to be an example, or is a BOS
        self.position_part[counted] = part_of_doc[cache.doc[counted]]

    @cached_property
    def content(self) -> Int[np.ndarray, " segments"]:
        """One number per segment, equal for segments of equal tokens."""
        hashes = np.empty(len(self.start), dtype=np.uint64)
        for i, (start, length) in enumerate(zip(self.start.tolist(), self.length.tolist(), strict=True)):
            digest = hashlib.blake2b(self.tokens[start : start + length].tobytes(), digest_size=8).digest()
            hashes[i] = int.from_bytes(digest, "little")
        return np.unique(hashes, return_inverse=True)[1]

    @cached_property
    def _pools(self) -> dict[Part, Int[np.ndarray, " n"]]:
        """Per part, the first segment of each content."""
        pools = {}
        for number, part in enumerate(PARTS):
            here = np.flatnonzero(self.segment_part == number)
            pools[part] = here[np.sort(np.unique(self.content[here], return_index=True)[1])]
        return pools

    def activity(self, latent: int) -> Activity:
        position, value = self.cache.latent(latent)
        segment = np.searchsorted(self.start, position, side="right") - 1
        inside = (segment >= 0) & (position < self.start[segment] + self.length[segment])
        return Activity(position[inside], value[inside], segment[inside])

    def rng(self, latent: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, latent, *purpose.encode()])

    def draw(self, latent: int, activity: Activity, part: Part, n: int) -> Examples:
        """Return up to n positive segments, equally from each tenth of their maxima, and as many silent ones as long."""
        number = PARTS.index(part)
        rng = self.rng(latent, part)
        active = np.unique(activity.segment)
        here = active[self.segment_part[active] == number]
        here = here[np.sort(np.unique(self.content[here], return_index=True)[1])]
        positive = _stratified(here, self.maxima(activity)[here], n, rng)
        pool = self._pools[part]
        # silent here, and not a copy of a segment that is active elsewhere
        silent = rng.permutation(pool[~np.isin(self.content[pool], self.content[active])])
        return Examples(*self._matched(positive, silent))

    def _matched(
        self, positive: Int[np.ndarray, " n"], silent: Int[np.ndarray, " s"]
    ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Return as many silent segments as positive ones, of the same lengths (to 4 tokens); surplus is left out.

        Longer segments are likelier to hold any token at all, so without this a judge could go by length.
        """
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        ours, theirs = self.length[positive] // LENGTH_STEP, self.length[silent] // LENGTH_STEP
        for length in np.unique(ours):
            here, there = positive[ours == length], silent[theirs == length]
            n = min(len(here), len(there))
            pairs.append((here[:n], there[:n]))
        if not pairs:
            return positive[:0], silent[:0]
        return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])

    def maxima(self, activity: Activity) -> Float[np.ndarray, " segments"]:
        """Return the latent's largest activation in every segment, 0 where it is silent."""
        largest = np.zeros(len(self.start))
        np.maximum.at(largest, activity.segment, activity.value)
        return largest

    def grid(self, segments: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n width"]:
        """Return the positions of the segments' tokens, -1 after their end."""
        offsets = np.arange(self.width)
        positions = self.start[segments, None] + offsets
        return np.where(offsets < self.length[segments, None], positions, -1)

    def values(self, activity: Activity, grid: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """Return the latent's activations on a grid of positions."""
        if len(activity.position) == 0:
            return np.zeros(grid.shape)
        index = np.searchsorted(activity.position, grid).clip(max=len(activity.position) - 1)
        return np.where(activity.position[index] == grid, activity.value[index], 0.0)


def _stratified(
    items: Int[np.ndarray, " n"], strength: Float[np.ndarray, " n"], n: int, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Return n items (all if fewer), as equally as possible from the ten tenths of their strength, in random order."""
    if len(items) <= n:
        return rng.permutation(items)
    order = items[np.argsort(strength, kind="stable")]
    bins = [rng.permutation(part) for part in np.array_split(order, 10)]
    rounds = [part[i] for i in range(max(map(len, bins))) for part in bins if i < len(part)]
    return rng.permutation(np.array(rounds[:n]))

"""Draws of one latent's examples at work and at rest, for explaining it, choosing the explanation, and scoring it.

An example is a segment: at most `width` consecutive tokens of one document. Documents are divided once, by a seeded
hash, into train (explain), val (choose) and test (score), so no document serves two purposes. Of segments of equal
tokens only the first counts, in whatever document the others are.

Every positive is paired with one negative of each source, as long as it to four tokens: longer segments are likelier to
hold any token at all, and a judge must not be able to go by length. A segment is silent when the cache shows no
activation of the latent in it, nor in any other segment of the same tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae_italian.cache import FeatureCache
from sae_italian.cache.layout import places
from sae_italian.cache.read import PARTS, Part
from sae_italian.cache.stats import nearest_directions
from sae_italian.corpora.packing import NO_DOCUMENT

Negatives = str
"""Where a negative comes from. `random`: any silent segment; `same-token`: one with the same token, silent; `cofiring` and
`decoder`: one on which a latent that fires together with this one, or whose decoder direction is near, is active and this
one silent; `silent-token` (fuzzing only): a segment of the latent's own with its silent tokens marked."""
SEGMENT_NEGATIVES: tuple[Negatives, ...] = ("random", "same-token", "cofiring", "decoder")
FUZZING_NEGATIVES: tuple[Negatives, ...] = ("silent-token", *SEGMENT_NEGATIVES)
Order = Literal["deciles", "top", "random"]
Neighbours = Mapping[str, Mapping[int, Int[np.ndarray, " k"]]]
"""By source (`cofiring`, `decoder`) and latent the nearest others, nearest first; a latent without any is missing."""

LENGTH_STEP = MIN_LENGTH = 4  # tokens
TRIES = 16  # draws per positive before the source counts as exhausted
MARK_SHARE = 0.3  # a token of a positive is marked from this share of its segment's maximum on
PER_NEIGHBOUR = 64  # segments of one neighbour that are kept per part
LOOKED_AT = 8192  # activations of a neighbour, evenly over the corpus, from which these are drawn
N_NEIGHBOURS = 5  # of a latent, in each sense
KEPT = 8192  # neighbours whose segments are kept in memory
_Silent = Callable[[Int[np.ndarray, " n"]], Bool[np.ndarray, " n"]]


@dataclass(frozen=True, eq=False)
class Activity:
    """One latent's activations inside segments, and the segments they are in."""

    latent: int
    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]
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


class Marked(NamedTuple):
    """Marks on the tokens of a draw's positives and of their negatives; only `rows` have as many in both."""

    rows: Bool[np.ndarray, " n"]
    positive: Bool[np.ndarray, "n width"]
    negative: Bool[np.ndarray, "n width"]


class ExampleSource:
    """The segments of a cache, their division by document, and draws from them. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, neighbours: Neighbours | None = None, *, width: int = 32, seed: int = 0):
        self.cache, self.neighbours, self.seed = cache, neighbours or {}, seed
        self.width = min(width, cache.manifest.context_size)  # no segment is longer
        segments = cache.segments(width)
        self.start, self.length, self.doc = (array[segments.length >= MIN_LENGTH] for array in segments)
        self.bucket = self.length // LENGTH_STEP
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
        self._ranked, self._segments_of = lru_cache(1)(self._rank), lru_cache(KEPT)(self._few_segments_of)

    def prepare(self) -> None:
        """Compute the indices now."""
        _ = self._pools, self._occurrences

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

    @cached_property
    def _pools(self) -> dict[tuple[int, int], Int[np.ndarray, " n"]]:
        """The usable segments of each part and length."""
        kinds = [(part, length) for part in range(len(PARTS)) for length in np.unique(self.bucket).tolist()]
        return {(part, n): np.flatnonzero((self.usable_part == part) & (self.bucket == n)) for part, n in kinds}

    @cached_property
    def _occurrences(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " keys"]]:
        """The segments of all tokens sorted by (part, token), and where each pair begins."""
        part = np.append(self.usable_part, np.int8(-1))[self.segment_of]  # -1 reads the last
        here = np.flatnonzero(part >= 0)
        key = part[here].astype(np.int64) * self.vocab + self.tokens[here]
        counts = np.bincount(key, minlength=len(PARTS) * self.vocab)
        return self.segment_of[here][np.argsort(key, kind="stable")], np.concatenate([[0], np.cumsum(counts)])

    def rng(self, latent: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, latent, *purpose.encode()])

    # --- one latent's segments -----------------------------------------------------------------------------------------

    def activity(self, latent: int) -> Activity:
        position, value = self.cache.latent(latent)
        inside = self.segment_of[position] >= 0
        position, value = position[inside], value[inside]
        segment = self.segment_of[position].astype(np.int64)
        first = np.flatnonzero(np.diff(segment, prepend=-1))
        maximum = np.maximum.reduceat(value, first) if len(first) else value
        return Activity(latent, position, value, segment[first], maximum)

    def positives(
        self, activity: Activity, part: Part, n: int, order: Order = "deciles"
    ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Return up to n segments the latent is active on, and the tenth of its maxima each lies in.

        `deciles` draws equally from the ten tenths, `top` takes the strongest, `random` draws from all.
        """
        segments, ascending, decile = self._ranked(activity, part)
        if order == "top":
            chosen = ascending[::-1][:n]
        else:
            chosen = self.rng(activity.latent, part + order).permutation(len(segments))
            if order == "deciles" and len(segments) > n:
                chosen = in_turn(chosen, decile[chosen], n)
            chosen = chosen[:n]
        return segments[chosen], decile[chosen].astype(np.int64)

    def _rank(self, activity: Activity, part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the part's segments, their order by maximum, and the tenth of each."""
        mine = self.usable_part[activity.active] == PARTS.index(part)
        segments, ascending = activity.active[mine], np.argsort(activity.maximum[mine], kind="stable")
        decile = np.empty(len(segments), dtype=np.uint8)
        decile[ascending] = np.arange(len(segments)) * 10 // max(len(segments), 1)
        return segments, ascending, decile

    def grid(self, segments: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n width"]:
        """Return the positions of the segments' tokens, -1 after their end (and everywhere for segment -1)."""
        offsets = np.arange(self.width)
        positions = self.start[segments, None] + offsets
        return np.where((offsets < self.length[segments, None]) & (segments[:, None] >= 0), positions, -1)

    def values(self, activity: Activity, grid: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """Return the latent's activations on a grid of positions, whose rows are segments."""
        values = np.zeros(grid.shape, dtype=activity.value.dtype)
        start, length = grid[:, 0], (grid >= 0).sum(axis=1)
        begin = np.searchsorted(activity.position, start)
        count = np.searchsorted(activity.position, start + length) - begin
        row, index = np.repeat(np.arange(len(grid)), count), places(begin, count)
        values[row, activity.position[index] - start[row]] = activity.value[index]
        return values

    # --- negatives -----------------------------------------------------------------------------------------------------

    def draw(self, activity: Activity, part: Part, n: int, sources: Sequence[Negatives] = SEGMENT_NEGATIVES) -> Draw:
        """Return up to n positives from all tenths of the latent's maxima, with their negatives of these sources.

        Random and same-token negatives are always drawn; they are the same whatever else is asked for.
        """
        positive, decile = self.positives(activity, part, n)
        active = np.zeros(len(self.content), dtype=bool)
        active[self.content[activity.active]] = True
        rng, number = self.rng(activity.latent, part), PARTS.index(part)

        def silent(segments: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
            return ~active[self.content[segments]]

        negative: dict[Negatives, np.ndarray] = {
            "random": self._random(positive, number, silent, rng),
            "same-token": self._same_token(positive, activity, number, silent, rng),
        }
        for name in ("cofiring", "decoder"):
            near = self.neighbours.get(name, {})
            if name in sources and activity.latent in near:
                negative[name] = self._of_neighbours(positive, near[activity.latent], number, silent, rng)
        return Draw(positive, decile, negative)

    def _paired(self, positive: Int[np.ndarray, " n"], found: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """Return one segment per positive: of each length the first that `found` gives for it and its number, else -1."""
        taken, bucket = np.full(len(positive), -1), self.bucket[positive]
        for length in np.unique(bucket).tolist():
            rows = np.flatnonzero(bucket == length)
            candidates = found(length, len(rows))[: len(rows)]
            taken[rows[: len(candidates)]] = candidates
        return taken

    def _random(
        self, positive: Int[np.ndarray, " n"], part: int, silent: _Silent, rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        def drawn(length: int, n: int) -> np.ndarray:
            pool = self._pools[part, length]
            few = len(pool) <= TRIES * n
            candidates = rng.permutation(pool) if few else pool[rng.integers(len(pool), size=TRIES * n)]
            candidates = _distinct(candidates[silent(candidates)])
            if len(candidates) < n and not few:  # a latent that is active nearly everywhere
                return rng.permutation(pool[silent(pool)])
            return candidates

        return self._paired(positive, drawn)

    def _same_token(
        self, positive: Int[np.ndarray, " n"], activity: Activity, part: int, silent: _Silent, rng: np.random.Generator
    ) -> Int[np.ndarray, " n"]:
        """For each positive a segment with the token that the positive is strongest on."""
        grid = self.grid(positive)
        strongest = grid[np.arange(len(grid)), self.values(activity, grid).argmax(axis=1)]
        segments, first = self._occurrences
        key = part * self.vocab + self.tokens[strongest]
        begin, count = first[key], first[key + 1] - first[key]
        candidates = segments[begin[:, None] + (rng.random((len(positive), TRIES)) * count[:, None]).astype(np.int64)]
        good = silent(candidates.ravel()).reshape(candidates.shape)
        good &= self.bucket[candidates] == self.bucket[positive][:, None]
        taken, seen = np.full(len(positive), -1), {-1}
        for row in np.flatnonzero(good.any(axis=1)).tolist():
            options = (segment for segment in candidates[row][good[row]].tolist() if segment not in seen)
            taken[row] = next(options, -1)
            seen.add(int(taken[row]))
        return taken

    def _of_neighbours(
        self,
        positive: Int[np.ndarray, " n"],
        neighbours: Int[np.ndarray, " k"],
        part: int,
        silent: _Silent,
        rng: np.random.Generator,
    ) -> Int[np.ndarray, " n"]:
        """Segments of the neighbours in turn: the first of each, then the second of each, and so on."""
        lists = [self._segments_of(neighbour)[part] for neighbour in neighbours.tolist()]
        turn = np.concatenate([rng.permutation(len(segments)) for segments in lists])
        pooled = np.concatenate(lists)[np.argsort(turn, kind="stable")]
        pooled = _distinct(pooled[silent(pooled)])
        return self._paired(positive, lambda length, n: pooled[self.bucket[pooled] == length])

    def _few_segments_of(self, latent: int) -> list[Int[np.ndarray, " n"]]:
        """Return a few usable segments per part on which a latent is active."""
        position, _ = self.cache.latent(latent)
        segments = self.segment_of[position[:: max(1, len(position) // LOOKED_AT)]].astype(np.int64)
        segments = segments[(np.diff(segments, prepend=-1) != 0) & (segments >= 0)]
        rng, parts = self.rng(latent, "neighbour"), self.usable_part[segments]
        here = [segments[parts == number] for number in range(len(PARTS))]
        return [h if len(h) <= PER_NEIGHBOUR else h[rng.integers(len(h), size=PER_NEIGHBOUR)] for h in here]

    # --- marks ---------------------------------------------------------------------------------------------------------

    def marked(self, activity: Activity, draw: Draw) -> dict[Negatives, Marked]:
        """Return for each source equally many marked tokens in each positive and in the negative paired with it.

        `silent-token` marks silent tokens of the positive itself; in other negatives as many tokens are marked, those
        first that the positive's marks stand on too.
        """
        grid = self.grid(draw.positive)
        values = self.values(activity, grid)
        marks = strong(values)
        n_marks = marks.sum(axis=1)
        rng, wanted = self.rng(activity.latent, "fuzzing"), np.where(marks, self.tokens[grid], -1)
        silent = (values == 0) & (grid >= 0)
        decoys = _mark(silent, rng.random(grid.shape), n_marks)
        found: dict[Negatives, Marked] = {"silent-token": Marked(silent.sum(axis=1) >= n_marks, marks, decoys)}
        for name, segments in draw.negative.items():
            other = self.grid(segments)
            same = (self.tokens[other][:, :, None] == wanted[:, None, :]).any(axis=2) & (other >= 0)
            decoys = _mark(other >= 0, rng.random(grid.shape) - same, n_marks)
            found[name] = Marked((segments >= 0) & ((other >= 0).sum(axis=1) >= n_marks), marks, decoys)
        return found


def strong(values: Float[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
    """Return the tokens to mark in segments: those from 0.3 of the segment's maximum on."""
    return (values > 0) & (values >= MARK_SHARE * values.max(axis=1, keepdims=True, initial=0.0))


def _mark(
    allowed: Bool[np.ndarray, "n width"], preference: Float[np.ndarray, "n width"], n_marks: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, "n width"]:
    """Mark in each row the n allowed tokens of lowest preference value."""
    preference = np.where(allowed, preference, np.inf)
    last = np.sort(preference, axis=1)[np.arange(len(preference)), n_marks.clip(max=preference.shape[1]) - 1]
    return allowed & (preference <= last[:, None])


def in_turn(items: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], n: int) -> Int[np.ndarray, " m"]:
    """Return n of the items: the first of each group, then the second of each, and so on, in their order."""
    by_group = np.argsort(group, kind="stable")
    first = np.searchsorted(group[by_group], np.arange(int(group.max()) + 1))
    turn = np.empty(len(items), dtype=np.int64)
    turn[by_group] = np.arange(len(items)) - first[group[by_group]]
    return items[np.argsort(turn, kind="stable")][:n]


def _distinct(items: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Return the items without repetitions, in their order."""
    return items[np.sort(np.unique(items, return_index=True)[1])]


def find_neighbours(cache: FeatureCache, latents: Sequence[int], sae: Any = None) -> Neighbours:
    """Return the neighbours of some latents, from the cache's table of statistics.

    A cache that was made without its SAE knows no directions; the decoder's neighbours then come from `sae`.
    """
    near: dict[str, Any] = {name: cache.statistics[f"{name}_ids"] for name in ("cofiring", "decoder")}
    if sae is not None and not any(map(len, near["decoder"])):
        ids, _ = nearest_directions(sae.W_dec, torch.tensor(latents, dtype=torch.int64), N_NEIGHBOURS)
        near["decoder"] = dict(zip(latents, torch.cat(ids).tolist(), strict=True))
    return {
        name: {n: np.asarray(rows[n], dtype=np.int64)[:N_NEIGHBOURS] for n in latents if len(rows[n])}
        for name, rows in near.items()
    }

"""Windows of one latent: the stretches of text in which it is strongest, typical, or silent.

Windows are the segments of `FeatureCache.segments(width)` - the same grid, so windows of one latent never overlap - but
found from the activations themselves, so the cost does not depend on the cache's size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.base.errors import UsageError, nearest
from sae_italian.cache.read import FeatureCache, LatentActivations
from sae_italian.corpora.packing import NO_DOCUMENT

KINDS = ("top", "quantiles", "random", "silent", "same-token")
COPIES = 256  # activations looked at for each window asked for, when text repeats itself
TRIES = 20  # rounds of drawing before silent windows are given up as rare
SAME_TOKENS = 5  # a latent's strongest tokens, by activation mass


class Shown(NamedTuple):
    """One window as text: each token's span in it, and its activation."""

    text: str
    spans: Int[np.ndarray, "tokens 2"]
    values: Float[np.ndarray, " tokens"]
    doc: int


class Windows(NamedTuple):
    """Windows of a latent: position of the first token, number of tokens, document, largest activation, bin (0: strongest)."""

    latent: LatentActivations
    start: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    doc: Int[np.ndarray, " n"]
    maximum: Float[np.ndarray, " n"]
    bin: Int[np.ndarray, " n"]

    def shown(self) -> list[Shown]:
        """Return every window with its text and the activation of every token."""
        position, value = self.latent.position, self.latent.value
        shown = []
        for first, length, doc in zip(self.start.tolist(), self.length.tolist(), self.doc.tolist(), strict=True):
            text, spans = self.latent.cache.spans(first, first + length)
            low, high = np.searchsorted(position, [first, first + length])
            values = np.zeros(length, dtype=np.float32)
            values[position[low:high] - first] = value[low:high]
            shown.append(Shown(text, spans, values, doc))
        return shown


def find_windows(
    latent: LatentActivations, kind: str, n: int, *, width: int = 32, seed: int = 0, bins: int = 10
) -> Windows:
    """Return up to n windows of at most `width` tokens, no two with the same tokens.

    `top`: the strongest, strongest first. `quantiles`: active windows in `bins` equal parts by their maximum, n / bins
    drawn from each, strongest part first. `random`: drawn from all active windows. `silent`: drawn from the corpus,
    without any activation. `same-token`: silent too, but holding one of the latent's strongest tokens.
    The same seed draws the same. Raises: UsageError for another kind.
    """
    if kind not in KINDS:
        raise UsageError(f"window kind {kind!r} is unknown. {nearest(kind, KINDS)}")
    rng = np.random.default_rng([seed, latent.latent, KINDS.index(kind)])
    cache = latent.cache
    number = np.zeros(0, dtype=np.int64)
    if kind == "top":
        start = _top(latent, n, width)
    elif kind in ("quantiles", "random"):
        start, number = _drawn(latent, n, width, rng, bins if kind == "quantiles" else 1)
    elif kind == "silent":
        start = _silent(latent, n, width, rng)
    else:
        start = _same_token(latent, n, width, rng)
    length, doc = _lengths(cache, start, width)
    low, high = (np.searchsorted(latent.position, edge) for edge in (start, start + length))
    maximum = [float(latent.value[a:b].max(initial=0.0)) for a, b in zip(low, high, strict=True)]
    number = number if len(number) else np.zeros(len(start), dtype=np.int64)
    return Windows(latent, start, length, doc, np.array(maximum, dtype=np.float32), number)


def segment_starts(cache: FeatureCache, position: Int[np.ndarray, " n"], width: int) -> Int[np.ndarray, " n"]:
    """Return where the segment that holds each position starts."""
    place = position % cache.manifest.context_size
    run = cache.gather("run", position)
    return position - (place - run) % width


def _lengths(
    cache: FeatureCache, start: Int[np.ndarray, " n"], width: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return length and document of the segments that start at some positions."""
    context = cache.manifest.context_size
    grid = start[:, None] + np.arange(width)
    inside = grid // context == start[:, None] // context
    doc = cache.gather("doc", np.where(inside, grid, start[:, None]).ravel()).reshape(grid.shape)
    same = inside & (doc == doc[:, :1])
    return np.logical_and.accumulate(same, axis=1).sum(axis=1), doc[:, 0]


def _distinct(cache: FeatureCache, start: Int[np.ndarray, " m"], n: int, width: int, seen: set[bytes]) -> list[int]:
    """Return the first n of some segments whose tokens were not seen before."""
    length, _ = _lengths(cache, start, width)
    grid = (start[:, None] + np.arange(width)).clip(max=cache.n_positions - 1)
    tokens = cache.gather("tokens", grid.ravel()).reshape(grid.shape)
    kept: list[int] = []
    for first, row, size in zip(start.tolist(), tokens, length.tolist(), strict=True):
        content = row[:size].tobytes()
        if len(kept) < n and content not in seen:
            seen.add(content)
            kept.append(first)
    return kept


def _top(latent: LatentActivations, n: int, width: int) -> Int[np.ndarray, " n"]:
    position, value = latent
    wanted = min(len(value), 4 * n)
    while True:
        strongest = np.argpartition(-value, wanted - 1)[:wanted] if 0 < wanted < len(value) else np.arange(len(value))
        strongest = strongest[np.lexsort((position[strongest], -value[strongest]))]
        starts = segment_starts(latent.cache, position[strongest], width)
        starts = starts[np.sort(np.unique(starts, return_index=True)[1])]
        kept = _distinct(latent.cache, starts, n, width, set())
        if len(kept) >= n or wanted >= min(len(value), COPIES * n):
            return np.array(kept, dtype=np.int64)
        wanted = min(len(value), 4 * wanted)


def _drawn(
    latent: LatentActivations, n: int, width: int, rng: np.random.Generator, bins: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return segments drawn equally from `bins` parts of all active segments, and the part of each."""
    starts = segment_starts(latent.cache, latent.position, width)
    first = np.flatnonzero(np.diff(starts, prepend=-1))
    maxima = np.maximum.reduceat(latent.value, first) if len(first) else latent.value
    order = starts[first][np.argsort(-maxima, kind="stable")]
    seen: set[bytes] = set()
    kept, number = [], []
    for index, part in enumerate(np.array_split(order, bins)):
        share = n // bins + (index < n % bins)
        found = _distinct(latent.cache, rng.permutation(part)[: 4 * share], share, width, seen)
        kept += found
        number += [index] * len(found)
    return np.array(kept, dtype=np.int64), np.array(number, dtype=np.int64)


def _only_silent(latent: LatentActivations, start: Int[np.ndarray, " m"], width: int) -> Int[np.ndarray, " k"]:
    length, _ = _lengths(latent.cache, start, width)
    return start[np.searchsorted(latent.position, start) == np.searchsorted(latent.position, start + length)]


def _silent(latent: LatentActivations, n: int, width: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    cache, seen, kept = latent.cache, set(), []
    for _ in range(TRIES):
        position = rng.integers(cache.n_positions, size=4 * n)
        position = position[cache.gather("doc", position) != NO_DOCUMENT]
        starts = segment_starts(cache, position, width)
        kept += _distinct(cache, _only_silent(latent, starts, width), n - len(kept), width, seen)
        if len(kept) >= n:
            break
    return np.array(kept, dtype=np.int64)


def _same_token(latent: LatentActivations, n: int, width: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    cache, seen, kept = latent.cache, set(), []
    tokens, index = np.unique(cache.gather("tokens", latent.position), return_inverse=True)
    mass = np.bincount(index, weights=latent.value, minlength=len(tokens))
    wanted = tokens[np.argsort(-mass, kind="stable")[:SAME_TOKENS]]
    for shard in rng.permutation(len(cache.manifest.shards) if len(wanted) else 0).tolist():
        arrays = cache.shard_tokens(shard)
        hits = np.flatnonzero(np.isin(arrays["tokens"], wanted) & (arrays["doc"] != NO_DOCUMENT))
        hits += shard * cache.manifest.windows_per_shard * cache.manifest.context_size
        hits = rng.permutation(hits[~np.isin(hits, latent.position)])[: 16 * n]
        starts = _only_silent(latent, segment_starts(cache, hits, width), width)
        kept += _distinct(cache, starts, n - len(kept), width, seen)
        if len(kept) >= n:
            break
    return np.array(kept, dtype=np.int64)

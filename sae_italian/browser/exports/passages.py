"""The contexts of a latent as other tools want them: token strings that join to the true text, and an activation each."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.cache import FeatureCache

BEFORE, AFTER = 31, 32  # tokens shown on either side of the strongest one
N_TOP, N_INTERVALS, N_PER_INTERVAL = 20, 5, 5  # as SAEDashboard draws for Neuronpedia
_UNSTORABLE = re.compile("[\ud800-\udfff]")


class Passage(NamedTuple):
    """A stretch of one document. `anchor` is the place of the token it was chosen for, among `tokens`."""

    tokens: list[str]
    values: list[float]
    anchor: int
    first: int  # position of its first token in the cache
    doc_id: str
    source: str

    @property
    def text(self) -> str:
        return "".join(self.tokens)


class Interval(NamedTuple):
    """Passages whose anchor's activation lies in (lo, hi]; `share` is that of all tokens whose activation does."""

    lo: float
    hi: float
    share: float
    passages: list[Passage]


def pieces(
    text: str, spans: Int[np.ndarray, "tokens 2"], values: Float[np.ndarray, " tokens"]
) -> tuple[list[str], list[float], list[int]]:
    """Return the text in pieces, their activations, and the piece of each token.

    The pieces joined are the text. Tokens that share a letter (one of several bytes) are one piece, with the largest of
    their activations; a gap between tokens belongs to the later one. No piece is empty.
    """
    ends: list[int] = []
    strengths: list[float] = []
    owner = []
    covered = 0
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        if not ends or (0 < covered <= start and end > covered):
            ends.append(end)
            strengths.append(value)
        else:
            ends[-1], strengths[-1] = max(ends[-1], end), max(strengths[-1], value)
        covered = ends[-1]
        owner.append(len(ends) - 1)
    if ends:
        ends[-1] = len(text)
    cut = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [storable(piece) for piece in cut], strengths, owner


def storable(text: str) -> str:
    """Return a text that a database takes: a space for NUL (as Neuronpedia's importer), U+FFFD for half a surrogate."""
    return _UNSTORABLE.sub("\ufffd", text.replace("\x00", " "))


def around(
    cache: FeatureCache, anchors: Int[np.ndarray, " n"], before: int = BEFORE, after: int = AFTER
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return first and last position (exclusive) of the text around each anchor, inside its document and window."""
    grid = anchors[:, None] + np.arange(-before, after + 1)
    context = cache.manifest.context_size
    inside = grid // context == anchors[:, None] // context
    doc = cache.gather("doc", np.where(inside, grid, anchors[:, None]).ravel()).reshape(grid.shape)
    same = inside & (doc == doc[:, before : before + 1])
    left = np.logical_and.accumulate(same[:, before::-1], axis=1).sum(axis=1) - 1
    right = np.logical_and.accumulate(same[:, before:], axis=1).sum(axis=1)
    return anchors - left, anchors + right


class Passages:
    """Draws the passages of one latent after the other. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, *, seed: int = 0):
        self.cache, self.seed = cache, seed
        self.n_tokens = counted_tokens(cache)

    def top(self, latent: int, n: int = N_TOP) -> list[Passage]:
        """Return the strongest passages, strongest first, no text twice."""
        found = self.cache.latent(latent)
        windows = found.windows("top", n)
        anchors = []
        for start, length in zip(windows.start.tolist(), windows.length.tolist(), strict=True):
            low, high = np.searchsorted(found.position, [start, start + length])
            anchors.append(int(found.position[low + int(np.argmax(found.value[low:high]))]))
        return self._distinct(latent, np.array(anchors, dtype=np.int64), n, set())

    def intervals(self, latent: int, known: set[str] | None = None) -> list[Interval]:
        """Return passages from five equally wide intervals of (0, maximum], the strongest interval first.

        Zeros are in no interval. Texts in `known` are left out, so that nothing is shown twice.
        """
        position, value = self.cache.latent(latent)
        rng = np.random.default_rng([self.seed, latent])
        edges = np.linspace(0.0, float(value.max(initial=0.0)), N_INTERVALS + 1)
        seen, found = set(known or ()), []
        for lo, hi in zip(edges[-2::-1], edges[:0:-1], strict=True):
            inside = position[(value > lo) & (value <= hi)]
            drawn = rng.permutation(inside)[: 4 * N_PER_INTERVAL]
            passages = self._distinct(latent, drawn, N_PER_INTERVAL, seen)
            found.append(Interval(float(lo), float(hi), len(inside) / self.n_tokens, passages))
        return found

    def _distinct(self, latent: int, anchors: Int[np.ndarray, " m"], n: int, seen: set[str]) -> list[Passage]:
        kept: list[Passage] = []
        if len(anchors) == 0:
            return kept
        position, value = self.cache.latent(latent)
        for anchor, first, last in zip(
            anchors.tolist(), *(a.tolist() for a in around(self.cache, anchors)), strict=True
        ):
            if len(kept) == n:
                break
            low, high = np.searchsorted(position, [first, last])
            values = np.zeros(last - first, dtype=np.float32)
            values[position[low:high] - first] = value[low:high]
            passage = self._passage(first, last, values, anchor)
            if passage.tokens and passage.text not in seen:
                seen.add(passage.text)
                kept.append(passage)
        return kept

    def _passage(self, first: int, last: int, values: Float[np.ndarray, " tokens"], anchor: int) -> Passage:
        text, spans = self.cache.spans(first, last)
        tokens, strengths, owner = pieces(text, spans, values)
        document = self.cache.document(int(self.cache.gather("doc", np.array([first]))[0]))
        return Passage(
            tokens,
            [rounded(value) for value in strengths],
            owner[anchor - first],
            first,
            storable(document.doc_id),
            storable(document.source),
        )


def rounded(value: float, digits: int = 6) -> float:
    """Return a number with that many significant digits: a file of millions of them is a third of the size."""
    return float(f"{float(value):.{digits}g}")


def counted_tokens(cache: FeatureCache) -> int:
    """Return how many tokens the densities of a cache are shares of: those of documents, not the special ones."""
    count, density = cache.statistics["count"], cache.statistics["density"]
    most = int(np.argmax(count))
    return round(float(count[most]) / float(density[most])) if count[most] else cache.n_positions

"""The contexts of a latent as other tools want them: token strings that join to the true text, and an activation each."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.cache import FeatureCache, LatentActivations

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


class PassageDrawer:
    """Draws the passages of one latent after the other. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, *, seed: int = 0):
        self.cache, self.seed = cache, seed
        self.n_tokens = counted_tokens(cache)

    def top(self, latent: int, n: int = N_TOP) -> list[Passage]:
        """Return the strongest passages, strongest first, no text twice."""
        found = self.cache.latent(latent)
        return self._distinct(found, found.windows("top", n).anchor, n, set())

    def intervals(self, latent: int, known: set[str] | None = None) -> list[Interval]:
        """Return passages from five equally wide intervals of (0, maximum], the strongest interval first.

        Zeros are in no interval. Texts in `known` are left out, so that nothing is shown twice.
        """
        activations = self.cache.latent(latent)
        position, value = activations
        rng = np.random.default_rng([self.seed, latent])
        edges = np.linspace(0.0, float(value.max(initial=0.0)), N_INTERVALS + 1)
        seen, found = set(known or ()), []
        for lo, hi in zip(edges[-2::-1], edges[:0:-1], strict=True):
            inside = position[(value > lo) & (value <= hi)]
            drawn = rng.permutation(inside)[: 4 * N_PER_INTERVAL]
            passages = self._distinct(activations, drawn, N_PER_INTERVAL, seen)
            found.append(Interval(float(lo), float(hi), len(inside) / self.n_tokens, passages))
        return found

    def _distinct(
        self, latent: LatentActivations, anchors: Int[np.ndarray, " m"], n: int, seen: set[str]
    ) -> list[Passage]:
        kept: list[Passage] = []
        around = latent.around(anchors, BEFORE, AFTER)
        for index in range(len(anchors)):
            if len(kept) == n:
                break
            shown, first = around.show(index), int(around.start[index])
            tokens, strengths, owner = pieces(shown.text, shown.spans, shown.values)
            document = self.cache.document(shown.doc)
            names = storable(document.doc_id), storable(document.source)
            values = [rounded(value) for value in strengths]
            passage = Passage(tokens, values, owner[int(anchors[index]) - first], first, *names)
            if tokens and passage.text not in seen:
                seen.add(passage.text)
                kept.append(passage)
        return kept


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
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        if not ends or (0 < ends[-1] <= start and end > ends[-1]):
            ends.append(end)
            strengths.append(value)
        else:
            ends[-1], strengths[-1] = max(ends[-1], end), max(strengths[-1], value)
        owner.append(len(ends) - 1)
    if ends:
        ends[-1] = len(text)
    cut = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [storable(piece) for piece in cut], strengths, owner


def storable(text: str) -> str:
    """Return a text that a database takes: a space for NUL (as Neuronpedia's importer), U+FFFD for half a surrogate."""
    return _UNSTORABLE.sub("\ufffd", text.replace("\x00", " "))


def rounded(value: float, digits: int = 6) -> float:
    """Return a number with that many significant digits: a file of millions of them is a third of the size."""
    return float(f"{float(value):.{digits}g}")


def counted_tokens(cache: FeatureCache) -> int:
    """Return how many tokens the densities of a cache are shares of: those of documents, not the special ones."""
    count, density = cache.statistics["count"], cache.statistics["density"]
    most = int(np.argmax(count))
    return round(float(count[most]) / float(density[most])) if count[most] else cache.n_positions

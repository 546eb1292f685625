"""The passages of a card: a latent's strongest, and some from each tenth of its activity, each passage once."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Int

from sae_italian.browser.schema import Record
from sae_italian.cache import FeatureCache, LatentActivations
from sae_italian.cache.passages import contents, first_new

BEFORE, AFTER = 23, 12  # tokens shown around the strongest one
SEGMENT = 32  # of the peaks in one stretch of so many tokens, the strongest stands for all
ALIKE_BEFORE, ALIKE_AFTER = 6, 2  # passages are the same when these tokens around their peaks are
N_TOP, PER_TENTH, TENTHS = 10, 2, 10
CANDIDATES = 6  # looked at for each passage wanted, where text repeats itself
_ORDINALS_IT = ("Primo", "Secondo", "Terzo", "Quarto", "Quinto", "Sesto", "Settimo", "Ottavo", "Nono", "Ultimo")
_ORDINALS_EN = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Last")


class ContextMaker:
    """Makes the passages of any latent of one cache."""

    def __init__(self, cache: FeatureCache):
        self.cache = cache
        self._document = lru_cache(8192)(cache.document)

    def groups(self, latent: LatentActivations, before: int = BEFORE, after: int = AFTER) -> list[Record]:
        """Return the strongest passages, then `per_tenth` from each tenth of the active segments, strongest tenth first.

        A passage reaches so many tokens before and after its strongest one, inside its window and its document.
        """
        peaks = latent.peaks(SEGMENT)
        if len(peaks.position) == 0:
            return []
        ranks = np.arange(len(peaks.position))
        tenths = [tenth for tenth in np.array_split(ranks, TENTHS) if len(tenth)]
        candidates = [ranks[: CANDIDATES * N_TOP], *(_spread(tenth, PER_TENTH) for tenth in tenths)]
        alike = iter(contents(self.cache, peaks.position[np.concatenate(candidates)], ALIKE_BEFORE, ALIKE_AFTER))
        seen: set[bytes] = set()
        kept = []
        for index, group in enumerate(candidates):
            kept.append(group[first_new(islice(alike, len(group)), PER_TENTH if index else N_TOP, seen)])
        contexts = iter(self._contexts(latent, peaks.position[np.concatenate(kept)], before, after))
        groups = []
        for index, own in enumerate(kept):
            names, lo, hi = ("Più forti", "Strongest"), None, None
            if index:
                names = f"{_ORDINALS_IT[index - 1]} decimo", f"{_ORDINALS_EN[index - 1]} tenth"
                lo, hi = float(peaks.value[tenths[index - 1][-1]]), float(peaks.value[tenths[index - 1][0]])
            if shown := list(islice(contexts, len(own))):
                groups.append(Record(name_it=names[0], name_en=names[1], lo=lo, hi=hi, contexts=shown))
        return groups

    def _contexts(
        self, latent: LatentActivations, peak: Int[np.ndarray, " n"], before: int, after: int
    ) -> list[Record]:
        """Return the passages around some peaks; what stands at all of their tokens is read from the cache at once."""
        passages = latent.around(peak, before, after)
        active = [latent.position[here] for here in passages.active]
        place = np.concatenate([*active, passages.start, passages.start + passages.length - 1])
        begin, end = self.cache.gather_all(("start", "end"), place)
        first, last = begin[-2 * len(peak) : -len(peak)].tolist(), end[-len(peak) :].tolist()
        spans = np.split(np.stack([begin, end], axis=1), np.cumsum([len(own) for own in active]))
        contexts = []
        for index, (low, high) in enumerate(zip(first, last, strict=True)):
            document = self._document(int(passages.doc[index]))
            segments = split_text(document.text[low:high], spans[index] - low, latent.value[passages.active[index]])
            largest = float(passages.maximum[index])
            contexts.append(Record(doc_id=document.doc_id, source=document.source, max=largest, segments=segments))
        return contexts


def _spread(ranks: Int[np.ndarray, " n"], wanted: int) -> Int[np.ndarray, " m"]:
    """Return some of the ranks, evenly spaced: first as many as wanted, then those between them."""
    n = min(CANDIDATES * wanted, len(ranks))
    chosen = ranks[np.arange(n) * (len(ranks) - 1) // max(1, n - 1)]
    first = np.arange(n) % CANDIDATES == CANDIDATES // 2
    return np.concatenate([chosen[first], chosen[~first]])


def split_text(text: str, spans: Int[np.ndarray, "tokens 2"], values: np.ndarray) -> list[tuple[str, float]]:
    """Return the text in pieces with the activation of each; the pieces joined are the text, character for character.

    Where tokens share characters (a letter of several bytes), the piece has the largest of their activations. Tokens
    that are not given are silent.
    """
    tokens = list(zip(spans.tolist(), values.tolist(), strict=True))
    pieces: list[tuple[str, float]] = []
    end = 0
    for (start, stop), value in tokens:
        if start < end or stop <= start or value <= 0:
            return _split_shared(text, tokens)
        if start > end:
            pieces.append((text[end:start], 0.0))
        pieces.append((text[start:stop], value))
        end = stop
    return [*pieces, (text[end:], 0.0)] if end < len(text) else pieces


def _split_shared(text: str, tokens: list[tuple[list[int], float]]) -> list[tuple[str, float]]:
    """Return the same for any tokens: those that overlap, are empty or silent, or are out of order."""
    edges = sorted({0, len(text), *(edge for span, _ in tokens for edge in span)})
    pieces: list[tuple[str, float]] = []
    for start, end in pairwise(edges):
        value = max([0.0, *(value for (first, last), value in tokens if first <= start and end <= last)])
        if pieces and value == 0.0 == pieces[-1][1]:
            pieces[-1] = (pieces[-1][0] + text[start:end], 0.0)
        else:
            pieces.append((text[start:end], value))
    return pieces

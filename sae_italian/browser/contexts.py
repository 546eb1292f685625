"""The passages of a card: a latent's strongest, and some from each tenth of its activity, each passage once."""

from __future__ import annotations

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

    def groups(self, latent: LatentActivations, before: int = BEFORE, after: int = AFTER) -> list[Record]:
        """Return the strongest passages, then `per_tenth` from each tenth of the active segments, strongest tenth first.

        A passage reaches so many tokens before and after its strongest one, inside its window and its document.
        """
        peaks = latent.peaks(SEGMENT)
        ranks = np.arange(len(peaks.position))
        tenths = [tenth for tenth in np.array_split(ranks, TENTHS) if len(tenth)]
        candidates = [ranks[: CANDIDATES * N_TOP], *(_spread(tenth, PER_TENTH) for tenth in tenths)]
        alike = contents(self.cache, peaks.position[np.concatenate(candidates)], ALIKE_BEFORE, ALIKE_AFTER)
        seen: set[tuple[int, bytes]] = set()
        groups = []
        for index, group in enumerate(candidates):
            wanted = PER_TENTH if index else N_TOP
            kept = group[first_new(islice(alike, len(group)), wanted, seen)]
            names, lo, hi = ("Più forti", "Strongest"), None, None
            if index:
                names = f"{_ORDINALS_IT[index - 1]} decimo", f"{_ORDINALS_EN[index - 1]} tenth"
                lo, hi = float(peaks.value[tenths[index - 1][-1]]), float(peaks.value[tenths[index - 1][0]])
            if len(kept):
                shown = self._contexts(latent, peaks.position[kept], before, after)
                groups.append(Record(name_it=names[0], name_en=names[1], lo=lo, hi=hi, contexts=shown))
        return groups

    def _contexts(
        self, latent: LatentActivations, peak: Int[np.ndarray, " n"], before: int, after: int
    ) -> list[Record]:
        passages = latent.around(peak, before, after)
        contexts = []
        for shown, largest in zip(passages.shown(), passages.maximum.tolist(), strict=True):
            active = shown.values > 0
            segments = split_text(shown.text, shown.spans[active], shown.values[active])
            document = self.cache.document(shown.doc)
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
    edges = sorted({0, len(text), *spans.ravel().tolist()})
    pieces: list[tuple[str, float]] = []
    for start, end in pairwise(edges):
        value = max([0.0, *(value for (first, last), value in tokens if first <= start and end <= last)])
        if pieces and value == 0.0 == pieces[-1][1]:
            pieces[-1] = (pieces[-1][0] + text[start:end], 0.0)
        else:
            pieces.append((text[start:end], value))
    return pieces

"""The passages of a latent: its strongest, and some from each tenth of its activity, each passage once."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_italian.browser.schema import ContextRecord, GroupRecord
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import LatentActivations
from sae_italian.cache.windows import segment_starts
from sae_italian.corpora import TextDocument

BEFORE, AFTER = 23, 12  # tokens shown around the strongest one
SEGMENT = 32  # of the peaks in one stretch of so many tokens, the strongest stands for all
ALIKE_BEFORE, ALIKE_AFTER = 6, 2  # passages are the same when these tokens around their peaks are
N_TOP, PER_TENTH, TENTHS = 10, 2, 10
CANDIDATES = 6  # looked at for each passage wanted, where text repeats itself
_ORDINALS_IT = ("Primo", "Secondo", "Terzo", "Quarto", "Quinto", "Sesto", "Settimo", "Ottavo", "Nono", "Ultimo")
_ORDINALS_EN = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Last")
KEPT = 64_000_000  # characters of documents held


class Peaks(NamedTuple):
    """The strongest position of every active stretch, strongest first."""

    position: Int[np.ndarray, " peaks"]
    value: np.ndarray


class ContextMaker:
    """Makes the passages of any latent of one cache; holds a bounded number of documents."""

    def __init__(self, cache: FeatureCache, *, n_top: int = N_TOP, per_tenth: int = PER_TENTH):
        self.cache, self.n_top, self.per_tenth = cache, n_top, per_tenth
        self._kept: dict[int, TextDocument] = {}
        self._held = 0

    def groups(self, latent: LatentActivations, before: int = BEFORE, after: int = AFTER) -> list[GroupRecord]:
        """Return the strongest passages, then `per_tenth` from each tenth of the active stretches, strongest tenth first.

        A passage reaches so many tokens before and after its strongest one, inside its window and its document.
        """
        peaks = self.peaks(latent)
        if len(peaks.position) == 0:
            return []
        parts = [range(*edges) for edges in pairwise(_edges(len(peaks.position))) if edges[0] < edges[1]]
        candidates = [np.arange(min(CANDIDATES * self.n_top, len(peaks.position)))]
        candidates += [_spread(part, self.per_tenth) for part in parts]
        kept = self._distinct(peaks.position, candidates, [self.n_top] + [self.per_tenth] * len(parts))
        contexts = iter(self._contexts(latent, peaks.position[np.concatenate(kept)], before, after))
        groups = []
        for index, own in enumerate(kept):
            names, lo, hi = ("Più forti", "Strongest"), None, None
            if index > 0:
                names = f"{_ORDINALS_IT[index - 1]} decimo", f"{_ORDINALS_EN[index - 1]} tenth"
                lo, hi = float(peaks.value[parts[index - 1][-1]]), float(peaks.value[parts[index - 1][0]])
            shown = [next(contexts) for _ in own]
            if shown:
                groups.append(GroupRecord(name_it=names[0], name_en=names[1], lo=lo, hi=hi, contexts=shown))
        return groups

    def peaks(self, latent: LatentActivations) -> Peaks:
        position, value = latent
        if len(position) == 0:
            return Peaks(position, value)
        begins = np.diff(segment_starts(self.cache, position, SEGMENT), prepend=-1) != 0
        first = np.flatnonzero(begins)
        stretch = np.cumsum(begins) - 1
        largest = np.flatnonzero(value == np.maximum.reduceat(value, first)[stretch])
        strongest = largest[np.diff(stretch[largest], prepend=-1) != 0]  # of equals the first
        order = np.argsort(-value[strongest], kind="stable")
        return Peaks(position[strongest][order], value[strongest][order])

    def _around(
        self, peak: Int[np.ndarray, " n"], before: int, after: int, *names: str
    ) -> tuple[np.ndarray, Bool[np.ndarray, "n w"], Int[np.ndarray, "names n w"]]:
        """Return the positions around each peak, which of them are of its document and window, and what stands there."""
        context = self.cache.manifest.context_size
        grid = peak[:, None] + np.arange(-before, after + 1)
        window = grid // context == peak[:, None] // context
        grid = np.where(window, grid, peak[:, None])
        found = self.cache.gather_all(("doc", *names), grid.ravel()).reshape(-1, *grid.shape)
        return grid, window & (found[0] == found[0][:, before, None]), found

    def _distinct(
        self, peak: Int[np.ndarray, " peaks"], candidates: list[np.ndarray], wanted: list[int]
    ) -> list[np.ndarray]:
        """Return of each group of candidates the first so many whose tokens no other that was taken has."""
        _, inside, (_, tokens) = self._around(peak[np.concatenate(candidates)], ALIKE_BEFORE, ALIKE_AFTER, "tokens")
        tokens = np.where(inside, tokens, -1)
        contents = iter(tokens)
        seen: set[bytes] = set()
        kept: list[np.ndarray] = []
        for group, number in zip(candidates, wanted, strict=True):
            own: list[int] = []
            for index in group.tolist():
                content = next(contents).tobytes()
                if len(own) < number and content not in seen:
                    seen.add(content)
                    own.append(index)
            kept.append(np.array(own, dtype=np.int64))
        return kept

    def _contexts(
        self, latent: LatentActivations, peak: Int[np.ndarray, " n"], before: int, after: int
    ) -> list[ContextRecord]:
        grid, inside, (doc, begin, end) = self._around(peak, before, after, "start", "end")
        linked = _joined(inside, before)
        place = np.searchsorted(latent.position, grid).clip(max=len(latent.position) - 1)
        value = np.where(linked & (latent.position[place] == grid), latent.value[place], 0.0)
        rows, columns = np.nonzero(value)
        edges = np.searchsorted(rows, np.arange(len(peak) + 1)).tolist()
        first = begin[np.arange(len(peak)), linked.argmax(axis=1)]
        last = np.where(linked, end, 0).max(axis=1)
        spans = np.stack([begin[rows, columns] - first[rows], end[rows, columns] - first[rows]], axis=1)
        active, docs = value[rows, columns], doc[:, before].tolist()
        bounds, largest = zip(first.tolist(), last.tolist(), strict=True), value.max(axis=1).tolist()
        contexts = []
        for row, (low, high) in enumerate(bounds):
            document, own = self._document(docs[row]), slice(edges[row], edges[row + 1])
            segments = split_text(document.text[low:high], spans[own], active[own])
            contexts.append(
                ContextRecord(doc_id=document.doc_id, source=document.source, max=largest[row], segments=segments)
            )
        return contexts

    def _document(self, index: int) -> TextDocument:
        document = self._kept.get(index)
        if document is None:
            document = self.cache.document(index)
            if self._held + len(document.text) > KEPT:
                self._kept.clear()
                self._held = 0
            self._kept[index] = document
            self._held += len(document.text)
        return document


def _joined(inside: Bool[np.ndarray, "n w"], centre: int) -> Bool[np.ndarray, "n w"]:
    """Return which positions are joined to the centre without a gap."""
    right = np.logical_and.accumulate(inside[:, centre:], axis=1)
    left = np.logical_and.accumulate(inside[:, centre::-1], axis=1)[:, ::-1]
    return np.concatenate([left[:, :-1], right], axis=1)


def _edges(n: int) -> list[int]:
    """Return where each tenth of n begins, and n; the first tenths have the one more that is left over."""
    return [i * (n // TENTHS) + min(i, n % TENTHS) for i in range(TENTHS + 1)]


def _spread(part: range, wanted: int) -> Int[np.ndarray, " m"]:
    """Return some of a part's ranks, evenly spaced: first as many as wanted, then those between them."""
    return part.start + _spaced(len(part), min(CANDIDATES * wanted, len(part)))


@lru_cache(4096)
def _spaced(length: int, n: int) -> Int[np.ndarray, " n"]:
    chosen = np.arange(n) * (length - 1) // max(1, n - 1)
    first = np.arange(n) % CANDIDATES == CANDIDATES // 2
    return np.concatenate([chosen[first], chosen[~first]])


def split_text(text: str, spans: Int[np.ndarray, "tokens 2"], values: np.ndarray) -> list[tuple[str, float]]:
    """Return the text in pieces with the activation of each; the pieces joined are the text, character for character.

    Where tokens share characters (a letter of several bytes), the piece has the largest of their activations. Tokens
    that are not given are silent.
    """
    found, end = [], 0
    for (start, stop), value in zip(spans.tolist(), values.tolist(), strict=True):
        if start < end or stop <= start or value <= 0:
            return _split_shared(text, spans, values)
        if start > end:
            found.append((text[end:start], 0.0))
        found.append((text[start:stop], value))
        end = stop
    return [*found, (text[end:], 0.0)] if end < len(text) else found


def _split_shared(text: str, spans: Int[np.ndarray, "tokens 2"], values: np.ndarray) -> list[tuple[str, float]]:
    """Return the same for any spans: those that overlap, are empty or silent, or are out of order."""
    strength = np.zeros(len(text))
    cut = np.zeros(len(text) + 1, dtype=bool)
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        strength[start:end] = np.maximum(strength[start:end], value)
        cut[start] = cut[end] = True
    edges = [0, *(np.flatnonzero(cut[1:-1]) + 1).tolist(), len(text)]
    pieces: list[tuple[str, float]] = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        value = float(strength[start:end].max(initial=0.0))
        if pieces and value == 0.0 and pieces[-1][1] == 0.0:
            pieces[-1] = (pieces[-1][0] + text[start:end], 0.0)
        elif end > start:
            pieces.append((text[start:end], value))
    return pieces

"""The passages of a card: a latent's strongest, and some from each tenth of its activity, each passage once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Float, Int

from sae_italian.browser.columns import Record
from sae_italian.cache import LatentActivations
from sae_italian.cache.passages import contents, first_new
from sae_italian.corpora import TextDocument

BEFORE, AFTER = 23, 12  # tokens shown around the strongest one
SEGMENT = 32  # of the peaks in one stretch of so many tokens, the strongest stands for all
ALIKE_BEFORE, ALIKE_AFTER = 6, 2  # passages are the same when these tokens around their peaks are
N_TOP, PER_TENTH, TENTHS = 10, 2, 10
CANDIDATES = 6  # looked at for each passage wanted, where text repeats itself
Document = Callable[[int], TextDocument]
_UNSTORABLE = re.compile("[\ud800-\udfff]")
_ORDINALS = {
    "it": ("Primo", "Secondo", "Terzo", "Quarto", "Quinto", "Sesto", "Settimo", "Ottavo", "Nono", "Ultimo"),
    "en": ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Last"),
}


def passages_of(
    latent: LatentActivations, document: Document, before: int = BEFORE, after: int = AFTER
) -> list[Record]:
    """Return the strongest passages, then two from each tenth of the active segments, strongest tenth first.

    A passage reaches so many tokens before and after its strongest one, inside its window and its document, which
    `document` returns by its number.
    """
    peaks = latent.peaks(SEGMENT)
    if len(peaks.position) == 0:
        return []
    ranks = np.arange(len(peaks.position))
    tenths = [tenth for tenth in np.array_split(ranks, TENTHS) if len(tenth)]
    candidates = [ranks[: CANDIDATES * N_TOP], *(_spread(tenth, PER_TENTH) for tenth in tenths)]
    alike = iter(contents(latent.cache, peaks.position[np.concatenate(candidates)], ALIKE_BEFORE, ALIKE_AFTER))
    seen: set[bytes] = set()
    kept = []
    for index, group in enumerate(candidates):
        kept.append(group[first_new(islice(alike, len(group)), PER_TENTH if index else N_TOP, seen)])
    contexts = iter(_contexts(latent, document, peaks.position[np.concatenate(kept)], before, after))
    groups = []
    for index, own in enumerate(kept):
        group = Record(name_it="Più forti", name_en="Strongest", lo=None, hi=None)
        if index:
            it, en = (_ORDINALS[language][index - 1] for language in ("it", "en"))
            lo, hi = peaks.value[tenths[index - 1][[-1, 0]]].tolist()
            group = Record(name_it=f"{it} decimo", name_en=f"{en} tenth", lo=lo, hi=hi)
        if shown := list(islice(contexts, len(own))):
            groups.append({**group, "contexts": shown})
    return groups


def _contexts(
    latent: LatentActivations, document: Document, peak: Int[np.ndarray, " n"], before: int, after: int
) -> Iterator[Record]:
    """Yield the passages around some peaks; what stands at all of their tokens is read from the cache at once."""
    passages = latent.around(peak, before, after)
    active = [latent.position[here] for here in passages.active]
    place = np.concatenate([*active, passages.start, passages.start + passages.length - 1])
    begin, end = latent.cache.gather_all(("start", "end"), place)
    first, last = begin[-2 * len(peak) : -len(peak)].tolist(), end[-len(peak) :].tolist()
    spans = np.split(np.stack([begin, end], axis=1), np.cumsum([len(own) for own in active]))
    for index, (low, high) in enumerate(zip(first, last, strict=True)):
        text, doc_id, source = document(int(passages.doc[index]))
        segments = split_text(text[low:high], spans[index] - low, latent.value[passages.active[index]])
        yield Record(doc_id=doc_id, source=source, max=float(passages.maximum[index]), segments=segments)


def _spread(ranks: Int[np.ndarray, " n"], wanted: int) -> Int[np.ndarray, " m"]:
    """Return some of the ranks, evenly spaced: first as many as wanted, then those between them."""
    n = min(CANDIDATES * wanted, len(ranks))
    chosen = ranks[np.arange(n) * (len(ranks) - 1) // max(1, n - 1)]
    first = np.arange(n) % CANDIDATES == CANDIDATES // 2
    return np.concatenate([chosen[first], chosen[~first]])


def split_text(text: str, spans: Int[np.ndarray, "tokens 2"], values: np.ndarray) -> list[tuple[str, float]]:
    """Return the text in pieces with the activation of each; the pieces joined are the text, character for character.

    Where tokens share characters (a letter of several bytes), the piece has the largest of their activations. Tokens
    that are not given are silent, and what is silent is one piece up to the next token that is not.
    """
    edges = sorted({0, len(text), *spans.ravel().tolist()})
    place = {edge: index for index, edge in enumerate(edges)}
    strength = [0.0] * len(edges)
    for (start, stop), value in zip(spans.tolist(), values.tolist(), strict=True):
        for index in range(place[start], place[stop]):
            strength[index] = max(strength[index], value)
    pieces: list[tuple[str, float]] = []
    for (start, stop), value in zip(pairwise(edges), strength, strict=False):
        if pieces and value == 0.0 == pieces[-1][1]:
            pieces[-1] = (pieces[-1][0] + text[start:stop], 0.0)
        else:
            pieces.append((text[start:stop], value))
    return pieces


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

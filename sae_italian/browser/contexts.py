"""The passages of a card: a latent's strongest, and some from each tenth of its activity, each passage once."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Float, Int

from sae_italian.browser.page import Record
from sae_italian.cache import FeatureCache, LatentActivations
from sae_italian.cache.passages import contents, first_new, surroundings
from sae_italian.corpora import TextDocument

BEFORE, AFTER, REACH = 23, 12, 12  # tokens shown around the strongest one; how many more, to end with the sentence
SAMPLE = 10, 12, 6  # the same of the one passage that stands in the list
FIRES, SILENT = "\x01", "\x02"  # around what fires in it
SEGMENT = 32  # of the peaks in one stretch of so many tokens, the strongest stands for all
ALIKE_BEFORE, ALIKE_AFTER = 6, 2  # passages are the same when these tokens around their peaks are
N_TOP, PER_TENTH, TENTHS = 10, 2, 10
CANDIDATES = 6  # looked at for each passage wanted, where text repeats itself
Document = Callable[[int], TextDocument]
_MARK, _NEXT = "[\"»”’')\\]]", r"(?![\sa-zà-öø-ÿ\d])"  # «n. 12», «l'art. citato»: no ends
_SHORT = "art avv cfr dott dr es gen ing mons on pag prof sen sig sigg st"  # nor «l'on. Moro»
_STOP = "[.!?…]" + "".join(rf"(?<!\b(?i:{one})\.)" for one in _SHORT.split()) + r"(?<!(?<![.\w])[A-Z]\.)"
_BEGINS = re.compile(rf"(?:{_STOP}{_MARK}*(?=\s+{_NEXT})|(?=\n))(\s+)")  # and ends: of sentences
_ENDS, _SPACE = re.compile(rf"{_STOP}{_MARK}*(?=\s+{_NEXT}|\Z)|(?=\n)"), re.compile(r"\s+")
_UNSTORABLE = re.compile("[\ud800-\udfff]")
_TENTHS = [
    *(("Primo", "First"), ("Secondo", "Second"), ("Terzo", "Third"), ("Quarto", "Fourth")),
    *(("Quinto", "Fifth"), ("Sesto", "Sixth"), ("Settimo", "Seventh"), ("Ottavo", "Eighth")),
    *(("Nono", "Ninth"), ("Ultimo", "Last")),
]
GROUPS = [("Più forti", "Strongest"), *((f"{it} decimo", f"{en} tenth") for it, en in _TENTHS)]


def passages_of(
    latent: LatentActivations, document: Document, before: int = BEFORE, after: int = AFTER, reach: int = REACH
) -> list[Record]:
    """Return the strongest passages, then two from each tenth of the active segments, strongest tenth first.

    A passage reaches so many tokens before and after its strongest one, inside its window and its document, which
    `document` returns by its number; up to `reach` more, to begin and end where a sentence or at least a word does.
    """
    peaks = latent.peaks(SEGMENT)
    if len(peaks.position) == 0:
        return []
    ranks = np.arange(len(peaks.position))
    tenths = [tenth for tenth in np.array_split(ranks, TENTHS) if len(tenth)]
    candidates = [ranks[: CANDIDATES * N_TOP], *(_spread(tenth, PER_TENTH) for tenth in tenths)]
    alike = iter(contents(latent.cache, peaks.position[np.concatenate(candidates)], ALIKE_BEFORE, ALIKE_AFTER))
    seen: set[bytes] = set()
    wanted = zip(candidates, [N_TOP] + [PER_TENTH] * len(tenths), strict=True)
    kept = [own[first_new(islice(alike, len(own)), n, seen)] for own, n in wanted]
    chosen = peaks.position[np.concatenate(kept)]
    contexts = _contexts(document, [latent] * len(chosen), chosen, (before, after, reach))
    bounds = [(None, None), *(peaks.value[tenth[[-1, 0]]].tolist() for tenth in tenths)]
    groups = []
    for own, (it, en), (lo, hi) in zip(kept, GROUPS, bounds, strict=False):
        if shown := list(islice(contexts, len(own))):
            groups.append(Record(name_it=it, name_en=en, lo=lo, hi=hi, contexts=shown))
    return groups


def samples(cache: FeatureCache, document: Document, latents: Sequence[int]) -> list[str]:
    """Return the strongest passage of each latent in one line, what fires in it between FIRES and SILENT; "" when dead."""
    found = [cache.latent(latent) for latent in latents]
    alive = [one for one in found if len(one)]
    peak = np.array([one.position[one.value.argmax()] for one in alive], dtype=np.int64)
    contexts = _contexts(document, alive, peak, SAMPLE)
    return [_in_one_line(next(contexts)) if len(one) else "" for one in found]


def _in_one_line(context: Record) -> str:
    """Return the sentence of a passage's strongest token, what fires in it marked; "…" where it is cut."""
    segments, cut = context["segments"], context["cut"]
    whole = "".join(text for text, _ in segments)
    ends = np.cumsum([len(text) for text, _ in segments])
    if not segments:
        return ""
    strongest = max(range(len(segments)), key=lambda i: (segments[i][1] == context["max"], segments[i][1]))
    peak, end = segments[strongest][0], int(ends[strongest])
    stop, lead = _ENDS.search(whole, end - bool(peak.strip())), end - len(peak.lstrip() or peak)
    begins = [min(found.end(), lead) for found in _BEGINS.finditer(whole) if found.start(1) < lead]
    first, last = begins[-1] if begins else 0, stop.end() if stop else len(whole)
    marked = "… " * (not begins and cut & 1)
    for (text, value), end in zip(segments, ends.tolist(), strict=True):
        shown = text[max(0, first - end + len(text)) : max(0, last - end + len(text))]
        plain = re.sub(rf"[\s{FIRES}{SILENT}]+", " ", shown)
        marked += re.sub(r"(\S.*)", rf"{FIRES}\1{SILENT}", plain) if value > 0 else plain
    return marked.strip() + "…" * (not stop and cut >> 1)


def _contexts(
    document: Document,
    latents: Sequence[LatentActivations],
    peak: Int[np.ndarray, " n"],
    reaching: tuple[int, int, int],
) -> Iterator[Record]:
    """Yield the passage around each peak, of its latent; what stands at all of their tokens is read from the cache at once.

    `reaching` are tokens before and after the peak, and how many more there are to choose from.
    """
    (before, after, reach), active = reaching, []
    start, length, doc = surroundings(latents[0].cache, peak, before + reach, after + reach)
    for latent, first, n in zip(latents, start, length, strict=True):
        here = slice(*np.searchsorted(latent.position, (first, first + n)).tolist())
        active.append((latent.position[here], latent.value[here]))
    last = start + length - 1
    ends = [start, np.maximum(start, peak - before), peak, np.minimum(last, peak + after), last]
    places = np.concatenate([*ends, *(positions for positions, _ in active)])
    begin, end = latents[0].cache.gather_all(("start", "end"), places)
    borders = [*begin[: 3 * len(peak)].reshape(3, -1), *end[2 * len(peak) : 5 * len(peak)].reshape(3, -1)]
    edges = np.cumsum([len(positions) for positions, _ in active])
    spans = np.split(np.stack([begin, end], axis=1)[5 * len(peak) :], edges)
    for index, own in enumerate(np.stack(borders, axis=1).tolist()):
        text, doc_id, source = document(int(doc[index]))
        low, high, cut = borders_of(text, *own) if reach else (own[0], own[-1], 0)
        positions, values = active[index]
        inside = spans[index].clip(low, high) - low
        seen = inside[:, 0] < inside[:, 1]
        segments = split_text(text[low:high], inside[seen], values[seen])
        largest = float(values[np.searchsorted(positions, peak[index])])
        yield Record(doc_id=doc_id, source=file_name(source), max=largest, segments=segments, cut=cut)


def borders_of(text: str, low: int, begin: int, peak: int, peak_end: int, end: int, high: int) -> tuple[int, int, int]:
    """Return where a passage begins and ends, and what is cut there: 1 a sentence's beginning, 2 its end, 3 both.

    Of the text from low to high it holds that from begin to end, and more up to the next border of a sentence; where
    there is none, of a word; where a word goes on beyond, the passage begins after it, or ends before it.
    """
    most, found = min(begin + 1, peak), _BEGINS.finditer(text, max(0, low - 4), begin + SEGMENT)
    starts = [low] * (low == 0) + [min(one.end(), most) for one in found if low <= one.end() and one.start(1) < most]
    inside, word = _SPACE.search(text, begin, peak), _SPACE.search(text, end, high)
    start = (starts or [s.end() for s in _SPACE.finditer(text, low, most)] or [inside.end() if inside else begin])[-1]
    start = next((at for at in range(start, peak_end) if not text[at].isspace()), start)  # it may be space
    found = _ENDS.finditer(text, max(end - 1, peak_end), high + SEGMENT)
    ends = [one.end() for one in found if one.end() <= high]
    stop = ends[0] if ends else word.start() if word else high if high == len(text) else end
    if not ends and not word and stop < len(text) and not text[stop].isspace():
        stop = max((found.start() for found in _SPACE.finditer(text, peak_end, stop)), default=stop)
    return start, stop, (not starts) + 2 * (not ends and stop < len(text))


def file_name(source: str) -> str:
    """Return a source as it is told: of a file its name alone, which says nothing of this machine."""
    name = re.split(r"[/\\]", source)[-1]
    return name if re.search(r"\.[A-Za-z]\w*$", name) else source


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
    return [storable(text[a:b]) for a, b in zip([0, *ends], ends, strict=False)], strengths, owner


def storable(text: str) -> str:
    """Return a text that a database takes: a space for NUL (as Neuronpedia's importer), U+FFFD for half a surrogate."""
    return _UNSTORABLE.sub("\ufffd", text.replace("\x00", " "))

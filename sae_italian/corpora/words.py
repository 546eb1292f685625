"""Tokens and character offsets of whole documents, fast: a word that was tokenised once is looked up afterwards.

A tokenizer that cuts text before it merges (Metaspace, byte-level and the like) never lets a token cross the single
space between two words, so a document's tokens are its words' tokens one after the other, and their offsets are moved
by where the word begins. Whether that holds is tested on the tokenizer itself, over every pair of kinds of characters,
before it is relied on; where it does not hold, documents are tokenised whole. The result is the same either way.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt64

from sae_italian.base.errors import UsageError
from sae_italian.corpora.word_memory import Hasher, WordMemory, Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PIECE = 2**20  # characters that are looked up at once; a longer document is tokenised whole
WORDS_PER_TEXT = 128
_SPACE = r"\s\u200b-\u200f\u2028-\u202f\ufeff"
_BOUNDARY = re.compile(f"(?<=[^{_SPACE}]) (?=[^{_SPACE}])")


class Tokens(NamedTuple):
    """The tokens of one document; offsets are characters of its text, [start, end)."""

    ids: Int32[np.ndarray, " tokens"]
    start: Int32[np.ndarray, " tokens"]
    end: Int32[np.ndarray, " tokens"]


class TokenBatch(NamedTuple):
    """The tokens of several documents, one after the other."""

    flat: Int32[np.ndarray, "tokens 3"]  # id, start, end
    bounds: Int[np.ndarray, " documents+1"]

    def documents(self) -> Iterator[Tokens]:
        """Yield the tokens of each document."""
        for begin, end in pairwise(self.bounds.tolist()):
            yield Tokens(*self.flat[begin:end].T)


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust tokenizer inside. Raises: UsageError when there is none, so no offsets either."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets; a fast one is needed."
        )
    if backend.truncation or backend.padding:  # left from an earlier call; documents are never cut
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend


def _whole(backend: Any, texts: list[str]) -> TokenBatch:
    """Tokenise texts as they are, in parallel threads."""
    flat, counts = _encoded(backend, texts)
    return TokenBatch(np.ascontiguousarray(flat.T, np.int32), np.concatenate([[0], np.cumsum(counts)]))


def _encoded(backend: Any, texts: list[str]) -> tuple[Int[np.ndarray, "3 tokens"], Int[np.ndarray, " texts"]]:
    """Return ids, starts and ends of all texts, one after the other, and the number of tokens of each."""
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
    flat = np.empty((3, counts.sum()), np.int64)
    flat[0] = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, flat.shape[1])
    offsets = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
    flat[1:] = np.fromiter(offsets, np.int64, 2 * flat.shape[1]).reshape(-1, 2).T
    return flat, counts


def _learnt(
    backend: Any, words: list[str], alone: int
) -> tuple[Int[np.ndarray, "3 tokens"], Int[np.ndarray, " words"]]:
    """Return what `_encoded` does, many words in one text, which is several times faster; not so the first `alone`."""
    groups = [words[i : i + WORDS_PER_TEXT] for i in range(alone, len(words), WORDS_PER_TEXT)]
    flat, counts = _encoded(backend, ["".join(group) for group in groups])
    sizes = np.fromiter(map(len, words[alone:]), np.int64, len(words) - alone)
    bounds = np.concatenate([[0], np.cumsum(sizes)])  # of the words, in all groups' texts
    group_sizes = np.add.reduceat(sizes, np.arange(0, len(sizes), WORDS_PER_TEXT)) if len(sizes) else sizes
    shift = np.repeat(np.cumsum(group_sizes) - group_sizes, counts)
    flat[1:] += shift
    word = np.searchsorted(bounds, flat[1], side="right") - 1
    if (np.diff(word) < 0).any() or (word >= len(sizes)).any() or (flat[2] > bounds[word + 1]).any():
        return _encoded(backend, words)
    flat[1:] -= bounds[word]
    first, first_counts = _encoded(backend, words[:alone])
    all_counts = np.concatenate([first_counts, np.bincount(word, minlength=len(sizes))])
    return np.concatenate([first, flat], axis=1), all_counts


class WordTokenizer:
    """Tokenises batches of documents through a memory of words."""

    def __init__(self, backend: Any, splits: bool):
        self.backend, self.splits = backend, splits
        if splits:
            self.memory, self.hasher = WordMemory(), Hasher(MAX_PIECE)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> WordTokenizer:
        return cls(fast_backend(tokenizer), splits_at_spaces(tokenizer))

    def tokenise(self, texts: list[str]) -> TokenBatch:
        """Return the tokens of each text, without special tokens."""
        if not self.splits:
            return _whole(self.backend, texts)
        parts = [self._piece(piece) for piece in _pieces(texts)]
        if len(parts) == 1:
            return parts[0]
        bounds = np.cumsum([0, *(size for part in parts for size in np.diff(part.bounds))])
        return TokenBatch(np.concatenate([part.flat for part in parts]), bounds)

    def _piece(self, texts: list[str]) -> TokenBatch:
        if len(texts) == 1 and len(texts[0]) > MAX_PIECE:
            return _whole(self.backend, texts)
        words, document = words_of(texts)
        rows = self._rows_of(words)
        if not self.memory.holds(words, rows):  # two words with one hash
            return _whole(self.backend, texts)
        flat, counts = self.memory.expand(rows)
        begin = np.cumsum([0, *map(len, texts)])  # of the documents, in all their characters
        flat[:, 1:] += np.repeat(words.begin - begin[document], counts).astype(np.int32)[:, None]
        n_tokens = np.bincount(document, weights=counts, minlength=len(texts)).astype(np.int64)
        return TokenBatch(flat, np.concatenate([[0], np.cumsum(n_tokens)]))

    def _rows_of(self, words: Words) -> Int[np.ndarray, " words"]:
        """Return each word's row in the memory; words that are new are tokenised first."""
        hashes = self.hasher(words)
        rows = self.memory.find(hashes)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            if not self._learn(words, hashes, missing):
                self.memory.forget()
                self._learn(words, hashes, np.arange(len(hashes)))
            rows = self.memory.find(hashes)
        return rows

    def _learn(self, words: Words, hashes: UInt64[np.ndarray, " words"], missing: Int[np.ndarray, " missing"]) -> bool:
        """Tokenise the words that are missing, each once; return False when the memory has no room for them."""
        _, once = np.unique(hashes[missing], return_index=True)
        missing = missing[once]
        text = words.characters.tobytes().decode("utf-32-le", "surrogatepass")
        begin, end = words.begin[missing].tolist(), words.end[missing].tolist()
        strings = [text[a:b] for a, b in zip(begin, end, strict=True)]
        # white space at the end of a word would run into the next one's space
        alone = words.first[missing] | _spaces()[words.characters[words.end[missing] - 1]]
        order = np.argsort(~alone, kind="stable")  # the few that must be tokenised alone come first
        missing = missing[order]
        new, counts = _learnt(self.backend, [strings[i] for i in order], int(alone.sum()))
        sizes = words.end[missing] - words.begin[missing]
        if not self.memory.has_room(len(counts), int(sizes.sum()), new.shape[1]):
            return False
        found = Words(words.characters, words.begin[missing], words.end[missing], words.first[missing])
        self.memory.add(found, hashes[missing], new, counts)
        return True


def _pieces(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in runs of at most MAX_PIECE characters."""
    run: list[str] = []
    size = 0
    for text in texts:
        if run and size + len(text) > MAX_PIECE:
            yield run
            run, size = [], 0
        run.append(text)
        size += len(text)
    yield run


@cache
def _spaces() -> Bool[np.ndarray, " characters"]:
    """Return for every character whether it is white space here."""
    table = np.zeros(sys.maxunicode + 1, bool)
    table[[match.start() for match in re.finditer(f"[{_SPACE}]", "".join(map(chr, range(sys.maxunicode + 1))))]] = True
    return table


def words_of(texts: list[str]) -> tuple[Words, Int[np.ndarray, " words"]]:
    """Return the words of all texts, each but a text's first with its space in front, and the text each is from.

    A word begins at a single space between two characters that are not white space, and at the beginning of a text.
    """
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    begin = (np.cumsum(sizes) - sizes)[sizes > 0]
    ink = ~_spaces()[characters]
    starts = characters == ord(" ")
    starts[1:] &= ink[:-1]
    starts[:-1] &= ink[1:]
    if len(begin):
        starts[begin[1:] - 1] = starts[-1] = False  # the space that ends a text
    first = np.zeros(len(starts), bool)
    starts[begin] = first[begin] = True
    places = np.flatnonzero(starts)
    ends = np.append(places[1:], len(characters)).astype(np.int64)[: len(places)]
    document = np.flatnonzero(sizes > 0)[np.cumsum(first[places]) - 1]
    return Words(characters, places, ends, first[places]), document


# --- does it hold? ---------------------------------------------------------------------------------------------------

_KINDS = (
    *("a", "casa", "È", "perché", "e\u0301", "7", "2024", ".", ",", "...", "'", "l'", "dell’", "«", "»", "-", "(", ")"),
    *(
        "🙂",
        "👩\u200d👩\u200d👧",
        "日本",
        "русский",
        "_",
        "@x",
        "a\nb",
        "x\r\n",
        "x\ty",
        "▁",
        "Ġ",
        "x▁",
        "\u0301",
        "'s",
        "\u00ad",
    ),
)
_TRUSTED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether no token of this tokenizer ever crosses the single space between two words."""
    if tokenizer not in _TRUSTED:
        _TRUSTED[tokenizer] = _no_greedy_added_tokens(tokenizer) and _probe(fast_backend(tokenizer))
    return _TRUSTED[tokenizer]


def _no_greedy_added_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether added tokens keep to themselves; some swallow the white space around them."""
    added = tokenizer.added_tokens_decoder.values()
    return not any(t.lstrip or t.rstrip or t.single_word or re.search(r"\s", t.content) for t in added)


def _probe(backend: Any) -> bool:
    """Return whether words one by one give what the whole gives, for every pair of kinds of characters."""
    if backend.pre_tokenizer is None or _whole(backend, [""]).bounds[-1]:
        return False
    special = [token["content"] for token in json.loads(backend.to_str()).get("added_tokens") or []][:4]
    kinds = [kind for kind in (*_KINDS, *special) if _BOUNDARY.split(f"x {kind} x") == ["x", kind, "x"]]
    texts = [f"{a} {b}" for a, b in product(kinds, kinds)]
    texts += [f"che {a} {b} è {a}{b} {b} già" for a, b in product(kinds, kinds)]
    texts.append(" ".join(f"{a}{b}" for a, b in product(kinds, kinds)))
    whole, by_words = _whole(backend, texts), WordTokenizer(backend, splits=True).tokenise(texts)
    return np.array_equal(whole.bounds, by_words.bounds) and np.array_equal(whole.flat, by_words.flat)

"""Tokens and character offsets of whole documents, fast: a word that was tokenised once is looked up afterwards.

A tokenizer that cuts text before it merges (Metaspace, byte-level and the like) never lets a token cross the single
space between two words, so a document's tokens are its words' tokens one after the other, and their offsets are moved
by where the word begins. Whether that holds is tested on the tokenizer itself, over every pair of kinds of characters,
before it is relied on; where it does not hold, documents are tokenised whole. The result is the same either way.
"""

from __future__ import annotations

import json
import re
from itertools import chain, product
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Int

from sae_italian.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WORDS = 1_000_000  # about 200 MB; when there are more, the memory is emptied
MAX_TOKENS = 8_000_000
WORDS_PER_TEXT = 128
_SPACE = r"\s\u200b-\u200f\u2028-\u202f\ufeff"
_BOUNDARY = re.compile(f"(?<=[^{_SPACE}]) (?=[^{_SPACE}])")
_ODD_SPACE = re.compile(rf"[{_SPACE}] | [{_SPACE}]|\A | \Z")
_JOINS = re.compile(f" [^{_SPACE}](?:.*[^{_SPACE}])?", re.DOTALL)


class Tokens(NamedTuple):
    """The tokens of one document; offsets are characters of its text, [start, end)."""

    ids: Int[np.ndarray, " tokens"]
    start: Int[np.ndarray, " tokens"]
    end: Int[np.ndarray, " tokens"]


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


def _whole(backend: Any, texts: list[str]) -> list[Tokens]:
    """Tokenise texts as they are, in parallel threads."""
    return _cut(*_encoded(backend, texts))


def _cut(flat: Int[np.ndarray, "3 tokens"], counts: Int[np.ndarray, " texts"]) -> list[Tokens]:
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return [Tokens(*flat[:, a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _encoded(backend: Any, texts: list[str]) -> tuple[Int[np.ndarray, "3 tokens"], Int[np.ndarray, " texts"]]:
    """Return ids, starts and ends of all texts, one after the other, and the number of tokens of each."""
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
    flat = np.empty((3, counts.sum()), np.int64)
    flat[0] = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, flat.shape[1])
    offsets = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
    flat[1:] = np.fromiter(offsets, np.int64, 2 * flat.shape[1]).reshape(-1, 2).T
    return flat, counts


def _learnt(backend: Any, words: list[str]) -> tuple[Int[np.ndarray, "3 tokens"], Int[np.ndarray, " words"]]:
    """Return what `_encoded` does, for words sorted by `_joins`: many in one text, which is several times faster."""
    alone = sum(not _joins(word) for word in words)
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


def _joins(word: str) -> bool:
    """Return whether a word begins with its space and has no other white space at its edges."""
    return _JOINS.fullmatch(word) is not None


class WordTokenizer:
    """Tokenises batches of documents through a memory of words."""

    def __init__(self, backend: Any, splits: bool):
        self.backend, self.splits = backend, splits
        self._forget()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> WordTokenizer:
        return cls(fast_backend(tokenizer), splits_at_spaces(tokenizer))

    def _forget(self) -> None:
        self.rows: dict[str, int] = {}  # " word", or "word" at the beginning of a text
        self.n_tokens = 0
        self.begin = np.zeros(2**14, np.int64)  # [words + 1 and room]: where a word's tokens begin
        self.flat = np.empty((3, 2**16), np.int64)  # ids, starts, ends within the word

    def tokenise(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each text, without special tokens."""
        if not self.splits:
            return _whole(self.backend, texts)
        words, lengths = _words_of(texts)
        rows = self._rows_of(words)
        counts = self.begin[rows + 1] - self.begin[rows]  # [words]
        total = np.cumsum(counts)
        index = np.arange(total[-1] if len(total) else 0) + np.repeat(self.begin[rows] - (total - counts), counts)
        ids, start, end = self.flat[:, index]
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        n_words = np.asarray(lengths, np.int64)
        first_word = np.cumsum(n_words) - n_words
        places = np.cumsum(sizes) - sizes  # in all texts, one after the other
        places -= np.repeat(places[np.minimum(first_word, max(len(places) - 1, 0))] if len(places) else [], n_words)
        shift = np.repeat(places, counts)
        start, end = start + shift, end + shift
        bounds = np.concatenate([[0], total])[np.concatenate([[0], np.cumsum(n_words)])]
        pairs = zip(bounds[:-1], bounds[1:], strict=True)
        documents = [Tokens(ids[a:b], start[a:b], end[a:b]) for a, b in pairs]
        if len(self.rows) > MAX_WORDS or self.n_tokens > MAX_TOKENS:
            self._forget()
        return documents

    def _rows_of(self, words: list[str]) -> Int[np.ndarray, " words"]:
        """Return each word's place in the memory; words that are new are tokenised first."""
        try:
            return np.fromiter(map(self.rows.__getitem__, words), np.int64, len(words))
        except KeyError:
            self._learn([word for word in dict.fromkeys(words) if word not in self.rows])
            return np.fromiter(map(self.rows.__getitem__, words), np.int64, len(words))

    def _learn(self, words: list[str]) -> None:
        words.sort(key=_joins)  # the few that must be tokenised alone come first
        new, counts = _learnt(self.backend, words)
        known = len(self.rows)
        self.rows.update(zip(words, range(known, known + len(words)), strict=True))
        while self.n_tokens + new.shape[1] > self.flat.shape[1]:
            self.flat = np.concatenate([self.flat, np.empty_like(self.flat)], axis=1)
        self.flat[:, self.n_tokens : self.n_tokens + new.shape[1]] = new
        while known + len(words) + 1 > len(self.begin):
            self.begin = np.concatenate([self.begin, np.empty_like(self.begin)])
        self.begin[known + 1 : known + len(words) + 1] = self.n_tokens + np.cumsum(counts)
        self.n_tokens += new.shape[1]


def _words_of(texts: list[str]) -> tuple[list[str], list[int]]:
    """Return the words of all texts, each but a text's first with its space in front, and their number in each text."""
    words: list[str] = []
    lengths: list[int] = []
    for text in texts:
        parts = text.split(" ") if _ODD_SPACE.search(text) is None else _BOUNDARY.split(text)
        words.append(parts[0])
        words += [" " + part for part in parts[1:]]
        lengths.append(len(parts))
    return words, lengths


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
    if backend.pre_tokenizer is None:
        return False
    special = [token["content"] for token in json.loads(backend.to_str()).get("added_tokens") or []][:4]
    kinds = [kind for kind in (*_KINDS, *special) if _BOUNDARY.split(f"x {kind} x") == ["x", kind, "x"]]
    texts = [f"{a} {b}" for a, b in product(kinds, kinds)]
    texts += [f"che {a} {b} è {a}{b} {b} già" for a, b in product(kinds, kinds)]
    texts.append(" ".join(f"{a}{b}" for a, b in product(kinds, kinds)))
    words, lengths = _words_of(texts)
    unique = sorted(dict.fromkeys(words), key=_joins)
    learnt = dict(zip(unique, _cut(*_learnt(backend, unique)), strict=True))
    position = 0
    for text, whole, n in zip(texts, _whole(backend, texts), lengths, strict=True):
        pieces = words[position : position + n]
        position += n
        if not _same(whole, pieces, learnt, text):
            return False
    return True


def _same(whole: Tokens, pieces: list[str], learnt: dict[str, Tokens], text: str) -> bool:
    shift, parts = 0, []
    for piece in pieces:
        tokens = learnt[piece]
        parts.append(np.stack([tokens.ids, tokens.start + shift, tokens.end + shift]))
        shift += len(piece)
    return shift == len(text) and np.array_equal(np.concatenate(parts, axis=1), np.stack(whole))

"""A memory of words and their tokens in flat arrays: thousands of words are looked up in a few passes.

Words are found by a 64-bit hash of their characters in a table with open addressing, then compared character by
character with what is stored, so a collision of hashes costs time and never a token. The memory has a fixed size; when
it is full it is emptied, in place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt32, UInt64

MAX_WORDS = 2**20
MAX_CHARACTERS = 2**24  # of the words remembered
MAX_TOKENS = 2**23
_SLOTS = 2**22  # a quarter full at most: few words need a second look
_BASE, _MIX, _LENGTH, _FIRST = (
    np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB)
)


class Words(NamedTuple):
    """The words of some text, which they cover without gaps."""

    characters: UInt32[np.ndarray, " characters"]
    begin: Int[np.ndarray, " words"]
    end: Int[np.ndarray, " words"]
    first: Bool[np.ndarray, " words"]  # at the beginning of a document; tokenizers may treat those in another way


class WordMemory:
    """Rows of words: `find` them, `add` new ones with their tokens, `expand` rows into tokens."""

    def __init__(self) -> None:
        # np.empty takes address space, and memory only as far as it is written
        self.table = np.empty(_SLOTS, np.int32)
        self.hashes = np.empty(MAX_WORDS + 1, np.uint64)
        self.first = np.empty(MAX_WORDS + 1, bool)
        self.character_begin = np.zeros(MAX_WORDS + 2, np.int64)
        self.token_begin = np.zeros(MAX_WORDS + 2, np.int64)
        self.characters = np.empty(MAX_CHARACTERS, np.uint32)
        self.tokens = np.empty((MAX_TOKENS, 3), np.int32)  # id, start and end within the word
        self.forget()

    def forget(self) -> None:
        self.table.fill(-1)
        self.n_words = 0

    def has_room(self, n_words: int, n_characters: int, n_tokens: int) -> bool:
        n = self.n_words
        return (
            n + n_words <= MAX_WORDS
            and self.character_begin[n] + n_characters <= MAX_CHARACTERS
            and self.token_begin[n] + n_tokens <= MAX_TOKENS
        )

    def find(self, hashes: UInt64[np.ndarray, " words"]) -> Int32[np.ndarray, " words"]:
        """Return the row of each hash, -1 where there is none."""
        slot = (hashes & np.uint64(_SLOTS - 1)).astype(np.int64)
        row = self.table[slot]
        other = np.flatnonzero((row >= 0) & (self.hashes[row] != hashes))
        while len(other):
            slot[other] = (slot[other] + 1) & (_SLOTS - 1)
            found = self.table[slot[other]]
            row[other] = found
            other = other[(found >= 0) & (self.hashes[found] != hashes[other])]
        return row

    def add(
        self,
        words: Words,
        hashes: UInt64[np.ndarray, " words"],
        tokens: Int[np.ndarray, "3 tokens"],
        counts: Int[np.ndarray, " words"],
    ) -> None:
        """Remember words with different hashes, none of them known, and their tokens; there must be room."""
        known, n = self.n_words, self.n_words + len(counts)
        sizes = words.end - words.begin
        self.hashes[known:n], self.first[known:n] = hashes, words.first
        self.character_begin[known + 1 : n + 1] = self.character_begin[known] + np.cumsum(sizes)
        self.token_begin[known + 1 : n + 1] = self.token_begin[known] + np.cumsum(counts)
        self.characters[self.character_begin[known] : self.character_begin[n]] = words.characters[
            ranges(words.begin, sizes)
        ]
        self.tokens[self.token_begin[known] : self.token_begin[n]] = tokens.T
        self.n_words = n
        self._enter(hashes, np.arange(known, n, dtype=np.int32))

    def _enter(self, hashes: UInt64[np.ndarray, " words"], rows: Int32[np.ndarray, " words"]) -> None:
        slot = (hashes & np.uint64(_SLOTS - 1)).astype(np.int64)
        while len(rows):
            free = self.table[slot] < 0
            self.table[slot[free]] = rows[free]  # of several that want the same slot, one stays
            left = self.table[slot] != rows
            slot, rows = (slot[left] + 1) & (_SLOTS - 1), rows[left]

    def holds(self, words: Words, rows: Int32[np.ndarray, " words"]) -> bool:
        """Return whether each row is really its word, character by character."""
        sizes = words.end - words.begin
        stored = self.character_begin[rows]
        if not (
            np.array_equal(self.character_begin[rows + 1] - stored, sizes)
            and np.array_equal(self.first[rows], words.first)
        ):
            return False
        return np.array_equal(self.characters[ranges(stored, sizes)], words.characters)

    def expand(
        self, rows: Int32[np.ndarray, " words"]
    ) -> tuple[Int32[np.ndarray, "tokens 3"], Int[np.ndarray, " words"]]:
        """Return the tokens of all words, one after the other, and how many each has."""
        begin = self.token_begin[rows]
        counts = self.token_begin[rows + 1] - begin
        return self.tokens.take(ranges(begin, counts), axis=0), counts


def ranges(begin: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Return begin[0], begin[0] + 1, ... (sizes[0] of them), then those of begin[1], and so on."""
    before = np.cumsum(sizes) - sizes
    index = np.repeat(begin - before, sizes)
    index += np.arange(len(index))
    return index


class Hasher:
    """Hashes all words of a text at once: differences of one running sum, each moved to the word's beginning.

    The hash of a word is sum((c_i + 1) * b^i) modulo 2^64, i counted from its beginning, mixed with its length.
    """

    def __init__(self, longest: int):
        ones = np.ones(longest, np.uint64)
        ones[1:] = _BASE
        self.power = np.cumprod(ones)
        ones[1:] = pow(int(_BASE), -1, 2**64)
        self.inverse = np.cumprod(ones)

    def __call__(self, words: Words) -> UInt64[np.ndarray, " words"]:
        n = len(words.characters)
        running = np.zeros(n + 1, np.uint64)
        np.cumsum((words.characters + np.uint64(1)) * self.power[:n], out=running[1:])
        hashes = (running[words.end] - running[words.begin]) * self.inverse[words.begin]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX
        hashes ^= (words.end - words.begin).astype(np.uint64) * _LENGTH
        hashes[words.first] ^= _FIRST
        hashes ^= hashes >> np.uint64(29)
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(32)
        return hashes

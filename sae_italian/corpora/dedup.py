"""Duplicates in a stream of any length, in memory that does not grow.

Keys go into Bloom filters of fixed size: two generations, each for `capacity` documents; when the newer is full the older
is forgotten. So a duplicate is found if it comes within `capacity` documents of its original (twice that at best), and
one document in a million is taken for a duplicate though it is none. Memory for a capacity of 1,000,000 documents: 7 MiB
for exact duplicates, 96 MiB for near ones.

Near duplicates: MinHash (datasketch) of 5-word shingles, 14 bands of 8 hashes as in FineWeb: two documents that share 75 %
of their shingles are found with probability 0.77, 85 % with 0.99, 50 % with 0.05.
Source: Broder 1997; Penedo et al. 2024, arXiv:2406.17557, appendix E.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from sae_italian.base.errors import UsageError

BANDS, HASHES_PER_BAND, SHINGLE_WORDS = 14, 8, 5
FALSE_POSITIVES = 1e-6
_WORD = re.compile(r"\w+")


class BloomFilter:
    """A set of 64-bit keys that forgets: `capacity` keys in each of two generations."""

    def __init__(self, capacity: int, false_positives: float = FALSE_POSITIVES):
        self.capacity = capacity
        self.n_hashes = max(1, round(-math.log2(false_positives)))
        n_bits = math.ceil(-capacity * math.log(false_positives) / math.log(2) ** 2)
        self.n_bytes = max(8, -(-n_bits // 8))
        self.generations = [np.zeros(self.n_bytes, np.uint8) for _ in range(2)]  # newer first
        self.n_keys = 0  # in the newer one

    def _places(self, keys: UInt64[np.ndarray, " keys"]) -> UInt64[np.ndarray, "keys hashes"]:
        """Double hashing (Kirsch and Mitzenmacher 2006): bit i of a key is h1 + i * h2."""
        first, second = keys & np.uint64(0xFFFFFFFF), (keys >> np.uint64(32)) | np.uint64(1)
        steps = np.arange(self.n_hashes, dtype=np.uint64)
        return (first[:, None] * np.uint64(0x9E3779B1) + steps * second[:, None]) % np.uint64(8 * self.n_bytes)

    def seen(self, keys: UInt64[np.ndarray, " keys"]) -> bool:
        """Return whether any of the keys was there, and put all of them in."""
        places = self._places(keys)
        at, bit = places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
        found = any(((generation[at] & bit) != 0).all(axis=1).any() for generation in self.generations)
        if self.n_keys + len(keys) > self.capacity:
            self.generations = [np.zeros(self.n_bytes, np.uint8), self.generations[0]]
            self.n_keys = 0
        np.bitwise_or.at(self.generations[0], at.ravel(), bit.ravel())
        self.n_keys += len(keys)
        return found


def _key(text: str) -> UInt64[np.ndarray, " 1"]:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, np.uint64)


class ExactDuplicates:
    """Texts that are the same once white space is one space."""

    def __init__(self, capacity: int):
        self.bloom = BloomFilter(capacity)

    def seen(self, text: str) -> bool:
        return self.bloom.seen(_key(" ".join(text.split())))


class NearDuplicates:
    """Texts that share most of their five-word shingles with one that came before."""

    def __init__(self, capacity: int):
        try:
            from datasketch import MinHash
        except ImportError as error:
            raise UsageError("near-duplicate removal needs datasketch. Install it: pip install datasketch.") from error
        self._minhash = MinHash
        self._template = MinHash(BANDS * HASHES_PER_BAND, seed=1, hashfunc=int, scheme="affine32")
        self.bloom = BloomFilter(capacity * BANDS)

    def seen(self, text: str) -> bool:
        shingles = _shingles(text)
        sketch = self._template.copy()
        sketch.update_batch(shingles.tolist())
        bands = sketch.hashvalues.astype(np.uint64).reshape(BANDS, HASHES_PER_BAND)
        return self.bloom.seen(_mixed(bands, np.arange(BANDS, dtype=np.uint64)))


def _shingles(text: str) -> UInt64[np.ndarray, " shingles"]:
    """Return the hashes (32 bits) of the runs of five words, lower case, without punctuation; of all words if fewer."""
    import zlib

    words = _WORD.findall(text.lower())
    hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    width = min(SHINGLE_WORDS, max(len(words), 1))
    if len(words) == 0:
        return _key(text) & np.uint64(0xFFFFFFFF)
    runs = np.lib.stride_tricks.sliding_window_view(hashes, width)
    return np.unique(_mixed(runs, np.zeros(len(runs), np.uint64)) & np.uint64(0xFFFFFFFF))


def _mixed(rows: UInt64[np.ndarray, "rows values"], salt: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """Return one 64-bit hash of each row of numbers, in the order they stand."""
    state = salt + np.uint64(0x243F6A8885A308D3)
    for column in rows.T:
        state = (state ^ column) * np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    return state ^ (state >> np.uint64(32))


def save(filters: dict[str, BloomFilter], path: Path) -> None:
    arrays: dict[str, Any] = {}
    for name, bloom in filters.items():
        arrays |= {f"{name}.0": bloom.generations[0], f"{name}.1": bloom.generations[1]}
        arrays[f"{name}.n"] = np.array(bloom.n_keys)
    with path.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def load(filters: dict[str, BloomFilter], path: Path) -> None:
    with np.load(path) as arrays:
        for name, bloom in filters.items():
            bloom.generations = [arrays[f"{name}.0"], arrays[f"{name}.1"]]
            bloom.n_keys = int(arrays[f"{name}.n"])

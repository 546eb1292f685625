"""How a corpus is read, and what a document must be to be kept: long enough, Italian, not seen before.

Every refusal has a name.

Duplicates are found in a stream of any length, in memory that does not grow: keys go into Bloom filters of fixed size,
two generations of `capacity` documents each; when the newer is full the older is forgotten. So a duplicate is found if
it comes within `capacity` documents of its original, and one document in a million is taken for one though it is none.
Memory for a capacity of 1,000,000 documents: 7 MiB for exact duplicates, 96 MiB for near ones.

Near duplicates: MinHash (datasketch) of 5-word shingles, 14 bands of 8 hashes as in FineWeb: two documents that share 75 %
of their shingles are found with probability 0.77, 85 % with 0.99, 50 % with 0.05. datasketch's own MinHashLSHBloom would
need a compiled package that few machines have; its MinHashLSH grows by some kilobytes a document.
Source: Broder 1997; Penedo et al. 2024, arXiv:2406.17557, appendix E.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt64

from sae_italian.base.errors import check_known, check_whole

LANGUAGE_CHARS = 2000  # of a document's beginning, enough to tell its language
MIN_ITALIAN_CHARS = 20  # below, no detector knows; kept
BANDS, HASHES_PER_BAND, SHINGLE_WORDS = 14, 8, 5
FALSE_POSITIVES = 1e-6
FILTERS = ("min_chars", "italian", "duplicates", "near_duplicates", "capacity")  # of a reader's settings
_WORD = re.compile(r"\w+")
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a corpus is read; all of it decides which documents come, and in which order.

    The default drops nothing but documents without text.
    """

    min_chars: int = 0
    """The shortest document, in characters."""
    italian: bool = False
    """Drop documents in other languages."""
    duplicates: bool = False
    """Drop a text that came before, whatever its white space."""
    near_duplicates: bool = False
    """Drop a text that is nearly one that came before."""
    capacity: int = 1_000_000
    """Documents that duplicate removal remembers, at the least."""
    split: Split = "all"
    """Documents of training, the held-out 5 %, or all."""
    seed: int = 0
    """Seed of the shards' order, of a mixture's draws, and of micro-italiano."""
    text_column: str = "text"
    """Column that holds the text."""
    shuffle_shards: bool | None = None
    """Order the shards by seed; None: what the catalogue says, for a local corpus by name."""
    on_broken: Literal["refuse", "skip"] = "refuse"
    """A broken line or shard stops the reading with a message, or is counted and skipped."""
    max_chars: int = 20_000_000  # a long novel has 1.5 million; more is a broken file
    """The longest document, in characters."""

    def __post_init__(self) -> None:
        check_whole(0, min_chars=self.min_chars)
        check_whole(1, capacity=self.capacity, max_chars=self.max_chars)
        check_known("split", get_args(Split), self.split)
        check_known("on_broken", ("refuse", "skip"), self.on_broken)


class BloomFilter:
    """A set of 64-bit keys that forgets: `capacity` keys in each of two generations."""

    def __init__(self, capacity: int):
        self.capacity, self.n_keys = capacity, 0  # keys in the newer generation
        self.n_hashes = round(-math.log2(FALSE_POSITIVES))
        self.n_bytes = max(8, math.ceil(-capacity * math.log(FALSE_POSITIVES) / math.log(2) ** 2 / 8))
        self.generations = [np.zeros(self.n_bytes, np.uint8) for _ in range(2)]  # newer first

    def seen(self, keys: UInt64[np.ndarray, " keys"]) -> bool:
        """Return whether any of the keys was there, and put all of them in.

        Bit i of a key is h1 + i * h2 (Kirsch and Mitzenmacher 2006), from the two halves of the key.
        """
        first, second = keys & np.uint64(0xFFFFFFFF), (keys >> np.uint64(32)) | np.uint64(1)
        steps = np.arange(self.n_hashes, dtype=np.uint64)
        places = (first[:, None] * np.uint64(0x9E3779B1) + steps * second[:, None]) % np.uint64(8 * self.n_bytes)
        at, bit = places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
        found = any(((generation[at] & bit) != 0).all(axis=1).any() for generation in self.generations)
        if self.n_keys + len(keys) > self.capacity:
            self.generations, self.n_keys = [np.zeros(self.n_bytes, np.uint8), self.generations[0]], 0
        np.bitwise_or.at(self.generations[0], at.ravel(), bit.ravel())
        self.n_keys += len(keys)
        return found


def _keys(parts: Iterable[bytes]) -> UInt64[np.ndarray, " parts"]:
    """Return a 64-bit hash of each part and its place."""
    hashes = (blake2b(b"%d/" % i + part, digest_size=8).digest() for i, part in enumerate(parts))
    return np.frombuffer(b"".join(hashes), np.uint64)


def near_keys(text: str) -> UInt64[np.ndarray, " bands"]:
    """Return a key for each band of a text's MinHash; texts that share most of their shingles share some key."""
    from datasketch import MinHash

    words = _WORD.findall(text.lower()) or [text]
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    sketch = MinHash(BANDS * HASHES_PER_BAND, seed=1, scheme="affine32")
    shingles = (" ".join(words[start : start + SHINGLE_WORDS]) for start in starts)
    sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
    return _keys(band.tobytes() for band in sketch.hashvalues.reshape(BANDS, HASHES_PER_BAND))


class Sieve:
    """A reader's filters at work; `blooms` are what it has seen, for each kind of duplicate that is asked for."""

    def __init__(self, reader: Reader):
        self.reader = reader
        sizes = {"exact": reader.duplicates, "near": BANDS * reader.near_duplicates}
        self.blooms = {name: BloomFilter(size * reader.capacity) for name, size in sizes.items() if size}

    def reason_against(self, text: str) -> str | None:
        """Return why a document is dropped, None when it is kept. The cheap questions come first."""
        if len(text) < self.reader.min_chars:
            return "too_short"
        if self.reader.italian and not is_italian(text):
            return "not_italian"
        # whatever white space is between the words
        if self.reader.duplicates and self.blooms["exact"].seen(_keys([" ".join(text.split()).encode()])):
            return "duplicate"
        if self.reader.near_duplicates and self.blooms["near"].seen(near_keys(text)):
            return "near_duplicate"
        return None

    def save(self, path: Path) -> None:
        """Write what was seen."""
        arrays = {}
        for name, bloom in self.blooms.items():
            arrays |= {f"{name}.{i}": generation for i, generation in enumerate(bloom.generations)}
            arrays[f"{name}.n"] = np.array(bloom.n_keys)
        with path.open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    def load(self, path: Path) -> None:
        """Remember what was saved."""
        with np.load(path) as arrays:
            for name, bloom in self.blooms.items():
                bloom.generations = [arrays[f"{name}.0"], arrays[f"{name}.1"]]
                bloom.n_keys = int(arrays[f"{name}.n"])


@cache
def identifier(*among: str) -> Any:
    """Return py3langid's identifier of 97 languages, or of some, whose probabilities then add to 1."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # the model is in the package

    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=bool(among))
    found.set_languages(among or None)
    return found


def language_of(text: str) -> str:
    """Return the language of a text's beginning, two letters (py3langid, 97 languages)."""
    return identifier().classify(text[:LANGUAGE_CHARS])[0]


def is_italian(text: str) -> bool:
    """Return whether a document is Italian; one too short to tell is."""
    return len(text) < MIN_ITALIAN_CHARS or language_of(text) == "it"

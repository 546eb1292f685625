"""The division of a cache's documents into train, val and test, the same for everything that reads the cache."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from jaxtyping import Int

from sae_italian.cache.read import FeatureCache

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SHARES = (0.5, 0.2, 0.3)


def document_parts(cache: FeatureCache, seed: int = 0) -> Int[np.ndarray, " documents"]:
    """Return 0, 1 or 2 (train, val, test) per document, by a seeded hash of its text: copies fall on the same side."""
    bounds = np.cumsum(SHARES)[:-1]
    salt = seed.to_bytes(8, "little")
    draws = np.empty(cache.n_documents)
    for index in range(cache.n_documents):
        text = cache.document(index).text.encode("utf-8", "surrogatepass")
        draws[index] = int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=salt).digest(), "big") / 2**64
    return np.searchsorted(bounds, draws, side="right").astype(np.int8)

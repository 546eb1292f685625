"""A stand-in of the sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def letters(texts: Sequence[str], name: str) -> np.ndarray:
    """Return unit vectors of how often each letter is in a text."""
    counts = np.array(
        [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float
    )
    return (counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)).astype(np.float32)

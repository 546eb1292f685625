"""Intervals over documents for many scores of one latent at once.

The bootstrap weighs documents by independent Poisson(1) counts, the same for every score, so that two scores on the same
windows are resampled together: the interval of their difference is that of a paired comparison.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from sae_italian.base.statistics import Estimate

N_SAMPLES = 200


@lru_cache(maxsize=4)
def _weights(n_documents: int) -> Float[np.ndarray, "samples documents"]:
    return np.random.default_rng(0).poisson(1.0, (n_documents, N_SAMPLES)).T.astype(np.float64)


class ResampledDocuments:
    """The documents of all examples of one latent, numbered, with how often each is drawn in each resample."""

    def __init__(self, *docs: Int[np.ndarray, " n"]):
        self.known = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *docs]))
        n = len(self.known)
        size = max(1 << max(n - 1, 0).bit_length(), 64)  # few sizes, so that the draws are made few times
        self.weights = np.concatenate([np.ones((1, n)), _weights(size)[:, :n]])  # the first row is the data as it is

    def sums(
        self, docs: Int[np.ndarray, " n"], values: Float[np.ndarray, "quantities n"]
    ) -> Float[np.ndarray, "quantities documents"]:
        """Return the sums of several quantities over each document."""
        n = len(self.known)
        cell = (np.arange(len(values)) * n)[:, None] + self.index(docs)
        return np.bincount(cell.ravel(), weights=values.ravel(), minlength=len(values) * n).reshape(len(values), n)

    def index(self, docs: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.searchsorted(self.known, docs)


def estimates(table: Float[np.ndarray, "quantities samples"]) -> list[Estimate]:
    """Return each row's first entry as the value, and the 2.5 and 97.5 % points of the other finite ones."""
    rest = np.sort(table[:, 1:], axis=1)  # NaN last
    n = np.isfinite(rest).sum(axis=1)
    ends = []
    for share in (0.025, 0.975):
        at = share * np.maximum(n - 1, 0)
        low = at.astype(np.int64)
        rows = np.arange(len(rest))
        below, above = rest[rows, low], rest[rows, np.minimum(low + 1, np.maximum(n - 1, 0))]
        ends.append(np.where(n > 0, below + (at - low) * (above - below), np.nan))
    return [Estimate(float(v), float(lo), float(hi)) for v, lo, hi in zip(table[:, 0], *ends, strict=True)]

"""Statistics of one range of latents, all at once: no step goes latent by latent."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

from sae_italian.cache.layout import LatentRange
from sae_italian.corpora.packing import NO_DOCUMENT

TOP_TOKENS = 10
N_BINS = 20
N_PLACES = 10
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Entries(NamedTuple):
    """The non-zeros of a range, latent after latent: `row` is latent - first."""

    indptr: Int[np.ndarray, " latents+1"]
    row: Int[np.ndarray, " nnz"]
    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]

    @property
    def count(self) -> Int[np.ndarray, " latents"]:
        return np.diff(self.indptr)


def entries_of(cache: Any, item: LatentRange) -> Entries:
    arrays = cache.map_file(item.file)
    indptr = arrays["indptr"].astype(np.int64)
    value = arrays["value"].astype(np.float32)
    if "wide_at" in arrays:
        value[arrays["wide_at"].astype(np.int64)] = arrays["wide_value"]
    row = np.repeat(np.arange(len(indptr) - 1, dtype=np.int32), np.diff(indptr))
    return Entries(indptr, row, arrays["position"].astype(np.int64), value)


def range_statistics(cache: Any, item: LatentRange, corpus: Any) -> dict[str, Any]:
    """Return the columns that need the activations, as Arrow arrays (see `write_statistics` for what they mean)."""
    entries = entries_of(cache, item)
    n, count = len(entries.count), entries.count
    largest = np.zeros(n, dtype=np.float32)
    np.maximum.at(largest, entries.row, entries.value)
    total = _sums(entries.row, entries.value, n)
    columns: dict[str, Any] = {
        "count": count,
        "density": count / corpus.n_counted,
        "max": largest.astype(np.float64),
        "mean": total / np.maximum(count, 1),
        "quantiles": _quantiles(entries),
        "histogram": _histogram(entries, largest.astype(np.float64)),
        **_places(entries, corpus, cache.manifest.context_size),
        **_tokens(entries, corpus, total),
    }
    return {name: column if not isinstance(column, np.ndarray) else arrow(column) for name, column in columns.items()}


def arrow(array: np.ndarray, offsets: np.ndarray | None = None) -> Any:
    """Return a column as an Arrow array: numbers, lists of equal length [rows, n], or flat lists cut at `offsets`."""
    import pyarrow as pa

    if array.ndim == 2:
        offsets = np.arange(len(array) + 1) * array.shape[1]
    if offsets is None:
        return pa.array(array)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(array.ravel()))


def _sums(row: np.ndarray, weights: np.ndarray, n: int) -> Float[np.ndarray, " n"]:
    """Return the sum of the weights of each row; numpy's own counts in integers where there is nothing to sum."""
    return np.bincount(row, weights=weights, minlength=n).astype(np.float64)


def _quantiles(entries: Entries) -> Float[np.ndarray, "latents quantiles"]:
    """Return the quantiles by linear interpolation, as numpy's; 0 for a latent that never fires."""
    # positive floats sort as their bits do, so one sort of integers sorts every latent's values
    key = (entries.row.astype(np.uint64) << np.uint64(32)) | entries.value.view(np.uint32)
    key.sort()
    value = (key & np.uint64(2**32 - 1)).astype(np.uint32).view(np.float32)
    place = (entries.count[:, None] - 1).clip(min=0) * np.array(QUANTILES)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, (entries.count[:, None] - 1).clip(min=0))
    padded = np.append(value, np.float32(0)).astype(np.float64)
    first = np.where(entries.count > 0, entries.indptr[:-1], len(value))[:, None]
    a, b = padded[np.minimum(first + low, len(value))], padded[np.minimum(first + high, len(value))]
    return a + (b - a) * (place - low)


def _histogram(entries: Entries, largest: Float[np.ndarray, " latents"]) -> Int[np.ndarray, "latents bins"]:
    """Return counts in equal bins from 0 to each latent's maximum, with numpy.histogram's edges."""
    value, top = entries.value.astype(np.float64), largest[entries.row]
    index = np.minimum((value / top * N_BINS).astype(np.int64), N_BINS - 1)
    step = top / N_BINS
    index -= value < index * step
    index += (value >= (index + 1) * step) & (index < N_BINS - 1)
    counts = np.bincount(entries.row.astype(np.int64) * N_BINS + index, minlength=len(largest) * N_BINS)
    return counts.reshape(-1, N_BINS)


def _places(entries: Entries, corpus: Any, context_size: int) -> dict[str, np.ndarray]:
    """Return how many documents and windows hold each latent, and where in the window it fires."""
    n, row, position = len(entries.count), entries.row, entries.position
    new_latent = np.diff(row, prepend=-1) != 0
    doc = corpus.doc[position]
    window, place = np.divmod(position, context_size)
    profile = np.bincount(row.astype(np.int64) * N_PLACES + place * N_PLACES // context_size, minlength=n * N_PLACES)
    first = (place == 0) | (corpus.doc[np.maximum(position - 1, 0)] == NO_DOCUMENT)
    at_least_one = np.maximum(entries.count, 1)
    return {
        "n_documents": np.bincount(row[new_latent | (np.diff(doc, prepend=doc[:1]) != 0)], minlength=n),
        "n_windows": np.bincount(row[new_latent | (np.diff(window, prepend=window[:1]) != 0)], minlength=n),
        "position_profile": profile.reshape(n, N_PLACES) / at_least_one[:, None],
        "first_token_share": np.bincount(row[first], minlength=n) / at_least_one,
    }


def _tokens(entries: Entries, corpus: Any, total: Float[np.ndarray, " latents"]) -> dict[str, Any]:
    """Return the tokens each latent fires on most, by share of its activation mass, and the entropy of all shares."""
    n = len(entries.count)
    tokens = corpus.tokens[entries.position]
    shape = (n, int(tokens.max(initial=0)) + 1)
    # two counting sorts put each latent's entries in order of token, and of position within a token
    by_row = csr_matrix((entries.value, tokens.astype(np.int32), entries.indptr), shape=shape)
    by_token = by_row.tocsc().tocsr()
    token, value = by_token.indices, by_token.data
    group = np.cumsum((np.diff(token, prepend=-1) != 0) | (np.diff(entries.row, prepend=-1) != 0)) - 1
    first = np.flatnonzero(np.diff(group, prepend=-1))
    owner, token = entries.row[first], token[first].astype(np.int64)
    share = _sums(group, value, len(first)) / total[owner]
    order = np.lexsort((token, -share, owner))
    owner, token, share = owner[order], token[order], share[order]
    n_tokens = np.bincount(owner, minlength=n)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(n_tokens) - n_tokens, n_tokens)
    top = rank < TOP_TOKENS
    offsets = np.concatenate([[0], np.cumsum(np.minimum(n_tokens, TOP_TOKENS))])
    text_share = corpus.token_counts[token[top]] / corpus.n_counted
    return {
        "token_ids": arrow(token[top], offsets),
        "token_shares": arrow(share[top], offsets),
        "token_lifts": arrow(share[top] / text_share, offsets),
        "token_entropy": _sums(owner, -share * np.log(share), n),
    }

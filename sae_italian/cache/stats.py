"""Statistics of every latent in one pass over the latent-major files, written to stats.parquet.

A range of latents is done at once: no step goes latent by latent. What stands near a latent is of them too: latents that
fire on the same tokens, decoder directions, and the tokens these promote.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, sha256_file
from sae_italian.cache.layout import STATS, Csr, Manifest, places
from sae_italian.cache.read import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import logit_lens

N_BINS = 20
N_PLACES = 10
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
TOP = 10  # of each kind that are listed
SAMPLE = 2048  # activations looked at, evenly spaced, of a latent that has more
GATHERED = 2**22  # about as many entries are gathered at a time
BLOCK_BYTES = 2**27  # of a product with the decoder


def write_statistics(folder: Path, manifest: Manifest, sae: Any, model: Any) -> None:
    """Write one row per latent, and the file's checksum into the manifest.

    count, density (share of non-special tokens with a non-zero activation), max, mean (over non-zero activations),
    quantiles (0.1, .25, .5, .75, .9 of non-zero activations), histogram (20 equal bins from 0 to max), n_documents,
    n_windows, token_ids and token_shares (the 10 tokens it fires on most, by share of activation mass), token_lifts
    (that share over the token's share of the text), token_entropy (nats, of all shares), position_profile (share of its
    activations in each tenth of the window), first_token_share (of its activations: on the first token of a window's
    or a document's text), cofiring_ids and cofiring_jaccard (the 10 latents that fire on the most of the same tokens;
    of a latent with more than 2,048 activations, that many are looked at, evenly spaced), decoder_ids and
    decoder_cosines (the 10 nearest decoder directions), promoted_ids, promoted_values, suppressed_ids,
    suppressed_values (logit lens, in logits). Without `sae` and `model`, what is read off the decoder is empty lists.
    """
    cache = FeatureCache(folder, manifest)
    counts = np.concatenate([np.diff(cache.map_file(item.file)["indptr"]) for item in manifest.ranges]).astype(np.int64)
    # no special tokens, where one is typed in a document neither: no latent is read there
    special = getattr(getattr(model, "tokenizer", None), "all_special_ids", [])
    n_of_token = np.bincount(cache.tokens[(cache.doc != NO_DOCUMENT) & ~np.isin(cache.tokens, special)])
    parts = []
    ranges = cache.entries(0, manifest.d_sae - 1)
    for first, acts in progress("statistics", ranges, total=len(manifest.ranges), unit="range"):
        columns = {"latent": np.arange(first, first + acts.shape[0]), **_range_columns(cache, acts, n_of_token)}
        parts.append(pa.table(columns | cofiring_neighbours(cache, first, acts, counts)))
    table = pa.concat_tables(parts).combine_chunks()
    for name, column in decoder_columns(sae, model, manifest.d_sae).items():
        table = table.append_column(name, column)
    with atomic_path(folder / STATS) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    manifest.stats_sha256 = sha256_file(folder / STATS)


def arrow(array: np.ndarray, offsets: np.ndarray | None = None) -> Any:
    """Return an Arrow column of lists: the rows of a matrix, or a flat array cut at `offsets`."""
    edges = np.arange(len(array) + 1) * array.shape[1] if offsets is None else offsets
    return pa.ListArray.from_arrays(pa.array(edges.astype(np.int32)), pa.array(array.ravel()))


def _range_columns(cache: FeatureCache, acts: Csr, n_of_token: Int[np.ndarray, " vocab"]) -> dict[str, Any]:
    """Return the columns of a range of latents that need its activations [latents, positions]; `n_of_token`: in the text."""
    n, count = acts.shape[0], np.diff(acts.indptr).astype(np.int64)
    row = np.repeat(np.arange(n), count)
    largest = acts.max(axis=1).toarray().ravel().astype(np.float64)
    total = np.bincount(row, acts.data, minlength=n).astype(np.float64)  # of nothing, the sums are integers
    return {
        "count": count,
        "density": count / n_of_token.sum(),
        "max": largest,
        "mean": total / np.maximum(count, 1),
        "quantiles": arrow(_quantiles(acts, row)),
        "histogram": arrow(_histogram(acts.data, row, largest)),
        **_places(cache, acts.indices, row, np.maximum(count, 1)),
        **_token_columns(cache.tokens[acts.indices], acts, total, n_of_token),
    }


def _largest_first(
    row: Int[np.ndarray, " n"], item: Int[np.ndarray, " n"], score: Float[np.ndarray, " n"], n_rows: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " kept"], Int[np.ndarray, " rows+1"]]:
    """Return the order of entries row by row, the largest score first and of equals the lower item.

    Also the places in that order of the TOP first of every row, and where each row's begin among these.
    """
    count = np.bincount(row, minlength=n_rows)
    kept = np.minimum(count, TOP)
    top, offsets = places(np.cumsum(count) - count, kept), np.append(0, np.cumsum(kept))
    return np.lexsort((item, -score, row)), top, offsets


def _quantiles(acts: Csr, row: Int[np.ndarray, " nnz"]) -> Float[np.ndarray, "latents quantiles"]:
    """Return the quantiles by linear interpolation, as numpy's; 0 for a latent that never fires."""
    # positive floats sort as their bits do, so one sort of integers sorts every latent's values
    key = (row.astype(np.uint64) << np.uint64(32)) | acts.data.view(np.uint32)
    key.sort()
    value = (key & np.uint64(2**32 - 1)).astype(np.uint32).view(np.float32)
    last = (np.diff(acts.indptr)[:, None] - 1).clip(min=0)
    place = last * np.array(QUANTILES)
    low = np.floor(place).astype(np.int64)
    padded = np.append(value, np.zeros(1 + last.max(), np.float32)).astype(np.float64)
    first = acts.indptr[:-1, None]
    a, b = (padded[first + at] for at in (low, np.minimum(low + 1, last)))
    return np.where(acts.indptr[1:, None] > first, a + (b - a) * (place - low), 0.0)


def _histogram(
    value: Float[np.ndarray, " nnz"], row: Int[np.ndarray, " nnz"], largest: Float[np.ndarray, " latents"]
) -> Int[np.ndarray, "latents bins"]:
    """Return counts in equal bins from 0 to each latent's maximum, with numpy.histogram's edges."""
    top = largest[row]
    index = np.minimum((value / top * N_BINS).astype(np.int64), N_BINS - 1)
    step = top / N_BINS
    index -= value < index * step
    index += (value >= (index + 1) * step) & (index < N_BINS - 1)
    return np.bincount(row * N_BINS + index, minlength=len(largest) * N_BINS).reshape(-1, N_BINS)


def _places(
    cache: FeatureCache,
    position: Int[np.ndarray, " nnz"],
    row: Int[np.ndarray, " nnz"],
    at_least_one: Int[np.ndarray, " latents"],
) -> dict[str, Any]:
    """Return how many documents and windows hold each latent, and where in the window it fires."""
    context_size, n = cache.manifest.context_size, len(at_least_one)
    window, place = np.divmod(position, context_size)
    profile = np.bincount(row * N_PLACES + place * N_PLACES // context_size, minlength=n * N_PLACES)
    first = (place == 0) | (cache.doc[np.maximum(position - 1, 0)] == NO_DOCUMENT)

    def different(what: Int[np.ndarray, " nnz"]) -> Int[np.ndarray, " latents"]:
        begins = (np.diff(row, prepend=-1) != 0) | (np.diff(what, prepend=what[:1]) != 0)
        return np.bincount(row[begins], minlength=n)

    return {
        "n_documents": different(cache.doc[position]),
        "n_windows": different(window),
        "position_profile": arrow(profile.reshape(n, N_PLACES) / at_least_one[:, None]),
        "first_token_share": np.bincount(row[first], minlength=n) / at_least_one,
    }


def _token_columns(
    token: Int[np.ndarray, " nnz"], acts: Csr, total: Float[np.ndarray, " latents"], n_of_token: np.ndarray
) -> dict[str, Any]:
    """Return the tokens each latent fires on most, by share of its activation mass, and the entropy of all shares."""
    n = acts.shape[0]
    by_token = csr_array((acts.data.astype(np.float64), token, acts.indptr), (n, int(token.max(initial=0)) + 1))
    # two counting sorts put each latent's entries in order of token, and of position within a token
    by_token = by_token.tocsc().tocsr()
    by_token.sum_duplicates()
    row, token = np.repeat(np.arange(n), np.diff(by_token.indptr)), by_token.indices.astype(np.int64)
    share = by_token.data / total[row]
    order, top, offsets = _largest_first(row, token, share, n)
    token, share = token[order], share[order]
    return {
        "token_ids": arrow(token[top], offsets),
        "token_shares": arrow(share[top], offsets),
        "token_lifts": arrow(share[top] / (n_of_token[token[top]] / n_of_token.sum()), offsets),
        "token_entropy": np.bincount(row, -share * np.log(share), minlength=n).astype(np.float64),
    }


# --- latents that fire together --------------------------------------------------------------------------------------


def cofiring_neighbours(
    cache: FeatureCache, first: int, acts: Csr, counts: Int[np.ndarray, " d_sae"]
) -> dict[str, Any]:
    """Return for the latents of a range, from `first` on, ids and Jaccard indices of the 10 that share most tokens with each.

    Jaccard is tokens with both / tokens with either: exact for a latent with at most SAMPLE activations, else the
    shared tokens are estimated from that many. Latents that share no token are not listed. `counts` is how often every
    latent fires; only the tokens on which a latent fires are looked at.
    """
    own = counts[first : first + acts.shape[0]]
    n = np.minimum(own, SAMPLE)
    spaced = places(np.zeros_like(n), n) * np.repeat(own, n) // np.repeat(n, n)
    position, begins = acts.indices[np.repeat(acts.indptr[:-1], n) + spaced], np.append(0, np.cumsum(n))
    # at a time as many latents as together have about GATHERED / per_token activations
    per_token = max(1.0, cache.manifest.nnz / max(1, cache.manifest.n_positions))
    batch = begins[:-1] // max(1, int(GATHERED / per_token))
    found = []
    for begin, end in pairwise([*np.flatnonzero(np.diff(batch, prepend=-1)).tolist(), len(n)]):
        here = slice(begins[begin], begins[end])
        shared = _shared(cache, position[here], begins[begin : end + 1] - begins[begin])
        size, other = np.diff(shared.indptr), shared.indices
        row = np.repeat(np.arange(begin, end), size)
        both = np.minimum(shared.data * (own / np.maximum(n, 1))[row], counts[other])
        jaccard = np.where(other == first + row, -1.0, both / (own[row] + counts[other] - both))
        each = np.split(jaccard, shared.indptr[1:-1])
        least = [np.partition(some, -TOP)[-TOP] if len(some) > TOP else 0.0 for some in each]
        near = jaccard >= np.repeat(least, size)
        found.append((row[near], other[near], jaccard[near]))
    row, other, jaccard = map(np.concatenate, zip(*found, strict=True))
    order, top, offsets = _largest_first(row, other, jaccard, len(n))
    return {
        "cofiring_ids": arrow(other[order][top].astype(np.int64), offsets),
        "cofiring_jaccard": arrow(jaccard[order][top], offsets),
    }


def _shared(cache: FeatureCache, position: Int[np.ndarray, " n"], begins: Int[np.ndarray, " latents+1"]) -> Csr:
    """Return [latents, d_sae]: on how many of each latent's positions every other latent fires."""
    where, column = np.unique(position, return_inverse=True)
    sizes, latents = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for shard, _, place in cache.by_shard(where):
        arrays = cache.shard_acts(shard)
        begin = arrays["indptr"][place].astype(np.int64)
        sizes.append(arrays["indptr"][place + 1].astype(np.int64) - begin)
        latents.append(arrays["latent"][places(begin, sizes[-1])].astype(np.int32))
    latent, rows = np.concatenate(latents), np.cumsum(np.concatenate(sizes))
    on_token = csr_array((np.ones(len(latent), np.int32), latent, rows), (len(where), cache.manifest.d_sae))
    return csr_array((np.ones(len(column), np.int32), column, begins), (len(begins) - 1, len(where))) @ on_token


# --- decoder directions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_columns(sae: Any, model: Any, d_sae: int) -> dict[str, Any]:
    """Return the 10 latents with the nearest decoder directions (cosines), and the tokens these raise and lower most.

    Values of the logit lens compare within a latent, not with real logits. All lists are empty where SAE or model is None.
    """
    if sae is None or model is None:
        kinds = {"ids": pa.int64(), "values": pa.float32(), "cosines": pa.float32()}
        names = "decoder_ids decoder_cosines promoted_ids promoted_values suppressed_ids suppressed_values"
        return {name: pa.array([[]] * d_sae, pa.list_(kinds[name.split("_")[1]])) for name in names.split()}
    lists: dict[str, list[Tensor]] = {}
    lists["decoder_ids"], lists["decoder_cosines"] = nearest_directions(sae.W_dec, torch.arange(d_sae), TOP)
    lens, vocabulary = logit_lens(model), len(model.get_output_embeddings().weight)
    for block in sae.W_dec.split(_rows_at_once(vocabulary)):
        logits = lens(block)
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(min(TOP, vocabulary), largest=largest)
            lists.setdefault(f"{name}_ids", []).append(ids.cpu())
            lists.setdefault(f"{name}_values", []).append(values.cpu())
    return {name: arrow(torch.cat(parts).numpy()) for name, parts in lists.items()}


@torch.no_grad()
def nearest_directions(
    w_dec: Float[Tensor, "d_sae d_in"], latents: Int[Tensor, " n"], most: int
) -> tuple[list[Int[Tensor, "some most"]], list[Float[Tensor, "some most"]]]:
    """Return for some latents, in parts, the others whose decoder rows are nearest to theirs, and these cosines."""
    unit, ids, cosines = torch.nn.functional.normalize(w_dec.float(), dim=-1), [], []
    for some in latents.split(_rows_at_once(len(unit))):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -2.0
        values, indices = cosine.topk(min(most, len(unit) - 1))
        ids.append(indices.cpu())
        cosines.append(values.cpu())
    return ids, cosines


def _rows_at_once(width: int) -> int:
    """Return how many rows may be multiplied with `width` others at a time."""
    return max(1, BLOCK_BYTES // (4 * width))

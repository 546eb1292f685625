"""Statistics of every latent in one pass over the latent-major files, written to stats.parquet.

A range of latents is done at once: no step goes latent by latent. What stands near a latent is of them too: latents that
fire on the same tokens, decoder directions, and the tokens these promote.
"""

from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, sha256_file
from sae_italian.cache.layout import STATS, LatentRange, Manifest, places
from sae_italian.cache.read import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import logit_lens

TOP_TOKENS = 10
N_BINS = 20
N_PLACES = 10
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
TOP = 10  # of each kind that are listed
SAMPLE = 2048  # activations looked at, evenly spaced, of a latent that has more
GATHERED = 2**22  # about as many entries are gathered at a time
BLOCK_BYTES = 2**27  # of a product with the decoder


class TextCounts(NamedTuple):
    """What the statistics need of the whole text."""

    tokens: Int[np.ndarray, " positions"]
    doc: Int[np.ndarray, " positions"]
    token_counts: Int[np.ndarray, " vocab"]  # of counted tokens: those of documents

    @property
    def n_counted(self) -> int:
        return int(self.token_counts.sum())


class Entries(NamedTuple):
    """The non-zeros of a range, latent after latent: `row` is latent - first."""

    indptr: Int[np.ndarray, " latents+1"]
    count: Int[np.ndarray, " latents"]
    row: Int[np.ndarray, " nnz"]
    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]


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
    import pyarrow as pa
    import pyarrow.parquet

    cache = FeatureCache(folder, manifest)
    parts: dict[str, list[Any]] = {}
    counts = np.concatenate([np.diff(cache.map_file(item.file)["indptr"]) for item in manifest.ranges]).astype(np.int64)
    tokenizer = getattr(model, "tokenizer", None)
    text = _text_counts(cache, [] if tokenizer is None else tokenizer.all_special_ids)
    for item in progress("statistics", manifest.ranges, unit="range"):
        columns = _range_columns(cache, item, text) | cofiring_neighbours(cache, item, counts)
        for name, column in columns.items():
            parts.setdefault(name, []).append(arrow(column) if isinstance(column, np.ndarray) else column)
    merged = {name: pa.concat_arrays(columns) for name, columns in parts.items()} | decoder_columns(
        sae, model, manifest.d_sae
    )
    table = pa.table({"latent": np.arange(manifest.d_sae), **merged})
    with atomic_path(folder / STATS) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    manifest.stats_sha256 = sha256_file(folder / STATS)


def arrow(array: np.ndarray, offsets: np.ndarray | None = None) -> Any:
    """Return a column as an Arrow array: numbers, lists of equal length [rows, n], or flat lists cut at `offsets`."""
    import pyarrow as pa

    if array.ndim == 2:
        offsets = np.arange(len(array) + 1) * array.shape[1]
    if offsets is None:
        return pa.array(array)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(array.ravel()))


def _text_counts(cache: FeatureCache, special: list[int]) -> TextCounts:
    """Count the tokens of documents; no special ones, where one is typed in a document neither: no latent is read there."""
    counted = (cache.doc != NO_DOCUMENT) & ~np.isin(cache.tokens, special)
    return TextCounts(cache.tokens, cache.doc, np.bincount(cache.tokens[counted]))


def _range_columns(cache: FeatureCache, item: LatentRange, text: TextCounts) -> dict[str, Any]:
    """Return the columns that need the activations of a range of latents."""
    _, indptr, position, value = next(cache.entries(item.first, item.last))
    count = np.diff(indptr)
    row = np.repeat(np.arange(len(count), dtype=np.int32), count)
    entries = Entries(indptr, count, row, position.astype(np.int64), value)
    largest = np.zeros(len(count), dtype=np.float32)
    np.maximum.at(largest, row, entries.value)
    total = _sums(row, entries.value, len(count))
    return {
        "count": count,
        "density": count / text.n_counted,
        "max": largest.astype(np.float64),
        "mean": total / np.maximum(count, 1),
        "quantiles": _quantiles(entries),
        "histogram": _histogram(entries, largest.astype(np.float64)),
        **_places(entries, text, cache.manifest.context_size),
        **_token_columns(entries, text, total),
    }


def _sums(row: np.ndarray, weights: np.ndarray, n: int) -> Float[np.ndarray, " n"]:
    """Return the sum of the weights of each row; numpy's own counts in integers where there is nothing to sum."""
    return np.bincount(row, weights=weights, minlength=n).astype(np.float64)


def _quantiles(entries: Entries) -> Float[np.ndarray, "latents quantiles"]:
    """Return the quantiles by linear interpolation, as numpy's; 0 for a latent that never fires."""
    # positive floats sort as their bits do, so one sort of integers sorts every latent's values
    key = (entries.row.astype(np.uint64) << np.uint64(32)) | entries.value.view(np.uint32)
    key.sort()
    value = (key & np.uint64(2**32 - 1)).astype(np.uint32).view(np.float32)
    last = (entries.count[:, None] - 1).clip(min=0)
    place = last * np.array(QUANTILES)
    low = np.floor(place).astype(np.int64)
    padded = np.append(value, np.float32(0)).astype(np.float64)
    first = np.where(entries.count > 0, entries.indptr[:-1], len(value))[:, None]
    a, b = (padded[np.minimum(first + at, len(value))] for at in (low, np.minimum(low + 1, last)))
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


def _places(entries: Entries, text: TextCounts, context_size: int) -> dict[str, np.ndarray]:
    """Return how many documents and windows hold each latent, and where in the window it fires."""
    n, row, position = len(entries.count), entries.row, entries.position
    new_latent = np.diff(row, prepend=-1) != 0
    doc = text.doc[position]
    window, place = np.divmod(position, context_size)
    profile = np.bincount(row.astype(np.int64) * N_PLACES + place * N_PLACES // context_size, minlength=n * N_PLACES)
    first = (place == 0) | (text.doc[np.maximum(position - 1, 0)] == NO_DOCUMENT)
    at_least_one = np.maximum(entries.count, 1)
    return {
        "n_documents": np.bincount(row[new_latent | (np.diff(doc, prepend=doc[:1]) != 0)], minlength=n),
        "n_windows": np.bincount(row[new_latent | (np.diff(window, prepend=window[:1]) != 0)], minlength=n),
        "position_profile": profile.reshape(n, N_PLACES) / at_least_one[:, None],
        "first_token_share": np.bincount(row[first], minlength=n) / at_least_one,
    }


def _token_columns(entries: Entries, text: TextCounts, total: Float[np.ndarray, " latents"]) -> dict[str, Any]:
    """Return the tokens each latent fires on most, by share of its activation mass, and the entropy of all shares."""
    n, tokens = len(entries.count), text.tokens[entries.position].astype(np.int32)
    by_row = csr_matrix((entries.value.astype(np.float64), tokens, entries.indptr), (n, int(tokens.max(initial=0)) + 1))
    # two counting sorts put each latent's entries in order of token, and of position within a token
    by_token = by_row.tocsc().tocsr()
    by_token.sum_duplicates()
    n_tokens, token = np.diff(by_token.indptr), by_token.indices.astype(np.int64)
    owner = np.repeat(np.arange(n), n_tokens)
    share = by_token.data / total[owner]
    order = np.lexsort((-share, owner))  # which keeps the order of equals, the tokens'
    owner, token, share = owner[order], token[order], share[order]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(n_tokens) - n_tokens, n_tokens)
    top = rank < TOP_TOKENS
    offsets = np.concatenate([[0], np.cumsum(np.minimum(n_tokens, TOP_TOKENS))])
    return {
        "token_ids": arrow(token[top], offsets),
        "token_shares": arrow(share[top], offsets),
        "token_lifts": arrow(share[top] / (text.token_counts[token[top]] / text.n_counted), offsets),
        "token_entropy": _sums(owner, -share * np.log(share), n),
    }


# --- latents that fire together --------------------------------------------------------------------------------------


def cofiring_neighbours(
    cache: FeatureCache, item: LatentRange, counts: Int[np.ndarray, " d_sae"]
) -> dict[str, np.ndarray]:
    """Return for each latent of a range the ids and Jaccard indices of the 10 latents that share most tokens with it.

    Jaccard is tokens with both / tokens with either: exact for a latent with at most SAMPLE activations, else the
    shared tokens are estimated from that many. Latents that share no token are not listed. `counts` is how often every
    latent fires; only the tokens on which a latent fires are looked at.
    """
    arrays = cache.map_file(item.file)
    indptr = arrays["indptr"].astype(np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    per_token = max(1.0, cache.manifest.nnz / max(1, cache.manifest.n_positions))
    bounds = [(begin, end, min(SAMPLE, end - begin)) for begin, end in pairwise(indptr.tolist())]
    taken = [begin + np.arange(n) * (end - begin) // max(1, n) for begin, end, n in bounds]  # evenly spaced
    # at a time as many latents as together have about GATHERED / per_token activations
    batch = np.cumsum([0, *map(len, taken)]) // max(1, int(GATHERED / per_token))
    for _, rows in groupby(range(len(taken)), batch.__getitem__):
        latents = [item.first + row for row in rows]
        entries = [taken[latent - item.first] for latent in latents]
        shared = _shared(cache, [arrays["position"][entry].astype(np.int64) for entry in entries])
        for latent, entry, (begin, end) in zip(latents, entries, pairwise(map(int, shared.indptr)), strict=True):
            both = shared.data[begin:end] * (counts[latent] / max(1, len(entry)))
            found.append(_most_shared(latent, shared.indices[begin:end], both, counts))
    ids, scores = zip(*found, strict=True)
    offsets = np.cumsum([0, *map(len, ids)])
    return {
        "cofiring_ids": arrow(np.concatenate(ids).astype(np.int64), offsets),
        "cofiring_jaccard": arrow(np.concatenate(scores).astype(np.float64), offsets),
    }


def _shared(cache: FeatureCache, positions: list[np.ndarray]) -> csr_matrix:
    """Return [latents, d_sae]: on how many of each latent's positions every other latent fires."""
    where, row = np.unique(np.concatenate(positions), return_inverse=True)
    per_row, latents = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for shard, _, place in cache.by_shard(where):
        arrays = cache.shard_acts(shard)
        begin = arrays["indptr"][place].astype(np.int64)
        per_row.append(arrays["indptr"][place + 1].astype(np.int64) - begin)
        latents.append(arrays["latent"][places(begin, per_row[-1])].astype(np.int32))
    latent, rows = np.concatenate(latents), np.cumsum(np.concatenate(per_row))
    d_sae = cache.manifest.d_sae
    on_token = csr_matrix((np.ones(len(latent), dtype=np.int32), latent, rows), shape=(len(where), d_sae))
    own = (np.ones(len(row), dtype=np.int32), row.astype(np.int32), np.cumsum([0, *map(len, positions)]))
    return csr_matrix(own, shape=(len(positions), len(where))) @ on_token


def _most_shared(
    latent: int, other: Int[np.ndarray, " n"], both: np.ndarray, counts: Int[np.ndarray, " d_sae"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and Jaccard indices of the nearest others, nearest first; the lower id first where two are equal."""
    both = np.minimum(both, counts[other])
    jaccard = np.where(other == latent, -1.0, both / (counts[latent] + counts[other] - both))
    n = min(TOP, len(other))
    if n == 0:
        return other, jaccard
    near = np.flatnonzero(jaccard >= np.partition(jaccard, len(jaccard) - n)[len(jaccard) - n])
    near = near[np.lexsort((other[near], -jaccard[near]))][:n]
    near = near[jaccard[near] >= 0]
    return other[near], jaccard[near]


# --- decoder directions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_columns(sae: Any, model: Any, d_sae: int) -> dict[str, Any]:
    """Return the 10 latents with the nearest decoder directions (cosines), and the tokens these raise and lower most.

    Values of the logit lens compare within a latent, not with real logits. All lists are empty where SAE or model is None.
    """
    import pyarrow as pa

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

"""Statistics of every latent in one pass over the latent-major files, written to stats.parquet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sae_italian.base.storage import atomic_path, remove, sha256_file
from sae_italian.cache.cofiring import cofiring_neighbours
from sae_italian.cache.latent_stats import range_statistics
from sae_italian.cache.layout import STATS, Manifest
from sae_italian.cache.lens import decoder_neighbours, logit_lens, unknown_decoder
from sae_italian.corpora.packing import NO_DOCUMENT


class Corpus(NamedTuple):
    """What the statistics need of the whole text; the two long arrays are files, so they need no memory."""

    tokens: Int[np.ndarray, " positions"]
    doc: Int[np.ndarray, " positions"]
    token_counts: Int[np.ndarray, " vocab"]  # of counted tokens: those of documents

    @property
    def n_counted(self) -> int:
        return int(self.token_counts.sum())


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

    from sae_italian.cache.read import FeatureCache

    cache = FeatureCache(folder, manifest)
    parts: dict[str, list[Any]] = {}
    counts = np.concatenate([np.diff(cache.map_file(item.file)["indptr"]) for item in manifest.ranges]).astype(np.int64)
    with _corpus(cache) as corpus:
        for item in tqdm(manifest.ranges, desc="statistics", unit="range", disable=None):
            columns = range_statistics(cache, item, corpus) | cofiring_neighbours(cache, item, counts)
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
    merged = {name: pa.concat_arrays(columns) for name, columns in parts.items()}
    if sae is not None and model is not None:
        merged |= decoder_neighbours(sae) | logit_lens(sae, model)
    else:
        merged |= unknown_decoder(manifest.d_sae)
    table = pa.table({"latent": np.arange(manifest.d_sae), **merged})
    with atomic_path(folder / STATS) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    manifest.stats_sha256 = sha256_file(folder / STATS)


@contextmanager
def _corpus(cache: Any) -> Iterator[Corpus]:
    """Lay the tokens and documents of all shards end to end in two temporary files."""
    files = {name: cache.folder / "runs" / f"{name}.bin" for name in ("tokens", "doc")}
    counts = np.zeros(0, dtype=np.int64)
    (cache.folder / "runs").mkdir(exist_ok=True)
    try:
        with files["tokens"].open("wb") as tokens_out, files["doc"].open("wb") as doc_out:
            for shard in cache.manifest.shards:
                arrays = cache.shard_tokens(shard.index)
                tokens, doc = arrays["tokens"].astype(np.uint32), arrays["doc"]
                tokens.tofile(tokens_out)
                doc.tofile(doc_out)
                here = np.bincount(tokens[doc != NO_DOCUMENT], minlength=len(counts))
                here[: len(counts)] += counts
                counts = here
        tokens, doc = (np.memmap(file, dtype=np.uint32, mode="r") for file in files.values())
        yield Corpus(tokens, doc, counts)
    finally:
        for file in files.values():
            remove(file)

"""The first pass of a build: documents packed into token shards, in order, with their text.

The other passes read these files, so any shard can be encoded without redoing those before it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import remove
from sae_italian.cache.layout import Manifest, ShardRecord, shard_file, smallest_uint, write_arrays
from sae_italian.corpora import PackedBlock, TextDocument, iter_documents, pack
from sae_italian.corpora.packing import take_tokens


def write_token_shards(out: Path, manifest: Manifest, tokenizer: Any) -> None:
    """Write the token shards that the manifest does not name yet, and name them.

    Packing starts from the first document again: it is a small part of the work, and the same each time.
    Raises: UsageError when the corpus is shorter than asked for, or holds no full window.
    """
    documents = iter_documents(manifest.corpus, manifest.split, text_column=manifest.text_column)  # pyright: ignore[reportArgumentType]
    blocks = pack(documents, tokenizer, manifest.context_size, windows_per_block=manifest.windows_per_shard)
    if manifest.n_tokens_asked is not None:
        blocks = take_tokens(blocks, manifest.n_tokens_asked, f"the {manifest.split} split of {manifest.corpus}")
    done = len(manifest.shards)
    with tqdm(total=manifest.n_tokens_asked, unit="tok", unit_scale=True, desc="tokens", disable=None) as bar:
        for index, block in enumerate(blocks):
            if index >= done:
                manifest.shards.append(write_token_shard(out, index, block))
                manifest.save(out)
            bar.update(block.tokens.size)
    if not manifest.shards:
        raise UsageError(
            f"the {manifest.split} split of {manifest.corpus} fills no window of {manifest.context_size} tokens. "
            "Use more text, or a smaller --context-size."
        )
    manifest.tokens_complete = True
    manifest.save(out)


def write_token_shard(out: Path, index: int, block: PackedBlock) -> ShardRecord:
    """Write one shard's tokens and documents; return its record, without activations as yet."""
    context = block.tokens.shape[1]
    arrays = {
        "tokens": block.tokens.astype(smallest_uint(int(block.tokens.max()))),
        "doc": block.doc.astype(np.uint32),
        "start": block.start.astype(np.uint32),
        "end": block.end.astype(np.uint32),
        "run": run_starts(block.doc).astype(smallest_uint(context - 1)),
        **_document_arrays(block.documents),
    }
    file = shard_file("tokens", index)
    digests = {file: write_arrays(out, file, arrays)}
    return ShardRecord(index=index, n_windows=len(block.tokens), n_documents=len(block.documents), sha256=digests)


def run_starts(doc: Int[np.ndarray, "windows context"]) -> Int[np.ndarray, "windows context"]:
    """Return for every token the place in its window where the stretch of one document that holds it begins."""
    places = np.broadcast_to(np.arange(doc.shape[1]), doc.shape)
    begins = np.ones(doc.shape, dtype=bool)
    begins[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def _document_arrays(documents: list[TextDocument]) -> dict[str, np.ndarray]:
    """Return texts, ids and sources as UTF-8 bytes with pointers: `text`, `text_ptr`, `doc_id`, ..."""
    arrays = {}
    for name in ("text", "doc_id", "source"):
        encoded = [getattr(document, name).encode("utf-8", "surrogatepass") for document in documents]
        arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{name}_ptr"] = np.cumsum([0, *(len(part) for part in encoded)], dtype=np.uint64)
    return arrays


def share_tokens(source: Path, shards: list[ShardRecord], out: Path, manifest: Manifest) -> None:
    """Give another cache of the same text the token shards of `source`: hard links where the disk has them, else copies."""
    if manifest.tokens_complete:
        return
    (out / "tokens").mkdir(exist_ok=True)
    manifest.shards = []
    for shard in shards:
        file = shard_file("tokens", shard.index)
        remove(out / file)
        try:
            os.link(source / file, out / file)
        except OSError:
            shutil.copyfile(source / file, out / file)
        unencoded = {"nnz": 0, "n_wide": 0, "sha256": {file: shard.sha256[file]}}
        manifest.shards.append(shard.model_copy(update=unencoded))
    manifest.tokens_complete = True
    manifest.save(out)

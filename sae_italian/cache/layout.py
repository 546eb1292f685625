"""What a feature cache is on disk.

    manifest.json                        schema, what it was built from (with hashes), shards with counts and checksums
    tokens/00000.safetensors             the windows of one shard: tokens, document index and character span of each
                                         token, and the text, id and source of the documents that begin in the shard
    acts/00000.safetensors               token-major CSR of the shard: indptr, latent, value
    latents/00000_00511.safetensors      latent-major CSC of a range of latents: indptr, position, value
    stats.parquet                        one row per latent

A position is `window * context_size + place in the window`, over the whole cache. Values are fp16; larger ones are
clipped to its maximum and counted in the manifest. A shard is complete when the manifest names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sae_italian.errors import DataError, UsageError
from sae_italian.storage import read_json, sha256_file, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATS = "stats.parquet"
FP16_MAX = float(np.finfo(np.float16).max)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Shard(_Record):
    """One finished shard."""

    index: int
    n_windows: int
    n_documents: int
    nnz: int
    n_clipped: int
    sha256: dict[str, str]  # file, relative to the cache -> checksum


class LatentRange(_Record):
    """One finished file of the latent-major part; `last` is inclusive."""

    first: int
    last: int
    nnz: int
    sha256: str

    @property
    def file(self) -> str:
        return f"latents/{self.first:05d}_{self.last:05d}.safetensors"


class Manifest(_Record):
    """Everything a reader must know, and everything that decides the bytes of the cache."""

    schema_version: int = SCHEMA_VERSION
    model: str
    sae: str
    sae_hash: str
    tokenizer_hash: str
    hook_name: str
    d_in: int
    d_sae: int
    k: int | None
    corpus: str
    text_column: str
    split: str
    n_tokens_asked: int
    context_size: int
    windows_per_shard: int
    versions: dict[str, str]
    shards: list[Shard] = []
    ranges: list[LatentRange] = []
    complete: bool = False

    @property
    def n_windows(self) -> int:
        return sum(shard.n_windows for shard in self.shards)

    @property
    def n_documents(self) -> int:
        return sum(shard.n_documents for shard in self.shards)

    @property
    def nnz(self) -> int:
        return sum(shard.nnz for shard in self.shards)

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of the cache: two builds with the same identity are the same cache."""
        return self.model_dump(exclude={"shards", "ranges", "complete", "versions", "sae"})

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a cache's manifest. Raises UsageError when there is none, DataError when it is not one we can read."""
        file = folder / MANIFEST
        if not file.is_file():
            raise UsageError(
                f"{folder} is not a feature cache: it holds no {MANIFEST}. Build one with `sae-italian cache build`."
            )
        try:
            values: dict[str, Any] = read_json(file)
            version = values.get("schema_version")
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{file}: schema version {version!r}, this program reads {SCHEMA_VERSION}. Build it again."
                )
            return cls(**values)
        except (ValueError, AttributeError, ValidationError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} is damaged: {str(error).splitlines()[0]}. Build the cache again.") from error


def tokens_file(shard: int) -> str:
    return f"tokens/{shard:05d}.safetensors"


def acts_file(shard: int) -> str:
    return f"acts/{shard:05d}.safetensors"


def smallest_uint(largest: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned type that holds `largest`."""
    return next(kind for kind in (np.uint16, np.uint32, np.uint64) if largest <= np.iinfo(kind).max)


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its checksum. Raises DataError naming the first file that is missing or differs."""
    expected = {file: digest for shard in manifest.shards for file, digest in shard.sha256.items()}
    expected |= {item.file: item.sha256 for item in manifest.ranges}
    for file, digest in expected.items():
        if not (folder / file).is_file():
            raise DataError(f"{folder / file} is missing. Build the cache again, or restore the file.")
        if sha256_file(folder / file) != digest:
            raise DataError(
                f"{folder / file} is damaged: its checksum differs from the manifest. Build the cache again."
            )

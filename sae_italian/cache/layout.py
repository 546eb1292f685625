"""What a feature cache is on disk.

    manifest.json                        schema, what it was built from (with hashes), shards with counts and checksums
    tokens/00000.safetensors             the windows of one shard: tokens, document index, character span and `run` of
                                         each token, and the text, id and source of the documents that begin in the shard
    acts/00000.safetensors               token-major CSR of the shard: indptr, latent, value
    latents/00000_00511.safetensors      latent-major CSC of a range of latents: indptr, position, value
    stats.parquet                        one row per latent
    runs/00000.safetensors               while building only: a shard's activations sorted by latent

A position is `window * context_size + place in the window`, over the whole cache; `run` is the place where the stretch
of one document that holds the token begins. Values are fp16; one that fp16 cannot hold stands there as its maximum and
in full in `wide_at` (index into `value`) and `wide_value` (fp32), so no order is lost; the manifest counts them. One too
small for fp16 stands as its smallest number, so that active never reads as silent. All shards have `windows_per_shard`
windows but the last. Token files of caches built together are hard links: each folder is whole, the bytes are there once.
"""

from __future__ import annotations

import errno
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import ODD, atomic_path, fingerprint, path_of, read_json, sha256_file, write_json

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
STATS = "stats.parquet"
FP16_MAX = float(np.finfo(np.float16).max)
FP16_TINY = np.finfo(np.float16).smallest_subnormal
_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


Size = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[int, Field(ge=0, le=2**62)]
Csr = Any  # scipy's csr_array, of which type checkers know neither the shape nor what stacking gives


class ShardRecord(BaseModel, extra="forbid"):
    """One shard: its tokens are written when the manifest names it, its activations when `sha256` names their file."""

    index: Number
    n_windows: Size
    n_documents: Number
    nnz: Number = 0
    n_wide: Number = 0  # values beyond fp16
    sha256: dict[str, str]  # file, relative to the cache -> checksum

    @property
    def encoded(self) -> bool:
        return shard_file("acts", self.index) in self.sha256


class LatentRange(BaseModel, extra="forbid"):
    """One finished file of the latent-major part; `last` is inclusive."""

    first: Number
    last: Number
    nnz: Number
    sha256: str

    @property
    def file(self) -> str:
        return f"latents/{self.first:05d}_{self.last:05d}.safetensors"


def _total(name: str) -> Any:
    return property(lambda self: sum(getattr(shard, name) for shard in self.shards))


class Manifest(BaseModel, extra="forbid"):
    """Everything a reader must know, and everything that decides the bytes of the cache."""

    schema_version: int = SCHEMA_VERSION
    model: str
    model_revision: str | None = None  # the commit on the hub; None for a model in a local folder
    model_dtype: str = Field("float32", exclude_if=lambda dtype: dtype == "float32")
    sae: str
    sae_hash: str
    sae_config_hash: str = ""
    tokenizer_hash: str
    hook_name: str
    d_in: Number
    d_sae: Size
    k: int | None
    corpus: str
    corpus_hash: str = ""
    text_column: str
    split: str
    n_tokens_asked: int | None  # None: all of the split
    context_size: Size
    windows_per_shard: Size
    versions: dict[str, str]
    shards: list[ShardRecord] = []
    ranges: list[LatentRange] = []
    tokens_complete: bool = False
    stats_sha256: str = ""
    complete: bool = False

    n_windows, n_documents, nnz, n_wide = map(_total, ("n_windows", "n_documents", "nnz", "n_wide"))

    @property
    def n_positions(self) -> int:
        return self.n_windows * self.context_size

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of the cache: two builds with the same identity are the same cache."""
        progress = {"shards", "ranges", "tokens_complete", "stats_sha256", "complete"}
        return self.model_dump(exclude={*progress, "versions", "sae"})

    def files(self) -> dict[str, str]:
        """Return every file of the cache with its checksum."""
        expected = {file: digest for shard in self.shards for file, digest in shard.sha256.items()}
        expected |= {item.file: item.sha256 for item in self.ranges}
        return expected | ({STATS: self.stats_sha256} if self.stats_sha256 else {})

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a cache's manifest. Raises UsageError when there is none, DataError when it is not one we can read."""
        file = path_of(folder) / MANIFEST
        if not file.is_file():
            raise UsageError(
                f"{folder} is not a feature cache: it holds no {MANIFEST}. Build one with `sae-italian cache build`."
            )
        try:
            values: dict[str, Any] = read_json(file)
            version = values.get("schema_version")
            if version == SCHEMA_VERSION:
                return cls(**values)._consistent()
        except (ValueError, AttributeError) as error:
            why = str(error)
            if isinstance(error, ValidationError):
                why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:2])
            raise DataError(f"{file} is damaged: {why}. Build the cache again.") from error
        raise DataError(f"{file}: schema version {version!r}, this program reads {SCHEMA_VERSION}. Build it again.")

    def _consistent(self) -> Manifest:
        """Return itself. Raises: ValueError where its parts contradict each other, so that no reader trusts a wrong size."""
        firsts, ends = [item.first for item in self.ranges], [item.last + 1 for item in self.ranges]
        if self.complete and (not self.shards or [0, *ends] != [*firsts, self.d_sae]):
            raise ValueError(f"its ranges do not hold latents 0 to {self.d_sae - 1} one after the other")
        if [shard.index for shard in self.shards] != list(range(len(self.shards))):
            raise ValueError("its shards are not numbered one after the other")
        for shard in self.shards:
            if others := shard.sha256.keys() - {shard_file(kind, shard.index) for kind in KINDS}:
                raise ValueError(f"shard {shard.index} has a file {min(others)[:40]!r}")
        if {shard.n_windows for shard in self.shards[:-1]} - {self.windows_per_shard}:
            raise ValueError(f"a shard before the last does not have {self.windows_per_shard} windows")
        return self

    def latent_bounds(self, latents: tuple[int, int] | None) -> tuple[int, int]:
        """Return the first and last latent wanted. Raises UsageError when they are not of this cache."""
        first, last = latents or (0, self.d_sae - 1)
        if not 0 <= first <= last < self.d_sae:
            raise UsageError(f"latents {first} to {last} do not exist: this SAE has latents 0 to {self.d_sae - 1}.")
        return first, last


def config_hash(sae: Any) -> str:
    """Return a hash of an SAE's configuration: what decides its latents beside the weights, such as k."""
    return fingerprint({name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device")})


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 of the fast tokenizer's whole definition. Raises: UsageError for what is no such tokenizer."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UsageError(f"a {type(tokenizer).__name__} is no fast tokenizer of transformers. Give model.tokenizer.")
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


KINDS = ("tokens", "acts", "runs")


def shard_file(kind: str, shard: int) -> str:
    """Return the file of a shard's `tokens`, `acts` or (while building) `runs`, relative to the cache."""
    return f"{kind}/{shard:05d}.safetensors"


def smallest_uint(largest: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned type that holds `largest`."""
    return next(kind for kind in (np.uint16, np.uint32, np.uint64) if largest <= np.iinfo(kind).max)


def halves(value: np.ndarray) -> dict[str, np.ndarray]:
    """Return positive float32 values as `value` (fp16) with `wide_at` and `wide_value` for those beyond fp16."""
    half = np.minimum(value, FP16_MAX).astype(np.float16)
    half[(half == 0) & (value > 0)] = FP16_TINY
    wide = np.flatnonzero(value > FP16_MAX)
    return {"value": half, "wide_at": wide.astype(np.uint64), "wide_value": value[wide].astype(np.float32)}


def write_arrays(folder: Path, file: str, arrays: dict[str, np.ndarray]) -> str:
    """Write a safetensors file whole or not at all; return its checksum. Empty `wide_*` arrays are left out."""
    kept = {name: np.ascontiguousarray(each) for name, each in arrays.items() if each.size or "wide" not in name}
    with atomic_path(folder / file) as temporary:
        try:
            save_file(kept, temporary)
        except SafetensorError as error:  # of an operating system's error only the text is left
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        return sha256_file(temporary)


def map_arrays(path: Path, mend: str = "Build the cache again.") -> dict[str, np.ndarray]:
    """Return the arrays of a file as read-only views of the file: nothing is read before it is touched.

    Raises: DataError naming a file that is missing or cut short.
    """
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        begin, arrays = 8 + int(data[:8].view("<u8")[0]), {}
        for name, entry in json.loads(data[8:begin].tobytes()).items():
            first, last = entry["data_offsets"]
            arrays[name] = data[begin + first : begin + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return arrays
    except (OSError, *ODD) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise UsageError(
                f"{path} cannot be opened: too many files are open. Allow more (ulimit -n 1024)."
            ) from error
        raise DataError(f"{path} cannot be read ({error}). {mend}") from error


def full_values(arrays: dict[str, np.ndarray], begin: int = 0, end: int | None = None) -> np.ndarray:
    """Return entries begin to end of `value` as float32, those beyond fp16 in full size."""
    value = arrays["value"][begin:end].astype(np.float32)
    if "wide_at" in arrays:
        low, high = np.searchsorted(arrays["wide_at"], [begin, begin + len(value)])
        value[arrays["wide_at"][low:high].astype(np.int64) - begin] = arrays["wide_value"][low:high]
    return value


def verify(folder: str | Path, manifest: Manifest, *, contents: bool = True) -> None:
    """Compare every file with its checksum, or look only whether it is there.

    Raises: DataError naming the first file that is missing or differs.
    """
    for file, digest in manifest.files().items():
        if not (path := Path(folder) / file).is_file():
            raise DataError(f"{path} is missing. Build the cache again, or restore the file.")
        if contents:
            check_file(path, digest)


def check_file(path: Path, digest: str) -> None:
    """Compare a file with its checksum, once in a process until it is written to: a few milliseconds for 10 MB.

    Raises: DataError when it differs.
    """
    about = path.stat()
    if not _is_sound(path, digest, about.st_size, about.st_mtime_ns):
        raise DataError(f"{path} is damaged: its checksum differs from the manifest. Build the cache again.")


@lru_cache(maxsize=2**14)
def _is_sound(path: Path, digest: str, _size: int, _written: int) -> bool:
    return sha256_file(path) == digest


def places(starts: Int[np.ndarray, " latents"], counts: Int[np.ndarray, " latents"]) -> Int[np.ndarray, " entries"]:
    """Return starts[i], starts[i] + 1, ... (counts[i] of them) for every i, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)

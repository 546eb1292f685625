"""Read a feature cache: any latent's activations, windows and statistics, and the text of any stretch of tokens.

Files are mapped, not loaded, so the first latent of a cache of any size is there at once. `whole`, `tokens` and `doc`
alone load one number per token of the whole cache, for work that needs all of them.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet
from jaxtyping import Int
from scipy.sparse import csr_array

from sae_italian.base.errors import DataError, SaeItalianError, UsageError, check_whole
from sae_italian.base.report import OURS, Picture, framed, svg
from sae_italian.base.storage import path_of
from sae_italian.cache import layout
from sae_italian.cache.layout import STATS, Csr, LatentRange, Manifest, full_values, map_arrays, shard_file
from sae_italian.cache.passages import LatentActivations
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.corpora.stream import TextDocument
from sae_italian.saes import hooks_of, load_sae, weights_hash

MAPPED_FILES = 768  # held open at a time, of those that a process may have open no more than a quarter
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SHARES = (0.5, 0.2, 0.3)


class Segments(NamedTuple):
    """Stretches of consecutive tokens of one document inside one window, at most `width` tokens long."""

    start: Int[np.ndarray, " segments"]  # position of the first token
    length: Int[np.ndarray, " segments"]
    doc: Int[np.ndarray, " segments"]  # running document index


class FeatureCache:
    """A finished cache, opened for reading."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.n_positions, self.n_documents = manifest.n_positions, manifest.n_documents
        self._firsts = [item.first for item in manifest.ranges]
        self._document_base = np.cumsum([0, *(shard.n_documents for shard in manifest.shards)]).tolist()
        self._shard_positions = manifest.windows_per_shard * manifest.context_size
        self._digests = manifest.files() if manifest.complete else {}  # a build trusts what it just wrote
        self._lengths = {item.file: {"indptr": item.last - item.first + 2} for item in manifest.ranges}
        for shard in manifest.shards:
            sizes = {"tokens": shard.n_windows * manifest.context_size, "text_ptr": shard.n_documents + 1}
            self._lengths[shard_file("tokens", shard.index)] = sizes
        allowed = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # Windows has no such limit
        self.map_file = lru_cache(MAPPED_FILES if allowed < 0 else min(MAPPED_FILES, allowed // 4))(self._map)

    def _map(self, file: str) -> dict[str, np.ndarray]:
        """Return the arrays of one file of the cache, flat. Raises: DataError for a file that is not as it was written."""
        if file in self._digests:
            layout.check_file(self.folder / file, self._digests[file])
        arrays = {name: array.ravel() for name, array in map_arrays(self.folder / file).items()}
        for name, length in self._lengths.get(file, {}).items():
            if len(arrays.get(name, ())) != length:
                raise DataError(f"{self.folder / file} does not hold {length:,} {name}, as the manifest says it does.")
        return arrays

    def __fspath__(self) -> str:  # a cache is taken wherever its path is
        return str(self.folder)

    def __repr__(self) -> str:
        made = self.manifest
        return (
            f"{self.folder}: {made.d_sae:,} latents of {made.model}, {made.hook_name}, on {self.n_positions:,} tokens of "
            f"{self.documents_read:,} documents"
        )

    def _repr_html_(self) -> str:
        return framed(repr(self), self.plot())

    def plot(self) -> Picture:
        """Return a picture of how often its latents are active; a notebook shows it."""

        def draw(axes: Any) -> None:
            density = self.statistics["density"]
            axes[0].hist(np.log10(density[density > 0]), bins=40, color=OURS)
            axes[0].set(xlabel="share of tokens on which a latent is active, log10", ylabel="latents")
            axes[0].set_title(f"{np.mean(density == 0):.1%} of the latents are never active", fontsize=10)

        return svg(draw, 1, (7.5, 3))

    @classmethod
    def open(cls, folder: str | Path, *, sae: Any = None, tokenizer: Any = None, check: bool = False) -> FeatureCache:
        """Open a cache; with `sae` or `tokenizer`, refuse one that was built with another; with `check`, verify all files.

        Raises: UsageError when `folder` is no finished cache or does not match, DataError naming a missing file, and with
        `check` a damaged one; without, a damaged file is refused when it is first read.
        """
        folder = path_of(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            raise UsageError(f"{folder} is an unfinished cache; run `sae-italian cache build` again with --resume.")
        if sae is not None:
            hook, config = hooks_of(sae)[0], manifest.sae_config_hash
            differs = {
                "weights hash differs": weights_hash(sae) != manifest.sae_hash,
                "configuration differs": config and layout.config_hash(sae) != config,
                f"hook_name is {hook!r}, the cache has {manifest.hook_name!r}": hook != manifest.hook_name,
            }
            if what := next(filter(differs.get, differs), None):
                raise UsageError(f"{folder} was built with another SAE ({manifest.sae}); its {what}.")
        cache = cls(folder, manifest)
        if tokenizer is not None:
            cache.check_tokenizer(tokenizer)
        layout.verify(folder, manifest, contents=check)
        cache.shard_tokens(0)  # whose shape must be what every position is reckoned with
        return cache

    def load_sae(self, name: str | None = None) -> Any:
        """Return the SAE it was built with: of that name, else where it was, or in `sae/` beside it, if both were moved.

        Raises: UsageError when there is none, or another.
        """
        failures = []
        for place in [name] if name else [self.manifest.sae, str(self.folder.resolve().parent / "sae")]:
            try:
                FeatureCache.open(self.folder, sae=(sae := load_sae(place)))
                return sae
            except (SaeItalianError, OSError) as error:
                failures.append(str(error))
        how = f" If it was moved: sae-italian cache build SAE --out {self.folder} --resume, with the options of then."
        raise UsageError(f"{failures[0]}{'' if name else how}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise UsageError for another tokenizer than that of the model the cache was built with."""
        if layout.tokenizer_hash(tokenizer) != self.manifest.tokenizer_hash:
            raise UsageError(f"{self.folder} was built with another tokenizer than that of the model given.")

    # --- tokens and text ---------------------------------------------------------------------------------------------

    def shard_tokens(self, shard: int) -> dict[str, np.ndarray]:
        """Return a shard's arrays, flat: tokens, doc, start, end, run, and the bytes of its documents."""
        return self.map_file(shard_file("tokens", shard))

    def shard_acts(self, shard: int) -> dict[str, np.ndarray]:
        """Return a shard's activations by token: indptr, latent, value."""
        return self.map_file(shard_file("acts", shard))

    def whole(self, name: str) -> Int[np.ndarray, " positions"]:
        """Return `tokens`, `doc`, `start`, `end` or `run` of every position."""
        # copies, because a view keeps its file open, and there may be more files than may be open
        return np.concatenate([self.shard_tokens(shard.index)[name].copy() for shard in self.manifest.shards])

    @cached_property
    def tokens(self) -> Int[np.ndarray, " positions"]:
        return self.whole("tokens")

    @cached_property
    def doc(self) -> Int[np.ndarray, " positions"]:
        """The running document index of each position, NO_DOCUMENT at special tokens."""
        return self.whole("doc")

    def by_shard(self, position: Int[np.ndarray, "n ..."]) -> Iterator[tuple[int, np.ndarray | slice, np.ndarray]]:
        """Yield (shard, where in `position`, places in the shard) for the shards that hold some of the positions.

        Positions may come in rows, each within one window.
        """
        first, last = position.min(initial=0), position.max(initial=0)
        if first < 0 or last >= self.n_positions:
            raise UsageError(f"positions of this cache are 0 to {self.n_positions - 1}, not {first} to {last}.")
        shard = position.min(axis=tuple(range(1, position.ndim))) // self._shard_positions
        order = None if (np.diff(shard) >= 0).all() else np.argsort(shard, kind="stable")  # a latent's own are in order
        shard = shard if order is None else shard[order]
        begins = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        for begin, end in pairwise([*begins, len(shard)]):
            here = slice(begin, end) if order is None else order[begin:end]
            number = int(shard[begin])
            yield number, here, position[here] - number * self._shard_positions

    def gather(self, name: str, position: Int[np.ndarray, "n ..."]) -> Int[np.ndarray, "n ..."]:
        """Return `tokens`, `doc`, `start`, `end` or `run` at some positions, reading only the shards that hold them."""
        return self.gather_all((name,), position)[0]

    def gather_all(self, names: Sequence[str], position: Int[np.ndarray, "n ..."]) -> Int[np.ndarray, "names n ..."]:
        """Return several of what `gather` does at once."""
        found = np.empty((len(names), *position.shape), dtype=np.int64)
        for shard, here, place in self.by_shard(position):
            arrays = self.shard_tokens(shard)
            for row, name in enumerate(names):
                found[row, here] = arrays[name][place]
        return found

    def _string(self, name: str, index: int) -> str:
        shard = bisect_right(self._document_base, index) - 1
        arrays, own = self.shard_tokens(shard), index - self._document_base[shard]
        begin, end = arrays[f"{name}_ptr"][own : own + 2].tolist()
        return arrays[name][begin:end].tobytes().decode("utf-8", "surrogatepass")

    def document(self, index: int) -> TextDocument:
        if not (isinstance(index, Integral) and 0 <= index < self.n_documents):
            raise UsageError(f"document {index!r} does not exist: this cache has 0 to {self.n_documents - 1}.")
        return TextDocument(*(self._string(name, index) for name in ("text", "doc_id", "source")))

    @cached_property
    def documents_read(self) -> int:
        """How many documents have a token here: neither empty ones, nor what the last window cut off."""
        read = [np.unique(self.shard_tokens(shard.index)["doc"]) for shard in self.manifest.shards]
        return len(np.setdiff1d(np.concatenate([[NO_DOCUMENT], *read]), NO_DOCUMENT))

    def document_parts(self, seed: int = 0) -> Int[np.ndarray, " documents"]:
        """Return 0, 1 or 2 (train, val, test) per document, by a seeded hash of its text: copies fall on the same side.

        The division is the same for everything that reads the cache.
        """
        salt = int(seed).to_bytes(8, "little")
        draws = np.empty(self.n_documents)
        for index in range(self.n_documents):
            text = self._string("text", index).encode("utf-8", "surrogatepass")
            draws[index] = int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=salt).digest(), "big") / 2**64
        return np.searchsorted(np.cumsum(SHARES)[:-1], draws, side="right").astype(np.int8)

    def segments(self, width: int = 32) -> Segments:
        """Cut all windows at document boundaries and every `width` tokens; special tokens belong to no segment."""
        check_whole(1, width=width)
        in_run = np.arange(self.n_positions) % self.manifest.context_size - self.whole("run")
        start = np.flatnonzero(in_run % width == 0)
        length = np.diff(np.append(start, self.n_positions))
        keep = self.doc[start] != NO_DOCUMENT
        return Segments(start[keep], length[keep], self.doc[start[keep]])

    def spans(self, first: int, last: int) -> tuple[str, Int[np.ndarray, "tokens 2"]]:
        """Return the text that positions first to last (exclusive, one document) cover, and each token's span in it."""
        shard, place = divmod(int(first), self._shard_positions)
        arrays, here = self.shard_tokens(shard), slice(place, place + int(last) - int(first))
        spans = np.stack([arrays["start"][here], arrays["end"][here]], axis=1).astype(np.int64)
        begin = int(spans[0, 0])
        text = self._string("text", int(arrays["doc"][place]))[begin : int(spans[:, 1].max(initial=0))]
        return text, spans - begin

    # --- latents -----------------------------------------------------------------------------------------------------

    def range_of(self, latent: int) -> LatentRange:
        """Return the range of latents that holds one. Raises: UsageError when there is no such latent."""
        if not (isinstance(latent, Integral) and 0 <= latent < self.manifest.d_sae):
            raise UsageError(f"latent {latent!r} does not exist: this SAE has latents 0 to {self.manifest.d_sae - 1}.")
        return self.manifest.ranges[bisect_right(self._firsts, latent) - 1]

    def latent(self, latent: int) -> LatentActivations:
        """Return one latent's activations. Raises: UsageError when there is no such latent."""
        item = self.range_of(latent)
        arrays = self.map_file(item.file)
        begin, end = arrays["indptr"][latent - item.first : latent - item.first + 2].tolist()
        position = arrays["position"][begin:end].astype(np.int64)
        return LatentActivations(self, latent, position, full_values(arrays, begin, end))

    def entries(self, first: int, last: int) -> Iterator[tuple[int, Csr]]:
        """Yield, file by file, the activations [latents, positions] of latents first to last, and the first of them."""
        for item in self.manifest.ranges:
            begin, end = max(first, item.first), min(last, item.last)
            if begin <= end:
                arrays = self._map(item.file)
                indptr = arrays["indptr"][begin - item.first : end - item.first + 2].astype(np.int64)
                low, high = indptr[[0, -1]].tolist()
                found = full_values(arrays, low, high), arrays["position"][low:high], indptr - low
                yield begin, csr_array(found, (end - begin + 1, self.n_positions))

    @cached_property
    def table(self) -> Any:
        """The statistics as a pyarrow table, row i for latent i (see cache/stats.py for the columns)."""
        layout.check_file(self.folder / STATS, self.manifest.stats_sha256)
        return pyarrow.parquet.read_table(self.folder / STATS).combine_chunks()

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """The table of statistics, column by column; row i is latent i."""
        return {name: self.table[name].to_numpy() for name in self.table.column_names}

"""Read a feature cache: one latent's activations, true text by character offsets, documents and statistics."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from sae_italian.cache.layout import STATS, Manifest, tokens_file, verify
from sae_italian.corpora.documents import TextDocument
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.errors import DataError, UsageError


class LatentActivations(NamedTuple):
    """The non-zero activations of one latent, in corpus order."""

    position: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]


class Segments(NamedTuple):
    """Stretches of consecutive tokens of one document inside one window, at most `width` tokens long."""

    start: Int[np.ndarray, " segments"]  # position of the first token
    length: Int[np.ndarray, " segments"]
    doc: Int[np.ndarray, " segments"]  # running document index


class FeatureCache:
    """A finished cache, opened for reading. Token arrays are loaded once; activations are read latent by latent."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, *, sae: Any = None, tokenizer: Any = None, check: bool = False) -> FeatureCache:
        """Open a cache; with `sae` or `tokenizer`, refuse one that was built with another; with `check`, verify all files.

        Raises: UsageError when `folder` is no finished cache or does not match, DataError naming a damaged file.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            raise UsageError(f"{folder} is an unfinished cache; run `sae-italian cache build` again with --resume.")
        if sae is not None:
            from sae_italian.saes import weights_hash

            if weights_hash(sae) != manifest.sae_hash:
                raise UsageError(f"{folder} was built with another SAE ({manifest.sae}); its weights hash differs.")
        if tokenizer is not None:
            from sae_italian.cache.build import tokenizer_hash

            if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
                raise UsageError(f"{folder} was built with another tokenizer than that of the model given.")
        if check:
            verify(folder, manifest)
        return cls(folder, manifest)

    # --- tokens and text ---------------------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> dict[str, np.ndarray]:
        """Flat arrays over all positions, and the documents' bytes with global pointers."""
        parts: dict[str, list[np.ndarray]] = {}
        for shard in self.manifest.shards:
            arrays = self._load(tokens_file(shard.index))
            for name, array in arrays.items():
                if name.endswith("_ptr"):
                    base = parts[name][-1][-1] if name in parts else np.uint64(0)
                    array = array[0 if name not in parts else 1 :] + base
                parts.setdefault(name, []).append(array.ravel())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _load(self, file: str) -> dict[str, np.ndarray]:
        try:
            with safe_open(self.folder / file, framework="numpy") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.folder / file} cannot be read ({error}). Build the cache again.") from error

    @property
    def tokens(self) -> Int[np.ndarray, " positions"]:
        return self._tokens["tokens"]

    @property
    def doc(self) -> Int[np.ndarray, " positions"]:
        """The running document index of each position, NO_DOCUMENT at special tokens."""
        return self._tokens["doc"]

    @property
    def char_start(self) -> Int[np.ndarray, " positions"]:
        return self._tokens["start"]

    @property
    def char_end(self) -> Int[np.ndarray, " positions"]:
        return self._tokens["end"]

    @property
    def n_positions(self) -> int:
        return self.manifest.n_windows * self.manifest.context_size

    @property
    def n_documents(self) -> int:
        return self.manifest.n_documents

    def _string(self, name: str, index: int) -> str:
        pointers = self._tokens[f"{name}_ptr"]
        data = self._tokens[name][int(pointers[index]) : int(pointers[index + 1])]
        return data.tobytes().decode("utf-8", "surrogatepass")

    def document(self, index: int) -> TextDocument:
        return TextDocument(*(self._string(name, index) for name in ("text", "doc_id", "source")))

    def segments(self, width: int = 32) -> Segments:
        """Cut all windows at document boundaries and every `width` tokens; special tokens belong to no segment."""
        doc = self.doc
        context = self.manifest.context_size
        new_run = np.ones(len(doc), dtype=bool)
        new_run[1:] = (doc[1:] != doc[:-1]) | (np.arange(1, len(doc)) % context == 0)
        run_start = np.flatnonzero(new_run)
        in_run = np.arange(len(doc)) - np.repeat(run_start, np.diff(np.append(run_start, len(doc))))
        start = np.flatnonzero(in_run % width == 0)
        length = np.diff(np.append(start, len(doc)))
        keep = doc[start] != NO_DOCUMENT
        return Segments(start[keep], length[keep], doc[start[keep]])

    def spans(self, first: int, last: int) -> tuple[str, Int[np.ndarray, "tokens 2"]]:
        """Return the text that positions first to last (exclusive, one document) cover, and each token's span in it."""
        doc = int(self.doc[first])
        start = self.char_start[first:last].astype(np.int64)
        end = self.char_end[first:last].astype(np.int64)
        text = self._string("text", doc)[start[0] : end.max(initial=0)]
        return text, np.stack([start, end], axis=1) - start[0]

    # --- latents -----------------------------------------------------------------------------------------------------

    def latent(self, latent: int) -> LatentActivations:
        """Return one latent's activations. Raises: UsageError when there is no such latent."""
        if not 0 <= latent < self.manifest.d_sae:
            raise UsageError(f"latent {latent} does not exist: this SAE has latents 0 to {self.manifest.d_sae - 1}.")
        item = next(item for item in self.manifest.ranges if item.first <= latent <= item.last)
        try:
            with safe_open(self.folder / item.file, framework="numpy") as handle:
                indptr = handle.get_slice("indptr")[latent - item.first : latent - item.first + 2]
                here = slice(int(indptr[0]), int(indptr[1]))
                if here.start == here.stop:
                    return LatentActivations(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
                position = handle.get_slice("position")[here].astype(np.int64)
                return LatentActivations(position, handle.get_slice("value")[here].astype(np.float32))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.folder / item.file} cannot be read ({error}). Build the cache again.") from error

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """The table of statistics, column by column; row i is latent i (see cache/stats.py for the columns)."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.folder / STATS)
        return {name: table[name].to_numpy() for name in table.column_names}

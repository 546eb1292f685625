"""Windows on disk: a corpus as packed tokens, in the layout of SAELens' PretokenizeRunner, and the text that they came from.

    data-00000.arrow         `input_ids`, one window a row: with state.json and dataset_info.json a saved `datasets` folder
    spans-00000.npy          uint32 [3, windows, context]: document index, first and last character of every token
    documents-00000.parquet  id, source and text of the documents that begin in this shard
    sae_lens.json            SAELens' description of how the tokens were made
    progress.json            the finished shards, the position in the corpus and the window that is being filled

A shard counts once progress.json names it; a run that stops, on a full disk too, goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from sae_italian.base import pace, storage
from sae_italian.base.errors import DataError, UsageError, check_whole
from sae_italian.corpora.packing import PackedBlock, Packer, layout_of, tokenised
from sae_italian.corpora.rows import PRETOKENIZED
from sae_italian.corpora.stream import CorpusStream, DocumentCounts, Reader, TextDocument, check_ends

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SAELENS_FILE = "sae_lens.json"
TOKENS = "token_ids"  # a column of cached activations


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary: what two tokenizers must share to read each other's tokens."""
    return storage.fingerprint(tokenizer.get_vocab())


def pretokenize(
    corpus: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    context_size: int,
    reader: Reader | None = None,
    n_tokens: int | None = None,
    prepend_bos: bool = True,
    separator: str | int | None = "bos",
    windows_per_shard: int = 16_384,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the packed tokens of a corpus into the folder `out` and return it; the split is `train` unless `reader` says.

    Stops after `n_tokens` (rounded up to whole windows) or at the end of the corpus. The files are the same however
    often the run was interrupted.

    Raises: UsageError for settings that cannot work, a folder that holds something else, a corpus without one full
    window, and a full disk, in which case the finished shards are kept and `resume=True` goes on.
    """
    out = storage.path_of(out)
    check_whole(1, n_tokens=n_tokens, windows_per_shard=windows_per_shard)
    check_ends(corpus, n_tokens, "say how many tokens (--tokens)")
    stream = CorpusStream(corpus, reader or Reader(split="train"))
    packer = Packer(context_size, layout_of(tokenizer, prepend_bos=prepend_bos, separator=separator))
    spec = {
        "corpus": stream.spec(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "context_size": context_size,
        "layout": packer.layout._asdict(),
        "n_tokens": n_tokens,
        "windows_per_shard": windows_per_shard,
    }
    with storage.claimed(out, "pretokenize", spec, resume=resume, overwrite=overwrite):
        shards = _write(out, stream, packer, tokenizer, windows_per_shard, n_tokens)
        described = {
            "begin_batch_token": "bos" if prepend_bos else None,
            "context_size": context_size,
            "sequence_separator_token": separator,
        }
        _describe(out, stream, tokenizer.name_or_path, shards, described)
    return out


def _write(
    out: Path, stream: CorpusStream, packer: Packer, tokenizer: Any, windows_per_shard: int, n_tokens: int | None
) -> list[dict[str, int]]:
    """Write what is left of the corpus, shard after shard, and return the shards; progress.json is the whole state.

    seen-<shard>.npz is what duplicate removal remembered when the last shard was finished.
    Raises: UsageError when the corpus does not fill one window.
    """
    progress: dict[str, Any] = {"shards": [], "finished": False}
    if (out / PRETOKENIZED).is_file():
        with storage.understood(out / PRETOKENIZED, "Start again with --overwrite."):
            progress = storage.read_json(out / PRETOKENIZED)
            stream.load_state(progress["position"])
            packer.load(progress["packer"])
        if progress["shards"] and stream.sieve.blooms and not progress["finished"]:
            stream.sieve.load(out / f"seen-{len(progress['shards']) - 1:05d}.npz")
    shards: list[dict[str, int]] = progress["shards"]
    wanted = float("inf") if n_tokens is None else -(-n_tokens // packer.context_size)
    batches, finished = tokenised(stream, tokenizer), progress["finished"]
    with pace.progress("pretokenize", unit=" windows") as bar:
        while not finished:
            batch, number = next(batches, None), len(shards)
            if batch is not None:
                packer.add(*batch)
            left = wanted - sum(shard["windows"] for shard in shards)
            n_windows = int(min(packer.n_windows, left))
            finished = batch is None or n_windows == left
            if not finished and n_windows < windows_per_shard:
                continue
            with storage.disk_errors(out, f"{number} finished shards are kept."):
                if n_windows:
                    shards.append(_write_block(out, number, packer.take(n_windows)))
                    if stream.sieve.blooms:
                        with storage.atomic_path(out / f"seen-{number:05d}.npz") as temporary:
                            stream.sieve.save(temporary)
                    bar.update(n_windows)
                progress = {"context_size": packer.context_size, "finished": finished, "updated": storage.utc_now()}
                position = {"shards": shards, "position": stream.state(), "packer": packer.state()}
                storage.write_json(out / PRETOKENIZED, progress | position)
                (out / f"seen-{number - 1:05d}.npz").unlink(missing_ok=True)
    if not shards:
        storage.remove(out / PRETOKENIZED)  # else the folder takes no longer text or smaller context
        raise UsageError(
            f"corpus {stream.corpus!r} does not fill one window of {packer.context_size} tokens. "
            f"{stream.counts.kept:,} documents were kept; use a longer text or a smaller context."
        )
    return shards


def _describe(
    out: Path, stream: CorpusStream, tokenizer_name: str, shards: list[dict[str, int]], described: dict[str, Any]
) -> None:
    """Write what makes the folder a dataset for `datasets` and for SAELens; state.json comes last."""
    from sae_lens.pretokenize_runner import PretokenizeRunnerConfig, metadata_from_config

    reader, names = stream.reader, {"tokenizer_name": tokenizer_name, "dataset_path": stream.corpus}
    config = PretokenizeRunnerConfig(**names, split=reader.split, shuffle=False, seed=reader.seed, **described)
    info = {"citation": "", "description": "", "features": _features().to_dict(), "homepage": "", "license": ""}
    files = [{"filename": f"data-{i:05d}.arrow"} for i in range(len(shards))]
    state = {"_data_files": files, "_fingerprint": storage.fingerprint(shards), "_format_columns": ["input_ids"]}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    storage.write_json(out / SAELENS_FILE, metadata_from_config(config).__dict__)
    storage.write_json(out / "counts.json", stream.counts.as_dict())
    storage.write_json(out / "dataset_info.json", info)
    storage.write_json(out / "state.json", state)


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32"))})


def _write_block(out: Path, number: int, block: PackedBlock) -> dict[str, int]:
    """Write the three files of a shard, and return what is to be known of it.

    The tokens are an Arrow stream that `datasets` maps, a list of int32 a row.
    """
    import pyarrow.parquet as pq

    offsets = np.arange(len(block.tokens) + 1, dtype=np.int32) * block.tokens.shape[1]
    lists = pa.ListArray.from_arrays(offsets, pa.array(block.tokens.astype(np.int32).ravel()))
    table = pa.Table.from_arrays([lists], schema=_features().arrow_schema)
    with (
        storage.atomic_path(out / f"data-{number:05d}.arrow") as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=1024)
    with storage.atomic_path(out / f"spans-{number:05d}.npy") as temporary, temporary.open("wb") as handle:
        np.save(handle, np.stack([block.doc, block.start, block.end]).astype(np.uint32))
    columns = {key: pa.array([getattr(d, key) for d in block.documents], pa.string()) for key in TextDocument._fields}
    with storage.atomic_path(out / f"documents-{number:05d}.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd", row_group_size=1024)
    return {"windows": len(block.tokens), "documents": len(block.documents), "first_document": block.first_doc}


def is_pretokenized(corpus: str | Path) -> bool:
    """Return whether a path is a folder of packed tokens: ours, finished or not, or SAELens' own."""
    return any((storage.path_of(corpus) / name).is_file() for name in (PRETOKENIZED, SAELENS_FILE))


class MappedWindows:
    """Windows of tokens in a saved `datasets` folder, memory-mapped: read from disk when they are asked for."""

    column = "input_ids"
    context_size: int
    table: Any  # of `datasets`, as numpy arrays

    def __len__(self) -> int:
        return len(self.table)

    def windows(self, start: int, stop: int) -> Int[np.ndarray, "windows context"]:
        """Return the tokens of windows [start, stop), as int64."""
        return np.asarray(self.table[start:stop][self.column], np.int64).reshape(-1, self.context_size)

    def blocks(self, windows_per_block: int, first_block: int = 0) -> Iterator[Int[np.ndarray, "windows context"]]:
        """Yield blocks of tokens, as `pack` makes them, from a block on, the last block shorter."""
        for start in range(first_block * windows_per_block, len(self), windows_per_block):
            yield self.windows(start, start + windows_per_block)


class PretokenizedCorpus(MappedWindows):
    """A folder of packed tokens.

    SAELens' own folders, as its PretokenizeRunner saves them, hold no documents and no split of ours: all of their text
    counts as training text.
    Raises: DataError when it is not finished, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        from datasets import load_from_disk

        self.folder = storage.path_of(folder)
        if not (self.folder / "state.json").is_file():
            raise DataError(f"{folder} is not finished: run the same `corpora pretokenize` with --resume.")
        with storage.understood(self.folder, "Make the folder again.", OSError, pa.ArrowException):
            metadata = storage.read_json(self.folder / SAELENS_FILE)
            self.context_size, self.made_with = metadata["context_size"], Path(metadata["tokenizer_name"]).name
            self.table = load_from_disk(self.folder).with_format("numpy", columns=["input_ids"])
            self.windows(0, min(1, len(self.table)))
            self.split, self.tokenizer, said = "train", "", len(self)
            if (self.folder / PRETOKENIZED).is_file():
                spec = storage.record_in(self.folder)["spec"]
                self.split, self.tokenizer = spec["corpus"]["split"], spec["tokenizer"]
                said = sum(shard["windows"] for shard in storage.read_json(self.folder / PRETOKENIZED)["shards"])
            if said != len(self):
                raise DataError(f"{folder} holds {len(self)} windows; it had {said}. Make the folder again.")

    def is_made_for(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the tokens are this tokenizer's; of SAELens' folders only its name is known."""
        if self.tokenizer:
            return self.tokenizer == tokenizer_fingerprint(tokenizer)
        return self.made_with == Path(tokenizer.name_or_path).name

    @property
    def counts(self) -> DocumentCounts:
        """What a folder of ours kept and dropped."""
        with storage.understood(self.folder / "counts.json", "Make the folder again."):
            return DocumentCounts(storage.read_json(self.folder / "counts.json"))


# --- SAELens' cached activations ---------------------------------------------------------------------------------------


def holds_activations(folder: str | Path) -> bool:
    """Return whether a path is a folder that CacheActivationsRunner wrote."""
    file = storage.path_of(folder) / "dataset_info.json"
    with storage.understood(file):
        return file.is_file() and TOKENS in (storage.read_json(file).get("features") or {})


class CachedActivations(MappedWindows):
    """Activations that SAELens' CacheActivationsRunner kept on disk, read in place of a model's forward pass.

    A row for each window, with a column named after the hook, [context, d_in], and one of tokens, [context]. It knows no
    documents, and has no held-out split of ours.

    Raises: UsageError for a folder that holds none, or those of other hooks, windows (of `context_size` tokens, where it is
    given) or widths.
    """

    column = TOKENS

    def __init__(self, folder: str | Path, hook_names: Sequence[str], d_in: int, context_size: int | None = None):
        from datasets import load_from_disk

        where, made = f"cached_activations_path {str(folder)!r}", "SAELens' CacheActivationsRunner makes them."
        try:
            rows: Any = load_from_disk(storage.path_of(folder).resolve())  # a worker may be elsewhere
        except Exception as error:  # of datasets, Arrow, JSON and the system
            why = " ".join(str(error).split())
            raise UsageError(f"{where} holds no activations ({why:.200}). {made}") from error
        for name in (TOKENS, *hook_names):
            if name not in rows.column_names:
                found = ", ".join(map(str, rows.column_names))
                raise UsageError(f"{where} has no {name!r}, only {found}. {made}")
        for name in hook_names:
            if not (shape := getattr(rows.features[name], "shape", None)):
                raise UsageError(f"{where} holds {name!r} as lists without a shape. {made}")
            context_size = context_size or shape[0]
            if tuple(shape) != (context_size, d_in):
                raise UsageError(
                    f"{where} has windows of {shape[0]} tokens and {shape[1]} dimensions at {name}; context_size is "
                    f"{context_size}, the model has {d_in}. Set context_size to that, or take its model."
                )
        self.context_size: Any = context_size
        self.rows: Any = rows.with_format("numpy")
        self.table = rows.with_format("numpy", columns=[TOKENS])
        self.identity = rows._fingerprint  # of datasets: it changes with every change of the rows

    def read(self, hook_name: str, start: int, n_windows: int) -> Tensor:
        """Return the activations of some windows, [windows, context, d_in]."""
        import torch

        return torch.from_numpy(np.array(self.rows[start : start + n_windows][hook_name]))

"""A corpus as packed tokens on disk, in the layout of SAELens' PretokenizeRunner, and the text that the tokens came from.

    data-00000.arrow         `input_ids`, one window a row: with state.json and dataset_info.json a saved `datasets` folder
    spans-00000.npy          uint32 [3, windows, context]: document index, first and last character of every token
    documents-00000.parquet  id, source and text of the documents that begin in this shard
    sae_lens.json            SAELens' description of how the tokens were made
    progress.json            the finished shards, the position in the corpus and the window that is being filled

A shard counts once progress.json names it; a run that stops, on a full disk too, goes on after the last one.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import atomic_path, claim_folder, fingerprint, read_json, utc_now, write_json
from sae_italian.corpora.counts import Counts
from sae_italian.corpora.locate import PRETOKENIZED
from sae_italian.corpora.packing import Layout, PackedBlock, Packer, batched, check_context, layout_of
from sae_italian.corpora.parallel import BATCHES_AHEAD, tokenise_batches
from sae_italian.corpora.stream import CorpusStream, Reader, TextDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "pretokenize"
DOCUMENTS_PER_BATCH = 128
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary: what two tokenizers must share to read each other's tokens."""
    return fingerprint(tokenizer.get_vocab())


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
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the packed tokens of a corpus into the folder `out` and return it; the split is `train` unless `reader` says.

    Stops after `n_tokens` (rounded up to whole windows) or at the end of the corpus. The files are the same however
    often the run was interrupted, and whatever `workers`.

    Raises: UsageError for settings that cannot work, a folder that holds something else, a corpus without one full
    window, and a full disk, in which case the finished shards are kept and `resume=True` goes on.
    """
    out = Path(out)
    check_context(context_size)
    _check_sizes(n_tokens, windows_per_shard, corpus)
    stream = CorpusStream(corpus, reader or Reader(split="train"))
    layout = layout_of(tokenizer, prepend_bos=prepend_bos, separator=separator)
    spec = {
        "corpus": stream.spec(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "context_size": context_size,
        "layout": layout._asdict(),
        "n_tokens": n_tokens,
        "windows_per_shard": windows_per_shard,
    }
    continuing = claim_folder(out, KIND, spec, resume=resume, overwrite=overwrite)
    run = _Writer(out, stream, Packer(context_size, layout), windows_per_shard, n_tokens)
    if continuing:
        run.load()
    if not run.finished:
        run.write(tokenizer, workers)
    _finish(run, tokenizer, str(corpus), prepend_bos, separator)
    return out


def _check_sizes(n_tokens: int | None, windows_per_shard: int, corpus: str | Path) -> None:
    for name, value in (("n_tokens", n_tokens), ("windows_per_shard", windows_per_shard)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more.")
    if n_tokens is None and "micro-italiano" in str(corpus):
        raise UsageError("micro-italiano has no end: say how many tokens (--tokens).")


class _Writer:
    """Writes shard after shard; its whole state is in progress.json."""

    def __init__(self, out: Path, stream: CorpusStream, packer: Packer, windows_per_shard: int, n_tokens: int | None):
        self.out, self.stream, self.packer = out, stream, packer
        self.windows_per_shard = windows_per_shard
        self.n_windows = None if n_tokens is None else -(-n_tokens // packer.context_size)
        self.shards: list[dict[str, int]] = []
        self.finished = False
        self.pending: dict[int, dict[str, Any]] = {}  # positions after the batches read but not packed, by batch

    def load(self) -> None:
        file = self.out / PRETOKENIZED
        if not file.is_file():
            return  # stopped before the first shard
        progress = read_json(file)
        self.shards, self.finished = progress["shards"], progress["finished"]
        self.stream.load_state(progress["position"])
        if self.shards and self.stream.sieve.remembers:
            self.stream.sieve.load(self.out / f"seen-{len(self.shards) - 1:05d}.npz")
        self.packer.load(progress["packer"])

    def write(self, tokenizer: PreTrainedTokenizerBase, workers: int) -> None:
        bar = tqdm(desc="pretokenize", unit="tok", unit_scale=True, disable=None, initial=self._written())
        per_batch = DOCUMENTS_PER_BATCH * (4 if workers > 1 else 1)
        # What duplicate removal remembers cannot be taken back, so then nothing is read ahead of what is written.
        workers = 1 if self.stream.sieve.remembers else workers
        batches = self._positioned(batched(self.stream, per_batch))
        with bar:
            for number, (batch, tokens) in enumerate(tokenise_batches(batches, tokenizer, workers)):
                self.packer.add(batch, tokens)
                position = self.pending.pop(number)
                if self._enough() or self.packer.n_windows >= self.windows_per_shard:
                    bar.update(self._write_shard(position, finished=self._enough()))
                if self.finished:
                    return
            self._write_shard(
                {"source": self.stream.source.state(), "counts": self.stream.counts.as_dict()}, finished=True
            )

    def _positioned(self, batches: Iterator[list[TextDocument]]) -> Iterator[list[TextDocument]]:
        """Note the position after each batch; some are read ahead of the one that is packed."""
        for number, batch in enumerate(batches):
            self.pending[number] = self.stream.state()
            assert len(self.pending) <= BATCHES_AHEAD * 64
            yield batch

    def _written(self) -> int:
        return sum(shard["windows"] for shard in self.shards) * self.packer.context_size

    def _enough(self) -> bool:
        if self.n_windows is None:
            return False
        return sum(shard["windows"] for shard in self.shards) + self.packer.n_windows >= self.n_windows

    def _write_shard(self, position: dict[str, Any], *, finished: bool) -> int:
        """Write the full windows as the next shard, then the progress; return the tokens written."""
        number, before = len(self.shards), sum(shard["windows"] for shard in self.shards)
        n_windows = self.packer.n_windows
        if self.n_windows is not None:
            n_windows = min(n_windows, self.n_windows - before)
        with _full_disk(self.out, number):
            if n_windows:
                block = self.packer.take(n_windows)
                _write_arrow(self.out / f"data-{number:05d}.arrow", block.tokens)
                with atomic_path(self.out / f"spans-{number:05d}.npy") as temporary, temporary.open("wb") as handle:
                    np.save(handle, np.stack([block.doc, block.start, block.end]).astype(np.uint32))
                _write_documents(self.out / f"documents-{number:05d}.parquet", block)
                shard = {"windows": n_windows, "documents": len(block.documents), "first_document": block.first_doc}
                self.shards.append(shard)
                if self.stream.sieve.remembers:
                    with atomic_path(self.out / f"seen-{number:05d}.npz") as temporary:
                        self.stream.sieve.save(temporary)
            self.finished = finished
            write_json(self.out / PRETOKENIZED, self._progress(position))
        (self.out / f"seen-{number - 1:05d}.npz").unlink(missing_ok=True)
        return n_windows * self.packer.context_size

    def _progress(self, position: dict[str, Any]) -> dict[str, Any]:
        context = {"context_size": self.packer.context_size, "finished": self.finished, "updated": utc_now()}
        return {**context, "shards": self.shards, "position": position, "packer": self.packer.state()}


@contextmanager
def _full_disk(out: Path, n_shards: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UsageError(
            f"the disk of {out} is full ({error.strerror}). {n_shards} finished shards are kept: "
            "make room, then run the same command with --resume."
        ) from error


def _write_arrow(path: Path, tokens: np.ndarray) -> None:
    """Write windows [windows, context] as an Arrow stream that `datasets` maps: a list of int32 a row."""
    import pyarrow as pa

    values = pa.array(tokens.astype(np.int32).ravel())
    offsets = pa.array(np.arange(len(tokens) + 1, dtype=np.int32) * tokens.shape[1])
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)})
    info = {"info": {"features": _features()}, "fingerprint": fingerprint(path.name)}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=1024)


def _features() -> dict[str, Any]:
    from datasets import Features, List, Value

    return dict(Features({"input_ids": List(Value("int32"))}).to_dict())  # pyright: ignore[reportArgumentType, reportCallIssue]


def _write_documents(path: Path, block: PackedBlock) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array([getattr(d, name) for d in block.documents], pa.string()) for name in TextDocument._fields
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd", row_group_size=1024)


def _finish(run: _Writer, tokenizer: Any, corpus: str, prepend_bos: bool, separator: str | int | None) -> None:
    """Write what makes the folder a dataset for `datasets` and for SAELens; state.json comes last."""
    from sae_lens import __version__ as sae_lens_version
    from sae_lens.pretokenize_runner import PretokenizedDatasetMetadata

    if not run.shards:
        raise UsageError(
            f"corpus {corpus!r} does not fill one window of {run.packer.context_size} tokens. {run.stream.counts.kept:,} "
            "documents were kept; use a longer text or a smaller context."
        )
    metadata = PretokenizedDatasetMetadata(
        sae_lens_version=sae_lens_version,
        tokenizer_name=tokenizer.name_or_path,
        original_dataset=corpus,
        original_dataset_name=None,
        original_split=run.stream.reader.split,
        original_data_files=None,
        original_column_name="text",
        context_size=run.packer.context_size,
        shuffled=False,
        seed=run.stream.reader.seed,
        begin_batch_token="bos" if prepend_bos else None,
        begin_sequence_token=None,
        sequence_separator_token=separator,  # pyright: ignore[reportArgumentType]
        disable_concat_sequences=False,
    )
    with _full_disk(run.out, len(run.shards)):
        write_json(run.out / "sae_lens.json", metadata.__dict__)
        write_json(run.out / "counts.json", read_json(run.out / PRETOKENIZED)["position"]["counts"])
        write_json(
            run.out / "dataset_info.json",
            {"citation": "", "description": "", "features": _features(), "homepage": "", "license": ""},
        )
        names = [{"filename": f"data-{i:05d}.arrow"} for i in range(len(run.shards))]
        state = {"_data_files": names, "_fingerprint": fingerprint(run.shards), "_format_columns": ["input_ids"]}
        state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
        write_json(run.out / "state.json", state)


def read_counts(folder: Path) -> Counts:
    """Return what a finished pretokenised folder kept and dropped."""
    counts = Counts()
    counts.load(read_json(folder / "counts.json"))
    return counts


def is_pretokenized(corpus: str | Path) -> bool:
    return (Path(corpus).expanduser() / PRETOKENIZED).is_file()


class PretokenizedCorpus:
    """A finished folder of `pretokenize`, memory-mapped: windows are read from disk when they are asked for.

    Raises: DataError when the folder is not finished or a file is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not is_pretokenized(self.folder):
            raise UsageError(f"{folder} holds no pretokenised corpus; make one with `sae-italian corpora pretokenize`.")
        progress, spec = read_json(self.folder / PRETOKENIZED), read_json(self.folder / "run.json")["spec"]
        if not progress["finished"] or not (self.folder / "state.json").is_file():
            raise DataError(f"{folder} is not finished: run the same `corpora pretokenize` with --resume.")
        self.context_size: int = progress["context_size"]
        self.shards: list[dict[str, int]] = progress["shards"]
        self.split: str = spec["corpus"]["split"]
        self.tokenizer: str = spec["tokenizer"]
        self.layout = Layout(**spec["layout"])
        self.tokens = [self._map_tokens(i, shard["windows"]) for i, shard in enumerate(self.shards)]
        self.first = np.cumsum([0, *(shard["windows"] for shard in self.shards)])  # [shards + 1]: first window of each

    def __len__(self) -> int:
        return int(self.first[-1])

    def _map_tokens(self, number: int, n_windows: int) -> list[np.ndarray]:
        """Return the record batches of a shard as views [windows, context] of the mapped file."""
        import pyarrow as pa

        path = self.folder / f"data-{number:05d}.arrow"
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                batches = [batch.column(0).flatten().to_numpy(zero_copy_only=True) for batch in stream]
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{path} cannot be read ({' '.join(str(error).split())}). Make the folder again."
            ) from error
        views = [values.reshape(-1, self.context_size) for values in batches]
        found = sum(len(view) for view in views)
        if found != n_windows:
            raise DataError(f"{path} holds {found} windows, progress.json says {n_windows}. Make the folder again.")
        return views

    def windows(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [windows, context] of windows [start, stop), as int64."""
        parts, position = [], 0
        for view in (view for shard in self.tokens for view in shard):
            a, b = max(start - position, 0), min(stop - position, len(view))
            if a < b:
                parts.append(view[a:b])
            position += len(view)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty((0, self.context_size), np.int64)

    def blocks(self, windows_per_block: int, first_block: int = 0) -> Iterator[np.ndarray]:
        """Yield tokens [windows, context] from a block on, the last block shorter."""
        for start in range(first_block * windows_per_block, len(self), windows_per_block):
            yield self.windows(start, min(start + windows_per_block, len(self)))

    def spans(self, window: int) -> np.ndarray:
        """Return document index, first and last character [3, context] of the tokens of one window."""
        shard = int(np.searchsorted(self.first, window, side="right")) - 1
        array = np.load(self.folder / f"spans-{shard:05d}.npy", mmap_mode="r")
        return np.asarray(array[:, window - self.first[shard]])

    def document(self, index: int) -> TextDocument:
        """Return a document by its running index."""
        import pyarrow.parquet as pq

        firsts = [shard["first_document"] for shard in self.shards]
        shard = int(np.searchsorted(firsts, index, side="right")) - 1
        while self.shards[shard]["documents"] == 0:
            shard -= 1
        table = pq.read_table(self.folder / f"documents-{shard:05d}.parquet").slice(index - firsts[shard], 1)
        return TextDocument(**table.to_pylist()[0])

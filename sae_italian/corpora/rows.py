"""Rows of one file, local or on the hub, from any row on: txt, jsonl, csv, conllu (plain, gzip, zstandard), parquet, arrow.

Memory is bounded: a line longer than the limit is never held, a parquet file is read by row groups, a file of the hub by
blocks. A row is numbered by its place among the rows of its file, dropped ones included, so (file, row) is a position.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sae_italian.base.errors import DataError, nearest
from sae_italian.corpora import hub

ROWS_PER_BATCH = 256
DROPPED = {
    "empty": "no text, or white space only",
    "not_text": "the text column holds no string",
    "broken_json": "a line is not a JSON object",
    "broken_csv": "a line is not CSV",
    "too_long": "longer than the limit for one document",
    "other_schema": "a shard without the text column, or with another type in it",
    "truncated_shard": "a shard ends in the middle of its compression; the rows before are kept",
    "broken_shard": "a shard cannot be read; the rows before are kept",
    "shard_gone": "a shard disappeared while it was read; the rows before are kept",
    "too_short": "shorter than the minimum",
    "not_italian": "another language",
    "duplicate": "the same text came before",
    "near_duplicate": "nearly the same text came before",
    "other_split": "belongs to the other split (training or held out)",
}
WHOLE_SHARDS = {"other_schema", "truncated_shard", "broken_shard", "shard_gone"}
MENDED = {
    "broken_utf8": "bytes that are not UTF-8, replaced by U+FFFD",
    "nul_bytes": "NUL characters, removed",
}


class Counts:
    """Documents read and kept, characters kept; documents (or shards) dropped by reason; documents mended."""

    def __init__(self) -> None:
        self.read = self.kept = self.characters = 0
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()

    def drop(self, reason: str) -> None:
        """Count a document, or a shard, that is dropped for a reason of DROPPED."""
        self.read += reason not in WHOLE_SHARDS
        self.dropped[reason] += 1

    def keep(self, text: str) -> None:
        self.read += 1
        self.kept += 1
        self.characters += len(text)

    def as_dict(self) -> dict[str, Any]:
        totals = {"read": self.read, "kept": self.kept, "characters": self.characters}
        return {**totals, "dropped": dict(sorted(self.dropped.items())), "mended": dict(sorted(self.mended.items()))}

    def load(self, state: dict[str, Any]) -> Counts:
        """Go on from what `as_dict` returned."""
        self.read, self.kept, self.characters = state["read"], state["kept"], state["characters"]
        self.dropped, self.mended = Counter(state["dropped"]), Counter(state["mended"])
        return self

    def lines(self) -> str:
        """Return one line a count, with what each reason means."""
        lines = [f"{'read':18} {self.read:>12,}", f"{'kept':18} {self.kept:>12,}  {self.characters:,} characters"]
        for kind, meanings, counter in (("dropped", DROPPED, self.dropped), ("mended", MENDED, self.mended)):
            lines += [f"{name:18} {counter[name]:>12,}  {kind}: {meanings[name]}" for name in meanings if counter[name]]
        return "\n".join(lines)


class BadShard(DataError):
    """A file that cannot be read on; `reason` is its key in DROPPED."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Shard(NamedTuple):
    """One file of a corpus. `name` is unique in the corpus and part of its documents' ids."""

    name: str
    path: str  # local, or hf://datasets/owner/name@commit/path
    kind: str  # an ending of READERS
    source: str
    identity: Any  # what makes it this very file: its size, and the commit on the hub
    corpus: str = ""  # the name to use in messages about the hub

    @property
    def is_local(self) -> bool:
        return not self.path.startswith(hub.PREFIX)

    def open(self) -> Any:
        """Return the file's bytes, decompressed."""
        raw = Path(self.path).open("rb") if self.is_local else hub.open_file(self.path)
        if self.kind.endswith(".gz"):
            return gzip.GzipFile(fileobj=raw)
        if self.kind.endswith(".zst"):
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 2**20)  # pyright: ignore[reportArgumentType]
        return raw

    def __str__(self) -> str:
        return self.path.removeprefix(hub.PREFIX)


class Reading(NamedTuple):
    """How to read: the columns that may hold the text (the first found), the limit, and what to do with broken rows."""

    text_columns: tuple[str, ...]
    skip_broken: bool
    counts: Counts
    max_chars: int

    @property
    def limit_bytes(self) -> int:
        """The longest line read: JSON may write a character as `\\u00e8`, six bytes."""
        return 2 * self.max_chars + 2**16

    def broken(self, reason: str, message: str) -> None:
        """Count a broken row, or refuse it."""
        if not self.skip_broken:
            raise DataError(f"{message} Mend or remove it, or skip what is broken (on_broken=skip).")
        self.counts.drop(reason)

    def no_column(self, shard: Shard, columns: list[str]) -> BadShard:
        wanted = self.text_columns[0]
        return BadShard("other_schema", f"{shard} has no column {wanted!r}. {nearest(wanted, columns)}")


class Row(NamedTuple):
    """The text of one row, whatever its type (None: the row is dropped already), and its `source` column."""

    number: int
    text: Any
    source: Any = None


def rows(shard: Shard, reading: Reading, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a shard from row `start` on.

    Raises: DataError for a broken row (unless those are skipped); BadShard when the file cannot be read on, or has no
    text column; UsageError when the hub refuses.
    """
    try:
        with nullcontext() if shard.is_local else hub.explained(shard.corpus, "/".join(str(shard).split("/")[:2])):
            yield from READERS[shard.kind](shard, reading, start)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadShard("truncated_shard", f"{shard} ends early or is no gzip file ({error})") from error
    except FileNotFoundError as error:
        raise BadShard("shard_gone", f"{shard} disappeared while it was read") from error
    except (pa.ArrowException, OSError) as error:
        why = f"{shard} is no whole {shard.kind[1:]} file ({' '.join(str(error).split())})"
        raise BadShard("broken_shard", why) from error


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(handle: Any, limit_bytes: int) -> Iterator[bytes | None]:
    """Yield lines with their ends; None for one longer than the limit, which is passed over in pieces."""
    line = handle.readline(limit_bytes + 1).removeprefix(b"\xef\xbb\xbf")
    while line:
        if len(line) > limit_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = handle.readline(limit_bytes + 1)
            yield None
        else:
            yield line
        line = handle.readline(limit_bytes + 1)


def _decoded(line: bytes) -> str:
    """Decode UTF-8; what is not becomes U+FFFD, which the document stream counts."""
    return line.decode("utf-8", "replace")


def _jsonl(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    number = -1
    with shard.open() as handle:
        for line_number, line in enumerate(_lines(handle, reading.limit_bytes), 1):
            if line is not None and not line.strip():
                continue
            number += 1
            if number >= start:
                row = _json_object(reading, line, f"{shard}, line {line_number}:")
                yield Row(number, None) if row is None else _row(shard, reading, number, row)


def _json_object(reading: Reading, line: bytes | None, where: str) -> dict[str, Any] | None:
    """Return what a line holds; None when it is broken and counted as such."""
    if line is None:
        return reading.broken("too_long", f"{where} longer than {reading.limit_bytes:,} bytes.")
    try:
        row = json.loads(_decoded(line))
    except (ValueError, RecursionError) as error:
        return reading.broken("broken_json", f"{where} not JSON ({getattr(error, 'msg', 'nested too deeply')}).")
    if not isinstance(row, dict):
        return reading.broken("broken_json", f"{where} a JSON object was expected, found {type(row).__name__}.")
    return row


def _row(shard: Shard, reading: Reading, number: int, row: dict[str, Any]) -> Row:
    """Take the text and the source out of a row. Raises: BadShard when no text column is there."""
    for column in reading.text_columns:
        value: Any = row
        for key in column.split("."):
            value = value.get(key, row) if isinstance(value, dict) else row
        if value is not row:
            return Row(number, "" if value is None else value, row.get("source"))
    raise reading.no_column(shard, [str(name) for name in row])


def _txt(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """Paragraphs: documents are separated by blank lines."""
    number, paragraph, length = 0, [], 0
    with shard.open() as handle:
        for raw in chain(_lines(handle, reading.limit_bytes), [b""]):  # a blank line ends the last one, too
            for line in [None] if raw is None else _decoded(raw).rstrip("\r\n").split("\r"):
                if line is None or line.strip():
                    length += reading.max_chars + 1 if line is None else len(line)
                    if length <= reading.max_chars:
                        paragraph.append(line)
                elif length:
                    if number >= start:
                        yield Row(number, _joined(shard, reading, number, paragraph, length))
                    number, paragraph, length = number + 1, [], 0


def _joined(shard: Shard, reading: Reading, number: int, paragraph: list[str], length: int) -> str | None:
    if length <= reading.max_chars:
        return "\n".join(paragraph)
    return reading.broken("too_long", f"{shard}, paragraph {number + 1}: longer than {reading.max_chars:,} characters.")


def _csv(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), reading.max_chars))
    with shard.open() as handle:
        table = csv.DictReader(_csv_lines(shard, reading, handle))
        for number in count():
            try:
                row = next(table, None)
            except csv.Error as error:
                if number >= start:
                    reading.broken("broken_csv", f"{shard}, line {table.line_num}: not CSV ({error}).")
                    yield Row(number, None)
                continue
            if row is None:
                return
            if number >= start:
                yield _row(shard, reading, number, row)


def _csv_lines(shard: Shard, reading: Reading, handle: Any) -> Iterator[str]:
    for number, line in enumerate(_lines(handle, reading.limit_bytes), 1):
        if line is None:
            reading.broken("too_long", f"{shard}, line {number}: longer than {reading.limit_bytes:,} bytes.")
        else:
            yield _decoded(line)


def _conllu(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """Sentences: the surface text that `# text =` gives, with multi-word tokens unsplit."""
    with shard.open() as handle:
        texts = (line for line in _lines(handle, reading.limit_bytes) if line and line.startswith(b"# text ="))
        for number, line in islice(enumerate(texts), start, None):
            yield Row(number, _decoded(line).partition("=")[2].strip())


# --- tables ----------------------------------------------------------------------------------------------------------


def _parquet(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shard.path if shard.is_local else shard.open(), pre_buffer=False)
    columns = _columns(shard, reading, file.schema_arrow)
    first = 0
    for group in range(file.num_row_groups):
        if first + file.metadata.row_group(group).num_rows <= start:
            first += file.metadata.row_group(group).num_rows  # a group before the start is not read at all
            continue
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
            yield from _table_rows(batch, columns, first, start)
            first += len(batch)


def _arrow(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """A shard of a `save_to_disk` folder, memory-mapped."""
    with pa.memory_map(shard.path) as source, pa.ipc.open_stream(source) as stream:
        columns = _columns(shard, reading, stream.schema)
        names = [name for name in stream.schema.names if name in {column.split(".")[0] for column in columns}]
        first = 0
        for batch in stream:
            yield from _table_rows(batch.select(names), columns, first, start)
            first += len(batch)


def _columns(shard: Shard, reading: Reading, schema: pa.Schema) -> list[str]:
    """Return the first text column that a table has, and `source` when it has that.

    Raises: BadShard when there is no text column, or it holds no strings.
    """
    flat = schema.empty_table().flatten().schema
    column = next((column for column in reading.text_columns if column in flat.names), None)
    if column is None:
        raise reading.no_column(shard, schema.names)
    kind = flat.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise BadShard("other_schema", f"{shard}: column {column!r} holds {kind}, strings were expected")
    return list(dict.fromkeys((column, "source"))) if "source" in flat.names else [column]


def _table_rows(batch: pa.RecordBatch, columns: list[str], first: int, start: int) -> Iterator[Row]:
    """Yield the rows of a batch that begins at row `first`, from row `start` on."""
    skip = max(start - first, 0)
    table = pa.Table.from_batches([batch.slice(skip)]).flatten()
    values = [table[column].to_pylist() for column in columns]
    for number, (text, *source) in enumerate(zip(*values, strict=True), first + skip):
        yield Row(number, "" if text is None else text, *source)


READERS: dict[str, Callable[[Shard, Reading, int], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".jsonl.zst": _jsonl,
    ".json.gz": _jsonl,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".txt": _txt,
    ".txt.gz": _txt,
    ".conllu": _conllu,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
LOCAL_ENDINGS = tuple(ending for ending in READERS if ending not in (".arrow", ".json.gz"))

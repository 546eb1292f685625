"""Rows of one file, local or on the hub, from any row on: txt, jsonl, csv, conllu (plain, gzip or zstandard), parquet, arrow.

Memory is bounded: a line longer than the limit is never held, a parquet file is read by row groups, a remote file by
blocks. A row is numbered by its place among the rows of its file, dropped ones included, so (file, row) is a position.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.errors import DataError, nearest
from sae_italian.corpora.counts import Counts
from sae_italian.corpora.hub import RemoteFile, ShardGone

MAX_DOCUMENT_CHARS = 20_000_000  # a long novel has 1.5 million; more is a broken file
ROWS_PER_BATCH = 256


class BadShard(DataError):
    """A file that cannot be read on; `reason` is its key in counts.DROPPED."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Shard(NamedTuple):
    """One file of a corpus. `name` is unique in the corpus and part of its documents' ids."""

    name: str
    file: Path | RemoteFile
    kind: str  # an ending of READERS
    source: str

    def __str__(self) -> str:
        return str(self.file) if isinstance(self.file, Path) else f"{self.file.hub}/{self.file.path}"

    def open(self) -> Any:
        """Return the file's bytes, decompressed."""
        raw = self.file.open("rb") if isinstance(self.file, Path) else self.file.open()
        if self.kind.endswith(".gz"):
            return gzip.GzipFile(fileobj=raw)
        if self.kind.endswith(".zst"):
            import io

            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            return io.BufferedReader(stream, 2**20)  # pyright: ignore[reportArgumentType]
        return raw


class Reading(NamedTuple):
    """How to read: the columns that may hold the text (the first found), the limit, and what to do with broken rows."""

    text_columns: tuple[str, ...]
    skip_broken: bool
    counts: Counts
    max_chars: int = MAX_DOCUMENT_CHARS

    def broken(self, reason: str, message: str) -> None:
        """Count a broken row, or refuse it."""
        if not self.skip_broken:
            raise DataError(f"{message} Mend or remove it, or skip what is broken (--on-broken skip).")
        self.counts.drop(reason)


class Row(NamedTuple):
    """The text of one row, whatever its type (None: the row is dropped already), and its `source` column."""

    number: int
    text: Any
    source: str | None


def rows(shard: Shard, reading: Reading, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a shard from row `start` on.

    Raises: DataError for a broken row (unless those are skipped), BadShard when the file cannot be read on, UsageError
    when it has no text column.
    """
    try:
        yield from READERS[shard.kind](shard, reading, start)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadShard("truncated_shard", f"{shard} ends early or is no gzip file ({error})") from error
    except ShardGone as error:
        raise BadShard("shard_gone", str(error)) from error
    except FileNotFoundError as error:
        raise BadShard("shard_gone", f"{shard} disappeared while it was read") from error


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
        for line_number, line in enumerate(_lines(handle, _limit_bytes(reading)), 1):
            if line is not None and not line.strip():
                continue
            number += 1
            if number >= start:
                yield _json_row(shard, reading, number, line, line_number)


def _json_row(shard: Shard, reading: Reading, number: int, line: bytes | None, line_number: int) -> Row:
    where = f"{shard}, line {line_number}:"
    if line is None:
        reading.broken("too_long", f"{where} longer than {_limit_bytes(reading):,} bytes.")
        return Row(number, None, None)
    try:
        row = json.loads(_decoded(line))
    except (json.JSONDecodeError, RecursionError) as error:
        reading.broken("broken_json", f"{where} not JSON ({getattr(error, 'msg', 'nested too deeply')}).")
        return Row(number, None, None)
    if not isinstance(row, dict):
        reading.broken("broken_json", f"{where} a JSON object was expected, found {type(row).__name__}.")
        return Row(number, None, None)
    return _row(shard, reading, number, row)


def _row(shard: Shard, reading: Reading, number: int, row: dict[str, Any]) -> Row:
    """Take the text and the source out of a row. Raises: UsageError when no text column is there."""
    source = row.get("source")
    source = source if isinstance(source, str) and source else None
    for column in reading.text_columns:
        value: Any = row
        for key in column.split("."):
            value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            return Row(number, value if value is not None else "", source)
    raise _no_column(shard, reading, [str(name) for name in row])


_MISSING = object()


def _no_column(shard: Shard, reading: Reading, columns: list[str]) -> BadShard:
    wanted = reading.text_columns[0]
    return BadShard("other_schema", f"{shard} has no column {wanted!r}. {nearest(wanted, columns)}")


def _limit_bytes(reading: Reading) -> int:
    """Return the longest line read: JSON may write a character as `\\u00e8`, six bytes."""
    return 2 * reading.max_chars + 2**16


def _txt(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """Paragraphs: documents are separated by blank lines."""
    number, paragraph, length = 0, [], 0

    def row() -> Row:
        if length <= reading.max_chars:
            return Row(number, "\n".join(paragraph), None)
        reading.broken("too_long", f"{shard}, paragraph {number + 1}: longer than {reading.max_chars:,} characters.")
        return Row(number, None, None)

    with shard.open() as handle:
        for raw in _lines(handle, _limit_bytes(reading)):
            lines = [None] if raw is None else _decoded(raw).rstrip("\r\n").split("\r")
            for line in lines:
                if line is None or line.strip():
                    length += reading.max_chars + 1 if line is None else len(line)
                    if length <= reading.max_chars:
                        paragraph.append(line)
                elif length:
                    if number >= start:
                        yield row()
                    number, paragraph, length = number + 1, [], 0
        if length and number >= start:
            yield row()


def _csv(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), reading.max_chars))
    number = 0
    with shard.open() as handle:
        table = csv.DictReader(_csv_lines(shard, reading, handle))
        while True:
            try:
                row = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                reading.broken("broken_csv", f"{shard}, line {table.line_num}: not CSV ({error}).")
                row = None
            if number >= start:
                yield Row(number, None, None) if row is None else _row(shard, reading, number, row)
            number += 1


def _csv_lines(shard: Shard, reading: Reading, handle: Any) -> Iterator[str]:
    for number, line in enumerate(_lines(handle, _limit_bytes(reading)), 1):
        if line is None:
            reading.broken("too_long", f"{shard}, line {number}: longer than {_limit_bytes(reading):,} bytes.")
        else:
            yield _decoded(line)


def _conllu(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """Sentences: the surface text that `# text =` gives, with multi-word tokens unsplit."""
    number = 0
    with shard.open() as handle:
        for line in _lines(handle, _limit_bytes(reading)):
            if line and line.startswith(b"# text ="):
                if number >= start:
                    yield Row(number, _decoded(line).partition("=")[2].strip(), None)
                number += 1


# --- tables ----------------------------------------------------------------------------------------------------------


def _parquet(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(shard.file if isinstance(shard.file, Path) else shard.file.open(), pre_buffer=False)
        column = _text_column(shard, reading, file.schema_arrow)
        columns = [column, *(["source"] if _is_string(file.schema_arrow, "source") else [])]
        number = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if number + n_rows <= start:
                number += n_rows
                continue
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                yield from _table_rows(batch, column, number, start)
                number += len(batch)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
        raise BadShard("broken_shard", f"{shard} is no whole parquet file ({' '.join(str(error).split())})") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise BadShard("broken_shard", f"{shard} cannot be read ({' '.join(str(error).split())})") from error


def _arrow(shard: Shard, reading: Reading, start: int) -> Iterator[Row]:
    """A shard of a `save_to_disk` folder, memory-mapped."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(shard.file)) as source, pyarrow.ipc.open_stream(source) as stream:
            column = _text_column(shard, reading, stream.schema)
            number = 0
            for batch in stream:
                if number + len(batch) > start:
                    names = [name for name in {column.split(".")[0], "source"} if name in stream.schema.names]
                    yield from _table_rows(batch.select(names), column, number, start)
                number += len(batch)
    except pyarrow.ArrowInvalid as error:
        raise BadShard("broken_shard", f"{shard} is no whole arrow file ({' '.join(str(error).split())})") from error


def _table_rows(batch: Any, column: str, first: int, start: int) -> Iterator[Row]:
    skip = max(start - first, 0)
    part = batch.slice(skip)
    values = part.column(column.split(".")[0]).to_pylist()
    sources = part.column("source").to_pylist() if "source" in batch.schema.names else None
    for i, value in enumerate(values):
        for key in column.split(".")[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        source = sources[i] if sources else None
        yield Row(first + skip + i, "" if value is None else value, source if isinstance(source, str) else None)


def _text_column(shard: Shard, reading: Reading, schema: Any) -> str:
    """Return the first text column that the table has. Raises: BadShard when there is none, or it holds no strings."""
    for column in reading.text_columns:
        field = _field(schema, column)
        if field is not None:
            if not _is_string(schema, column):
                raise BadShard("other_schema", f"{shard}: column {column!r} holds {field.type}, strings were expected")
            return column
    raise _no_column(shard, reading, schema.names)


def _field(schema: Any, column: str) -> Any:
    head, *inner = column.split(".")
    field = schema.field(head) if head in schema.names else None
    for key in inner:
        index = field.type.get_field_index(key) if field is not None and hasattr(field.type, "get_field_index") else -1
        field = field.type.field(index) if field is not None and index >= 0 else None
    return field


def _is_string(schema: Any, column: str) -> bool:
    import pyarrow.types as types

    field = _field(schema, column)
    if field is None:
        return False
    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


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


def kind_of(name: str, endings: tuple[str, ...] = tuple(READERS)) -> str | None:
    return next((ending for ending in endings if name.lower().endswith(ending)), None)

"""The files of a corpus, local or on the hub, and their rows, from any row on; MicroItaliano is a file without end.

Read are txt, jsonl, csv, conllu (plain, gzip, zstandard), parquet, and the arrow files of a `save_to_disk` folder.

A line or a paragraph is held up to 128 M characters, a parquet file is read by row groups, a file of the hub by blocks. A row
is numbered by its place among the rows of its file, broken ones included, so (file, row) is a position.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from itertools import accumulate, chain, count, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.storage import ODD, read_json
from sae_italian.corpora.catalogue import PREFIX, Route, catalogue, explained, list_files, open_file

MICRO_ITALIANO, HELD_OUT_MICRO = "micro-italiano", "micro-italiano, held out"
PRETOKENIZED = "progress.json"  # the file that tells a pretokenised folder of ours
MAX_LINE = 2**27  # characters; 20 million, which JSON may write in six each. A longer line is cut, so broken
ROWS_PER_BATCH = 256
HASHED_WHOLE = 2**28  # bytes of a corpus, about half a second
HELD_OUT_PERMILLE = 50
KNOWN_MICRO = 250_000  # documents, a million held-out tokens: to know by the hash, all must be made
Cells = tuple[Any, Any]
AGAIN = "Get it again and resume, or skip it (on_broken=skip)."


class Broken(NamedTuple):
    """What is wrong with a row, or a whole file: a key of the labels "dropped", and a message that says what to do."""

    reason: str
    message: str


OTHER_SPLIT = Broken("other_split", "")  # of a document that is known not to be of the split that is read


class TextFile(NamedTuple):
    """One file of a corpus. `name` is unique in the corpus and part of its documents' ids."""

    name: str
    path: str  # local, or hf://datasets/owner/name@commit/path; of MicroItaliano the seed
    kind: str  # a key of READERS
    source: str
    version: Any = None  # what makes a file of the hub this very one: its size and commit
    corpus: str = ""  # the name to use in messages about the hub

    @property
    def is_local(self) -> bool:
        return not self.path.startswith(PREFIX)

    def identity(self, whole: bool = True) -> Any:
        """Return what makes it this very file: of a local one the size and a hash of its content, or the date of its last
        change where it is not to be read as a `whole`."""
        if not self.is_local:
            return self.version
        facts = (file := Path(self.path)).stat()
        if not whole:
            return [facts.st_size, facts.st_mtime_ns]
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=8))
        return [facts.st_size, digest.hexdigest()]

    def open(self) -> Any:
        """Return the file's bytes, decompressed."""
        raw = Path(self.path).open("rb") if self.is_local else open_file(self.path)
        if self.kind.endswith(".gz"):
            return gzip.GzipFile(fileobj=raw)
        if self.kind.endswith(".zst"):
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 2**20)  # pyright: ignore[reportArgumentType]
        return raw

    def lines(self) -> Iterator[str]:
        """Yield the lines with their ends; bytes that are not of the encoding become U+FFFD, which the stream counts."""
        head = b""  # a file of the hub is UTF-8, and opened once
        if self.is_local:
            with self.open() as handle, suppress(EOFError, zlib.error, OSError):  # said where the rows before are read
                head = handle.read(2**20)
        with self.open() as handle:
            text = io.TextIOWrapper(handle, encoding_of(head), "replace", newline="\n")
            yield from iter(lambda: text.readline(MAX_LINE), "")

    def __str__(self) -> str:
        return self.path.removeprefix(PREFIX)


def encoding_of(head: bytes) -> str:
    """Return the encoding of a file from its beginning: UTF-8, UTF-16 with its mark, or Windows' Latin-1.

    Latin-1 it is when ten times more letters are no UTF-8 than are: the odd broken byte in UTF-8 stays one.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    broken = text.count("\ufffd")
    good = sum(not letter.isascii() for letter in text) - broken if broken else 0
    return "cp1252" if broken > 10 * good else "utf-8-sig"


def is_held_out(text: str) -> bool:
    """Return whether a document belongs to the held-out 5 %, by the hash of its text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 1000 < HELD_OUT_PERMILLE


class _NoText(Exception):
    """A file has no column of text."""


def rows(shard: TextFile, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int | None, Any, Any]]:
    """Yield the rows of a shard from row `start` on: number, text (whatever its type, or what is wrong), source or None.

    `columns` may hold the text, the first that is found. A file that cannot be read on ends with a row that says so, and
    has no number. Raises: UsageError when the hub refuses.
    """
    try:
        with nullcontext() if shard.is_local else explained(shard.corpus, str(shard).partition("@")[0]):
            for number, (text, source) in enumerate(READERS[shard.kind](shard, columns, start), start):
                yield number, "" if text is None else text, source
    except _NoText as error:
        yield None, Broken("other_schema", f"{shard}{error}"), None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield None, Broken("truncated_shard", f"{shard} ends early or is no gzip file ({error}). {AGAIN}"), None
    except FileNotFoundError:
        yield None, Broken("shard_gone", f"{shard} disappeared while it was read. {AGAIN}"), None
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        yield None, Broken("broken_shard", f"{shard} is no whole {shard.kind[1:]} file ({why}). {AGAIN}"), None


def _broken(reason: str, where: str, why: str) -> Broken:
    return Broken(reason, f"{where}: {why}. Mend or remove it, or skip what is broken (on_broken=skip).")


def _no_column(columns: Sequence[str], found: Iterable[object]) -> _NoText:
    names = [str(name) for name in islice(found, 20)]
    remedy = "Say which one holds the text: --text-column NAME."
    if "token_ids" in names and any(".hook_" in name for name in names):
        remedy = "These are activations that SAELens kept: `train` reads them: use_cached_activations=true cached_activations_path=FOLDER."
    return _NoText(f" has no column {columns[0]!r}; it has {', '.join(map(repr, names))}. {remedy}")


# Each reader yields the text and the source, None where there is none, of the rows from row `start` on.


def _jsonl(shard: TextFile, columns: Sequence[str], start: int) -> Iterator[Cells]:
    lines = ((number, line) for number, line in enumerate(shard.lines(), 1) if line.strip())
    for number, line in islice(lines, start, None):
        where = f"{shard}, line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object was expected, found {type(row).__name__}")
            found = _from_columns(row, columns)
        except _NoText as error:  # of this row alone: others may have it
            found = Broken("not_text", f"{where}{error} Or skip such rows (on_broken=skip)."), None
        except (ValueError, RecursionError) as error:
            found = _broken("broken_json", where, f"not JSON ({getattr(error, 'msg', error)})"), None
        yield found


def _from_columns(row: dict[str, Any], columns: Sequence[str]) -> Cells:
    for column in columns:
        value: Any = row
        for key in [column] if column in row else column.split("."):
            value = value.get(key, row) if isinstance(value, dict) else row
        if value is not row:
            return value, row.get("source")
    raise _no_column(columns, list(row))


def _csv(shard: TextFile, columns: Sequence[str], start: int) -> Iterator[Cells]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    lines = shard.lines()
    head = next((line for line in lines if line.strip()), "")
    names = {mark: [name.strip('" \r\n') for name in head.split(mark)] for mark in ",;\t|"}  # Excel writes ; in Italy
    mark = max(names, key=lambda mark: (bool(set(columns) & set(names[mark])), len(names[mark])))
    # strict: else an open quote takes in all after it
    table = csv.DictReader(chain([head], lines), delimiter=mark, strict=True)
    for number in count():
        first = max(table.line_num, 1) + 1
        try:
            row = next(table, None)
        except csv.Error as error:
            row = _broken("broken_csv", f"{shard}, line {first}", f"not CSV ({error})")
        if row is None:
            return
        if number >= start:
            yield (row, None) if isinstance(row, Broken) else _from_columns(row, columns)


def _txt(shard: TextFile, _columns: Sequence[str], start: int) -> Iterator[Cells]:
    """Paragraphs: documents are separated by blank lines. Of an endless one no more than MAX_LINE characters are held."""
    number, held, paragraph = 0, 0, []
    for raw in chain(shard.lines(), [""]):  # a blank line ends the last one, too
        for line in raw.rstrip("\r\n").split("\r"):
            if line.strip():
                held += len(line)
                if held <= MAX_LINE:
                    paragraph.append(line)
            elif paragraph:
                if number >= start:
                    yield "\n".join(paragraph), None
                number, held, paragraph = number + 1, 0, []


def _conllu(shard: TextFile, _columns: Sequence[str], start: int) -> Iterator[Cells]:
    """Sentences: the surface text that `# text =` gives, with multi-word tokens unsplit."""
    texts = (line.partition("=")[2].strip() for line in shard.lines() if line.startswith("# text ="))
    for text in islice(texts, start, None):
        yield text, None


def _parquet(shard: TextFile, columns: Sequence[str], start: int) -> Iterator[Cells]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shard.path if shard.is_local else shard.open(), pre_buffer=False)
    names, first = _table_columns(file.schema_arrow, columns), 0
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if first + n_rows > start:  # a group before the start is not read at all
            batches = file.iter_batches(ROWS_PER_BATCH, [group], names)
            yield from _table_rows(batches, names, max(start - first, 0))
        first += n_rows


def _arrow(shard: TextFile, columns: Sequence[str], start: int) -> Iterator[Cells]:
    """A shard of a `save_to_disk` folder, memory-mapped."""
    with pa.memory_map(shard.path) as source, pa.ipc.open_stream(source) as stream:
        yield from _table_rows(stream, _table_columns(stream.schema, columns), start)


def _table_columns(schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """Return the first text column that a table has, and `source` when it has that."""
    flat = schema.empty_table().flatten().schema
    if (column := next((column for column in columns if column in flat.names), None)) is None:
        raise _no_column(columns, schema.names)
    kind = flat.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value not in (pa.string(), pa.large_string(), pa.string_view()):
        raise _NoText(f": column {column!r} holds {kind}, strings were expected.")
    return list(dict.fromkeys((column, "source"))) if "source" in flat.names else [column]


def _table_rows(batches: Iterable[pa.RecordBatch], names: list[str], skip: int) -> Iterator[Cells]:
    """Yield the rows of batches but for the first `skip`."""
    for batch in batches:
        rest = batch.slice(min(skip, len(batch)))
        skip -= len(batch) - len(rest)
        text, *source = map(_strings, pa.Table.from_batches([rest]).flatten().select(names).columns)
        yield from zip(text, *(source or [repeat(None)]), strict=False)


def _strings(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values; bytes that are not UTF-8, which some writers let pass, become U+FFFD as in other files."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode("utf-8", "replace") for value in raw]


def _micro(shard: TextFile, _columns: Sequence[str], start: int) -> Iterator[Cells]:
    from sae_italian import micro_italiano

    known = _held_out_of_seed_0() if shard.kind == HELD_OUT_MICRO and shard.path == "0" else ()
    for index in count(start):
        skipped = known and index < KNOWN_MICRO and index not in known
        document = None if skipped else micro_italiano.document(index, int(shard.path))
        yield (OTHER_SPLIT, None) if document is None else (document.text, document.register)


@cache
def _held_out_of_seed_0() -> frozenset[int]:
    """Return which of the first documents are held out, from the list that tests/corpora/test_held_out.py writes and checks."""
    return frozenset(accumulate(map(int, Path(__file__).with_name("micro_held_out.txt").read_text("ascii").split())))


READERS: dict[str, Callable[[TextFile, Sequence[str], int], Iterator[Cells]]] = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"), _jsonl),
    **dict.fromkeys((".csv", ".csv.gz"), _csv),
    **dict.fromkeys((".txt", ".txt.gz"), _txt),
    ".conllu": _conllu,
    ".parquet": _parquet,
    ".arrow": _arrow,
    MICRO_ITALIANO: _micro,
    HELD_OUT_MICRO: _micro,
}
HUB_ENDINGS = tuple(ending for ending in READERS if ending.startswith("."))
LOCAL_ENDINGS = tuple(ending for ending in HUB_ENDINGS if ending not in (".arrow", ".json.gz"))


# --- the files of a corpus ----------------------------------------------------------------------------------------------


def hub_shards(route: Route, name: str, source: str) -> list[TextFile]:
    """Return the shards of a route of the corpus `name`. Raises: UsageError for a file that cannot be read, as `hub`."""
    commit, sizes = list_files(route, name)
    where = f"{PREFIX}{route['hub']}@{commit}"
    return [
        TextFile(path, f"{where}/{path}", _kind(path, HUB_ENDINGS), source, [size, commit], name)
        for path, size in sizes.items()
    ]


def local_shards(path: Path) -> list[TextFile]:
    """Return the files of a local corpus, sorted by name.

    Raises: UsageError when the path is neither a file, a folder with text files, nor a `save_to_disk` folder.
    """
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        if saved := _saved_to_disk(path):
            return saved
        # os.walk passes over a folder that vanishes meanwhile
        found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [f for f in sorted(found) if f.name.lower().endswith(LOCAL_ENDINGS) and f.is_file()]
        root = path
        if not files:
            raise UsageError(f"corpus folder {str(path)!r} holds no file ending in {', '.join(LOCAL_ENDINGS)}.")
    else:
        siblings = path.parent.iterdir() if path.parent != Path() and path.parent.is_dir() else ()
        hint = nearest(path.name, [file.name for file in siblings] or [MICRO_ITALIANO, *catalogue()])
        raise UsageError(
            f"corpus {str(path)!r} is neither {MICRO_ITALIANO!r}, a name of the catalogue, nor a local file or folder. {hint}"
        )
    # a name in another encoding, as old archives have, is written out: no file of ours could hold it
    names = [os.fsencode(file.relative_to(root).as_posix()).decode("utf-8", "backslashreplace") for file in files]
    return [
        TextFile(name, str(file), _kind(name, LOCAL_ENDINGS), Path(name).name.split(".")[0])
        for name, file in zip(names, files, strict=True)
    ]


def _kind(name: str, endings: Iterable[str]) -> str:
    if (found := next((ending for ending in endings if name.lower().endswith(ending)), None)) is None:
        raise UsageError(f"corpus file {name!r} has an unknown ending; expected one of {', '.join(endings)}.")
    return found


def _saved_to_disk(path: Path) -> list[TextFile]:
    """Return the arrow files of a `datasets.save_to_disk` folder; of a DatasetDict the training split, else its first."""
    if (path / PRETOKENIZED).is_file():  # the documents beside the tokens
        names = sorted(file.name for file in path.glob("documents-*.parquet"))
    elif (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json")["splits"]
        return _saved_to_disk(path / ("train" if "train" in splits else splits[0]))
    elif (path / "state.json").is_file():
        names = [item["filename"] for item in read_json(path / "state.json").get("_data_files") or []]
    else:
        return []
    return [TextFile(name, str(path / name), Path(name).suffix, path.resolve().name) for name in names]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line and columns of a small table's rows, by the file's ending. Raises: DataError, naming the line."""
    kind, line = path.suffix, 0
    if kind not in (".tsv", ".jsonl", ".parquet"):
        raise UsageError(f"{path.name} ends in {kind or 'nothing'}; .tsv, .jsonl or .parquet was expected.")
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            yield from enumerate(pq.read_table(path).to_pylist(), 1)
            return
        with path.open(encoding="utf-8-sig", newline="") as lines:
            tabs = csv.DictReader(lines, delimiter="\t")
            told: Any = tabs if kind == ".tsv" else (text.strip() and dict(json.loads(text)) for text in lines)
            for line, row in enumerate(told, 1):
                if row:  # no blank line
                    yield (tabs.line_num if kind == ".tsv" else line), row
    except (OSError, NotImplementedError, *ODD, csv.Error) as error:
        raise DataError(f"{path}, line {line + 1} cannot be read as {kind} in UTF-8 ({error}).") from error

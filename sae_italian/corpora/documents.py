"""Documents of a corpus, one after the other: MicroItaliano, or a local file or folder of text.

Every document has an id and a source. One document in twenty, chosen by a hash of its text, is held out: training never
sees it, evaluation uses nothing else. The hash does not depend on order, file or machine, so the split never changes,
and two copies of one text always fall on the same side.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sae_italian.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from datasets import IterableDataset

Split = Literal["train", "heldout", "all"]
SPLITS = ("train", "heldout", "all")
HELD_OUT_PERMILLE = 50
MICRO_ITALIANO = "micro-italiano"


class TextDocument(NamedTuple):
    text: str
    doc_id: str
    source: str


def is_held_out(text: str) -> bool:
    """Return whether a document belongs to the held-out 5 %, by the hash of its text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 1000 < HELD_OUT_PERMILLE


def iter_documents(
    corpus: str | Path, split: Split = "all", *, seed: int = 0, start: int = 0, text_column: str = "text"
) -> Iterator[TextDocument]:
    """Yield the documents of `corpus` in a fixed order, those of one split only.

    `corpus` is `micro-italiano` (unlimited), or a local file or folder: txt (documents are separated by blank lines),
    jsonl, parquet, csv; jsonl, csv and txt may be gzipped. Several, separated by commas, are read in turn, a document
    from each, until all have ended. `start` skips that many documents before the split is taken.

    Raises: UsageError for an unknown corpus or a missing text column, naming the columns there are; DataError for a
    broken line, naming file and line.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is unknown. {nearest(split, SPLITS)}")
    if str(corpus) == MICRO_ITALIANO:
        documents: Iterator[TextDocument] = _micro_italiano(seed, start)
    else:
        parts = [_local(Path(part.strip()).expanduser(), text_column) for part in str(corpus).split(",")]
        documents = islice(_in_turn(parts), start, None)
    for document in documents:
        if split == "all" or is_held_out(document.text) == (split == "heldout"):
            yield document


def load_corpus(
    corpus: str | Path, split: Split = "train", *, seed: int = 0, limit: int | None = None, text_column: str = "text"
) -> IterableDataset:
    """Return a corpus as a streaming `datasets.IterableDataset` with columns `text`, `doc_id`, `source`.

    Stock SAELens runners take it as `override_dataset`. Arguments and errors as `iter_documents`; `limit` bounds the
    number of documents.
    """
    from datasets import Features, IterableDataset, Value

    check_corpus(corpus, text_column=text_column)
    arguments = {"corpus": str(corpus), "split": split, "seed": seed, "limit": limit, "text_column": text_column}
    features = Features({name: Value("string") for name in TextDocument._fields})
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)  # pyright: ignore[reportReturnType]


def check_corpus(corpus: str | Path, *, text_column: str = "text") -> None:
    """Raise now, in one line, what reading the first document would raise, and UsageError when there is none."""
    if next(iter_documents(corpus, text_column=text_column), None) is None:
        raise UsageError(f"corpus {str(corpus)!r} has no document with text in it.")


def _rows(corpus: str, split: Split, seed: int, limit: int | None, text_column: str) -> Iterator[dict[str, str]]:
    for document in islice(iter_documents(corpus, split, seed=seed, text_column=text_column), limit):
        yield document._asdict()


def _micro_italiano(seed: int, start: int) -> Iterator[TextDocument]:
    from sae_italian.corpora import micro_italiano

    for document in micro_italiano.documents(seed=seed, start=start):
        yield TextDocument(document.text, document.doc_id, document.register)


# --- local files -----------------------------------------------------------------------------------------------------


def _open_text(path: Path) -> io.TextIOBase:
    handle = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    return io.TextIOWrapper(handle, encoding="utf-8-sig", errors="replace", newline="")  # pyright: ignore


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}). Mend or remove the line.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: a JSON object was expected, found {type(row).__name__}.")
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as lines:
        yield from csv.DictReader(lines)


def _txt(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as handle:
        paragraph: list[str] = []
        for line in handle:
            if line.strip():
                paragraph.append(line.rstrip("\r\n"))
            elif paragraph:
                yield {"text": "\n".join(paragraph)}
                paragraph = []
        if paragraph:
            yield {"text": "\n".join(paragraph)}


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".txt": _txt,
    ".txt.gz": _txt,
    ".parquet": _parquet,
}


def _reader(path: Path) -> Callable[[Path], Iterator[dict[str, Any]]] | None:
    return next((reader for ending, reader in _READERS.items() if path.name.lower().endswith(ending)), None)


def _local(path: Path, text_column: str) -> Iterator[TextDocument]:
    for file in _files(path):
        reader = _reader(file)
        assert reader is not None
        for number, row in enumerate(reader(file)):
            if text_column not in row:
                columns = [str(name) for name in row]
                raise UsageError(f"{file} has no column {text_column!r}. {nearest(text_column, columns)}")
            text = row[text_column]
            if isinstance(text, str) and text.strip():
                source = str(row.get("source") or file.name.split(".")[0])
                yield TextDocument(text, f"{file.name}:{number}", source)


def _in_turn(parts: list[Iterator[TextDocument]]) -> Iterator[TextDocument]:
    while parts:
        for part in list(parts):
            document = next(part, None)
            if document is None:
                parts.remove(part)
            else:
                yield document


def _files(path: Path) -> list[Path]:
    endings = ", ".join(_READERS)
    if path.is_file():
        if _reader(path) is None:
            raise UsageError(f"corpus file {str(path)!r} has an unknown ending; expected one of {endings}.")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file))
        if files:
            return files
        raise UsageError(f"corpus folder {str(path)!r} holds no file ending in {endings}.")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if siblings and path.parent != Path() else nearest(str(path), [MICRO_ITALIANO])
    raise UsageError(f"corpus {str(path)!r} is neither {MICRO_ITALIANO!r} nor a local file or folder. {hint}")

"""Documents of a corpus, one after the other: MicroItaliano, a local file or folder of text, or a corpus of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.corpora.stream import MICRO_ITALIANO, CorpusStream, Reader, Split, TextDocument

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def iter_documents(
    corpus: str | Path,
    split: Split = "all",
    *,
    seed: int = 0,
    text_column: str = "text",
    reader: Reader | None = None,
) -> Iterator[TextDocument]:
    """Yield the documents of `corpus` in a fixed order, those of one split only.

    `corpus` is `micro-italiano` (unlimited), a name of the catalogue (`wikipedia-it`, `clean-mc4-it-tiny@parquet`), hub
    files (`hf://datasets/owner/name/*.parquet`), or a local file or folder: txt (documents are separated by blank
    lines), jsonl, csv (all three may be gzipped), parquet, conllu, or what `datasets.save_to_disk` wrote; or several of
    these, as `CorpusStream` takes them. `reader` replaces split, seed and text_column and adds filters and what to do
    with broken lines.

    Raises: UsageError for an unknown corpus or a missing text column, naming the columns there are; DataError for a
    broken line, naming file and line.
    """
    yield from CorpusStream(corpus, reader or Reader(split=split, seed=seed, text_column=text_column))


def load_corpus(
    corpus: str | Path,
    split: Split = "train",
    *,
    seed: int = 0,
    limit: int | None = None,
    text_column: str = "text",
    streaming: bool = True,
    reader: Reader | None = None,
) -> IterableDataset | Dataset:
    """Return a corpus as a `datasets.IterableDataset` (a `Dataset` if not streaming) of `text`, `doc_id`, `source`.

    Stock SAELens runners take it as `override_dataset`. Arguments and errors as `iter_documents`; `limit` bounds the
    number of documents. The order is that of the shards: `.shuffle(seed, buffer_size)` of the result mixes rows.
    """
    from datasets import Dataset, Features, IterableDataset, Value

    reader = reader or Reader(split=split, seed=seed, text_column=text_column)
    check_corpus(corpus, reader=replace(reader, split="all"))
    features = Features({name: Value("string") for name in TextDocument._fields})
    arguments: dict[str, Any] = {"corpus": str(corpus), "reader": reader, "limit": limit}
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    if limit is None and MICRO_ITALIANO in str(corpus):
        raise UsageError(f"{MICRO_ITALIANO} has no end: give a limit, or stream it.")
    key = fingerprint([CorpusStream(corpus, reader).spec(), limit, reader.seed])
    table: Any = Dataset.from_generator(_rows, features=features, gen_kwargs=arguments | {"version": key})
    return table


def check_corpus(corpus: str | Path, *, text_column: str = "text", reader: Reader | None = None) -> None:
    """Raise now, in one line, what reading the first document would raise, and UsageError when there is none."""
    stream = CorpusStream(corpus, reader or Reader(text_column=text_column))
    if next(stream, None) is None:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in stream.counts.dropped.items())
        raise UsageError(f"corpus {str(corpus)!r} has no document with text in it{f' ({dropped})' if dropped else ''}.")


def _rows(corpus: str, reader: Reader, limit: int | None, version: str = "") -> Iterator[dict[str, str]]:
    for document in islice(CorpusStream(corpus, reader), limit):
        yield document._asdict()

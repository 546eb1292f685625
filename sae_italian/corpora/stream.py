"""Documents of a corpus as a stream that knows where it is: kept, dropped and mended are counted, and it can go on.

Every document has an id and a source. One document in twenty, chosen by a hash of its text, is held out: training never
sees it, evaluation uses nothing else. The hash does not depend on order, file or machine, so the split never changes,
and two copies of one text always fall on the same side.

The position is (shard, row) for files and the index for MicroItaliano. Only the order of the shards is shuffled: a
buffer of shuffled rows could not be saved. A stream that is given a saved state yields exactly the documents an
uninterrupted one would have yielded from there.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_italian.base.errors import DataError, UsageError, check_whole
from sae_italian.base.labels import labels
from sae_italian.base.storage import fingerprint, path_of
from sae_italian.corpora import rows
from sae_italian.corpora.catalogue import PREFIX, find, route_of_url
from sae_italian.corpora.filters import FILTERS, Reader, Sieve, Split
from sae_italian.corpora.rows import MICRO_ITALIANO, Broken, is_held_out

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# In a folder of training text for SAELens' runner: the name of the corpus, which has the held-out text.
WRITTEN_FROM = "corpus.name"
_WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\*(.+)", re.IGNORECASE)  # as `0.7*name`


class TextDocument(NamedTuple):
    text: str
    doc_id: str
    source: str


class DocumentCounts:
    """Documents read and kept, characters kept; documents or files dropped, by reason; documents mended."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.load(state or {})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `as_dict` returned."""
        self.read, self.kept, self.characters = (int(state.get(name, 0)) for name in ("read", "kept", "characters"))
        self.dropped, self.mended = Counter[str](state.get("dropped")), Counter[str](state.get("mended"))

    def drop(self, reason: str, documents: int = 1) -> None:
        """Count what is dropped for a reason of the labels "dropped": a document, or a file (0 documents)."""
        self.read += documents
        self.dropped[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return everything, as JSON."""
        totals = {"read": self.read, "kept": self.kept, "characters": self.characters}
        return {**totals, "dropped": dict(sorted(self.dropped.items())), "mended": dict(sorted(self.mended.items()))}

    def lines(self) -> str:
        """Return one line a count, with what each reason means."""
        lines = [f"{'read':18} {self.read:>12,}", f"{'kept':18} {self.kept:>12,}  {self.characters:,} characters"]
        for kind, counter in (("dropped", self.dropped), ("mended", self.mended)):
            meanings = labels(kind).items()
            lines += [f"{name:18} {counter[name]:>12,}  {kind}: {text}" for name, text in meanings if counter[name]]
        return "\n".join(lines)


class _Part:
    """The documents of one corpus, one shard after the other; rows without text are dropped and counted."""

    def __init__(self, name: str, reader: Reader, counts: DocumentCounts):
        self.name, self.skip_broken, self.counts = name, reader.on_broken == "skip", counts
        entry, route = (None if path_of(name).exists() else find(name)) or ({}, {})
        if name == MICRO_ITALIANO:
            kind = rows.HELD_OUT_MICRO if reader.split == "heldout" else name
            self.shards = [rows.TextFile(f"{name}/{reader.seed}", str(reader.seed), kind, name)]
        elif entry:
            self.shards = rows.hub_shards(route, entry["name"], entry["name"])
        elif name.startswith(PREFIX):
            route = route_of_url(name)
            self.shards = rows.hub_shards(route, name, route["hub"].rpartition("/")[2])
        else:
            self.shards = rows.local_shards(path_of(name))
        known = reader.text_column == "text" and (route.get("text_columns") or entry.get("text_columns"))
        self.columns: list[str] = known or [reader.text_column]
        self.min_chars = entry.get("min_chars", 0)
        self.max_chars = min(reader.max_chars, entry.get("max_chars") or reader.max_chars)
        shuffled = entry.get("shuffle_shards") if reader.shuffle_shards is None else reader.shuffle_shards
        if shuffled:
            self.shards.sort(key=lambda shard: fingerprint([reader.seed, shard.name]))
        self.load({"shard": self.shards[0].name if self.shards else None, "row": 0})

    def _documents(self) -> Iterator[TextDocument]:
        """Yield the documents from the position on, without text when they are known to be of another split."""
        mark = "/" if self.name == MICRO_ITALIANO else ":"
        while self.shard < len(self.shards):
            shard = self.shards[self.shard]
            for number, found, source in rows.rows(shard, self.columns, self.row):
                if number is None:  # the file is broken from here on
                    self._broken(found, documents=0)
                    break
                self.row = number + 1
                text = "" if found is rows.OTHER_SPLIT else self._text(found, f"{shard}, row {number}")
                if text is not None:
                    source = source if source and isinstance(source, str) else shard.source
                    yield TextDocument(text, f"{shard.name}{mark}{number}", source)
            self.shard, self.row = self.shard + 1, 0

    def _broken(self, broken: Broken, documents: int = 1) -> None:
        if not self.skip_broken:
            raise DataError(broken.message)
        self.counts.drop(broken.reason, documents)

    def _text(self, text: Any, where: str) -> str | None:
        """Return the text of a row, mended; None when there is none, the reason counted."""
        if isinstance(text, str) and "\x00" in text:
            text = text.replace("\x00", "")
            self.counts.mended["nul_bytes"] += 1
        if isinstance(text, Broken):
            self._broken(text)
        elif not isinstance(text, str):
            self.counts.drop("not_text")
        elif not text.strip():
            self.counts.drop("empty")
        elif len(text) > self.max_chars:
            why = f"{where}: longer than {self.max_chars:,} characters. Skip it (on_broken=skip)."
            self._broken(Broken("too_long", why))
        elif len(text) < self.min_chars:
            self.counts.drop("too_short")
        else:
            self.counts.mended.update(["broken_utf8"] if "\ufffd" in text else [])
            # lone surrogates, which JSON can spell, no tokenizer can read
            return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        return None

    def state(self) -> dict[str, Any]:
        return {"shard": self.shards[self.shard].name if self.shard < len(self.shards) else None, "row": self.row}

    def load(self, state: dict[str, Any]) -> None:
        names = [*(shard.name for shard in self.shards), None]
        if state["shard"] not in names:
            raise DataError(f"corpus {self.name!r} has no shard {state['shard']!r} any more, where reading stopped.")
        self.shard, self.row = names.index(state["shard"]), state["row"]  # of the next document
        self.documents = self._documents()

    def spec(self) -> Any:
        if self.name == MICRO_ITALIANO:
            return {"name": self.name, "seed": int(self.shards[0].path)}
        local = sum(Path(shard.path).stat().st_size for shard in self.shards if shard.is_local)
        identities = [[shard.name, shard.identity(whole=local <= rows.HASHED_WHOLE)] for shard in self.shards]
        return {"name": self.name, "shards": identities}


def mixture(corpus: str) -> tuple[list[str], list[float] | None]:
    """Split `0.7*a,0.3*b`; the weights are shares of the documents, and are None when none is given.

    What lies on this disk under the whole name is one corpus, with its commas.
    """
    if os.path.exists(os.path.expanduser(corpus)):  # noqa: PTH110, PTH111  # no, of one too long for a name
        return [corpus], None
    parts = [part.strip() for part in corpus.split(",")]
    found = [_WEIGHTED.fullmatch(part) for part in parts]
    names = [match[2].strip() if match else part for match, part in zip(found, parts, strict=True)]
    weights: list[Any] = [float(match[1]) if match else None for match in found]
    if len(names) == 1 or all(weight is None for weight in weights):
        return names, None
    for name, weight in zip(names, weights, strict=True):
        if weight is None or not 0 < weight < float("inf"):
            raise UsageError(f"mixture {corpus!r}: {name!r} needs a weight above 0, as in 0.7*one.jsonl,0.3*two.txt.")
    return names, weights


def check_ends(corpus: str | Path, asked: int | None, remedy: str) -> None:
    """Raise UsageError, with what to do, where all (None) of MicroItaliano is asked for, or of a mixture with it."""
    if asked is None and MICRO_ITALIANO in mixture(str(corpus))[0]:
        raise UsageError(f"{MICRO_ITALIANO} has no end: {remedy}.")


class CorpusStream:
    """The kept documents of one split of a corpus, with counts of everything, from any saved position on.

    Several corpora, separated by commas, are read in turn, a document from each, until all have ended; with weights
    (`0.7*a,0.3*b`) the corpus of each document is drawn by weight, from the seed.
    Raises: UsageError at the end of a corpus, or of a split of one, that holds no document.
    """

    def __init__(self, corpus: str | Path, reader: Reader | None = None):
        self.corpus, self.reader, self.counts = str(corpus), reader or Reader(), DocumentCounts()
        note = os.path.join(self.corpus, WRITTEN_FROM)  # noqa: PTH118  # no error of an endless name
        if self.reader.split == "heldout" and os.path.isfile(note):  # noqa: PTH113
            self.corpus = Path(note).read_text(encoding="utf-8")
        names, self.weights = mixture(self.corpus)
        if not all(names):  # an empty path is the working folder
            raise UsageError(f"corpus {self.corpus!r} lacks a name: one, or some with commas between, were expected.")
        self.parts = [_Part(name, self.reader, self.counts) for name in names]
        self.sieve = Sieve(self.reader)
        self.n_picks = self.turn = 0
        self.ended = [False] * len(self.parts)

    def __iter__(self) -> CorpusStream:
        return self

    def __next__(self) -> TextDocument:
        split = self.reader.split
        while not all(self.ended):
            part = self._pick()
            if (document := next(self.parts[part].documents, None)) is None:
                self.ended[part] = True
            elif not document.text or split != "all" and is_held_out(document.text) != (split == "heldout"):
                self.counts.drop("other_split")
            elif reason := self.sieve.reason_against(document.text):
                self.counts.drop(reason)
            else:
                self.counts.read += 1
                self.counts.kept += 1
                self.counts.characters += len(document.text)
                return document
        if self.counts.kept:
            raise StopIteration
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.dropped.items())
        raise UsageError(f"{self} has no document with text in it ({dropped or 'it is empty'}). Name another.")

    def __str__(self) -> str:
        return f"the {self.reader.split} split of corpus {self.corpus!r}".removeprefix("the all split of ")

    def _pick(self) -> int:
        """Return the part of the next document; pick number and seed decide it, so there is no generator to save."""
        self.n_picks += 1
        if self.weights is None:
            while self.ended[self.turn]:
                self.turn = (self.turn + 1) % len(self.parts)
            part, self.turn = self.turn, (self.turn + 1) % len(self.parts)
            return part
        digest = hashlib.blake2b(f"{self.reader.seed}/{self.n_picks}".encode(), digest_size=8).digest()
        edges = list(accumulate(0 if ended else w for w, ended in zip(self.weights, self.ended, strict=True)))
        last = max(part for part, ended in enumerate(self.ended) if not ended)  # for a point rounded up to the end
        return min(bisect_right(edges, int.from_bytes(digest, "big") / 2**64 * edges[-1]), last)

    def spec(self) -> dict[str, Any]:
        """Return all that decides the documents, to compare before a resumed run."""
        reader, parts = self.reader, [part.spec() for part in self.parts]
        mixed = {"parts": parts, "weights": self.weights, "seed": reader.seed}
        own = {name: getattr(reader, name) for name in ("split", "text_column", "on_broken", "max_chars")}
        filters = {name: getattr(reader, name) for name in FILTERS}
        return {**own, "filters": filters, "source": mixed if len(parts) > 1 else parts[0]}

    def state(self) -> dict[str, Any]:
        """Return the position of the next document, and the counts, as JSON."""
        own = {"n_picks": self.n_picks, "turn": self.turn, "ended": list(self.ended)}
        return own | {"parts": [part.state() for part in self.parts], "counts": self.counts.as_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises: DataError for a shard that is gone."""
        self.n_picks, self.turn, self.ended = state["n_picks"], state["turn"], list(state["ended"])
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load(part_state)
        self.counts.load(state["counts"])


def iter_documents(
    corpus: str | Path, split: Split = "all", *, seed: int = 0, text_column: str = "text"
) -> CorpusStream:
    """Return the documents of `corpus` in a fixed order, those of one split only.

    `corpus` is `micro-italiano` (unlimited), a name of the catalogue (`wikipedia-it`, `clean-mc4-it-tiny@parquet`), hub
    files (`hf://datasets/owner/name/*.parquet`), or a local file or folder: txt (documents are separated by blank
    lines), jsonl, csv (all three may be gzipped), parquet, conllu, or what `datasets.save_to_disk` wrote; or several of
    these, as `CorpusStream` takes them, with filters and what to do with broken lines.

    Raises: UsageError for an unknown corpus, a missing text column, naming the columns there are, and a split without any
    document; DataError for a broken line, naming file and line.
    """
    return CorpusStream(corpus, Reader(split=split, seed=seed, text_column=text_column))


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
    number of documents. The order is that of the shards: `.shuffle(seed=1, buffer_size=1000)` of a stream mixes.
    """
    from datasets import Dataset, Features, IterableDataset, Value

    check_whole(0 if streaming else 1, limit=limit)  # `datasets` makes no file without a row
    reader = reader or Reader(split=split, seed=seed, text_column=text_column)
    check_corpus(corpus, reader=replace(reader, split="all"))
    features = Features({name: Value("string") for name in TextDocument._fields})
    arguments: dict[str, Any] = {"corpus": str(corpus), "reader": reader, "limit": limit}
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    check_ends(corpus, limit, "give a limit, or stream it")
    key = fingerprint([CorpusStream(corpus, reader).spec(), limit, reader.seed])
    return Dataset.from_generator(_rows, features=features, gen_kwargs=arguments | {"version": key})


def check_corpus(corpus: str | Path, *, text_column: str = "text", reader: Reader | None = None) -> None:
    """Raise now, in one line, what reading the first document would raise, and UsageError when there is none."""
    next(CorpusStream(corpus, reader or Reader(text_column=text_column)))


def _rows(corpus: str, reader: Reader, limit: int | None, version: str = "") -> Iterator[dict[str, str]]:
    for document in islice(CorpusStream(corpus, reader), limit):
        yield document._asdict()

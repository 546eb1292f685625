"""Documents of a corpus as a stream that knows where it is: kept, dropped and mended are counted, and it can go on.

The position is (shard, row) for files, the index for MicroItaliano, and the positions of its parts for a mixture. A
stream that is given a saved state yields exactly the documents an uninterrupted one would have yielded from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.storage import fingerprint, read_json, write_json
from sae_italian.corpora import catalogue
from sae_italian.corpora.counts import Counts
from sae_italian.corpora.filters import Filters, Sieve
from sae_italian.corpora.hub import gate_of, list_files, route_of_entry, route_of_url
from sae_italian.corpora.locate import local_shards, remote_shards
from sae_italian.corpora.shards import MAX_DOCUMENT_CHARS, BadShard, Reading, Row, Shard, rows

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


@dataclass(frozen=True)
class Reader:
    """How a corpus is read; all of it decides which documents come, and in which order."""

    split: Split = "all"
    seed: int = 0
    text_column: str = "text"
    shuffle_shards: bool | None = None
    """Order the shards by seed; None: what the catalogue says, for a local corpus by name."""
    on_broken: Literal["refuse", "skip"] = "refuse"
    """A broken line or shard stops the reading with a message, or is counted and skipped."""
    max_chars: int = MAX_DOCUMENT_CHARS
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split {self.split!r} is unknown. {nearest(self.split, SPLITS)}")
        if self.on_broken not in ("refuse", "skip"):
            raise UsageError(f"on_broken is {self.on_broken!r}; it must be 'refuse' or 'skip'.")
        if self.max_chars < 1:
            raise UsageError(f"max_chars is {self.max_chars}; it must be 1 or more.")


class Source(Protocol):
    """Raw documents and the position of the next one."""

    def __next__(self) -> TextDocument: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def spec(self) -> Any: ...


OTHER_SPLIT = TextDocument("", "", "")  # a document that is known not to be of the split that is read
_HELD_OUT: dict[int, dict[int, TextDocument]] = {}  # MicroItaliano's held-out documents by seed and index
_MOST_KNOWN = 500_000  # documents, about 60 MB: 20 are made for each that is held out


class MicroSource:
    """MicroItaliano, from document `index` on, without end; held-out documents are made once in a process."""

    def __init__(self, seed: int, split: Split = "all"):
        self.seed, self.index = seed, 0
        self.known = _HELD_OUT.setdefault(seed, {}) if split == "heldout" else None

    def __next__(self) -> TextDocument:
        index, self.index = self.index, self.index + 1
        if self.known is None:
            return self._made(index)
        document = self.known.get(index)
        if document is None:
            document = self._made(index)
            if len(self.known) < _MOST_KNOWN:
                self.known[index] = document if is_held_out(document.text) else OTHER_SPLIT
        return document

    def _made(self, index: int) -> TextDocument:
        from sae_italian import micro_italiano

        document = micro_italiano.document(index, self.seed)
        return TextDocument(document.text, document.doc_id, document.register)

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def load(self, state: dict[str, Any]) -> None:
        self.index = state["index"]

    def spec(self) -> Any:
        return {"name": MICRO_ITALIANO, "seed": self.seed}


class ShardSource:
    """The rows of some shards, one shard after the other, those without text dropped and counted."""

    def __init__(self, name: str, shards: list[Shard], reading: Reading, reader: Reader, min_chars: int = 0):
        self.name, self.shards, self.reading = name, shards, reading
        self.min_chars, self.max_chars = min_chars, reading.max_chars
        if reader.shuffle_shards:
            self.shards = sorted(shards, key=lambda shard: fingerprint([reader.seed, shard.name]))
        self.shard = self.row = 0  # of the next document
        self._rows: Iterator[Row] | None = None

    def __next__(self) -> TextDocument:
        while self.shard < len(self.shards):
            shard = self.shards[self.shard]
            if self._rows is None:
                self._rows = rows(shard, self.reading, self.row)
            try:
                row = next(self._rows)
            except StopIteration:
                self._next_shard()
                continue
            except BadShard as error:
                self._refuse_or_skip(shard, error)
                continue
            self.row = row.number + 1
            document = self._document(shard, row)
            if document is not None:
                return document
        raise StopIteration

    def _next_shard(self) -> None:
        self.shard, self.row, self._rows = self.shard + 1, 0, None

    def _refuse_or_skip(self, shard: Shard, error: BadShard) -> None:
        message = str(error).rstrip(".")
        if not self.reading.skip_broken:
            missing_column = error.reason == "other_schema" and "has no column" in message
            if missing_column:
                raise UsageError(f"{message}." if message.endswith(")") else str(error)) from error
            raise DataError(
                f"{message}. {self.row:,} of its rows were read. Get it again and resume, or skip it (--on-broken skip)."
            ) from error
        self.reading.counts.drop(error.reason)
        self._next_shard()

    def _document(self, shard: Shard, row: Row) -> TextDocument | None:
        """Return the document of a row, mended; None when there is none, the reason counted."""
        counts, text = self.reading.counts, row.text
        if text is None:
            return None  # the reader has counted it
        if not isinstance(text, str):
            counts.drop("not_text")
            return None
        if "\x00" in text:
            text = text.replace("\x00", "")
            counts.mend("nul_bytes")
        if "\ufffd" in text:
            counts.mend("broken_utf8")
        if not text.strip():
            counts.drop("empty")
        elif len(text) > self.max_chars:
            self.reading.broken("too_long", f"{shard}, row {row.number}: {len(text):,} characters.")
        elif len(text) < self.min_chars:
            counts.drop("too_short")
        else:
            return TextDocument(_encodable(text), f"{shard.name}:{row.number}", row.source or shard.source)
        return None

    def state(self) -> dict[str, Any]:
        return {"shard": self.shards[self.shard].name if self.shard < len(self.shards) else None, "row": self.row}

    def load(self, state: dict[str, Any]) -> None:
        names = [shard.name for shard in self.shards] + [None]
        if state["shard"] not in names:
            raise DataError(
                f"corpus {self.name!r} has no shard {state['shard']!r} any more, where the reading stopped."
            )
        self.shard, self.row, self._rows = names.index(state["shard"]), state["row"], None

    def spec(self) -> Any:
        return {"name": self.name, "shards": [_identity(shard) for shard in self.shards]}


def _identity(shard: Shard) -> list[Any]:
    """Return what makes a shard this very file: its size, and the commit on the hub."""
    file = shard.file
    return [shard.name, file.stat().st_size if isinstance(file, Path) else [file.size, file.commit]]


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


class Mixture:
    """Documents of several sources: one of each in turn, or drawn by weight with a seed, until all have ended."""

    def __init__(self, parts: list[Source], weights: list[float] | None, seed: int):
        self.parts, self.weights, self.seed = parts, weights, seed
        self.n_picks = self.turn = 0
        self.ended = [False] * len(parts)

    def __next__(self) -> TextDocument:
        while not all(self.ended):
            i = self._pick()
            try:
                document = next(self.parts[i])
            except StopIteration:
                self.ended[i] = True
                continue
            return document
        raise StopIteration

    def _pick(self) -> int:
        """Return the part of the next document; pick number and seed decide it, so there is no generator to save."""
        self.n_picks += 1
        if self.weights is None:
            while self.ended[self.turn]:
                self.turn = (self.turn + 1) % len(self.parts)
            i, self.turn = self.turn, (self.turn + 1) % len(self.parts)
            return i
        digest = hashlib.blake2b(f"{self.seed}/{self.n_picks}".encode(), digest_size=8).digest()
        left = [0.0 if ended else weight for weight, ended in zip(self.weights, self.ended, strict=True)]
        point = int.from_bytes(digest, "big") / 2**64 * sum(left)
        alive = [i for i, weight in enumerate(left) if weight > 0]
        for i in alive[:-1]:
            point -= left[i]
            if point < 0:
                return i
        return alive[-1]

    def state(self) -> dict[str, Any]:
        own = {"n_picks": self.n_picks, "turn": self.turn, "ended": list(self.ended)}
        return own | {"parts": [part.state() for part in self.parts]}

    def load(self, state: dict[str, Any]) -> None:
        self.n_picks, self.turn, self.ended = state["n_picks"], state["turn"], list(state["ended"])
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load(part_state)

    def spec(self) -> Any:
        return {"parts": [part.spec() for part in self.parts], "weights": self.weights, "seed": self.seed}


def open_source(corpus: str | Path, reader: Reader, counts: Counts) -> Source:
    """Return the raw documents of a corpus: one, several separated by commas, or weighted ones (`0.7*a,0.3*b`)."""
    names, weights = _weighted(str(corpus))
    parts = [_open_one(name, reader, counts) for name in names]
    return parts[0] if len(parts) == 1 else Mixture(parts, weights, reader.seed)


def _weighted(corpus: str) -> tuple[list[str], list[float] | None]:
    """Split `0.7*a,0.3*b`; the weights are shares of the documents, and are None when none is given."""
    names, weights = [], []
    for part in corpus.split(","):
        head, star, tail = part.strip().partition("*")
        try:
            weight = float(head) if star and tail else None
        except ValueError:
            weight = None
        names.append(part.strip() if weight is None else tail.strip())
        weights.append(weight)
    if len(names) == 1 or all(weight is None for weight in weights):
        return names, None
    for name, weight in zip(names, weights, strict=True):
        if weight is None or not 0 < weight < float("inf"):
            raise UsageError(
                f"mixture {corpus!r}: {name!r} needs a weight above 0, as in 0.7*wikipedia-it,0.3*notizie.jsonl."
            )
    return names, weights


def _open_one(name: str, reader: Reader, counts: Counts) -> Source:
    if name == MICRO_ITALIANO:
        return MicroSource(reader.seed, reader.split)

    def reading(columns: tuple[str, ...], max_chars: int) -> Reading:
        return Reading(columns, reader.on_broken == "skip", counts, max_chars)

    located = catalogue.find(name)
    if located is not None and not Path(name).expanduser().exists():
        entry = located.entry
        columns = _columns(located, reader.text_column)
        shuffled = entry.shuffle_shards if reader.shuffle_shards is None else reader.shuffle_shards
        shards = remote_shards(route_of_entry(entry, located.route), entry.name)
        chosen = Reader(seed=reader.seed, shuffle_shards=shuffled)
        limit = min(reader.max_chars, entry.max_chars or reader.max_chars)
        return ShardSource(name, shards, reading(columns, limit), chosen, entry.min_chars)
    if name.startswith("hf://"):
        route = route_of_url(name)
        shards = remote_shards(list_files(route, name, gate_of(name, route.hub)), route.hub.rpartition("/")[2])
        return ShardSource(name, shards, reading((reader.text_column,), reader.max_chars), reader)
    shards = local_shards(Path(name).expanduser(), [MICRO_ITALIANO, *catalogue.names()])
    return ShardSource(name, shards, reading((reader.text_column,), reader.max_chars), reader)


def _columns(located: catalogue.Located, text_column: str) -> tuple[str, ...]:
    """Return the columns to try: the catalogue's, unless the caller names another than the default."""
    if text_column != "text":
        return (text_column,)
    if located.route_name == "english":
        swap = {"translation.it": "translation.en", "it": "en", "sentence_it": "sentence_en"}
        return tuple(
            swap.get(c, c.replace("_it", "_en").replace("italian", "english")) for c in located.entry.text_columns
        )
    return located.entry.text_columns


class CorpusStream:
    """The kept documents of one split of a corpus, with counts of everything, from any saved position on."""

    def __init__(self, corpus: str | Path, reader: Reader | None = None):
        self.corpus, self.reader = str(corpus), reader or Reader()
        self.counts = Counts()
        self.source = open_source(corpus, self.reader, self.counts)
        self.sieve = Sieve(self.reader.filters)

    def __iter__(self) -> CorpusStream:
        return self

    def __next__(self) -> TextDocument:
        split = self.reader.split
        while True:
            document = next(self.source)
            if document is OTHER_SPLIT or split != "all" and is_held_out(document.text) != (split == "heldout"):
                self.counts.drop("other_split")
                continue
            reason = self.sieve.reason_against(document.text)
            if reason is None:
                self.counts.keep(document.text)
                return document
            self.counts.drop(reason)

    def skip(self, n_documents: int) -> None:
        """Pass over raw documents, before split and filters."""
        for _ in range(n_documents):
            if next(self.source, None) is None:  # pyright: ignore[reportCallIssue, reportArgumentType]
                return

    def spec(self) -> dict[str, Any]:
        """Return all that decides the documents, to compare before a resumed run."""
        reader = self.reader
        own = {"split": reader.split, "text_column": reader.text_column, "on_broken": reader.on_broken}
        return own | {"filters": reader.filters.as_dict(), "max_chars": reader.max_chars, "source": self.source.spec()}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state(), "counts": self.counts.as_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load(state["source"])
        self.counts.load(state["counts"])

    def save(self, folder: Path) -> None:
        """Write the position into an existing folder; what duplicate removal remembers goes beside it."""
        if self.sieve.remembers:
            self.sieve.save(folder / "seen.npz")
        write_json(folder / "position.json", self.state())

    def load(self, folder: Path) -> None:
        self.load_state(read_json(folder / "position.json"))
        if self.sieve.remembers:
            self.sieve.load(folder / "seen.npz")

"""A SQLite file whose tables are record types: their columns, and what may be found at a path that is opened."""

from __future__ import annotations

import json
import sqlite3
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints
from urllib.parse import quote

from sae_italian.base.errors import DataError, SaeItalianError, UsageError

# Kept as SQLite's own user_version: 0 before the first release, 1 before rules said which keys they tell.
SCHEMA_VERSION = 2
CALLS_TABLE = "call"  # what was paid for: whatever else changes, it is carried over
BUSY_S = 60  # a second connection (the call ledger) waits this long for the first one's commit
_ELSEWHERE = {  # primary result codes of what is wrong with the folder or another process
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
_TYPES = {int: "INTEGER", float: "REAL", str: "TEXT"}
LONG = 500  # characters of JSON from which it is kept compressed: a rule's takes a third then
R = TypeVar("R", bound=NamedTuple)


def packed(value: Any, longest: int = LONG) -> str | bytes:
    """Return a value as JSON, compressed where that is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < longest else zlib.compress(text.encode())


def json_of(kept: str | bytes) -> str:
    """Return the JSON that `packed` made. Raises: ValueError for damaged bytes."""
    try:
        return kept if isinstance(kept, str) else zlib.decompress(kept).decode()
    except zlib.error as error:
        raise ValueError(error) from error


class RecordTable(Generic[R]):
    """A record type (a NamedTuple) as a table; a dict is kept as JSON, compressed where that is long.

    `key` names the columns that tell two rows apart. With `numbered` a row also has an `id` of its own; a `clustered` table
    is kept by its key instead of in the order the rows came: nothing is stored twice, which is half the file.
    """

    def __init__(self, name: str, record: type[R], *key: str, numbered: bool = False, clustered: bool = False):
        self.name, self.record, self.fields = name, record, ", ".join(record._fields)
        kinds = {field: getattr(hint, "__args__", (hint,)) for field, hint in get_type_hints(record).items()}
        self.json_columns = {field for field, (kind, *_) in kinds.items() if kind not in _TYPES}
        columns = ["id INTEGER PRIMARY KEY"] if numbered else []
        for field, (kind, *others) in kinds.items():
            columns.append(f"{field} {_TYPES.get(kind, 'TEXT')}{'' if type(None) in others else ' NOT NULL'}")
        columns.append(f"{'UNIQUE' if numbered else 'PRIMARY KEY'} ({', '.join(key)})")
        ending, self.number = (" WITHOUT ROWID", "0") if clustered else ("", "rowid")
        self.create = f"CREATE TABLE IF NOT EXISTS {name} ({', '.join(columns)}){ending}"

    def add(self, connection: sqlite3.Connection, records: Iterable[R], *, replace: bool = False) -> None:
        """Insert records; with `replace` in the place of those with the same key."""
        verb, places = "INSERT OR REPLACE" if replace else "INSERT", ", ".join("?" * len(self.record._fields))
        rows = map(self._written, records) if self.json_columns else records
        connection.executemany(f"{verb} INTO {self.name} ({self.fields}) VALUES ({places})", rows)

    def _written(self, record: R) -> R:
        told = {name: getattr(record, name) for name in self.json_columns}
        longest = sys.maxsize if self.name == CALLS_TABLE else LONG  # paid answers stay readable by any program
        return record._replace(**{name: packed(value, longest) for name, value in told.items() if value is not None})

    def select(
        self, connection: sqlite3.Connection, rest: str = "", parameters: Sequence[Any] = ()
    ) -> Iterator[tuple[int, R]]:
        """Yield each row's number and record; `rest` is what comes after FROM."""
        query = f"SELECT {self.number}, {self.fields} FROM {self.name} {rest}"
        for number, *values in connection.execute(query, parameters):
            record = self.record._make(values)
            try:
                texts = {name: text for name in self.json_columns if (text := getattr(record, name)) is not None}
                yield number, record._replace(**{name: json.loads(json_of(text)) for name, text in texts.items()})
            except (ValueError, RecursionError) as error:
                raise sqlite3.DatabaseError(f"row {number} of {self.name} is damaged: {error}") from error


def connect(
    path: Path, tables: Iterable[RecordTable[Any]], *, durable: bool = False, forget: bool = False
) -> sqlite3.Connection:
    """Open or create the file. With `durable` a commit is on the disk itself before it returns.

    With `forget` everything but the calls is dropped, an earlier version's tables too. Raises: DataError when it is no
    store, UsageError when another version of sae_italian wrote it or it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, "rwc", "written") as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        # NORMAL loses no commit when the process is killed, but may when the power fails
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.execute("BEGIN IMMEDIATE")
        found = _tables_of(connection, path, carry_over=forget)
        for name in found - {CALLS_TABLE} if forget else ():
            connection.execute(f"DROP TABLE {name}")
        for table in tables:
            connection.execute(table.create)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    connection.isolation_level = "DEFERRED"
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file that cannot be written, or shall not be. Raises: as `connect`."""
    try:
        with _opened(path, "ro", "read") as connection:
            _tables_of(connection, path)
    except UsageError:
        # a store in WAL mode whose folder is read only opens as immutable, unless somebody else has it open
        with _opened(path, "ro&immutable=1", "read") as connection:
            _tables_of(connection, path)
    return connection


@contextmanager
def _opened(path: Path, mode: str, doing: str) -> Iterator[sqlite3.Connection]:
    """Open a file for what is done with it first; where that fails nothing stays open. Raises: as `connect`."""
    connection = None
    try:
        address = f"file:{quote(str(path.resolve()))}?mode={mode}"
        # the call ledger is opened in one thread and used in others, never in two at once
        connection = sqlite3.connect(address, BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
        yield connection
    except (sqlite3.DatabaseError, UsageError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, UsageError):
            raise
        raise problem(path, error, doing) from error


def problem(path: Path, error: sqlite3.DatabaseError, doing: str = "written") -> SaeItalianError:
    """Return what is wrong with a file: UsageError where it is the folder or another process, else DataError."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _ELSEWHERE:
        return UsageError(f"{path} cannot be {doing} now: {error}.")
    return DataError(f"{path} is not a store of explanations ({error}). Remove it or name another file.")


def _tables_of(connection: sqlite3.Connection, path: Path, *, carry_over: bool = False) -> set[str]:
    """Return the names of the tables. Raises: UsageError for another version, DatabaseError for what is no store."""
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if found and not found & {"run", "explanation", CALLS_TABLE}:
        raise sqlite3.DatabaseError(f"its tables are {', '.join(sorted(found))}")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by a newer sae_italian (schema {version}, this one knows {SCHEMA_VERSION}). "
            "Upgrade, or name another file."
        )
    if found and version < SCHEMA_VERSION and not carry_over:
        raise UsageError(
            f"{path} was written by an earlier sae_italian. Run `sae-italian autointerp {path.parent} --overwrite` again: "
            "answers of language models that were paid for are carried over."
        )
    return found

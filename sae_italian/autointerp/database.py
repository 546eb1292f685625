"""A SQLite file whose tables are record types: their columns, and what may be found at a path that is opened."""

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

# Kept as SQLite's own user_version: 0 before the first release, 1 before rules said which keys they tell, 2 before names were
# kept by number.
SCHEMA_VERSION = 3
CALLS_TABLE = "call"  # what was paid for: whatever else changes, it is carried over
BUSY_S = 60  # a second connection (the call ledger) waits this long for the first one's commit
_ELSEWHERE = {  # primary result codes of what is wrong with the folder or another process
    getattr(sqlite3, f"SQLITE_{name}") for name in ("PERM", "BUSY", "LOCKED", "READONLY", "IOERR", "FULL", "CANTOPEN")
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
    is kept by its key instead of in the order the rows came: nothing is stored twice, which is half the file. The names in
    `coded` columns are kept by number, and read and written as they are: a quarter of the file.
    """

    def __init__(
        self,
        name: str,
        record: type[R],
        *key: str,
        numbered: bool = False,
        clustered: bool = False,
        coded: Sequence[str] = (),
    ):
        self.name, self.record, self.fields = name, record, ", ".join(record._fields)
        kinds = {field: getattr(hint, "__args__", (hint,)) for field, hint in get_type_hints(record).items()}
        self.json_columns = {field for field, (kind, *_) in kinds.items() if kind not in _TYPES}
        columns = ["id INTEGER PRIMARY KEY"] if numbered else []
        for field, (kind, *others) in kinds.items():
            kept = "INTEGER" if field in coded else _TYPES.get(kind, "TEXT")
            columns.append(f"{field} {kept}{'' if type(None) in others else ' NOT NULL'}")
        columns.append(f"{'UNIQUE' if numbered else 'PRIMARY KEY'} ({', '.join(key)})")
        ending, self.number = (" WITHOUT ROWID", "0") if clustered else ("", "rowid")
        table = f"{name}_by_number" if coded else name
        self.create = [f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)}){ending}"]
        if coded:
            self.create += _by_name(name, table, record._fields, key, coded)

    def add(self, connection: sqlite3.Connection, records: Iterable[R], *, replace: bool = False) -> None:
        """Insert records; with `replace` in the place of those with the same key."""
        verb, places = "INSERT OR REPLACE" if replace else "INSERT", ", ".join("?" * len(self.record._fields))
        rows = map(self._written, records) if self.json_columns else records
        connection.executemany(f"{verb} INTO {self.name} ({self.fields}) VALUES ({places})", rows)

    def _written(self, record: R) -> R:
        told = {name: getattr(record, name) for name in self.json_columns}
        longest = sys.maxsize if self.name == CALLS_TABLE else LONG  # paid answers stay readable anywhere
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


def _by_name(name: str, table: str, fields: Sequence[str], key: Sequence[str], coded: Sequence[str]) -> list[str]:
    """Return what makes a view `name` of a table that keeps some columns by the number of their word.

    Whoever reads, adds or deletes rows need not know of the numbers.
    """
    shown = ", ".join(f"{field}_.word AS {field}" if field in coded else f"kept.{field}" for field in fields)
    joined = " ".join(f"JOIN word {field}_ ON {field}_.id = kept.{field}" for field in coded)

    def numbers(row: str, some: Sequence[str]) -> dict[str, str]:
        number = "(SELECT id FROM word WHERE word = {}.{})"
        return {field: (number if field in coded else "{}.{}").format(row, field) for field in some}

    words = ", ".join(f"(new.{field})" for field in coded)
    same = " AND ".join(f"{field} = {value}" for field, value in numbers("old", key).items())
    return [
        "CREATE TABLE IF NOT EXISTS word (id INTEGER PRIMARY KEY, word TEXT NOT NULL UNIQUE)",
        f"CREATE VIEW IF NOT EXISTS {name} AS SELECT {shown} FROM {table} kept {joined}",
        f"""CREATE TRIGGER IF NOT EXISTS {name}_comes INSTEAD OF INSERT ON {name} BEGIN
            INSERT OR IGNORE INTO word (word) VALUES {words};
            INSERT INTO {table} VALUES ({", ".join(numbers("new", fields).values())}); END""",
        f"""CREATE TRIGGER IF NOT EXISTS {name}_goes INSTEAD OF DELETE ON {name} BEGIN
            DELETE FROM {table} WHERE {same}; END""",
    ]


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
        for name, kind in found.items() if forget else ():
            if name != CALLS_TABLE:
                connection.execute(f"DROP {kind} {name}")
        for table in tables:
            for statement in table.create:
                connection.execute(statement)
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
    except (sqlite3.DatabaseError, UnicodeDecodeError, UsageError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, UsageError):
            raise
        raise problem(path, error, doing) from error


def problem(path: Path, error: sqlite3.DatabaseError | UnicodeDecodeError, doing: str = "written") -> SaeItalianError:
    """Return what is wrong with a file: UsageError where it is the folder or another process, else DataError."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _ELSEWHERE:
        return UsageError(f"{path} cannot be {doing} now: {error}.")
    return DataError(f"{path} is not a store of explanations ({error}). Remove it or name another file.")


def _tables_of(connection: sqlite3.Connection, path: Path, *, carry_over: bool = False) -> dict[str, str]:
    """Return the tables and views by name. Raises: UsageError for another version, DatabaseError for what is no store."""
    found = dict(connection.execute("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')"))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if found and not found.keys() & {"run", "explanation", CALLS_TABLE}:
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

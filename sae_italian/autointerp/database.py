"""The SQLite file of a store: its tables (`store.sql`), its JSON, and what may be found at a path that is opened."""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_italian.base.errors import DataError, SaeItalianError, UsageError

# Kept as SQLite's own user_version: 0 before the first release, 1 before rules said which keys they tell, 2 before names were
# kept by number.
SCHEMA_VERSION = 3
TABLES = ("run", "feature", "explanation", "score", "falls", "judgement", "call", "label")
JSON_COLUMNS = ("rule", "notes", "falls", "reply")
BUSY_S = 60  # a second connection (the call ledger) waits this long for the first one's commit
LONG = 500  # characters of JSON from which it is kept compressed: a rule's takes a third then
_ELSEWHERE = {  # primary result codes of what is wrong with the folder or another process
    getattr(sqlite3, f"SQLITE_{name}") for name in ("PERM", "BUSY", "LOCKED", "READONLY", "IOERR", "FULL", "CANTOPEN")
}


def packed(value: Any) -> str | bytes:
    """Return a value as JSON, compressed where that is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < LONG else zlib.compress(text.encode())


sqlite3.register_adapter(dict, packed)  # so that a dict is written as any other value


def json_of(kept: str | bytes) -> str:
    """Return the JSON that `packed` made. Raises: ValueError for damaged bytes."""
    try:
        return kept if isinstance(kept, str) else zlib.decompress(kept).decode()
    except zlib.error as error:
        raise ValueError(error) from error


def unpacked(kept: Any, row: Any, table: str) -> Any:
    """Return the value that `packed` was given. Raises: sqlite3.DatabaseError naming the row of damaged bytes."""
    try:
        return None if kept is None else json.loads(json_of(kept))
    except (ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"row {row} of {table} is damaged: {error}") from error


def insert(connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]], *, replace: bool = False) -> None:
    """Insert rows, a value for each column; with `replace` in the place of those with the same key."""
    if every := list(rows):
        verb, places = "INSERT OR REPLACE" if replace else "INSERT", ", ".join("?" * len(every[0]))
        connection.executemany(f"{verb} INTO {table} VALUES ({places})", every)


def connect(path: Path, *, durable: bool = False, forget: bool = False) -> sqlite3.Connection:
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
            if name != "call":
                connection.execute(f"DROP {kind} {name}")
        for statement in Path(__file__).with_name("store.sql").read_text("utf-8").split("\n\n"):
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
    if found and not found.keys() & {"run", "explanation", "call"}:
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

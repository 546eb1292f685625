"""The SQLite file of a store: its tables, their version, and the way from an earlier version to this one.

Version 1 knew rules only. Version 2 adds what an LLM brings (who explained, with which prompt, in which language), the
judgements behind a score, the calls that were paid for, and how many examples went without a usable answer. Version 3
adds the labels of annotated words that single latents detect.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from urllib.parse import quote

from sae_italian.base.errors import DataError, UsageError

SCHEMA_VERSION = 3
BUSY_S = 60  # a second connection (the call ledger) waits this long for the first one's commit

_TABLES = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS feature (
    latent INTEGER PRIMARY KEY,
    n_active INTEGER NOT NULL,            -- tokens on which the latent fires
    maximum REAL NOT NULL,
    n_train INTEGER NOT NULL, n_val INTEGER NOT NULL, n_test INTEGER NOT NULL   -- segments to draw positives from
);
CREATE TABLE IF NOT EXISTS explanation (
    id INTEGER PRIMARY KEY,
    latent INTEGER NOT NULL,
    explainer TEXT NOT NULL,              -- token-statistics, token-lookup, llm:MODEL:it1, ...
    status TEXT NOT NULL,                 -- ok, dead, too few activations, failed
    text_it TEXT NOT NULL,
    text_en TEXT NOT NULL,
    rule TEXT,                            -- JSON, NULL for an LLM's and unless ok
    kind TEXT NOT NULL DEFAULT 'rule',    -- rule, llm
    prompt TEXT NOT NULL DEFAULT '',      -- version and hash of the prompt
    notes TEXT,                           -- JSON: wrong language, examples dropped, why it failed
    UNIQUE (latent, explainer)
);
CREATE TABLE IF NOT EXISTS score (
    explanation_id INTEGER NOT NULL REFERENCES explanation(id),
    latent INTEGER NOT NULL,              -- whose examples were judged
    control TEXT NOT NULL,                -- '', shuffled: the explanation of another latent, empty: a text that explains nothing
    scorer TEXT NOT NULL,
    judge TEXT NOT NULL,
    negatives TEXT NOT NULL,
    metric TEXT NOT NULL,
    value REAL, lo REAL, hi REAL,
    n_positive INTEGER NOT NULL,
    n_negative INTEGER NOT NULL,
    n_failed INTEGER NOT NULL DEFAULT 0,  -- examples without a usable answer
    split TEXT NOT NULL DEFAULT 'test',
    PRIMARY KEY (latent, explanation_id, control, scorer, judge, negatives, metric)
);
CREATE TABLE IF NOT EXISTS judgement (
    explanation_id INTEGER NOT NULL REFERENCES explanation(id),
    latent INTEGER NOT NULL,
    control TEXT NOT NULL,
    scorer TEXT NOT NULL,
    judge TEXT NOT NULL,
    example INTEGER NOT NULL,             -- place in what the scorer showed
    first INTEGER NOT NULL,               -- position of its first token in the cache
    negatives TEXT NOT NULL,              -- source of a negative, '' for a positive
    said INTEGER NOT NULL,                -- 1 yes, 0 no, -1 no usable answer
    probability REAL,
    PRIMARY KEY (latent, explanation_id, control, scorer, judge, example)
);
CREATE TABLE IF NOT EXISTS call (
    request_hash TEXT PRIMARY KEY,        -- of model, messages and parameters, not of the endpoint
    model TEXT NOT NULL,
    purpose TEXT NOT NULL,                -- explain, repair, detection, fuzzing, simulation
    status TEXT NOT NULL,                 -- ok, or why there is no answer
    reply TEXT,                           -- JSON: text, finish reason, log-probabilities
    tokens_in INTEGER, tokens_cached INTEGER, tokens_out INTEGER,   -- NULL where the server does not say
    usd REAL,                             -- NULL where the price is not known
    usd_uncertain REAL NOT NULL DEFAULT 0,  -- at most this much for attempts whose answer was lost
    latency REAL NOT NULL,                -- seconds, of the attempt that was answered
    attempts INTEGER NOT NULL,
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS label (
    latent INTEGER NOT NULL,
    label TEXT NOT NULL,                  -- UPOS=NOUN, Gender=Fem,Number=Plur, Language=it, ...
    source TEXT NOT NULL,                 -- whose words: UD ISDT, ...
    f1 REAL NOT NULL, lo REAL, hi REAL,   -- with its 95 % interval over sentences or documents
    precision REAL NOT NULL, recall REAL NOT NULL,
    n INTEGER NOT NULL,                   -- words that bear the label among those that were judged
    threshold REAL NOT NULL DEFAULT 0,    -- the latent says yes above this share of its maximum
    PRIMARY KEY (latent, label, source)
);
"""
_NEW_COLUMNS = {  # version 1 -> 2
    "explanation": ("kind TEXT NOT NULL DEFAULT 'rule'", "prompt TEXT NOT NULL DEFAULT ''", "notes TEXT"),
    "score": ("n_failed INTEGER NOT NULL DEFAULT 0", "split TEXT NOT NULL DEFAULT 'test'"),
}
_ELSEWHERE = {  # primary result codes of what is wrong with the folder or another process, not with the file
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
TABLES = ("run", "feature", "explanation", "score", "judgement", "call", "label")


def connect(path: Path) -> sqlite3.Connection:
    """Open or create the file, bringing an older version up to this one in one transaction.

    Raises: DataError when it is no store, UsageError when a newer sae_italian wrote it or it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the call ledger is opened in one thread and used in another, never in two at once
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing; the file stays whole
        connection.execute("BEGIN IMMEDIATE")
        _migrate(connection, path)
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _ELSEWHERE:
            raise UsageError(f"{path} cannot be written now: {error}.") from error
        raise DataError(f"{path} is not a store of explanations ({error}). Remove it or name another file.") from error
    except UsageError:
        connection.close()
        raise
    connection.isolation_level = "DEFERRED"
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file that cannot be written, or shall not be; an older version is brought up to this one in memory.

    Raises: DataError when it is no store, UsageError when a newer sae_italian wrote it or it cannot be read.
    """
    name = f"file:{quote(str(path.resolve()))}?mode=ro"
    # a store in WAL mode whose folder is read only opens as immutable, unless somebody else has it open
    problem = ""
    for address in (name, f"{name}&immutable=1"):
        connection = None
        try:
            connection = sqlite3.connect(address, uri=True, timeout=BUSY_S, check_same_thread=False)
            version = connection.execute("SELECT value FROM run WHERE key = 'schema_version'").fetchone()
            if version and version[0] == str(SCHEMA_VERSION):
                return connection
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.backup(copy)
            connection.close()
            _migrate(copy, path)
            return copy
        except sqlite3.OperationalError as error:
            problem = str(error)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path} is not a store of explanations ({error}). Remove it.") from error
        if connection is not None:
            connection.close()
    raise UsageError(f"{path} cannot be read: {problem}.")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not tables & set(TABLES):
        raise sqlite3.DatabaseError(f"its tables are {', '.join(sorted(tables))}")
    rows = (
        connection.execute("SELECT value FROM run WHERE key = 'schema_version'").fetchone() if "run" in tables else None
    )
    version = int(json.loads(rows[0])) if rows else SCHEMA_VERSION
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by a newer sae_italian (schema {version}, this one knows {SCHEMA_VERSION}). "
            "Upgrade, or name another file."
        )
    if version < 2:
        for table, columns in _NEW_COLUMNS.items():
            for column in columns if table in tables else ():
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    for statement in _TABLES.split(";"):
        if statement.strip():
            connection.execute(statement)
    if rows and version < SCHEMA_VERSION:
        connection.execute("UPDATE run SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))

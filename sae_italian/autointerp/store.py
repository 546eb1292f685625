"""Explanations and scores in SQLite (`store.sql`): one file beside the cache, written latent by latent, resumed by itself."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.errors import DataError, SaeItalianError, UsageError

NO_ANSWER = "no answer"  # status of what the endpoint failed on or refused: a rerun asks again
UNANSWERED = -2  # what a judge `said` where the endpoint failed: a rerun judges the latent again
Row = Sequence[Any]  # of a table, a value for each column
NOW = "@now"  # ends the explainer's name of what was made on demand (work.py), which belongs to no run
# Kept as SQLite's own user_version: 0 before the first release, 1 before rules said which keys they tell, 2 before names were
# kept by number.
SCHEMA_VERSION = 3
TABLES = ("run", "feature", "explanation", "score", "falls", "judgement", "call", "label")
JSON_COLUMNS = {"rule", "notes", "falls", "reply"}
BUSY_S = 60  # a second connection (the call ledger) waits this long for the first one's commit
LONG = 500  # characters of JSON from which it is kept compressed: a rule's takes a third then
_ELSEWHERE = {  # primary result codes of what is wrong with the folder or another process
    getattr(sqlite3, f"SQLITE_{name}") for name in ("PERM", "BUSY", "LOCKED", "READONLY", "IOERR", "FULL", "CANTOPEN")
}


class Explanation(NamedTuple):
    """One explainer's text about one latent."""

    latent: int
    explainer: str  # token-statistics, token-lookup, llm:MODEL:it1, ...
    status: str  # ok, dead, too few activations, failed (the LLM's answer is unusable), no answer
    text_it: str
    text_en: str
    rule: dict[str, Any] | None  # None for an LLM's, and unless ok
    kind: str = "rule"  # or llm
    prompt: str = ""  # version and hash of the prompt
    notes: dict[str, Any] | None = None  # wrong language, examples dropped, why it failed
    id: int = 0  # in the store; 0 of what is in none

    def text(self, language: str) -> str:
        """Return the text in that language, else in the other one."""
        return (self.text_it or self.text_en) if language == "it" else (self.text_en or self.text_it)

    def title(self, language: str) -> str:
        """Return the latent's short title (wording.py), "" for an LLM's explanation and in an older store."""
        return ((self.rule or {}).get("title") or {}).get(language, "")


class Label(NamedTuple):
    """One label that a latent detects, on words that did not choose the latent."""

    latent: int
    label: str  # UPOS=NOUN, Gender=Fem,Number=Plur, Language=it
    source: str  # whose words: UD ISDT
    f1: float
    lo: float | None  # 95 % interval over sentences or documents
    hi: float | None
    precision: float
    recall: float
    n: int  # words that bear the label among those that were judged
    threshold: float = 0.0  # the latent says yes above this share of its maximum


class Store:
    """The store of one cache and one configuration. Use as a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, read_only: bool = False):
        """Open or create. Raises: UsageError when the file belongs to another cache or configuration."""
        self.path = path
        self.connection = connect_to_read(path) if read_only else connect(path)
        wanted = {key: json.dumps(value) for key, value in identity.items()}
        try:
            known, unused = self.notes(), not self._any("explanation WHERE explainer NOT LIKE ?", "%" + NOW)
            for key, value in wanted.items():
                # labels, or what was asked on demand, may come first: what they did not say is claimed now
                if known.get(key) != value and not (unused and key not in known):
                    raise UsageError(
                        f"{path} was made with another {key} ({known.get(key)} then, {value} now): its "
                        "scores do not hold for this run. Use --overwrite, or name another file."
                    )
            if unused and not read_only:
                self.note(wanted)
        except (sqlite3.DatabaseError, UsageError) as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close the file. Raises: as `connect`, for what SQLite found while it was read and written."""
        self.connection.close()
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
            raise problem(self.path, error) from error

    def _any(self, rows: str, *parameters: Any) -> bool:
        return self.connection.execute(f"SELECT 1 FROM {rows}", parameters).fetchone() is not None

    def claim(self, name: str, settings: dict[str, Any], *, judge: bool = False) -> None:
        """Remember the settings of an explainer or a `judge`, named by its class and its name.

        Raises: UsageError when it worked here with others; what it only tried without a result binds nobody.
        """
        key, value = f"settings of {name}", json.dumps(settings, sort_keys=True, ensure_ascii=False)
        known, who = self.notes().get(key), name.partition(" ")[2]
        explained = "explanation WHERE explainer = ? AND status IN ('ok', 'failed')"
        if known not in (None, value) and self._any("score WHERE judge = ?" if judge else explained, who):
            then, now = json.loads(known), json.loads(value)
            changed = ", ".join(sorted(k for k in then | now if then.get(k) != now.get(k)))
            raise UsageError(
                f"{self.path} holds work of {name} with other settings ({changed}). Use --overwrite, or "
                "name another file."
            )
        self.note({key: value})

    def note(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the run by name, such as what an endpoint cannot do."""
        with self.connection:
            insert(self.connection, "run", facts.items(), replace=True)

    def notes(self) -> dict[str, str]:
        return dict(self.connection.execute("SELECT key, value FROM run"))

    def add_explanations(self, explanations: Iterable[Explanation], features: Iterable[Row] = ()) -> None:
        """Add explanations and what they were made from, all or nothing; one that had no answer gives way to a later one."""
        rows = list(explanations)
        query = "DELETE FROM explanation WHERE latent = ? AND explainer = ? AND status = ?"
        with self.connection:
            insert(self.connection, "feature", features, replace=True)
            self.connection.executemany(query, [(row.latent, row.explainer, NO_ANSWER) for row in rows])
            insert(self.connection, "explanation", ((None, *row[:-1]) for row in rows))

    def replace_explanations(self, explanations: Sequence[Explanation]) -> dict[str, int]:
        """Put explanations in the place of their explainers' earlier ones, whose scores go too; return ids by explainer."""
        old = "SELECT id FROM explanation WHERE latent = ? AND explainer = ?"
        with self.connection:
            for table in ("judgement", "score", "falls", "explanation"):
                which = f"{'id' if table == 'explanation' else 'explanation_id'} IN ({old})"
                self.connection.executemany(f"DELETE FROM {table} WHERE {which}", [e[:2] for e in explanations])
        self.add_explanations(explanations)
        return {e.explainer: self.connection.execute(old, e[:2]).fetchone()[0] for e in explanations}

    def explanations_of(self, latent: int) -> dict[str, Explanation]:
        """Return the explanations of one latent by explainer."""
        return {one.explainer: one for one in self._explanations("latent = ? ORDER BY id", latent)}

    def explanations(self, explainer: str) -> dict[int, Explanation]:
        """Return one explainer's explanations by latent."""
        return {one.latent: one for one in self._explanations("explainer = ? ORDER BY latent", explainer)}

    def _explanations(self, which: str, value: Any) -> Iterator[Explanation]:
        query = f"SELECT * FROM explanation WHERE {which}"
        for number, *values in self.connection.execute(query, (value,)):
            found = Explanation._make([*values, number])
            rule, notes = (unpacked(kept, number, "explanation") for kept in (found.rule, found.notes))
            yield found._replace(rule=rule, notes=notes)

    def explainers(self) -> list[str]:
        """Return the names that explanations are kept under, in the order of their first one."""
        query = "SELECT explainer FROM explanation GROUP BY 1 ORDER BY min(id)"
        return [name for (name,) in self.connection.execute(query)]

    def scored(self, explainer: str, judge: str) -> set[int]:
        """Return the latents whose explanations by this explainer the judge has judged, but those its endpoint failed on."""
        own = "SELECT latent FROM {} WHERE judge = ? AND explanation_id IN (SELECT id FROM explanation WHERE explainer = ?)"
        sets = f"{own.format('score')} UNION {own.format('judgement')} EXCEPT {own.format('judgement')} AND said = ?"
        return {row[0] for row in self.connection.execute(sets, 3 * (judge, explainer) + (UNANSWERED,))}

    def add_scores(self, rows: Iterable[Row], falls: Iterable[Row] = (), judgements: Iterable[Row] = ()) -> None:
        """Add rows of `score` (all but the `split`), of `falls` and of `judgement`; a judge's on missing answers give way.

        Those of an earlier stranger too: who is another latent's control changes with what is explained.
        """
        scores, judged = list(rows), list(judgements)
        where = """latent = ? AND judge = ? AND (SELECT explainer FROM explanation WHERE id = explanation_id)
                   = (SELECT explainer FROM explanation WHERE id = ?)"""
        with self.connection:
            for key in {(latent, judge, of) for of, latent, _, _, judge, *_ in [*scores, *judged]}:
                if self._any(f"judgement WHERE {where} AND said = ?", *key, UNANSWERED):
                    for table in ("score", "falls", "judgement"):
                        self.connection.execute(f"DELETE FROM {table} WHERE {where}", key)
            insert(self.connection, "score", ((*row, "test") for row in scores))
            insert(self.connection, "falls", falls)
            insert(self.connection, "judgement", judged)

    def scores(self, explainer: str, judge: str) -> dict[tuple[str, ...], dict[int, Any]]:
        """Return value and lower end of all scores of one explainer's texts by one judge, by name and latent.

        A name is control, scorer, negatives and metric. None is what could not be scored, or has no interval. A rule's score
        and an LLM's are different: never both at once.
        """
        # by the words' numbers: SQLite may run through the table once for each word that the view puts in their place
        query = """SELECT control, scorer, negatives, metric, latent, value, lo FROM score_by_number
                   WHERE judge = (SELECT id FROM word WHERE word = ?)
                     AND explanation_id IN (SELECT id FROM explanation WHERE explainer = ?) ORDER BY latent"""
        words, found = dict(self.connection.execute("SELECT id, word FROM word")), defaultdict(dict)
        for *name, latent, value, lo in self.connection.execute(query, (judge, explainer)):
            found[tuple(name)][latent] = value, lo
        return {tuple(words[number] for number in name): rows for name, rows in found.items()}

    def values(
        self, explainer: str, *, scorer: str, negatives: str, metric: str, control: str = "", judge: str = "rule"
    ) -> dict[int, float]:
        """Return one metric by latent, where it has a value."""
        found = self.scores(explainer, judge).get((control, scorer, negatives, metric), {})
        return {latent: value for latent, (value, _) in found.items() if value is not None}

    def falls(self, explainer: str, judge: str) -> dict[tuple[str, int], dict[str, list[int | None]]]:
        """Return by control and latent how scores fall without a group of documents; {} in a store older than these."""
        query = """SELECT control, latent, falls FROM falls
                   WHERE judge = ? AND explanation_id IN (SELECT id FROM explanation WHERE explainer = ?)"""
        found = self.connection.execute(query, (judge, explainer))
        return {(control, latent): unpacked(kept, latent, "falls") or {} for control, latent, kept in found}

    def judged(self) -> list[tuple[str, str]]:
        """Return explainer and judge of all who told a latent's examples apart, in the order they came, the rules' own first.

        An encoder and the subject model only rank examples.
        """
        query = """SELECT explainer, judge FROM score JOIN explanation ON explanation.id = explanation_id
                   WHERE control = '' AND judge NOT LIKE 'always-%' AND scorer IN ('detection', 'fuzzing', 'simulation')
                   GROUP BY 1, 2 ORDER BY min(explanation_id), judge != 'rule', judge"""
        return self.connection.execute(query).fetchall()

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Add labels at once; earlier ones of the same sources give way."""
        with self.connection:
            self.connection.executemany("DELETE FROM label WHERE source = ?", {(row.source,) for row in labels})
            insert(self.connection, "label", labels)

    def labels(self) -> list[Label]:
        """Return all labels, the best F1 first."""
        found = self.connection.execute("SELECT * FROM label ORDER BY f1 DESC, latent, label, source")
        return list(map(Label._make, found))

    def spending(self) -> dict[str, Any]:
        """Return calls, tokens and cost by model; `usd` is None where a call's price is not known."""
        query = """SELECT model, count(*), sum(status != 'ok'), sum(tokens_in), sum(tokens_cached), sum(tokens_out),
                          CASE WHEN count(usd) = sum(status = 'ok') THEN total(usd) END, total(usd_uncertain)
                   FROM call GROUP BY model ORDER BY model"""
        names = ("calls", "failed", "tokens_in", "tokens_cached", "tokens_out", "usd", "usd_uncertain")
        return {model: dict(zip(names, rest, strict=True)) for model, *rest in self.connection.execute(query)}


def forget(path: Path) -> None:
    """Drop all of a store but its calls, which were paid for and answer a rerun; a file that is no store is removed."""
    try:
        if path.is_file():
            connect(path, forget=True).close()
    except DataError:
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)


# --- the file ---------------------------------------------------------------------------------------------------------


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
        for name, kind in _tables_of(connection, path, carry_over=forget).items():
            if forget and name != "call":
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
    address = f"{path.resolve().as_uri()}?mode={mode}"
    try:
        with ExitStack() as stack:
            # the call ledger is opened in one thread and used in others, never in two at once
            connection = sqlite3.connect(address, BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
            stack.callback(connection.close)
            yield connection
            stack.pop_all()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
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


# --- its rows ---------------------------------------------------------------------------------------------------------


def packed(value: Any) -> Any:
    """Return a dict as JSON, compressed where that is long; any other value as it is."""
    if not isinstance(value, dict):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < LONG else zlib.compress(text.encode())


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


def insert(connection: sqlite3.Connection, table: str, rows: Iterable[Row], *, replace: bool = False) -> None:
    """Insert rows, a value for each column; with `replace` in the place of those with the same key."""
    if every := [tuple(map(packed, row)) for row in rows]:
        verb, places = "INSERT OR REPLACE" if replace else "INSERT", ", ".join("?" * len(every[0]))
        connection.executemany(f"{verb} INTO {table} VALUES ({places})", every)

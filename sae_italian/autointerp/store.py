"""Explanations and scores in SQLite: one file beside the cache, written latent by latent, resumed by itself."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.database import CALLS_TABLE, RecordTable, connect, connect_to_read, problem
from sae_italian.base.errors import DataError, UsageError

NO_ANSWER = "no answer"  # status of what the endpoint failed on or refused: a rerun asks again
UNANSWERED = -2  # what a judge `said` where the endpoint failed: a rerun judges the latent again
ScoreName = tuple[str, ...]  # control, scorer, negatives and metric
NOW = "@now"  # ends the explainer's name of what was made on demand (work.py), which belongs to no run


class Setting(NamedTuple):
    """What the store belongs to, and what was noticed while it was filled."""

    key: str
    value: str


class Feature(NamedTuple):
    """How much there is to see of a latent: what decides whether it can be explained."""

    latent: int
    n_active: int  # tokens on which it fires
    maximum: float
    n_train: int  # segments on which it is active, to draw positives from
    n_val: int
    n_test: int


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

    def text(self, language: str) -> str:
        """Return the text in that language, else in the other one."""
        return (self.text_it or self.text_en) if language == "it" else (self.text_en or self.text_it)

    def title(self, language: str) -> str:
        """Return the latent's short title (wording.py), "" for an LLM's explanation and in an older store."""
        return ((self.rule or {}).get("title") or {}).get(language, "")


class ScoreRow(NamedTuple):
    """One metric of one explanation under one judge."""

    explanation_id: int
    latent: int  # whose examples were judged
    control: str  # "", shuffled: the explanation of another latent, empty: a text that explains nothing
    scorer: str
    judge: str
    negatives: str
    metric: str
    value: float | None
    lo: float | None
    hi: float | None
    n_positive: int
    n_negative: int
    n_failed: int = 0  # examples without a usable answer
    split: str = "test"


class Falls(NamedTuple):
    """By how much an explanation's balanced accuracies fall where a group of documents is left out."""

    explanation_id: int
    latent: int
    control: str
    judge: str
    falls: dict[str, list[int | None]] | None  # "detection random": thousandths by group, None where it has no example


class Judgement(NamedTuple):
    """One judge's answer about one example; of a simulation only what is missing of it."""

    explanation_id: int
    latent: int
    control: str
    scorer: str
    judge: str
    example: int  # place in what the scorer showed
    first: int  # position of its first token in the cache
    negatives: str  # source of a negative, "" for a positive
    said: int  # 1 yes, 0 no, -1 an unusable answer, -2 no answer
    probability: float | None


class Call(NamedTuple):
    """One question to a language model, and what came back."""

    request_hash: str  # of model, messages and parameters, not of the endpoint
    model: str
    purpose: str  # explain, repair, detection, fuzzing, simulation
    status: str  # ok, or why there is no answer
    reply: dict[str, Any] | None  # text, finish reason, log-probabilities
    tokens_in: int | None  # None where the server does not say
    tokens_cached: int | None
    tokens_out: int | None
    usd: float | None  # None where the price is not known
    usd_uncertain: float  # at most this much for attempts whose answer was lost
    latency: float  # seconds
    attempts: int
    created: str


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


_WHERE = ("latent", "explanation_id", "control", "scorer", "judge")
SETTINGS = RecordTable("run", Setting, "key")
FEATURES = RecordTable("feature", Feature, "latent")
EXPLANATIONS = RecordTable("explanation", Explanation, "latent", "explainer", numbered=True)
_NAMES = ("control", "scorer", "judge", "negatives", "metric", "split")
SCORES = RecordTable("score", ScoreRow, *_WHERE, "negatives", "metric", clustered=True, coded=_NAMES)
FALLS = RecordTable("falls", Falls, "latent", "explanation_id", "control", "judge", clustered=True)
JUDGEMENTS = RecordTable("judgement", Judgement, *_WHERE, "example", clustered=True)
CALLS = RecordTable(CALLS_TABLE, Call, "request_hash")
LABELS = RecordTable("label", Label, "latent", "label", "source")
TABLES = {table.name: table for table in (SETTINGS, FEATURES, EXPLANATIONS, SCORES, FALLS, JUDGEMENTS, CALLS, LABELS)}


class Store:
    """The store of one cache and one configuration. Use as a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, read_only: bool = False):
        """Open or create. Raises: UsageError when the file belongs to another cache or configuration."""
        self.path = path
        self.connection = connect_to_read(path) if read_only else connect(path, TABLES.values())
        wanted = {key: json.dumps(value) for key, value in identity.items()}
        try:
            known, unused = self.notes(), not self._any("explanation WHERE explainer NOT LIKE ?", "%" + NOW)
            for key, value in wanted.items():
                # labels, or what was asked on demand, may come first: what they did not say is claimed now
                if known.get(key) != value and not (unused and key not in known):
                    raise UsageError(
                        f"{path} was made with another {key} ({known.get(key)} then, {value} now): its scores do not "
                        "hold for this run. Use --overwrite, or name another file."
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
                f"{self.path} holds work of {name} with other settings ({changed}). Use --overwrite, or name "
                "another file."
            )
        self.note({key: value})

    def note(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the run by name, such as what an endpoint cannot do."""
        with self.connection:
            SETTINGS.add(self.connection, map(Setting._make, facts.items()), replace=True)

    def notes(self) -> dict[str, str]:
        return dict(self.connection.execute("SELECT key, value FROM run"))

    def add_explanations(self, explanations: Iterable[Explanation], features: Iterable[Feature] = ()) -> None:
        """Add explanations and what they were made from, all or nothing; one that had no answer gives way to a later one."""
        rows = list(explanations)
        query = "DELETE FROM explanation WHERE latent = ? AND explainer = ? AND status = ?"
        with self.connection:
            FEATURES.add(self.connection, features, replace=True)
            self.connection.executemany(query, [(row.latent, row.explainer, NO_ANSWER) for row in rows])
            EXPLANATIONS.add(self.connection, rows)

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
        found = EXPLANATIONS.select(self.connection, "WHERE latent = ? ORDER BY id", (latent,))
        return {explanation.explainer: explanation for _, explanation in found}

    def explanations(self, explainer: str) -> dict[int, tuple[int, Explanation]]:
        """Return id and explanation by latent."""
        found = EXPLANATIONS.select(self.connection, "WHERE explainer = ? ORDER BY latent", (explainer,))
        return {row[1].latent: row for row in found}

    def explained(self, explainer: str) -> set[int]:
        """Return the latents that this explainer is done with."""
        query = "SELECT latent FROM explanation WHERE explainer = ? AND status != ?"
        return {latent for (latent,) in self.connection.execute(query, (explainer, NO_ANSWER))}

    def explainers(self) -> list[str]:
        """Return the names that explanations are kept under, in the order of their first one."""
        query = "SELECT explainer FROM explanation GROUP BY 1 ORDER BY min(id)"
        return [name for (name,) in self.connection.execute(query)]

    def scored(self, explainer: str, judge: str) -> set[int]:
        """Return the latents whose explanations by this explainer the judge has judged, but those its endpoint failed on."""
        own = "SELECT latent FROM {} WHERE judge = ? AND explanation_id IN (SELECT id FROM explanation WHERE explainer = ?)"
        sets = f"{own.format('score')} UNION {own.format('judgement')} EXCEPT {own.format('judgement')} AND said = ?"
        found = self.connection.execute(sets, 3 * (judge, explainer) + (UNANSWERED,))
        return {latent for (latent,) in found}

    def add_scores(self, rows: Iterable[Sequence[Any]], judgements: Iterable[Judgement] = ()) -> None:
        """Add scores (fields of `ScoreRow`, or `Falls`) and what they rest on; a judge's on missing answers give way.

        Those of an earlier stranger too: who is another latent's control changes with what is explained.
        """
        judged, given = list(judgements), list(rows)
        scores = [ScoreRow(*row) for row in given if not isinstance(row, Falls)]
        where = """latent = ? AND judge = ? AND (SELECT explainer FROM explanation WHERE id = explanation_id)
                   = (SELECT explainer FROM explanation WHERE id = ?)"""
        with self.connection:
            for key in {(row.latent, row.judge, row.explanation_id) for row in [*scores, *judged]}:
                if self._any(f"judgement WHERE {where} AND said = ?", *key, UNANSWERED):
                    for table in ("score", "falls", "judgement"):
                        self.connection.execute(f"DELETE FROM {table} WHERE {where}", key)
            SCORES.add(self.connection, scores)
            FALLS.add(self.connection, (row for row in given if isinstance(row, Falls)))
            JUDGEMENTS.add(self.connection, judged)

    def scores(self, explainer: str, judge: str) -> dict[ScoreName, dict[int, Any]]:
        """Return value and lower end by name and latent of all scores of one explainer's texts by one judge.

        None is what could not be scored, or has no interval. A rule's score and an LLM's are different: never both at once.
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
        rest = "WHERE judge = ? AND explanation_id IN (SELECT id FROM explanation WHERE explainer = ?)"
        found = FALLS.select(self.connection, rest, (judge, explainer))
        return {(row.control, row.latent): row.falls or {} for _, row in found}

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
            LABELS.add(self.connection, labels)

    def labels(self) -> list[Label]:
        """Return all labels, the best F1 first."""
        return [label for _, label in LABELS.select(self.connection, "ORDER BY f1 DESC, latent, label, source")]

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
            connect(path, TABLES.values(), forget=True).close()
    except DataError:
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)

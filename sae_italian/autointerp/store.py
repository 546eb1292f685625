"""Explanations and scores in SQLite: one file beside the cache, written latent by latent, resumed by itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_italian.autointerp.database import CALLS_TABLE, RecordTable, connect, connect_to_read, problem
from sae_italian.base.errors import DataError, UsageError

NO_ANSWER = "no answer"  # status of what the endpoint failed on or refused: a rerun asks again
UNANSWERED = -2  # what a judge `said` where the endpoint failed: a rerun judges the latent again
NOW = "@now"  # ends the explainer's name of what was made on demand (now.py), which belongs to no run


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


class Judgement(NamedTuple):
    """One judge's answer about one example."""

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
SETTINGS = RecordTable("run", Setting, ["key"])
FEATURES = RecordTable("feature", Feature, ["latent"])
EXPLANATIONS = RecordTable("explanation", Explanation, ["latent", "explainer"], numbered=True)
SCORES = RecordTable("score", ScoreRow, [*_WHERE, "negatives", "metric"], clustered=True)
JUDGEMENTS = RecordTable("judgement", Judgement, [*_WHERE, "example"], clustered=True)
CALLS = RecordTable(CALLS_TABLE, Call, ["request_hash"])
LABELS = RecordTable("label", Label, ["latent", "label", "source"])
TABLES = {table.name: table for table in (SETTINGS, FEATURES, EXPLANATIONS, SCORES, JUDGEMENTS, CALLS, LABELS)}


class Store:
    """The store of one cache and one configuration. Use as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any], *, read_only: bool = False):
        """Open or create. Raises: UsageError when the file belongs to another cache or configuration."""
        self.path = path
        self.connection = connect_to_read(path) if read_only else connect(path, TABLES.values())
        try:
            self._hold_to({key: json.dumps(value) for key, value in identity.items()}, read_only)
        except (sqlite3.DatabaseError, UsageError) as error:
            self.__exit__(type(error), error, None)
            raise

    def _hold_to(self, wanted: dict[str, str], read_only: bool) -> None:
        known = self.notes()
        unused = not self._any("SELECT 1 FROM explanation WHERE explainer NOT LIKE ?", "%" + NOW)
        for key, value in wanted.items():
            # labels, or what was asked on demand, may come first: what they did not say is claimed now
            if known.get(key) != value and not (unused and key not in known):
                raise UsageError(
                    f"{self.path} was made with another {key} ({known.get(key)} then, {value} now): its scores do not "
                    "hold for this run. Use --overwrite, or name another file."
                )
        if unused and not read_only:
            self.note(wanted)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close the file. Raises: as `connect`, for what SQLite found while it was read and written."""
        self.connection.close()
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
            raise problem(self.path, error) from error

    def _any(self, query: str, *parameters: Any) -> bool:
        return self.connection.execute(query, parameters).fetchone() is not None

    # --- who did what --------------------------------------------------------------------------------------------------

    def claim(self, name: str, settings: dict[str, Any]) -> None:
        """Remember the settings of an explainer or a judge, named by its class and its name.

        Raises: UsageError when it worked here with others; what it only tried without a result binds nobody.
        """
        key, value = f"settings of {name}", json.dumps(settings, sort_keys=True, ensure_ascii=False)
        known, who = self.notes().get(key), name.partition(" ")[2]
        if known == value:
            return
        worked = self._any("SELECT 1 FROM explanation WHERE explainer = ? AND status IN ('ok', 'failed')", who)
        if known is not None and (worked or self._any("SELECT 1 FROM score WHERE judge = ?", who)):
            then, now = json.loads(known), json.loads(value)
            changed = ", ".join(sorted(k for k in then | now if then.get(k) != now.get(k)))
            raise UsageError(
                f"{self.path} holds work of {name} with other settings ({changed}). Use --overwrite, or name another file."
            )
        self.note({key: value})

    def note(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the run by name, such as what an endpoint cannot do."""
        with self.connection:
            SETTINGS.add(self.connection, map(Setting._make, facts.items()), replace=True)

    def notes(self) -> dict[str, str]:
        return dict(self.connection.execute("SELECT key, value FROM run"))

    # --- explanations --------------------------------------------------------------------------------------------------

    def add_explanations(self, explanations: Iterable[Explanation], features: Iterable[Feature] = ()) -> None:
        """Add explanations and what they were made from, together or not at all.

        An explanation that there was no answer for gives way to a later one.
        """
        rows = list(explanations)
        unanswered = [(row.latent, row.explainer, NO_ANSWER) for row in rows]
        with self.connection:
            FEATURES.add(self.connection, features, replace=True)
            query = "DELETE FROM explanation WHERE latent = ? AND explainer = ? AND status = ?"
            self.connection.executemany(query, unanswered)
            EXPLANATIONS.add(self.connection, rows)

    def replace_explanations(self, explanations: Sequence[Explanation]) -> dict[str, int]:
        """Put explanations in the place of their explainer's earlier ones of the latent; return their ids by explainer.

        The scores of the earlier ones go with them.
        """
        old = "SELECT id FROM explanation WHERE latent = ? AND explainer = ?"
        with self.connection:
            for where in ("judgement WHERE explanation_id", "score WHERE explanation_id", "explanation WHERE id"):
                self.connection.executemany(f"DELETE FROM {where} IN ({old})", [e[:2] for e in explanations])
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

    def explained(self, explainer: str | None = None) -> set[int]:
        """Return the latents that are done, by that explainer or by any."""
        query = "SELECT DISTINCT latent FROM explanation WHERE explainer = coalesce(?, explainer) AND status != ?"
        return {latent for (latent,) in self.connection.execute(query, (explainer, NO_ANSWER))}

    def explainers(self) -> list[str]:
        """Return the names that explanations are kept under, in the order of their first one."""
        query = "SELECT explainer FROM explanation GROUP BY 1 ORDER BY min(id)"
        return [name for (name,) in self.connection.execute(query)]

    # --- scores --------------------------------------------------------------------------------------------------------

    def scored(self, explainer: str | None = None, judge: str | None = None) -> set[int]:
        """Return the latents with scores, of that explainer's explanations or of any, by that judge or by any.

        Those on which the judge's endpoint failed are not among them.
        """
        query = """SELECT DISTINCT score.latent FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE explainer = coalesce(?, explainer) AND judge = coalesce(?, judge)
                   EXCEPT
                   SELECT judgement.latent FROM judgement JOIN explanation ON explanation.id = explanation_id
                   WHERE explainer = coalesce(?, explainer) AND judge = coalesce(?, judge) AND said = ?"""
        who = (explainer, judge)
        return {latent for (latent,) in self.connection.execute(query, (*who, *who, UNANSWERED))}

    def add_scores(self, rows: Iterable[Sequence[Any]], judgements: Iterable[Judgement] = ()) -> None:
        """Add all score rows of one latent at once, and what they rest on: a latent is scored whole or not at all.

        A row has `ScoreRow`'s fields. Scores that rest on missing answers give way to later ones.
        """
        judged = list(judgements)
        ids = ", ".join(str(number) for number in {row.explanation_id for row in judged})
        where = f"latent = ? AND judge = ? AND explanation_id IN ({ids})"
        with self.connection:
            for key in {(row.latent, row.judge) for row in judged}:
                if self._any(f"SELECT 1 FROM judgement WHERE {where} AND said = ?", *key, UNANSWERED):
                    for table in ("score", "judgement"):
                        self.connection.execute(f"DELETE FROM {table} WHERE {where}", key)
            SCORES.add(self.connection, (ScoreRow(*row) for row in rows))
            JUDGEMENTS.add(self.connection, judged)

    def values(
        self,
        *,
        explainer: str,
        control: str,
        scorer: str,
        metric: str,
        judge: str = "rule",
        negatives: str | None = None,
        failed: bool = False,
        column: Literal["value", "lo"] = "value",
    ) -> dict[int, float]:
        """Return one metric by latent, where it has a value. A rule's score and an LLM's are different: never both at once.

        With `failed` those that could not be scored are there too, with None. `lo` is the interval's lower end, the value
        where there is none.
        """
        query = f"""SELECT score.latent, coalesce(score.{column}, score.value)
                    FROM score JOIN explanation ON explanation.id = score.explanation_id
                    WHERE explainer = ? AND control = ? AND scorer = ? AND metric = ? AND judge = ?
                      AND negatives = coalesce(?, negatives) AND (? OR value IS NOT NULL) ORDER BY score.latent"""
        where = (explainer, control, scorer, metric, judge, negatives, failed)
        return dict(self.connection.execute(query, where))

    def judges(self) -> list[str]:
        """Return the judges that scored here: by the first explanation that they did, then by name."""
        query = "SELECT judge FROM score GROUP BY 1 ORDER BY min(explanation_id), judge"
        return [name for (name,) in self.connection.execute(query)]

    # --- labels and calls ------------------------------------------------------------------------------------------------

    def add_labels(self, labels: Iterable[Label]) -> None:
        """Add labels at once; earlier ones of the same sources give way."""
        rows = list(labels)
        with self.connection:
            self.connection.executemany("DELETE FROM label WHERE source = ?", {(row.source,) for row in rows})
            LABELS.add(self.connection, rows)

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
    if not path.is_file():
        return
    try:
        connect(path, TABLES.values(), forget=True).close()
    except DataError:
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)

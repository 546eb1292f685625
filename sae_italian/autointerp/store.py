"""Explanations and scores in SQLite: one file beside the cache, written latent by latent, resumed by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.database import SCHEMA_VERSION, connect, connect_to_read
from sae_italian.base.errors import DataError, UsageError

NO_ANSWER = "no answer"  # status of what the endpoint kept failing on: a rerun asks again
NOW = "@now"  # ends the explainer's name of what was made on demand (now.py), which belongs to no run


class Explanation(NamedTuple):
    latent: int
    explainer: str
    status: str  # ok, dead, too few activations, failed (the LLM's answer is unusable), no answer
    text_it: str
    text_en: str
    rule: dict[str, Any] | None
    kind: str = "rule"  # or llm
    prompt: str = ""
    notes: dict[str, Any] | None = None

    def text(self, language: str) -> str:
        """Return the text in that language, else in the other one."""
        return (self.text_it or self.text_en) if language == "it" else (self.text_en or self.text_it)


class Feature(NamedTuple):
    """How much there is to see of a latent: what decides whether it can be explained. Field by field the table."""

    latent: int
    n_active: int  # tokens
    maximum: float
    n_train: int  # segments on which it is active
    n_val: int
    n_test: int


class Judgement(NamedTuple):
    """One judge's answer about one example. Field by field the table `judgement`."""

    explanation_id: int
    latent: int
    control: str
    scorer: str
    judge: str
    example: int
    first: int
    negatives: str
    said: int
    probability: float | None


class Label(NamedTuple):
    """One label that a latent detects, on words that did not choose the latent. Field by field the table `label`."""

    latent: int
    label: str  # UPOS=NOUN, Gender=Fem,Number=Plur
    source: str  # UD ISDT
    f1: float
    lo: float | None
    hi: float | None
    precision: float
    recall: float
    n: int
    threshold: float = 0.0  # share of the latent's maximum


class Store:
    """The store of one cache and one configuration. Use as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any], *, read_only: bool = False):
        """Open or create. Raises: UsageError when the file belongs to another cache or configuration."""
        self.path = path
        self.connection = connect_to_read(path) if read_only else connect(path)
        known = dict(self.connection.execute("SELECT key, value FROM run"))
        wanted = {"schema_version": str(SCHEMA_VERSION)} | {key: json.dumps(value) for key, value in identity.items()}
        unused = self.connection.execute(
            "SELECT NOT EXISTS (SELECT 1 FROM explanation WHERE explainer NOT LIKE ?)", ("%" + NOW,)
        ).fetchone()[0]
        for key, value in wanted.items():
            if unused and key not in known:  # labels, or what was asked on demand, came first: claimed now
                continue
            if "schema_version" in known and known.get(key) != value:
                self.connection.close()
                raise UsageError(
                    f"{path} was made with another {key} ({known.get(key)} then, {value} now): its scores do not hold "
                    "for this run. Use --overwrite, or name another file."
                )
        if "schema_version" not in known or (unused and not read_only):
            with self.connection:
                self.connection.executemany("INSERT OR IGNORE INTO run VALUES (?, ?)", wanted.items())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    # --- who did what --------------------------------------------------------------------------------------------------

    def claim(self, name: str, settings: dict[str, Any]) -> None:
        """Remember the settings of an explainer or a judge, named by its class and its name.

        Raises: UsageError when it worked here with others; what it only tried without a result binds nobody.
        """
        key, value = f"settings of {name}", json.dumps(settings, sort_keys=True, ensure_ascii=False)
        known = self.connection.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        if known is None or known[0] != value and not self._worked(name.partition(" ")[2]):
            self.note(key, value)
        elif known[0] != value:
            then, now = json.loads(known[0]), json.loads(value)
            changed = ", ".join(sorted(k for k in then | now if then.get(k) != now.get(k)))
            raise UsageError(
                f"{self.path} holds work of {name} with other settings ({changed}). Use --overwrite, or name another file."
            )

    def _worked(self, who: str) -> bool:
        query = """SELECT EXISTS (SELECT 1 FROM explanation WHERE explainer = ? AND status IN ('ok', 'failed'))
                       OR EXISTS (SELECT 1 FROM score WHERE judge = ?)"""
        return bool(self.connection.execute(query, (who, who)).fetchone()[0])

    def note(self, key: str, value: str) -> None:
        """Keep a fact about the run, such as what an endpoint cannot do."""
        with self.connection:
            self.connection.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))

    def notes(self) -> dict[str, str]:
        return dict(self.connection.execute("SELECT key, value FROM run"))

    # --- explanations --------------------------------------------------------------------------------------------------

    def add_explanations(self, explanations: Iterable[Explanation]) -> None:
        """Add explanations at once; one that there was no answer for gives way to a later one."""
        with self.connection:
            self._add_explanations(explanations)

    def _add_explanations(self, explanations: Iterable[Explanation]) -> None:
        rows = [(*e[:5], _json(e.rule), e.kind, e.prompt, _json(e.notes)) for e in explanations]
        self.connection.executemany(
            "DELETE FROM explanation WHERE latent = ? AND explainer = ? AND status = ?",
            [(row[0], row[1], NO_ANSWER) for row in rows],
        )
        self.connection.executemany(
            "INSERT INTO explanation (latent, explainer, status, text_it, text_en, rule, kind, prompt, notes) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def replace_explanations(self, explanations: Sequence[Explanation]) -> dict[str, int]:
        """Put explanations in the place of their explainer's earlier ones of the latent; return their ids by explainer.

        The scores of the earlier ones go with them.
        """
        old = "SELECT id FROM explanation WHERE latent = ? AND explainer = ?"
        with self.connection:
            for explanation in explanations:
                for table, column in (
                    ("judgement", "explanation_id"),
                    ("score", "explanation_id"),
                    ("explanation", "id"),
                ):
                    self.connection.execute(f"DELETE FROM {table} WHERE {column} IN ({old})", explanation[:2])
        self.add_explanations(explanations)
        return {e.explainer: self.connection.execute(old, e[:2]).fetchone()[0] for e in explanations}

    def explanations_of(self, latent: int) -> dict[str, Explanation]:
        """Return the explanations of one latent by explainer."""
        query = """SELECT latent, explainer, status, text_it, text_en, rule, kind, prompt, notes
                   FROM explanation WHERE latent = ? ORDER BY id"""
        rows = self.connection.execute(query, (latent,)).fetchall()
        return {row[1]: _explanation(row) for row in rows}

    def explained(self, explainer: str | None = None) -> set[int]:
        """Return the latents that are done, by that explainer or by any."""
        query = "SELECT DISTINCT latent FROM explanation WHERE explainer = coalesce(?, explainer) AND status != ?"
        return {latent for (latent,) in self.connection.execute(query, (explainer, NO_ANSWER))}

    def explainers(self) -> list[str]:
        """Return the names that explanations are kept under, in the order of their first one."""
        return [
            name for (name,) in self.connection.execute("SELECT explainer FROM explanation GROUP BY 1 ORDER BY min(id)")
        ]

    def explanations(self, explainer: str) -> dict[int, tuple[int, Explanation]]:
        """Return id and explanation by latent."""
        query = (
            "SELECT id, latent, explainer, status, text_it, text_en, rule, kind, prompt, notes "
            "FROM explanation WHERE explainer = ? ORDER BY latent"
        )
        found = {}
        for row_id, *fields in self.connection.execute(query, (explainer,)):
            explanation = _explanation(fields)
            found[explanation.latent] = (row_id, explanation)
        return found

    def add_explained(self, explanations: Iterable[Explanation], features: Iterable[Feature]) -> None:
        """Add explanations and what they were made from, together or not at all."""
        with self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO feature VALUES (?, ?, ?, ?, ?, ?)", features)
            self._add_explanations(explanations)

    def features(self) -> dict[int, Feature]:
        """Return what is known of the latents that were looked at, the dead and the rare among them."""
        return {row[0]: Feature(*row) for row in self.connection.execute("SELECT * FROM feature ORDER BY latent")}

    # --- scores --------------------------------------------------------------------------------------------------------

    def scored(self, explainer: str | None = None, judge: str | None = None) -> set[int]:
        """Return the latents with scores, of that explainer's explanations or of any, by that judge or by any."""
        query = """SELECT DISTINCT score.latent FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE explainer = coalesce(?, explainer) AND judge = coalesce(?, judge)"""
        return {latent for (latent,) in self.connection.execute(query, (explainer, judge))}

    def add_scores(self, rows: Iterable[Sequence[Any]], judgements: Iterable[Judgement] = ()) -> None:
        """Add all score rows of one latent at once, and what they rest on: a latent is scored whole or not at all.

        A row is the table's first twelve columns, and then, if given, `n_failed` and `split`.
        """
        with self.connection:
            self.connection.executemany(
                "INSERT INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*row, *(0, "test")[len(row) - 12 :]) for row in rows],
            )
            self.connection.executemany("INSERT INTO judgement VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", judgements)

    def values(
        self,
        *,
        explainer: str,
        control: str,
        scorer: str,
        metric: str,
        judge: str = "rule",
        negatives: str | None = None,
    ) -> dict[int, float]:
        """Return one metric by latent, where it has a value. A rule's score and an LLM's are different: never both at once."""
        where = {"explainer": explainer, "control": control, "scorer": scorer, "metric": metric}
        found = self.all_values(**where, judge=judge, negatives=negatives)
        return {latent: value for latent, value in found.items() if value is not None}

    def all_values(
        self, *, explainer: str, control: str, scorer: str, metric: str, judge: str, negatives: str | None = None
    ) -> dict[int, float | None]:
        """As `values`, with None for the latents that could not be scored."""
        query = """SELECT score.latent, score.value FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE explainer = ? AND control = ? AND scorer = ? AND metric = ? AND judge = ?
                     AND negatives = coalesce(?, negatives) ORDER BY score.latent"""
        return dict(self.connection.execute(query, (explainer, control, scorer, metric, judge, negatives)))

    def judges(self) -> list[str]:
        """Return the judges that scored here, the first one first."""
        return [name for (name,) in self.connection.execute("SELECT judge FROM score GROUP BY 1 ORDER BY min(rowid)")]

    def scores_of(self, latent: int) -> list[dict[str, Any]]:
        """Return all score rows of one latent, the control included, as dicts."""
        query = """SELECT explainer, control, scorer, judge, negatives, metric, value, lo, hi, n_positive, n_negative,
                          n_failed
                   FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE score.latent = ? ORDER BY explainer, control, scorer, judge, negatives, metric"""
        cursor = self.connection.execute(query, (latent,))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    # --- labels ---------------------------------------------------------------------------------------------------------

    def add_labels(self, labels: Iterable[Label]) -> None:
        """Add labels at once; earlier ones of the same sources give way."""
        rows = list(labels)
        with self.connection:
            sources = [(source,) for source in dict.fromkeys(row.source for row in rows)]
            self.connection.executemany("DELETE FROM label WHERE source = ?", sources)
            self.connection.executemany("INSERT INTO label VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def labels(self, latent: int | None = None) -> list[Label]:
        """Return the labels of one latent, or of all, the best F1 first."""
        query = """SELECT latent, label, source, f1, lo, hi, precision, recall, n, threshold FROM label
                   WHERE latent = coalesce(?, latent) ORDER BY f1 DESC, latent, label, source"""
        return [Label(*row) for row in self.connection.execute(query, (latent,))]

    # --- the calls -----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop explanations, scores, labels and settings; the calls stay, they were paid for and answer a rerun."""
        with self.connection:
            for table in ("judgement", "score", "explanation", "feature", "label", "run"):
                self.connection.execute(f"DELETE FROM {table}")

    def spending(self) -> dict[str, Any]:
        """Return calls, tokens and cost by model; `usd` is None where a call's price is not known."""
        query = """SELECT model, count(*), sum(status != 'ok'), sum(tokens_in), sum(tokens_cached), sum(tokens_out),
                          CASE WHEN count(usd) = sum(status = 'ok') THEN total(usd) END, total(usd_uncertain)
                   FROM call GROUP BY model ORDER BY model"""
        names = ("calls", "failed", "tokens_in", "tokens_cached", "tokens_out", "usd", "usd_uncertain")
        return {model: dict(zip(names, rest, strict=True)) for model, *rest in self.connection.execute(query)}


def _explanation(row: Sequence[Any]) -> Explanation:
    *fields, rule, kind, prompt, notes = row
    parsed = [None if text is None else json.loads(text) for text in (rule, notes)]
    return Explanation._make([*fields, parsed[0], kind, prompt, parsed[1]])


def forget(path: Path) -> None:
    """Drop all of a store but its calls, if there is one; a file that is no store is removed."""
    if not path.is_file():
        return
    try:
        with Store(path, {}) as store:
            store.forget()
    except DataError:
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)

"""Explanations and scores in SQLite: one file beside the cache, written latent by latent, resumed by itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.errors import DataError, UsageError

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS explanation (
    id INTEGER PRIMARY KEY,
    latent INTEGER NOT NULL,
    explainer TEXT NOT NULL,              -- token-statistics, token-lookup
    status TEXT NOT NULL,                 -- ok, dead, too few activations
    text_it TEXT NOT NULL,
    text_en TEXT NOT NULL,
    rule TEXT,                            -- JSON, NULL unless ok
    UNIQUE (latent, explainer)
);
CREATE TABLE IF NOT EXISTS score (
    explanation_id INTEGER NOT NULL REFERENCES explanation(id),
    latent INTEGER NOT NULL,              -- whose examples were judged
    control TEXT NOT NULL,                -- '' or shuffled: the explanation of another latent
    scorer TEXT NOT NULL,
    judge TEXT NOT NULL,
    negatives TEXT NOT NULL,
    metric TEXT NOT NULL,
    value REAL, lo REAL, hi REAL,
    n_positive INTEGER NOT NULL,
    n_negative INTEGER NOT NULL,
    PRIMARY KEY (latent, explanation_id, control, scorer, judge, negatives, metric)
);
"""


class Explanation(NamedTuple):
    latent: int
    explainer: str
    status: str
    text_it: str
    text_en: str
    rule: dict[str, Any] | None


class Store:
    """The store of one cache and one configuration. Use as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Open or create. Raises: UsageError when the file belongs to another cache or configuration."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.connection = sqlite3.connect(path)
        try:
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.executescript(_SCHEMA)
            known = dict(self.connection.execute("SELECT key, value FROM run"))
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path} is not a store of explanations ({error}). Remove it or name another file."
            ) from error
        wanted = {"schema_version": str(SCHEMA_VERSION)} | {key: json.dumps(value) for key, value in identity.items()}
        for key, value in wanted.items():
            if known and known.get(key) != value:
                raise UsageError(
                    f"{path} was made with another {key} ({known.get(key)} then, {value} now): its scores do not hold "
                    "for this run. Use --overwrite, or name another file."
                )
        if not known:
            with self.connection:
                self.connection.executemany("INSERT INTO run VALUES (?, ?)", wanted.items())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def add_explanations(self, explanations: Iterable[Explanation]) -> None:
        rows = [(*e[:5], None if e.rule is None else json.dumps(e.rule)) for e in explanations]
        with self.connection:
            self.connection.executemany(
                "INSERT INTO explanation (latent, explainer, status, text_it, text_en, rule) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )

    def explained(self) -> set[int]:
        return {latent for (latent,) in self.connection.execute("SELECT DISTINCT latent FROM explanation")}

    def explanations(self, explainer: str) -> dict[int, tuple[int, Explanation]]:
        """Return id and explanation by latent."""
        query = "SELECT id, latent, explainer, status, text_it, text_en, rule FROM explanation WHERE explainer = ? ORDER BY latent"
        found = {}
        for row_id, *fields, rule in self.connection.execute(query, (explainer,)):
            explanation = Explanation._make([*fields, None if rule is None else json.loads(rule)])
            found[explanation.latent] = (row_id, explanation)
        return found

    def scored(self) -> set[int]:
        return {latent for (latent,) in self.connection.execute("SELECT DISTINCT latent FROM score")}

    def add_scores(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Add all score rows of one latent at once: a latent is scored whole or not at all."""
        with self.connection:
            self.connection.executemany("INSERT INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def values(self, *, explainer: str, control: str, scorer: str, metric: str) -> dict[int, float]:
        """Return one metric by latent."""
        query = """SELECT score.latent, score.value FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE explainer = ? AND control = ? AND scorer = ? AND metric = ? ORDER BY score.latent"""
        rows = self.connection.execute(query, (explainer, control, scorer, metric))
        return {latent: value for latent, value in rows if value is not None}

    def scores_of(self, latent: int) -> list[dict[str, Any]]:
        """Return all score rows of one latent, the control included, as dicts."""
        query = """SELECT explainer, control, scorer, judge, negatives, metric, value, lo, hi, n_positive, n_negative
                   FROM score JOIN explanation ON explanation.id = score.explanation_id
                   WHERE score.latent = ? ORDER BY explainer, control, scorer, metric"""
        cursor = self.connection.execute(query, (latent,))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

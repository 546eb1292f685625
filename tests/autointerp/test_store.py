"""The store: an earlier version is brought up to date, nothing foreign is touched, everything can be taken out."""

import json
import os
import sqlite3
import subprocess
import sys

import pyarrow.parquet
import pytest

from sae_italian.autointerp.database import SCHEMA_VERSION, TABLES, connect
from sae_italian.autointerp.export import export
from sae_italian.autointerp.store import Explanation, Feature, Judgement, Label, Store, forget
from sae_italian.base.errors import DataError, UsageError

VERSION_1 = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE explanation (id INTEGER PRIMARY KEY, latent INTEGER NOT NULL, explainer TEXT NOT NULL, status TEXT NOT NULL,
  text_it TEXT NOT NULL, text_en TEXT NOT NULL, rule TEXT, UNIQUE (latent, explainer));
CREATE TABLE score (explanation_id INTEGER NOT NULL REFERENCES explanation(id), latent INTEGER NOT NULL,
  control TEXT NOT NULL, scorer TEXT NOT NULL, judge TEXT NOT NULL, negatives TEXT NOT NULL, metric TEXT NOT NULL,
  value REAL, lo REAL, hi REAL, n_positive INTEGER NOT NULL, n_negative INTEGER NOT NULL,
  PRIMARY KEY (latent, explanation_id, control, scorer, judge, negatives, metric));
INSERT INTO run VALUES ('schema_version', '1'), ('cache', '"abc"');
INSERT INTO explanation VALUES (1, 5, 'token-statistics', 'ok', 'su «che»', 'on «che»', '{"family": "token"}');
INSERT INTO score VALUES (1, 5, '', 'detection', 'rule', 'random', 'balanced_accuracy', 0.9, 0.8, 1.0, 50, 50);
"""
FEMININE = Label(5, "Gender=Fem,Number=Plur", "UD ISDT", 0.91, 0.88, 0.93, 0.95, 0.875, 120, 0.5)
ROW = (1, 5, "", "detection", "rule", "random", "balanced_accuracy", 0.9, 0.8, 1.0, 50, 50)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
    connection.close()
    return path


def filled(path):
    with Store(path, {"cache": "abc"}) as store:
        store.add_explanations([Explanation(5, "llm:m:it1", "ok", "verbi", "", None, "llm", "it1-x", {"examples": 3})])
        store.add_scores(
            [(*ROW[:4], "llm:m:it1", *ROW[5:], 2)], [Judgement(1, 5, "", "detection", "llm:m:it1", 0, 77, "", 1, 0.75)]
        )
        store.add_explained([], [Feature(5, 100, 2.5, 40, 20, 50)])
        store.connection.execute(
            "INSERT INTO call VALUES ('h', 'm', 'explain', 'ok', '{\"text\": \"è\"}', 9, 0, 3, 0.01, 0, 0.1, 1, 'now')"
        )
        store.connection.commit()
    return path


def test_a_store_of_version_1_is_migrated_with_all_it_holds(old):
    with Store(old, {"cache": "abc"}) as store:
        ((row_id, explanation),) = store.explanations("token-statistics").values()
        assert explanation == Explanation(5, "token-statistics", "ok", "su «che»", "on «che»", {"family": "token"})
        assert row_id == 1 and explanation.kind == "rule" and explanation.notes is None
        query = {"explainer": "token-statistics", "control": "", "scorer": "detection", "metric": "balanced_accuracy"}
        assert store.values(**query) == {5: 0.9} and store.scores_of(5)[0]["n_failed"] == 0
        assert store.notes()["schema_version"] == str(SCHEMA_VERSION)
        store.add_explanations([Explanation(5, "llm:m:it1", "ok", "verbi", "", None, "llm", "it1-x", {"examples": 3})])
    with Store(old, {"cache": "abc"}) as store:  # once, and for good
        assert store.explanations("llm:m:it1")[5][1].notes == {"examples": 3}
        assert store.explainers() == ["token-statistics", "llm:m:it1"]
    with pytest.raises(UsageError, match="another cache"):
        Store(old, {"cache": "def"})


def test_a_migration_that_breaks_off_leaves_version_1(old, monkeypatch):
    monkeypatch.setattr("sae_italian.autointerp.database._TABLES", "CREATE TABLE no (")
    with pytest.raises(DataError):
        connect(old)
    monkeypatch.undo()
    with sqlite3.connect(old) as connection:
        assert connection.execute("SELECT value FROM run WHERE key = 'schema_version'").fetchone() == ("1",)
        assert len(connection.execute("SELECT * FROM explanation").fetchone()) == 7
    with Store(old, {}) as store:
        assert store.explained() == {5}


def test_a_store_of_version_2_gets_the_labels_table_and_keeps_the_rest(tmp_path):
    path = filled(tmp_path / "two.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE label")
        connection.execute("UPDATE run SET value = '2' WHERE key = 'schema_version'")
    connection.close()
    with Store(path, {"cache": "abc"}) as store:
        assert store.labels() == [] and store.explained() == {5} and store.spending()["m"]["usd"] == 0.01
        store.add_labels([FEMININE])
    with Store(path, {"cache": "abc"}) as store:
        assert store.labels(5) == [FEMININE] and store.notes()["schema_version"] == "3"


def test_labels_of_a_source_replace_earlier_ones_of_it_and_come_best_first(tmp_path):
    noun = Label(7, "UPOS=NOUN", "UD ISDT", 0.95, None, None, 1.0, 0.9, 300, 0.25)
    other = FEMININE._replace(source="UD ParTUT", f1=0.5)
    with Store(tmp_path / "s", {}) as store:
        store.add_labels([FEMININE, noun, other])
        assert store.labels() == [noun, FEMININE, other] and store.labels(7) == [noun] and store.labels(6) == []
        store.add_labels([noun._replace(latent=8)])
        assert store.labels() == [noun._replace(latent=8), other]
        with pytest.raises(sqlite3.IntegrityError):
            store.add_labels([noun, noun])
        assert store.labels(8)  # all or nothing
        store.forget()
        assert store.labels() == []


def test_labels_may_come_before_explanations_but_not_of_another_cache(tmp_path):
    path = tmp_path / "s"
    with Store(path, {"cache": "abc"}) as store:
        store.add_labels([FEMININE])
    with pytest.raises(UsageError, match="another cache"):
        Store(path, {"cache": "def", "width": 32})
    with Store(path, {"cache": "abc", "width": 32}) as store:
        store.add_explanations([Explanation(1, "x", "ok", "verbi", "", None)])
    with pytest.raises(UsageError, match="another width"):
        Store(path, {"cache": "abc", "width": 16})


def test_newer_and_foreign_files_are_refused_and_left_alone(tmp_path, old):
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE run SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(UsageError, match="newer sae_italian .schema 99"):
        Store(old, {})
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE films (title)")
    with pytest.raises(DataError, match="its tables are films"):
        Store(other, {})
    (tmp_path / "text").write_text("non è un database, ma un testo abbastanza lungo da sembrarlo")
    with pytest.raises(DataError, match="is not a store"):
        Store(tmp_path / "text", {})


def test_settings_are_claimed_and_held_to(tmp_path):
    name = "LLMExplainer llm:m:it1"
    with Store(tmp_path / "s", {}) as store:
        store.claim(name, {"draw": "top", "n": 9})
        store.add_explanations([Explanation(1, "llm:m:it1", "dead", "", "", None)])
        store.claim(name, {"draw": "top", "n": 3})  # nothing came of the first try: it binds nobody
        store.add_explanations([Explanation(2, "llm:m:it1", "ok", "verbi", "", None)])
        store.claim(name, {"n": 3, "draw": "top"})
        with pytest.raises(UsageError, match="other settings \\(draw\\)"):
            store.claim(name, {"draw": "deciles", "n": 3})
    judge = "LLMJudge llm:m:it1"
    with Store(filled(tmp_path / "j"), {"cache": "abc"}) as store:
        store.claim(judge, {"batch": 5})
        with pytest.raises(UsageError, match="other settings \\(batch\\)"):
            store.claim(judge, {"batch": 1})


def test_what_had_no_answer_is_not_done_and_gives_way(tmp_path):
    with Store(tmp_path / "s", {}) as store:
        store.add_explanations(
            [Explanation(1, "x", "no answer", "", "", None), Explanation(2, "x", "failed", "", "", None)]
        )
        assert store.explained("x") == {2}
        store.add_explanations([Explanation(1, "x", "ok", "verbi", "", None)])
        assert store.explained("x") == {1, 2} and store.explanations("x")[1][1].text_it == "verbi"


def test_scores_and_judgements_go_in_together_or_not_at_all(tmp_path):
    path = filled(tmp_path / "s")
    with Store(path, {"cache": "abc"}) as store:
        again = Judgement(1, 5, "", "detection", "llm:m:it1", 0, 77, "", 1, 0.75)  # judged twice
        with pytest.raises(sqlite3.IntegrityError):
            store.add_scores([ROW], [again])
        assert store.judges() == ["llm:m:it1"] and store.scored(judge="rule") == set()


def test_forgetting_keeps_the_calls_that_were_paid(tmp_path):
    path = filled(tmp_path / "s")
    forget(path)
    with Store(path, {"cache": "another"}) as store:
        assert store.explained() == set() and store.scored() == set()
        assert store.spending()["m"]["usd"] == 0.01
    (tmp_path / "broken").write_bytes(b"x" * 200)
    forget(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    forget(tmp_path / "absent")


# --- exports -------------------------------------------------------------------------------------------------------------


def test_exports_to_parquet_and_jsonl_hold_every_row(tmp_path):
    path = filled(tmp_path / "s")
    export(path, tmp_path / "p", "parquet")
    export(path, tmp_path / "j", "jsonl")
    for name in TABLES:
        rows = pyarrow.parquet.read_table(tmp_path / "p" / f"{name}.parquet").to_pylist()
        lines = [json.loads(line) for line in (tmp_path / "j" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        with sqlite3.connect(path) as connection:
            assert len(rows) == len(lines) == connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
    explanation = json.loads((tmp_path / "j" / "explanation.jsonl").read_text("utf-8"))
    assert explanation["notes"] == {"examples": 3} and explanation["rule"] is None
    (judgement,) = pyarrow.parquet.read_table(tmp_path / "p" / "judgement.parquet").to_pylist()
    assert (judgement["first"], judgement["said"], judgement["probability"]) == (77, 1, 0.75)
    with pytest.raises(UsageError, match="'csv' is no format"):
        export(path, tmp_path / "x", "csv")
    with pytest.raises(UsageError, match="does not exist"):
        export(tmp_path / "none", tmp_path / "x", "jsonl")


def test_export_to_wandb_works_offline(tmp_path):
    """In a process of its own: W&B's service outlives the test otherwise."""
    path = filled(tmp_path / "s")
    code = f"""from pathlib import Path; from sae_italian.autointerp.export import export
print(export(Path({str(path)!r}), Path({str(tmp_path / "out")!r}), "wandb")[0])"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = (tmp_path / "out") / "wandb"
    assert list(folder.glob("offline-run-*/run-*.wandb")) and list(
        folder.glob("offline-run-*/files/media/table/*.json")
    )

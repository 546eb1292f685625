"""The store: an earlier version is told from this one, paid answers are kept, nothing foreign is touched, everything can be taken out."""

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest

from sae_italian.autointerp.store import TABLES, Explanation, Label, Store, connect, forget, insert
from sae_italian.autointerp.summary import export, summarise
from sae_italian.autointerp.work import stored_config
from sae_italian.base.errors import DataError, UsageError
from sae_italian.browser.exports.latents import Latents
from sae_italian.cli import main
from tests import fresh
from tests.autointerp.llm.endpoint import FakeEndpoint

OLD = Path(__file__).parents[1] / "data" / "old"
FEMININE = Label(5, "Gender=Fem,Number=Plur", "UD ISDT", 0.91, 0.88, 0.93, 0.95, 0.875, 120, 0.5)
ROW = (1, 5, "", "detection", "rule", "random", "balanced_accuracy", 0.9, 0.8, 1.0, 50, 50, 0)
JUDGEMENT = (1, 5, "", "detection", "llm:m:it1", 0, 77, "", 1, 0.75)


def filled(path):
    with Store(path, {"cache": "abc"}) as store:
        store.add_explanations([Explanation(5, "llm:m:it1", "ok", "verbi", "", None, "llm", "it1-x", {"examples": 3})])
        store.add_scores([(*ROW[:4], "llm:m:it1", *ROW[5:12], 2)], [], [JUDGEMENT])
        store.add_explanations([], [(5, 100, 2.5, 40, 20, 50)])
        with store.connection:
            call = ("h", "m", "explain", "ok", {"text": "è"}, 9, 0, 3, 0.01, 0, 0.1, 1, "now")
            insert(store.connection, "call", [call])
    return path


@pytest.mark.parametrize("name", ["paid.sqlite", "cache/autointerp.sqlite"])
def test_a_store_of_an_earlier_version_says_to_run_again_and_is_left_alone(tmp_path, name):
    path = Path(shutil.copy(OLD / name, tmp_path))
    for read_only in (True, False):
        with pytest.raises(UsageError, match="earlier sae_italian. Run `sae-italian autointerp .* --overwrite` again"):
            Store(path, {}, read_only=read_only)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT value FROM run WHERE key = 'schema_version'").fetchone() == ("3",)


def test_answers_that_were_paid_for_are_carried_over_from_an_earlier_version(tmp_path):
    """`paid.sqlite` is of commit 2c011dc: `autointerp CACHE --latents 1 --explainer llm` on the old cache, 25 calls."""
    path = Path(shutil.copy(OLD / "paid.sqlite", tmp_path))
    with sqlite3.connect(path) as connection:
        paid = connection.execute("SELECT * FROM call ORDER BY request_hash").fetchall()
    forget(path)
    with Store(path, {"cache": "any"}) as store:
        assert store.connection.execute("SELECT * FROM call ORDER BY request_hash").fetchall() == paid
        assert store.explainers() == [] and store.spending()["prova"]["calls"] == len(paid) == 25


def test_a_run_on_an_earlier_store_is_answered_by_what_was_paid(tmp_path, capsys):
    """But for judging passages, which stood in one order for all latents then; those answers are kept, and others asked."""
    cache = shutil.copytree(OLD / "cache", tmp_path / "cache")
    paid = shutil.copy(OLD / "paid.sqlite", cache / "autointerp.sqlite")
    command = ["autointerp", str(cache), "--n-latents", "1", "--no-random-control", "--explainer", "llm"]
    with FakeEndpoint() as endpoint:
        command += ["--llm-model", "prova", "--endpoint", endpoint.url, "--json"]
        assert main([*command, "--overwrite"]) == 0
    calls = json.loads(capsys.readouterr().out)["llm"]["calls"]
    assert calls["from ledger"] == 11 and len(endpoint.requests) == calls["asked"] == 14
    with contextlib.closing(sqlite3.connect(paid)) as kept:
        found = dict(kept.execute("SELECT purpose, count(*) FROM call GROUP BY purpose"))
    assert found == {"explain": 1, "simulation": 10, "detection": 5 + 5, "fuzzing": 9 + 9}


def test_labels_of_a_source_replace_earlier_ones_of_it_and_come_best_first(tmp_path):
    noun = Label(7, "UPOS=NOUN", "UD ISDT", 0.95, None, None, 1.0, 0.9, 300, 0.25)
    other = FEMININE._replace(source="UD ParTUT", f1=0.5)
    with Store(tmp_path / "s", {}) as store:
        store.add_labels([FEMININE, noun, other])
        assert store.labels() == [noun, FEMININE, other]
        store.add_labels([noun._replace(latent=8)])
        assert store.labels() == [noun._replace(latent=8), other]
        with pytest.raises(sqlite3.IntegrityError):
            store.add_labels([noun, noun])
        assert store.labels()  # all or nothing
    forget(tmp_path / "s")
    with Store(tmp_path / "s", {}) as store:
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


def test_newer_and_foreign_files_are_refused_and_left_alone(tmp_path):
    path = filled(tmp_path / "new")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="newer sae_italian .schema 99"):
        Store(path, {})
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
        store.claim(judge, {"batch": 5}, judge=True)
        with pytest.raises(UsageError, match="other settings \\(batch\\)"):
            store.claim(judge, {"batch": 1}, judge=True)
    with Store(tmp_path / "s", {}) as store:  # it explained under the same name, and judged nothing yet
        store.claim(judge, {"scores": ["detection", "fuzzing"]}, judge=True)
        store.claim(judge, {"scores": ["detection"]}, judge=True)


def test_what_had_no_answer_is_not_done_and_gives_way(tmp_path):
    with Store(tmp_path / "s", {}) as store:
        store.add_explanations(
            [Explanation(1, "x", "no answer", "", "", None), Explanation(2, "x", "failed", "", "", None)]
        )
        assert [one.status for one in store.explanations("x").values()] == ["no answer", "failed"]
        store.add_explanations([Explanation(1, "x", "ok", "verbi", "", None)])
        assert [one.text_it for one in store.explanations("x").values()] == ["verbi", ""]


def test_scores_and_judgements_go_in_together_or_not_at_all(tmp_path):
    path = filled(tmp_path / "s")
    with Store(path, {"cache": "abc"}) as store:
        with pytest.raises(sqlite3.IntegrityError):
            store.add_scores([ROW], [], [JUDGEMENT])  # judged twice
        assert store.judged() == [("llm:m:it1", "llm:m:it1")]


def test_forgetting_keeps_the_calls_that_were_paid(tmp_path):
    path = filled(tmp_path / "s")
    forget(path)
    with Store(path, {"cache": "another"}) as store:
        assert store.explainers() == store.judged() == []
        assert store.spending()["m"]["usd"] == 0.01
    (tmp_path / "broken").write_bytes(b"x" * 200)
    forget(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    forget(tmp_path / "absent")


def test_a_damaged_store_is_said_in_one_line(tmp_path):
    """Half a row, pages of random bytes, settings that are none: each is the file's fault, and no traceback."""
    path = filled(tmp_path / "row")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE explanation SET notes = '{'")
    with pytest.raises(DataError, match="row 1 of explanation is damaged.*Remove it"), Store(path, {}) as store:
        store.explanations("llm:m:it1")
    path = filled(tmp_path / "pages")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    with pytest.raises(DataError, match="is not a store"), Store(path, {}) as store:
        store.explanations("llm:m:it1")
    path = filled(tmp_path / "settings")
    with pytest.raises(DataError, match="is not of a run"), Store(path, {}) as store:
        store.note({"width": "trentadue"})
        stored_config(store)


def test_a_full_disk_is_said_and_what_was_stored_stays(tmp_path):
    path = filled(tmp_path / "s")
    with pytest.raises(UsageError, match="cannot be written now: database or disk is full"), Store(path, {}) as store:
        store.connection.execute("PRAGMA max_page_count = 1")
        store.add_explanations([Explanation(n, "rules", "ok", "a" * 10_000, "", None) for n in range(20)])
    with Store(path, {}) as store:
        assert store.explainers() == ["llm:m:it1"]


def test_a_paid_answer_is_on_the_disk_before_it_is_read(tmp_path):
    """SQLite's `synchronous`: 2 is FULL, so that a commit survives a power failure; the rest of a run need not."""
    ledger = connect(filled(tmp_path / "s"), durable=True)
    assert ledger.execute("PRAGMA synchronous").fetchone() == (2,)
    ledger.close()


def test_score_rows_are_kept_once(tmp_path):
    """By their key, without a second copy of it in an index: of 62 MB of a quickstart's store 19 were that copy."""
    with Store(tmp_path / "s", {}) as store:
        indexes = store.connection.execute("SELECT tbl_name FROM sqlite_master WHERE type = 'index'").fetchall()
        assert not {("score_by_number",), ("judgement",)} & set(indexes)


def test_each_explainer_is_exported_with_the_score_of_the_judge_that_read_it(tmp_path):
    """An encoder that ranked the rules' examples stood in for every language model, and the first of two for both."""
    with Store(tmp_path / "s", {}) as store:
        names = ("rules", "llm:a", "llm:b")
        store.add_explanations([Explanation(5, name, "ok", "verbi", "", None) for name in names])
        asked = [(1, "rule"), (1, "llm:a"), (1, "always-yes"), (2, "llm:a"), (3, "llm:b")]
        where = ("random", "balanced_accuracy", 0.9, None, None, 2, 2, 0)
        store.add_scores((n, 5, "", "detection", judge, *where) for n, judge in asked)
        store.add_scores((n, 5, "", "embedding", "encoder", "random", "auroc", *where[2:]) for n in (1, 2, 3))
        assert store.judged() == [("rules", "rule"), ("rules", "llm:a"), ("llm:a", "llm:a"), ("llm:b", "llm:b")]
        exported: Any = Latents.detection
        found = exported.func(SimpleNamespace(source=SimpleNamespace(store=lambda: store)))
    assert found == {name: {5: 0.9} for name in names}


def test_names_of_scores_are_kept_by_number_and_read_and_deleted_as_they_are(tmp_path):
    """As words in every row they were 9 of the 33 MB of a quickstart's store."""
    with Store(filled(tmp_path / "s"), {}) as store:
        store.add_scores([(*ROW[:6], "f1", *ROW[7:])])
        ask = store.connection.execute
        before = ask("SELECT * FROM score ORDER BY metric, negatives").fetchall()
        kinds = ask("SELECT DISTINCT typeof(control), typeof(scorer), typeof(metric) FROM score_by_number").fetchall()
        assert kinds == [("integer",) * 3] and [row[6] for row in before] == ["balanced_accuracy", "f1"]
        words = {word for (word,) in ask("SELECT word FROM word")}
        assert {row[place] for row in before for place in (2, 3, 4, 5, 6, 13)} == words
        with pytest.raises(sqlite3.IntegrityError):
            insert(store.connection, "score", [before[0]])
        gone = before[0][6]
        ask("DELETE FROM score WHERE metric = ?", (gone,))
        assert ask("SELECT * FROM score ORDER BY metric, negatives").fetchall() == [r for r in before if r[6] != gone]


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
    with pytest.raises(UsageError, match="does not exist"):
        export(tmp_path / "none", tmp_path / "x", "jsonl")


def test_export_to_wandb_works_offline(tmp_path):
    """In a process of its own: W&B's service outlives the test otherwise."""
    path = filled(tmp_path / "s")
    code = f"""from pathlib import Path
from sae_italian.autointerp.summary import export
print(export(Path({str(path)!r}), Path({str(tmp_path / "out")!r}), "wandb")[0])"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = fresh.run(["-c", code], environment)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = (tmp_path / "out") / "wandb"
    assert list(folder.glob("offline-run-*/run-*.wandb")) and list(
        folder.glob("offline-run-*/files/media/table/*.json")
    )


# --- what a summary makes of it ------------------------------------------------------------------------------------------


def test_a_score_of_eight_tenths_counts_whatever_its_last_bit_and_the_share_is_of_the_scored(tmp_path):
    """(35/50 + 1 - 5/50) / 2 is 0.7999999999999999 in floats; of 50 positives and 50 negatives it is 80 right of 100."""
    values = [(35 / 50 + 1 - 5 / 50) / 2, (0.8 + 1 - 0.2) / 2, 0.79]
    assert values[0] < 0.8 and values[1] == 0.8
    with Store(tmp_path / "s", {}) as store:
        store.add_explanations([Explanation(latent, "rules", "ok", "a", "a", None) for latent in range(4)])
        rows = [
            ("detection", "random", values),
            ("fuzzing", "same-token", [0.6] * 3),
            ("fuzzing", "silent-token", [0.9] * 3),
        ]
        for scorer, negatives, scores in rows:
            where = (scorer, "rule", negatives, "balanced_accuracy")
            store.add_scores((n + 1, n, "", *where, value, None, None, 50, 50, 0) for n, value in enumerate(scores))
    found = summarise(str(tmp_path / "s"))
    with pytest.raises(UsageError, match="missing"):
        summarise(tmp_path / "missing")
    for wrong, said in (
        ({"explainer": "rule"}, "no explanations by 'rule'. Did you mean 'rules'"),
        ({"judge": "nix"}, "no scores of rules by 'nix'. Valid: rule"),
    ):
        with pytest.raises(UsageError, match=said):  # were summaries of nothing
            summarise(tmp_path / "s", **wrong)
    assert not (tmp_path / "missing").exists()  # a name mistyped was an empty store, and was left there
    assert (found.n_latents, found.n_explained, found.n_scored) == (4, 4, 3)
    assert found.share_detected.value == pytest.approx(2 / 3)
    assert found.fuzzing.value == pytest.approx(0.6)  # the harder negatives lead


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_a_long_rule_is_kept_compressed_and_read_and_taken_out_whole(tmp_path, to):
    rule = {"names": [f" parola{i}è" for i in range(400)], "weights": [1 / 3] * 400}
    one = Explanation(5, "rules", "ok", "su «parola0è»", "", rule)
    path = tmp_path / "store.sqlite"
    with Store(path, {}) as store:
        store.add_explanations([one, one._replace(latent=6, rule={"names": []})])
        (long, short) = (row[0] for row in store.connection.execute("SELECT rule FROM explanation ORDER BY latent"))
        assert len(long) < len(json.dumps(rule)) / 3 and short == '{"names": []}'
        text = json.dumps(rule, ensure_ascii=False)  # as stores had it that were written before
        with store.connection:
            store.connection.execute("INSERT INTO explanation SELECT 3, 7, explainer, status, text_it, text_en, ?, kind, "
                                     "prompt, notes FROM explanation WHERE latent = 5", (text,))  # fmt: skip
        known = store.explanations("rules")
        assert known[5]._replace(id=0) == one and known[7].rule == rule
    file = next(file for file in export(path, tmp_path / "out", to) if file.stem == "explanation")
    if to == "jsonl":
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    else:
        rows = [row | {"rule": json.loads(row["rule"])} for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert [row["rule"] for row in rows] == [rule, {"names": []}, rule]


def test_a_store_whose_tables_have_names_that_are_no_text_is_named_as_damaged(tmp_path):
    path = tmp_path / "store"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE explanation (id)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET name = CAST(x'80ff' AS TEXT)")
    with pytest.raises(DataError, match="is not a store of explanations"):
        Store(path, {})

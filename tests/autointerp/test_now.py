"""Explanations made on demand: kept with their scores, told from a run's, counted by none."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.summary import side_by_side, summarise
from sae_italian.autointerp.work import Work, config_of, keep, made_now, with_now
from sae_italian.base.errors import DataError, UsageError
from sae_italian.cache import FeatureCache

CONFIG = AutointerpConfig(n_examples=20)


@pytest.fixture
def cache(small_cache, tmp_path):
    folder = shutil.copytree(small_cache, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*"))
    return FeatureCache.open(folder)


@pytest.fixture
def work(cache, mini):
    return Work(cache, mini.tokenizer, CONFIG)


@pytest.fixture
def explained(work, cache):
    """The explanations of one latent that has a rule."""
    order = (-cache.statistics["count"]).argsort().tolist()
    return next(found for latent in order if (found := work.explain(latent)[1])[0].status == "ok")


def names(path):
    with Store(path, {}) as store:
        return store.explainers()


def test_what_is_kept_is_marked_and_has_its_scores(cache, work, explained):
    path = cache.folder / STORE_FILE
    llm = Explanation(explained[0].latent, "llm:prova:it1", "ok", "parole", "", None, "llm", "", {"examples": 3})
    failed = llm._replace(explainer="llm:altra:it1", status="failed", text_it="")
    assert keep(path, work, [*explained, llm, failed]) == ""
    assert set(names(path)) == {"rules@now", "token-lookup@now", "llm:prova:it1@now"}
    with Store(path, {}) as store:
        mine = store.explanations_of(explained[0].latent)
        assert made_now(mine["rules@now"]).endswith("Z") and mine["llm:prova:it1@now"].notes["examples"] == 3
        assert mine["rules@now"].notes["now"]["settings"] == {"width": 32, "n_examples": 20, "seed": 0}
        detection = store.values(
            explainer="rules@now", control="", scorer="detection", metric="balanced_accuracy", negatives="random"
        )
    assert 0 <= detection[explained[0].latent] <= 1
    assert keep(path, work, explained) == ""  # again: in its place, with its scores
    with Store(path, {}) as store:
        assert len(store.explanations_of(explained[0].latent)) == 3


def test_a_run_counts_nothing_that_was_made_on_demand(cache, work, explained, mini):
    """First the demand, then the run: whatever its settings, it claims the store, and its summary is its own."""
    path = cache.folder / STORE_FILE
    keep(path, work, explained)
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=4, n_examples=10))
    assert config_of(path).n_examples == 10
    found = summarise(path)
    assert found.n_latents == 4 and [summary.explainer for summary in side_by_side(path)] == ["rules"]
    with Store(path, {}) as store:
        drawn = set(store.explanations("rules"))
    other = next(own for k in range(256) if k not in drawn and (own := work.explain(k)[1])[0].status == "ok")
    keep(path, work, other)
    assert summarise(path).as_dict() == found.as_dict()
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=4, n_examples=10))  # goes on where it was
    assert summarise(path).as_dict() == found.as_dict()


def test_what_a_run_says_already_is_not_kept_again(cache, work, mini):
    path = cache.folder / STORE_FILE
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(n_examples=20, latents=4))
    with Store(path, {}) as store:
        latent = next(k for k, e in store.explanations("rules").items() if e.status == "ok")
        before = store.explainers()
    keep(path, work, work.explain(latent)[1])
    assert names(path) == before


def test_a_latent_of_a_cache_explains_itself(cache, explained, mini):
    """The same rule as a run's, and nothing is stored."""
    rule = cache.latent(explained[0].latent).explain()
    expected = Work(cache, mini.tokenizer, AutointerpConfig()).explain(rule.latent)[1][0]
    assert rule == expected and rule.text_it and not (cache.folder / STORE_FILE).exists()


def test_a_dead_latent_leaves_no_store(cache, work):
    dead = [Explanation(1, name, "dead", "", "", None) for name in ("rules", "token-lookup")]
    assert keep(cache.folder / STORE_FILE, work, dead) == "" and not (cache.folder / STORE_FILE).exists()


def test_a_store_of_another_cache_says_why_nothing_is_kept(cache, work, explained):
    with Store(cache.folder / STORE_FILE, {"cache": "another"}) as store:
        store.add_explanations([Explanation(0, "rules", "ok", "a", "a", None)])
    assert "another cache" in keep(cache.folder / STORE_FILE, work, explained)


def test_on_demand_fills_the_places_a_run_left_empty():
    def said(latent, name, text, status="ok"):
        return Explanation(latent, name, status, text, "", None)

    found = with_now(
        {
            "rules": {
                0: said(0, "rules", "a"),
                1: said(1, "rules", "", "too few activations"),
                2: said(2, "rules", "b"),
            },
            "rules@now": {k: said(k, "rules@now", text) for k, text in ((0, "a"), (1, "c"), (2, "d"), (3, "e"))},
        }
    )
    assert {k: (e.explainer, e.text_it) for k, e in found["rules"].items()} == {
        0: ("rules", "a"),
        1: ("rules@now", "c"),
        2: ("rules", "b"),
        3: ("rules@now", "e"),
    }
    assert {k: e.text_it for k, e in found["rules@now"].items()} == {2: "d"}


# --- stores that cannot be written -----------------------------------------------------------------------------------------


def test_a_store_is_read_without_being_written(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path, {"cache": "a"}) as store:
        store.add_explanations([Explanation(0, "rules", "ok", "sì", "yes", None)])
    before = path.read_bytes()
    with Store(path, {}, read_only=True) as store:
        assert store.explanations_of(0)["rules"].text_it == "sì"
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.note({"a": "b"})
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="cannot be read"):
        Store(tmp_path / "none.sqlite", {}, read_only=True)
    (tmp_path / "film").write_text("a film " * 100)
    with pytest.raises(DataError, match="not a store"):
        Store(tmp_path / "film", {}, read_only=True)


def test_a_store_that_another_process_holds_is_no_broken_one(tmp_path, monkeypatch):
    path = tmp_path / "store.sqlite"
    Store(path, {}).connection.close()
    monkeypatch.setattr("sae_italian.autointerp.store.BUSY_S", 0.01)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(UsageError, match="cannot be written now: database is locked"):
        Store(path, {})
    holder.close()
    Store(path, {}).connection.close()

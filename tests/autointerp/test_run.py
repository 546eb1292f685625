"""A run over planted latents: what is found, what is reported as not scored, what a stop or another cache does."""

import shutil
import sqlite3
from functools import partial

import numpy as np
import pytest

from sae_italian.autointerp import AutointerpConfig, run_autointerp, summarise
from sae_italian.autointerp.draws import ExampleSource
from sae_italian.autointerp.examples import ConstantJudge
from sae_italian.autointerp.store import Explanation, Store, insert, unpacked
from sae_italian.autointerp.wording import quoted
from sae_italian.autointerp.work import Work
from sae_italian.base import units
from sae_italian.base.errors import UsageError
from sae_italian.base.storage import locked
from sae_italian.base.units import in_threads, map_units
from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.quickstart import table_of
from tests import fresh
from tests.autointerp.conftest import DEAD, N_NOISE, N_PREVIOUS, N_TOKENS, RARE, OracleJudge, accuracies, scores_of
from tests.planted import planted_cache


def test_planted_token_latents_are_explained_perfectly(store, planted, mini):
    for scorer in ("detection", "fuzzing"):
        values = accuracies(store, scorer)
        assert min(values[latent] for latent in range(N_TOKENS)) >= 0.97, scorer
    with Store(store, {}) as opened:
        explanations = opened.explanations("rules")
    for latent in range(N_TOKENS):
        explanation = explanations[latent]
        token = mini.tokenizer.convert_ids_to_tokens(int(planted.tokens[planted.latent(latent).position[0]]))
        assert explanation.rule["precision"] == 1 and explanation.rule["recall"] == 1
        assert explanation.text_it.startswith(f"su {quoted('token', token.replace('▁', ' '), 'it')}")
        assert explanation.text_en.startswith("on «") and "(" not in explanation.text_en


def test_latents_of_the_token_before_are_found_and_beat_the_lookup(store):
    own, lookup = accuracies(store), accuracies(store, explainer="token-lookup")
    latents = range(N_TOKENS, N_TOKENS + N_PREVIOUS)
    assert np.mean([own[latent] for latent in latents]) >= 0.95
    assert np.mean([own[latent] - lookup[latent] for latent in latents]) > 0.05
    with Store(store, {}) as opened:
        families = [opened.explanations("rules")[latent].rule["family"] for latent in latents]
    assert sum(family.startswith("previous") for family in families) >= N_PREVIOUS - 2


def test_noise_is_not_explained(store):
    noise = range(N_TOKENS + N_PREVIOUS, N_TOKENS + N_PREVIOUS + N_NOISE)
    assert np.mean([accuracies(store)[latent] for latent in noise]) == pytest.approx(0.5, abs=0.07)


def test_controls_are_chance(store):
    for scorer in ("detection", "fuzzing"):
        assert np.mean(list(accuracies(store, scorer, control="shuffled").values())) == pytest.approx(0.5, abs=0.06)
    summary = summarise(store)
    assert summary.always_yes.value == summary.always_no.value == 0.5


def test_dead_and_rare_latents_are_reported_and_never_scored(store, planted):
    with Store(store, {}) as opened:
        explanations = opened.explanations("rules")
        assert explanations[DEAD].status == "dead" and explanations[RARE].status == "too few activations"
        assert scores_of(opened, DEAD) == scores_of(opened, RARE) == []
        rows = [row for latent in range(DEAD) for row in scores_of(opened, latent) if row["scorer"] != "simulation"]
        counted = [row for row in rows if not row["metric"].startswith("tpr_decile")]
        assert all(row["n_positive"] == row["n_negative"] >= 10 for row in counted) and len(counted) > 100
        features = {row[0]: row for row in opened.connection.execute("SELECT * FROM feature")}
        assert sorted(features) == sorted(explanations)  # the dead and the rare among them
        assert features[DEAD] == (DEAD, 0, 0.0, 0, 0, 0)
        assert features[RARE][1] == 3 and 0 < sum(features[RARE][3:]) <= 3
        assert features[0][1] == len(planted.latent(0).position) and min(features[0][3:]) >= 10
    summary = summarise(store)
    assert (summary.n_dead, summary.n_too_few, summary.n_explained) == (1, 1, DEAD)


def test_a_latent_that_fires_where_no_example_is_drawn_is_not_dead(small_cache, mini, tmp_path):
    """It fires in the last tokens of documents alone, which are too few for an example; any width reaches that far."""
    base = FeatureCache.open(small_cache)
    ends = np.flatnonzero((ExampleSource(base).segment_of < 0) & (base.doc != NO_DOCUMENT))
    cache = planted_cache(base, tmp_path / "c", [ends, np.empty(0, dtype=np.int64)], mini)
    work = Work(cache, mini.tokenizer, AutointerpConfig())
    assert [work.explain(latent)[1][0].status for latent in (0, 1)] == ["too few activations", "dead"]
    assert ExampleSource(base, width=2**40).width == base.manifest.context_size


def test_the_summary_tells_token_latents_from_others(store):
    summary = summarise(store)
    assert summary.only_token.value == pytest.approx(N_TOKENS / DEAD, abs=0.12)
    assert summary.gain_over_lookup.value > 0 and summary.simulation.value > summary.shuffled_simulation.value + 0.3
    assert {"random", "same-token", "cofiring"} <= set(summary.by_negatives["detection"])
    assert set(summary.by_negatives["fuzzing"]) >= {"silent-token", "random"}
    assert len(summary.by_decile) == 10 and summary.enough
    curve = [found.value for found in summary.by_keys.values()]
    assert list(summary.by_keys) == ["1", "2", "3", "6", "12"]
    assert np.diff(curve).min() > -1e-9
    assert curve[-1] == pytest.approx(summary.detection.value) and 0.5 < summary.by_keys_area.value < curve[-1]
    assert 1 > summary.saved_bits.value > summary.whole_saved_bits.value
    as_dict = summary.as_dict()
    assert set(as_dict["detection"]) == {"value", "lo", "hi"} and as_dict["by_decile"][9]["value"] is not None


def test_means_know_the_documents_that_latents_share_and_an_older_store_says_what_to_do(store, tmp_path):
    path = shutil.copy(store, tmp_path / "old.sqlite")
    new = summarise(path)
    names = "detection fuzzing shuffled_detection whole_detection gain_over_lookup simulation simulation_random "
    names += "lookup_simulation saved_bits whole_saved_bits by_keys_area"
    for name in names.split():
        value, lo, hi = getattr(new, name)
        assert lo < value < hi, name
    for tenth, (value, lo, hi) in enumerate(new.by_decile):
        with Store(path, {}) as opened:
            found = opened.values(explainer="rules", control="", scorer="detection", negatives="random",
                                  metric=f"tpr_decile_{tenth}")  # fmt: skip
        assert lo < value < hi and value == pytest.approx(np.mean([*found.values()])), tenth
    with Store(path, {}) as opened:
        values = np.array([*opened.values(explainer="rules", control="", scorer="detection", negatives="random",
                                          metric="balanced_accuracy").values()])  # fmt: skip
        rows = [(*row, {key: x for key, x in unpacked(falls, 0, "falls").items() if "budget" not in key})
                for *row, falls in opened.connection.execute("SELECT * FROM falls")]  # fmt: skip
        with opened.connection:
            insert(opened.connection, "falls", rows, replace=True)
        between = summarise(path)  # of a store that knows how detection falls, but not how bits do
        with opened.connection:
            opened.connection.execute("DROP TABLE falls")
    assert new.detection.hi - new.detection.lo > 2 * 1.96 * values.std(ddof=1) / len(values) ** 0.5
    old = summarise(path)
    assert new.by_document and not between.by_document and not old.by_document
    assert between.detection == new.detection and np.isnan(between.saved_bits.lo)
    assert old.detection.value == new.detection.value and np.isnan(old.detection.lo)
    said = [table_of({"autointerp": each.as_dict()}) for each in (old, new)]
    assert ["autointerp CACHE --overwrite" in each for each in said] == [True, False]


def tables(store):
    connection = sqlite3.connect(store)
    features = connection.execute("SELECT * FROM feature ORDER BY latent").fetchall()
    return (
        features,
        connection.execute("SELECT * FROM explanation").fetchall(),
        sorted(connection.execute("SELECT * FROM score").fetchall(), key=str),
    )


def test_a_run_stopped_anywhere_ends_with_the_same_scores(planted, mini, store, tmp_path, monkeypatch):
    """Stop at the explanations, stop at the scores, continue each time: nothing is lost, nothing counted twice."""
    path = tmp_path / "stopped.sqlite"
    for owner, name, after in ((Work, "explain", 17), (Work, "score", 17)):
        real, calls = getattr(owner, name), []

        def dies(*arguments, real=real, calls=calls, after=after):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run_autointerp(planted, mini.tokenizer, store=path)
        monkeypatch.setattr(owner, name, real)
    run_autointerp(planted, mini.tokenizer, store=path)
    assert tables(path) == tables(store)


def test_a_store_that_another_process_works_on_is_refused_and_left(planted, mini, tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match=f"{tmp_path} is being written by another process"):
        run_autointerp(planted, mini.tokenizer, store=tmp_path / "held.sqlite")
    assert not (tmp_path / "held.sqlite").exists()


def test_two_processes_give_the_same(planted, mini, store, tmp_path):
    assert tables(run_autointerp(planted, mini.tokenizer, store=tmp_path / "two", workers=2)) == tables(store)


# Ray's cluster by itself is tests/base/test_units_ray.py's, and the bytes that come from it tests/cache/test_build_ray.py's.
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_latents_mapped_by_the_engine_give_the_same(engine, planted, mini, store, tmp_path, request, monkeypatch):
    monkeypatch.setattr(units, "get_context", fresh.spawned)
    if engine == "ray":
        request.getfixturevalue("ray_cluster")
    run_units = partial(map_units, engine=engine, workers=2, folder=tmp_path)
    path = run_autointerp(planted, mini.tokenizer, store=tmp_path / "mapped", run_units=run_units)
    assert tables(path) == tables(store)


def test_scores_of_another_cache_or_configuration_are_refused(planted, small_cache, mini, store):
    with pytest.raises(UsageError, match="another cache"):
        run_autointerp(FeatureCache.open(small_cache), mini.tokenizer, store=store)
    with pytest.raises(UsageError, match="another width"):
        run_autointerp(planted, mini.tokenizer, AutointerpConfig(width=16), store=store)
    from tests.corpora.test_packing import TOKENIZERS

    with pytest.raises(UsageError, match="tokenizer"):
        run_autointerp(planted, TOKENIZERS["metaspace"], store=store)


def test_a_cache_rebuilt_since_the_scores_is_refused(planted, mini, tmp_path):
    """The same folder, the same tokens, but other activations: the scores of the first do not hold."""
    from tests.planted import planted_cache

    positions = [planted.latent(latent).position for latent in range(3)]
    first = planted_cache(planted, tmp_path / "cache", positions, mini)
    store = run_autointerp(first, mini.tokenizer, store=tmp_path / "store")
    again = planted_cache(planted, tmp_path / "again", [positions[0][::2], *positions[1:]], mini)
    with pytest.raises(UsageError, match="another cache.*--overwrite"):
        run_autointerp(again, mini.tokenizer, store=store)


def test_a_draw_of_latents_is_live_and_repeats(planted, mini, tmp_path, monkeypatch):
    config = AutointerpConfig(latents=5, seed=2**32 + 4)  # more than scikit-learn takes
    explained = []
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, cache in (("a", planted), ("b", str(planted.folder))):
        with Store(run_autointerp(cache, mini.tokenizer, config, store=f"~/{name}"), {}) as opened:
            explained.append(sorted(opened.explanations("rules")))
    assert explained[0] == explained[1] and len(explained[0]) == 5 and DEAD not in explained[0]
    assert not summarise("~/a").enough  # five drawn latents do not stand for an SAE


# --- explainers and judges that are handed in ------------------------------------------------------------------------


class Parrot:
    """An explainer that says the same of every latent."""

    name, concurrency = "parrot", 4

    def explain(self, examples):
        assert examples.train and not {e.document for e in examples.train} & {e.document for e in examples.test}
        return [Explanation(examples.latent, "parrot", "ok", "parole", "words", None)]


@pytest.fixture(scope="module")
def judged(planted, mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("judged") / "store"
    judges = (OracleJudge(), ConstantJudge(True))
    return run_autointerp(
        planted, mini.tokenizer, AutointerpConfig(latents=8), store=path, explainers=(Parrot(),), judges=judges
    )


def test_other_judges_feed_the_same_scorers(judged):
    with Store(judged, {}) as opened:
        for latent in opened.scored("parrot", "oracle"):
            for row in scores_of(opened, latent):
                if row["explainer"] == "parrot" and row["metric"] == "balanced_accuracy":
                    assert row["value"] == (1.0 if row["judge"] == "oracle" else 0.5), row
        assert len(opened.scored("parrot", "oracle")) == len(opened.scored("rules", "rule")) > 5
    summary = summarise(judged, explainer="parrot", judge="oracle")
    assert summary.detection.value == summary.simulation.value == 1.0 and summary.explainer == "parrot"
    assert summary.gain_over_lookup.value == pytest.approx(1 - summary.lookup_detection.value, abs=0.02)


def test_threads_finish_what_is_under_way_before_a_failure_is_raised():
    seen = []

    def work(item):
        if item == 5:
            raise UsageError("budget reached")
        return item

    with pytest.raises(UsageError, match="budget"):
        for result in in_threads(work, range(100), 3):
            seen.append(result)
    assert {0, 1, 2, 3, 4} <= set(seen) and len(seen) < 15

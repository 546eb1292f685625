"""Explanations and scores of latents whose truth is planted, and the controls whose values are known."""

import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sae_italian.autointerp import AutointerpConfig, run_autointerp, summarise
from sae_italian.autointerp import run as run_module
from sae_italian.autointerp.examples import ExampleSource
from sae_italian.autointerp.rules import KeyTable, Rule, describe
from sae_italian.autointerp.scorers import MARK_SHARE, _auroc, best_threshold, binary_metrics, detection, fuzzing
from sae_italian.autointerp.store import Store
from sae_italian.cache import FeatureCache
from sae_italian.cache.splits import PARTS, document_parts
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.errors import UsageError
from tests.planted import planted_cache

N_TOKENS, N_PREVIOUS, N_NOISE = 12, 6, 10


@pytest.fixture(scope="module")
def planted(small_cache, mini, tmp_path_factory):
    """Latents on one token each, latents right after one token each, latents at random positions, one dead, one rare."""
    base = FeatureCache.open(small_cache)
    counted = np.flatnonzero(base.doc != NO_DOCUMENT)
    tokens = base.tokens
    ids, counts = np.unique(tokens[counted], return_counts=True)
    order = ids[np.argsort(-counts)]
    frequent = order[20 : 20 + 4 * N_TOKENS : 4]
    latents = [np.flatnonzero(tokens == token) for token in frequent]
    for token in order[5 : 5 + N_PREVIOUS]:
        after = np.flatnonzero(tokens == token) + 1
        after = after[after < len(tokens)]
        latents.append(after[base.doc[after] == base.doc[after - 1]])
    rng = np.random.default_rng(0)
    latents += [np.sort(rng.choice(counted, 400, replace=False)) for _ in range(N_NOISE)]
    latents += [np.empty(0, dtype=np.int64), counted[:3]]
    return planted_cache(base, tmp_path_factory.mktemp("planted"), latents, mini)


@pytest.fixture(scope="module")
def store(planted, mini):
    return run_autointerp(planted, mini.tokenizer)


def accuracies(store, scorer="detection", explainer="token-statistics", control=""):
    with Store(store, {}) as opened:
        return opened.values(explainer=explainer, control=control, scorer=scorer, metric="balanced_accuracy")


def test_planted_token_latents_are_explained_perfectly(store, planted, mini):
    for scorer in ("detection", "fuzzing"):
        values = accuracies(store, scorer)
        assert min(values[latent] for latent in range(N_TOKENS)) >= 0.97, scorer
    with Store(store, {}) as opened:
        explanations = opened.explanations("token-statistics")
    for latent in range(N_TOKENS):
        explanation = explanations[latent][1]
        token = mini.tokenizer.convert_ids_to_tokens(int(planted.tokens[planted.latent(latent).position[0]]))
        assert explanation.rule["family"] == "token" and explanation.rule["precision"] == 1
        assert f"«{token.replace('▁', '')}»" in explanation.text_it and explanation.text_it.startswith("su ")
        assert explanation.text_en.startswith("on ")


def test_latents_of_the_token_before_are_found_and_beat_the_lookup(store):
    own, lookup = accuracies(store), accuracies(store, explainer="token-lookup")
    latents = range(N_TOKENS, N_TOKENS + N_PREVIOUS)
    assert np.mean([own[latent] for latent in latents]) >= 0.95
    assert np.mean([own[latent] - lookup[latent] for latent in latents]) > 0.05
    with Store(store, {}) as opened:
        families = [opened.explanations("token-statistics")[latent][1].rule["family"] for latent in latents]
    assert families.count("previous") >= N_PREVIOUS - 2


def test_noise_is_not_explained(store):
    noise = range(N_TOKENS + N_PREVIOUS, N_TOKENS + N_PREVIOUS + N_NOISE)
    assert np.mean([accuracies(store)[latent] for latent in noise]) == pytest.approx(0.5, abs=0.07)


def test_shuffled_explanations_are_chance(store):
    assert np.mean(list(accuracies(store, control="shuffled").values())) == pytest.approx(0.5, abs=0.06)
    assert np.mean(list(accuracies(store, "fuzzing", control="shuffled").values())) == pytest.approx(0.5, abs=0.06)


def test_dead_and_rare_latents_are_reported_and_never_scored(store, planted):
    with Store(store, {}) as opened:
        explanations = opened.explanations("token-statistics")
        last = planted.manifest.d_sae - 1
        assert explanations[last - 1][1].status == "dead" and explanations[last][1].status == "too few activations"
        assert opened.scores_of(last) == opened.scores_of(last - 1) == []
    summary = summarise(store)
    assert (summary.n_dead, summary.n_too_few, summary.n_explained) == (1, 1, last - 1)


# --- examples --------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_by_document_and_negatives_are_silent(planted):
    source = ExampleSource(planted)
    parts = document_parts(planted)
    assert {0, 1, 2} == set(parts.tolist())
    for latent in (0, N_TOKENS, N_TOKENS + N_PREVIOUS):
        activity = source.activity(latent)
        active_positions = set(planted.latent(latent).position.tolist())
        for number, part in enumerate(PARTS):
            positive, negative = source.draw(latent, activity, part, 50)
            assert len(positive) == len(negative) > 5
            assert set(parts[source.doc[np.concatenate([positive, negative])]].tolist()) == {number}
            assert len(set(source.content[positive].tolist())) == len(positive)
            assert not set(source.content[positive].tolist()) & set(source.content[negative].tolist())
            assert sorted(source.length[positive] // 4) == sorted(source.length[negative] // 4)
            for segments, expected in ((positive, True), (negative, False)):
                for positions in source.grid(segments):
                    assert bool(active_positions & set(positions.tolist())) is expected


def test_draws_repeat_and_depend_on_the_seed(planted):
    one, same, other = (ExampleSource(planted, seed=seed) for seed in (0, 0, 1))
    draws = [source.draw(0, source.activity(0), "test", 20) for source in (one, same, other)]
    assert np.array_equal(draws[0].positive, draws[1].positive) and np.array_equal(draws[0].negative, draws[1].negative)
    assert not np.array_equal(draws[0].negative, draws[2].negative)


def test_the_parts_do_not_depend_on_the_order_of_documents(planted):
    assert document_parts(planted).tolist() == document_parts(planted).tolist()
    shares = np.bincount(document_parts(planted)) / planted.n_documents
    np.testing.assert_allclose(shares, (0.5, 0.2, 0.3), atol=0.07)


# --- judges whose score is known -------------------------------------------------------------------------------------


def a_rule(family, keys, mass, active=10, total=10) -> Rule:
    """A rule whose keys all weigh 1."""
    counts = (np.full(len(keys), n) for n in (active, total))
    return Rule(family, np.asarray(keys, dtype=np.int64), np.ones(len(keys)), np.asarray(mass), *counts, n_active=100)


def rule_over(keys) -> Rule:
    keys = np.sort(np.asarray(keys, dtype=np.int64))
    return a_rule("token", keys, np.ones(len(keys)) / max(len(keys), 1))


def test_always_yes_always_no_and_oracle(planted):
    source = ExampleSource(planted)
    table = KeyTable(source)
    activity = source.activity(3)
    examples = source.draw(3, activity, "test", 50)
    token = planted.tokens[planted.latent(3).position[0]]
    expected = {"yes": (range(table.vocab), 0.5), "no": ([], 0.5), "oracle": ([int(token)], 1.0)}
    for name, (keys, value) in expected.items():
        rule = rule_over(list(keys))
        for score in (
            detection(source, table, rule, examples),
            fuzzing(source, table, rule, activity, examples.positive, 3),
        ):
            assert score.metrics["balanced_accuracy"].value == value, (name, score.scorer)
            assert score.n_positive == score.n_negative > 0


def test_fuzzing_marks_equal_numbers_and_only_silent_decoys(planted, small_cache, mini, tmp_path):
    """With uneven values only tokens from 0.3 of the maximum on are marked; decoys are as many, all silent."""
    base = FeatureCache.open(small_cache)
    positions = np.flatnonzero(base.doc != NO_DOCUMENT)[::3]
    values = np.where(np.arange(len(positions)) % 2, 10.0, 1.0)
    cache = planted_cache(base, tmp_path / "uneven", [positions], mini, [values])
    source = ExampleSource(cache)
    seen = []

    class Spy(KeyTable):
        def predict(self, rule, grid):
            seen.append(grid)
            return np.zeros(grid.shape)

    activity = source.activity(0)
    segments = np.flatnonzero(source.length == 32)[:20]
    score = fuzzing(source, Spy(source), rule_over([1]), activity, segments, 0)
    assert score.metrics["tpr"].value == 0.0
    values_seen = source.values(activity, seen[0])
    marked = (values_seen >= MARK_SHARE * values_seen.max(axis=1, keepdims=True)) & (values_seen > 0)
    assert set(values_seen[marked].tolist()) == {10.0}


# --- the pieces ------------------------------------------------------------------------------------------------------

strengths = hnp.arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 5).map(float))


@given(positive=strengths, negative=strengths)
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert _auroc(positive, negative).value == pytest.approx(np.mean(pairs))


@given(positive=strengths, negative=strengths)
def test_best_threshold_is_the_best_of_all(positive, negative):
    threshold, accuracy = best_threshold(positive, negative)
    said = ((positive > 0) & (positive >= threshold)).mean(), ((negative > 0) & (negative >= threshold)).mean()
    options = np.unique(np.concatenate([positive, negative]))
    best = max([0.5] + [((positive >= o).mean() + 1 - (negative >= o).mean()) / 2 for o in options if o > 0])
    if (np.concatenate([positive, negative]) > 0).any():
        assert (said[0] + 1 - said[1]) / 2 == pytest.approx(accuracy)
        assert accuracy == pytest.approx(
            max(((positive >= o).mean() + 1 - (negative >= o).mean()) / 2 for o in options if o > 0)
        )
        assert accuracy <= best + 1e-12


def test_metrics_by_hand():
    # 3 of 4 positives said yes, 1 of 4 negatives: TPR .75, TNR .75, F1 at equal sizes 2*.75/(1+.75+.25) = .75
    metrics = binary_metrics(np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 1], bool), np.arange(4), np.arange(4, 8))
    assert {name: estimate.value for name, estimate in metrics.items()} == {
        "balanced_accuracy": 0.75,
        "tpr": 0.75,
        "tnr": 0.75,
        "f1": 0.75,
    }
    assert metrics["balanced_accuracy"].lo < 0.75 < metrics["balanced_accuracy"].hi


def test_descriptions_in_two_languages():
    strings = [" parlare", " mangiare", " dormire", " cantare", " andare", " la"]
    rule = a_rule("token", [0, 1, 3, 4], [0.4, 0.3, 0.1, 0.1], active=19, total=20)
    assert describe(rule, 6, strings, "it") == (
        "su «parlare», «mangiare», «cantare», «andare», spesso in -are (90 % dell'attivazione, precisione 0,95)"
    )
    after = a_rule("previous", [5], [0.8])
    assert describe(after, 6, strings, "it").startswith("subito dopo «la»")
    assert describe(after, 6, strings, "en").startswith("right after «la»")
    assert "«la dormire»" in describe(a_rule("bigram", [5 * 6 + 2], [0.8]), 6, strings, "it")
    assert "«parlare» e altri 3, spesso in -are" in describe(rule, 6, strings, "it", shown=1)


def test_a_rule_says_only_what_it_fires_on():
    """Keys below the threshold count neither in the text nor in precision and recall."""
    rule = Rule(
        "token",
        np.array([0, 1]),
        np.array([1.0, 0.2]),
        np.array([0.7, 0.3]),
        np.array([9, 6]),
        np.array([10, 60]),
        30,
        0.5,
    )
    assert rule.precision == 0.9 and rule.recall == 0.3
    assert describe(rule, 2, [" casa", " cosa"], "it") == "su «casa» (70 % dell'attivazione, precisione 0,90)"
    again = Rule.from_dict(rule.as_dict())
    assert again.precision == 0.9 and again.threshold == 0.5 and again.keys.tolist() == [0, 1]


# --- the store -------------------------------------------------------------------------------------------------------


def table_of(store):
    connection = sqlite3.connect(store)
    return connection.execute("SELECT * FROM explanation").fetchall(), connection.execute(
        "SELECT * FROM score"
    ).fetchall()


def test_a_run_stopped_anywhere_ends_with_the_same_scores(planted, mini, store, tmp_path, monkeypatch):
    """Stop at the explanations, stop at the scores, continue each time: nothing is lost, nothing counted twice."""
    path = tmp_path / "stopped.sqlite"
    real_explain, real_detection = run_module._Run.explain, run_module.detection
    calls = {"n": 0}

    def dies(real, after):
        def wrapped(*arguments):
            calls["n"] += 1
            if calls["n"] > after:
                raise KeyboardInterrupt
            return real(*arguments)

        return wrapped

    monkeypatch.setattr(run_module._Run, "explain", dies(real_explain, 9))
    with pytest.raises(KeyboardInterrupt):
        run_autointerp(planted, mini.tokenizer, store=path)
    monkeypatch.setattr(run_module._Run, "explain", real_explain)
    calls["n"] = 0
    monkeypatch.setattr(run_module, "detection", dies(real_detection, 20))
    with pytest.raises(KeyboardInterrupt):
        run_autointerp(planted, mini.tokenizer, store=path)
    monkeypatch.setattr(run_module, "detection", real_detection)
    run_autointerp(planted, mini.tokenizer, store=path)
    explanations, scores = table_of(path)
    expected = table_of(store)
    assert explanations == expected[0] and sorted(scores) == sorted(expected[1])


def test_scores_of_another_cache_or_configuration_are_refused(planted, small_cache, mini, store):
    with pytest.raises(UsageError, match="another cache"):
        run_autointerp(FeatureCache.open(small_cache), mini.tokenizer, store=store)
    with pytest.raises(UsageError, match="another width"):
        run_autointerp(planted, mini.tokenizer, AutointerpConfig(width=16), store=store)
    from tests.corpora.test_packing import TOKENIZERS

    with pytest.raises(UsageError, match="tokenizer"):
        run_autointerp(planted, TOKENIZERS["metaspace"], store=store)


def test_a_draw_of_latents_is_live_and_repeats(planted, mini, tmp_path):
    config = AutointerpConfig(latents=5, seed=4)
    explained = []
    for name in ("a", "b"):
        with Store(run_autointerp(planted, mini.tokenizer, config, store=tmp_path / name), {}) as opened:
            explained.append(sorted(opened.explained()))
    assert explained[0] == explained[1] and len(explained[0]) == 5
    assert planted.manifest.d_sae - 2 not in explained[0]  # the dead one

"""Scorers by hand: metrics, known judges, simulation, embedding, and the subject model's own scores."""

import json
import math
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sae_italian.autointerp.examples import ConstantJudge, Example, LatentExamples, RuleJudge, Verdicts, latent_examples
from sae_italian.autointerp.scorers import SCORERS, Asked, score_rows, scorer
from sae_italian.autointerp.scorers.binary import (
    GAIN,
    GROUPS,
    Answers,
    detection,
    falls_of,
    fuzzing,
    left_out,
    ranking,
    ranking_falls,
)
from sae_italian.autointerp.scorers.budget import N_LISTS, accuracy, area, saved_bits, whole_number
from sae_italian.autointerp.scorers.simulation import correlated, simulation
from sae_italian.autointerp.scorers.subject import (
    EMPTY,
    Encoder,
    EncoderJudge,
    SubjectJudge,
    effects,
    embedding,
    example_embedding,
    intruder,
    surprisal,
)
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.work import AutointerpConfig
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, auroc_by_document, two_way_mean
from tests.autointerp.conftest import N_TOKENS, OracleJudge, Says, Told, scores


def answers(positive, negative, p=None, q=None) -> Verdicts:
    probability = None if p is None else np.concatenate([p, q])
    return Verdicts(np.concatenate([positive, negative]), probability)


def judged(*verdicts, n=None, docs=None) -> Answers:
    """Answers to one question, of n positives (half) and the rest negatives, each of a document of its own without docs."""
    size = len(verdicts[0].said)
    sides = np.split(np.arange(size), [size // 2 if n is None else n])
    docs = np.arange(size) if docs is None else docs
    return Answers(verdicts, {"random": tuple(sides)}, docs)


def binary_metrics(verdicts, **others):
    found = judged(verdicts, **others)
    metrics = {name: Estimate(*table[:, 0, 0].tolist()) for name, table in found.shares().items()}
    return metrics | {name: each[0] for name, each in found.others(0).items()}


def test_metrics_by_hand():
    # 6 of 8 positives said yes, 2 of 8 negatives: TPR .75, TNR .75, F1 at equal sizes 2*.75/(1+.75+.25) = .75
    p, q = np.array([0.9, 0.8, 0.6, 0.2] * 2), np.array([0.1, 0.2, 0.4, 0.7] * 2)
    metrics = binary_metrics(answers([1, 1, 1, 0] * 2, [0, 0, 0, 1] * 2, p, q))
    values = {name: estimate.value for name, estimate in metrics.items()}
    assert [values[name] for name in ("balanced_accuracy", "tpr", "tnr", "f1")] == pytest.approx([0.75] * 4)
    assert "accuracy" not in values
    assert values["auroc"] == pytest.approx((4 + 4 + 3 + 1.5) / 16)
    assert values["brier"] == pytest.approx((np.mean((1 - p) ** 2) + np.mean(q**2)) / 2)
    # Wilson's interval by hand: the jackknife of 8 documents leaves 7 examples, t(7) = 2.365: centre .639, half .309;
    # MOVER for the mean of two of them
    assert metrics["tpr"] == pytest.approx((0.75, 0.330, 0.948), abs=2e-3)
    balanced = metrics["balanced_accuracy"]
    assert balanced == pytest.approx((0.75, 0.75 - (0.75 - 0.330) / 2**0.5, 0.75 + (0.948 - 0.75) / 2**0.5), abs=2e-3)
    perfect = binary_metrics(answers([1] * 8, [0] * 8))["balanced_accuracy"]
    assert perfect.lo < perfect.value == perfect.hi == 1
    assert np.isnan(binary_metrics(answers([1] * 4, [0] * 8), n=4)["tpr"].lo)  # four documents say nothing
    assert metrics["auroc"].lo < values["auroc"] < metrics["auroc"].hi


def test_metrics_do_not_depend_on_how_many_there_are_of_each_class():
    """3 of 4 positives and 1 of 2 negatives: plain accuracy would be 4/6, a Brier score over all windows another one."""
    p, q = np.array([0.9, 0.8, 0.6, 0.2]), np.array([0.1, 0.7])
    metrics = binary_metrics(answers([1, 1, 1, 0], [0, 1], p, q), n=4)
    values = {name: estimate.value for name, estimate in metrics.items()}
    assert (values["tpr"], values["tnr"], values["balanced_accuracy"]) == (0.75, 0.5, 0.625)
    assert values["f1"] == pytest.approx(2 * 0.75 / (1 + 0.75 + 0.5))
    assert values["brier"] == pytest.approx((np.mean((1 - p) ** 2) + np.mean(q**2)) / 2)
    assert values["auroc"] == pytest.approx((2 + 2 + 1 + 1) / 8)


probabilities = hnp.arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 5).map(lambda n: n / 5))


@given(positive=probabilities, negative=probabilities)
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    own = answers(np.ones(len(positive), int), np.zeros(len(negative), int), positive, negative)
    assert binary_metrics(own, n=len(positive))["auroc"].value == pytest.approx(np.mean(pairs))


def test_failed_answers_are_left_out_and_counted(source):
    examples = latent_examples(source, N_TOKENS, n_test=20).test
    said = np.array([example.positive for example in examples], dtype=np.int64)
    said[::5] = -1
    score = scores(detection, Says(said), test=examples)[0]
    assert score.metrics["balanced_accuracy"].value == 1.0 and score.n_failed > 0
    assert "auroc" not in score.metrics


def test_a_judges_answers_are_told_example_by_example():
    shown = [SimpleNamespace(first=11, negatives=None), SimpleNamespace(first=22, negatives="random")]
    one = Asked(SimpleNamespace(name="j"), Explanation(0, "nobody", "ok", "", "", None, id=7), "shuffled")
    one.answers["detection"] = shown, Verdicts(np.array([1, 0]), np.array([0.75, np.nan]))
    one.answers["fuzzing"] = shown[1:], Verdicts(np.array([-1]), None)
    expected = [
        (7, 5, "shuffled", "detection", "j", 0, 11, "", 1, 0.75),
        (7, 5, "shuffled", "detection", "j", 1, 22, "random", 0, None),
        (7, 5, "shuffled", "fuzzing", "j", 0, 22, "random", -1, None),
    ]
    assert list(one.judgements(5)) == expected  # pyright: ignore[reportArgumentType]


def test_sums_are_by_document():
    found = judged(answers([1, 0], [1, -1, 1]), n=2, docs=np.array([3, 9, 3, 5, 9]))
    n, yes = found.asked_and_yes
    assert found.known.tolist() == [3, 5, 9]
    assert n.tolist() == [[[[1, 0, 1], [1, 0, 1]]]] and yes.tolist() == [[[[1, 0, 0], [1, 0, 1]]]]


def test_scores_by_decile_count_their_positives(source):
    examples = latent_examples(source, N_TOKENS, n_test=20).test
    said = np.array([example.positive for example in examples], dtype=np.int64)
    positive = examples.questions["random"][0]
    missed = positive[examples.decile[positive] >= 0][:3]
    said[missed[:2]], said[missed[2]] = 0, -1
    found = scores(detection, Says(said, said.astype(float)), test=examples)
    assert {"f1", "auroc", "brier"} <= set(found[0].metrics)
    tenths = [score for score in found if next(iter(score.metrics)).startswith("tpr_decile")]
    n = [(score.n_positive, next(iter(score.metrics.values())).value * score.n_positive) for score in tenths]
    ranked = (examples.decile[positive] >= 0).sum()
    assert np.sum(n, axis=0) == pytest.approx([ranked - 1, ranked - 3]) and ranked > 5
    for score in tenths:  # what a group of documents holds counts nowhere else; where it holds all, nothing is left
        (name, whole), decile = next(iter(score.metrics.items())), int(next(iter(score.metrics))[-1])
        rows = positive[(examples.decile[positive] == decile) & (said[positive] >= 0)]
        for group, fall in enumerate(score.falls[name]):
            left = rows[examples.document[rows] % GROUPS != group]
            rest = said[left].mean() if len(left) else whole.value
            assert fall == pytest.approx(np.nan if len(left) == len(rows) else whole.value - rest, nan_ok=True)


def test_of_a_control_only_the_scorers_own_metric_is_kept_and_what_is_unknown_to_the_store_nowhere(source):
    examples = latent_examples(source, N_TOKENS, n_test=20)
    judge = SimpleNamespace(name="j", detect=lambda explanation, shown: Verdicts(np.ones(len(shown), int), None))
    one = Explanation(0, "nobody", "ok", "", "", None)
    asked = [Asked(judge, one._replace(id=1)), Asked(judge, one._replace(id=2), "shuffled"), Asked(judge, one)]
    rows, _ = score_rows(asked, examples)
    metrics = {number: {row[6] for row in rows if row[0] == number} for number in (0, 1, 2)}
    assert metrics[2] == {"balanced_accuracy"} and not metrics[0]
    assert {"balanced_accuracy", "tpr", "tnr", "f1"} <= metrics[1]
    only = Asked(judge, one._replace(id=3), only={"detection": "random"})
    told = {(row[3], row[5], row[6]) for row in score_rows([asked[2], only], examples)[0]}
    assert told == {("detection", "random", "balanced_accuracy")}


def test_the_store_gets_by_how_much_each_explanations_score_falls(source):
    """In thousandths, by group of documents; of what it does not know, nothing."""
    examples = latent_examples(source, N_TOKENS, n_test=20)
    said = np.arange(len(examples.test)) % 3 == 0
    judge = SimpleNamespace(name="j", detect=lambda _, shown: Verdicts(np.resize(said, len(shown)) * 1, None))
    one = Explanation(0, "nobody", "ok", "", "", None)
    asked = [Asked(judge, one._replace(id=1)), Asked(judge, one._replace(id=2), "shuffled"), Asked(judge, one)]
    falls = score_rows(asked, examples)[1]
    assert [row[:4] for row in falls] == [
        (1, N_TOKENS, "", "j"), (2, N_TOKENS, "shuffled", "j")
    ]  # fmt: skip
    own = falls[0][4]["detection random"]
    assert own == falls[1][4]["detection random"] and len(own) == GROUPS
    sides = examples.test.questions["random"]
    for group, fall in enumerate(own):
        left = [rows[examples.test.document[rows] % GROUPS != group] for rows in sides]
        (tpr, fpr), (rest, other) = ([said[rows].mean() for rows in each] for each in (sides, left))
        known = sum(map(len, left)) < sum(map(len, sides))
        assert fall == (round(500 * (tpr - fpr - rest + other)) if known else None)


def test_where_nobody_answered_there_is_no_number_and_no_warning():
    none = np.full(8, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = binary_metrics(answers([-1] * 8, [-1] * 8, none, none))
    assert len(metrics) == 6 and all(math.isnan(estimate.value) for estimate in metrics.values())


def test_the_interval_grows_when_windows_share_documents():
    rng = np.random.default_rng(0)
    said = rng.integers(0, 2, 100)
    apart, together = np.arange(200), np.arange(200) // 20
    widths = []
    for docs in (apart, together):
        clustered = np.repeat(said[::20], 20) if docs is together else said
        estimate = binary_metrics(answers(clustered, 1 - clustered), docs=docs)["tpr"]
        widths.append(estimate.hi - estimate.lo)
    assert widths[1] > 2 * widths[0]


def test_a_fall_is_the_score_less_what_is_left_without_a_group_of_documents():
    rng = np.random.default_rng(0)
    said, docs = rng.integers(0, 2, 120), rng.permutation(np.repeat(np.arange(100, 140), 3))
    said[7] = -1
    found = judged(answers(said[:60], said[60:]), docs=docs)
    score = found.shares()["balanced_accuracy"][0, 0, 0]
    for group, fall in enumerate(found.falls()[0][0]):
        left = (docs % GROUPS != group) & (said >= 0)
        tpr, fpr = (said[side][left[side]].mean() for side in (slice(60), slice(60, None)))
        assert fall == pytest.approx(score - (tpr + 1 - fpr) / 2)
    few = judged(answers(said[:60], said[60:]), docs=docs % 3).falls()[0][0]
    assert np.isfinite(few).tolist() == [True] * 3 + [False] * (GROUPS - 3)


@pytest.mark.parametrize("score", ["detection", "ranking"])
def test_windows_of_one_document_are_resampled_together(score):
    """The same answers, right in some documents and wrong in others: with four windows each, the interval is wider."""
    widths = []
    for n_shared in (1, 4):
        shown = []
        for i, example in enumerate(examples_with(("a", "b"), n=60)):
            shown.append(replace(example, document=f"d{i // 2 // n_shared}"))
        right = np.array([(i // 2 // 4) % 2 for i in range(len(shown))])  # by fours of pairs
        truth = np.array([example.positive for example in shown])
        said = np.where(right == 1, truth, ~truth).astype(np.int64)
        asked = [Asked(Says(said), Explanation(0, "nobody", "ok", "", "", None))]
        told = LatentExamples(0, 1.0, test=Told(shown))
        if score == "detection":
            estimate = next(detection(asked, told))[1].metrics["balanced_accuracy"]
        else:
            estimate = next(ranking(asked, told, [said.astype(float)]))[1].metrics["auroc"]
        widths.append(estimate.hi - estimate.lo)
    assert widths[1] > 1.4 * widths[0]


def test_questions_know_their_pairs_and_documents(source):
    examples = latent_examples(source, N_TOKENS)
    draw = source.draw(source.activity(N_TOKENS), "test", 50)
    for name, (here, there) in examples.test.questions.items():
        rows = draw.negative[name] >= 0
        assert examples.test.document[here].tolist() == source.doc[draw.positive[rows]].tolist()
        assert examples.test.document[there].tolist() == source.doc[draw.negative[name][rows]].tolist()
        assert all(
            examples.test[a].positive and examples.test[b].negatives == name for a, b in zip(here, there, strict=True)
        )
    here, there = examples.marked.questions["silent-token"]
    assert examples.marked.document[here].tolist() == examples.marked.document[there].tolist()


def test_the_executed_rule_answers_by_example_as_it_does_by_array(source, places, store):
    """A rule is laid over all segments at once; what it says of one example is what it says of that example alone."""
    with Store(store, {}) as opened:
        explanation = opened.explanations("rules")[N_TOKENS]
    examples, judge = latent_examples(source, N_TOKENS), RuleJudge(places)
    said = judge.detect(explanation, examples.marked).said
    simulated = judge.simulate(explanation, examples.simulation)
    assert [len(own) for own in simulated] == [len(example.tokens) for example in examples.simulation]
    for i, example in enumerate(examples.marked):
        whole = judge.detect(explanation, examples.test)
        assert len(whole.said) == len(examples.test) and example.marks.any()
        if said[i]:
            twin = next(e for e in examples.test if e.first == example.first)
            assert whole.said[list(examples.test).index(twin)]
    assert said[: examples.marked.questions["silent-token"][0].size].mean() > 0.5


def test_a_simulations_interval_is_over_documents_too():
    rng = np.random.default_rng(0)
    good = np.repeat(rng.random(16) < 0.5, 25)  # the simulation follows the truth in half of the documents
    true = rng.random(400)
    simulated = np.where(good, true, rng.random(400))
    apart, together = (
        correlated(true, simulated, docs)[0]["correlation"] for docs in (np.arange(400), np.arange(400) // 25)
    )
    assert apart.value == pytest.approx(together.value)
    assert together.hi - together.lo > 1.5 * (apart.hi - apart.lo)


def test_a_latent_with_too_few_negatives_of_every_source_has_no_scores():
    found = Answers([answers([1], [0])], {}, np.arange(2))
    assert found.shares()["balanced_accuracy"].shape == (3, 1, 0) and found.counts() == [[]]


@pytest.mark.parametrize(
    ("name", "number", "least"),
    [("n_examples", 6, 10), ("width", 3, 4), ("width", float("nan"), 4), ("latents", 0, 1), ("latents", "5", 1)],
)
def test_numbers_that_leave_nothing_to_score_are_refused(name, number, least):
    with pytest.raises(UsageError, match=f"{name} is {number!r}; it must be {least} or more, a whole number"):
        AutointerpConfig(**{name: number})


def test_numbers_of_numpy_are_kept_as_pythons():
    config = AutointerpConfig(**dict.fromkeys(("width", "latents", "seed"), np.int64(8)))
    assert json.loads(json.dumps(asdict(config))) == {"width": 8, "n_examples": 50, "latents": 8, "seed": 8}


def test_a_paired_comparison_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.3
    first = answers((~hard[:100]).astype(int), hard[100:].astype(int))
    second = answers((~hard[:100] & (rng.random(100) > 0.2)).astype(int), hard[100:].astype(int))
    both = judged(first, second)
    (difference,), shares = both.gains(0, 1), both.shares()["balanced_accuracy"]
    own, other = (Estimate(*shares[:, number, 0].tolist()) for number in (0, 1))
    assert difference.value == pytest.approx(own.value - other.value)
    apart = math.hypot(own.hi - own.lo, other.hi - other.lo)  # as if they had been asked about other examples
    assert difference.hi - difference.lo < apart / 2 and difference.lo > 0


def test_the_gain_over_the_lookup_is_on_what_both_answered():
    """The lookup says no to everything; half of the judge's answers failed, the others are right."""
    told = Told(examples_with(("a", "b"), n=20))
    truth = np.array([int(example.positive) for example in told])
    lookup = Explanation(0, "token-lookup", "ok", "", "", {})
    for said in (truth, np.where(np.arange(40) < 20, -1, truth)):
        asked = [Asked(Says(said), lookup._replace(explainer="x")), Asked(Says(0 * truth), lookup)]
        (one, score), (other, plain) = detection(asked, LatentExamples(0, 1.0, test=told))
        assert (one, other) == tuple(asked) and GAIN not in plain.metrics
        assert score.metrics[GAIN].value == 0.5 and score.n_failed == int((said < 0).sum())


def test_always_yes_always_no_and_oracle(source):
    examples = latent_examples(source, N_TOKENS, n_test=40)
    for judge, expected in ((ConstantJudge(True), 0.5), (ConstantJudge(False), 0.5), (OracleJudge(), 1.0)):
        for function in (detection, fuzzing):
            found = scores(function, judge, test=examples.test, marked=examples.marked)
            found = [score for score in found if "balanced_accuracy" in score.metrics]
            assert len({score.negatives for score in found}) >= 3
            for score in found:
                assert score.metrics["balanced_accuracy"].value == expected, (judge.name, score.negatives)
                assert score.n_positive == score.n_negative >= 10
    for judge, expected in (
        (OracleJudge(), 1.0),
        (Says(simulated=[np.ones(32)[: len(e.tokens)] for e in examples.simulation]), 0.0),
    ):
        simulated = scores(simulation, judge, simulation=examples.simulation)
        assert [score.negatives for score in simulated] == ["top-and-random", "random-only"]
        for score in simulated:
            assert score.metrics["correlation"].value == pytest.approx(expected)
            assert score.metrics["constant"].value == float(expected == 0)


def test_too_few_of_a_source_is_no_score(source):
    examples = [e for e in latent_examples(source, N_TOKENS, n_test=20).test if e.pair < 9]
    assert Told(examples).questions == {}


@given(
    true=hnp.arrays(np.float64, 20, elements=st.floats(0, 5).map(lambda x: round(x, 2))),
    seed=st.integers(0, 100),
)
def test_correlation_is_pearsons_over_all_tokens(true, seed):
    simulated = np.random.default_rng(seed).random(20)
    found, _ = correlated(true, simulated, np.arange(20) // 5)
    if true.std() > 1e-3:
        assert found["correlation"].value == pytest.approx(np.corrcoef(true, simulated)[0, 1], abs=1e-6)
    elif true.std() == 0:
        assert found["correlation"].value == 0 and found["constant"].value == 1


def test_a_correlations_falls_are_by_what_is_left_without_a_group_of_documents():
    rng = np.random.default_rng(0)
    true, docs = rng.random(60), np.repeat(np.arange(12), 5)
    simulated = true + 0.1 * rng.random(60)
    assert correlated(true, np.zeros(60), docs)[0]["constant"].value == 1.0
    found, falls = correlated(true, simulated, docs)
    assert found["correlation"].value == pytest.approx(np.corrcoef(true, simulated)[0, 1])
    for group, fall in enumerate(falls[:13]):  # the thirteenth group has no document
        left = docs != group
        rest = np.corrcoef(true[left], simulated[left])[0, 1]
        assert fall == pytest.approx(found["correlation"].value - rest if group < 12 else np.nan, nan_ok=True)


def test_simulations_that_failed_are_counted(source):
    examples = latent_examples(source, N_TOKENS, n_test=20).simulation
    simulated = [None, *(example.activations for example in examples[1:])]
    score = scores(simulation, Says(simulated=simulated), simulation=examples)[0]
    assert score.n_failed == 1 and score.n_positive == len(examples) - 1
    assert scores(simulation, Says(simulated=[None] * len(examples)), simulation=examples)[0].n_positive == 0


# --- embedding -------------------------------------------------------------------------------------------------------


def examples_with(words, n=15):
    made = []
    for i in range(n):
        for positive, word in ((True, words[0]), (False, words[1])):
            text = f"frase {i} {word}"
            tokens = np.arange(3)
            made.append(
                Example(
                    text,
                    np.zeros((3, 2), int),
                    tokens,
                    np.zeros(3),
                    f"d{i}{positive}",
                    positive,
                    None if positive else "random",
                    pair=i,
                )
            )
    return made


def test_bits_by_hand_and_what_saves_none():
    """4 of 8 with no rule: log2 9 + log2 70 = 9.30 bits; a rule of one key on 1 token of 64 that is always right."""
    truth, one = np.arange(8) < 4, np.array([1 / 64])

    def bits(said, truth, frequency):
        return saved_bits(said, truth, frequency, np.ones((1, len(truth))))[0]

    rule = math.log2(2.865064) + math.log2(2) + math.log2(N_LISTS) + 6  # 2 in Rissanen's code, its list, its key
    right = 2 * math.log2(5)  # none of four, twice
    assert bits(truth, truth, one) == pytest.approx((math.log2(9) + math.log2(70) - rule - right) / 8)
    many = np.arange(200) < 100
    assert 0.8 < bits(many, many, one) < 1
    always, never = np.ones(200, bool), np.zeros(200, bool)
    for said, keys in ((always, one), (never, one), (never, np.empty(0)), (many, np.full(100, 1e-4))):
        assert bits(said, many, keys) <= 0  # says nothing, or remembers each example
    assert bits(~many, many, one) == pytest.approx(bits(many, many, one), abs=0.3)  # as good, if turned
    assert [whole_number(n) for n in (1, 2, 4, 16)] == pytest.approx([1.5186 + x for x in (0, 1, 3, 7)], abs=1e-3)


def test_the_balanced_accuracy_of_answers_by_hand():
    truth = np.array([1, 1, 0, 0, 0], bool)
    every, said = np.ones((1, 5)), np.array([1, 0, 1, 0, 0], bool)
    assert accuracy(truth, truth, every) == 1 and accuracy(~truth, truth, every) == 0
    assert accuracy(said, truth, every) == pytest.approx((1 / 2 + 2 / 3) / 2)
    some = np.array([[1.0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])  # without the second; without the negatives there is none
    assert accuracy(said, truth, some) == pytest.approx([(1 + 2 / 3) / 2, np.nan], nan_ok=True)


def test_bits_fall_by_what_is_left_without_a_group_of_documents():
    rng = np.random.default_rng(3)
    docs, said, truth = rng.integers(0, 60, 80), rng.random(80) < 0.5, np.arange(80) < 40
    present, keys = left_out(docs), np.array([0.02, 0.1])
    found = saved_bits(said, truth, keys, present)
    for group, fall in enumerate(falls_of(found, present.sum(axis=1)).tolist()):
        left = docs % GROUPS != group
        rest = saved_bits(said[left], truth[left], keys, np.ones((1, int(left.sum()))))[0]
        assert fall == pytest.approx(found[0] - rest)
    alone = left_out(np.zeros(80, int))  # one document: nothing is left without it
    assert np.isnan(saved_bits(said, truth, keys, alone)).tolist() == [False, True] + [False] * (GROUPS - 1)


@pytest.mark.parametrize("n_documents", [10, 30])
@pytest.mark.parametrize("share", [0.75, 0.97])
def test_f1_and_brier_of_few_documents_are_covered_as_often_as_is_said(n_documents, share):
    """The answers to the windows of a document agree (correlation 0.2); plain percentiles cover 60 to 90 % near 1."""
    rng, docs = np.random.default_rng(4), np.repeat(np.arange(2 * n_documents), 4)
    truth = {"f1": 2 * share / (1 + share + 1 - share), "brier": 0.1**2 * share + 0.8**2 * (1 - share)}
    hits, widths = {name: [] for name in truth}, {name: [] for name in truth}
    for _ in range(250):
        right = rng.random(len(docs)) < rng.beta(4 * share, 4 * (1 - share), 2 * n_documents)[docs]
        yes, no = np.split(right, 2)
        metrics = binary_metrics(answers(yes * 1, 1 - no, np.where(yes, 0.9, 0.2), np.where(no, 0.1, 0.8)), docs=docs)
        for name, wanted in truth.items():
            value, lo, hi = metrics[name]
            assert lo <= value <= hi and hi > lo
            hits[name].append(lo <= wanted <= hi)
            widths[name].append(hi - lo)
    for name in truth:
        assert np.mean(hits[name]) >= 0.92 and np.mean(widths[name]) < (0.3 if n_documents == 30 else 0.5), name


@pytest.mark.parametrize("n_documents", [10, 30])
@pytest.mark.parametrize("share", [0.7, 0.97])
def test_gains_of_few_documents_are_covered_as_often_as_is_said(n_documents, share):
    """Two explanations, equally good, whose answers agree on seven windows in ten and within a document (0.2)."""
    rng, hits, docs = np.random.default_rng(6), [], np.tile(np.repeat(np.arange(n_documents), 3), 2)
    for _ in range(250):
        lot = rng.random((2, len(docs)))
        lot[1] = np.where(rng.random(len(docs)) < 0.7, lot[0], lot[1])
        right = lot < rng.beta(4 * share, 4 * (1 - share), n_documents)[docs]
        said = np.where(np.arange(len(docs)) < len(docs) // 2, right, ~right).astype(np.int64)
        both = judged(*(Verdicts(each, None) for each in said), docs=docs)
        value, lo, hi = both.gains(0, 1)[0]
        assert lo <= value <= hi and hi > lo
        assert value == pytest.approx(np.subtract(*right.mean(axis=1)))
        hits.append(lo <= 0 <= hi)
    assert np.mean(hits) >= 0.93
    without = [np.subtract(*right[:, docs != document].mean(axis=1)) for document in range(n_documents)]
    spread = np.square(np.array(without) - value).sum() * n_documents / (n_documents - 1)
    assert hi - value >= 2 * spread**0.5  # the last one's jackknife by hand; t is more than 2


@pytest.mark.parametrize("n_documents", [6, 30])
@pytest.mark.parametrize("strength", [0.2, 2.0])
def test_a_simulations_correlation_is_covered_as_often_as_is_said(n_documents, strength):
    """A sparse latent, followed better in some documents than in others; percentiles of resamples cover 73 to 90 %."""
    rng = np.random.default_rng(7)

    def latent(n):
        docs = np.repeat(np.arange(n), 24)
        true = np.where(rng.random(len(docs)) < 0.1, rng.exponential(1, len(docs)), 0.0)
        return docs, true, (strength + 0.3 * rng.normal(size=n))[docs] * true + 0.3 * rng.normal(size=len(docs))

    truth, hits = np.corrcoef(*latent(20_000)[1:])[0, 1], []
    for _ in range(250):
        docs, true, simulated = latent(n_documents)
        value, lo, hi = correlated(true, simulated, docs)[0]["correlation"]
        assert lo < value < hi
        hits.append(lo <= truth <= hi)
    assert np.mean(hits) >= 0.9


def test_a_rankings_falls_are_by_what_is_left_without_a_group_of_documents():
    rng = np.random.default_rng(8)
    strength, truth, docs = rng.integers(0, 5, 60) / 5, np.arange(60) < 25, rng.integers(0, 30, 60)
    area = auroc_by_document(strength, truth, docs).value
    for group, fall in enumerate(ranking_falls(strength, truth, docs)):
        left = docs % GROUPS != group
        rest = auroc_by_document(strength[left], truth[left], docs[left]).value
        assert fall == pytest.approx(area - rest if not left.all() else np.nan, nan_ok=True)


def simulated_latent(rng, documents, skill):
    """The correlation of a latent's simulation, better in some documents than in others, and its falls."""
    true, noise = rng.normal(size=(2, len(documents), 12))
    follows = (0.7 + skill + documents)[:, None] * true + noise
    found, falls = correlated(true.ravel(), follows.ravel(), np.repeat(np.arange(len(documents)), 12))
    return found["correlation"].value, falls


def told_latent(rng, documents, skill):
    """The bits that a text saves, which is right more often in some documents than in others, and their falls."""
    docs = np.repeat(np.arange(len(documents)), 6)
    truth = np.arange(len(docs)) % 2 == 0
    said = truth == (rng.random(len(docs)) < (0.8 + skill / 3 + documents / 3)[docs].clip(0, 1))
    present = left_out(docs)
    found = saved_bits(said, truth, np.array([0.05]), present)
    return found[0], falls_of(found, present.sum(axis=1))


@pytest.mark.parametrize("latent", [simulated_latent, told_latent])
def test_means_of_simulations_and_of_bits_are_covered_as_often_as_is_said(latent):
    """Thirty latents that share twelve documents, 150 times; intervals over the latents alone cover far fewer."""
    rng, found, alone = np.random.default_rng(5), [], []
    for _ in range(150):
        documents, skills = rng.normal(0, 0.25, 12), rng.normal(0, 0.25, 30)
        values, falls = map(np.array, zip(*(latent(rng, documents, skill) for skill in skills), strict=True))
        found.append(two_way_mean(values, falls))
        alone.append(1.96 * values.std(ddof=1) / len(values) ** 0.5)
    means, lo, hi = np.array(found).T
    truth = means.mean()
    assert 0.9 <= np.mean((lo <= truth) & (truth <= hi)) <= 0.99
    assert np.mean(abs(means - truth) <= alone) < 0.88


def test_the_area_under_the_curve_of_keys():
    assert area([0.5] * 5) == pytest.approx(0.5) and area([1.0] * 5) == pytest.approx(1 - 0.25 / math.log2(13))
    assert area([0.6, 0.6, 0.6, 0.6, 0.9]) > area([0.6] * 5) > 0.5


def test_embedding_ranks_by_cosine_with_the_explanation():
    def encode(texts):  # a bag of two words
        return np.array([[text.count("gatto") + 0.1, text.count("cane") + 0.1] for text in texts])

    told = Told(examples_with(("gatto", "cane")))
    (cat,), (dog,) = scores(embedding, EncoderJudge(encode), "parla del gatto", "parla del cane", test=told)
    assert cat.metrics["auroc"].value == 1.0 and dog.metrics["auroc"].value == 0.0 and set(cat.metrics) == {"auroc"}


@pytest.mark.parametrize("constant", [False, True])
def test_without_an_explanation_alike_positives_are_found_and_a_blind_encoder_is_at_chance(constant):
    """Twelve positives of one word; the encoder sees that word and a little of each text, or nothing at all."""
    rng = np.random.default_rng(0)

    def encode(texts):
        seen = [[text.count("gatto"), text.count("cane")] for text in texts]
        return (
            np.ones((len(texts), 4)) if constant else np.concatenate([seen, rng.random((len(texts), 2)) / 10], axis=1)
        )

    shown = Told(examples_with(("gatto", "cane"), 12))
    shown.activations = [np.arange(3.0) + i for i in range(24)]
    odd, near = (scores(of, EncoderJudge(encode), test=shown)[0].metrics for of in (intruder, example_embedding))
    assert odd["accuracy"].value == pytest.approx(0.2 if constant else 1)
    assert near["auroc"].value == pytest.approx(0.5 if constant else 1)


def test_roles_are_shuffled_for_the_control_and_what_explains_nothing_is_not_asked():
    shown = Told(examples_with(("gatto", "cane"), 40))
    shown.activations = [np.zeros(3)] * 80

    def encode(texts):
        return np.array([[text.count("gatto") + 0.01 * i, text.count("cane")] for i, text in enumerate(texts)], float)

    judge, examples = EncoderJudge(encode), LatentExamples(0, 1.0, test=shown)
    asked = [Asked(judge, Explanation(0, "rules", "ok", "a", "a", None), control) for control in ("", "shuffled")]
    asked.append(Asked(judge, Explanation(0, "", "ok", "b", "b", None), "empty"))
    for of, chance in ((intruder, 0.2), (example_embedding, 0.5)):
        (one, own), (other, shuffled) = of(asked, examples)
        assert (one.control, other.control) == ("", "shuffled")
        (own,), (shuffled,) = own.metrics.values(), shuffled.metrics.values()
        assert own.value == 1 and abs(shuffled.value - chance) < 0.2 and shuffled.lo <= shuffled.value <= shuffled.hi


def test_segments_of_one_document_are_not_compared_with_one_another():
    """Every vector is its document's: were a segment compared with its own document, it would be told apart."""
    made = examples_with(("gatto", "cane"), 12)
    shown = Told([replace(each, document=f"{each.positive} {each.pair // 2}") for each in made])  # two segments each
    shown.activations = [np.ones(3)] * 24

    def encode(texts):
        return np.eye(12)[[6 * ("gatto" in text) + int(text.split()[1]) // 2 for text in texts]]

    (found,) = scores(example_embedding, EncoderJudge(encode), test=shown)
    assert found.metrics["auroc"].value == 0.5  # nothing is like anything else


def test_what_a_positive_shares_with_its_own_negative_says_nothing():
    """Pairs are drawn by their token: were a segment compared with its pair, both scores would be below chance."""
    shown = Told(examples_with(("gatto", "cane"), 24))
    shown.activations = [np.full(3, 48 - i if i % 4 else i) for i in range(48)]  # in another order than they are given

    def encode(texts):
        return np.eye(24)[[int(text.split()[1]) for text in texts]]

    odd, near = (scores(of, EncoderJudge(encode), test=shown)[0].metrics for of in (intruder, example_embedding))
    assert odd["accuracy"].value == pytest.approx(0.2) and near["auroc"].value == 0.5


def test_a_new_scorer_is_one_function_and_is_found():
    """docs/extending.md, "A scorer": entered by its name, asked of the judges that have what it needs."""

    @scorer(needs="detect", metric="share")
    def said_yes(asked, examples):
        yield from ()

    assert SCORERS.pop("said_yes").needs == "detect"
    assert {
        "detection",
        "fuzzing",
        "simulation",
        "embedding",
        "intruder",
        "example_embedding",
        "surprisal",
        "intervention",
    } <= set(SCORERS)


def test_a_local_encoder_is_read_and_a_missing_one_is_named(tmp_path):
    from transformers import BertConfig, BertModel

    from tests.corpora.test_packing import TOKENIZERS

    with pytest.raises(UsageError, match="no sentence encoder"):
        Encoder(tmp_path / "nothing")
    tokenizer = TOKENIZERS["metaspace"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    encode = Encoder(tmp_path / "encoder")
    vectors = encode(["la città", "il sole è tiepido e bello", "la città"])
    assert vectors.shape == (3, 16) and np.allclose(vectors[0], vectors[2], atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    long = encode([end.join(["la città è bella, " * 20, "."]) for end in ("", "il sole")])  # cut at 24 tokens
    assert np.allclose(long[0], long[1], atol=1e-5) and not np.allclose(long[0], vectors[0], atol=1e-3)


# --- the subject model ------------------------------------------------------------------------------------------------


class Copier:
    """A model that expects again what it has read: its state, which can be replaced, is the share of each token so far."""

    def __init__(self, vocab, scale=10.0):
        self.vocab, self.scale = vocab, scale

    def __call__(self, tokens, replace=None):
        seen = torch.nn.functional.one_hot(tokens, self.vocab).float().cumsum(dim=1)
        share = seen / torch.arange(1, tokens.shape[1] + 1)[None, :, None]
        return self.scale * (replace(share) if replace else share)


@pytest.fixture(scope="module")
def copier(mini):
    return Copier(len(mini.tokenizer))


def test_surprisal_favours_an_explanation_that_quotes_the_positives(copier, mini, source, planted):
    tokens = {latent: int(planted.tokens[planted.latent(latent).position[0]]) for latent in range(N_TOKENS)}
    quotes = {latent: " ".join([mini.tokenizer.decode([token])] * 3) for latent, token in tokens.items()}
    # one whose token is a whole word, so that quoting it gives the token again
    latent = next(n for n, text in quotes.items() if mini.tokenizer(text)["input_ids"].count(tokens[n]) == 3)
    examples, quote = latent_examples(source, latent, n_test=15).test, quotes[latent]
    other = next(text for n, text in quotes.items() if n != latent)
    judge = SubjectJudge(copier, mini.tokenizer)
    found = scores(surprisal, judge, quote, other, EMPTY["it"], test=examples)
    own, shuffled, nothing = (
        next(s.metrics["auroc"].value for s in theirs if s.negatives == "random") for theirs in found
    )
    assert own > 0.8 and shuffled < own - 0.2 and nothing == 0.5  # what says nothing changes nothing
    assert set(found[0][0].metrics) == {"auroc"}
    short = SubjectJudge(copier, mini.tokenizer, context=70)
    (failed, *_), (read, *_) = scores(surprisal, short, quote * 20, "a", test=examples)
    assert math.isnan(failed.metrics["auroc"].value) and failed.n_failed == failed.n_positive + failed.n_negative
    assert read.n_failed == 0  # a text that does not fit takes no other with it


def test_surprisal_adds_up_the_models_log_probabilities(mini):
    def forward(tokens, replace=None):
        with torch.no_grad():
            return mini(tokens, use_cache=False).logits

    prefix, one, two = [1, 5, 6], np.array([7, 8, 9]), np.array([10])
    judge = SubjectJudge(forward, mini.tokenizer, context=128)
    found = judge.log_likelihoods([(prefix, one), (prefix, two), ([1], [5])])
    log_p = forward(torch.tensor([[1, 5, 6, 7, 8, 9]])).log_softmax(-1)[0]
    expected = sum(float(log_p[2 + i, token]) for i, token in enumerate(one))
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[1] == pytest.approx(float(log_p[2, 10]), abs=1e-4)
    assert found[2] == pytest.approx(float(log_p[0, 5]), abs=1e-4)  # prefixes may differ in length


def test_intervention_is_at_the_wanted_divergence_and_favours_what_the_direction_writes(copier, mini):
    """A direction that makes the model write a token favours that token as the explanation over another one."""
    token, other = (mini.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("gatto", "treno"))
    prompts = [np.array([5 + i, 9 + i, 14 + i, 30 + i]) for i in range(12)]
    direction = torch.nn.functional.one_hot(torch.tensor(token), copier.vocab).float()
    texts = {name: mini.tokenizer.decode([t, t]) for name, t in (("own", token), ("other", other))}
    judge = SubjectJudge(copier, mini.tokenizer)
    documents = np.repeat(np.arange(6), 2)
    effect = effects(judge, direction, texts, prompts, documents, divergence=2.0)
    found = {name: metrics for name, (metrics, _) in effect.items()}
    assert found["own"]["divergence"].value == pytest.approx(2.0, rel=0.1)
    gains = [found[name]["log_probability_gain"] for name in ("own", "other")]
    assert gains[0].value > 0.1 and gains[0].value > gains[1].value + 0.1 and gains[0].lo < gains[0].value
    falls = effect["own"][1]  # six documents of two prompts each: the mean without each averages to the mean
    assert np.isfinite(falls).tolist() == [True] * 6 + [False] * (GROUPS - 6)
    assert np.mean(falls[:6]) == pytest.approx(0, abs=1e-9) and max(map(abs, falls[:6])) > 1e-3
    nothing, _ = effects(judge, torch.zeros(copier.vocab), texts, prompts, documents)["own"]
    assert math.isnan(nothing["log_probability_gain"].value)

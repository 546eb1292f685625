"""The protocol's numbers against scikit-learn's, formulas written out, and planted answers."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from sae_italian.base.statistics import auc_parts
from sae_italian.benchmark.probes import (
    Examples,
    control_probe,
    fitted,
    judge,
    matched,
    permuted,
    ranked,
    sparse_probes,
)


def planted(seed, n=400, d=300, gain=2.0):
    """Sparse latents of which 7 fires more where y, and 8 is large everywhere."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 0
    x = np.where(rng.random((n, d)) < 0.1, rng.gamma(2.0, 1.0, (n, d)), 0)
    x[:, 7] = np.where(rng.random(n) < 0.2 + 0.6 * y, rng.gamma(2.0, gain, n), 0)
    x[:, 8] = rng.normal(1000, 1, n)
    return scipy.sparse.csr_array(x), y


def test_auc_is_scikit_learns_and_its_parts_are_a_jackknife():
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 6, 200).astype(float), rng.random(200) < 0.3
    auc, parts = auc_parts(score, truth)
    assert auc == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert parts.sum() == pytest.approx(0, abs=1e-12)
    # leaving one example out moves the AUC by minus its part, up to the weight that the others gain
    i = int(np.flatnonzero(truth)[0])
    without = np.arange(200) != i
    m = truth.sum()
    assert roc_auc_score(truth[without], score[without]) - auc == pytest.approx(-parts[i] * m / (m - 1), abs=1e-9)


def test_accuracy_and_f1_are_those_of_saying_yes_above_0():
    score, truth = np.array([-1.0, 2.0, 3.0, -4.0, 1.0]), np.array([True, True, False, False, True])
    found = judge(score, truth)
    assert found.accuracy == pytest.approx(3 / 5) and found.f1 == pytest.approx(f1_score(truth, score > 0))


def test_latents_are_ranked_as_sae_probes_ranks_them():
    """run_sae_evals.py: a over the mean of its non-zero values, then the absolute difference of class means."""
    x, y = planted(0)
    a = x.toarray()
    scaled = a / (np.abs(a).sum(0) / np.maximum((a != 0).sum(0), 1) + 1e-6)
    difference = np.abs(scaled[y].mean(0) - scaled[~y].mean(0))
    found = ranked(x, y, 20)
    assert found.tolist() == np.argsort(-difference, kind="stable")[:20].tolist()
    assert found[0] == 7 and 8 not in found[:5]  # a large latent does not win by being large


def test_a_planted_latent_is_found_and_more_latents_do_not_hide_it():
    (x, y), (w, truth) = planted(0), planted(1)
    found = sparse_probes(Examples(x, y, w, truth))
    alone = roc_auc_score(truth, w.toarray()[:, 7])
    assert found[1].auc == pytest.approx(alone, abs=1e-9) and alone > 0.75
    assert all(judged.auc > alone - 0.05 for judged in found.values())


@pytest.mark.parametrize("frequency", [0.5, 0.05])
def test_a_match_is_the_correlation_in_text_of_the_latent_chosen_in_training(frequency):
    """On balanced rows with weights as on rows of the text, where the answers are as rare as they are."""
    (x, y), (w, truth) = planted(0), planted(1)
    found = matched(Examples(x, y, w, truth), frequency)
    others = round((1 - frequency) / frequency)  # each row without the answer stands for so many
    rows = np.repeat(np.arange(len(truth)), np.where(truth, 1, others))
    dense = w.toarray()[rows]
    assert found == pytest.approx(np.corrcoef(dense[:, 7], truth[rows])[0, 1], abs=1e-9)
    assert matched(Examples(x, y, x, y), frequency) > 0.2 > matched(Examples(x[:, 9:], y, w[:, 9:], truth), frequency)


def test_a_perfect_latent_matches_wholly_a_constant_one_not_at_all_and_one_that_is_on_elsewhere_less():
    y = np.arange(200) % 2 == 0
    on = 2.0 * y
    elsewhere = np.where(y, 2.0, 2.0 * (np.arange(200) % 8 == 1))
    for latent, wanted in ((on, 1.0), (np.full(200, 3.0), 0.0), (np.zeros(200), 0.0)):
        x = scipy.sparse.csr_array(latent[:, None])
        assert matched(Examples(x, y, x, y), 0.1) == pytest.approx(wanted)
    x = scipy.sparse.csr_array(elsewhere[:, None])  # of a quarter of the others: AUC says 0.875 at any frequency
    often, rarely = (matched(Examples(x, y, x, y), frequency) for frequency in (0.5, 0.02))
    assert often == pytest.approx((0.5 - 0.625 * 0.5) / np.sqrt(0.625 * 0.375 * 0.25)) and rarely < often / 2


def test_probes_are_those_of_the_documented_solver():
    """saga, as sae-probes has it; ours is liblinear, which is faster at k = 16."""
    (x, y), (w, truth) = planted(2, gain=1.0), planted(3, gain=1.0)
    order = ranked(x, y, 16)
    few, judged = x[:, order].toarray(), w[:, order].toarray()
    for c in (0.1, 10.0):
        saga = LogisticRegression(C=c, l1_ratio=1.0, solver="saga", max_iter=5000).fit(few, y)
        ours = fitted(few, y, "l1", (c,))
        theirs = roc_auc_score(truth, saga.decision_function(judged))
        assert roc_auc_score(truth, ours.decision_function(judged)) == pytest.approx(theirs, abs=0.005)


def test_nothing_is_chosen_by_a_test_score(monkeypatch):
    monkeypatch.setattr("sae_italian.benchmark.probes.judge", lambda score, truth: score)
    (x, y), (w, truth) = planted(0), planted(1)
    one, other = (sparse_probes(Examples(x, y, w, labels), (1, 16)) for labels in (truth, np.roll(truth, 1)))
    for k in (1, 16):
        assert np.array_equal(one[k], other[k])


def test_shuffled_labels_are_at_chance():
    (x, y), (w, truth) = planted(0), planted(1)
    assert abs(np.mean(permuted(Examples(x, y, w, truth), 10, 0)) - 0.5) < 0.1


def test_controls_find_what_is_in_form_and_in_tokens():
    forms = ["nazione", "stazione", "lezione", "libro", "tavolo", "quadro"] * 40
    y = np.array([form.endswith("zione") for form in forms])
    ids = np.array([[len(form), i % 5] for i, form in enumerate(forms)])
    half = np.arange(len(forms)) < 120
    told = [[f for f, h in zip(forms, half == side, strict=True) if h] for side in (True, False)]
    vectors = np.stack([y, ~y, ids[:, 1]], 1) * 1.0
    for found in (
        control_probe("form", Examples(told[0], y[half], told[1], y[~half])),
        control_probe("tokens", Examples(ids[half], y[half], ids[~half], y[~half])),
        control_probe("dense", Examples(vectors[half], y[half], vectors[~half], y[~half])),
    ):
        assert found.auc == 1.0 and found.accuracy == 1.0
    noise = np.random.default_rng(0).random(len(forms)) < 0.5
    assert abs(control_probe("tokens", Examples(ids[half], noise[half], ids[~half], noise[~half])).auc - 0.5) < 0.15

import numpy as np
import pytest
import scipy.stats
from scipy.stats import norm

from sae_italian.base.report import plain
from sae_italian.base.statistics import (
    StreamingBootstrap,
    auroc_by_document,
    bootstrap,
    correlations_by_document,
    f1_by_document,
    gains_by_document,
    mean_interval,
    mean_of_two,
    reaches,
    shares_by_document,
    two_way_mean,
    wilson,
)


def test_wilson_known_value():
    # 8 of 10: centre (0.8 + 3.8415/20) / (1 + 3.8415/10) = 0.7168; half width 0.2265 (Wilson 1927, z = 1.96)
    estimate = wilson(8, 10)
    assert estimate == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5).lo == 0 and wilson(5, 5).hi == 1
    assert np.isnan(wilson(0, 0).value)


def test_bootstrap_of_a_ratio_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        n = rng.integers(5, 15, size=60)
        sums = np.stack([rng.binomial(n, 0.3), n], axis=1)
        estimate = bootstrap(sums, lambda s: s[:, 0] / s[:, 1], seed=trial, n_samples=400)
        hits += estimate.lo <= 0.3 <= estimate.hi
    assert 0.88 <= hits / 200 <= 0.99


def ratios_by_document(rng, n_documents: int, of_what: str) -> np.ndarray:
    """Sums of a made evaluation: documents of very different lengths that differ in what is measured."""
    tokens = rng.lognormal(5, 0.8, n_documents).astype(int).clip(5)
    if of_what == "l0":
        return np.stack([60 * np.exp(rng.normal(0, 0.3, n_documents)) * tokens, tokens], axis=1)
    power = tokens * np.exp(rng.normal(0, 0.4, n_documents))
    return np.stack([power / (1 + np.exp(-rng.normal(-1.2, 0.5, n_documents))), power], axis=1)


@pytest.mark.parametrize("n_documents", [6, 10, 20, 30])
@pytest.mark.parametrize("of_what", ["l0", "fvu"])
def test_the_cards_ratios_over_few_documents_are_covered_as_often_as_is_said(n_documents, of_what):
    """600 evaluations each; plain percentiles cover 86 to 93 % of them, 87 to 89 % at 6 and 10 documents."""
    rng, hits = np.random.default_rng(0), 0

    def ratio(sums):
        return sums[:, 0] / sums[:, 1]

    truth = ratio(ratios_by_document(rng, 10**6, of_what).sum(axis=0, keepdims=True))[0]
    for seed in range(600):
        streamed = StreamingBootstrap(2, seed=seed)
        streamed.add_sums(np.arange(n_documents), ratios_by_document(rng, n_documents, of_what))
        _, lo, hi = streamed.estimate(ratio)
        hits += lo <= truth <= hi
    assert 0.925 <= hits / 600 <= 0.98


def test_fewer_than_five_documents_have_no_interval():
    sums = np.random.default_rng(0).random((5, 2)) + 1
    for n_documents, known in ((4, False), (5, True)):
        found = bootstrap(sums[:n_documents], lambda s: s[:, 0] / s[:, 1])
        assert found.value == found.value and (found.lo == found.lo) == (found.hi == found.hi) == known


def test_the_seed_draws_the_resamples():
    sums = np.random.default_rng(0).random((30, 2)) + 1

    def drawn(seed):
        return bootstrap(sums, lambda s: s[:, 0] / s[:, 1], seed=seed)

    assert drawn(3) == drawn(3) != drawn(4) and drawn(3).value == drawn(4).value
    assert mean_interval(sums[:, 0], seed=3) != mean_interval(sums[:, 0], seed=4)


def test_clusters_widen_the_interval():
    """Ten documents that repeat themselves a hundred times say no more than ten."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=10)
    clustered = bootstrap(np.stack([100 * values, np.full(10, 100.0)], axis=1), lambda s: s[:, 0] / s[:, 1])
    independent = mean_interval(np.repeat(values, 100))
    assert clustered.hi - clustered.lo > 5 * (independent.hi - independent.lo)


def test_nothing_to_measure_is_nan_not_zero():
    assert np.isnan(mean_interval(np.array([])).value)
    assert mean_interval(np.array([7, np.nan])).finite() == (7, None, None)
    assert mean_interval(np.array([1, np.nan, 3, 4, 5, 7])) == mean_interval(np.array([1, 3, 4, 5, 7]))
    assert plain(bootstrap(np.empty((0, 2)), lambda s: s[:, 0])) == {"value": None, "lo": None, "hi": None}


def share_over_documents(rng, n_documents: int, share: float, trials: int = 400):
    """Examples of documents, four of each on average, that agree within a document (correlation 0.2), many trials."""
    counts = rng.poisson(4, (trials, n_documents)).clip(1)
    strength = 1 / 0.2 - 1
    of_document = rng.beta(share * strength, (1 - share) * strength, counts.shape)
    return rng.binomial(counts, of_document), counts


@pytest.mark.parametrize("n_documents", [10, 30, 100])
@pytest.mark.parametrize("share", [0.7, 0.97])
def test_a_share_of_few_documents_is_covered_as_often_as_is_said(n_documents, share):
    """reference/benchmark.md F2: .937 to .976 there, and .595 for a bootstrap of 10 documents at .97."""
    successes, counts = share_over_documents(np.random.default_rng(0), n_documents, share)
    value, lo, hi = shares_by_document(successes, counts)
    assert 0.92 <= np.mean((lo <= share) & (share <= hi)) <= 1
    assert (lo <= value).all() and (value <= hi).all() and (hi > lo).all()


def test_a_balanced_accuracy_has_an_interval_at_its_ends_too():
    rng = np.random.default_rng(1)
    a, b = (shares_by_document(*share_over_documents(rng, 20, share)) for share in (0.98, 0.995))
    value, lo, hi = mean_of_two(a, b)
    assert np.mean((lo <= 0.9875) & (hi >= 0.9875)) >= 0.92 and (hi > lo).all() and hi.max() <= 1 + 1e-12
    all_right = shares_by_document(np.full((1, 20), 2), np.full((1, 20), 2))
    # 40 of 40, t(19) = 2.093: Wilson's lower end is n / (n + t^2)
    assert all_right[:, 0] == pytest.approx((1, 40 / (40 + 2.093**2), 1), abs=1e-3)


def test_documents_that_repeat_themselves_count_once_and_few_have_no_interval():
    right = np.array([[1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1]])
    _, lo, hi = shares_by_document(right, np.ones_like(right))
    repeated = shares_by_document(50 * right, 50 * np.ones_like(right))
    assert repeated[2] - repeated[1] > 0.9 * (hi - lo)
    value, lo, hi = shares_by_document(np.ones((1, 4)), np.ones((1, 4)))
    assert value == 1 and np.isnan(lo) and np.isnan(hi)
    assert np.isnan(shares_by_document(np.zeros((1, 4)), np.zeros((1, 4)))).all()


def words_of_sentences(rng, n_sentences: int, share: float):
    """Words of sentences that bear a label, and a sentence's own shift of what is said of it (correlation 0.3)."""
    sentence = np.repeat(np.arange(n_sentences), 10)
    return sentence, rng.random(len(sentence)) < share, np.sqrt(0.3) * rng.normal(size=n_sentences)[sentence]


@pytest.mark.parametrize("n_sentences", [10, 30, 100])
@pytest.mark.parametrize(("recall", "false"), [(0.7, 0.05), (0.97, 0.005), (0.995, 0.001)])
def test_f1_of_few_sentences_is_covered_as_often_as_is_said(n_sentences, recall, false):
    """Resampling sentences covers 10 % where F1 is 0.995 and the sentences ten."""
    rng, hits, widths = np.random.default_rng(2), [], []
    truth = 2 * 0.2 * recall / (0.2 * recall + 0.8 * false + 0.2)
    for _ in range(300):
        sentence, label, _ = words_of_sentences(rng, n_sentences, 0.2)
        said = rng.random(len(label)) < np.where(label, recall, false)
        counts = (np.bincount(sentence, each, n_sentences)[None] for each in (label & said, said, label))
        _, (lo,), (hi,) = f1_by_document(*counts)
        hits.append(lo <= truth <= hi)
        widths.append(hi - lo)
    assert np.mean(hits) >= 0.92 and min(widths) > 0
    assert max(widths) < 0.7


@pytest.mark.parametrize("n_sentences", [15, 30, 100])
@pytest.mark.parametrize("distance", [1.0, 2.3, 3.5])
def test_auroc_of_few_sentences_is_covered_as_often_as_is_said(n_sentences, distance):
    """Two normal distributions: the area is Phi(distance / sqrt 2), 0.76, 0.95 and 0.99."""
    rng, hits, widths = np.random.default_rng(3), [], []
    truth = norm.cdf(distance / np.sqrt(2))
    for _ in range(300):
        sentence, label, own = words_of_sentences(rng, n_sentences, 0.3)
        score = distance * label + own + np.sqrt(0.7) * rng.normal(size=len(label))
        estimate = auroc_by_document(score, label, sentence)
        hits.append(estimate.lo <= truth <= estimate.hi)
        widths.append(estimate.hi - estimate.lo)
    assert np.mean(hits) >= 0.93 and min(widths) > 0
    assert np.mean(widths) < 0.25 and (n_sentences < 100 or np.mean(widths) < 0.09)


@pytest.mark.parametrize(("n_latents", "n_documents"), [(50, 10), (300, 30)])
def test_a_mean_over_latents_that_share_documents_is_covered_as_often_as_is_said(n_latents, n_documents):
    """Of 400 made evaluations; intervals over the latents alone cover 65 to 85 % of them."""
    rng, hits, alone = np.random.default_rng(0), 0, 0
    for _ in range(400):
        cells = 0.8 + rng.normal(0, 0.14, (n_latents, 1)) + rng.normal(0, 0.08, n_documents)
        cells += rng.normal(0, 0.35, cells.shape)
        values = cells.mean(axis=1)
        mean, lo, hi = two_way_mean(values, values[:, None] - (cells.sum(axis=1)[:, None] - cells) / (n_documents - 1))
        assert mean == pytest.approx(values.mean())
        hits += lo <= 0.8 <= hi
        alone += abs(mean - 0.8) <= 1.96 * values.std(ddof=1) / n_latents**0.5
    assert 0.925 <= hits / 400 <= 0.985 and alone / 400 < 0.87


def test_a_mean_over_latents_by_hand_and_where_documents_say_nothing():
    """Two latents that fall by the same: all is the documents'. 4/5 of the squares' sum, t(4) = 2.776."""
    falls = np.array([[0.02, -0.02, 0.01, -0.01, 0.0, np.nan]] * 2)
    half = 2.7764 * (0.8 * 0.001) ** 0.5
    assert two_way_mean(np.array([0.7, 0.7]), falls) == pytest.approx((0.7, 0.7 - half, 0.7 + half), abs=1e-5)
    apart = two_way_mean(np.array([0.6, 0.8]), 0 * falls)  # all is the latents'
    assert apart == pytest.approx((0.7, 0.7 - 2.7764 * 0.1, 0.7 + 2.7764 * 0.1), abs=1e-4)
    unknown = np.stack([falls[0], falls[0] * np.nan])
    for values, known in ((np.ones(2), falls[:, :4]), (np.ones(1), falls[:1]), (np.ones(2), unknown)):
        mean, lo, hi = two_way_mean(values, known)
        assert mean == 1 and np.isnan([lo, hi]).all()
    assert np.isnan(two_way_mean(np.empty(0), np.empty((0, 20))).value)


def test_f1_and_auroc_by_hand():
    # 3 of 4 said are true, of 5 true: F1 = 2 * 3 / 9
    both, said, true = np.array([[2, 1], [1, 1]]), np.array([[2, 2], [1, 1]]), np.array([[3, 2], [1, 1]])
    assert f1_by_document(both, said, true)[0] == pytest.approx([6 / 9, 1])
    # pairs (positive, negative): 0.9 beats both, 0.4 beats one and ties none, 0.5 ties one and beats one
    found = auroc_by_document(np.array([0.9, 0.4, 0.5, 0.5, 0.1]), np.array([1, 1, 1, 0, 0], bool), np.arange(5))
    assert found.value == pytest.approx((2 + 1 + 1.5) / 6) and np.isnan(found.lo)  # two negatives: no interval
    perfect = auroc_by_document(np.arange(40.0), np.arange(40) >= 20, np.arange(40))
    assert perfect.value == 1 == perfect.hi and 0.8 < perfect.lo < 0.97
    assert np.isnan(auroc_by_document(np.arange(3.0), np.ones(3, bool), np.arange(3)).value)


@pytest.mark.parametrize(("top", "bottom"), [(4, 5), (7, 10), (1, 2)])
def test_a_share_reaches_a_threshold_exactly_when_its_counts_do(top, bottom):
    """Balanced accuracy of a of n and b of m, for all n, m up to 50 as autointerp draws them, in either order of summing."""
    a, n, b, m = np.ogrid[0:51, 1:51, 0:51, 1:51]
    counted = bottom * (a * m + b * n) >= 2 * top * n * m  # in whole numbers
    possible = np.broadcast_to((a <= n) & (b <= m), counted.shape)
    for share in ((a / n + b / m) / 2, (a / n + 1 - (m - b) / m) / 2):
        assert (reaches(share, top / bottom) == counted)[possible].all()
    assert (((a / n + 1 - (m - b) / m) / 2 >= top / bottom) != counted)[
        possible
    ].any() or top != 4  # floats alone do not
    # the nearest that two such shares come to one another
    some = np.unique(np.arange(51)[:, None] / 50 + np.arange(50) / 49)
    gaps = np.diff(some)
    assert gaps[gaps > 1e-12].min() / 2 > 1e-9


def right_by_document(rng, n_documents, rows=3):
    """Of several pairs of explanations: which of 8 examples of each kind and document each has right, and how many count."""
    own, other = rng.random((2, rows, 2, n_documents, 8)) < np.array([0.8, 0.7]).reshape(2, 1, 1, 1, 1)
    asked = rng.random((rows, 2, n_documents, 8)) < 0.8
    return own & asked, other & asked, asked


def test_a_gain_is_the_difference_of_balanced_accuracies_and_its_interval_a_jackknife_over_documents():
    own, other, asked = right_by_document(np.random.default_rng(0), 12)
    gained, counts = own.sum(-1) - other.sum(-1), asked.sum(-1)
    found = gains_by_document(gained, (own != other).sum(-1), counts)

    def gain(row, kept):  # examples of some documents, written out
        shares = [own[row, kind][kept].sum() - other[row, kind][kept].sum() for kind in (0, 1)]
        return sum(share / asked[row, kind][kept].sum() for kind, share in enumerate(shares)) / 2

    for row, (value, lo, hi) in enumerate(found.T):
        whole = gain(row, np.ones(12, bool))
        spread = 12 / 11 * sum((gain(row, np.arange(12) != left) - whole) ** 2 for left in range(12))
        differ = (own[row] != other[row]).sum(axis=(1, 2)) + 1
        alone = sum(d / asked[row, kind].sum() ** 2 for kind, d in enumerate(differ)) / 4
        half = scipy.stats.t.ppf(0.975, 11) * max(spread, alone) ** 0.5
        assert (value, lo, hi) == pytest.approx((whole, whole - half, whole + half))


def test_equal_answers_gain_nothing_and_still_have_an_interval():
    counts = np.full((1, 2, 6), 4.0)
    (value,), (lo,), (hi,) = gains_by_document(0 * counts, 0 * counts, counts)
    half = scipy.stats.t.ppf(0.975, 5) * (2 / 24**2 / 4) ** 0.5
    assert (value, lo, hi) == pytest.approx((0, -half, half))
    few = gains_by_document(0 * counts[..., :4], 0 * counts[..., :4], counts[..., :4])
    assert few[0, 0] == 0 and np.isnan(few[1:]).all()
    absent = np.concatenate([counts, np.zeros((1, 2, 3))], axis=2)  # documents without an example are none
    assert gains_by_document(0 * absent, 0 * absent, absent)[2, 0] == pytest.approx(half)


def test_a_correlations_interval_is_a_jackknife_of_fishers_z():
    r = np.array([[0.5, 0.4, 0.6, 0.55, 0.45, 0.5], [-0.9, -0.8, -0.95, -0.9, -0.85, -0.99]])
    for row, (value, lo, hi) in zip(r, correlations_by_document(r).T, strict=True):
        z = np.arctanh(row)
        half = scipy.stats.t.ppf(0.975, 4) * (5 / 4 * ((z[1:] - z[0]) ** 2).sum()) ** 0.5
        assert (value, lo, hi) == pytest.approx((row[0], np.tanh(z[0] - half), np.tanh(z[0] + half)))
    few = correlations_by_document(r[:, :5])  # four documents
    assert few[0].tolist() == [0.5, -0.9] and np.isnan(few[1:]).all()
    value, lo, hi = correlations_by_document(np.array([[1.0, 1.0, 1.0, 0.9, 1.0, -1.0]]))[:, 0]
    assert value == 1 and -1 <= lo < hi <= 1 and np.isfinite([lo, hi]).all()

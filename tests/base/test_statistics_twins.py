"""Each interval beside a slow plain twin of it, written with loops from the formula."""

from math import isnan, nan, sqrt

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from sae_italian.base import statistics
from sae_italian.base.report import plain as as_json
from sae_italian.base.statistics import (
    Estimate,
    StreamingBootstrap,
    auroc_by_document,
    bootstrap,
    correlation,
    interval,
    shares_by_document,
    slope,
    two_way_mean,
)


def ratio(sums):
    return sums[:, 0] / sums[:, 1]


def expanded(n: int) -> float:
    """The lower tail of the expanded percentile interval (Hesterberg 2015): Phi(-t sqrt(n / (n - 1)))."""
    return norm.cdf(-student.ppf(0.975, n - 1) * sqrt(n / (n - 1)))


def test_an_estimate_is_written_with_none_for_what_json_cannot_say():
    found = Estimate(np.float32(0.5), nan, float("inf"))
    assert found.finite() == (0.5, None, None) and type(found.finite()[0]) is float
    assert as_json(found) == {"value": 0.5, "lo": None, "hi": None}


def test_the_interval_is_the_quantiles_of_what_is_finite():
    resampled = np.array([nan, *range(101), np.inf])
    assert interval(7.0, resampled) == (7.0, 2.5, 97.5)
    assert interval(60.0, resampled, centre=True) == (60.0, 12.5, 107.5)  # their mean, 50, is moved to the value
    assert interval(40.0, resampled, centre=True) == (40.0, -7.5, 87.5)
    assert interval(3.0, np.array([5.0])) == (3.0, 5.0, 5.0)
    few, enough = (interval(7.0, np.arange(101.0), n) for n in (4, 5))
    assert isnan(few.lo) and isnan(few.hi) and enough[1:] == pytest.approx((100 * expanded(5), 100 - 100 * expanded(5)))
    value, lo, hi = interval(7.0, np.array([nan]))
    assert value == 7.0 and isnan(lo) and isnan(hi)


@pytest.mark.parametrize("kept", [statistics.KEPT_WEIGHTS, 0])  # the weights kept for the next call, or drawn anew
def test_the_bootstrap_draws_clusters_with_replacement(kept, monkeypatch):
    monkeypatch.setattr(statistics, "KEPT_WEIGHTS", kept)
    sums = np.array([[1, 2], [3, 4], [0, 5], [7, 7], [2, 9]])
    counts = np.random.default_rng(5).multinomial(5, [0.2] * 5, size=200)
    plain = [sum(c * row[0] for c, row in zip(draw, sums, strict=True)) for draw in counts]
    plain = np.array(plain) / [sum(c * row[1] for c, row in zip(draw, sums, strict=True)) for draw in counts]
    tail = expanded(5)
    found = bootstrap(sums, ratio, n_samples=200, seed=5)
    assert found == pytest.approx((13 / 27, *np.quantile(plain, (tail, 1 - tail))), rel=1e-12)
    small = bootstrap(sums.astype(np.int8), lambda s: 100 * ratio(s), n_samples=200, seed=5)  # sums of bytes overflow
    assert small == pytest.approx([100 * x for x in found], rel=1e-12)
    assert bootstrap(sums, ratio, n_samples=200) == bootstrap(sums, ratio, n_samples=200, seed=0)
    assert isnan(bootstrap(np.zeros((6, 2)), ratio).value)  # 0/0 without a warning


def plain_share(successes, counts):
    """Wilson's interval at n / design effect, with Student's quantile, of one share: the docstring's words in loops."""
    pairs = [(s, n) for s, n in zip(successes, counts, strict=True) if n > 0]
    g, s, n = len(pairs), sum(s for s, _ in pairs), sum(n for _, n in pairs)
    share = s / n
    without = [(s - a) / (n - b) for a, b in pairs]
    mean = sum(without) / g
    spread = (g - 1) / g * sum((x - mean) ** 2 for x in without)
    alone = share * (1 - share) / n
    effective = n / max(1, spread / alone) if alone > 0 else n
    z2 = student.ppf(0.975, g - 1) ** 2
    centre = share + z2 / (2 * effective)
    half = sqrt(z2 * (share * (1 - share) / effective + z2 / (4 * effective**2)))
    return share, (centre - half) / (1 + z2 / effective), (centre + half) / (1 + z2 / effective)


def test_shares_over_documents_are_those_of_the_plain_formula():
    rng = np.random.default_rng(2)
    counts = rng.poisson(3, (40, 12))
    counts[0] = [50, *[1] * 11]  # one document weighs more than all others
    of_document = rng.beta(0.6, 0.4, counts.shape)
    successes = rng.binomial(counts, of_document)
    found = shares_by_document(successes, counts)
    for number, (mine, of) in enumerate(zip(successes, counts, strict=True)):
        share, lo, hi = plain_share(mine, of)
        expected = (share, min(max(lo, 0), share), max(min(hi, 1), share))
        assert found[:, number] == pytest.approx(expected, rel=1e-9)
    assert (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_stream_of_documents_is_resampled_as_if_it_stood_in_one_table(dtype):
    sums = np.random.default_rng(3).integers(1, 9, (7, 2)).astype(np.float64)
    stream = StreamingBootstrap(2, n_samples=300, seed=4, dtype=dtype)
    for rows in ([0, 1, 2], [3], [4, 5, 6], []):
        stream.add_sums(np.array(rows, dtype=np.int64), sums[rows])
    weights = np.array([np.random.default_rng((4, cluster)).poisson(1.0, 300) for cluster in range(7)]).T
    plain = weights @ sums
    assert stream.total.dtype == stream.resampled.dtype == dtype
    with np.errstate(invalid="ignore", divide="ignore"):
        quantiles = np.nanquantile(plain[:, 0] / plain[:, 1], (expanded(7), 1 - expanded(7)))
    assert stream.estimate(ratio) == pytest.approx((sums[:, 0].sum() / sums[:, 1].sum(), *quantiles), rel=1e-6)
    assert isnan(StreamingBootstrap(2, n_samples=5).estimate(ratio).value)  # 0/0 without a warning
    assert len(StreamingBootstrap(2).resampled) == 1000


def test_a_document_in_two_parts_counts_as_in_one():
    whole, parts = (StreamingBootstrap(1, n_samples=50) for _ in range(2))
    whole.add_sums(np.array([3, 8]), np.array([[5.0], [2.0]]))
    parts.add_sums(np.array([3]), np.array([[1.0]]))
    parts.add_sums(np.empty(0, int), np.empty((0, 1)))
    parts.add_sums(np.array([3, 8]), np.array([[4.0], [2.0]]))
    assert parts.n_clusters == whole.n_clusters == 2
    assert (whole.total == parts.total).all() and (whole.resampled == parts.resampled).all()


def test_correlation_and_slope_are_those_of_pairs_drawn_with_replacement():
    rng = np.random.default_rng(6)
    x = rng.normal(size=9) + 3
    y = 0.5 * x + rng.normal(0, 0.4, 9)
    draws = [np.repeat(np.arange(9), n) for n in rng_of_pairs(9)]
    for function, plain in (
        (correlation, lambda a, b: np.corrcoef(a, b)[0, 1]),
        (slope, lambda a, b: np.cov(a, b, bias=True)[0, 1] / a.var()),
    ):
        drawn = [plain(x[rows], y[rows]) for rows in draws]
        ends = np.quantile(drawn, (expanded(9), 1 - expanded(9)))
        # a pair of which one is not known is no pair
        found = function(np.append(x, [nan, 1.0]), np.append(y, [2.0, np.inf]))
        assert found == pytest.approx((plain(x, y), *ends), rel=1e-6)
        assert isnan(function(x[:2], y[:2]).value)


def rng_of_pairs(n: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)


def test_a_mean_over_latents_and_documents_is_that_of_the_plain_formula():
    rng = np.random.default_rng(7)
    values, falls = rng.normal(0.7, 0.1, 5), rng.normal(0.01, 0.03, (5, 8))  # falls of a mean that is not 0
    falls[0, 2] = falls[3, 5] = nan
    falls[:, 7] = nan  # a group that nobody has
    plain = np.nan_to_num(falls[:, :7])

    def jackknife(of):
        return 6 / 7 * sum((x - sum(of) / 7) ** 2 for x in of)

    latents = sum((x - values.mean()) ** 2 for x in values) / 4 / 5
    documents = jackknife([sum(column) / 5 for column in plain.T])
    both = sum(jackknife(list(row)) for row in plain) / 25
    half = student.ppf(0.975, 6) * sqrt(max(latents + documents - both, latents, documents))
    assert two_way_mean(values, falls) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


def test_an_area_under_the_curve_is_that_of_the_plain_formula():
    """Of each example the share of pairs it wins; its deviations summed by document (Obuchowski 1997), then Wilson."""
    rng = np.random.default_rng(8)
    truth, document = rng.random(60) < 0.5, rng.integers(0, 9, 60)
    score = rng.integers(0, 6, 60) + 5.0 * (document % 3) * truth  # which tells the kinds apart in some documents alone
    truth[document == 8] = True  # a document of one kind alone
    wins = [[(a > b) + (a == b) / 2 for b in score[~truth]] for a in score[truth]]
    area, (m, n) = np.mean(wins), np.shape(wins)
    parts = np.zeros(9)
    for i, d in enumerate(document[truth]):
        parts[d] += (np.mean(wins[i]) - area) / m
    for j, d in enumerate(document[~truth]):
        parts[d] += (np.mean([row[j] for row in wins]) - area) / n
    spread = sum(x * x for x in parts) * 8 / 7  # eight documents have both kinds
    q, r = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    alone = (area * (1 - area) + (m - 1) * q + (n - 1) * r) / (m * n)
    effective, z2 = area * (1 - area) / max(alone, spread), student.ppf(0.975, 7) ** 2
    centre = (area + z2 / (2 * effective)) / (1 + z2 / effective)
    half = sqrt(z2 * (area * (1 - area) / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
    assert spread > alone  # so that it is the documents that count
    assert auroc_by_document(score, truth, document) == pytest.approx((area, centre - half, centre + half))

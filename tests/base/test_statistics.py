import numpy as np
import pytest

from sae_italian.base.statistics import bootstrap, mean_interval, wilson


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


def test_clusters_widen_the_interval():
    """Ten documents that repeat themselves a hundred times say no more than ten."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=10)
    clustered = bootstrap(np.stack([100 * values, np.full(10, 100.0)], axis=1), lambda s: s[:, 0] / s[:, 1])
    independent = mean_interval(np.repeat(values, 100))
    assert clustered.hi - clustered.lo > 5 * (independent.hi - independent.lo)


def test_nothing_to_measure_is_nan_not_zero():
    assert np.isnan(mean_interval(np.array([])).value)
    assert bootstrap(np.empty((0, 2)), lambda s: s[:, 0]).as_dict() == {"value": None, "lo": None, "hi": None}

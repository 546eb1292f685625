"""Intervals: the bootstrap clustered by document, Wilson's interval for shares, and shares over few documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN where there was nothing to measure."""

    value: float
    lo: float
    hi: float

    def finite(self) -> tuple[float | None, ...]:
        """Return value, lo and hi with None for NaN and infinities."""
        return tuple(float(x) if isfinite(x) else None for x in self)


KEPT_WEIGHTS = 2**21  # numbers: 16 MB
LEAST_DOCUMENTS = 5  # for an interval over documents: fewer say nothing of how documents differ
NOTHING = Estimate(float("nan"), float("nan"), float("nan"))
Statistic = Callable[[Float[np.ndarray, "samples quantities"]], Float[np.ndarray, " samples"]]
ByDocument = Float[np.ndarray, "rows documents"]
ByKind = Float[np.ndarray, "rows 2 documents"]


def bootstrap(
    sums: Float[np.ndarray, "clusters quantities"], statistic: Statistic, *, n_samples: int = 1000, seed: int = 0
) -> Estimate:
    """Return `statistic` of the summed quantities and its `interval`, resampling clusters (documents).

    The quantities are sums within a cluster, so any ratio of sums is resampled exactly by weighting the rows.
    """
    if not (n := len(sums)):
        return NOTHING
    sums = np.asarray(sums, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = (_weights if n_samples * n <= KEPT_WEIGHTS else _weights.__wrapped__)(n, n_samples, seed)
        value, resampled = statistic(sums.sum(axis=0, keepdims=True)), statistic(weights @ sums)
    return interval(float(value[0]), resampled, n)


def mean_interval(values: Float[np.ndarray, " n"], *, seed: int = 0) -> Estimate:
    """Return the mean of independent values with its `interval` over them: 91 % at 5 values, 94 to 96 % at 12 and more."""
    values = np.asarray(values, dtype=np.float64)[np.isfinite(values)]
    return bootstrap(np.stack([values, np.ones_like(values)], axis=1), lambda of: of[:, 0] / of[:, 1], seed=seed)


def two_way_mean(values: Float[np.ndarray, " latents"], falls: Float[np.ndarray, "latents groups"]) -> Estimate:
    """Return the mean of latents' scores with its 95 % interval over latents and over the documents that they share.

    `falls` is by how much each score falls where a group of documents is left out, NaN where it has none in a group. The
    variance is V_latents + V_documents - V_both (Cameron, Gelbach and Miller 2011), the last two by jackknife, and at
    least either of the first two. It covers 94 to 97 % at 10 to 100 documents, where resampling latents covers 70 to 84 %.
    No bounds for one latent, for fewer groups than LEAST_DOCUMENTS, and where a latent's `falls` are not known.
    """
    from scipy.special import stdtrit

    n, held = len(values), np.isfinite(falls)
    g = int(held.any(axis=0).sum())
    if n < 2 or g < LEAST_DOCUMENTS or not held.any(axis=1).all():
        return Estimate(float(np.mean(values)), float("nan"), float("nan")) if n else NOTHING

    def jackknife(of: Float[np.ndarray, "*rows groups"]) -> Float[np.ndarray, "*rows"]:
        return (g - 1) / g * ((of - of.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)

    falls = np.where(held, falls, 0.0)[:, held.any(axis=0)]
    latents, documents = values.var(ddof=1) / n, jackknife(falls.mean(axis=0))
    variance = max(latents + documents - jackknife(falls).sum() / n**2, latents, documents)
    half, mean = stdtrit(g - 1.0, 0.975) * np.sqrt(variance), values.mean()
    return Estimate(float(mean), float(mean - half), float(mean + half))


def correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Estimate:
    """Return Pearson's correlation with its interval over the pairs (latents); NaN for fewer than three."""
    return _of_pairs(x, y, lambda xx, yy, xy: xy / np.sqrt(xx * yy))


def slope(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Estimate:
    """Return the slope of y on x with its interval over the pairs; NaN for fewer than three."""
    return _of_pairs(x, y, lambda xx, yy, xy: xy / xx)


def _of_pairs(x: np.ndarray, y: np.ndarray, statistic: Callable[..., Float[np.ndarray, " samples"]]) -> Estimate:
    both = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, dtype=np.float64)[both], np.asarray(y, dtype=np.float64)[both]
    if len(x) < 3:
        return NOTHING
    x, y = x - x.mean(), y - y.mean()

    def of_sums(total: Float[np.ndarray, "samples 6"]) -> Float[np.ndarray, " samples"]:
        n, a, b, aa, bb, ab = total.T
        return statistic(aa / n - (a / n) ** 2, bb / n - (b / n) ** 2, ab / n - a * b / n**2)

    return bootstrap(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), of_sums)


@lru_cache(maxsize=4)
def _weights(n: int, n_samples: int, seed: int) -> Int[np.ndarray, "samples clusters"]:
    """Return how often each resample holds each of n clusters; kept, for many statistics of the same clusters."""
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_samples)
    weights.setflags(write=False)
    return weights


def reaches(share: float, threshold: float) -> bool:
    """Return whether a share of counts is at least a threshold, as the counts say: a 0.7999999999999999 of sums is 0.8.

    A balanced accuracy of n and m examples that is not 4/5 is 1 / (10 n m) from it at least, so this is exact for n m < 10^8.
    """
    return share >= threshold - 1e-9


def wilson(successes: int, n: int) -> Estimate:
    """Return a share and Wilson's 95 % score interval (Wilson 1927)."""
    if n == 0:
        return NOTHING
    share, many = np.array([successes / n]), np.array([1e9])  # examples that are independent are documents of their own
    return Estimate(*_score_interval(share, np.array([n]), many)[:, 0].tolist())


def shares_by_document(successes: ByDocument, counts: ByDocument) -> Float[np.ndarray, "3 rows"]:
    """Return several shares, each with its 95 % interval over documents: value, lo, hi; NaN bounds for few documents.

    The variance is a jackknife's over documents, and at least that of independent examples: it covers 94 to 98 % at 10 to
    100 documents, where resampling documents covers 60 to 90 %, least near 1.
    """
    n, s, held = counts.sum(axis=1), successes.sum(axis=1), counts > 0
    g = held.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = s / n
        without = np.where(held, (s[:, None] - successes) / (n[:, None] - counts), 0.0)
        spread = (np.where(held, without - (without.sum(axis=1) / g)[:, None], 0.0) ** 2).sum(axis=1) * (g - 1) / g
        alone = share * (1 - share) / n  # the variance of independent examples
        return _score_interval(share, n / np.where(alone > 0, np.maximum(1, spread / alone), 1), g)


def f1_by_document(both: ByDocument, said: ByDocument, true: ByDocument) -> Float[np.ndarray, "3 rows"]:
    """Return F1 = 2 both / (said + true) of counts by document, row by row, with its 95 % interval: value, lo, hi.

    F1 = 2 J / (1 + J) rises with J, the share that is both of what is said or true: its bounds are those of this share.
    """
    share = shares_by_document(both, said + true - both)
    return 2 * share / (1 + share)


def auc_parts(score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return the AUC, ties counting half, and each example's influence on it (DeLong 1988)."""
    own = np.empty(len(score))
    for kind in (truth, ~truth):
        others = np.sort(score[~kind])
        own[kind] = sum(np.searchsorted(others, score[kind], side) for side in ("left", "right")) / 2 / len(others)
    own[~truth] = 1 - own[~truth]
    auc = float(own[truth].mean())
    return auc, (own - auc) / np.where(truth, truth.sum(), (~truth).sum())


def auroc_by_document(
    score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], document: Int[np.ndarray, " n"]
) -> Estimate:
    """Return the probability that a true example outranks a false one, ties counting half; its interval over documents."""
    return auroc_of_parts(*auc_parts(score, truth), truth, document) if truth.any() and not truth.all() else NOTHING


def auroc_of_parts(
    area: float, parts: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], document: Shaped[np.ndarray, " n"]
) -> Estimate:
    """Return an AUC, or the mean of several, with its interval over documents, from each example's influence on it.

    The variance is DeLong's, its parts summed by document (Obuchowski 1997), and at least that of Hanley and McNeil
    (1982), which does not vanish where the ranking is perfect.
    """
    m, n = int(truth.sum()), int((~truth).sum())
    _, index = np.unique(document, return_inverse=True)
    g = min(np.count_nonzero(np.bincount(index[kind])) for kind in (truth, ~truth))
    near = min(max(area, 1e-9), 1 - 1e-9)
    q, r = near / (2 - near) - near**2, 2 * near**2 / (1 + near) - near**2
    alone = (near * (1 - near) + (m - 1) * q + (n - 1) * r) / (m * n)
    spread = (np.bincount(index, parts) ** 2).sum() * g / max(g - 1, 1)
    n_alone = np.array([near * (1 - near) / max(alone, spread)])
    return Estimate(*_score_interval(np.array([area]), n_alone, np.array([g]))[:, 0].tolist())


def _score_interval(
    share: Float[np.ndarray, " shares"], n: Float[np.ndarray, " shares"], g: Int[np.ndarray, " shares"]
) -> Float[np.ndarray, "3 shares"]:
    """Return shares with Wilson's interval for n independent examples and Student's quantile for g documents.

    It is never of zero width. For fewer than LEAST_DOCUMENTS the bounds are NaN.
    """
    from scipy.special import stdtrit

    with np.errstate(divide="ignore", invalid="ignore"):
        z2 = np.where(g >= LEAST_DOCUMENTS, stdtrit(g - 1.0, 0.975) ** 2, np.nan)
        centre, half = share + z2 / (2 * n), np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
        lo, hi = ((centre + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return np.stack([share, np.clip(lo, 0, share), np.clip(hi, share, 1)])


def mean_of_two(a: Float[np.ndarray, "3 shares"], b: Float[np.ndarray, "3 shares"]) -> Float[np.ndarray, "3 shares"]:
    """Return (a + b) / 2 of independent estimates (value, lo, hi) with its interval, by MOVER (Zou and Donner 2008)."""
    value, half = (a[0] + b[0]) / 2, [np.hypot(a[0] - a[end], b[0] - b[end]) / 2 for end in (1, 2)]
    return np.stack([value, value - half[0], value + half[1]])


def gains_by_document(gained: ByKind, differing: ByKind, counts: ByKind) -> Float[np.ndarray, "3 rows"]:
    """Return by how much one balanced accuracy exceeds another on the same examples, with its 95 % interval: value, lo, hi.

    Of each kind of examples: by how many more the one is right, on how many the two differ, and how many there are. The
    variance is a jackknife's over documents, and at least that of independent pairs, one more of which differs (Agresti and
    Min 2005), so it is never 0: it covers 94 to 99 % at 10 to 50 documents. NaN bounds for few documents.
    """
    n, g = counts.sum(axis=2), (counts.sum(axis=1) > 0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (gained.sum(axis=2) / n).mean(axis=1)
        without = ((gained.sum(axis=2)[..., None] - gained) / (n[..., None] - counts)).mean(axis=1)
        half = _half_width(value, without, g, ((differing.sum(axis=2) + 1) / n**2).sum(axis=1) / 4)
    return np.stack([value, value - half, value + half])


def correlations_by_document(r: Float[np.ndarray, "rows 1+documents"]) -> Float[np.ndarray, "3 rows"]:
    """Return correlations, each with its 95 % interval over documents: value, lo, hi; NaN bounds for few documents.

    A row is the correlation on all examples and then without each document. Fisher's z = atanh r (1915) of them has the
    variance g / (g - 1) sum (z without a document - z)^2: it covers 90 to 97 % at 6 to 30 documents, where resampling
    covers 73 to 93 %.
    """
    z = np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))
    with np.errstate(divide="ignore", invalid="ignore"):
        half = _half_width(z[:, 0], z[:, 1:], np.array(r.shape[1] - 1))
    return np.stack([r[:, 0], np.tanh(z[:, 0] - half), np.tanh(z[:, 0] + half)])


def _half_width(
    whole: Float[np.ndarray, " rows"], without: ByDocument, g: Int[np.ndarray, ...], least: Any = 0.0
) -> Float[np.ndarray, " rows"]:
    """Return half of 95 % intervals by a jackknife over g documents, whose variance is at `least` that; NaN for few."""
    from scipy.special import stdtrit

    spread = ((without - whole[:, None]) ** 2).sum(axis=1) * g / (g - 1)
    return np.where(g >= LEAST_DOCUMENTS, stdtrit(g - 1.0, 0.975), np.nan) * np.sqrt(np.maximum(spread, least))


class StreamingBootstrap:
    """Sums of quantities over clusters (documents) that arrive bit by bit, and their resamples; memory does not grow.

    Each cluster enters each resample Poisson(1) times, always the same number of times for the same cluster, so that it
    may arrive in parts. For many clusters this is the multinomial bootstrap of `bootstrap` (Oza and Russell 2001).
    """

    def __init__(self, width: int, *, n_samples: int = 1000, seed: int = 0, dtype: Any = np.float64):
        self.seed, self.n_samples, self.dtype = seed, n_samples, dtype
        self.total = np.zeros((1, width), dtype)
        self.resampled = np.zeros((n_samples, width), dtype)
        self.n_clusters, self.last = 0, -1

    def weights(self, clusters: Int[np.ndarray, " clusters"]) -> Float[np.ndarray, "samples clusters"]:
        """Return how often each resample holds each of the clusters, which are named by their numbers."""
        rows = [np.random.default_rng((self.seed, int(cluster))).poisson(1.0, self.n_samples) for cluster in clusters]
        return np.array(rows, dtype=self.dtype).T.reshape(self.n_samples, len(rows))

    def add_sums(self, clusters: Int[np.ndarray, " clusters"], sums: Float[np.ndarray, "clusters width"]) -> None:
        """Add sums of some clusters, each named once per call; they come in order of their numbers, a cluster in parts."""
        self.total += sums.sum(axis=0)
        self.resampled += self.weights(clusters) @ sums
        self.n_clusters += int((clusters > self.last).sum())
        self.last = max(self.last, int(clusters.max(initial=-1)))

    def estimate(self, statistic: Statistic, *, n_clusters: int | None = None, centre: bool = False) -> Estimate:
        """Return `statistic` of the sums with its `interval`, of all clusters or of `n_clusters`; NaN where it is 0/0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value, resampled = float(statistic(self.total)[0]), statistic(self.resampled)
        return interval(value, resampled, self.n_clusters if n_clusters is None else n_clusters, centre=centre)


def interval(
    value: float, resampled: Float[np.ndarray, " samples"], n_clusters: int | None = None, *, centre: bool = False
) -> Estimate:
    """Return a value with its 95 % interval from the quantiles of its finite resamples; NaN bounds when there are none.

    Of `n_clusters` resampled clusters the quantiles are Phi(-+ t sqrt(n / (n - 1))), t Student's of n - 1 degrees: the
    expanded percentile interval (Hesterberg 2015, doi:10.1080/00031305.2015.1089789), which covers 92 to 96 % of ratios
    over 6 to 30 documents, where 2.5 and 97.5 % cover 86 to 93 %. Fewer than LEAST_DOCUMENTS have no interval.

    `centre` moves the quantiles so that the resamples' mean is the value: for shares that resampling itself shifts, as
    that of latents which never fired (a resample leaves a third of the documents out, so more of them never fire there).
    """
    from scipy.special import ndtr, stdtrit

    resampled, tail = resampled[np.isfinite(resampled)], 0.025
    if len(resampled) == 0 or (n_clusters is not None and n_clusters < LEAST_DOCUMENTS):
        return Estimate(value, float("nan"), float("nan"))
    if n_clusters is not None:
        tail = ndtr(stdtrit(n_clusters - 1.0, tail) * np.sqrt(n_clusters / (n_clusters - 1)))
    lo, hi = np.quantile(resampled, (tail, 1 - tail)) + (value - resampled.mean() if centre else 0.0)
    return Estimate(value, float(lo), float(hi))

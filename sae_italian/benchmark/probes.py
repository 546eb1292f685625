"""The protocol of sae-probes, and the controls beside every number.

k-sparse probing as in Kantamneni et al. 2025 (arXiv 2502.16681; package sae-probes): latents are ranked on the training
rows by the difference of class means of a / mean non-zero |a|, and a logistic regression with an l1 penalty is fitted on
the raw values of the first k; C is one of ten, chosen by the AUC on training rows that are held out. Nothing is chosen by
a test score. The same code fits the dense probes (l2, standardised, four values of C), as sae-probes' baselines.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

SIZES = (1, 2, 5, 16)
GRID = tuple(np.logspace(5, -5, 10).tolist())
DENSE_GRID = (1.0, 0.1, 0.01, 0.001)
FEW, FOLDS = 128, 6
N_GRAMS = (1, 4)


class Judged(NamedTuple):
    """What a probe says of the test rows."""

    auc: float
    accuracy: float
    f1: float
    parts: Float[np.ndarray, " n"]  # each row's influence on the AUC; they sum to 0
    score: Float[np.ndarray, " n"]


def auc_parts(score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return the AUC, ties counting half, and each example's influence on it (DeLong 1988)."""
    n, m = int(truth.sum()), int((~truth).sum())
    ranks, own = rankdata(score), np.empty(len(score))
    own[truth] = (ranks[truth] - rankdata(score[truth])) / m
    own[~truth] = 1 - (ranks[~truth] - rankdata(score[~truth])) / n
    auc = float(own[truth].mean())
    return auc, (own - auc) / np.where(truth, n, m)


def judge(score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> Judged:
    """Return AUC, accuracy and F1 of saying yes above 0."""
    auc, parts = auc_parts(score, truth)
    said = score > 0
    return Judged(
        auc, float((said == truth).mean()), 2 * float((said & truth).sum()) / (said.sum() + truth.sum()), parts, score
    )


def ranked(x: scipy.sparse.csr_array, y: Bool[np.ndarray, " n"], most: int) -> Int[np.ndarray, " most"]:
    """Return the latents whose normalised means differ most between the classes, the largest difference first."""
    absolute = abs(x)
    fired = np.maximum(np.asarray(x.count_nonzero(axis=0)).ravel(), 1)
    scale = np.asarray(absolute.sum(axis=0)).ravel() / fired
    weights = y / y.sum() - ~y / (~y).sum()
    difference = np.abs(np.asarray(weights @ x)).ravel() / (scale + 1e-6)
    return np.argsort(-difference, kind="stable")[:most]


def _classifier(penalty: str, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    if penalty == "l1":  # liblinear's intercept is penalised, hardly so when it is scaled
        return LogisticRegression(
            C=c, l1_ratio=1.0, solver="liblinear", intercept_scaling=100, tol=1e-3, random_state=0
        )
    return LogisticRegression(C=c, max_iter=100, tol=1e-3)


def fitted(x: Any, y: Bool[np.ndarray, " n"], penalty: str = "l1", grid: Sequence[float] = GRID) -> Any:
    """Return a logistic regression with the C of best validation AUC: folds for few rows, else the last fifth."""
    from sklearn.model_selection import StratifiedKFold

    if len(y) < FEW:
        folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(y)), y))
    else:
        held = np.arange(len(y)) >= len(y) - min(len(y) // 5, 100)
        folds = [(np.flatnonzero(~held), np.flatnonzero(held))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unscaled latent may need more steps than there are
        scores = np.zeros(len(grid))
        for (fit, check), (place, c) in ((fold, each) for fold in folds for each in enumerate(grid)):
            if 0 < y[check].sum() < len(check):
                model = _classifier(penalty, c).fit(x[fit], y[fit])
                scores[place] += auc_parts(model.decision_function(x[check]), y[check])[0]
        return _classifier(penalty, grid[int(scores.argmax())]).fit(x, y)


def sparse_probes(
    x: scipy.sparse.csr_array,
    y: Bool[np.ndarray, " n"],
    w: scipy.sparse.csr_array,
    truth: Bool[np.ndarray, " m"],
    sizes: Sequence[int] = SIZES,
) -> dict[int, Judged]:
    """Return by k how the probe on the first k latents, fitted on (x, y), judges the test rows w."""
    order = ranked(x, y, max(sizes))
    few, judged = x[:, order].toarray(), w[:, order].toarray()
    return {k: judge(fitted(few[:, :k], y).decision_function(judged[:, :k]), truth) for k in sizes}


def dense_probe(
    x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, " n"], w: Float[np.ndarray, "m d"], truth: Bool[np.ndarray, " m"]
) -> Judged:
    """Return how a probe on all dimensions, standardised, judges the test rows."""
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    model = fitted((x - mean) / scale, y, "l2", DENSE_GRID)
    return judge(model.decision_function((w - mean) / scale), truth)


def form_probe(
    forms: Sequence[str], y: Bool[np.ndarray, " n"], others: Sequence[str], truth: Bool[np.ndarray, " m"]
) -> Judged:
    """Return what the characters alone give away: a probe on n-grams of the word or the text."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    how: dict[str, Any] = {"min_df": 2, "max_features": 20_000, "sublinear_tf": True}
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=N_GRAMS, **how)
    x, w = vectors.fit_transform(forms), vectors.transform(others)
    return judge(fitted(x, y, "l2", (100.0, 10.0, 1.0, 0.1)).decision_function(w), truth)


def token_probe(
    ids: Int[np.ndarray, "n 2"],
    y: Bool[np.ndarray, " n"],
    others: Int[np.ndarray, "m 2"],
    truth: Bool[np.ndarray, " m"],
) -> Judged:
    """Return what the last token's and its left neighbour's identity give away."""
    from sklearn.preprocessing import OneHotEncoder

    encoder = OneHotEncoder(handle_unknown="ignore").fit(ids)
    model = fitted(encoder.transform(ids), y, "l2", (100.0, 10.0, 1.0, 0.1))
    return judge(model.decision_function(encoder.transform(others)), truth)


def permuted(
    x: scipy.sparse.csr_array,
    y: Bool[np.ndarray, " n"],
    w: scipy.sparse.csr_array,
    truth: Bool[np.ndarray, " m"],
    n: int,
    seed: int,
) -> list[float]:
    """Return the AUC at k = 1 on shuffled labels, `n` times: what choosing among many latents finds.

    Of one latent a probe only chooses the sign, which needs no fitting.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        labels = rng.permutation(y)
        best = ranked(x, labels, 1)
        a, b = x[:, best].toarray().ravel(), w[:, best].toarray().ravel()
        found.append(auc_parts(b * np.sign(a[labels].mean() - a[~labels].mean()), truth)[0])
    return found

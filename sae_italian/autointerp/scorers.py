"""Detection and fuzzing: does a judge who knows only the explanation tell the latent's examples from the others?

The judge here executes the rule. Both scorers give balanced accuracy (chance is 0.5 for any judge that ignores the
example), its parts, F1 at equal class sizes and AUROC, each from the same segments, with the bootstrap over documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.examples import Activity, Examples, ExampleSource
from sae_italian.autointerp.rules import KeyTable, Rule, fires
from sae_italian.statistics import Estimate, bootstrap

MARK_SHARE = 0.3  # a token of a positive is marked from this share of its segment's maximum on


@dataclass(frozen=True)
class Score:
    """One scorer's outcome on one latent; estimates are in [0, 1]."""

    scorer: str
    negatives: str
    metrics: dict[str, Estimate]
    n_positive: int
    n_negative: int


def detection(source: ExampleSource, table: KeyTable, rule: Rule, examples: Examples) -> Score:
    """Score whole segments: active somewhere, or silent. The rule says yes when it fires on any token."""
    positive = table.predict(rule, source.grid(examples.positive))
    negative = table.predict(rule, source.grid(examples.negative))
    said = [np.asarray(fires(rule, predicted).any(axis=1)) for predicted in (positive, negative)]
    strength = [predicted.max(axis=1) for predicted in (positive, negative)]
    docs = source.doc[examples.positive], source.doc[examples.negative]
    metrics = binary_metrics(said[0], said[1], *docs) | {"auroc": _auroc(*strength)}
    return Score("detection", "random", metrics, len(examples.positive), len(examples.negative))


def fuzzing(
    source: ExampleSource, table: KeyTable, rule: Rule, activity: Activity, positive: Int[np.ndarray, " n"], latent: int
) -> Score:
    """Score marked tokens: in each active segment the active tokens are marked once, as many silent ones once.

    The rule says yes when it fires on every marked token. Segments with too few silent tokens are left out, so both
    classes have the same segments and the same numbers of marks.
    """
    grid = source.grid(positive)
    values = source.values(activity, grid)
    marked = (values > 0) & (values >= MARK_SHARE * values.max(axis=1, keepdims=True))
    silent = (values == 0) & (grid >= 0)
    usable = silent.sum(axis=1) >= marked.sum(axis=1)
    grid, marked, silent = grid[usable], marked[usable], silent[usable]
    order = np.where(silent, source.rng(latent, "fuzzing").random(grid.shape), np.inf)
    rank = order.argsort(axis=1).argsort(axis=1)
    decoys = silent & (rank < marked.sum(axis=1, keepdims=True))
    predicted = table.predict(rule, grid)
    fired = fires(rule, predicted)
    docs = source.doc[positive[usable]]
    said = [_all_marked(fired, marks) for marks in (marked, decoys)]
    strength = [np.where(marks, predicted, np.inf).min(axis=1, initial=np.inf) for marks in (marked, decoys)]
    metrics = binary_metrics(said[0], said[1], docs, docs) | {"auroc": _auroc(*strength)}
    return Score("fuzzing", "silent-token", metrics, len(docs), len(docs))


def _all_marked(fired: Bool[np.ndarray, "n width"], marks: Bool[np.ndarray, "n width"]) -> Bool[np.ndarray, " n"]:
    return np.asarray((fired | ~marks).all(axis=1))


def binary_metrics(
    yes_on_positive: Bool[np.ndarray, " n"],
    yes_on_negative: Bool[np.ndarray, " m"],
    positive_docs: Int[np.ndarray, " n"],
    negative_docs: Int[np.ndarray, " m"],
    *,
    n_samples: int = 300,
) -> dict[str, Estimate]:
    """Return balanced accuracy, TPR, TNR and F1 (classes weighted equally), with intervals over documents."""
    docs, index = np.unique(np.concatenate([positive_docs, negative_docs]), return_inverse=True)
    here, there = index[: len(positive_docs)], index[len(positive_docs) :]
    columns = (
        np.bincount(here, weights=yes_on_positive, minlength=len(docs)),
        np.bincount(here, minlength=len(docs)),
        np.bincount(there, weights=yes_on_negative, minlength=len(docs)),
        np.bincount(there, minlength=len(docs)),
    )

    def rates(sums: Float[np.ndarray, "samples 4"]) -> tuple[np.ndarray, np.ndarray]:
        return sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]

    def f1(sums: Float[np.ndarray, "samples 4"]) -> np.ndarray:
        tpr, fpr = rates(sums)
        return 2 * tpr / (1 + tpr + fpr)

    statistics = {
        "balanced_accuracy": lambda sums: (rates(sums)[0] + 1 - rates(sums)[1]) / 2,
        "tpr": lambda sums: rates(sums)[0],
        "tnr": lambda sums: 1 - rates(sums)[1],
        "f1": f1,
    }
    table = np.stack(columns, axis=1)
    return {name: bootstrap(table, statistic, n_samples=n_samples) for name, statistic in statistics.items()}


def _auroc(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> Estimate:
    """Return the probability that a positive outranks a negative, ties counting half; no interval."""
    if len(positive) == 0 or len(negative) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    upto = np.searchsorted(ordered, positive, side="right")
    value = float((below + upto).mean() / (2 * len(negative)))
    return Estimate(value, float("nan"), float("nan"))


def best_threshold(
    strength_positive: Float[np.ndarray, " n"], strength_negative: Float[np.ndarray, " m"]
) -> tuple[float, float]:
    """Return the threshold of the strengths with the best balanced accuracy, and that accuracy (validation only)."""
    options = np.unique(np.concatenate([strength_positive, strength_negative]))
    options = options[options > 0]
    if len(options) == 0 or len(strength_negative) == 0:
        return 0.0, 0.5
    tpr = 1 - np.searchsorted(np.sort(strength_positive), options, side="left") / len(strength_positive)
    fpr = 1 - np.searchsorted(np.sort(strength_negative), options, side="left") / len(strength_negative)
    accuracy = (tpr + 1 - fpr) / 2
    best = int(np.argmax(accuracy))
    # halfway down to the next lower strength, so that unseen segments near the edge are not lost
    lower = options[best - 1] if best else 0.0
    return float((options[best] + lower) / 2), float(accuracy[best])

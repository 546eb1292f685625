"""Detection and fuzzing: does a judge who knows only the explanation tell the latent's examples from the others?

Both give balanced accuracy (chance is 0.5 for any judge that ignores the example), its parts, F1 at equal class sizes,
and, where the judge gives probabilities, AUROC and Brier score; each negative source apart; intervals over documents.
Plain accuracy is never given: it rewards a judge that always says the commoner answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.protocols import Example, Score, Verdicts
from sae_italian.autointerp.scorers.resample import Documents, estimates
from sae_italian.base.statistics import Estimate

LEAST_PAIRS = 10  # positives and negatives below which a source is not scored
_RATES = ("balanced_accuracy", "tpr", "tnr", "f1")


class Answers(NamedTuple):
    """A judge's answers on as many positives as negatives of one source, with the document of each."""

    positive: Int[np.ndarray, " n"]  # 1 yes, 0 no, -1 no answer
    negative: Int[np.ndarray, " m"]
    positive_docs: Int[np.ndarray, " n"]
    negative_docs: Int[np.ndarray, " m"]
    positive_probability: Float[np.ndarray, " n"] | None = None
    negative_probability: Float[np.ndarray, " m"] | None = None

    def answered(self) -> Answers:
        """Return the answers without those that failed."""
        here, there = self.positive >= 0, self.negative >= 0
        if here.all() and there.all():
            return self
        p, q = self.positive_probability, self.negative_probability
        return Answers(
            self.positive[here],
            self.negative[there],
            self.positive_docs[here],
            self.negative_docs[there],
            None if p is None else p[here],
            None if q is None else q[there],
        )


def detection(verdicts: Verdicts, examples: Sequence[Example]) -> list[Score]:
    """Score whole segments, active somewhere or silent: one score per negative source with enough of both."""
    return _scores("detection", verdicts, examples)


def fuzzing(verdicts: Verdicts, examples: Sequence[Example]) -> list[Score]:
    """Score marked segments: are the marked tokens those the latent is active on? One score per negative source."""
    return _scores("fuzzing", verdicts, examples)


def _scores(scorer: str, verdicts: Verdicts, examples: Sequence[Example]) -> list[Score]:
    answers = answers_by_source(verdicts, examples)
    return [
        Score(scorer, source, found, len(own.positive), len(own.negative), failures(own))
        for (source, own), found in zip(answers.items(), binary_metrics(list(answers.values())), strict=True)
    ]


def answers_by_source(verdicts: Verdicts, examples: Sequence[Example]) -> dict[str, Answers]:
    """Divide a judge's answers by negative source; each source has the positives its negatives are paired with."""
    names = np.array([example.negatives or "" for example in examples])
    pair = np.array([example.pair for example in examples])
    docs = np.unique([example.document for example in examples], return_inverse=True)[1]
    said, probability = verdicts.said, verdicts.probability
    found = {}
    for source in dict.fromkeys(name for name in names.tolist() if name):
        there = np.flatnonzero(names == source)
        here = np.flatnonzero((names == "") & np.isin(pair, pair[there]))
        if min(len(here), len(there)) < LEAST_PAIRS:
            continue
        of = (None, None) if probability is None else (probability[here], probability[there])
        found[source] = Answers(said[here], said[there], docs[here], docs[there], *of)
    return found


def failures(answers: Answers) -> int:
    return int((answers.positive < 0).sum() + (answers.negative < 0).sum())


def binary_metrics(sets: Sequence[Answers]) -> list[dict[str, Estimate]]:
    """Return the metrics of several sets of answers on one latent, resampled together."""
    return Resampled(sets).metrics()


class Resampled:
    """Several sets of answers on one latent's examples, all resampled by the same documents."""

    def __init__(self, sets: Sequence[Answers]):
        self.sets = [own.answered() for own in sets]
        self.documents = Documents(*(docs for own in self.sets for docs in (own.positive_docs, own.negative_docs)))
        columns = []
        for own in self.sets:
            p, q = own.positive_probability, own.negative_probability
            columns.append(
                (
                    (own.positive_docs, own.positive, None if p is None else (1 - p) ** 2),
                    (own.negative_docs, own.negative, None if q is None else q**2),
                )
            )
        positive, negative = (self._totals([pair[side] for pair in columns]) for side in (0, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            tpr, fpr = (total[1] / total[0] for total in (positive, negative))
            self.brier = (positive[2] / positive[0] + negative[2] / negative[0]) / 2
            # [sets, metrics, samples], the first sample being the data as they are
            self.rates = np.stack([(tpr + 1 - fpr) / 2, tpr, 1 - fpr, 2 * tpr / (1 + tpr + fpr)], axis=1)

    def _totals(self, columns: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Float[np.ndarray, "3 s n"]:
        """Return the resampled number, sum of answers and sum of squared errors of each set's positives or negatives."""
        n_docs, n_sets = len(self.documents.known), len(columns)
        sizes = [len(docs) for docs, _, _ in columns]
        docs = self.documents.index(np.concatenate([np.empty(0, np.int64), *(docs for docs, _, _ in columns)]))
        cell = np.repeat(np.arange(n_sets), sizes) * n_docs + docs
        said = np.concatenate([np.empty(0), *(said for _, said, _ in columns)])
        error = np.concatenate([np.empty(0), *(np.full(len(d), np.nan) if e is None else e for d, _, e in columns)])
        sums = [np.bincount(cell, weights=w, minlength=n_sets * n_docs) for w in (np.ones(len(cell)), said, error)]
        return np.stack([self.documents.weights @ total.reshape(n_sets, n_docs).T for total in sums]).transpose(0, 2, 1)

    def gain(self, ours: int, theirs: int) -> Estimate:
        """Return by how much one set's balanced accuracy exceeds another's; both are of the same windows."""
        return estimates((self.rates[ours, 0] - self.rates[theirs, 0])[None])[0]

    def metrics(self, auroc_intervals: int | None = None) -> list[dict[str, Estimate]]:
        """Return each set's metrics; with a number, only the first so many sets get an interval for AUROC."""
        rows: list[np.ndarray] = []
        names: list[tuple[int, str]] = []
        for i, own in enumerate(self.sets):
            names += [(i, name) for name in _RATES]
            rows.append(self.rates[i])
            if own.positive_probability is not None and own.negative_probability is not None:
                names += [(i, "auroc"), (i, "brier")]
                whole = auroc_intervals is None or i < auroc_intervals
                rows += [_auroc(own, self.documents, whole)[None], self.brier[i][None]]
        found: list[dict[str, Estimate]] = [{} for _ in self.sets]
        if rows:
            for (i, name), estimate in zip(names, estimates(np.concatenate(rows)), strict=True):
                found[i][name] = estimate
        return found


def _auroc(own: Answers, documents: Documents, whole: bool) -> Float[np.ndarray, " samples"]:
    """Return the probability that a positive outranks a negative, ties counting half; NaN resamples unless `whole`."""
    positive, negative = own.positive_probability, own.negative_probability
    assert positive is not None and negative is not None
    result = np.full(len(documents.weights), np.nan)
    if not whole:
        ranked = np.sort(negative)
        outranked = sum(int(np.searchsorted(ranked, positive, side).sum()) for side in ("left", "right")) / 2
        pairs = len(positive) * len(negative)
        result[0] = outranked / pairs if pairs else np.nan
        return result
    weights = documents.weights
    order = np.argsort(negative, kind="stable")
    ours = weights[:, documents.index(own.positive_docs)]
    theirs = weights[:, documents.index(own.negative_docs)[order]]
    running = np.zeros((len(weights), len(negative) + 1))
    np.cumsum(theirs, axis=1, out=running[:, 1:])
    below = np.searchsorted(negative[order], positive, side="left")
    upto = np.searchsorted(negative[order], positive, side="right")
    with np.errstate(divide="ignore", invalid="ignore"):
        outranked = (ours * (running[:, below] + running[:, upto])).sum(axis=1) / 2
        return outranked / (ours.sum(axis=1) * running[:, -1])


def compare(first: Answers, second: Answers) -> Estimate:
    """Return by how much the first's balanced accuracy exceeds the second's on identical windows, paired.

    Windows on which either gave no answer are left out for both.
    """
    here, there = (first.positive >= 0) & (second.positive >= 0), (first.negative >= 0) & (second.negative >= 0)
    own = [
        Answers(each.positive[here], each.negative[there], first.positive_docs[here], first.negative_docs[there])
        for each in (first, second)
    ]
    return Resampled(own).gain(0, 1)

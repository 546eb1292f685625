"""Detection and fuzzing: does a judge who knows only the explanation tell the latent's examples from the others?

Both give balanced accuracy (chance is 0.5 for any judge that ignores the example), its parts, F1 at equal class sizes,
and, where the judge gives probabilities, AUROC and Brier score; each negative source apart; intervals over documents.
Plain accuracy is never given: it rewards a judge that always says the commoner answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.choose import LOOKUP
from sae_italian.autointerp.examples import LatentExamples, Verdicts
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.base.statistics import (
    NOTHING,
    Estimate,
    auroc_by_document,
    f1_by_document,
    gains_by_document,
    mean_of_two,
    shares_by_document,
)

GAIN = "gain_over_lookup"
# The negatives behind a score named without any. Of fuzzing not the silent tokens of the same segment: a judge who
# knows the context alone says no to nearly all of these, so that score is close to (share of positives found + 1) / 2.
HEADLINE = {"detection": "random", "fuzzing": "same-token"}
GROUPS = 20  # of documents, by their numbers: by these it is told what a mean over latents owes to shared documents
Fall = Float[np.ndarray, " groups"]
# By source, the positives and the negatives.
Questions = Mapping[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]


@scorer(needs="detect", metric="balanced_accuracy")
def detection(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score whole segments, active somewhere or silent."""
    shown: Any = examples.test
    yield from _scores("detection", asked, shown)
    if "random" in shown.questions:
        yield from ((asked[0], score) for score in _by_decile(asked[0].answers["detection"][1], shown))


@scorer(needs="detect", metric="balanced_accuracy")
def fuzzing(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score marked segments: are the marked tokens those the latent is active on?"""
    yield from _scores("fuzzing", asked, examples.marked)


def _scores(name: str, asked: Sequence[Asked], shown: Any) -> Iterator[tuple[Asked, Score]]:
    """Yield one score per explanation and source; the gain of the first explanation over the executed lookup is in its."""
    if len(shown) == 0:
        return
    for one in asked:
        one.answers[name] = shown, one.judge.detect(one.explanation, shown)
    answers = Answers([one.answers[name][1] for one in asked], shown.questions, shown.document)
    shares, counts, falls = answers.shares(), answers.counts(), answers.falls()
    lookup = next((i for i, one in enumerate(asked) if one.explanation.explainer == LOOKUP), 0)
    gains = answers.gains(0, lookup) if lookup else []
    for number, one in enumerate(asked):
        # what stands beside is told by its balanced accuracy
        others = {} if one.only or one.control else answers.others(number)
        for place, source in enumerate(shown.questions):
            if one.only.get(name, source) != source:
                continue
            metrics = {metric: Estimate(*table[:, number, place]) for metric, table in shares.items()}
            metrics |= {metric: each[place] for metric, each in others.items()}
            metrics |= {GAIN: gains[place]} if gains and number == 0 else {}
            yield one, Score(source, metrics, *counts[number][place], {"balanced_accuracy": falls[number, place]})


def _by_decile(verdicts: Verdicts, shown: Any) -> Iterator[Score]:
    """Yield the share of positives found in each tenth of the latent's maxima."""
    positive, _ = shown.questions["random"]
    positive = positive[(verdicts.said[positive] >= 0) & (shown.decile[positive] >= 0)]
    decile = shown.decile[positive]
    for tenth in np.unique(decile).tolist():
        rows, name = positive[decile == tenth], f"tpr_decile_{tenth}"
        share, falls = mean_and_falls(verdicts.said[rows], shown.document[rows])
        yield Score("random", {name: NOTHING._replace(value=share)}, len(rows), falls={name: falls})


def mean_and_falls(values: Float[np.ndarray, " n"], document: Int[np.ndarray, " n"]) -> tuple[float, Fall]:
    """Return a mean, and its falls as `falls_of`."""
    present = left_out(document)
    n = present.sum(axis=1)
    means = present @ values / np.maximum(n, 1)
    return float(means[0]), falls_of(means, n)


def ranking(
    asked: Sequence[Asked], examples: LatentExamples, strengths: Sequence[Float[np.ndarray, " n"]]
) -> Iterator[tuple[Asked, Score]]:
    """Yield AUROC of each explanation's strengths on the test examples, by source; NaN strengths count as failed."""
    shown: Any = examples.test
    for one, strength in zip(asked, strengths, strict=True):
        for source, sides in shown.questions.items():
            rows, truth = np.concatenate(sides), np.repeat([True, False], [len(side) for side in sides])
            yield one, ranked(source, np.asarray(strength)[rows], truth, shown.document[rows])


def ranked(
    source: str,
    strength: Float[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    document: Int[np.ndarray, " n"],
) -> Score:
    """Return AUROC of the strengths of a source's examples; NaN strengths count as failed."""
    known = np.isfinite(strength)
    found = strength[known], truth[known], document[known]
    counts = int(truth.sum()), int((~truth).sum()), int((~known).sum())
    return Score(source, {"auroc": auroc_by_document(*found)}, *counts, {"auroc": ranking_falls(*found)})


def ranking_falls(
    strength: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], document: Int[np.ndarray, " n"]
) -> Fall:
    """Return the falls of AUROC, the share of pairs in order, as `falls_of`."""
    present = left_out(document)
    left = (auroc_by_document(strength[some], truth[some], document[some]) for some in present > 0)
    return falls_of(np.array([area.value for area in left]), present.sum(axis=1))


# --- counts by document of many scores of one latent at once ----------------------------------------------------------


def left_out(document: Int[np.ndarray, " n"]) -> Float[np.ndarray, "1+groups n"]:
    """Return 1 for the examples that are there: all of them first, then without each group of documents, 0 for the others."""
    return np.concatenate([np.ones((1, len(document))), document % GROUPS != np.arange(GROUPS)[:, None]])


def falls_of(
    scores: Float[np.ndarray, "*some 1+groups"], counts: Float[np.ndarray, "*some 1+groups"]
) -> Float[np.ndarray, "*some groups"]:
    """Return by how much a score (first) falls without each group of documents; NaN where a group has none of the counts.

    Where a group has all of them nothing is left to compare with, and the fall is 0.
    """
    falls = np.where(counts[..., 1:] > 0, scores[..., :1] - scores[..., 1:], 0.0)
    return np.where(counts[..., 1:] < counts[..., :1], falls, np.nan)


class Answers:
    """The answers of several explanations' judges to the same questions about one latent, summed by document.

    An example without a usable answer counts nowhere.
    """

    def __init__(self, verdicts: Sequence[Verdicts], questions: Questions, document: Int[np.ndarray, " examples"]):
        self.verdicts, self.sides = verdicts, list(questions.values())
        self.said = np.stack([own.said for own in verdicts])
        self.good = self.said >= 0
        self.known, self.index = np.unique(document, return_inverse=True)
        sides = [rows for both in self.sides for rows in both]
        self.rows = np.concatenate([np.empty(0, np.int64), *sides])
        side = np.repeat(np.arange(len(sides)), list(map(len, sides)))
        self.cell = side * len(self.known) + self.index[self.rows]
        self.truth = np.zeros(len(document))
        for positive, _ in self.sides:
            self.truth[positive] = 1.0

    def _sums(self, values: Float[np.ndarray, "n examples"]) -> Float[np.ndarray, "n sources 2 documents"]:
        """Return the sums over each document of the positives' and the negatives' values."""
        shape = len(values), len(self.sides), 2, len(self.known)
        size = int(np.prod(shape[1:]))
        cell = (np.arange(len(values)) * size)[:, None] + self.cell
        return np.bincount(cell.ravel(), values[:, self.rows].ravel(), len(values) * size).reshape(shape)

    @cached_property
    def asked_and_yes(self) -> tuple[np.ndarray, np.ndarray]:
        return self._sums(self.good), self._sums(self.said * self.good)

    def counts(self) -> list[list[tuple[int, int, int]]]:
        """Return by explanation and source the number of positives, of negatives, and of those that failed."""
        sizes = [(len(positive), len(negative)) for positive, negative in self.sides]
        answered = self.asked_and_yes[0].sum(axis=(2, 3)).astype(int).tolist()
        return [[(*size, sum(size) - n) for size, n in zip(sizes, own, strict=True)] for own in answered]

    def shares(self) -> dict[str, Float[np.ndarray, "3 explanations sources"]]:
        """Return the balanced accuracy and its two shares: value, lo, hi.

        Their intervals need no resampling, which of few documents gives too short ones, none near 1.
        """
        n, yes = self.asked_and_yes
        shape, flat = n.shape[:2], (n.shape[0] * n.shape[1], n.shape[-1])  # of too few examples there is no source
        asked, found, others, wrongly = (x[:, :, side].reshape(flat) for side in (0, 1) for x in (n, yes))
        tpr, tnr = shares_by_document(found, asked), shares_by_document(others - wrongly, others)
        told = {"balanced_accuracy": mean_of_two(tpr, tnr), "tpr": tpr, "tnr": tnr}
        return {name: table.reshape(3, *shape) for name, table in told.items()}

    def falls(self) -> Float[np.ndarray, "explanations sources groups"]:
        """Return the falls of balanced accuracy, as `falls_of`."""
        n, yes = (each @ left_out(self.known).T for each in self.asked_and_yes)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = yes / n
        return falls_of((rates[:, :, 0] - rates[:, :, 1]) / 2, n.sum(axis=2))

    def gains(self, ours: int, theirs: int) -> list[Estimate]:
        """Return by source by how much one explanation's balanced accuracy exceeds another's, on what both answered."""
        good = self.good[ours] & self.good[theirs]
        gain = np.where(self.truth > 0, 1, -1) * (self.said[ours] - self.said[theirs]) * good
        gained, differing, n = self._sums(np.stack([gain, abs(gain), good]))
        return list(map(Estimate._make, gains_by_document(gained, differing, n).T.tolist()))

    def others(self, number: int) -> dict[str, list[Estimate]]:
        """Return by source an explanation's metrics that are no shares: F1, and of probabilities Brier score and AUROC."""
        n, yes = (each[number] for each in self.asked_and_yes)
        probability, sizes = self.verdicts[number].probability, n.sum(axis=2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            wrongly = yes[:, 1] * (sizes[:, 0] / sizes[:, 1])  # as if of as many negatives as positives
        tables = {"f1": f1_by_document(yes[:, 0], yes[:, 0] + wrongly, n[:, 0])}
        if probability is not None:  # a square lies between 0 and 1, so its mean varies no more than a share would
            errors = self._sums(np.where(self.good[number], (self.truth - probability) ** 2, 0.0)[None])[0]
            tables["brier"] = mean_of_two(*(shares_by_document(errors[:, side], n[:, side]) for side in (0, 1)))
        found = {name: list(map(Estimate._make, table.T.tolist())) for name, table in tables.items()}
        if probability is not None:
            answered = [rows[self.good[number, rows]] for rows in map(np.concatenate, self.sides)]
            true = self.truth > 0
            found["auroc"] = [auroc_by_document(probability[i], true[i], self.index[i]) for i in answered]
        return found

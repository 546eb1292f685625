"""Detection and fuzzing: does a judge who knows only the explanation tell the latent's examples from the others?

Both give balanced accuracy (chance is 0.5 for any judge that ignores the example), its parts, F1 at equal class sizes,
and, where the judge gives probabilities, AUROC and Brier score; each negative source apart; intervals over documents.
Plain accuracy is never given: it rewards a judge that always says the commoner answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.explainers.choose import LOOKUP
from sae_italian.autointerp.judges import Verdicts
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.base.statistics import NOTHING, Estimate, mean_of_two, shares_by_document

GAIN = "gain_over_lookup"
# The negatives behind a score named without any. Of fuzzing not the silent tokens of the same segment: a judge who
# knows the context alone says no to nearly all of these, so that score is close to (share of positives found + 1) / 2.
HEADLINE = {"detection": "random", "fuzzing": "same-token"}
_SHARES = ("balanced_accuracy", "tpr", "tnr")
N_SAMPLES = 200  # resamples


class PairedAnswers(NamedTuple):
    """A judge's answers on positives, and on the negatives of one source that are paired with them."""

    verdicts: Verdicts
    document: Int[np.ndarray, " examples"]
    rows: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]  # of the positives and the negatives

    def answered(self, other: PairedAnswers | None = None) -> PairedAnswers:
        """Return these answers without the examples on which these, or others on the same examples, failed."""
        good = (self.verdicts.said >= 0) & ((other or self).verdicts.said >= 0)
        positive, negative = (rows[good[rows]] for rows in self.rows)
        return self._replace(rows=(positive, negative))

    @property
    def n_failed(self) -> int:
        return sum(int((self.verdicts.said[rows] < 0).sum()) for rows in self.rows)

    def score(self, source: str, metrics: dict[str, Estimate]) -> Score:
        return Score(source, metrics, len(self.rows[0]), len(self.rows[1]), self.n_failed)


@scorer(needs="detect", metric="balanced_accuracy")
def detection(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score whole segments, active somewhere or silent."""
    yield from _scores("detection", asked, examples, examples.test)


@scorer(needs="detect", metric="balanced_accuracy")
def fuzzing(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score marked segments: are the marked tokens those the latent is active on?"""
    yield from _scores("fuzzing", asked, examples, examples.marked)


def _scores(name: str, asked: Sequence[Asked], examples: LatentExamples, shown: Any) -> Iterator[tuple[Asked, Score]]:
    """Yield one score per explanation and source; the gain of the first explanation over the executed lookup is in its."""
    if len(shown) == 0:
        return
    sets: dict[tuple[int, str], PairedAnswers] = {}
    for number, one in enumerate(asked):
        verdicts = one.judge.detect(one.explanation, shown)
        one.answers[name] = shown, verdicts
        for source, rows in shown.questions.items():
            if one.only.get(name, source) == source:
                sets[number, source] = PairedAnswers(verdicts, shown.document, rows)
    documents = documents_of(examples)
    # what stands beside is told by its balanced accuracy, which needs no resampling
    whole = [key for key in sets if not (asked[key[0]].only or asked[key[0]].control)]
    rest = [key for key in sets if key not in whole]
    resampled = Resampled([sets[key].answered() for key in whole], documents)
    metrics = dict(zip(whole, resampled.metrics(n_whole=len(shown.questions)), strict=True))
    metrics |= dict(zip(rest, Shares([sets[key].answered() for key in rest], documents).metrics(), strict=True))
    lookup = next((i for i, one in enumerate(asked) if one.explanation.explainer == LOOKUP), 0)
    for source in shown.questions if lookup else ():
        own, plain = sets[0, source], sets[lookup, source]
        pair = [whole.index((number, source)) for number in (0, lookup)]
        gain = resampled.gain(*pair)
        if own.n_failed:  # then both on the examples that both answered
            gain = Resampled([own.answered(plain), plain.answered(own)], documents).gain(0, 1)
        metrics[0, source][GAIN] = gain
    for (number, source), found in sorted(metrics.items(), key=lambda item: item[0][0]):
        yield asked[number], sets[number, source].score(source, found)
    if name == "detection" and "random" in shown.questions:
        yield from ((asked[0], score) for score in _by_decile(sets[0, "random"], shown.decile))


def _by_decile(answers: PairedAnswers, deciles: Int[np.ndarray, " examples"]) -> Iterator[Score]:
    """Yield the share of positives found in each tenth of the latent's maxima."""
    positive, _ = answers.answered().rows
    decile = deciles[positive]
    for tenth in np.unique(decile[decile >= 0]).tolist():
        found = answers.verdicts.said[positive[decile == tenth]]
        yield Score("random", {f"tpr_decile_{tenth}": NOTHING._replace(value=float(found.mean()))}, len(found))


def ranking(
    asked: Sequence[Asked], examples: LatentExamples, strengths: Sequence[Float[np.ndarray, " n"]]
) -> Iterator[tuple[Asked, Score]]:
    """Yield AUROC of each explanation's strengths on the test examples, by source; NaN strengths count as failed."""
    shown: Any = examples.test
    for one, strength in zip(asked, strengths, strict=True):
        verdicts = Verdicts(np.where(np.isfinite(strength), 1, -1), np.asarray(strength, dtype=np.float64))
        sets = {source: PairedAnswers(verdicts, shown.document, rows) for source, rows in shown.questions.items()}
        metrics = Resampled([answers.answered() for answers in sets.values()], documents_of(examples)).metrics()
        for (source, answers), found in zip(sets.items(), metrics, strict=True):
            yield one, answers.score(source, {"auroc": found["auroc"]})


# --- intervals over documents for many scores of one latent at once ---------------------------------------------------
#
# The bootstrap weighs documents by independent Poisson(1) counts, the same for every score, so that two scores on the
# same windows are resampled together: the interval of their difference is that of a paired comparison.


@lru_cache(maxsize=4)
def _weights(n_documents: int) -> Float[np.ndarray, "samples documents"]:
    return np.random.default_rng(0).poisson(1.0, (n_documents, N_SAMPLES)).T.astype(np.float64)


class ResampledDocuments:
    """The documents of all examples of one latent, numbered, with how often each is drawn in each resample."""

    def __init__(self, *docs: Int[np.ndarray, " n"]):
        self.known = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *docs]))
        n = len(self.known)
        size = max(1 << max(n - 1, 0).bit_length(), 64)  # few sizes, so that the draws are made few times
        self.weights = np.concatenate([np.ones((1, n)), _weights(size)[:, :n]])  # first the data as it is

    def sums(
        self, docs: Int[np.ndarray, " n"], values: Float[np.ndarray, "quantities n"]
    ) -> Float[np.ndarray, "quantities documents"]:
        """Return the sums of several quantities over each document."""
        n = len(self.known)
        cell = (np.arange(len(values)) * n)[:, None] + self.index(docs)
        return np.bincount(cell.ravel(), weights=values.ravel(), minlength=len(values) * n).reshape(len(values), n)

    def index(self, docs: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.searchsorted(self.known, docs)


def estimates(table: Float[np.ndarray, "quantities samples"]) -> list[Estimate]:
    """Return each row's first entry as the value, and the 2.5 and 97.5 % points of the other finite ones."""
    rest = np.sort(table[:, 1:], axis=1)  # NaN last
    n = np.isfinite(rest).sum(axis=1)
    ends = []
    for share in (0.025, 0.975):
        at = share * np.maximum(n - 1, 0)
        low = at.astype(np.int64)
        rows = np.arange(len(rest))
        below, above = rest[rows, low], rest[rows, np.minimum(low + 1, np.maximum(n - 1, 0))]
        ends.append(np.where(n > 0, below + (at - low) * (above - below), np.nan))
    return [Estimate(float(v), float(lo), float(hi)) for v, lo, hi in zip(table[:, 0], *ends, strict=True)]


@lru_cache(maxsize=8)
def documents_of(examples: LatentExamples) -> ResampledDocuments:
    """Return the documents of all questions about a latent: every score of it is resampled by the same draws."""
    asked: list[Any] = [shown for shown in (examples.test, examples.marked) if len(shown)]
    return ResampledDocuments(
        *(shown.document[rows] for shown in asked for both in shown.questions.values() for rows in both)
    )


class Shares:
    """Several sets of answers on one latent's examples, summed by document: what needs no resampling.

    Resampling few documents gives too short an interval, none near 1; for what is no share there is no other.
    """

    def __init__(self, sets: Sequence[PairedAnswers], documents: ResampledDocuments):
        self.sets, self.documents = sets, documents
        known = {id(own.document): own.document for own in sets}  # the same for all questions about some examples
        index = {key: documents.index(document) for key, document in known.items()}
        self.index = [index[id(own.document)] for own in sets]
        self.sides = [self._side(0, 1.0), self._side(1, 0.0)]

    def _side(self, side: int, truth: float) -> Float[np.ndarray, "3 sets documents"]:
        """Return of the positives or the negatives in each document the number, the sum of answers and of squared errors."""
        shape = len(self.sets), len(self.documents.known)
        cells, said, errors = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
        for number, (own, index) in enumerate(zip(self.sets, self.index, strict=True)):
            rows, probability = own.rows[side], own.verdicts.probability
            cells.append(number * shape[1] + index[rows])
            said.append(own.verdicts.said[rows])
            errors.append(np.full(len(rows), np.nan) if probability is None else (truth - probability[rows]) ** 2)
        cell = np.concatenate(cells)
        weights = np.ones(len(cell)), np.concatenate(said), np.concatenate(errors)
        return np.stack([np.bincount(cell, each, shape[0] * shape[1]) for each in weights]).reshape(3, *shape)

    def metrics(self) -> list[dict[str, Estimate]]:
        """Return each set's balanced accuracy and its two shares."""
        (asked, found, _), (others, wrongly, _) = self.sides
        tpr, tnr = shares_by_document(found, asked), shares_by_document(others - wrongly, others)
        bounds = np.stack([mean_of_two(tpr, tnr), tpr, tnr])[:, 1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            share, wrong = found.sum(axis=1) / asked.sum(axis=1), wrongly.sum(axis=1) / others.sum(axis=1)
        values = np.stack([(share + 1 - wrong) / 2, share, 1 - wrong])
        told = np.concatenate([values[:, None], bounds], axis=1).transpose(2, 0, 1).tolist()
        return [dict(zip(_SHARES, (Estimate(*each) for each in own), strict=True)) for own in told]


class Resampled(Shares):
    """Several sets of answers on one latent's examples, all resampled by the same documents."""

    def __init__(self, sets: Sequence[PairedAnswers], documents: ResampledDocuments):
        super().__init__(sets, documents)
        positive, negative = (
            np.stack([documents.weights @ each.T for each in side]).transpose(0, 2, 1) for side in self.sides
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            tpr, fpr = positive[1] / positive[0], negative[1] / negative[0]
            # [sets, samples], the first sample being the data as they are
            self.balanced, self.f1 = (tpr + 1 - fpr) / 2, 2 * tpr / (1 + tpr + fpr)
            self.brier = (positive[2] / positive[0] + negative[2] / negative[0]) / 2

    def gain(self, ours: int, theirs: int) -> Estimate:
        """Return by how much one set's balanced accuracy exceeds another's; both are of the same windows."""
        return estimates((self.balanced[ours] - self.balanced[theirs])[None])[0]

    def metrics(self, n_whole: int | None = None) -> list[dict[str, Estimate]]:
        """Return each set's metrics; with a number, only the first so many sets get an interval for AUROC."""
        found = super().metrics()
        rows, names = list(self.f1), [(i, "f1") for i in range(len(self.sets))]
        for i, own in enumerate(self.sets):
            if own.verdicts.probability is not None:
                names += [(i, "auroc"), (i, "brier")]
                rows += [self._auroc(i, n_whole is None or i < n_whole), self.brier[i]]
        for (i, name), estimate in zip(names, estimates(np.stack(rows)) if rows else (), strict=True):
            found[i][name] = estimate
        return found

    def _auroc(self, i: int, whole: bool) -> Float[np.ndarray, " samples"]:
        """Return the probability that a positive outranks a negative, ties counting half; NaN resamples unless `whole`."""
        own, weights = self.sets[i], self.documents.weights
        probability: Any = own.verdicts.probability
        positive, negative = (probability[rows] for rows in own.rows)
        outranks = (np.sign(positive[:, None] - negative) + 1) / 2
        if not whole:
            pairs = max(outranks.size, 1)
            return np.append(outranks.sum() / pairs, np.full(len(weights) - 1, np.nan))
        ours, theirs = (weights[:, self.index[i][rows]] for rows in own.rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            return ((ours @ outranks) * theirs).sum(axis=1) / (ours.sum(axis=1) * theirs.sum(axis=1))

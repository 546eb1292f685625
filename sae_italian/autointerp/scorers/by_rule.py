"""All scores of one latent's rules at once, on arrays: the same questions and the same scorers as for any judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae_italian.autointerp.examples import Activity, Draw
from sae_italian.autointerp.explainers.text import Rule
from sae_italian.autointerp.judges import on_marks, on_segments
from sae_italian.autointerp.negatives import Marked, NegativeSource
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.protocols import Negatives, Verdicts
from sae_italian.autointerp.scorers.binary import LEAST_PAIRS, Answers, Resampled, binary_metrics
from sae_italian.autointerp.scorers.simulation import RANDOM, TOP, correlations
from sae_italian.autointerp.shown import simulated_segments
from sae_italian.base.statistics import Estimate

GAIN = "gain_over_lookup"
CONSTANT_ON: tuple[tuple[str, Negatives], ...] = (("detection", "random"), ("fuzzing", "silent-token"))
Row = tuple[Any, ...]  # explanation, latent, control, scorer, judge, negatives, metric, value, lo, hi, counts


class Judged(NamedTuple):
    """One explanation under judgement: its id in the store, its rule, and which control it serves, if any."""

    row_id: int
    rule: Rule
    control: str = ""


class RuleScorer:
    """Scores rules with the rule judge, and the constant judges beside it."""

    def __init__(self, places: Places, negatives: NegativeSource, n_examples: int):
        self.places, self.source, self.negatives = places, places.source, negatives
        self.n_examples = n_examples

    def score(self, latent: int, own: Judged, lookup: Judged, strangers: list[Judged]) -> list[Row]:
        """Return all rows of one latent: its own rule, the token lookup, and other latents' rules as control."""
        activity = self.source.activity(latent)
        shown = _Shown(self, latent, activity)
        everyone = (own, lookup, *strangers)
        answers = [shown.answers(judged.rule) for judged in everyone]
        keys = list(answers[0])
        resampled = Resampled([sets[key] for sets in answers for key in keys])
        metrics = iter(resampled.metrics(auroc_intervals=len(keys)))
        simulations = shown.simulations([judged.rule for judged in everyone])
        rows: list[Row] = []
        for i, (judged, sets) in enumerate(zip(everyone, answers, strict=True)):
            for scorer, source in keys:
                rows += _rows(latent, judged, scorer, "rule", source, next(metrics), sets[scorer, source])
            for draw, found in simulations.items():
                rows += _simulation_rows(latent, judged, draw, found[i], shown)
        for i, (scorer, source) in enumerate(keys):  # the rule against the lookup on identical windows
            gain = {GAIN: resampled.gain(i, len(keys) + i)}
            rows += _rows(latent, own, scorer, "rule", source, gain, answers[0][scorer, source])
        rows += shown.deciles(latent, own, answers[0])
        rows += _constants(latent, own, {key: answers[0][key] for key in CONSTANT_ON if key in answers[0]})
        return rows


Sets = dict[tuple[str, Negatives], Answers]


class _Question(NamedTuple):
    """Which rows of what is judged answer for one scorer and source: positives, their negatives, and their documents."""

    positive: Int[np.ndarray, " n"]
    negative: Int[np.ndarray, " n"]
    positive_docs: Int[np.ndarray, " n"]
    negative_docs: Int[np.ndarray, " n"]

    def answers(self, verdicts: Verdicts) -> Answers:
        said, probability = verdicts.said, verdicts.probability
        assert probability is not None
        return Answers(
            said[self.positive],
            said[self.negative],
            self.positive_docs,
            self.negative_docs,
            probability[self.positive],
            probability[self.negative],
        )


class _Shown:
    """The test examples of one latent, the same for every rule: each rule is laid over all of them once."""

    def __init__(self, scorer: RuleScorer, latent: int, activity: Activity):
        self.source = scorer.source
        self.draw: Draw = scorer.negatives.draw(latent, activity, "test", scorer.n_examples)
        self.top, self.random, _ = simulated_segments(self.source, latent, activity)
        blocks = [self.draw.positive, *self.draw.negative.values(), self.top, self.random]
        self.first = np.cumsum([0, *map(len, blocks)])  # row of the view that each block begins at
        self.view = View(scorer.places, self.source.grid(np.concatenate(blocks)))
        self.whole = dict(self._whole())
        self.fuzzed, self.rows, self.marks = self._fuzzed(scorer.negatives.marked(latent, activity, self.draw))
        simulated = self.view.grid[self.first[-3] :]
        self.inside = simulated >= 0
        self.true = self.source.values(activity, simulated)[self.inside]
        docs = self.source.doc[np.concatenate([self.top, self.random])]
        self.docs = np.repeat(docs, self.inside.sum(axis=1))
        self.n_top = int(self.inside[: len(self.top)].sum())

    def _whole(self) -> Iterator[tuple[Negatives, _Question]]:
        """Yield the detection questions, on rows of the view, where there are enough of both classes."""
        for block, (name, segments) in enumerate(self.draw.negative.items(), start=1):
            there = np.flatnonzero(segments >= 0)
            if len(there) >= LEAST_PAIRS:
                yield name, _Question(there, self.first[block] + there, *self._docs(there, segments))

    def _fuzzed(self, marked: dict[Negatives, Marked]) -> tuple[dict[Negatives, _Question], np.ndarray, np.ndarray]:
        """Return the fuzzing questions, on rows of what is marked, and the rows of the view and the marks of these."""
        questions: dict[Negatives, _Question] = {}
        rows, marks = [np.empty(0, dtype=np.int64)], [np.empty((0, self.source.width), dtype=bool)]
        blocks = dict(zip(("silent-token", *self.draw.negative), self.first, strict=False))
        n = 0
        for name, own in marked.items():
            there = np.flatnonzero(own.rows)
            if len(there) >= LEAST_PAIRS:
                segments = self.draw.positive if name == "silent-token" else self.draw.negative[name]
                here = n + np.arange(len(there))
                questions[name] = _Question(here, here + len(there), *self._docs(there, segments))
                rows += [there, blocks[name] + there]
                marks += [own.positive[there], own.negative[there]]
                n += 2 * len(there)
        return questions, np.concatenate(rows), np.concatenate(marks)

    def _docs(self, rows: Int[np.ndarray, " n"], negative: Int[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray]:
        return self.source.doc[self.draw.positive[rows]], self.source.doc[negative[rows]]

    def answers(self, rule: Rule) -> Sets:
        """Return the rule's answers by scorer and negative source, where there are enough of both classes."""
        rates = rule.predict(self.view)
        on_whole, on_marked = on_segments(rule, rates), on_marks(rule, rates[self.rows], self.marks)
        asked = (("detection", self.whole, on_whole), ("fuzzing", self.fuzzed, on_marked))
        return {
            (scorer, name): question.answers(verdicts)
            for scorer, questions, verdicts in asked
            for name, question in questions.items()
        }

    def simulations(self, rules: Sequence[Rule]) -> dict[str, list[dict[str, Estimate]]]:
        """Return the correlations of each rule's simulation, by draw."""
        expected = np.stack([rule.expect(self.view)[self.first[-3] :][self.inside] for rule in rules])
        return {
            draw: correlations(self.true[first:], expected[:, first:], self.docs[first:])
            for draw, first in ((TOP, 0), (RANDOM, self.n_top))
        }

    def deciles(self, latent: int, own: Judged, sets: Sets) -> Iterator[Row]:
        """Return the share of positives found in each tenth of the latent's maxima."""
        key = ("detection", "random")
        if key not in sets:
            return
        there = self.draw.negative["random"] >= 0
        said, decile = sets[key].positive, self.draw.decile[there]
        for tenth in np.unique(decile).tolist():
            share = float(said[decile == tenth].mean())
            where = (own.row_id, latent, "", "detection", "rule", "random", f"tpr_decile_{tenth}")
            yield (*where, share, None, None, int((decile == tenth).sum()), 0, 0)


def _constants(latent: int, own: Judged, sets: Sets) -> Iterator[Row]:
    """Let the judges that always say the same answer the same questions."""
    for name, said in (("always-yes", 1), ("always-no", 0)):
        answers = [
            Answers(np.full(len(a.positive), said), np.full(len(a.negative), said), a.positive_docs, a.negative_docs)
            for a in sets.values()
        ]
        for (scorer, source), mine, metrics in zip(sets, answers, binary_metrics(answers), strict=True):
            kept = {"balanced_accuracy": metrics["balanced_accuracy"]}
            yield from _rows(latent, own, scorer, name, source, kept, mine)


def _rows(
    latent: int, judged: Judged, scorer: str, judge: str, source: str, metrics: dict[str, Estimate], answers: Answers
) -> Iterator[Row]:
    for metric, estimate in metrics.items():
        where = (judged.row_id, latent, judged.control, scorer, judge, source, metric)
        yield (*where, *estimate.finite(), len(answers.positive), len(answers.negative), 0)


def _simulation_rows(
    latent: int, judged: Judged, draw: str, metrics: dict[str, Estimate], shown: _Shown
) -> Iterator[Row]:
    n = len(shown.random) + (len(shown.top) if draw == TOP else 0)
    for metric, estimate in metrics.items():
        where = (judged.row_id, latent, judged.control, "simulation", "rule", draw, metric)
        yield (*where, *estimate.finite(), n, 0, 0)

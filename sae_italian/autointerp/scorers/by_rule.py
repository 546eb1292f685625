"""All scores of one latent's rules at once, on arrays: the same questions and the same scorers as for any judge."""

from __future__ import annotations

from collections.abc import Iterator
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
from sae_italian.autointerp.scorers.simulation import RANDOM, TOP, correlation
from sae_italian.autointerp.shown import simulated_segments
from sae_italian.statistics import Estimate

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
        rows: list[Row] = []
        for judged, sets in zip(everyone, answers, strict=True):
            for scorer, source in keys:
                rows += _rows(latent, judged, scorer, "rule", source, next(metrics), sets[scorer, source])
            for draw, found in shown.simulations(judged.rule).items():
                rows += _simulation_rows(latent, judged, draw, found, shown)
        for i, (scorer, source) in enumerate(keys):  # the rule against the lookup on identical windows
            gain = {GAIN: resampled.gain(i, len(keys) + i)}
            rows += _rows(latent, own, scorer, "rule", source, gain, answers[0][scorer, source])
        rows += shown.deciles(latent, own, answers[0])
        rows += _constants(latent, own, {key: answers[0][key] for key in CONSTANT_ON if key in answers[0]})
        return rows


Sets = dict[tuple[str, Negatives], Answers]


class _Shown:
    """The test examples of one latent, the same for every rule."""

    def __init__(self, scorer: RuleScorer, latent: int, activity: Activity):
        self.source = scorer.source
        self.draw: Draw = scorer.negatives.draw(latent, activity, "test", scorer.n_examples)
        self.marked: dict[Negatives, Marked] = scorer.negatives.marked(latent, activity, self.draw)
        self.top, self.random, _ = simulated_segments(self.source, latent, activity)
        blocks = [self.draw.positive, *self.draw.negative.values(), self.top, self.random]
        self.view = View(scorer.places, self.source.grid(np.concatenate(blocks)))
        edges = np.cumsum([len(block) for block in blocks])[:-1]
        self.split = lambda values: np.split(values, edges)
        self.true = self.source.values(activity, self.view.grid[edges[-2] :])

    def answers(self, rule: Rule) -> Sets:
        """Return the rule's answers by scorer and negative source, where there are enough of both classes."""
        rates = rule.predict(self.view)
        positive, *rest = self.split(rates)
        negative = dict(zip(self.draw.negative, rest, strict=False))
        whole = on_segments(rule, positive)
        sets: Sets = {}
        for name, segments in self.draw.negative.items():
            there = segments >= 0
            if there.sum() >= LEAST_PAIRS:
                sets["detection", name] = self._set(
                    _take(whole, there), on_segments(rule, negative[name][there]), there, segments
                )
        for name, own in self.marked.items():
            if own.rows.sum() >= LEAST_PAIRS:
                other = positive if name == "silent-token" else negative[name]
                segments = self.draw.positive if name == "silent-token" else self.draw.negative[name]
                sets["fuzzing", name] = self._set(
                    on_marks(rule, positive[own.rows], own.positive[own.rows]),
                    on_marks(rule, other[own.rows], own.negative[own.rows]),
                    own.rows,
                    segments,
                )
        return sets

    def _set(
        self, positive: Verdicts, negative: Verdicts, rows: np.ndarray, segments: Int[np.ndarray, " n"]
    ) -> Answers:
        docs = self.source.doc[self.draw.positive[rows]], self.source.doc[segments[rows]]
        return Answers(positive.said, negative.said, *docs, positive.probability, negative.probability)

    def simulations(self, rule: Rule) -> dict[str, dict[str, Estimate]]:
        expected = np.concatenate(self.split(rule.expect(self.view))[-2:])
        grid = self.view.grid[-len(expected) :] if len(expected) else self.view.grid[:0]
        docs = np.repeat(self.source.doc[np.concatenate([self.top, self.random])], self.source.width)
        found = {}
        for draw, first in ((TOP, 0), (RANDOM, len(self.top))):
            inside = (grid[first:] >= 0).ravel()
            found[draw] = correlation(
                self.true[first:].ravel()[inside],
                expected[first:].ravel()[inside],
                docs[first * self.source.width :][inside],
            )
        return found

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


def _take(verdicts: Verdicts, rows: np.ndarray) -> Verdicts:
    assert verdicts.probability is not None
    return Verdicts(verdicts.said[rows], verdicts.probability[rows])


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
        numbers = estimate.as_dict()
        where = (judged.row_id, latent, judged.control, scorer, judge, source, metric)
        counts = (len(answers.positive), len(answers.negative), 0)
        yield (*where, numbers["value"], numbers["lo"], numbers["hi"], *counts)


def _simulation_rows(
    latent: int, judged: Judged, draw: str, metrics: dict[str, Estimate], shown: _Shown
) -> Iterator[Row]:
    n = len(shown.random) + (len(shown.top) if draw == TOP else 0)
    for metric, estimate in metrics.items():
        numbers = estimate.as_dict()
        where = (judged.row_id, latent, judged.control, "simulation", "rule", draw, metric)
        yield (*where, numbers["value"], numbers["lo"], numbers["hi"], n, 0, 0)

"""One latent before a judge: its explanation and a stranger's on the same examples, scored and made into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sae_italian.autointerp.judges import RuleJudge
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.protocols import Example, Judge, LatentExamples, Score, Verdicts
from sae_italian.autointerp.scorers.binary import answers_by_source, compare, detection, fuzzing
from sae_italian.autointerp.scorers.by_rule import GAIN, Row
from sae_italian.autointerp.scorers.simulation import simulation
from sae_italian.autointerp.store import Explanation, Judgement

Stored = tuple[int, Explanation]  # its id in the store


def judge_latent(
    judge: Judge, places: Places, shown: LatentExamples, own: Stored, lookup: Stored, stranger: Stored | None
) -> tuple[list[Row], list[Judgement]]:
    """Return the score rows of one latent and the judgements they rest on.

    The gain over token lookup compares the judge with the executed lookup rule on identical windows.
    """
    rows: list[Row] = []
    judgements: list[Judgement] = []
    rule_judge = RuleJudge(places)
    for (row_id, explanation), control in ((own, ""), (stranger, "shuffled")) if stranger else ((own, ""),):
        for scorer, function, examples in (("detection", detection, shown.test), ("fuzzing", fuzzing, shown.marked)):
            if not examples:
                continue
            verdicts = judge.detect(explanation, examples)
            scores = function(verdicts, examples)
            rows += score_rows(row_id, shown.latent, control, judge.name, scores)
            judgements += _judgements(row_id, shown.latent, control, scorer, judge.name, verdicts, examples)
            if not control:
                plain = rule_judge.detect(lookup[1], examples)
                rows += _gains(row_id, shown.latent, scorer, judge.name, verdicts, plain, examples)
        if shown.simulation:
            scores = simulation(judge.simulate(explanation, shown.simulation), shown.simulation)
            rows += score_rows(row_id, shown.latent, control, judge.name, scores)
    return rows, judgements


def score_rows(row_id: int, latent: int, control: str, judge: str, scores: Sequence[Score]) -> Iterator[Row]:
    for score in scores:
        for metric, estimate in score.metrics.items():
            numbers = estimate.as_dict()
            where = (row_id, latent, control, score.scorer, judge, score.negatives, metric)
            counts = (score.n_positive, score.n_negative, score.n_failed)
            yield (*where, numbers["value"], numbers["lo"], numbers["hi"], *counts)


def _gains(
    row_id: int, latent: int, scorer: str, judge: str, ours: Verdicts, theirs: Verdicts, examples: Sequence[Example]
) -> Iterator[Row]:
    plain = answers_by_source(theirs, examples)
    for source, answers in answers_by_source(ours, examples).items():
        gain = compare(answers, plain[source])
        yield from score_rows(
            row_id,
            latent,
            "",
            judge,
            [Score(scorer, source, {GAIN: gain}, len(answers.positive), len(answers.negative))],
        )


def _judgements(
    row_id: int, latent: int, control: str, scorer: str, judge: str, verdicts: Verdicts, examples: Sequence[Example]
) -> Iterator[Judgement]:
    probability = np.full(len(examples), np.nan) if verdicts.probability is None else verdicts.probability
    for i, example in enumerate(examples):
        p = float(probability[i]) if np.isfinite(probability[i]) else None
        where = (row_id, latent, control, scorer, judge, i, example.first, example.negatives or "")
        yield Judgement(*where, int(verdicts.said[i]), p)

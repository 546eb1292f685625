"""Scorers: what a judge's answers, or a model itself, say about an explanation. The files beside this one hold them; all are found here.

A scorer is a function of explanations under judgement (`Asked`) and of a latent's examples that yields a `Score` of each
explanation. It names the method it needs of a judge, and the metric it is known by.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import numpy as np

from sae_italian.autointerp.examples import Example, LatentExamples, Verdicts
from sae_italian.autointerp.store import Explanation, Row
from sae_italian.base.statistics import Estimate


class Score(NamedTuple):
    """One scorer's outcome on one latent; shares and correlations with their intervals over documents."""

    negatives: str
    metrics: Mapping[str, Estimate]
    n_positive: int = 0
    n_negative: int = 0
    n_failed: int = 0  # examples without a usable answer, left out of the metrics
    falls: Mapping[str, Any] = {}  # metric -> array: by how much it falls without each group of documents, or NaN


@dataclass(eq=False)
class Asked:
    """One explanation before one judge; one without an id in the store is only compared with.

    `only` names the scorers that are asked and the negatives that are kept of each, when not all are: of judges who always
    say the same.
    """

    judge: Any  # with the method that the scorer needs
    explanation: Explanation
    control: str = ""  # which control it serves; "" for an explanation on its own latent's examples
    only: Mapping[str, str] = field(default_factory=dict)
    answers: dict[str, tuple[Sequence[Example], Verdicts]] = field(default_factory=dict)  # by scorer
    falls: dict[str, list[int | None]] = field(default_factory=dict)  # as the store keeps them

    def judgements(self, latent: int) -> Iterator[Row]:
        """Yield the judge's answers example by example, as rows of the table `judgement`."""
        for scorer, (examples, (said, known)) in self.answers.items():
            probability = np.full(len(said), np.nan) if known is None else known
            each = zip(examples, said.tolist(), probability.tolist(), strict=True)
            for i, (example, yes, p) in enumerate(each):
                where = (self.explanation.id, latent, self.control, scorer, self.judge.name, i)
                yield *where, example.first, example.negatives or "", yes, p if p == p else None


SCORERS: dict[str, Any] = {}  # functions that score, each with its `needs` and its `metric`


def scorer(*, needs: str, metric: str) -> Callable[[Any], Any]:
    """Enter a function into the scorers under its own name, with what it needs of a judge and the metric that tables show."""

    def enter(function: Any) -> Any:
        function.needs, function.metric = needs, metric
        SCORERS[function.__name__] = function
        return function

    return enter


def falls_name(scorer: str, negatives: str, metric: str) -> str:
    """Return the name by which the store knows how a metric falls; a scorer's own metric is not said."""
    return " ".join([scorer, negatives, *[metric] * (metric != SCORERS[scorer].metric)])


def score_rows(asked: Sequence[Asked], examples: LatentExamples) -> tuple[list[Row], list[Row]]:
    """Return the rows of all scores that the judges can give, of the explanations that the store knows, and of their falls.

    The one path of every score: rules, LLMs, encoders and the subject model. Scores of one scorer are made together, on
    the same examples and the same resamples, so that explanations compare in pairs. The latent's own comes first.
    """
    rows: list[Row] = []
    latent = examples.latent
    for name, score in SCORERS.items():
        wanted = (one for one in asked if name in (one.only or getattr(one.judge, "scores", SCORERS)))
        able = [one for one in wanted if hasattr(one.judge, score.needs)]
        for one, found in score(able, examples) if able else ():
            if one.only or one.control:  # what a control is there for
                found = found._replace(metrics={score.metric: found.metrics[score.metric]})
            where = (one.explanation.id, latent, one.control, name, one.judge.name, found.negatives)
            told = found.metrics.items() if one.explanation.id else ()
            rows += [(*where, metric, *estimate.finite(), *found[2:5]) for metric, estimate in told]
            for of, falls in found.falls.items():
                if of in found.metrics:
                    which = falls_name(name, found.negatives, of)
                    one.falls[which] = [None if fall != fall else round(1000 * fall) for fall in falls]
    return rows, [
        (one.explanation.id, latent, one.control, one.judge.name, one.falls)
        for one in asked
        if one.falls and one.explanation.id
    ]


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

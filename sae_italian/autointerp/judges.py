"""Judges: what they are, and those that need no model, the one that executes a rule and those that always say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.explainers.rules import LatentRule, TreeRule, rule_of
from sae_italian.autointerp.explainers.text import displayed
from sae_italian.autointerp.explainers.titles import rule_of_title
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.store import Explanation

RULE = "rule"
What = Literal["text", "whole", "title"]


class Verdicts(NamedTuple):
    """A judge's answers, one per example."""

    said: Int[np.ndarray, " examples"]  # 1 yes, 0 no, -1 no usable answer
    probability: Float[np.ndarray, " examples"] | None = None  # of yes, if the judge gives one; NaN: no answer


Judge = Any
"""What answers scorers' questions from an explanation alone. Its `name` goes with every score; `concurrency` is an
explainer's. It has some of these methods, and is given to the scorers that need one of them, so that two judges differ
in their answers and in nothing else:
`detect(explanation, examples) -> Verdicts` (detection, fuzzing): is each example one of the latent's? Without marks the
question is whether the latent is active anywhere on it, with marks whether the marked tokens are those it is active on.
Nothing else of an example may be used but its text, its tokens and its marks.
`simulate(explanation, examples)` (simulation): the activation expected at each token of each example, in any unit; None
for an example without an answer.
`encode` (embedding), `forward` (surprisal, intervention): see these scorers."""


class RuleJudge:
    """Executes rules on the places of the cache they were made from; the examples are a latent's `ExampleSet`s."""

    name = RULE
    concurrency = 1

    def __init__(self, places: Places, what: What = "text"):
        """What is executed is what the rule's text says, the whole rule as it was fitted, or the latent's title."""
        self.places, self.what = places, what

    def detect(self, explanation: Explanation, examples: Any) -> Verdicts:
        """Say yes where the rule fires on any token, on every marked one where there are marks."""
        rule, rates = self._laid(explanation, examples)
        rates = rates[examples.rows]
        if examples.marks is None:
            strength = probability = rates.max(axis=1, initial=0.0)
        else:
            strength = np.where(examples.marks, rates, np.inf).min(axis=1, initial=np.inf)
            probability = strength.clip(max=1.0)
        return Verdicts(((strength > 0) & (strength >= rule.threshold)).astype(np.int64), probability)

    def simulate(self, explanation: Explanation, examples: Any) -> list[Float[np.ndarray, " tokens"]]:
        """Return the mean activation that the rule has seen where it says what it says of the token."""
        known = examples.segments.known
        if examples not in known:
            known[examples] = View(self.places, examples.segments.grid[examples.rows])
        view = known[examples]
        expected = self._laid(explanation, examples)[0].at(view, "weight")
        return [own[:n] for own, n in zip(expected, (view.grid >= 0).sum(axis=1).tolist(), strict=True)]

    def keys(
        self, explanation: Explanation, examples: Any
    ) -> tuple[Int[np.ndarray, " examples"], Float[np.ndarray, " keys"]]:
        """Return for each example the first of the rule's keys that makes it say yes (1 the first, 0 none), and the share
        of training tokens that each key stands on. A tree, and a whole rule, say yes by all of their keys together.
        """
        assert explanation.rule is not None
        rule, _ = self._laid(explanation, examples)
        fitted = rule_of(explanation.rule)
        frequency = np.concatenate([np.maximum(table.total, 1) for table in rule.tables])
        frequency = frequency / max(len(self.places.train_positions), 1)
        if self.what != "text" or not fitted.told or isinstance(rule, TreeRule):
            return self.detect(explanation, examples).said * len(frequency), frequency
        n, view = len(fitted.told), examples.segments.known[self.places]
        ends = np.cumsum([len(table.keys) for table in fitted.tables])
        told_at = np.argsort(
            np.searchsorted(ends, fitted.told, side="right"), kind="stable"
        )  # of the keys table by table
        most, start = np.zeros(len(view.grid)), 0
        for table in rule.tables:
            left = n - told_at[start : start + len(table.keys)]  # n for the key told first
            most = np.maximum(most, view.look_up(table.family, table.keys, left).max(axis=1, initial=0.0))
            start += len(table.keys)
        return np.where(most > 0, n + 1 - most, 0).astype(np.int64)[examples.rows], frequency

    def _laid(self, explanation: Explanation, examples: Any) -> tuple[LatentRule, Float[np.ndarray, "segments width"]]:
        """Return the rule and its rates on all segments of a latent, worked out once whatever is asked about them."""
        known, key = examples.segments.known, (self.what, id(explanation))
        if self.places not in known:
            known[self.places] = View(self.places, examples.segments.grid)
        if key not in known:
            assert explanation.rule is not None
            if self.what == "title":
                rule = rule_of_title(explanation.rule["title"], self.places)
            else:
                rule = rule_of(explanation.rule)
                rule = rule if self.what == "whole" else displayed(rule)
            known[key] = rule, rule.at(known[self.places], "rate"), explanation  # held, so that its id stays its own
        return known[key][:2]


@dataclass(frozen=True)
class ConstantJudge:
    """Always says the same: balanced accuracy is exactly 0.5."""

    answer: bool
    concurrency: int = 1

    @property
    def name(self) -> str:
        return "always-yes" if self.answer else "always-no"

    def detect(self, explanation: Explanation, examples: Sequence[Any]) -> Verdicts:
        """Return the one answer for every example."""
        return Verdicts(np.full(len(examples), int(self.answer)))

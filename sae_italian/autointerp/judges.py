"""Judges: what they are, and those that need no model, the one that executes a rule and those that always say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.explainers.rules import LatentRule, rule_of
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

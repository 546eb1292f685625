"""Judges that need no model: the one that executes the explanation's rule, and those that always say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.explainers.rules import LatentRule, rule_of
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.protocols import Example, Verdicts
from sae_italian.autointerp.store import Explanation

RULE = "rule"


class RuleJudge:
    """Executes rules on the places of the cache they were made from; the examples are a latent's `ExampleSet`s."""

    name = RULE
    concurrency = 1

    def __init__(self, places: Places):
        self.places = places

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
        view = View(self.places, examples.segments.grid[examples.rows])
        expected = self._laid(explanation, examples)[0].at(view, "weight")
        return [own[: int(n)] for own, n in zip(expected, (view.grid >= 0).sum(axis=1), strict=True)]

    def _laid(self, explanation: Explanation, examples: Any) -> tuple[LatentRule, Float[np.ndarray, "segments width"]]:
        """Return the rule and its rates on all segments of a latent, worked out once whatever is asked about them."""
        segments = examples.segments
        if self not in segments.known:
            segments.known[self] = View(self.places, segments.grid)
        view, key = segments.known[self], (self, id(explanation))
        if key not in segments.known:
            assert explanation.rule is not None
            rule = rule_of(explanation.rule)
            segments.known[key] = rule, rule.at(view, "rate"), explanation  # held, so that its id stays its own
        return segments.known[key][:2]


@dataclass(frozen=True)
class ConstantJudge:
    """Always says the same: balanced accuracy is exactly 0.5."""

    answer: bool
    concurrency: int = 1

    @property
    def name(self) -> str:
        return "always-yes" if self.answer else "always-no"

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        """Return the one answer for every example."""
        return Verdicts(np.full(len(examples), int(self.answer)))

"""Judges that need no LLM: the one that executes the explanation's rule, and those whose scores are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.explainers.choose import rule_of
from sae_italian.autointerp.explainers.text import Rule
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.protocols import Example, Verdicts
from sae_italian.autointerp.store import Explanation


class RuleJudge:
    """Executes rules on the places of the cache they were made from."""

    name = "rule"
    concurrency = 1

    def __init__(self, places: Places):
        self.places = places

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        assert explanation.rule is not None
        rule, grid = rule_of(explanation.rule), self._grid(examples)
        rates = rule.predict(View(self.places, grid))
        if not any(example.marks is not None for example in examples):
            return on_segments(rule, rates)
        marks = np.zeros(grid.shape, dtype=bool)
        for row, example in enumerate(examples):
            assert example.marks is not None
            marks[row, : len(example.marks)] = example.marks
        return on_marks(rule, rates, marks)

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        assert explanation.rule is not None
        expected = rule_of(explanation.rule).expect(View(self.places, self._grid(examples)))
        return [row[: len(example.tokens)] for row, example in zip(expected, examples, strict=True)]

    def _grid(self, examples: Sequence[Example]) -> Int[np.ndarray, "n width"]:
        offsets = np.arange(max((len(example.tokens) for example in examples), default=0))
        first = np.array([example.first for example in examples], dtype=np.int64)
        length = np.array([len(example.tokens) for example in examples], dtype=np.int64)
        return np.where(offsets < length[:, None], first[:, None] + offsets, -1)


def on_segments(rule: Rule, rates: Float[np.ndarray, "n width"]) -> Verdicts:
    """Say yes where the rule fires on any token; its probability is the largest rate."""
    strongest = rates.max(axis=1, initial=0.0)
    return Verdicts(_fires(rule, strongest), strongest)


def on_marks(rule: Rule, rates: Float[np.ndarray, "n width"], marks: Bool[np.ndarray, "n width"]) -> Verdicts:
    """Say yes where the rule fires on every marked token; its probability is the smallest rate."""
    weakest = np.where(marks, rates, np.inf).min(axis=1, initial=np.inf)
    return Verdicts(_fires(rule, weakest), weakest.clip(max=1.0))


def _fires(rule: Rule, strength: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return ((strength > 0) & (strength >= rule.threshold)).astype(np.int64)


@dataclass(frozen=True)
class ConstantJudge:
    """Always says the same: balanced accuracy is exactly 0.5, and nothing is simulated but a constant."""

    answer: bool

    concurrency = 1

    @property
    def name(self) -> str:
        return "always-yes" if self.answer else "always-no"

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        return Verdicts(np.full(len(examples), int(self.answer)), np.full(len(examples), float(self.answer)))

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        return [np.full(len(example.tokens), float(self.answer)) for example in examples]


@dataclass(frozen=True)
class OracleJudge:
    """Knows the answer: balanced accuracy 1 and correlation 1, whatever the explanation."""

    name: str = "oracle"
    concurrency: int = 1

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        said = np.array([example.positive for example in examples], dtype=np.int64)
        return Verdicts(said, said.astype(np.float64))

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        return [example.activations for example in examples]

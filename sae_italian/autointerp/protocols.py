"""The seam of the room: what an example is, what an explainer and a judge do, and what a score is made of.

Explainers and judges come with an LLM or without. Whatever they are, the same scorers turn a judge's verdicts into
scores, so that two judges differ in their answers and in nothing else. A judge and an explainer work on one latent at a
time; `concurrency` says how many latents may be in their hands at once (threads), 1 for those that compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.store import Explanation
from sae_italian.base.statistics import Estimate

Negatives = Literal["random", "same-token", "cofiring", "decoder", "silent-token"]
"""Where a negative comes from: any silent segment; one with the same token, silent; one on which a latent that fires
together with this one, or whose decoder direction is near, is active and this one silent. `silent-token` (fuzzing only)
is a segment of the latent's own with its silent tokens marked."""
SEGMENT_NEGATIVES: tuple[Negatives, ...] = ("random", "same-token", "cofiring", "decoder")
FUZZING_NEGATIVES: tuple[Negatives, ...] = ("silent-token", *SEGMENT_NEGATIVES)


@dataclass(frozen=True, eq=False)
class Example:
    """A segment: at most `width` consecutive tokens of one document, on which the latent is active or verified silent.

    `text` is cut out of the document by character offsets; token i is `text[spans[i, 0] : spans[i, 1]]`. Spans of
    neighbouring tokens may leave out a space between them, or share a letter that takes two tokens.
    """

    text: str
    spans: Int[np.ndarray, "tokens 2"]
    tokens: Int[np.ndarray, " tokens"]
    activations: Float[np.ndarray, " tokens"]
    document: str
    positive: bool
    negatives: Negatives | None = None  # the source of a negative, None for a positive
    marks: Bool[np.ndarray, " tokens"] | None = None  # the tokens shown marked; None: the question is about the whole
    first: int = -1  # position of the first token in the cache
    decile: int = -1  # of a positive among the latent's segments, 0 the weakest tenth, 9 the strongest
    pair: int = -1  # running number of a positive, and of the negatives that are matched with it

    def strengths(self, maximum: float, top: int = 10) -> Int[np.ndarray, " tokens"]:
        """Return the activations as whole numbers 0 to `top`: above 0 wherever the latent fires, `top` at its maximum."""
        scaled = np.ceil(top * self.activations / maximum) if maximum > 0 else np.zeros(len(self.activations))
        return scaled.clip(0, top).astype(np.int64)

    def marked_text(self, opening: str = "<<", closing: str = ">>") -> str:
        """Return the text with each run of marked tokens between two signs."""
        marks = np.zeros(len(self.tokens), dtype=bool) if self.marks is None else self.marks
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(np.int8), [0]])))
        pieces, done = [], 0
        for start, stop in edges.reshape(-1, 2).tolist():
            begin, end = max(int(self.spans[start, 0]), done), int(self.spans[stop - 1, 1])
            lead = len(self.text[begin:end]) - len(self.text[begin:end].lstrip())
            pieces += [self.text[done : begin + lead], opening, self.text[begin + lead : end], closing]
            done = end
        return "".join([*pieces, self.text[done:]])


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """All that an explainer or a judge is shown of one latent. Training and test share no document and no segment."""

    latent: int
    maximum: float  # largest activation in the training documents, to scale strengths by
    train: Sequence[Example] = ()  # to explain: positives (marked from 0.3 of their maximum on) and random negatives
    test: Sequence[Example] = ()  # to score: positives, then as many negatives per source as there are
    marked: Sequence[Example] = ()  # to score by fuzzing: the test segments with marks, equally many in each class
    simulation: Sequence[Example] = ()  # test positives: the strongest (decile -1), then random ones
    promoted: tuple[str, ...] = ()  # the tokens whose logits the latent raises most: its output, not when it fires


class Verdicts(NamedTuple):
    """A judge's answers, one per example."""

    said: Int[np.ndarray, " examples"]  # 1 yes, 0 no, -1 no usable answer
    probability: Float[np.ndarray, " examples"] | None = None  # of yes, where the judge gives one (NaN where it failed)


class Explainer(Protocol):
    """Turns examples into explanations. `name` is how the store and the tables call it."""

    name: str
    concurrency: int

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation per name this explainer answers for; failures are explanations with that status."""
        ...


class JudgeBase(Protocol):
    """Answers scorers' questions from an explanation alone. `name` goes with every score.

    A judge has some of these methods, and is given to the scorers that need one of them: `detect` (detection, fuzzing),
    `simulate` (simulation), `encode` (embedding), `forward` (surprisal, intervention).
    """

    @property
    def name(self) -> str: ...

    @property
    def concurrency(self) -> int: ...


class Judge(JudgeBase, Protocol):
    """A judge of segments, as an LLM is."""

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        """Return whether each example is one of the latent's.

        Without marks the question is whether the latent is active anywhere on the segment (detection), with marks whether
        the marked tokens are those it is active on (fuzzing). Nothing else of the example may be used but its text, its
        tokens and its marks.
        """
        ...

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> Sequence[Float[np.ndarray, " tokens"] | None]:
        """Return the activation expected at each token of each example, in any unit; None where there is no answer."""
        ...


@dataclass(frozen=True)
class Score:
    """One scorer's outcome on one latent; shares and correlations with their intervals over documents."""

    negatives: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    n_positive: int = 0
    n_negative: int = 0
    n_failed: int = 0  # examples without a usable answer, left out of the metrics

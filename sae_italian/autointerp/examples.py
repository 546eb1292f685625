"""What explainers and judges are shown of a latent, and what they are; the judges that need no model.

What is shown are the draws of the cache, as arrays and, where it is read, as text. The judges here are the one that executes a
rule and those that always say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.draws import SEGMENT_NEGATIVES, Activity, ExampleSource, Negatives, strong
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.rules import LatentRule, TreeRule, rule_of
from sae_italian.autointerp.store import Explanation
from sae_italian.autointerp.wording import displayed, rule_of_title
from sae_italian.cache import FeatureCache
from sae_italian.cache.passages import marked

N_SIMULATED = 5  # strongest segments of the simulation, and as many random ones (Cunningham et al. 2023)
LEAST_PAIRS = 10  # positives and negatives below which a source of negatives is not scored


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
    marks: Bool[np.ndarray, " tokens"] | None = None  # tokens shown marked; None: the whole is asked about
    first: int = -1  # position of the first token in the cache
    decile: int = -1  # of a positive among the latent's segments, 0 the weakest tenth, 9 the strongest
    pair: int = -1  # running number of a positive, and of the negatives that are matched with it

    def strengths(self, maximum: float, top: int = 10) -> Int[np.ndarray, " tokens"]:
        """Return the activations as whole numbers 0 to `top`: above 0 wherever the latent fires, `top` at its maximum."""
        scaled = np.ceil(top * self.activations / maximum) if maximum > 0 else 0 * self.activations
        return scaled.clip(0, top).astype(np.int64)

    def marked_text(self, opening: str = "<<", closing: str = ">>") -> str:
        """Return the text with each run of marked tokens between two signs."""
        return self.text if self.marks is None else marked(self, self.marks, opening, closing)


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """All that an explainer or a judge is shown of one latent. Training and test share no document and no segment."""

    latent: int
    maximum: float  # largest activation in the training documents, to scale strengths by
    train: Sequence[Example] = ()  # to explain: positives with marks, and random negatives
    test: Sequence[Example] = ()  # to score: positives, then as many negatives per source as there are
    marked: Sequence[Example] = ()  # to score by fuzzing: the test segments with marks
    simulation: Sequence[Example] = ()  # test positives: the strongest (decile -1), then random ones
    promoted: tuple[str, ...] = ()  # tokens whose logits the latent raises most: its output


class LatentSegments:
    """Segments of one latent by the part they play (-1 for one that is not there), each laid out once whatever is asked."""

    def __init__(self, source: ExampleSource, activity: Activity, parts: dict[str, Int[np.ndarray, " n"]]):
        self.source, self.activity = source, activity
        self.segments = np.concatenate(list(parts.values()))
        ends = np.cumsum([len(own) for own in parts.values()]).tolist()
        self.first = dict(zip(parts, [0, *ends], strict=False))  # row that each part begins at
        self.grid = source.grid(self.segments)
        self.known: dict[Any, Any] = {}  # what a judge worked out on all of them


class ExampleSet(Sequence[Example]):
    """Some segments under one question: arrays for who computes, an `Example` with its text for who reads.

    `questions` says by source of negatives which examples are its negatives' positives and which its negatives, where
    there are enough. The positives come first, in the order of their pairs.
    """

    def __init__(
        self,
        segments: LatentSegments,
        pairs: dict[str, Int[np.ndarray, " n"]],
        decile: Int[np.ndarray, " positives"],
        marks: dict[str, Bool[np.ndarray, "n width"]] | None = None,
    ):
        """`pairs` are the numbers of the segments within their parts; the first part's are positives, `decile` is theirs."""
        self.segments, self.parts = segments, list(pairs)
        self.rows = np.concatenate([segments.first[name] + pair for name, pair in pairs.items()])
        self.pair, self.first = np.concatenate(list(pairs.values())), np.cumsum([0, *map(len, pairs.values())])
        self.decile = np.append(decile, np.full(len(self.rows) - len(decile), -1))
        self.marks = np.concatenate([marks[name] for name in pairs]) if marks else None
        self.document = segments.source.doc[segments.segments[self.rows]]
        self.questions: dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]] = {}
        for name, first in zip(self.parts[1:], self.first[1:].tolist(), strict=False):
            if len(pairs[name]) >= LEAST_PAIRS:
                here = np.searchsorted(pairs[self.parts[0]], pairs[name])
                self.questions[name] = here, first + np.arange(len(pairs[name]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    @cached_property
    def _examples(self) -> list[Example]:
        return [self._read(i) for i in range(len(self))]

    def _read(self, i: int) -> Example:
        source = self.segments.source
        part = int(np.searchsorted(self.first, i, side="right")) - 1
        segment = int(self.segments.segments[self.rows[i]])
        start, length = int(source.start[segment]), int(source.length[segment])
        text, spans = source.cache.spans(start, start + length)
        tokens, document = source.tokens[start : start + length], source.cache.document(int(source.doc[segment])).doc_id
        kind = part == 0, self.parts[part] if part else None, None if self.marks is None else self.marks[i][:length]
        where = start, int(self.decile[i]), int(self.pair[i])
        return Example(text, spans, tokens, self.activations[i], document, *kind, *where)

    @cached_property
    def activations(self) -> list[Float[np.ndarray, " tokens"]]:
        """The latent's activation at each token of each segment."""
        grid = self.segments.grid[self.rows]
        values = self.segments.source.values(self.segments.activity, grid)
        return [own[:n] for own, n in zip(values, (grid >= 0).sum(axis=1).tolist(), strict=True)]


def latent_examples(
    source: ExampleSource,
    latent: int,
    *,
    n_train: int = 40,
    n_test: int = 50,
    sources: Sequence[Negatives] = SEGMENT_NEGATIVES,
    promoted: tuple[str, ...] = (),
) -> LatentExamples:
    """Return the examples of one latent, none of a part whose number is 0; the same seed and numbers give the same ones."""
    activity = source.activity(latent)
    in_train = activity.value[source.position_part[activity.position] == 0] if n_train else activity.value[:0]
    train = _train(source, activity, n_train) if n_train else ()
    test = _test(source, activity, n_test, sources) if n_test else ((), (), ())
    return LatentExamples(latent, float(in_train.max(initial=0.0)), train, *test, promoted)


def _train(source: ExampleSource, activity: Activity, n: int) -> ExampleSet:
    draw = source.draw(activity, "train", n, ())
    segments = LatentSegments(source, activity, {"": draw.positive, "random": draw.negative["random"]})
    pairs = {"": np.arange(len(draw.positive)), "random": np.flatnonzero(draw.negative["random"] >= 0)}
    marks = strong(source.values(activity, segments.grid))
    return ExampleSet(
        segments, pairs, draw.decile, {name: marks[segments.first[name] + pair] for name, pair in pairs.items()}
    )


def _test(
    source: ExampleSource, activity: Activity, n: int, sources: Sequence[Negatives]
) -> tuple[ExampleSet, ExampleSet, ExampleSet]:
    """Return the test examples whole, those with marks, and those to simulate."""
    draw = source.draw(activity, "test", n, sources)
    top, _ = source.positives(activity, "test", N_SIMULATED, "top")
    drawn, tenth = source.positives(activity, "test", 3 * N_SIMULATED, "random")
    others = np.flatnonzero(~np.isin(drawn, top))[:N_SIMULATED]
    simulated = np.append(top, drawn[others])
    parts = {"": draw.positive, **draw.negative, "simulated": simulated}
    segments, marks = LatentSegments(source, activity, parts), source.marked(activity, draw)
    segments.first["silent-token"] = segments.first[""]  # the positives themselves, marked elsewhere

    there = {name: np.flatnonzero(own >= 0) for name, own in draw.negative.items()}
    usable = {name: np.flatnonzero(own.rows) for name, own in marks.items()}
    pairs = {"": np.unique(np.concatenate(list(usable.values()))), **usable}
    marked = {"": marks["silent-token"].positive, **{name: own.negative for name, own in marks.items()}}
    every, none = np.arange(len(draw.positive)), np.empty(0, dtype=np.int64)
    return (
        ExampleSet(segments, {"": every, **there}, draw.decile),
        ExampleSet(segments, pairs, none, {name: marked[name][pair] for name, pair in pairs.items()}),
        ExampleSet(segments, {"simulated": np.arange(len(simulated))}, np.append(np.full(len(top), -1), tenth[others])),
    )


def promoted_tokens(cache: FeatureCache, strings: list[str], latent: int) -> tuple[str, ...]:
    """Return the tokens whose logits a latent raises most, of those whose text is given."""
    ids = np.asarray(cache.statistics["promoted_ids"][latent]).tolist()
    return tuple(strings[token].strip() for token in ids if token < len(strings))


# --- explainers and judges -------------------------------------------------------------------------------------------

RULE = "rule"


class Explainer(Protocol):
    """Turns examples into explanations, with an LLM or without. `name` is how the store and the tables call it.

    Where it has them, `concurrency` says how many latents may be in its hands at once (threads; one that computes takes one
    at a time), `n_train` how many training positives it wants, and `settings` what its explanations depend on.
    """

    name: str

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation per name this explainer answers for; failures are explanations with that status."""
        ...


class Verdicts(NamedTuple):
    """A judge's answers, one per example."""

    said: Int[np.ndarray, " examples"]  # 1 yes, 0 no, -1 no usable answer
    probability: Float[np.ndarray, " examples"] | None = None  # of yes, where one is given; NaN: no answer


Judge = Any
"""What answers scorers' questions from an explanation alone. Its `name` goes with every score; `concurrency` is an
explainer's. It has some of these methods, and is given to the scorers that need one of them, so that two judges differ
in their answers and in nothing else:
`detect(explanation, examples) -> Verdicts` (detection, fuzzing): is each example one of the latent's? Without marks the
question is whether the latent is active anywhere on it, with marks whether the marked tokens are those it is active on.
Nothing else of an example may be used but its text, its tokens and its marks.
`simulate(explanation, examples)` (simulation): the activation expected at each token of each example, in any unit; None
for an example without a usable answer, -2 where it is to be asked again.
`encode` (embedding), `forward` (surprisal, intervention): see these scorers."""


class RuleJudge:
    """Executes rules on the places of the cache they were made from; the examples are a latent's `ExampleSet`s."""

    name = RULE

    def __init__(self, places: Places, what: Literal["text", "whole", "title"] = "text"):
        """What is executed is what the rule's text says, the whole rule as it was fitted, or the latent's title."""
        self.places, self.what = places, what

    def detect(self, explanation: Explanation, examples: Any) -> Verdicts:
        """Say yes where the rule fires on any token, on every marked one where there are marks."""
        rule, rates = self._laid(explanation, examples)
        rates = rates[examples.rows]
        if examples.marks is None:
            strength = rates.max(axis=1, initial=0.0)
        else:
            strength = np.where(examples.marks, rates, np.inf).min(axis=1, initial=np.inf)
        return Verdicts(((strength > 0) & (strength >= rule.threshold)).astype(np.int64), strength)

    def simulate(self, explanation: Explanation, examples: Any) -> list[Float[np.ndarray, " tokens"]]:
        """Return the mean activation that the rule has seen where it says what it says of the token."""
        if examples not in examples.segments.known:
            examples.segments.known[examples] = View(self.places, examples.segments.grid[examples.rows])
        view = examples.segments.known[examples]
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
        left, most = np.zeros(ends[-1]), np.zeros(len(view.grid))
        left[list(fitted.told)] = n - np.arange(n)  # n for the key told first
        for table, own in zip(fitted.tables, np.split(left, ends[:-1]), strict=True):
            most = np.maximum(most, view.look_up(table.family, table.keys, own).max(axis=1, initial=0.0))
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

    @property
    def name(self) -> str:
        return "always-yes" if self.answer else "always-no"

    def detect(self, explanation: Explanation, examples: Sequence[Any]) -> Verdicts:
        """Return the one answer for every example."""
        return Verdicts(np.full(len(examples), int(self.answer)))

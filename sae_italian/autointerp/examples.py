"""What explainers and judges are shown of a latent: the draws of the cache, as arrays and, where it is read, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.draws import SEGMENT_NEGATIVES, Activity, ExampleSource, Negatives, strong
from sae_italian.cache import FeatureCache

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
    train: Sequence[Example] = ()  # to explain: positives with marks, and random negatives
    test: Sequence[Example] = ()  # to score: positives, then as many negatives per source as there are
    marked: Sequence[Example] = ()  # to score by fuzzing: the test segments with marks
    simulation: Sequence[Example] = ()  # test positives: the strongest (decile -1), then random ones
    promoted: tuple[str, ...] = ()  # tokens whose logits the latent raises most: its output


class LatentSegments:
    """Segments of one latent, each laid out once whatever is asked about it."""

    def __init__(self, source: ExampleSource, activity: Activity, *parts: Int[np.ndarray, " n"]):
        self.source, self.activity = source, activity
        self.segments = np.concatenate(parts)
        self.first = np.cumsum([0, *map(len, parts)])  # row that each part begins at
        self.grid = source.grid(self.segments)
        self.known: dict[Any, Any] = {}  # what a judge worked out on all of them


class Alike(NamedTuple):
    """Rows of a latent's segments that play one part in a question."""

    negatives: str  # the source of negatives, "" for positives
    rows: Int[np.ndarray, " n"]
    pair: Int[np.ndarray, " n"] | None = None
    decile: Int[np.ndarray, " n"] | None = None
    marks: Bool[np.ndarray, "n width"] | None = None


class ExampleSet(Sequence[Example]):
    """Some segments under one question: arrays for who computes, an `Example` with its text for who reads.

    `questions` says by source of negatives which examples are its negatives' positives and which its negatives, where
    there are enough. The positives come first, in the order of their pairs.
    """

    def __init__(self, segments: LatentSegments, parts: Sequence[Alike]):
        self.segments, self.rows = segments, np.concatenate([part.rows for part in parts])
        self.sources, self.first = (
            [part.negatives for part in parts],
            np.cumsum([0, *(len(part.rows) for part in parts)]),
        )
        self.pair, self.decile = (
            np.concatenate(
                [np.full(len(part.rows), -1) if (own := getattr(part, name)) is None else own for part in parts]
            )
            for name in ("pair", "decile")
        )
        marks = [part.marks for part in parts if part.marks is not None]
        self.marks = np.concatenate(marks) if marks else None
        self.document = segments.source.doc[segments.segments[self.rows]]
        self.questions: dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]] = {}
        for part, first in zip(parts[1:], self.first[1:].tolist(), strict=False):
            if len(part.rows) >= LEAST_PAIRS and part.pair is not None:
                here = np.searchsorted(self.pair[: self.first[1]], part.pair)
                self.questions[part.negatives] = here, first + np.arange(len(part.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    @cached_property
    def _examples(self) -> list[Example]:
        return [self._read(i) for i in range(len(self))]

    def _read(self, i: int) -> Example:
        source = self.segments.source
        name = self.sources[int(np.searchsorted(self.first, i, side="right")) - 1]
        segment = int(self.segments.segments[self.rows[i]])
        start, length = int(source.start[segment]), int(source.length[segment])
        text, spans = source.cache.spans(start, start + length)
        tokens, document = source.tokens[start : start + length], source.cache.document(int(source.doc[segment])).doc_id
        kind = not name, name or None, None if self.marks is None else self.marks[i][:length]
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
    _, silent = draw.pairs("random")
    segments, paired = LatentSegments(source, activity, draw.positive, silent), len(draw.positive)
    rows, marks = np.arange(len(segments.segments)), strong(source.values(activity, segments.grid))
    positives = Alike("", rows[:paired], rows[:paired], draw.decile, marks[:paired])
    return ExampleSet(segments, [positives, Alike("random", rows[paired:], marks=marks[paired:])])


def _test(
    source: ExampleSource, activity: Activity, n: int, sources: Sequence[Negatives]
) -> tuple[ExampleSet, ExampleSet, ExampleSet]:
    """Return the test examples whole, those with marks, and those to simulate."""
    draw = source.draw(activity, "test", n, sources)
    top, _ = source.positives(activity, "test", N_SIMULATED, "top")
    drawn, tenth = source.positives(activity, "test", 3 * N_SIMULATED, "random")
    others = ~np.isin(drawn, top)
    drawn, tenth = drawn[others][:N_SIMULATED], tenth[others][:N_SIMULATED]
    segments = LatentSegments(source, activity, draw.positive, *draw.negative.values(), top, drawn)
    first = dict(zip(("silent-token", *draw.negative), segments.first.tolist(), strict=False))

    every, there = (
        np.arange(len(draw.positive)),
        {name: np.flatnonzero(own >= 0) for name, own in draw.negative.items()},
    )
    whole = [Alike(name, first[name] + rows, rows) for name, rows in there.items()]
    marks = source.marked(activity, draw)
    usable = np.flatnonzero(np.any([own.rows for own in marks.values()], axis=0))
    marked = [Alike("", usable, usable, marks=marks["silent-token"].positive[usable])]
    for name, own in marks.items():
        rows = np.flatnonzero(own.rows)
        marked.append(Alike(name, first[name] + rows, rows, marks=own.negative[rows]))
    simulated = segments.first[-3] + np.arange(len(top) + len(drawn))
    deciles = np.concatenate([np.full(len(top), -1), tenth])
    return (
        ExampleSet(segments, [Alike("", every, every, draw.decile), *whole]),
        ExampleSet(segments, marked),
        ExampleSet(segments, [Alike("", simulated, decile=deciles)]),
    )


def promoted_tokens(cache: FeatureCache, strings: list[str], latent: int) -> tuple[str, ...]:
    """Return the tokens whose logits a latent raises most, of those whose text is given."""
    ids = np.asarray(cache.statistics["promoted_ids"][latent]).tolist()
    return tuple(strings[token].strip() for token in ids if token < len(strings))

"""What explainers and judges are shown of a latent: the draws of the cache, as arrays and, where it is read, as text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.examples import Activity, ExampleSource
from sae_italian.autointerp.negatives import MARK_SHARE, NegativeSource
from sae_italian.autointerp.protocols import SEGMENT_NEGATIVES, Example, LatentExamples, Negatives
from sae_italian.cache import FeatureCache

N_SIMULATED = 5  # strongest segments of the simulation, and as many random ones (Cunningham et al. 2023)
LEAST_PAIRS = 10  # positives and negatives below which a source of negatives is not scored


class LatentSegments:
    """Segments of one latent, each laid out once whatever is asked about it."""

    def __init__(self, source: ExampleSource, activity: Activity, *parts: Int[np.ndarray, " n"]):
        self.source, self.activity = source, activity
        self.segments = np.concatenate(parts)
        self.first = np.cumsum([0, *map(len, parts)])  # row that each part begins at
        self.grid = source.grid(self.segments)
        self.doc = source.doc[self.segments]
        self.known: dict[Any, Any] = {}  # what a judge worked out on all of them


class ExampleSet(Sequence[Example]):
    """Some segments under one question: arrays for who computes, an `Example` with its text for who reads."""

    def __init__(
        self,
        segments: LatentSegments,
        rows: Int[np.ndarray, " n"],
        *,
        negatives: Sequence[str] = (),  # the source of each, "" for a positive; without any all are positives
        pair: Int[np.ndarray, " n"] | None = None,
        decile: Int[np.ndarray, " n"] | None = None,
        marks: Bool[np.ndarray, "n width"] | None = None,
    ):
        unknown = np.full(len(rows), -1)
        self.segments, self.rows, self.marks = segments, rows, marks
        self.negatives = np.array(negatives if len(negatives) else [""] * len(rows), dtype="U16")
        self.pair, self.decile = unknown if pair is None else pair, unknown if decile is None else decile
        self.document = segments.doc[rows]
        self._example = lru_cache(None)(self._read)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._example(int(index) % len(self))

    def _read(self, i: int) -> Example:
        source, name = self.segments.source, str(self.negatives[i])
        segment = int(self.segments.segments[self.rows[i]])
        start, length = int(source.start[segment]), int(source.length[segment])
        text, spans = source.cache.spans(start, start + length)
        return Example(
            text=text,
            spans=spans,
            tokens=source.tokens[start : start + length],
            activations=self.activations[i],
            document=source.cache.document(int(source.doc[segment])).doc_id,
            positive=not name,
            negatives=name or None,  # pyright: ignore[reportArgumentType]
            marks=None if self.marks is None else self.marks[i][:length],
            first=start,
            decile=int(self.decile[i]),
            pair=int(self.pair[i]),
        )

    @cached_property
    def activations(self) -> list[Float[np.ndarray, " tokens"]]:
        """The latent's activation at each token of each segment."""
        grid = self.segments.grid[self.rows]
        values = self.segments.source.values(self.segments.activity, grid)
        return [own[: int(n)] for own, n in zip(values, (grid >= 0).sum(axis=1), strict=True)]

    @cached_property
    def questions(self) -> dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
        """By source of negatives, which examples are its negatives' positives and which its negatives, if there are enough."""
        found = {}
        positive = np.flatnonzero(self.negatives == "")
        for source in dict.fromkeys(self.negatives[self.negatives != ""].tolist()):
            there = np.flatnonzero(self.negatives == source)
            paired = np.zeros(int(self.pair.max(initial=0)) + 1, dtype=bool)
            paired[self.pair[there]] = True
            here = positive[paired[self.pair[positive]]]
            if min(len(here), len(there)) >= LEAST_PAIRS:
                found[source] = here, there
        return found


def latent_examples(
    negatives: NegativeSource,
    latent: int,
    *,
    n_train: int = 40,
    n_test: int = 50,
    sources: Sequence[Negatives] = SEGMENT_NEGATIVES,
    promoted: tuple[str, ...] = (),
) -> LatentExamples:
    """Return the examples of one latent, none of a part whose number is 0; the same seed and numbers give the same ones."""
    activity = negatives.source.activity(latent)
    train, maximum = _train(negatives, latent, activity, n_train) if n_train else ((), 0.0)
    test = _test(negatives, latent, activity, n_test, sources) if n_test else ((), (), ())
    return LatentExamples(latent, maximum, train, *test, promoted)


def _train(negatives: NegativeSource, latent: int, activity: Activity, n: int) -> tuple[ExampleSet, float]:
    """Return the training examples, and the latent's largest activation in all training documents."""
    in_train = activity.value[negatives.source.position_part[activity.position] == 0]
    draw = negatives.draw(latent, activity, "train", n)
    _, silent = draw.pairs("random")
    segments = LatentSegments(negatives.source, activity, draw.positive, silent)
    values = negatives.source.values(activity, segments.grid)
    marks = (values > 0) & (values >= MARK_SHARE * values.max(axis=1, keepdims=True, initial=0.0))
    n_positive, unpaired = len(draw.positive), np.full(len(silent), -1)
    shown = ExampleSet(
        segments,
        np.arange(len(segments.segments)),
        negatives=[""] * n_positive + ["random"] * len(silent),
        pair=np.concatenate([np.arange(n_positive), unpaired]),
        decile=np.concatenate([draw.decile, unpaired]),
        marks=marks,
    )
    return shown, float(in_train.max(initial=0.0))


def _test(
    negatives: NegativeSource, latent: int, activity: Activity, n: int, sources: Sequence[Negatives]
) -> tuple[ExampleSet, ExampleSet, ExampleSet]:
    """Return the test examples whole, those with marks, and those to simulate."""
    source = negatives.source
    draw = negatives.draw(latent, activity, "test", n, sources)
    top, _ = source.positives(latent, activity, "test", N_SIMULATED, "top")
    drawn, tenth = source.positives(latent, activity, "test", 3 * N_SIMULATED, "random")
    others = ~np.isin(drawn, top)
    drawn, tenth = drawn[others][:N_SIMULATED], tenth[others][:N_SIMULATED]
    segments = LatentSegments(source, activity, draw.positive, *draw.negative.values(), top, drawn)
    first = dict(zip(("silent-token", *draw.negative), segments.first.tolist(), strict=False))

    whole = [np.flatnonzero(own >= 0) for own in draw.negative.values()]
    test = _shown(segments, first, draw.negative, np.arange(len(draw.positive)), whole, decile=draw.decile)
    marks = negatives.marked(latent, activity, draw)
    usable = np.flatnonzero(np.any([own.rows for own in marks.values()], axis=0))
    there = [np.flatnonzero(own.rows) for own in marks.values()]
    masks = [own.negative[rows] for own, rows in zip(marks.values(), there, strict=True)]
    masks = np.concatenate([marks["silent-token"].positive[usable], *masks])
    marked = _shown(segments, first, marks, usable, there, marks=masks)
    deciles = np.concatenate([np.full(len(top), -1), tenth])
    return test, marked, ExampleSet(segments, segments.first[-3] + np.arange(len(deciles)), decile=deciles)


def _shown(
    segments: LatentSegments,
    first: dict[Any, int],
    names: Any,
    positive: Int[np.ndarray, " n"],
    there: list[Int[np.ndarray, " m"]],
    *,
    decile: Int[np.ndarray, " n"] | None = None,
    marks: Bool[np.ndarray, "all width"] | None = None,
) -> ExampleSet:
    """Return the positives of some rows, and of each source the negatives paired with the rows `there`."""
    rows = [first[name] + own for name, own in zip(names, there, strict=True)]
    sources = [name for name, own in zip(names, there, strict=True) for _ in own]
    pair = np.concatenate([positive, *there])
    tenths = None if decile is None else np.concatenate([decile, np.full(len(sources), -1)])
    all_names = [""] * len(positive) + sources
    return ExampleSet(
        segments, np.concatenate([positive, *rows]), negatives=all_names, pair=pair, decile=tenths, marks=marks
    )


def promoted_tokens(cache: FeatureCache, strings: list[str], latent: int) -> tuple[str, ...]:
    """Return the tokens whose logits a latent raises most, of those whose text is given."""
    ids = np.asarray(cache.statistics["promoted_ids"][latent]).tolist()
    return tuple(strings[token].strip() for token in ids if token < len(strings))

"""The passages of a latent: the stretches of text in which it is strongest, typical or silent.

A passage has one of two shapes. A segment is a cell of the grid that cuts the text of every document in every window each
`width` tokens (`FeatureCache.segments`), so segments of one latent never overlap. A surrounding reaches some tokens before
and after an anchor. Neither crosses the border of a document or window. All of it is found from the latent's own
activations, so the cost does not depend on the cache's size, and the same seed draws the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.base.errors import check_known, check_whole
from sae_italian.base.report import OURS, Picture, framed, svg
from sae_italian.corpora.packing import NO_DOCUMENT

if TYPE_CHECKING:
    from sae_italian.cache.read import FeatureCache

KINDS = ("top", "quantiles", "random", "silent", "same-token")
COPIES = 256  # activations looked at for each window asked for, when text repeats itself
TRIES = 20  # rounds of drawing before silent windows are given up as rare
SAME_TOKENS = 5  # a latent's strongest tokens, by activation mass


class Shown(NamedTuple):
    """One passage as text: each token's span in it, and its activation."""

    text: str
    spans: Int[np.ndarray, "tokens 2"]
    values: Float[np.ndarray, " tokens"]
    doc: int


def marked(passage: Any, marks: Bool[np.ndarray, " tokens"], opening: str, closing: str) -> str:
    """Return the text of a passage, with its `spans`, and each run of marked tokens between two signs."""
    text, spans = passage.text, passage.spans
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(np.int8), [0]])))
    pieces, done = [], 0
    for start, stop in edges.reshape(-1, 2).tolist():
        begin, end = max(int(spans[start, 0]), done), int(spans[stop - 1, 1])
        lead = len(text[begin:end]) - len(text[begin:end].lstrip())
        pieces += [text[done : begin + lead], opening, text[begin + lead : end], closing]
        done = end
    return "".join([*pieces, text[done:]])


class Peaks(NamedTuple):
    """The strongest position of every active segment (of equals the first), strongest first, and the segment's start."""

    position: Int[np.ndarray, " peaks"]
    value: Float[np.ndarray, " peaks"]
    start: Int[np.ndarray, " peaks"]


class Passages(NamedTuple):
    """Passages of one latent. The anchor is the position of the token a passage stands for: its strongest, or one given."""

    latent: LatentActivations
    start: Int[np.ndarray, " n"]  # position of the first token
    length: Int[np.ndarray, " n"]
    doc: Int[np.ndarray, " n"]
    anchor: Int[np.ndarray, " n"]
    maximum: Float[np.ndarray, " n"]  # the largest activation, 0 in a silent one
    active: list[slice]  # which of the latent's activations lie in it

    def show(self, index: int) -> Shown:
        """Return one passage with its text and the activation of every token."""
        first, length = int(self.start[index]), int(self.length[index])
        text, spans = self.latent.cache.spans(first, first + length)
        here = self.active[index]
        values = np.zeros(length, dtype=np.float32)
        values[self.latent.position[here] - first] = self.latent.value[here]
        return Shown(text, spans, values, int(self.doc[index]))

    def shown(self) -> list[Shown]:
        return [self.show(index) for index in range(len(self.start))]


class LatentActivations:
    """The non-zero activations of one latent, in corpus order. It unpacks as `position, value = cache.latent(i)`."""

    def __init__(
        self, cache: FeatureCache, latent: int, position: Int[np.ndarray, " nnz"], value: Float[np.ndarray, " nnz"]
    ):
        self.cache, self.latent, self.position, self.value = cache, latent, position, value

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.position, self.value))

    def __repr__(self) -> str:
        share, most = len(self.position) / self.cache.n_positions, self.value.max(initial=0.0)
        return f"latent {self.latent}: active on {share:.2%} of tokens, at most {most:.3g}"

    def _repr_html_(self) -> str:
        return framed(repr(self), self.plot())

    def plot(self) -> Picture:
        """Return a picture of how strongly the latent is active, and where in the corpus; a notebook shows it."""

        def draw(axes: Any) -> None:
            axes[0].hist(self.value, bins=40, color=OURS)
            axes[0].set(xlabel="activation", ylabel="tokens", yscale="log" if len(self.value) else "linear")
            axes[0].set_title(repr(self), fontsize=10)
            axes[1].plot(self.position, self.value, ".", color=OURS, markersize=2, rasterized=True)
            axes[1].set(xlabel="token of the cache", xlim=(0, self.cache.n_positions))

        return svg(draw, 2, (9, 3))

    def __len__(self) -> int:
        return len(self.position)

    @property
    def statistics(self) -> dict[str, Any]:
        """Return this latent's row of the statistics."""
        return self.cache.table.slice(self.latent, 1).to_pylist()[0]

    def explain(self) -> Any:
        """Return this latent's rule, made now (an `Explanation`: `text_it`, `text_en`, `rule`); seconds for a cache's first."""
        import sae_italian  # the public names: what explains stands above the cache

        return sae_italian.explain_latent(self)

    def peaks(self, width: int = 32) -> Peaks:
        """Return the strongest position of every segment in which the latent is active."""
        start = segment_starts(self.cache, self.position, width)
        begins = np.diff(start, prepend=-1) != 0
        segment = np.cumsum(begins) - 1
        largest = np.maximum.reduceat(self.value, np.flatnonzero(begins))[segment] if len(start) else self.value
        equals = np.flatnonzero(self.value == largest)
        strongest = equals[np.diff(segment[equals], prepend=-1) != 0]
        order = strongest[np.argsort(-self.value[strongest], kind="stable")]
        return Peaks(self.position[order], self.value[order], start[order])

    def around(self, anchor: Int[np.ndarray, " n"], before: int, after: int) -> Passages:
        """Return what reaches so many tokens before and after each anchor, inside its document and its window."""
        check_whole(0, before=before, after=after)
        return self._passages(anchor, before, after, anchor)

    def windows(self, kind: str = "top", n: int = 40, *, width: int = 32, seed: int = 0, bins: int = 10) -> Passages:
        """Return up to n segments of at most `width` tokens, no two with the same tokens.

        `top`: the strongest, strongest first. `quantiles`: active segments in `bins` equal parts by their maximum,
        n / bins drawn from each, strongest part first. `random`: drawn from all active segments. `silent`: drawn from
        the corpus, without any activation. `same-token`: silent too, but holding one of the latent's strongest tokens.
        Raises: UsageError for another kind.
        """
        check_known("window kind", KINDS, kind)
        check_whole(0, n=n, seed=seed)
        check_whole(1, width=width, bins=bins)
        n, width = int(n), min(int(width), self.cache.manifest.context_size)
        rng = np.random.default_rng([seed, self.latent, KINDS.index(kind)])
        seen: set[Any] = set()
        if kind == "top":
            start = _distinct(self, _strongest(self, n), n, width, seen)
        elif kind in ("quantiles", "random"):
            start, parts = [], bins if kind == "quantiles" else 1
            for index, part in enumerate(np.array_split(self.peaks(width).start, parts)):
                share = n // parts + (index < n % parts)
                start += _distinct(self, [rng.permutation(part)[: 4 * share]], share, width, seen)
        else:
            draws = (_anywhere if kind == "silent" else _same_token)(self, n, rng)
            start = _distinct(self, _silent(self, draws, width), n, width, seen)
        return self._passages(np.array(start, dtype=np.int64), 0, width - 1, None)

    def _passages(self, origin: Int[np.ndarray, " n"], before: int, after: int, anchor: np.ndarray | None) -> Passages:
        start, length, doc = surroundings(self.cache, origin, before, after)
        edges = np.searchsorted(self.position, np.stack([start, start + length], axis=1)).tolist()
        maximum, strongest = np.zeros(len(start), dtype=np.float32), start.copy()
        for row, (first, last) in enumerate(edges):
            if first < last:
                best = first + int(self.value[first:last].argmax())
                maximum[row], strongest[row] = self.value[best], self.position[best]
        active = [slice(*ends) for ends in edges]
        return Passages(self, start, length, doc, strongest if anchor is None else anchor, maximum, active)


# --- where passages begin and end, and which say the same ----------------------------------------------------------


def segment_starts(cache: FeatureCache, position: Int[np.ndarray, " n"], width: int) -> Int[np.ndarray, " n"]:
    """Return where the segment that holds each position starts."""
    check_whole(1, width=width)
    return position - (position % cache.manifest.context_size - cache.gather("run", position)) % width


def surroundings(
    cache: FeatureCache, anchor: Int[np.ndarray, " n"], before: int, after: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return first position, number of tokens and document of the text around each anchor, cut at the borders."""
    inside, (doc,) = _around(cache, anchor, before, after, "doc")
    return anchor - inside[:, :before].sum(axis=1), inside.sum(axis=1), doc[:, before]


def contents(cache: FeatureCache, anchor: Int[np.ndarray, " n"], before: int, after: int) -> list[bytes]:
    """Return for each anchor what its surrounding says: equal for two that hold the same tokens around the anchor."""
    inside, (_, tokens) = _around(cache, anchor, before, after, "doc", "tokens")
    tokens = np.where(inside, tokens, -1)
    return tokens.view(f"V{tokens.itemsize * tokens.shape[1]}").ravel().tolist()


def _around(
    cache: FeatureCache, anchor: Int[np.ndarray, " n"], before: int, after: int, *names: str
) -> tuple[Bool[np.ndarray, "n w"], Int[np.ndarray, "names n w"]]:
    """Return which tokens around each anchor are joined to it in its document and window, and what stands there."""
    context = cache.manifest.context_size
    grid = anchor[:, None] + np.arange(-before, after + 1)
    window = grid // context == anchor[:, None] // context
    found = cache.gather_all(names, np.where(window, grid, anchor[:, None]))
    inside = window & (found[0] == found[0][:, before, None])  # the first name is `doc`
    for outwards in (inside[:, before::-1], inside[:, before:]):
        np.logical_and.accumulate(outwards, axis=1, out=outwards)
    return inside, found


def first_new(items: Iterable[Any], n: int, seen: set[Any]) -> list[int]:
    """Return the places of the first n items that are not in `seen`, and add these to it."""
    kept: list[int] = []
    for place, item in enumerate(items):
        if len(kept) < n and item not in seen:
            seen.add(item)
            kept.append(place)
    return kept


def _distinct(
    latent: LatentActivations, draws: Iterable[Int[np.ndarray, " m"]], n: int, width: int, seen: set[Any]
) -> list[int]:
    """Return the first n segments that hold one of some drawn positions and whose tokens were not seen before."""
    kept = []
    for position in draws:
        start = np.array(list(dict.fromkeys(segment_starts(latent.cache, position, width).tolist())), dtype=np.int64)
        kept += start[first_new(contents(latent.cache, start, 0, width - 1), n - len(kept), seen)].tolist()
        if len(kept) >= n:
            break
    return kept


# --- positions drawn for the kinds of windows, a few at a time ----------------------------------------------------------


def _strongest(latent: LatentActivations, n: int) -> Iterator[Int[np.ndarray, " m"]]:
    """Yield the strongest positions, each time more of them: a latent may have millions of activations."""
    position, value = latent
    for wanted in (4 * n, 16 * n, 64 * n, COPIES * n):
        strongest = np.argpartition(-value, wanted - 1)[:wanted] if 0 < wanted < len(value) else np.arange(len(value))
        yield position[strongest[np.lexsort((position[strongest], -value[strongest]))]]
        if wanted >= len(value):
            return


def _silent(
    latent: LatentActivations, draws: Iterable[Int[np.ndarray, " m"]], width: int
) -> Iterator[Int[np.ndarray, " m"]]:
    """Yield of the drawn positions those whose segment holds no activation."""
    for position in draws:
        start = segment_starts(latent.cache, position, width)
        _, length, _ = surroundings(latent.cache, start, 0, width - 1)
        first, last = (np.searchsorted(latent.position, edge) for edge in (start, start + length))
        yield position[first == last]


def _anywhere(latent: LatentActivations, n: int, rng: np.random.Generator) -> Iterator[Int[np.ndarray, " m"]]:
    cache = latent.cache
    for _ in range(TRIES):
        position = rng.integers(cache.n_positions, size=4 * n)
        yield position[cache.gather("doc", position) != NO_DOCUMENT]


def _same_token(latent: LatentActivations, n: int, rng: np.random.Generator) -> Iterator[Int[np.ndarray, " m"]]:
    cache = latent.cache
    tokens, index = np.unique(cache.gather("tokens", latent.position), return_inverse=True)
    mass = np.bincount(index, weights=latent.value, minlength=len(tokens))
    wanted = tokens[np.argsort(-mass, kind="stable")[:SAME_TOKENS]]
    for shard in rng.permutation(len(cache.manifest.shards) if len(wanted) else 0).tolist():
        arrays = cache.shard_tokens(shard)
        hits = np.flatnonzero(np.isin(arrays["tokens"], wanted) & (arrays["doc"] != NO_DOCUMENT))
        hits += shard * cache.manifest.windows_per_shard * cache.manifest.context_size
        yield rng.permutation(hits[~np.isin(hits, latent.position)])[: 16 * n]

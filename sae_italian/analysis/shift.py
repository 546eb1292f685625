"""The evaluation card's numbers, bucket by bucket: along the context, and from one text, language or model to another.

Llama Scope shows them as pictures (section 4.4: longer contexts, fig. 5; the Instruct model, fig. 6). What is summed per
document, and every statistic of it, is the card's own (`evaluation.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_italian.base.errors import UsageError
from sae_italian.base.labels import label
from sae_italian.base.pace import one_of, paced
from sae_italian.base.report import OURS, REFERENCE, plain, save_result, shown, svg, table
from sae_italian.base.statistics import Estimate, interval
from sae_italian.corpora import Reader, Split, iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT, Packer, layout_of, special_mask, tokenise
from sae_italian.corpora.rows import MICRO_ITALIANO, local_shards
from sae_italian.corpora.stream import check_corpus, mixture
from sae_italian.evaluation.evaluate import STATISTICS, TOKENS_PER_BATCH, TokenSums, Windows, measure, windows_until
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits, hooks_of

DOCUMENTS_FOR_SOURCES = 10_000  # looked at for the values of `source`
BATCH_LOGITS = 2**27  # of a batch: with a vocabulary of 262,144 the logits of 2,048 tokens take gigabytes and minutes
IN_VAIN = 2_000  # documents of micro-italiano in a row that are too short; it has no end, and none that is long
LONGEST = 8  # contexts of the training: how far beyond it the buckets go by default
# Numbers of the evaluation card that a shift shows, and those of its picture.
KEYS = ("l0", "explained_variance", "explained_variance_uncentred", "ce_loss", "delta_lm_loss", "ce_loss_recovered")
DRAWN = ("l0", "explained_variance", "explained_variance_uncentred", "delta_lm_loss")


class Bucket(NamedTuple):
    """The card's numbers of one bucket, and their difference from the reference's (empty for the reference itself)."""

    name: str
    n_tokens: int
    n_documents: int
    numbers: dict[str, Estimate]
    change: dict[str, Estimate]


class Shift(NamedTuple):
    """Buckets of one kind (`by`) and the one that the others are compared with."""

    by: str
    sae: str
    model: str
    corpus: str
    context_size: int
    reference: str
    buckets: list[Bucket]

    def bucket(self, name: str) -> Bucket:
        """Return a bucket by name. Raises: KeyError."""
        return {bucket.name: bucket for bucket in self.buckets}[name]

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, the numbers of a bucket beside its name."""
        value = plain(self)
        value["buckets"] = [{**bucket.pop("numbers"), **bucket} for bucket in value["buckets"]]
        return value

    def parts(self) -> list[str]:
        """Return a Markdown table of all numbers, one of their changes, and that a TopK SAE's L0 cannot move."""
        tables = []
        for field, form in (("numbers", ".4g"), ("change", "+.3g")):
            rows = []
            for bucket in self.buckets:
                if found := getattr(bucket, field):
                    name = f"**{bucket.name}**" if bucket.name == self.reference else bucket.name
                    counts = f"{bucket.n_tokens:,}", f"{bucket.n_documents:,}"
                    rows.append([name, *counts, *(shown(found[key], form) for key in KEYS)])
            head = " | ".join(label(f"card.{key}") for key in KEYS)
            tables.append(table(f"{self.by} | tokens | documents | {head}", rows))
        title = f"Changes against {self.reference} · Differenze rispetto a {self.reference}"
        fixed = "L0 is k by construction (TopK); `export SAE --to jumprelu` gives an SAE whose L0 moves."
        moves = len({bucket.numbers["l0"] for bucket in self.buckets}) > 1
        return [tables[0], title, tables[1], *([] if moves else [fixed])]

    def save(self, folder: Path) -> None:
        """Write shift.json, shift.md and shift.svg."""
        title = f"# Shift by {self.by}: {self.sae or self.model}"
        what = f"{self.model}; {self.corpus}; windows of {self.context_size} tokens."
        save_result(folder, "shift", self.as_dict(), [title, what, *self.parts()], shift=self.svg())

    def svg(self) -> str:
        """Return the numbers of all buckets with their intervals, a panel per number; dotted: the reference."""
        places = list(range(len(self.buckets)))[::-1]

        def draw(axes: Any) -> None:
            for axis, key in zip(axes, DRAWN, strict=True):
                for place, bucket in zip(places, self.buckets, strict=True):
                    value, lo, hi = bucket.numbers[key]
                    colour = REFERENCE if bucket.name == self.reference else OURS
                    axis.plot([lo, hi], [place, place], color=colour, linewidth=2)  # NaN is not drawn
                    axis.plot([value], [place], "o", color=colour, markersize=5)
                middle = self.bucket(self.reference).numbers[key].value
                axis.axvline(middle, color=REFERENCE, linewidth=0.8, linestyle=":")
                axis.set_yticks(places, [bucket.name if axis is axes[0] else "" for bucket in self.buckets])
                axis.set_ylim(-0.6, len(places) - 0.4)
                axis.set_title(label(f"card.{key}"), fontsize=9)

        return svg(draw, len(DRAWN), (12, 1.2 + 0.35 * len(self.buckets)))


class Condition(NamedTuple):
    """One bucket of a shift: a model (backend `hf`) on a corpus."""

    name: str
    model: Any
    corpus: str
    split: Split = "heldout"
    text_column: str = "text"
    source: str | None = None  # of the corpus' documents, only those of this source


def shift(
    sae: Any, conditions: Sequence[Condition], *, by: str, n_tokens: int = 20_000, context_size: int = 0, name: str = ""
) -> Shift:
    """Return the card's numbers under each condition, at most `n_tokens` of each, and the change from the first.

    Conditions that share a corpus (base and fine-tuned model) are compared document by document; texts that differ are
    resampled apart. Intervals are 95 %, bootstrapped over documents. `context_size` 0 is that of the SAE's training.
    Raises: UsageError for fewer than two conditions, names given twice, a model that the SAE does not fit, an empty corpus.
    """
    names = [condition.name for condition in conditions]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"a shift by {by} needs two or more buckets of different names; given: {', '.join(names)}.")
    context = context_size or _trained(sae)
    for each in conditions:  # before the first one's minutes
        _check(sae, each.model, context)
        check_corpus(each.corpus, reader=Reader(split=each.split, text_column=each.text_column))
    texts = list(dict.fromkeys((condition.corpus, condition.source) for condition in conditions))
    sums: dict[str, TokenSums] = {}
    for number, (bucket, model, corpus, split, column, source) in enumerate(conditions):
        batches = corpus_windows(model, corpus, context, n_tokens, split, column, source)
        seed = texts.index((corpus, source))  # documents of one text are resampled alike
        with one_of(len(conditions) - number):
            sums |= _summed(sae, model, batches, {bucket: (0, context)}, seed, n_tokens)
    corpora = ", ".join(dict.fromkeys(corpus for corpus, _ in texts))
    return _result(by, sae, corpora, context, name, sums, names[0])


def genres(corpus: str, text_column: str = "text") -> dict[str, tuple[str, str | None]]:
    """Return by name the corpus of each genre, and the source of its documents where these share one corpus.

    A genre is a subfolder or a table of a corpus folder; of a corpus that is no such folder, a value of its column `source`.
    Raises: UsageError for a folder of .txt files alone, whose files are documents, and for fewer than two sources.
    """
    folder = Path(corpus)
    shards = sorted((shard.name, shard.kind) for shard in local_shards(folder)) if folder.is_dir() else []
    if not shards or shards[0][1] == ".arrow":
        some = islice(iter_documents(corpus, text_column=text_column), DOCUMENTS_FOR_SOURCES)
        sources = list(dict.fromkeys(document.source for document in some))
        if len(sources) < 2:
            raise UsageError(
                f"{corpus} has no genres: a folder with a subfolder or table for each, or a column `source` with two values "
                "or more, was expected. Or give --buckets NAME=CORPUS ..."
            )
        return {source: (corpus, source) for source in sources}
    found = {name.split("/")[0]: "" if "/" in name else kind for name, kind in shards}
    found = {name: kind for name, kind in found.items() if kind not in (".txt", ".txt.gz")}
    if not found:
        raise UsageError(
            f"the .txt files of {corpus} are taken for documents, not for genres. Put each genre's into a folder of its "
            "own, or give --buckets NAME=FILE ..."
        )
    return {name[: len(name) - len(kind)]: (str(folder / name), None) for name, kind in found.items()}


def context_shift(
    sae: Any,
    model: Any,
    corpus: str,
    *,
    edges: Sequence[int] | None = None,
    n_tokens: int = 100_000,
    split: Split = "heldout",
    packed: bool = False,
    text_column: str = "text",
    name: str = "",
) -> Shift:
    """Return the card's numbers by position in the context, and the change from the last bucket the training knew.

    `edges` are the buckets' bounds, in tokens (default: `default_edges`). Each document of at least the last edge's length
    gives its beginning, as in the paper; `packed` fills windows with short documents, one after the other, as training does.
    Raises: UsageError for edges that do not rise or exceed the model, and when no document is that long.
    """
    trained = _trained(sae)
    bounds = list(edges or default_edges(trained, getattr(model.config, "max_position_embeddings", None)))
    if len(bounds) < 3 or bounds[0] < 0 or any(low >= high for low, high in pairwise(bounds)):
        raise UsageError(f"the context's edges are {bounds}; three or more rising numbers were expected.")
    _check(sae, model, bounds[-1])
    spans = {f"{low}-{high}": (low, high) for low, high in pairwise(bounds)}
    windows = corpus_windows if packed else _long_documents
    batches = windows(model, corpus, bounds[-1], n_tokens, split, text_column)
    sums = _summed(sae, model, batches, spans, 0, n_tokens)
    known = [bucket for bucket, (_, last) in spans.items() if last <= trained]
    return _result("context", sae, corpus, bounds[-1], name, sums, (known or [*spans][:1])[-1])


def default_edges(trained: int, longest: int | None) -> list[int]:
    """Return 0, half the training's context, all of it, and its doubles as far as the model goes (at most LONGEST)."""
    limit = min(longest or LONGEST * trained, LONGEST * trained)
    doubles = [trained * 2**i for i in range(1, LONGEST.bit_length()) if trained * 2**i < limit]
    return [0, trained // 2, trained, *doubles, *([limit] if limit > trained else [])]


def _trained(sae: Any) -> int:
    return int(sae.cfg.metadata.context_size or 128)


def _check(sae: Any, model: Any, context: int) -> None:
    check_fits(sae, model, writes=True)
    check_context(context, model.config)


# --- sums ------------------------------------------------------------------------------------------------------------


def _summed(
    sae: Any, model: Any, batches: Iterable[Windows], spans: Mapping[str, tuple[int, int]], seed: int, n_tokens: int
) -> dict[str, TokenSums]:
    """Return what is summed up over windows, by span of positions: from the first number to before the second."""
    sums = {name: TokenSums(getattr(sae.cfg, "d_out", sae.cfg.d_in), seed) for name in spans}
    what = f"shift, {', '.join(spans)}"
    for windows in paced(batches, what, n_tokens, "token", size=lambda windows: len(windows.doc)):
        rows, _, y, _ = measure(sae, model, *hooks_of(sae), windows, with_loss=True)
        position = windows.keep.nonzero()[:, 1].numpy()
        for name, (low, high) in spans.items():
            here = (low <= position) & (position < high)
            if here.any():
                sums[name].add(windows.doc[here], {key: column[here] for key, column in rows.items()}, y[here])
    return sums


def _result(
    by: str, sae: Any, corpus: str, context: int, name: str, sums: Mapping[str, TokenSums], reference: str
) -> Shift:
    buckets = []
    for bucket, own in sums.items():
        change = {} if bucket == reference else {key: _change(key, own, sums[reference]) for key in KEYS}
        numbers = {key: own.estimate(STATISTICS[key]) for key in KEYS}
        n_tokens = int(own.total[0, 0])  # the first of the sums counts them
        buckets.append(Bucket(bucket, n_tokens, own.n_clusters, numbers, change))
    return Shift(by, name, str(sae.cfg.metadata.model_name), corpus, context, reference, buckets)


def _change(key: str, own: TokenSums, reference: TokenSums) -> Estimate:
    """Return by how much a number differs from the reference's: documents that both hold are resampled together."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, resampled = (STATISTICS[key](each) for each in (own.total, own.resampled))
        other, theirs = (STATISTICS[key](each) for each in (reference.total, reference.resampled))
    return interval(float((value - other)[0]), resampled - theirs, min(own.n_clusters, reference.n_clusters))


# --- windows ---------------------------------------------------------------------------------------------------------


def _windows_per_batch(model: Any, context: int) -> int:
    return max(1, min(TOKENS_PER_BATCH, BATCH_LOGITS // model.config.vocab_size) // context)


def corpus_windows(
    model: Any,
    corpus: str,
    context: int,
    n_tokens: int,
    split: Split = "all",
    text_column: str = "text",
    source: str | None = None,
) -> Iterator[Windows]:
    """Yield windows of at most `n_tokens` tokens that count, a batch at a time. Raises: UsageError when there are none."""
    size, every = _windows_per_batch(model, context), iter_documents(corpus, split, text_column=text_column)
    documents = every if source is None else (document for document in every if document.source == source)
    blocks = pack(documents, model.tokenizer, context, windows_per_block=size)
    yield from windows_until(blocks, model.tokenizer, [n_tokens], f"the {split} split of {corpus}", at_most=True)


def _long_documents(
    model: Any, corpus: str, context: int, n_tokens: int, split: Split, text_column: str
) -> Iterator[Windows]:
    """Yield the first window of each document that fills one. Raises: UsageError when none does."""

    def first_windows() -> Iterator[tuple[int, np.ndarray]]:
        last, in_vain = 0, IN_VAIN if MICRO_ITALIANO in mixture(corpus)[0] else float("inf")
        for number, document in enumerate(iter_documents(corpus, split, text_column=text_column)):
            if number - last > in_vain:
                return
            if len(document.text) >= context:  # a token has at least one character
                packer = Packer(context, layout_of(model.tokenizer))
                packer.add([document], tokenise(model.tokenizer, [document.text]))
                if packer.n_windows and not ((block := packer.take(1)).doc[0, 1:] == NO_DOCUMENT).any():
                    last = number
                    yield number, block.tokens

    found, size, seen = first_windows(), _windows_per_batch(model, context), 0
    while seen < n_tokens and (batch := list(islice(found, size))):
        numbers, windows = zip(*batch, strict=True)
        tokens = np.concatenate(windows)
        keep = ~special_mask(tokens, model.tokenizer)
        seen += int(keep.sum())
        yield Windows(torch.from_numpy(tokens), torch.from_numpy(keep), np.repeat(numbers, keep.sum(axis=1)))
    if not seen:
        raise UsageError(
            f"the {split} split of {corpus} has no document of {context:,} tokens. Give smaller edges, a corpus of longer "
            "documents, or packed=true."
        )

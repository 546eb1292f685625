"""The evaluation card's numbers, bucket by bucket: along the context, and from one text, language or model to another.

Llama Scope shows them as pictures (section 4.4: longer contexts, fig. 5; the Instruct model, fig. 6). What is summed per
document, and every statistic of it, is the card's own (`training/evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from sae_italian.analysis.shift.report import KEYS, Bucket, Shift
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, interval
from sae_italian.corpora import PackedBlock, Split, TextDocument, iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT, special_mask
from sae_italian.evaluation.diagnosis import hooks_of
from sae_italian.evaluation.evaluate import (
    STATISTICS,
    TOKENS_PER_BATCH,
    TokenSums,
    Windows,
    check_output,
    measure,
    windows_until,
)
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits

BY = ("context", "genre", "language", "model")
LONGEST = 8  # contexts of the training: how far beyond it the buckets go by default


@dataclass(frozen=True)
class Condition:
    """One bucket of a shift: a model (backend `hf`) on a corpus."""

    name: str
    model: Any
    corpus: str
    split: Split = "heldout"
    text_column: str = "text"


class _Sums:
    """What one bucket sums up."""

    def __init__(self, name: str, d_out: int, seed: int):
        self.name, self.tokens, self.sums = name, 0, TokenSums(d_out, seed)

    def add(self, doc: np.ndarray, rows: Mapping[str, np.ndarray], y: np.ndarray) -> None:
        if len(doc):
            self.sums.add(doc, dict(rows), y)
            self.tokens += len(doc)

    def bucket(self, reference: _Sums) -> Bucket:
        """Return the numbers, and how they differ from those of the reference."""
        numbers = {key: self.sums.bootstrap.estimate(STATISTICS[key]) for key in KEYS}
        change = {} if reference is self else {key: self._difference(reference, STATISTICS[key]) for key in KEYS}
        if self.sums.n_documents < 2:  # one document says nothing of how documents differ
            numbers = {key: Estimate(found.value, np.nan, np.nan) for key, found in numbers.items()}
        if min(self.sums.n_documents, reference.sums.n_documents) < 2:
            change = {key: Estimate(found.value, np.nan, np.nan) for key, found in change.items()}
        return Bucket(self.name, self.tokens, self.sums.n_documents, numbers, change)

    def _difference(self, reference: _Sums, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return statistic - statistic of the reference; documents that both hold are resampled together."""
        ours, theirs = self.sums.bootstrap, reference.sums.bootstrap
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(ours.total)[0] - statistic(theirs.total)[0])
            return interval(value, statistic(ours.resampled) - statistic(theirs.resampled))


def shift(
    sae: Any,
    conditions: Sequence[Condition],
    *,
    by: str,
    n_tokens: int = 20_000,
    context_size: int | None = None,
    name: str = "",
) -> Shift:
    """Return the card's numbers under each condition, at most `n_tokens` of each, and the change from the first.

    Conditions that share a corpus (base and fine-tuned model) are compared document by document; texts that differ are
    resampled apart. Intervals are 95 %, bootstrapped over documents.
    Raises: UsageError for fewer than two conditions, names given twice, a model that the SAE does not fit, an empty corpus.
    """
    names = [condition.name for condition in conditions]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"a shift by {by} needs two or more buckets of different names; given: {', '.join(names)}.")
    context = int(context_size or sae.cfg.metadata.context_size or 128)
    for condition in conditions:
        _check(sae, condition.model, context)
    corpora = list(dict.fromkeys(condition.corpus for condition in conditions))
    buckets = []
    for condition in conditions:
        sums = _Sums(condition.name, _d_out(sae), seed=corpora.index(condition.corpus))
        documents = iter_documents(condition.corpus, condition.split, text_column=condition.text_column)
        tokenizer = condition.model.tokenizer
        blocks = _blocks(documents, tokenizer, context)
        what = f"the {condition.split} split of {condition.corpus} ({condition.name})"
        with tqdm(total=n_tokens, desc=condition.name, unit="tok", unit_scale=True, disable=None) as bar:
            for windows in windows_until(blocks, tokenizer, [n_tokens], what, at_most=True):
                rows, _, y = measure(sae, condition.model, *hooks_of(sae), windows, with_loss=True)
                sums.add(windows.doc, rows, y)
                bar.update(len(windows.doc))
        buckets.append(sums)
    found = [sums.bucket(buckets[0]) for sums in buckets]
    return Shift(by, name, str(sae.cfg.metadata.model_name), ", ".join(corpora), context, names[0], found)


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

    `edges` are the buckets' bounds, in tokens: 0, half the training's context, that context, and twice as much each time
    up to the model's longest (at most eight times the training's). Each document of at least the last edge's length gives
    its beginning, as in the paper; `packed` fills windows with short documents, one after the other, as training does.
    Raises: UsageError for edges that do not rise or exceed the model, and when no document is that long.
    """
    trained = int(sae.cfg.metadata.context_size or 128)
    bounds = list(edges) if edges else default_edges(trained, getattr(model.config, "max_position_embeddings", None))
    if len(bounds) < 3 or bounds[0] < 0 or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise UsageError(f"the context's edges are {bounds}; three or more rising numbers of tokens were expected.")
    _check(sae, model, bounds[-1])
    spans = list(zip(bounds, bounds[1:], strict=False))
    sums = [_Sums(f"{low}-{high}", _d_out(sae), seed=0) for low, high in spans]
    documents = iter_documents(corpus, split, text_column=text_column)
    what = f"the {split} split of {corpus}"
    if packed:
        blocks = _blocks(documents, model.tokenizer, bounds[-1])
        batches = windows_until(blocks, model.tokenizer, [n_tokens], what, at_most=True)
    else:
        batches = _long_documents(documents, model.tokenizer, bounds[-1], n_tokens, what)
    with tqdm(total=n_tokens, desc="shift by context", unit="tok", unit_scale=True, disable=None) as bar:
        for windows in batches:
            rows, _, y = measure(sae, model, *hooks_of(sae), windows, with_loss=True)
            position = windows.keep.nonzero()[:, 1].numpy()
            for (low, high), bucket in zip(spans, sums, strict=True):
                here = (low <= position) & (position < high)
                bucket.add(windows.doc[here], {key: column[here] for key, column in rows.items()}, y[here])
            bar.update(len(position))
    known = [bucket for bucket, (_, high) in zip(sums, spans, strict=True) if high <= trained]
    reference = known[-1] if known else sums[0]
    found = [bucket.bucket(reference) for bucket in sums]
    return Shift("context", name, str(sae.cfg.metadata.model_name), corpus, bounds[-1], reference.name, found)


def default_edges(trained: int, longest: int | None) -> list[int]:
    """Return 0, half the training's context, all of it, and its doubles as far as the model goes."""
    limit = min(longest or LONGEST * trained, LONGEST * trained)
    edges = [0, trained // 2, trained]
    while 2 * edges[-1] <= limit:
        edges.append(2 * edges[-1])
    return edges if edges[-1] == limit or limit < trained else [*edges, limit]


def _check(sae: Any, model: Any, context: int) -> None:
    check_fits(sae, model)
    check_output(sae, model, hooks_of(sae)[1])
    check_context(context, model.config)


def _d_out(sae: Any) -> int:
    return getattr(sae.cfg, "d_out", sae.cfg.d_in)


def _blocks(documents: Iterable[TextDocument], tokenizer: Any, context: int) -> Iterator[PackedBlock]:
    """Yield windows a batch at a time; few documents are read ahead, for held-out ones can be slow to come by."""
    return pack(
        documents, tokenizer, context, windows_per_block=max(1, TOKENS_PER_BATCH // context), documents_per_batch=16
    )


def _long_documents(
    documents: Iterable[TextDocument], tokenizer: Any, context: int, n_tokens: int, what: str
) -> Iterator[Windows]:
    """Yield the first window of each document that fills one. Raises: UsageError when none does."""
    found = _first_windows(documents, tokenizer, context)
    size, seen = max(1, TOKENS_PER_BATCH // context), 0
    while seen < n_tokens and (batch := list(islice(found, size))):
        tokens = np.concatenate([window for _, window in batch])
        numbers = np.array([number for number, _ in batch])
        keep = ~special_mask(tokens, tokenizer)
        seen += int(keep.sum())
        yield Windows(torch.from_numpy(tokens), torch.from_numpy(keep), np.repeat(numbers, keep.sum(axis=1)))
    if not seen:
        raise UsageError(
            f"{what} has no document of {context:,} tokens. Give smaller edges, a corpus of longer documents, or --packed."
        )


def _first_windows(
    documents: Iterable[TextDocument], tokenizer: Any, context: int
) -> Iterator[tuple[int, Int[np.ndarray, "1 context"]]]:
    """Yield the document's number and first window, of documents that are long enough for one."""
    for number, document in enumerate(documents):
        if len(document.text) < context:  # a token has at least one character
            continue
        block = next(pack([document], tokenizer, context, windows_per_block=1), None)
        if block is not None and not (block.doc[0, 1:] == NO_DOCUMENT).any():
            yield number, block.tokens

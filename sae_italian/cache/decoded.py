"""Text and offsets of windows of which only the tokens are known: each stretch between special tokens is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae_italian.base.errors import UsageError
from sae_italian.corpora import PackedBlock, TextDocument
from sae_italian.corpora.packing import NO_DOCUMENT, special_mask

UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


def decoded_blocks(blocks: Iterable[Int[np.ndarray, "windows context"]], tokenizer: Any) -> Iterator[PackedBlock]:
    """Yield blocks whose documents are the stretches between special tokens of a window, decoded as a whole.

    Without a tokenizer every window is a document without text. Raises: UsageError for a token that it does not have.
    """
    n_documents = n_windows = 0
    for tokens in blocks:
        if tokenizer is not None and tokens.max() >= len(tokenizer):
            raise UsageError(
                f"the windows hold token {tokens.max()}, the tokenizer has {len(tokenizer)}: it is another model's. "
                "Give the model that they were made with."
            )
        doc = np.full(tokens.shape, NO_DOCUMENT, dtype=np.int64)
        spans = np.zeros((*tokens.shape, 2), dtype=np.int64)
        special = np.zeros(tokens.shape, dtype=bool) if tokenizer is None else special_mask(tokens, tokenizer)
        places, documents = list(_stretches(special)), []
        texts = _decoded([tokens[row, begin:stop].tolist() for row, begin, stop in places], tokenizer)
        for (row, begin, stop), (text, own) in zip(places, texts, strict=True):
            doc[row, begin:stop], spans[row, begin:stop] = n_documents + len(documents), own
            name = f"window {n_windows + row}" + ("" if tokenizer is None else f", token {begin}")
            documents.append(TextDocument(text, name, ""))
        yield PackedBlock(tokens, doc, spans[..., 0], spans[..., 1], documents, n_documents)
        n_documents += len(documents)
        n_windows += len(tokens)


def _stretches(special: Bool[np.ndarray, "windows context"]) -> Iterator[tuple[int, int, int]]:
    """Yield (window, first token, end) of every stretch without special tokens."""
    for row, mask in enumerate(special):
        edges = np.flatnonzero(np.diff(np.concatenate([[True], mask, [True]])))
        for begin, stop in edges.reshape(-1, 2).tolist():
            yield row, begin, stop


def _decoded(stretches: list[list[int]], tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield each stretch's text and its tokens' spans: the tokenizer's own where it gives the same tokens again."""
    if tokenizer is None or not stretches:
        yield from [("", 0)] * len(stretches)
        return
    texts = tokenizer.batch_decode(stretches, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for ids, text, found, spans in zip(stretches, texts, again["input_ids"], again["offset_mapping"], strict=True):
        yield text, np.array(spans) if found == ids else spans_by_prefixes(ids, text, tokenizer)


def spans_by_prefixes(ids: list[int], text: str, tokenizer: Any) -> Int[np.ndarray, "tokens 2"]:
    """Return the span of each token: what the decoded text grows by with it.

    The tokens of one character that is split over several share its span.
    """
    prefixes = tokenizer.batch_decode([ids[: i + 1] for i in range(len(ids))], clean_up_tokenization_spaces=False)
    ends = np.array([len(prefix.rstrip(UNFINISHED)) for prefix in prefixes])
    ends = np.minimum(np.maximum.accumulate(ends), len(text))
    starts = np.concatenate([[0], ends[:-1]])
    unfinished = [i for i, prefix in enumerate(prefixes) if prefix.endswith(UNFINISHED) and ends[i] < len(text)]
    ends[unfinished] += 1
    return np.stack([starts, ends], axis=1)

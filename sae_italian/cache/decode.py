"""Text and character offsets of windows of which only the tokens are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from sae_italian.corpora import PackedBlock, TextDocument
from sae_italian.corpora.packing import NO_DOCUMENT, special_mask

Windows = Int[np.ndarray, "windows context"]
UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


def plain_blocks(tokens: Windows, windows_per_block: int) -> Iterator[PackedBlock]:
    """Yield blocks without text: every window is a document of its own, and all spans are empty."""
    for first in range(0, len(tokens), windows_per_block):
        here = tokens[first : first + windows_per_block]
        doc = np.broadcast_to(np.arange(first, first + len(here))[:, None], here.shape)
        nothing = np.zeros(here.shape, dtype=np.int64)
        documents = [TextDocument("", f"window {first + i}", "") for i in range(len(here))]
        yield PackedBlock(here, doc, nothing, nothing, documents, first)


def decoded_blocks(tokens: Windows, windows_per_block: int, tokenizer: Any) -> Iterator[PackedBlock]:
    """Yield blocks whose documents are the stretches between special tokens of a window, decoded as a whole."""
    n_documents = 0
    for first in range(0, len(tokens), windows_per_block):
        here = tokens[first : first + windows_per_block]
        doc = np.full(here.shape, NO_DOCUMENT, dtype=np.int64)
        start, end = np.zeros(here.shape, dtype=np.int64), np.zeros(here.shape, dtype=np.int64)
        places = list(_stretches(special_mask(here, tokenizer)))
        texts = tokenizer.batch_decode(
            [here[row, begin:stop].tolist() for row, begin, stop in places], clean_up_tokenization_spaces=False
        )
        documents = []
        for (row, begin, stop), text, spans in zip(places, texts, _spans(here, places, texts, tokenizer), strict=True):
            doc[row, begin:stop] = n_documents + len(documents)
            start[row, begin:stop], end[row, begin:stop] = spans.T
            documents.append(TextDocument(text, f"window {first + row}, token {begin}", ""))
        yield PackedBlock(here, doc, start, end, documents, n_documents)
        n_documents += len(documents)


def _stretches(special: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (window, first token, end) of every stretch without special tokens."""
    for row, mask in enumerate(special):
        edges = np.flatnonzero(np.diff(np.concatenate([[True], mask, [True]])))
        for begin, stop in edges.reshape(-1, 2).tolist():
            yield row, begin, stop


def _spans(tokens: np.ndarray, places: list[tuple[int, int, int]], texts: list[str], tokenizer: Any) -> Iterator[Any]:
    """Yield each stretch's character spans: those of the tokenizer where it gives the same tokens again."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
    for i, (row, begin, stop) in enumerate(places):
        ids = tokens[row, begin:stop].tolist()
        again = encoded["input_ids"][i] == ids
        yield np.array(encoded["offset_mapping"][i]) if again else spans_by_prefixes(ids, texts[i], tokenizer)


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

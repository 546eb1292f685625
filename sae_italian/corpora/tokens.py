"""Token ids and character offsets of whole documents, from one call of the Rust tokenizer for many, on all CPUs.

A document is tokenised once, as a whole; text is later rebuilt from the offsets, whatever the tokenizer does with spaces
and accents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from sae_italian.base.errors import UsageError
from sae_italian.corpora.stream import TextDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CALL = 2**20  # characters in one call; a token's encoding takes some hundred bytes until its numbers are taken out


class TokenBatch(NamedTuple):
    """The tokens of several documents, one after the other; offsets are characters of a document's text, [start, end)."""

    flat: Int32[np.ndarray, "tokens 3"]  # id, start, end
    bounds: Int[np.ndarray, " documents+1"]  # of the documents, in `flat`

    def documents(self) -> Iterator[Int32[np.ndarray, "3 tokens"]]:
        """Yield ids, starts and ends of each document."""
        for begin, end in pairwise(self.bounds.tolist()):
            yield self.flat[begin:end].T


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust tokenizer inside. Raises: UsageError when there is none, so no offsets either."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets; a fast one is needed."
        )
    # A special token that is typed in a text becomes that token, as in SAELens; `encode_special_tokens = True` on a copy
    # would make it characters.
    if backend.truncation or backend.padding:  # left from an earlier call; documents are never cut
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend


def tokenise(backend: Any, texts: list[str]) -> TokenBatch:
    """Return the tokens of each text, without those that a tokenizer adds around it."""
    parts, counts = [], [0]
    for call in _calls(texts):
        encodings = backend.encode_batch(call, add_special_tokens=False)
        counts += map(len, encodings)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32)
        offsets = np.fromiter(chain.from_iterable(chain.from_iterable(e.offsets for e in encodings)), np.int32)
        parts.append(np.column_stack([ids, offsets.reshape(-1, 2)]))
    return TokenBatch(np.concatenate(parts or [np.empty((0, 3), np.int32)]), np.cumsum(counts))


def _calls(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in runs of at most MAX_CALL characters, or one longer text."""
    run: list[str] = []
    size = 0
    for text in texts:
        if run and size + len(text) > MAX_CALL:
            yield run
            run, size = [], 0
        run.append(text)
        size += len(text)
    if run:
        yield run


def tokenise_batches(
    batches: Iterable[list[TextDocument]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[TextDocument], TokenBatch]]:
    """Yield each batch of documents with its tokens."""
    backend = fast_backend(tokenizer)
    for batch in batches:
        yield batch, tokenise(backend, [document.text for document in batch])

"""Pack documents into windows of a fixed number of tokens, keeping for every token its document and character span.

A BOS opens every window and separates documents, as SAELens packs by default. A document is tokenised once, whole, so
character offsets are exact and text can be rebuilt from them, whatever the tokenizer does with spaces and accents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_italian.corpora.documents import TextDocument
from sae_italian.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_DOCUMENT = np.iinfo(np.uint32).max  # the document index of BOS tokens


class PackedBlock(NamedTuple):
    """Some consecutive windows, and the documents whose first token lies in them."""

    tokens: Int[np.ndarray, "windows context"]
    doc: Int[np.ndarray, "windows context"]  # running document index, NO_DOCUMENT at BOS
    start: Int[np.ndarray, "windows context"]  # character offsets in the document's text
    end: Int[np.ndarray, "windows context"]
    documents: list[TextDocument]
    first_doc: int  # running index of documents[0]


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that opens every window. Raises UsageError when the tokenizer has neither BOS nor EOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)  # pyright: ignore[reportArgumentType]
    raise UsageError("the tokenizer has neither a BOS nor an EOS token; windows need one to open with.")


class _Piece(NamedTuple):
    """The tokens of one document, its BOS first."""

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray


def pack(
    documents: Iterable[TextDocument],
    tokenizer: PreTrainedTokenizerBase,
    context_size: int,
    *,
    windows_per_block: int = 256,
    documents_per_batch: int = 64,
) -> Iterator[PackedBlock]:
    """Yield blocks of `windows_per_block` full windows, the last block shorter; a window that is not full is dropped.

    The result depends on the documents, the tokenizer and the two sizes that shape it, never on `documents_per_batch`.
    Raises: UsageError when context_size leaves no room for text.
    """
    if context_size < 2:
        raise UsageError(f"context_size is {context_size}; at least 2 is needed, one token of it is the BOS.")
    packer = _Packer(context_size, bos_id(tokenizer))
    iterator = iter(documents)
    while batch := list(islice(iterator, documents_per_batch)):
        for document, piece in zip(batch, _tokenise(batch, tokenizer), strict=True):
            packer.add(document, piece)
            while len(packer.windows) >= windows_per_block:
                yield packer.take(windows_per_block)
    if packer.windows:
        yield packer.take(len(packer.windows))


def _tokenise(batch: list[TextDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Piece]:
    """Tokenise whole documents without special tokens; prepend one BOS of empty span to each."""
    encoded = tokenizer(
        [document.text for document in batch],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    bos = bos_id(tokenizer)
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):  # pyright: ignore
        tokens = np.empty(len(ids) + 1, dtype=np.int64)
        tokens[0], tokens[1:] = bos, ids
        spans = np.zeros((len(ids) + 1, 2), dtype=np.uint32)
        if ids:
            spans[1:] = offsets
        yield _Piece(tokens, spans[:, 0], spans[:, 1])


class _Packer:
    """Fills windows one after the other; `windows` are the full ones not yet taken."""

    def __init__(self, context_size: int, bos: int):
        self.context_size, self.bos = context_size, bos
        self.windows: list[np.ndarray] = []  # each [4, context]: tokens, doc, start, end
        self.documents: list[tuple[int, TextDocument]] = []  # (number of the window of its first token, document)
        self.n_documents = 0
        self.n_taken = self.documents_taken = 0
        self._open_window()

    def _open_window(self) -> None:
        self.current = np.zeros((4, self.context_size), dtype=np.int64)
        self.current[0, 0], self.current[1, 0] = self.bos, NO_DOCUMENT
        self.filled = 1

    def _close_window(self) -> None:
        self.windows.append(self.current)
        self._open_window()

    def add(self, document: TextDocument, piece: _Piece) -> None:
        """Append one document; at the very start of a window its BOS is the window's own."""
        position = 1 if self.filled == 1 else 0
        if self.filled == self.context_size - 1 and position == 0:  # no room for a BOS and a token: pad with the BOS
            self.current[0, -1], self.current[1, -1] = self.bos, NO_DOCUMENT
            self._close_window()
            position = 1
        self.documents.append((self.n_taken + len(self.windows), document))
        index, self.n_documents = self.n_documents, self.n_documents + 1
        while position < len(piece.tokens):
            room = min(self.context_size - self.filled, len(piece.tokens) - position)
            here, there = slice(self.filled, self.filled + room), slice(position, position + room)
            self.current[0, here], self.current[1, here] = piece.tokens[there], index
            self.current[2, here], self.current[3, here] = piece.start[there], piece.end[there]
            if position == 0:
                self.current[1, self.filled] = NO_DOCUMENT
            self.filled += room
            position += room
            if self.filled == self.context_size:
                self._close_window()

    def take(self, n_windows: int) -> PackedBlock:
        block = np.stack(self.windows[:n_windows])
        del self.windows[:n_windows]
        self.n_taken += n_windows
        split = next((i for i, (window, _) in enumerate(self.documents) if window >= self.n_taken), len(self.documents))
        documents = [document for _, document in self.documents[:split]]
        del self.documents[:split]
        first = self.documents_taken
        self.documents_taken += len(documents)
        return PackedBlock(block[:, 0], block[:, 1], block[:, 2], block[:, 3], documents, first)


def special_mask(tokens: Int[np.ndarray, "*shape"], tokenizer: PreTrainedTokenizerBase) -> Bool[np.ndarray, "*shape"]:
    """Return True where a token is one of the tokenizer's special tokens, as SAELens' `exclude_special_tokens`."""
    return np.isin(tokens, tokenizer.all_special_ids)


def take_tokens(blocks: Iterator[PackedBlock], n_tokens: int, what: str) -> Iterator[PackedBlock]:
    """Yield blocks until `n_tokens` tokens are reached, cutting the last block to whole windows.

    Raises: UsageError when the blocks end before.
    """
    seen = 0
    for block in blocks:
        context = block.tokens.shape[1]
        wanted = -(-(n_tokens - seen) // context)
        if wanted < len(block.tokens):
            block = block._replace(**{key: getattr(block, key)[:wanted] for key in ("tokens", "doc", "start", "end")})
        seen += block.tokens.size
        yield block
        if seen >= n_tokens:
            return
    raise UsageError(
        f"{what} has about {seen:,} tokens, fewer than the {n_tokens:,} asked for. Ask for fewer, or use more text."
    )

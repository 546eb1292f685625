"""Pack documents into windows of a fixed number of tokens, keeping for every token its document and character span.

By default a BOS opens every window and separates documents, as in SAELens. A document's tokens and character offsets are
those of the tokenizer on the whole document, so text can be rebuilt from them, whatever it does with spaces and accents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_italian.corpora.documents import TextDocument
from sae_italian.corpora.parallel import tokenise_batches
from sae_italian.corpora.words import Tokens
from sae_italian.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_DOCUMENT = np.iinfo(np.uint32).max  # the document index of BOS and separator tokens


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


class Layout(NamedTuple):
    """What stands between documents, by id: `bos` opens every window, `separator` comes between two documents."""

    bos: int | None
    separator: int | None


def layout_of(
    tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool = True, separator: str | int | None = "bos"
) -> Layout:
    """Return the layout in SAELens' words: `prepend_bos`, and a separator "bos", "eos", "sep", an id or None.

    Raises: UsageError when the tokenizer has no such token.
    """
    bos = bos_id(tokenizer) if prepend_bos else None
    if separator is None or isinstance(separator, int):
        return Layout(bos, separator)
    if separator not in ("bos", "eos", "sep"):
        raise UsageError(
            f"separator {separator!r} is unknown. {nearest(separator, ('bos', 'eos', 'sep'))} Or give an id."
        )
    found = bos_id(tokenizer) if separator == "bos" else getattr(tokenizer, f"{separator}_token_id")
    if found is None:
        raise UsageError(f"the tokenizer has no {separator} token; give the separator's id, or none.")
    return Layout(bos, int(found))


def pack(
    documents: Iterable[TextDocument],
    tokenizer: PreTrainedTokenizerBase,
    context_size: int,
    *,
    windows_per_block: int = 256,
    documents_per_batch: int = 64,
    layout: Layout | None = None,
    workers: int = 1,
) -> Iterator[PackedBlock]:
    """Yield blocks of `windows_per_block` full windows, the last block shorter; a window that is not full is dropped.

    The result depends on the documents, the tokenizer, the layout and the two sizes that shape it, never on
    `documents_per_batch` or `workers` (processes that tokenise; 1: this one).
    Raises: UsageError when context_size leaves no room for text.
    """
    check_context(context_size)
    packer = Packer(context_size, layout or layout_of(tokenizer))
    for batch, tokens in tokenise_batches(batched(documents, documents_per_batch), tokenizer, workers):
        for document, piece in zip(batch, tokens, strict=True):
            packer.add(document, piece)
            while len(packer.windows) >= windows_per_block:
                yield packer.take(windows_per_block)
    if packer.windows:
        yield packer.take(len(packer.windows))


def check_context(context_size: int) -> None:
    if context_size < 2:
        raise UsageError(f"context_size is {context_size}; at least 2 is needed, one token of it is the BOS.")


def batched(documents: Iterable[TextDocument], size: int) -> Iterator[list[TextDocument]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch


class Packer:
    """Fills windows one after the other; `windows` are the full ones not yet taken."""

    def __init__(self, context_size: int, layout: Layout):
        self.context_size, self.layout = context_size, layout
        self.windows: list[np.ndarray] = []  # each [4, context]: tokens, doc, start, end
        self.documents: list[tuple[int, TextDocument]] = []  # (number of the window of its first token, document)
        self.n_documents = 0
        self.n_taken = self.documents_taken = 0
        self._open_window()

    def _open_window(self) -> None:
        self.current = np.zeros((4, self.context_size), dtype=np.int64)
        self.filled = 0
        if self.layout.bos is not None:
            self._special(self.layout.bos)
        self.opening = self.filled

    def _special(self, token: int) -> None:
        self.current[0, self.filled], self.current[1, self.filled] = token, NO_DOCUMENT
        self.filled += 1

    def _close_window(self) -> None:
        self.windows.append(self.current)
        self._open_window()

    def add(self, document: TextDocument, tokens: Tokens) -> None:
        """Append one document, after a separator unless a window opens with it."""
        if self.filled > self.opening and self.layout.separator is not None:
            self._special(self.layout.separator)
            if self.filled == self.context_size:
                self._close_window()
        self.documents.append((self.n_taken + len(self.windows), document))
        index, self.n_documents = self.n_documents, self.n_documents + 1
        position, n_tokens = 0, len(tokens.ids)
        while position < n_tokens:
            room = min(self.context_size - self.filled, n_tokens - position)
            here, there = slice(self.filled, self.filled + room), slice(position, position + room)
            self.current[0, here], self.current[1, here] = tokens.ids[there], index
            self.current[2, here], self.current[3, here] = tokens.start[there], tokens.end[there]
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

    def state(self) -> dict[str, Any]:
        """Return what is left between two shards: the window being filled, and documents whose window is not full."""
        return {
            "current": self.current[:, : self.filled].tolist(),
            "windows": [window.tolist() for window in self.windows],
            "documents": [[window, *document] for window, document in self.documents],
            "n_documents": self.n_documents,
            "n_taken": self.n_taken,
            "documents_taken": self.documents_taken,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._open_window()
        self.filled = len(state["current"][0])
        self.current[:, : self.filled] = state["current"]
        self.windows = [np.array(window, np.int64) for window in state["windows"]]
        self.documents = [(window, TextDocument(*document)) for window, *document in state["documents"]]
        self.n_documents, self.n_taken = state["n_documents"], state["n_taken"]
        self.documents_taken = state["documents_taken"]


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

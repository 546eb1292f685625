"""Tokenise documents and pack them into windows of a fixed number of tokens, each with its document and character span.

By default a BOS opens every window and separates documents, as in SAELens. A document's tokens and character offsets are
those of the tokenizer on the whole document, so text can be rebuilt from them, whatever it does with spaces and accents.
A `<s>` that is typed in a document is text as any other: its characters are tokenised, it is no control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int, Int32

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.corpora.stream import TextDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CALL = 2**20  # characters in one call; a token's encoding takes some hundred bytes until its numbers are taken out
NO_DOCUMENT = np.iinfo(np.uint32).max  # the document index of BOS and separator tokens


_backends: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()  # tokenizer: (its size, its backend for text)


class TokenBatch(NamedTuple):
    """The tokens of several documents, one after the other; offsets are characters of a document's text, [start, end)."""

    flat: Int32[np.ndarray, "tokens 3"]  # id, start, end
    bounds: Int[np.ndarray, " documents+1"]  # of the documents, in `flat`

    def documents(self) -> Iterator[Int32[np.ndarray, "3 tokens"]]:
        """Yield ids, starts and ends of each document."""
        for begin, end in pairwise(self.bounds.tolist()):
            yield self.flat[begin:end].T


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a copy of the Rust tokenizer inside that neither cuts nor pads, and takes typed special tokens for text.

    Raises: UsageError when there is none, so no offsets either.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets; a fast one is needed."
        )
    size, copied = _backends.get(tokenizer, (0, None))
    if size != len(tokenizer):  # new, or tokens were added
        copied = type(backend).from_str(backend.to_str())
        copied.no_truncation()
        copied.no_padding()
        copied.encode_special_tokens = True
        _backends[tokenizer] = (len(tokenizer), copied)
    return copied


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


# --- windows ------------------------------------------------------------------------------------------------------------


class PackedBlock(NamedTuple):
    """Some consecutive windows, and the documents whose first token lies in them."""

    tokens: Int[np.ndarray, "windows context"]
    doc: Int[np.ndarray, "windows context"]  # running document index, NO_DOCUMENT at BOS
    start: Int[np.ndarray, "windows context"]  # character offsets in the document's text
    end: Int[np.ndarray, "windows context"]
    documents: list[TextDocument]
    first_doc: int  # running index of documents[0]

    def __repr__(self) -> str:
        n_windows, context = self.tokens.shape
        return f"PackedBlock({n_windows} windows of {context} tokens, {len(self.documents)} documents)"


class Layout(NamedTuple):
    """What stands between documents, by id: `bos` opens every window, `separator` comes between two documents."""

    bos: int | None
    separator: int | None


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that opens every window. Raises UsageError when the tokenizer has neither BOS nor EOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)  # pyright: ignore[reportArgumentType]
    raise UsageError("the tokenizer has neither a BOS nor an EOS token; windows need one to open with.")


def layout_of(
    tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool = True, separator: str | int | None = "bos"
) -> Layout:
    """Return the layout in SAELens' words: `prepend_bos`, and a separator "bos", "eos", "sep", an id or None.

    Raises: UsageError when the tokenizer has no such token.
    """
    bos = bos_id(tokenizer) if prepend_bos else None
    if separator is None or isinstance(separator, int):
        return Layout(bos, separator)
    names = ("bos", "eos", "sep")
    if separator not in names:
        raise UsageError(f"separator {separator!r} is unknown. {nearest(separator, names)} Or give an id.")
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
    documents_per_batch: int = 256,
    layout: Layout | None = None,
) -> Iterator[PackedBlock]:
    """Yield blocks of `windows_per_block` full windows, the last block shorter; a window that is not full is dropped.

    `documents_per_batch`, tokenised together, decides nothing of the result.
    Raises: UsageError when context_size leaves no room for text.
    """
    check_context(context_size)
    packer = Packer(context_size, layout or layout_of(tokenizer))
    for batch, tokens in tokenise_batches(batched(documents, documents_per_batch), tokenizer):
        packer.add(batch, tokens)
        while packer.n_windows >= windows_per_block:
            yield packer.take(windows_per_block)
    if packer.n_windows:
        yield packer.take(packer.n_windows)


def check_context(context_size: int) -> None:
    """Raise UsageError for a context that leaves no room for text."""
    if context_size < 2:
        raise UsageError(f"context_size is {context_size}; at least 2 is needed, one token of it is the BOS.")


def batched(documents: Iterable[TextDocument], size: int) -> Iterator[list[TextDocument]]:
    """Yield lists of `size` documents, the last one shorter."""
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch


class Packer:
    """Fills windows one after the other, a batch of documents at a time.

    `body` holds what windows hold besides the BOS that opens them (tokens, documents, starts, ends): window i is
    body[:, i * room : (i + 1) * room].
    """

    def __init__(self, context_size: int, layout: Layout):
        self.context_size, self.layout = context_size, layout
        self.opening = 0 if layout.bos is None else 1
        self.room = context_size - self.opening
        self.body = np.zeros((4, 0), np.uint32)
        self.documents: list[tuple[int, TextDocument]] = []  # (number of the window of its first token, document)
        self.n_documents = self.n_taken = self.documents_taken = 0

    @property
    def n_windows(self) -> int:
        """How many full windows can be taken."""
        return self.body.shape[1] // self.room

    def add(self, documents: list[TextDocument], tokens: TokenBatch) -> None:
        """Append documents, each after a separator unless a window opens with it."""
        sizes = np.diff(tokens.bounds)
        filled = position = self.body.shape[1]
        begins = []
        for document, size in zip(documents, sizes.tolist(), strict=True):
            if self.layout.separator is not None and position % self.room:
                position += 1
            self.documents.append((self.n_taken + position // self.room, document))
            begins.append(position)
            position += size
        added = np.zeros((4, position - filled), np.uint32)  # separators, where no document's token comes
        added[0], added[1] = self.layout.separator or 0, NO_DOCUMENT
        # from a token's place in the batch to its place here
        shift = np.array(begins, np.int64) - filled - tokens.bounds[:-1]
        place = np.arange(len(tokens.flat)) + np.repeat(shift, sizes)
        added[0, place], added[2, place], added[3, place] = tokens.flat.T
        added[1, place] = np.repeat(np.arange(self.n_documents, self.n_documents + len(sizes)), sizes)
        self.body = np.concatenate([self.body, added], axis=1)
        self.n_documents += len(sizes)

    def take(self, n_windows: int) -> PackedBlock:
        """Return the first full windows, and forget them."""
        used = n_windows * self.room
        block = np.zeros((4, n_windows, self.context_size), np.int64)
        if self.layout.bos is not None:
            block[0, :, 0], block[1, :, 0] = self.layout.bos, NO_DOCUMENT
        block[:, :, self.opening :] = self.body[:, :used].reshape(4, n_windows, self.room)
        self.body = self.body[:, used:].copy()
        self.n_taken += n_windows
        documents = [document for window, document in self.documents if window < self.n_taken]
        del self.documents[: len(documents)]  # they are in the order of their windows
        first = self.documents_taken
        self.documents_taken += len(documents)
        return PackedBlock(block[0], block[1], block[2], block[3], documents, first)

    def copy(self) -> Packer:
        """Return a packer that stays as this one is now."""
        twin = copy(self)
        twin.documents = list(self.documents)
        return twin

    def state(self) -> dict[str, Any]:
        """Return what is left between two shards: tokens not taken, and documents whose window is not full."""
        documents = [[window, *document] for window, document in self.documents]
        numbers = {key: getattr(self, key) for key in ("n_documents", "n_taken", "documents_taken")}
        return {"body": self.body.tolist(), "documents": documents, **numbers}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises: DataError for one of another version."""
        if "body" not in state:
            raise DataError("the unfinished folder was made by another version of sae_italian. Use --overwrite.")
        self.body = np.array(state["body"], np.uint32)
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
        wanted = -(-(n_tokens - seen) // block.tokens.shape[1])
        if wanted < len(block.tokens):
            arrays = ("tokens", "doc", "start", "end")
            block = block._replace(**{key: getattr(block, key)[:wanted] for key in arrays})
        seen += block.tokens.size
        yield block
        if seen >= n_tokens:
            return
    raise UsageError(
        f"{what} has about {seen:,} tokens, fewer than the {n_tokens:,} asked for. Ask for fewer, or use more text."
    )

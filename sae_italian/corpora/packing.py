"""Tokenise documents and pack them into windows of a fixed number of tokens, each with its document and character span.

By default a BOS opens every window and separates documents, as in SAELens. A document's tokens and character offsets are
those of the tokenizer on the whole document, so text can be rebuilt from them, whatever it does with spaces and accents.
A `<s>` that is typed in a document is text as any other: its characters are tokenised, it is no control token.
The numbers of a corpus under a tokenizer (fertility, lengths, share of Italian) are here too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from sae_italian.base.errors import UsageError, check_known, check_whole
from sae_italian.base.report import OURS, svg
from sae_italian.corpora.filters import language_of
from sae_italian.corpora.stream import CorpusStream, Reader, TextDocument, check_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BATCH = 2**20  # characters; a token's encoding takes some hundred bytes until its numbers are taken out
LANGUAGE_EVERY = 10  # documents; the share of Italian is measured on this sample
BINS_PER_DECADE = 4
_MARKS = re.compile("[\u0300-\u036f]+")  # accents that follow their letter, as macOS writes them
_WORD = re.compile(r"[^\W_](?:[^\W_]+|[\u0300-\u036f\u00ad]|['’](?=[^\W_]))*")  # marks and soft hyphens part no word
NO_DOCUMENT = np.iinfo(np.uint32).max  # the document index of BOS and separator tokens
Tokens = Int32[np.ndarray, "3 tokens"]  # of a document: ids, and the characters [start, end) of its text


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tokens]:
    """Return the tokens of each text, without those that a tokenizer adds around it.

    Raises: UsageError for a slow tokenizer, which has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{type(tokenizer).__name__} is a slow tokenizer without offsets; give a fast one.")
    how: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    found: Any = tokenizer(texts, **how, verbose=False) if texts else {"input_ids": [], "offset_mapping": []}
    both = zip(found["input_ids"], found["offset_mapping"], strict=True)
    tokens = [np.vstack([ids, np.array(spans, np.int32).reshape(-1, 2).T]).astype(np.int32) for ids, spans in both]
    for text, (_, start, end) in zip(texts, tokens, strict=True):
        if _MARKS.search(text):  # a tokenizer that composes letters leaves their marks out of its spans
            gaps = zip(end.tolist(), [*start[1:].tolist(), len(text)], strict=False)
            end += [len(marks[0]) if (marks := _MARKS.match(text, *gap)) else 0 for gap in gaps]
    return tokens


def batched(documents: Iterable[TextDocument], size: int) -> Iterator[list[TextDocument]]:
    """Yield lists of `size` documents, shorter ones where these are long, and at the end."""
    batch, n_characters = list[TextDocument](), 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) == size or n_characters >= MAX_BATCH:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def tokenised(
    documents: Iterable[TextDocument], tokenizer: PreTrainedTokenizerBase, size: int = 128
) -> Iterator[tuple[list[TextDocument], list[Tokens]]]:
    """Yield documents in batches of at most `size`, each with its tokens."""
    for batch in batched(documents, size):
        yield batch, tokenise(tokenizer, [document.text for document in batch])


# --- windows ------------------------------------------------------------------------------------------------------------


class TooShort(UsageError):
    """A text has fewer tokens than were asked for, or than a window takes."""


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
    if separator is None or (isinstance(separator, int) and separator in range(len(tokenizer))):
        return Layout(bos, separator)
    check_known("separator", ("bos", "eos", "sep", f"an id of 0 to {len(tokenizer) - 1}"), separator)
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
) -> Iterator[PackedBlock]:
    """Yield blocks of `windows_per_block` full windows, the last block shorter; a window that is not full is dropped.

    Raises: UsageError when context_size leaves no room for text, or there is no full window.
    """
    packer = Packer(context_size, layout_of(tokenizer))
    yield from packer.blocks(tokenised(documents, tokenizer), windows_per_block)
    if not packer.n_taken:
        text = documents if isinstance(documents, CorpusStream) else "the text"
        raise TooShort(f"{text} fills no window of {context_size} tokens. Use more text or a smaller context.")


class Packer:
    """Fills windows one after the other, a batch of documents at a time.

    `body` holds what windows hold besides the BOS that opens them (tokens, documents, starts, ends): window i is
    body[:, i * room : (i + 1) * room]. What it holds is replaced, never changed: `copy.copy` stays as it is now.
    Raises: UsageError for a context that leaves no room for text.
    """

    def __init__(self, context_size: int, layout: Layout):
        check_whole(2, context_size=context_size)  # one token of it is the BOS
        self.context_size, self.layout = context_size, layout
        self.opening = 0 if layout.bos is None else 1
        self.room = context_size - self.opening
        self.body = np.zeros((4, 0), np.uint32)
        self.documents: list[tuple[int, TextDocument]] = []  # (number of the window of its first token, document)
        self.n_documents = self.n_taken = 0  # documents added, windows taken

    @property
    def n_windows(self) -> int:
        """How many full windows can be taken."""
        return self.body.shape[1] // self.room

    def add(self, documents: list[TextDocument], tokens: list[Tokens]) -> None:
        """Append documents, each after a separator unless a window opens with it."""
        parts, position, begun = [self.body], self.body.shape[1], list(self.documents)
        separator = np.array([[self.layout.separator or 0], [NO_DOCUMENT], [0], [0]], np.uint32)
        for document, (ids, start, end) in zip(documents, tokens, strict=True):
            if self.layout.separator is not None and position % self.room:
                parts.append(separator)
                position += 1
            begun.append((self.n_taken + position // self.room, document))
            parts.append(np.stack([ids, np.full_like(ids, self.n_documents), start, end]).astype(np.uint32))
            position += len(ids)
            self.n_documents += 1
        self.body, self.documents = np.concatenate(parts, axis=1), begun

    def take(self, n_windows: int) -> PackedBlock:
        """Return the first full windows, and forget them."""
        used = n_windows * self.room
        block = np.zeros((4, n_windows, self.context_size), np.int64)
        if self.layout.bos is not None:
            block[0, :, 0], block[1, :, 0] = self.layout.bos, NO_DOCUMENT
        block[:, :, self.opening :] = self.body[:, :used].reshape(4, n_windows, self.room)
        self.body = self.body[:, used:].copy()
        self.n_taken += n_windows
        first = self.n_documents - len(self.documents)
        documents = [document for window, document in self.documents if window < self.n_taken]
        self.documents = self.documents[len(documents) :]  # they are in the order of their windows
        return PackedBlock(block[0], block[1], block[2], block[3], documents, first)

    def blocks(
        self, batches: Iterable[tuple[list[TextDocument], list[Tokens]]], windows_per_block: int
    ) -> Iterator[PackedBlock]:
        """Yield blocks as documents come, then what is left in full windows."""
        check_whole(1, windows_per_block=windows_per_block)
        for documents, tokens in batches:
            self.add(documents, tokens)
            while self.n_windows >= windows_per_block:
                yield self.take(windows_per_block)
        while self.n_windows:
            yield self.take(min(self.n_windows, windows_per_block))

    def state(self) -> dict[str, Any]:
        """Return what is left between two shards: tokens not taken, and documents whose window is not full."""
        documents = [[window, *document] for window, document in self.documents]
        numbers = {"n_documents": self.n_documents, "n_taken": self.n_taken}
        return {"body": self.body.tolist(), "documents": documents, **numbers}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.body = np.array(state["body"], np.uint32)
        self.documents = [(window, TextDocument(*document)) for window, *document in state["documents"]]
        self.n_documents, self.n_taken = state["n_documents"], state["n_taken"]


def special_mask(tokens: Int[np.ndarray, "*shape"], tokenizer: PreTrainedTokenizerBase) -> Bool[np.ndarray, "*shape"]:
    """Return True where a token is one of the tokenizer's special tokens, as SAELens' `exclude_special_tokens`."""
    return np.isin(tokens, tokenizer.all_special_ids)


def take_tokens(
    blocks: Iterator[PackedBlock], n_tokens: int, what: str, *, at_most: bool = False
) -> Iterator[PackedBlock]:
    """Yield blocks until `n_tokens` tokens are reached, cutting the last block to whole windows.

    Raises: UsageError when the blocks end before, unless `at_most`.
    """
    check_whole(1, n_tokens=n_tokens)
    seen = 0
    for block in blocks:
        wanted = -(-(n_tokens - seen) // block.tokens.shape[1])
        block = block._replace(**{name: getattr(block, name)[:wanted] for name in block._fields[:4]})
        seen += block.tokens.size
        yield block
        if seen >= n_tokens:
            return
    if not at_most:
        raise TooShort(
            f"{what} has about {seen:,} tokens, fewer than the {n_tokens:,} asked for. "
            f"Ask for fewer (--tokens {seen}), or use more text."
        )


# --- numbers of a corpus -----------------------------------------------------------------------------------------------


def corpus_stats(
    corpus: str | Path, tokenizer: PreTrainedTokenizerBase | None, *, n: int | None = 1000, reader: Reader | None = None
) -> dict[str, Any]:
    """Return the numbers of the first `n` kept documents (None: all).

    `fertility` is tokens per word, BOS not counted, None without a tokenizer; a word is a run of letters and digits, an
    elided one (`l'aria`) is one word. `typed_special_tokens` counts documents in which a special token such as `<s>` is
    typed; it is tokenised as the characters it is. `italian_share` is the share of every tenth document that py3langid calls Italian.
    `histogram` counts documents by characters, in bins of a quarter of a power of ten.
    Raises: UsageError as `iter_documents`.
    """
    check_whole(1, documents=n)
    check_ends(corpus, n, "say how many documents (--documents)")
    stream = CorpusStream(corpus, reader)
    lengths: list[int] = []
    sources, languages = Counter[str](), Counter[str]()
    n_words = n_tokens = n_typed = 0
    typed = re.compile("|".join(map(re.escape, getattr(tokenizer, "all_special_tokens", []))) or "(?!)")
    for batch in batched(islice(stream, n), 128):
        texts = [document.text for document in batch]
        languages.update(map(language_of, texts[-len(lengths) % LANGUAGE_EVERY :: LANGUAGE_EVERY]))
        lengths += map(len, texts)
        sources.update(document.source for document in batch)
        n_words += sum(len(_WORD.findall(text)) for text in texts)
        n_typed += sum(typed.search(text) is not None for text in texts)
        n_tokens += 0 if tokenizer is None else sum(tokens.shape[1] for tokens in tokenise(tokenizer, texts))
    marks = zip(("min", "p10", "median", "p90", "max"), np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]), strict=True)
    return {
        "corpus": str(corpus),
        "documents": len(lengths),
        "words": n_words,
        "tokens": n_tokens if tokenizer else None,
        "typed_special_tokens": n_typed if tokenizer else None,
        "fertility": n_tokens / n_words if tokenizer and n_words else None,
        "characters": {"mean": float(np.mean(lengths)), **{name: float(mark) for name, mark in marks}},
        "italian_share": languages["it"] / languages.total(),
        "languages": dict(languages.most_common(5)),
        "sources": dict(sources.most_common(20)),
        "histogram": _histogram(lengths),
        "counts": stream.counts.as_dict(),
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    bins = Counter(math.floor(BINS_PER_DECADE * math.log10(length)) for length in lengths)
    edges = {i: math.ceil(10 ** (i / BINS_PER_DECADE)) for i in range(min(bins), max(bins) + 2)}
    wide = [i for i in range(min(bins), max(bins) + 1) if edges[i] < edges[i + 1]]
    return [{"from": edges[i], "to": edges[i + 1] - 1, "documents": bins[i]} for i in wide]


def text_histogram(stats: dict[str, Any], width: int = 40) -> str:
    """Return the histogram as lines of bars."""
    most = max(row["documents"] for row in stats["histogram"])
    line = "{from:>9,} – {to:<9,} {documents:>9,} {bar}"
    return "\n".join(line.format(**row, bar="█" * round(width * row["documents"] / most)) for row in stats["histogram"])


def draw_histogram(stats: dict[str, Any]) -> str:
    """Return the histogram of document lengths as an SVG picture."""
    rows = stats["histogram"]

    def draw(panels: Any) -> None:
        axes = panels[0]
        axes.bar(range(len(rows)), [row["documents"] for row in rows], color=OURS)
        axes.set_xticks(range(len(rows)), [f"{row['from']:,}" for row in rows], rotation=45)
        axes.set_title(f"{stats['corpus']}: {stats['documents']:,} documents")
        axes.set(xlabel="characters in a document, from", ylabel="documents")

    return svg(draw, 1, (7, 4))

"""The windows of a corpus for training: packed ahead in a thread, without end when asked, and able to go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae_italian.base.errors import UsageError
from sae_italian.corpora import CorpusStream, TextDocument
from sae_italian.corpora.packing import Packer, batched, check_context, layout_of
from sae_italian.corpora.pretokenize import PretokenizedCorpus
from sae_italian.corpora.tokens import tokenise_batches

BLOCKS_AHEAD = 2
DOCUMENTS_PER_BATCH = 64

Documents = Callable[[], Iterator[TextDocument]] | PretokenizedCorpus
"""Called to start the corpus, or a pretokenised one. A `CorpusStream` is resumed by its position, any other iterator by
reading it again."""


class _Position(NamedTuple):
    """Where packing stood: after some batch of documents, and the blocks made since."""

    corpus: dict[str, Any] | None  # None: at the start of the corpus
    packer: Packer | None
    blocks_since: int

    def as_dict(self) -> dict[str, Any]:
        packer = None if self.packer is None else self.packer.state()
        return {"corpus": self.corpus, "packer": packer, "blocks_since": self.blocks_since}


class Windows:
    """Yields blocks of windows [up to windows_per_block, context], read and packed ahead of their use.

    The corpus is started again when it ends, unless `repeat` is False. Reading ahead changes nothing in what is
    yielded. Raises: UsageError for a corpus without one full window, or pretokenised for something else.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        context_size: int,
        windows_per_block: int,
        *,
        repeat: bool = True,
        ahead: int = BLOCKS_AHEAD,
    ):
        check_context(context_size)
        if isinstance(documents, PretokenizedCorpus):
            check_pretokenized(documents, tokenizer, context_size)
        self.documents, self.tokenizer, self.context_size = documents, tokenizer, context_size
        self.windows_per_block, self.repeat, self.ahead = windows_per_block, repeat, ahead
        self.n_blocks = 0  # taken, over all epochs
        self.position = _Position(None, None, 0)  # of the next block
        self.blocks = self._blocks(self.position)
        self.pool = ThreadPoolExecutor(1, "windows") if ahead else None
        self.waiting: deque[Future[Any]] = deque()

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> Int[np.ndarray, "windows context"]:
        if self.pool is None:
            found = next(self.blocks, None)
        else:
            while len(self.waiting) <= self.ahead:
                self.waiting.append(self.pool.submit(next, self.blocks, None))
            found = self.waiting.popleft().result()
        if found is None:
            raise StopIteration
        tokens, self.position = found
        self.n_blocks += 1
        return tokens

    def _blocks(self, start: _Position) -> Iterator[tuple[np.ndarray, _Position]]:
        """Yield each block with the position of the one after it."""
        pretokenized = isinstance(self.documents, PretokenizedCorpus)
        while True:
            empty = start == _Position(None, None, 0)
            for tokens, after in self._mapped(start) if pretokenized else self._packed(start):
                empty = False
                yield tokens, after
            if empty:
                raise UsageError(
                    f"the corpus is too short: not one window of {self.context_size} tokens. Use a longer one."
                )
            if not self.repeat:
                return
            start = _Position(None, None, 0)

    def _mapped(self, start: _Position) -> Iterator[tuple[np.ndarray, _Position]]:
        assert isinstance(self.documents, PretokenizedCorpus)
        blocks = self.documents.blocks(self.windows_per_block, start.blocks_since)
        for number, tokens in enumerate(blocks, start.blocks_since + 1):
            yield tokens, _Position(None, None, number)

    def _packed(self, start: _Position) -> Iterator[tuple[np.ndarray, _Position]]:
        """Yield the blocks from a position on: the batch of documents it lies in is packed again and its blocks passed."""
        blocks = self._pack(start)
        yield from islice(blocks, start.blocks_since, None)

    def _pack(self, start: _Position) -> Iterator[tuple[np.ndarray, _Position]]:
        assert not isinstance(self.documents, PretokenizedCorpus)
        documents = self.documents()
        stream = documents if isinstance(documents, CorpusStream) else None
        packer = Packer(self.context_size, layout_of(self.tokenizer))
        if stream is not None and start.corpus is not None and start.packer is not None:
            stream.load_state(start.corpus)
            packer = start.packer.copy()
        base = _Position(start.corpus, start.packer, 0)
        n_since = 0
        for batch, pieces in tokenise_batches(batched(documents, DOCUMENTS_PER_BATCH), self.tokenizer):
            packer.add(batch, pieces)
            while packer.n_windows >= self.windows_per_block:
                n_since += 1
                yield packer.take(self.windows_per_block).tokens, base._replace(blocks_since=n_since)
            if stream is not None:
                base, n_since = _Position(stream.state(), packer.copy(), 0), 0
        if packer.n_windows:
            yield packer.take(packer.n_windows).tokens, base._replace(blocks_since=n_since + 1)

    def state(self) -> dict[str, Any]:
        """Return where the next block starts, as JSON."""
        return {"n_blocks": self.n_blocks, **self.position.as_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, whatever was read before."""
        for future in self.waiting:
            future.cancel()
        self.waiting.clear()
        packer = None
        if state["packer"] is not None:
            packer = Packer(self.context_size, layout_of(self.tokenizer))
            packer.load(state["packer"])
        self.n_blocks = state["n_blocks"]
        self.position = _Position(state["corpus"], packer, state["blocks_since"])
        self.blocks = self._blocks(self.position)


def check_pretokenized(corpus: PretokenizedCorpus, tokenizer: Any, context_size: int) -> None:
    """Raise UsageError when a pretokenised corpus was made for another tokenizer, context or split."""
    if not corpus.is_made_for(tokenizer):
        raise UsageError(
            f"{corpus.folder} was made with another tokenizer than the model's. Pretokenise it for this model."
        )
    if corpus.context_size != context_size:
        raise UsageError(
            f"{corpus.folder} has windows of {corpus.context_size} tokens, context_size is {context_size}. Set it to that."
        )
    if corpus.split != "train":
        raise UsageError(
            f"{corpus.folder} holds the split {corpus.split!r}; training needs 'train', which leaves 5 % out."
        )

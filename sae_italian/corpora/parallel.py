"""Batches of documents tokenised in other processes, in the order they came."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sae_italian.corpora.stream import TextDocument
from sae_italian.corpora.words import TokenBatch, WordTokenizer, fast_backend, splits_at_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_AHEAD = 3  # for each worker
_worker: WordTokenizer | None = None


def tokenise_batches(
    batches: Iterable[list[TextDocument]], tokenizer: PreTrainedTokenizerBase, workers: int = 1
) -> Iterator[tuple[list[TextDocument], TokenBatch]]:
    """Yield each batch with its tokens, in order; with one worker, in this process.

    More workers are new processes, so a script that uses them needs `if __name__ == "__main__":`. At most
    BATCHES_AHEAD batches a worker are read ahead of the one yielded.
    """
    if workers <= 1:
        own = WordTokenizer.of(tokenizer)
        for batch in batches:
            yield batch, own.tokenise([document.text for document in batch])
        return
    yield from _in_processes(iter(batches), tokenizer, workers)


def _in_processes(
    batches: Iterator[list[TextDocument]], tokenizer: PreTrainedTokenizerBase, workers: int
) -> Iterator[tuple[list[TextDocument], TokenBatch]]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    setup = (fast_backend(tokenizer).to_str(), splits_at_spaces(tokenizer))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=setup)
    waiting: deque[tuple[list[TextDocument], Any]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_tokenise, [document.text for document in batch])))
            if len(waiting) >= BATCHES_AHEAD * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(tokenizer: str, splits: bool) -> None:
    from tokenizers import Tokenizer

    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = WordTokenizer(Tokenizer.from_str(tokenizer), splits)


def _tokenise(texts: list[str]) -> TokenBatch:
    assert _worker is not None
    return _worker.tokenise(texts)

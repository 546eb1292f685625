"""One function over many latents: in this process, in forked ones, or in threads that wait for a server."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None  # what forked processes call; they inherit it with all it refers to


def in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield the results in order. More than one worker means forked processes, which share this one's memory.

    Where processes cannot be forked (outside Linux) the work is done here.
    """
    global _function
    if workers <= 1 or len(items) < workers or not sys.platform.startswith("linux"):
        yield from map(function, items)
        return
    from multiprocessing import get_context

    _function = function
    gc.collect()
    gc.freeze()  # what the processes share is neither searched for garbage nor copied for it
    try:
        with get_context("fork").Pool(workers, _one_thread) as pool:
            yield from pool.imap(_call, items)
    finally:
        gc.unfreeze()
        _function = None


def _one_thread() -> None:
    """Let a worker's libraries use one thread: workers that start a thread for every core slow one another down."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], concurrency: int) -> Iterator[Result]:
    """Yield the results as they are done, at most `concurrency` calls under way and one more item prepared.

    When a call raises, no more are started; those under way are finished and yielded first, then it is raised.
    """
    if concurrency <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    failure: BaseException | None = None
    with ThreadPoolExecutor(concurrency) as pool:
        remaining = iter(items)
        while True:
            while failure is None and len(waiting) <= concurrency:
                try:
                    waiting.append(pool.submit(function, next(remaining)))
                except StopIteration:
                    break
            if not waiting:
                break
            done = next((future for future in waiting if future.done()), waiting[0])
            waiting.remove(done)
            try:
                result = done.result()
            except BaseException as error:
                failure = failure or error
                continue
            yield result
    if failure is not None:
        raise failure

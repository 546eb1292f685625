"""Units of work in this process, or in several processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, NoReturn

from sae_italian.engine.units import AHEAD, RETRIES, Job, Outcome, attempt, workers_keep_dying


def in_this_process(
    function: Callable[..., Any], setup: Callable[[], Any] | None, units: Iterable[Any]
) -> Iterator[Any]:
    """Yield the result of each unit. Raises what a unit raises."""
    do: Callable[[Any], Any] | None = None
    for unit in units:
        do = do or Job(function, setup).open()
        yield do(unit)


def in_processes(
    function: Callable[..., Any], setup: Callable[[], Any] | None, units: Iterable[Any], workers: int
) -> Iterator[Any]:
    """Yield the result of each unit, in order, from `workers` spawned processes. Raises as `map_units`."""
    pool = _Pool(Job(function, setup), workers)
    try:
        for unit in units:
            pool.send(unit)
            if len(pool.waiting) >= AHEAD * workers:
                yield pool.take()
        while pool.waiting:
            yield pool.take()
    except BaseException:
        pool.stop()
        raise
    pool.executor.shutdown()


class _Pool:
    """Processes and the units they were given; when one dies the executor is made again and loses nothing else."""

    def __init__(self, job: Job, workers: int):
        self.job, self.workers = pickle.dumps(job), workers
        self.waiting: deque[tuple[Any, Future[Outcome]]] = deque()
        self.n_taken = self.deaths = 0  # deaths since the last result
        self._start()

    def _start(self) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        self.executor = ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_start_worker, initargs=(self.job, threads)
        )

    def send(self, unit: Any) -> None:
        try:
            self.waiting.append((unit, self.executor.submit(_do, unit)))
        except BrokenProcessPool:
            self._start_again()
            self.send(unit)

    def take(self) -> Any:
        """Return the result of the unit that was sent first."""
        while True:
            try:
                outcome = self.waiting[0][1].result()
                break
            except BrokenProcessPool:
                self._start_again()
        self.waiting.popleft()
        self.n_taken, self.deaths = self.n_taken + 1, 0
        return outcome.get()

    def _start_again(self) -> None:
        self.deaths += 1
        self.executor.shutdown(wait=True, cancel_futures=True)
        if self.deaths > RETRIES:
            raise workers_keep_dying(self.n_taken)
        self._start()
        sent, self.waiting = self.waiting, deque()
        for unit, future in sent:
            done = future.done() and not future.cancelled() and future.exception() is None
            self.waiting.append((unit, future if done else self.executor.submit(_do, unit)))

    def stop(self) -> None:
        """End the workers in the middle of their units; each removes the file it was writing."""
        for process in list((self.executor._processes or {}).values()):
            process.terminate()
        self.executor.shutdown(wait=True, cancel_futures=True)


# --- in a worker -----------------------------------------------------------------------------------------------------

_job: Job | None = None
_open: Callable[[Any], Any] | None = None
_busy = False


class _Stopped(BaseException):
    """SIGTERM arrived while a unit was being done."""


def _start_worker(job: bytes, threads: int) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    signal.signal(signal.SIGTERM, _on_terminate)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(min(threads, int(os.environ.get("OMP_NUM_THREADS", threads))))
    _job = pickle.loads(job)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _end_with_parent() -> NoReturn:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _on_terminate(signum: int, frame: Any) -> None:
    if _busy:
        raise _Stopped
    os._exit(143)


def _do(unit: Any) -> Outcome:
    global _busy
    _busy = True
    try:
        return attempt(lambda: _opened()(unit))
    except _Stopped:
        os._exit(143)
    finally:
        _busy = False


def _opened() -> Callable[[Any], Any]:
    global _open
    assert _job is not None
    _open = _open or _job.open()
    return _open

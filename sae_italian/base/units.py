"""Independent units of work, mapped over the processes of one machine or over a Ray cluster; and threads that wait.

A unit is a value that can be pickled; the function that does it writes its own file under its final name in one step
(`storage.atomic_path`), so doing a unit twice is harmless and a unit that was cut short leaves nothing. There is no
scheduler of ours: who resumes skips the units whose files are there. Bytes do not depend on the engine or on the number
of workers, only on what computes: another kind of processor, or another number of torch threads, may round the last bit.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import sae_italian
from sae_italian.base.errors import SaeItalianError, UsageError, nearest
from sae_italian.base.storage import STOP_SIGNALS

Engine = Literal["local", "ray"]
PROCESSORS = min(4, os.cpu_count() or 1)  # that a command takes without being told
RETRIES = 3  # how often Ray does a unit again whose worker died
AHEAD = 2  # units handed out for each worker before the first result is taken
PATIENCE = 5.0  # seconds until a network file system must have shown a new file
Item = TypeVar("Item")
Found = TypeVar("Found")


def map_units(
    function: Callable[..., Any],
    units: Iterable[Any],
    *,
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    folder: Path | None = None,
    fork: bool = False,
) -> Iterator[Any]:
    """Yield `function(unit)` of every unit, in order.

    `local` works in this process with one worker (the default), else in that many spawned processes, so function and units
    must be picklable and a script needs `if __name__ == "__main__":`. The function goes to a worker once; what it holds is
    opened there where its `__reduce__` says so. With `fork` (Linux; elsewhere the work is done here) the processes share
    this one's memory, with one thread each. `ray` uses the cluster at `address` (None: the one this process is connected
    to, else a new one here with `workers` CPUs); a unit takes one CPU there and `gpus` GPUs. Units are read as they are
    needed, AHEAD a worker. `folder` is where they write: on Ray, a worker that does not see it is refused. Units of a
    worker that dies Ray does again; here the work ends.

    Raises: UsageError for an engine that is unknown, not installed or not reached, for a folder that is not shared, and
    when a worker died; what a unit raises, unchanged, with the worker's traceback as its cause unless it is ours.
    """
    if engine not in get_args(Engine):
        raise UsageError(f"engine {engine!r} is unknown. {nearest(engine, get_args(Engine))}")
    if engine == "ray":
        return _in_order(_Ray(connect(address, workers), function, folder, gpus), units)
    if workers is None or workers <= 1 or (fork and not sys.platform.startswith("linux")):
        return map(function, units)
    return _in_order(_Processes(function, workers, fork), units)


def in_threads(function: Callable[[Item], Found], items: Iterable[Item], concurrency: int) -> Iterator[Found]:
    """Yield the results as they are done, at most `concurrency` calls under way and one more item prepared.

    When a call raises, no more are started; those under way are finished and yielded first, then it is raised.
    """
    if concurrency <= 1:
        yield from map(function, items)
        return
    left, failure = iter(items), None
    waiting: set[Future[Found]] = set()
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            free = 0 if failure else concurrency + 1 - len(waiting)
            waiting |= {pool.submit(function, item) for item in islice(left, free)}
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            failure = failure or next((error for each in done if (error := each.exception())), None)
            yield from (each.result() for each in done if each.exception() is None)
    if failure is not None:
        raise failure


def _in_order(pool: _Processes | _Ray, units: Iterable[Any]) -> Iterator[Any]:
    """Yield the results in the order of the units; end the workers however this ends."""
    left, n_taken = iter(units), 0
    waiting: deque[Any] = deque()  # what the pool gave for units whose results were not taken yet
    try:
        while True:
            waiting.extend(pool.submit(unit) for unit in islice(left, AHEAD * pool.workers - len(waiting)))
            if not waiting:
                return
            value = pool.result(waiting[0])
            waiting.popleft()
            n_taken += 1
            yield value
    except pool.deaths as death:
        raise UsageError(
            f"a worker died at or near unit {n_taken} (out of memory, or killed). Use fewer workers or smaller units; "
            "finished parts are kept, --resume continues."
        ) from death
    finally:
        pool.stop(waiting)


class Job(NamedTuple):
    """What a worker on Ray gets once: the function, pickled, and what shows that the worker can do its units."""

    function: bytes
    probe: Path | None = None  # a file that it must see
    version: str = sae_italian.__version__

    def open(self) -> Callable[[Any], Any]:
        """Return what does one unit in this process. Raises UsageError when this worker cannot do the job's units."""
        here = socket.gethostname()
        if self.version != sae_italian.__version__:
            raise UsageError(
                f"{here} has sae-italian {sae_italian.__version__}, this machine {self.version}. "
                "Install the same version on every machine."
            )
        until = time.monotonic() + PATIENCE
        while self.probe is not None and not self.probe.exists():
            if time.monotonic() > until:
                raise UsageError(
                    f"{self.probe.parent} is not shared with {here}: a file written here is not seen there. "
                    "Give a folder on a file system that every machine of the cluster mounts at the same path."
                )
            time.sleep(0.2)
        return pickle.loads(self.function)


def _probe(folder: Path) -> Path:
    """Return a new file in `folder`; its name is that of a temporary file, so a killed run's is swept."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder.resolve() / f".probe.{uuid.uuid4().hex}.tmp"
    probe.touch()
    return probe


class _Processes:
    """Processes of this machine."""

    deaths = BrokenProcessPool

    def __init__(self, function: Callable[..., Any], workers: int, fork: bool):
        self.workers = workers
        if fork:
            gc.freeze()  # what the processes share is neither searched for garbage nor copied for it
        threads = 1 if fork else max(1, (os.cpu_count() or 1) // workers)
        context = get_context("fork" if fork else "spawn")
        # a spawned worker imports what the function needs once Ctrl-C is no longer for it, not while it starts
        given = function if fork else pickle.dumps(function)
        self.executor = ProcessPoolExecutor(workers, context, _start_worker, (given, threads))

    def submit(self, unit: Any) -> Future[Any]:
        return self.executor.submit(_do, unit)

    def result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except SaeItalianError as error:
            raise error from None  # its sentence says all

    def stop(self, waiting: Iterable[Any]) -> None:
        """End the workers, those in the middle of a unit too: each removes the file it was writing."""
        for process in list((self.executor._processes or {}).values()) if waiting else ():
            process.terminate()
        self.executor.shutdown(wait=True, cancel_futures=True)
        gc.unfreeze()


class _Ray:
    """Tasks on a Ray cluster, one a unit; Ray itself does a unit again whose worker died."""

    def __init__(self, ray: Any, function: Callable[..., Any], folder: Path | None, gpus: float):
        self.ray, self.probe, self.key = ray, folder and _probe(folder), uuid.uuid4().hex
        died = self.ray.exceptions
        self.deaths = (died.WorkerCrashedError, died.NodeDiedError, died.OutOfMemoryError)
        self.task = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)
        self.workers = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        # in a list, Ray hands over the reference: a worker opens the job once, when it is found fit
        self.shared = [self.ray.put(Job(ray.cloudpickle.dumps(function), self.probe))]

    def submit(self, unit: Any) -> Any:
        return self.task.remote(unit, self.key, self.shared)

    def result(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None if isinstance(error.cause, SaeItalianError) else error

    def stop(self, waiting: Iterable[Any]) -> None:
        """Stop what is not done and wait a little, so that a unit can remove the file it was writing."""
        left = list(waiting)
        if left:  # Ray ends this process where a task is cancelled that is just done (its check "was not pending")
            _, left = self.ray.wait(left, num_returns=len(left), timeout=2)
        for reference in left:
            self.ray.cancel(reference)
        if left:
            self.ray.wait(left, num_returns=len(left), timeout=5)
        if self.probe is not None:
            self.probe.unlink(missing_ok=True)


def connect(address: str | None, workers: int | None) -> Any:
    """Return Ray, connected: to `address`, or as it already is, or to a new cluster here, which ends with this process.

    Raises: UsageError when Ray is not installed or nothing answers at `address`.
    """
    quiet = {"USAGE_STATS_ENABLED": "0", "worker_niceness": "0", "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for name, value in quiet.items():  # a cluster started here is as quick as local work
        os.environ.setdefault(f"RAY_{name}", value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError("--engine ray needs Ray. Install it: pip install 'sae-italian[ray]'") from error
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here):
            raise UsageError(f"this process is connected to the Ray cluster at {here}, not {address}. End it first.")
        return ray
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():  # an address where nobody answers, Ray would try for two minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        here = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **here)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if "InvalidAuthToken" in f"{error}{error.__cause__}":
            reason = "it asks for its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its head"
        raise UsageError(
            f"no Ray cluster answers at {address or 'this machine'} ({reason}). Start one with `ray start --head`, "
            "or leave --address out to use this machine."
        ) from error
    return ray


# --- in a worker -----------------------------------------------------------------------------------------------------

_work: tuple[str, Callable[..., Any]] | None = None  # the one function of this process, and its job's key
_in_unit = _is_ending = False


def _start_worker(function: Callable[..., Any] | bytes, threads: int) -> None:
    global _work
    for number in STOP_SIGNALS:  # a terminal's and Slurm's reach the whole group; the main process decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # may be empty, or a list
    threads = min([threads, *map(int, re.findall("^[1-9][0-9]*", os.environ.get("OMP_NUM_THREADS", "")))])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _work = ("", pickle.loads(function) if isinstance(function, bytes) else function)
    if not isinstance(function, bytes):  # forked: its libraries have started threads, which would slow one another down
        from threadpoolctl import threadpool_limits

        threadpool_limits(1)
    if "torch" in sys.modules:  # which makes its pool anew after a fork, and fails where two threads do so at once
        sys.modules["torch"].set_num_threads(threads)


def _end(*_: Any) -> None:
    """End this process: at once in the middle of a unit, which can then clean up; elsewhere before the next one.

    Between units a process may be holding the lock of the queue of results. Ended there it would keep it, and whoever waits
    for the processes would wait for ever. One that gets no more units, and no word that it can go, is ended after PATIENCE.
    """
    global _is_ending
    _is_ending = True
    patience = threading.Timer(PATIENCE, os._exit, [143])
    patience.daemon = True
    patience.start()
    if _in_unit:
        sys.exit(143)


def _end_with_parent() -> None:
    parent_process().join()  # pyright: ignore[reportOptionalMemberAccess]
    os._exit(1)


def _do(unit: Any, key: str = "", shared: Sequence[Any] = ()) -> Any:
    """Return what comes of the unit. What it raises arrives whole or, where it cannot be pickled, as a RuntimeError."""
    global _work, _in_unit
    _in_unit = True
    try:
        if _is_ending:
            os._exit(143)
        if _work is None or _work[0] != key:
            import ray

            job: Any = ray.get(shared[0])
            _work = (key, job.open())
        return _work[1](unit)
    except SystemExit:
        os._exit(143)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise
    finally:
        _in_unit = False

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
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import sae_italian
from sae_italian.base.errors import SaeItalianError, UsageError, check_known
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
    check_known("engine", get_args(Engine), engine)
    waiting: deque[Any] = deque()
    if engine == "ray":
        return _in_order(_on_ray(waiting, connect(address, workers), function, folder, gpus), waiting, units)
    if workers is None or workers <= 1 or (fork and not sys.platform.startswith("linux")):
        return map(function, units)
    return _in_order(_on_processes(waiting, function, workers, fork), waiting, units)


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


# What hands a unit to the workers, what waits for its result, how many workers there are, and how the death of one is told.
Pool = tuple[Callable[[Any], Any], Callable[[Any], Any], int, tuple[type[Exception], ...]]


def _in_order(pool: AbstractContextManager[Pool], waiting: deque[Any], units: Iterable[Any]) -> Iterator[Any]:
    """Yield the results in the order of the units; `waiting` are those handed out whose results were not taken yet."""
    left, n_taken = iter(units), 0
    with pool as (submit, result, n_workers, deaths):
        try:
            waiting.extend(map(submit, islice(left, AHEAD * n_workers)))
            while waiting:
                value = result(waiting[0])
                waiting.popleft()
                n_taken += 1
                yield value
                waiting.extend(map(submit, islice(left, 1)))
        except SaeItalianError as error:
            raise error from None  # its sentence says all
        except deaths as death:
            raise UsageError(
                f"a worker died at or near unit {n_taken} (out of memory, or killed). Use fewer workers or smaller units; "
                "finished parts are kept, --resume continues."
            ) from death


@contextmanager
def _on_processes(waiting: deque[Any], function: Callable[..., Any], workers: int, fork: bool) -> Iterator[Pool]:
    """Processes of this machine; where the block ends early, so do those in the middle of a unit: each removes its file."""
    if fork:
        gc.freeze()  # what the processes share is neither searched for garbage nor copied for it
    threads = 1 if fork else max(1, (os.cpu_count() or 1) // workers)
    # a spawned worker imports what the function needs once Ctrl-C is no longer for it, not while it starts
    given = function if fork else pickle.dumps(function)
    context = get_context("fork" if fork else "spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (given, threads))
    try:
        yield partial(executor.submit, _do), Future.result, workers, (BrokenProcessPool,)
    finally:
        for process in list((executor._processes or {}).values()) if waiting else ():
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        gc.unfreeze()


@contextmanager
def _on_ray(
    waiting: deque[Any], ray: Any, function: Callable[..., Any], folder: Path | None, gpus: float
) -> Iterator[Pool]:
    """Tasks on a Ray cluster, one a unit; Ray itself does a unit again whose worker died."""
    key, probe, said = uuid.uuid4().hex, folder and _probe(folder), ray.exceptions
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)
    # in a list, Ray hands over the reference: a worker opens the job once, when it is found fit
    job = [ray.put((ray.cloudpickle.dumps(function), sae_italian.__version__, probe))]

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except said.RayTaskError as error:
            raise error.cause from error

    n_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        deaths = (said.WorkerCrashedError, said.NodeDiedError, said.OutOfMemoryError)
        yield lambda unit: task.remote(unit, key, job), result, n_workers, deaths
    finally:
        _cancel(ray, list(waiting))
        if probe is not None:
            probe.unlink(missing_ok=True)


def _cancel(ray: Any, left: list[Any]) -> None:
    """Stop what is not done and wait a little, so that a unit can remove the file it was writing."""
    if left:  # Ray ends this process where a task is cancelled that is just done ("was not pending")
        _, left = ray.wait(left, num_returns=len(left), timeout=2)
    for reference in left:
        ray.cancel(reference)
    if left:
        ray.wait(left, num_returns=len(left), timeout=5)


def _probe(folder: Path) -> Path:
    """Return a new file in `folder`; its name is that of a temporary file, so a killed run's is swept."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder.resolve() / f".probe.{uuid.uuid4().hex}.tmp"
    probe.touch()
    return probe


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
            f"no Ray cluster answers at {address or 'this machine'} ({reason}). Start one with `ray "
            "start --head`, or leave --address out to use this machine."
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


def _opened(function: bytes, version: str, probe: Path | None) -> Callable[[Any], Any]:
    """Return what does one unit on Ray, in this process. Raises: UsageError for one that cannot do the job's units.

    `version` is that of the package where the job is from, `probe` a file there that must be seen here.
    """
    here, until = socket.gethostname(), time.monotonic() + PATIENCE
    if version != sae_italian.__version__:
        raise UsageError(
            f"{here} has sae-italian {sae_italian.__version__}, this machine {version}. "
            "Install the same version on every machine."
        )
    while probe is not None and not probe.exists():
        if time.monotonic() > until:
            raise UsageError(
                f"{probe.parent} is not shared with {here}: a file written here is not seen there. "
                "Give a folder on a file system that every machine of the cluster mounts at the same path."
            )
        time.sleep(0.2)
    return pickle.loads(function)


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
            _work = (key, _opened(*job))
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

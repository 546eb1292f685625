"""`map_units`, and what a worker does with one unit, whatever the engine."""

from __future__ import annotations

import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sae_italian
from sae_italian.base.errors import SaeItalianError, UsageError, nearest

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")
RETRIES = 3  # how often a unit whose worker died is done again
AHEAD = 2  # units handed out for each worker before the first result is taken
PATIENCE = 5.0  # seconds until a network file system must have shown a new file


def map_units(
    function: Callable[..., Any],
    units: Iterable[Any],
    *,
    setup: Callable[[], Any] | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    folder: Path | None = None,
    description: str | None = None,
) -> Iterator[Any]:
    """Yield `function(unit)` of every unit, in order; with `setup`, `function(setup(), unit)`, set up once a worker.

    `local` works in this process with one worker (the default), else in that many spawned processes, so function,
    setup and units must be picklable and a script needs `if __name__ == "__main__":`. `ray` uses the cluster at
    `address` (None: the one this process is connected to, else a new one on this machine with `workers` CPUs); each
    unit takes one CPU there and `gpus` GPUs. Units are read as they are needed, AHEAD a worker. `folder` is where the
    units write: on Ray, a worker that does not see it as this process does is refused. With `description` a progress
    bar counts units. A worker that dies costs the units it had, which are done again.

    Raises: UsageError for an engine that is unknown, not installed or not reached, for a folder that is not shared, and
    when workers keep dying; what a unit raises, unchanged, with the worker's traceback as its cause unless it is ours.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown. {nearest(engine, ENGINES)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}; it must be 1 or more.")
    if engine == "local" and address is not None:
        raise UsageError(f"--address {address} is that of a Ray cluster; add --engine ray, or leave it out.")
    if engine == "ray":
        from sae_italian.engine.on_ray import connect, on_ray

        results = on_ray(connect(address, workers), function, setup, units, gpus, folder)
    else:
        from sae_italian.engine.local import in_processes, in_this_process

        if workers is None or workers == 1:
            results = in_this_process(function, setup, units)
        else:
            results = in_processes(function, setup, units, workers)
    return _with_bar(results, units, description) if description else results


def _with_bar(results: Iterator[Any], units: Iterable[Any], description: str) -> Iterator[Any]:
    from tqdm import tqdm

    total = len(units) if isinstance(units, Sized) else None
    yield from tqdm(results, total=total, desc=description, unit="unit", disable=None)


# --- in a worker -----------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What every unit of one call has in common; a worker makes `state` once."""

    function: Callable[..., Any]
    setup: Callable[[], Any] | None
    probe: Path | None = None  # a file that a worker must see
    version: str = sae_italian.__version__
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or uuid.uuid4().hex

    def open(self) -> Callable[[Any], Any]:
        """Return what does one unit in this process. Raises UsageError when this worker cannot do the job's units."""
        if self.version != sae_italian.__version__:
            raise UsageError(
                f"{socket.gethostname()} has sae-italian {sae_italian.__version__}, this machine {self.version}. "
                "Install the same version on every machine."
            )
        if self.probe is not None:
            _check_shared(self.probe)
        if self.setup is None:
            return self.function
        state = self.setup()
        return lambda unit: self.function(state, unit)


def _check_shared(probe: Path, patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not probe.exists():
        if time.monotonic() > until:
            raise UsageError(
                f"{probe.parent} is not shared with {socket.gethostname()}: a file written here is not seen there. "
                "Give a folder on a file system that every machine of the cluster mounts at the same path."
            )
        time.sleep(0.2)


@contextmanager
def probe_file(folder: Path | None) -> Iterator[Path | None]:
    """Yield a new file in `folder` (None: none), removed at the end."""
    if folder is None:
        yield None
        return
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{uuid.uuid4().hex}.tmp"  # the name of a temporary file: a killed run's is swept
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


class Outcome(NamedTuple):
    """What comes back from a worker: a value, or what was raised and where."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""

    def get(self) -> Any:
        """Return the value or raise the error: ours as it is, another's with the worker's traceback as its cause."""
        if self.error is None:
            return self.value
        if isinstance(self.error, SaeItalianError):
            raise self.error
        raise self.error from WorkerTraceback(self.trace)


class WorkerTraceback(Exception):
    """The traceback of an exception that was raised in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def attempt(work: Callable[[], Any]) -> Outcome:
    """Return what `work()` returns or raises, in a form that can be pickled."""
    try:
        return Outcome(work())
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return Outcome(None, error if _picklable(error) else RuntimeError(f"{type(error).__name__}: {error}"), trace)


def _picklable(error: Exception) -> bool:
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def workers_keep_dying(number: int) -> UsageError:
    return UsageError(
        f"workers died {RETRIES + 1} times at or near unit {number} (out of memory, or killed). Use fewer workers or "
        "smaller units; finished parts are kept, --resume continues."
    )

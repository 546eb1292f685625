"""Units of work on a Ray cluster: one task a unit, results in order."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.engine.units import AHEAD, RETRIES, Job, Outcome, attempt, probe_file, workers_keep_dying


def connect(address: str | None, workers: int | None) -> Any:
    """Return Ray, connected: to `address`, or as it already is, or to a new cluster on this machine.

    A cluster that is started here ends with this process, or at `ray.shutdown()`.
    Raises: UsageError when Ray is not installed or nothing answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster started here: as quick as local work
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed. Install it: pip install 'sae-italian[ray]'"
        ) from error
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here):
            raise UsageError(f"this process is connected to the Ray cluster at {here}, not {address}. End it first.")
        return ray
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        else:
            _check_answers(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    return ray


def _check_answers(address: str) -> None:
    """Raise OSError at once where Ray would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _no_cluster(address: str | None, error: BaseException) -> UsageError:
    reason, cause = str(error).strip().split("\n")[0], error.__cause__
    if "InvalidAuthToken" in f"{error}{cause}":
        reason = "it asks for its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its head"
    return UsageError(
        f"no Ray cluster answers at {address or 'this machine'} ({reason}). Start one with `ray start --head`, "
        "or leave --address out to use this machine."
    )


def on_ray(
    ray: Any,
    function: Callable[..., Any],
    setup: Callable[[], Any] | None,
    units: Iterable[Any],
    gpus: float,
    folder: Path | None,
) -> Iterator[Any]:
    """Yield the result of each unit, in order. Raises as `map_units`."""
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)
    waiting: deque[Any] = deque()
    with probe_file(folder) as probe:
        job = Job(function, setup, probe)
        shared = ray.put(job)
        room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        n_taken = 0
        try:
            for unit in units:
                # In a list, Ray hands over the reference and not the job: a worker opens it once, not at every unit.
                waiting.append(task.remote(job.key, [shared], unit))
                if len(waiting) >= room:
                    yield _take(ray, waiting, n_taken)
                    n_taken += 1
            while waiting:
                yield _take(ray, waiting, n_taken)
                n_taken += 1
        finally:
            _cancel(ray, list(waiting))


def _take(ray: Any, waiting: deque[Any], number: int) -> Any:
    try:
        outcome: Outcome = ray.get(waiting[0])
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise workers_keep_dying(number) from error
    waiting.popleft()
    return outcome.get()


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """Stop what is not done and wait a little, so that a unit can remove the file it was writing."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=5)


# --- in a worker -----------------------------------------------------------------------------------------------------

_opened: dict[str, Callable[[Any], Any]] = {}  # the job that this process does, by key; at most one


def _do(key: str, shared: list[Any], unit: Any) -> Outcome:
    def work() -> Any:
        if key not in _opened:
            import ray

            _opened.clear()
            job: Any = ray.get(shared[0])
            _opened[key] = job.open()
        return _opened[key](unit)

    return attempt(work)

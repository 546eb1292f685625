"""Starting the processes that train one SAE: torch's own launcher on this machine, Ray Train's on a cluster.

On several machines `torchrun` starts the same command on each. All end in `processes.joined`, which reads RANK and
WORLD_SIZE.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.units import connect
from sae_italian.training.config import RunSpec, spec_from_dict
from sae_italian.training.loop import STOP_SIGNALS
from sae_italian.training.processes import GPU_BACKEND, WORLD, check_joint
from sae_italian.training.run import check_run, train

STOPPED = 130  # exit code of a process that saved and stopped
SAVING_SECONDS = "120"  # what torch's launcher gives the processes after a signal, before it kills them


def on_this_machine(spec: RunSpec, n: int, arguments: Sequence[str]) -> None:
    """Run `sae-italian ARGUMENTS`, a training of `spec`, in `n` processes of this machine; return when all are done.

    Rank 0 writes to this terminal. Raises: UsageError before anything is started for what so many cannot train, and for a
    process that was ended, naming it; SystemExit, with its exit code, when rank 0 has said why it stopped.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check(spec, n)
    logging.disable(logging.CRITICAL)  # the launcher's account of a process that failed: we give our own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        told: Any = {rank: Std.ALL if rank else Std.OUT for rank in range(n)}  # into files
        config = LaunchConfig(
            *(1, 1, n),
            logs_specs=DefaultLogsSpecs(folder, redirects=told),
            run_id="training",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            signals_to_handle=",".join(Signals(number).name for number in STOP_SIGNALS),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "sae_italian.cli", *arguments)
        except SignalException as stop:
            raise SystemExit(STOPPED) from stop
        except ChildFailedError as failed:
            raise _why(failed, n, Path(folder)) from failed


def _check(spec: RunSpec, n: int) -> None:
    if WORLD in os.environ:
        raise UsageError(f"{WORLD} is set: torchrun or Ray has started the processes already. Leave --processes out.")
    check_joint(spec, n)
    check_run(spec)


def _why(failed: Any, n: int, logs: Path) -> BaseException:
    """Return what to raise when a process failed: what it said where rank 0 has not said it."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        name = Signals(-failure.exitcode).name
        return UsageError(
            f"rank {rank} of {n} was ended by {name}{' (killed, or out of memory)' * (name == 'SIGKILL')}. "
            "The last checkpoint is kept; --resume continues from it, with any number of processes."
        )
    said = [file.read_text(errors="replace").strip() for file in logs.glob(f"**/{rank}/stderr.log")]
    if rank == 0 or failure.exitcode == STOPPED or not any(said):
        return SystemExit(failure.exitcode)
    return UsageError(f"rank {rank} of {n}: {said[0].splitlines()[-1].removeprefix('sae-italian: ')}")


def on_ray(spec: RunSpec, n: int, out: Path, address: str | None, **how: bool) -> None:
    """Train `spec` into `out`, on a file system that all machines share, by `n` workers of Ray Train's TorchTrainer.

    `how` is what `train` takes. Raises: UsageError without Ray or its cluster, and what a worker raised.
    """
    _check(spec, n)
    connect(address, n)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = spec.device.startswith("cuda")
    torch_config = TorchConfig(GPU_BACKEND if gpu else "gloo", timeout_s=round(spec.process_timeout_seconds))
    given = {"spec": spec.model_dump(mode="json"), "out": str(out.resolve()), **how}
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config=given,
            torch_config=torch_config,
            scaling_config=ScalingConfig(num_workers=n, use_gpu=gpu),
            run_config=RunConfig(name="training", storage_path=folder),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _ours(error) from error


def train_on_worker(given: dict[str, Any]) -> None:
    """Train in a worker of Ray Train, which has set RANK and WORLD_SIZE."""
    train(spec_from_dict(given.pop("spec")), given.pop("out"), **given)


def _ours(error: BaseException) -> BaseException:
    """Return the error of ours that a worker failed with, where that is what happened; else what Ray says."""
    causes = [error, *getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        for each in (cause, cause.__cause__, getattr(cause, "cause", None), getattr(cause, "_base_exc", None)):
            if isinstance(each, SaeItalianError):
                return each
    return error

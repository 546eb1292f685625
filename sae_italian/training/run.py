"""Folders of training: one SAE, or the groups of a suite; refused or claimed, trained into, resumed, finished.

Several processes train one SAE where torch's launcher has started them here, Ray Train on a cluster, or `torchrun` on several
machines: all end in `processes.joined`, which reads RANK and WORLD_SIZE.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.storage import STOP_SIGNALS, claimed, record_in, write_json
from sae_italian.base.units import connect
from sae_italian.corpora.pretokenize import is_pretokenized
from sae_italian.corpora.stream import check_corpus
from sae_italian.models import load_model
from sae_italian.training.config import RunSpec, load_spec
from sae_italian.training.logging import WEIGHTS
from sae_italian.training.loop import Diverged, Loop, SAERun, clear_checkpoints
from sae_italian.training.pretrained import Origin
from sae_italian.training.processes import ALONE, GPU_BACKEND, WORLD, Processes, check_joint, joined, placed
from sae_italian.training.shards import check_shards
from sae_italian.training.stream import ActivationStream, kept_positions
from sae_italian.training.suite import SuiteSpec, load_suite
from sae_italian.training.text import check_length, training_documents

KIND, SUITE_KIND = "train", "suite"
SAE_FOLDER = "sae"  # of a checkpoint that holds one SAE
SEEDS = "seeds"  # folder of the other seeds' SAEs, inside that of the first
STOPPED = 130  # exit code of a process that saved and stopped
SAVING_SECONDS = "120"  # what torch's launcher gives the processes after a signal, before it kills them
# Settings that decide nothing of what was trained so far: a run may be resumed with others.
CHANGEABLE = {"repeat_corpus", "shard_latents"} | {
    name for name in RunSpec.model_fields if name.startswith(("wandb", "checkpoint_every", "evaluate", "process"))
}


def train(spec: RunSpec | str | Path | Any, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the SAE of `spec` into the folder `out` and return it.

    `spec` may also be a recipe's name, a YAML, an earlier run's folder, a dict, or SAELens' own runner config. `out` then loads
    with `SAE.load_from_disk(out)`; beside the weights lie `run.json` (the spec), `metrics.jsonl` and
    `runner_cfg.json`. While training, `checkpoints/` holds the last full state; a run that was interrupted or killed
    continues from it with `resume=True` and ends with the weights of an uninterrupted run (CPU, same threads). Where
    RANK and WORLD_SIZE say so, this is one of several processes that train it together (`processes`).

    Raises: UsageError for a setting that cannot work, before anything is written, for a folder that holds another
    run, and as `Loop.fit` and `joined`; KeyboardInterrupt after a signal, once the state is saved.
    """
    if isinstance(spec, str | Path | dict):
        spec = load_spec(spec)
    elif not isinstance(spec, RunSpec):
        spec = RunSpec.from_saelens(spec)
    out = Path(out)
    check_run(spec)
    with joined(spec) as processes, contextlib.ExitStack() as stack:
        here = placed(spec)
        model = _model_of(here)
        if processes.first:
            stack.enter_context(_claimed(out, KIND, spec, resume=resume, overwrite=overwrite))
        processes.meet(out)
        others = range(here.seed + 1, here.seed + here.seeds)
        specs = {f"seed-{seed}": here.model_copy(update={"seed": seed, "seeds": 1}) for seed in others}
        specs = {SAE_FOLDER: here, **specs}
        folders = {name: out if name == SAE_FOLDER else out / SEEDS / name for name in specs}
        if not _finished(folders, out, processes):
            train_together(specs, folders, model, out, processes)
    return out


def _finished(folders: Mapping[str, Path], out: Path, processes: Processes = ALONE) -> bool:
    """Return whether all SAEs of a training are there, for every process; then the checkpoints in `out` have no use."""
    done = not processes.any_of(any(not (folder / WEIGHTS).is_file() for folder in folders.values()))[0]
    if done:
        processes.by_first(lambda: clear_checkpoints(out))
    return done


def _claimed(folder: Path, kind: str, spec: RunSpec | SuiteSpec, **how: Any) -> contextlib.AbstractContextManager[bool]:
    """Hold a folder as `claimed`; a record made before a setting was there holds its default."""
    fields = type(spec).model_fields.items()
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    how |= {"changeable": CHANGEABLE, "defaults": to_jsonable_python(defaults)}
    return claimed(folder, kind, spec.model_dump(mode="json"), **how)


def seed_folders(folder: Path) -> list[Path]:
    """Return the folders of all seeds that were trained into one: itself, and those in its `seeds/`, by number."""
    others = [each.parent for each in folder.glob(f"{SEEDS}/*/{WEIGHTS}")]
    return [folder, *sorted(others, key=lambda each: int(each.name.rpartition("-")[2]))]


def train_suite(
    suite: SuiteSpec | str | Path | dict[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    run_units: Callable[..., Iterator[list[Path]]] = map,
) -> list[Path]:
    """Train every group of a suite, which may be named as in `train`, into `out/<name>` and return these folders.

    `run_units` maps the groups: one after the other here, or elsewhere, as a group is a unit of work of its own. With
    `resume`, finished groups are left alone and the one that was stopped goes on.
    Raises: UsageError as `train`, and for a suite that does not fit its memory; KeyboardInterrupt after a signal.
    """
    if not isinstance(suite, SuiteSpec):
        suite = load_suite(suite)
    out = Path(out)
    groups = [(f"group-{index:03}", specs) for index, specs in enumerate(suite.groups())]
    check_run(next(iter(groups[0][1].values())))
    recorded, earlier = suite, record_in(out).get("spec", {}).get("settings")
    if resume and earlier:  # of what may change it tells how it began
        same = {key: value for key, value in suite.settings.items() if key not in CHANGEABLE}
        kept = {key: earlier[key] for key in CHANGEABLE & earlier.keys()}
        recorded = suite.model_copy(update={"settings": same | kept})
    with _claimed(out, SUITE_KIND, recorded, resume=resume, overwrite=overwrite):
        return [folder for folders in run_units(partial(train_group, out), groups) for folder in folders]


def train_group(out: Path, group: tuple[str, Mapping[str, RunSpec]]) -> list[Path]:
    """Train SAEs on one pass of the model into `out/<name>`, their checkpoints in the group's folder; return the SAEs' folders.

    It goes on where it was stopped. Raises: UsageError as `train`; KeyboardInterrupt after a signal, once the state is saved.
    """
    own, specs = out / group[0], group[1]
    folders = {name: out / name for name in specs}
    if any(spec.seeds > 1 or spec.shard_latents for spec in specs.values()):
        raise UsageError("seeds and shard_latents are for a training of one SAE. Leave them out.")
    if not _finished(folders, own):
        train_together(specs, folders, _model_of(next(iter(specs.values()))), own)
    return list(folders.values())


# with gradients, whatever the caller has switched off, as notebooks do in their first line
@torch.inference_mode(False)
def train_together(
    specs: Mapping[str, RunSpec],
    folders: Mapping[str, Path],
    model: Any,
    out: Path,
    processes: Processes = ALONE,
) -> None:
    """Train SAEs on one stream of batches, from their last checkpoint in `out`, which is claimed, if there is one."""
    with contextlib.ExitStack() as stack:
        for name, spec in specs.items():
            if folders[name] != out:
                stack.enter_context(_claimed(folders[name], KIND, spec, resume=True))
        runs = {name: SAERun(spec, model, folders[name], processes) for name, spec in specs.items()}
        hook_names = [hook for spec in specs.values() for hook in spec.hook_names]
        loop = Loop(runs, open_stream(next(iter(specs.values())), model, hook_names, processes), out, processes)
        loop.resume()
        processes.by_first(lambda: [stack.enter_context(run.log.to_wandb()) for run in runs.values()])
        try:
            loop.fit()
            loop.finish()
        except Diverged as error:
            raise UsageError(f"{error} {loop.kept()}") from error
        for run in runs.values():
            run.log.finish(model, loop.stream.windows.state())


def _model_of(spec: RunSpec) -> Any:
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    check_length(spec, model.tokenizer)
    return model


def check_run(spec: RunSpec) -> None:
    """Raise UsageError for settings and corpora that cannot work, before a model is loaded and anything is written."""
    kept_positions(spec.seqpos_slice, spec.context_size)
    spec.to_saelens()
    if spec.shard_latents:
        check_shards(spec.sae_config())
    if spec.from_pretrained_path is not None:
        if spec.shard_latents or spec.seeds > 1:  # which would all start alike
            raise UsageError("from_pretrained_path goes with neither shard_latents nor seeds. Leave one of them out.")
        Origin(spec)
    check_corpus(spec.corpus, text_column=spec.text_column)
    batch, ramps = spec.train_batch_size_tokens, spec.lr_warm_up_steps + spec.lr_decay_steps
    for key in ("training_tokens", "buffer_tokens"):
        if getattr(spec, key) < batch:
            raise UsageError(f"{key} is {getattr(spec, key)}, less than one batch of {batch}. Raise it.")
    if spec.lr_scheduler_name != "constant" and ramps >= (steps := spec.training_tokens // batch):
        raise UsageError(
            f"lr_warm_up_steps and lr_decay_steps leave {spec.lr_scheduler_name} none of {steps} steps. Lower them."
        )
    if spec.evaluate_every_tokens and is_pretokenized(spec.evaluate_corpus or spec.corpus):
        raise UsageError(
            "evaluate_every_tokens needs held-out text, and a pretokenised corpus holds none: set evaluate_corpus."
        )


def check_processes(spec: RunSpec, n: int) -> None:
    """Raise UsageError for what so many processes cannot train, and where these have been started already."""
    if WORLD in os.environ:
        raise UsageError(f"{WORLD} is set: torchrun or Ray has started the processes already. Leave --processes out.")
    check_joint(spec, n)
    check_run(spec)


def open_stream(
    spec: RunSpec, model: Any, hook_names: str | Sequence[str], processes: Processes = ALONE
) -> ActivationStream:
    """Return the stream of training activations that a spec describes, at the given hooks."""
    return ActivationStream(
        model,
        training_documents(spec),
        hook_names,
        context_size=spec.context_size,
        batch_size=spec.train_batch_size_tokens,
        forward_windows=spec.store_batch_size_prompts,
        buffer_tokens=spec.buffer_tokens,
        seed=spec.seed,
        repeat=spec.repeat_corpus,
        seqpos_slice=spec.seqpos_slice,
        exclude_special_tokens=spec.exclude_special_tokens,
        processes=processes,
    )


# --- several processes ------------------------------------------------------------------------------------------------


def on_this_machine(spec: RunSpec, n: int, out: Path, **how: bool) -> None:
    """Train `spec` into `out` by `n` processes of this machine; return when all are done. `how` is what `train` takes.

    Rank 0 writes to this terminal. Raises: UsageError before anything is started for what so many cannot train, and for a
    process that was ended, naming it; SystemExit, with its exit code, when rank 0 has said why it stopped.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_processes(spec, n)
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
            # told, not where to read them: a run that is overwritten may lose its record before all have read it
            settings = Path(folder) / "settings.yaml"
            write_json(settings, spec.model_dump(mode="json"))
            flags = (f"--{name}" for name, given in how.items() if given)
            train_them = elastic_launch(config, sys.executable)
            train_them("-m", "sae_italian.cli", "train", str(settings), "--out", str(out), *flags)
        except SignalException as stop:
            raise SystemExit(STOPPED) from stop
        except ChildFailedError as failed:
            raise _why(failed, n, Path(folder)) from failed


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
    check_processes(spec, n)
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
    train(given.pop("spec"), given.pop("out"), **given)


def _ours(error: BaseException) -> BaseException:
    """Return the error of ours that a worker failed with, where that is what happened; else what Ray says."""
    for cause in (error, *getattr(error, "worker_failures", {}).values()):
        for each in (cause, cause.__cause__, getattr(cause, "cause", None), getattr(cause, "_base_exc", None)):
            if isinstance(each, SaeItalianError):
                return each
    return error

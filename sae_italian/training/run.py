"""Folders of training: one SAE, or the groups of a suite; refused or claimed, trained into, resumed, finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import RUN_FILE, claimed, read_json
from sae_italian.corpora.pretokenize import is_pretokenized
from sae_italian.corpora.stream import check_corpus
from sae_italian.models import load_model
from sae_italian.training.config import RunSpec, load_spec
from sae_italian.training.logging import open_logger
from sae_italian.training.loop import Loop, clear_checkpoints
from sae_italian.training.pretrained import Origin
from sae_italian.training.processes import ALONE, Processes, joined, placed
from sae_italian.training.sae_run import Diverged, SAERun
from sae_italian.training.stream import ActivationStream, kept_positions
from sae_italian.training.suite import SuiteSpec
from sae_italian.training.text import check_length, training_documents

KIND, SUITE_KIND = "train", "suite"
WEIGHTS = "sae_weights.safetensors"  # written last: where they are, the training is finished
SAE_FOLDER = "sae"  # of a checkpoint that holds one SAE
SEEDS = "seeds"  # folder of the other seeds' SAEs, inside that of the first
# Settings that decide nothing of what was trained so far: a run may be resumed with others.
CHANGEABLE = {"repeat_corpus"} | {
    name for name in RunSpec.model_fields if name.startswith(("wandb", "checkpoint_every", "evaluate", "process"))
}


def train(spec: RunSpec | str | Path | Any, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the SAE of `spec` into the folder `out` and return it.

    `spec` may also be a recipe's name, a YAML, an earlier run's folder, or SAELens' own runner config. `out` then loads
    with `SAE.load_from_disk(out)`; beside the weights lie `run.json` (the spec), `metrics.jsonl` and
    `runner_cfg.json`. While training, `checkpoints/` holds the last full state; a run that was interrupted or killed
    continues from it with `resume=True` and ends with the weights of an uninterrupted run (CPU, same threads). Where
    RANK and WORLD_SIZE say so, this is one of several processes that train it together (`processes`).

    Raises: UsageError for a setting that cannot work, before anything is written, for a folder that holds another
    run, and as `Loop.fit` and `joined`; KeyboardInterrupt after a signal, once the state is saved.
    """
    if isinstance(spec, str | Path):
        spec = load_spec(spec)
    elif not isinstance(spec, RunSpec):
        spec = RunSpec.from_saelens(spec)
    out = Path(out)
    check_run(spec)
    how: Any = {"resume": resume, "overwrite": overwrite, "changeable": CHANGEABLE}
    with joined(spec) as processes, contextlib.ExitStack() as stack:
        here = placed(spec)
        model, continuing = _model_of(here), resume and not overwrite
        if processes.first:
            continuing = stack.enter_context(_claimed(out, KIND, spec, **how))
        processes.meet(out)
        specs = {SAE_FOLDER: here} | _other_seeds(here)
        folders = {name: out if name == SAE_FOLDER else out / SEEDS / name for name in specs}
        if not (continuing and all((folder / WEIGHTS).is_file() for folder in folders.values())):
            for name in list(specs)[1:]:
                stack.enter_context(_claimed(folders[name], KIND, specs[name], resume=True))
            train_together(specs, folders, model, out, processes)
        elif processes.first:
            clear_checkpoints(out)
    return out


def _claimed(folder: Path, kind: str, spec: RunSpec | SuiteSpec, **how: Any) -> contextlib.AbstractContextManager[bool]:
    """Hold a folder as `claimed`; a record made before a setting was there holds its default."""
    fields = type(spec).model_fields.items()
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    return claimed(folder, kind, spec.model_dump(mode="json"), defaults=to_jsonable_python(defaults), **how)


def _other_seeds(spec: RunSpec) -> dict[str, RunSpec]:
    """Return the runs of the further seeds by name, without one where `seeds` is 1."""
    more = range(spec.seed + 1, spec.seed + spec.seeds)
    return {f"seed-{seed}": spec.model_copy(update={"seed": seed, "seeds": 1}) for seed in more}


def seed_folders(folder: Path) -> list[Path]:
    """Return the folders of all seeds that were trained into one: itself, and those in its `seeds/`, by number."""
    others = [each.parent for each in folder.glob(f"{SEEDS}/*/{WEIGHTS}")]
    return [folder, *sorted(others, key=lambda each: int(each.name.rpartition("-")[2]))]


def train_suite(
    suite: SuiteSpec,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    run_units: Callable[..., Iterator[list[Path]]] = map,
) -> list[Path]:
    """Train every group of a suite into `out/<name>` and return these folders.

    `run_units` maps the groups: one after the other here, or elsewhere, as a group is a unit of work of its own. With
    `resume`, finished groups are left alone and the one that was stopped goes on.
    Raises: UsageError as `train`, and for a suite that does not fit its memory; KeyboardInterrupt after a signal.
    """
    out, groups = Path(out), suite.groups()
    check_run(next(iter(groups[0].values())))
    with _claimed(out, SUITE_KIND, suite, resume=resume, overwrite=overwrite):
        trained = run_units(partial(train_group, suite, out), range(len(groups)))
        return [folder for folders in trained for folder in folders]


def train_group(suite: SuiteSpec, out: Path, index: int) -> list[Path]:
    """Train one group on one pass of the model and return its SAEs' folders; goes on where it was stopped.

    Raises: UsageError as `train`; KeyboardInterrupt after a signal, once the state is saved.
    """
    return train_members(suite.groups()[index], out, out / f"group-{index:03}")


def train_members(specs: Mapping[str, RunSpec], out: Path, own: Path) -> list[Path]:
    """Train SAEs on one pass of the model into `out/<name>`, their checkpoints in `own`; goes on where it was stopped.

    Raises: UsageError as `train`; KeyboardInterrupt after a signal, once the state is saved.
    """
    folders = {name: out / name for name in specs}
    if any(spec.seeds > 1 for spec in specs.values()):
        raise UsageError("seeds is for the training of one SAE; here every SAE has its own. Leave it out.")
    if all((folder / WEIGHTS).is_file() for folder in folders.values()):
        clear_checkpoints(own)
        return list(folders.values())
    model = _model_of(next(iter(specs.values())))
    with contextlib.ExitStack() as stack:
        for name, spec in specs.items():
            stack.enter_context(_claimed(folders[name], KIND, spec, resume=True))
        train_together(specs, folders, model, own)
    return list(folders.values())


def train_together(
    specs: Mapping[str, RunSpec],
    folders: Mapping[str, Path],
    model: Any,
    out: Path,
    processes: Processes = ALONE,
) -> None:
    """Train SAEs on one stream of batches, from their last checkpoint in `out` if there is one."""
    runs = {name: SAERun(spec, model, folders[name], processes) for name, spec in specs.items()}
    hook_names = [hook for spec in specs.values() for hook in spec.hook_names]
    loop = Loop(runs, open_stream(next(iter(specs.values())), model, hook_names, processes), out, processes)
    loop.resume()
    with contextlib.ExitStack() as stack:
        for run in runs.values() if processes.first else ():
            run.log = stack.enter_context(open_logger(run.spec, run.config, run.out))
        try:
            loop.fit()
            loop.finish()
        except Diverged as error:
            raise UsageError(f"{error} {loop.kept()}") from error
        for run in runs.values():
            run.tell_finished(model, loop.stream.windows.state())


def _model_of(spec: RunSpec) -> Any:
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    check_length(spec, model.tokenizer)
    return model


def check_run(spec: RunSpec) -> None:
    """Raise UsageError for settings and corpora that cannot work, before a model is loaded and anything is written."""
    kept_positions(spec.seqpos_slice, spec.context_size)
    spec.to_saelens()
    if spec.from_pretrained_path is not None:
        Origin(spec)
    check_corpus(spec.corpus, text_column=spec.text_column)
    for key in ("training_tokens", "buffer_tokens"):
        if getattr(spec, key) < spec.train_batch_size_tokens:
            raise UsageError(
                f"{key} is {getattr(spec, key)}, less than one batch of {spec.train_batch_size_tokens}. Raise it."
            )
    if spec.evaluate_every_tokens and is_pretokenized(spec.evaluate_corpus or spec.corpus):
        raise UsageError(
            "evaluate_every_tokens needs held-out text, and a pretokenised corpus holds none: set evaluate_corpus."
        )


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


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return `run.json` of a training folder, or an empty dict for an SAE that was not trained here."""
    file = Path(folder) / RUN_FILE
    return read_json(file) if file.is_file() else {}

"""Train one SAE, or several on the same batches, with checkpoints, signals and evaluations on held-out text.

`SAERun` is one SAE or transcoder in training: SAELens' trainer, and its folder. `Loop` drives one or several of them.
"""

import contextlib
import copy
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import ODD, atomic_path, disk_errors, on_signals, read_json, remove, write_json
from sae_italian.models import parse_hook_name
from sae_italian.saes.architectures import PairScaler
from sae_italian.saes.loading import check_hooks, vocabulary_hash
from sae_italian.saes.sparse import tune
from sae_italian.training.config import RunSpec
from sae_italian.training.logging import LOSS_KEYS, SAE_FILES, RunLog
from sae_italian.training.pretrained import Origin
from sae_italian.training.processes import ALONE, Processes
from sae_italian.training.shards import assembled, load_part, sharded
from sae_italian.training.stream import ActivationStream

DIVERGED = 10.0  # times the loss at the start, and times the variance of the activations
# What SAELens' own runner writes from its config into the metadata.
METADATA = (
    *("model_name", "model_class_name", "hook_name", "hook_head_index", "dataset_path", "context_size", "seqpos_slice"),
    *("prepend_bos", "exclude_special_tokens", "sequence_separator_token", "disable_concat_sequences"),
)
LOG_EVERY_STEPS = 10
HOPELESS_AFTER = 30  # steps: a start that suits explains more than the mean does by then
MOSTLY_DEAD = 2 / 3  # of the latents: from zero, 94 to 97 % of them die on a real model (docs/results/gemma-3-270m.md)
CHECKPOINTS, RANDOM_FILE = "checkpoints", "random.pt"


class Diverged(UsageError):
    """A training whose state is not worth keeping."""


class SAERun:
    """An SAE, its trainer and its folder `out`. Who drives it hands it batches of its hooks and says when to log.

    A transcoder is an SAE that reads at two hooks: its trainer takes input and target side by side, [tokens, d_in + d_out].
    """

    def __init__(self, spec: RunSpec, model: Any, out: Path, processes: Processes = ALONE):
        self.spec, self.config, self.out, self.processes = spec, spec.to_saelens(), out, processes
        torch.manual_seed(spec.seed)
        place = {"device": "cpu"} if spec.shard_latents else {}  # no device need hold all of it
        self.sae: Any = TrainingSAE.from_dict(self.config.get_training_sae_cfg_dict() | place)
        self._describe(model)
        if spec.shard_latents:
            self.sae = sharded(self.sae, spec.device)
        self.sae.to(spec.device)
        processes.adopt(self.sae)
        config = self.config.to_sae_trainer_config()
        # W&B is told by our log, else SAELens uploads every checkpoint to whatever run is open
        config.logger = replace(config.logger, log_to_wandb=False)
        self.trainer: Any = tune(SAETrainer(cfg=config, sae=self.sae, data_provider=iter(())))
        if spec.hook_name_out is not None:
            self.trainer.activation_scaler = PairScaler(self.sae.cfg.d_in)
        self.whole = self.trainer  # that of the whole SAE, while rank 0 writes (`gather`)
        self.origin = None if spec.from_pretrained_path is None else Origin(spec)
        if self.origin is not None:
            check_hooks(self.origin.sae, model)
        self.log = RunLog(spec, out if processes.first else None)
        self.output: Any = None  # of the last step
        self.start_loss = math.nan

    @property
    def n_tokens(self) -> int:
        return self.trainer.n_training_samples

    @property
    def n_steps(self) -> int:
        """Steps done."""
        return self.trainer.n_training_steps

    def _describe(self, model: Any) -> None:
        """Write the metadata that SAELens' own runner writes, truthfully for a Hugging Face model."""
        metadata, spec = self.sae.cfg.metadata, self.spec
        for field in METADATA:
            setattr(metadata, field, getattr(self.config, field))
        # read by saes.loading.model_of, and by whoever loads the model with SAELens
        metadata.model_from_pretrained_kwargs = {} if spec.dtype == "float32" else {"dtype": spec.dtype}
        metadata.harvested_from = "hf"
        metadata.vocabulary = vocabulary_hash(model.tokenizer)  # read by saes.loading.check_hooks
        metadata.model_revision = getattr(model, "loaded_from", {}).get("revision")
        metadata.hf_hook_name = parse_hook_name(spec.hook_name).module_path(model.config)
        if spec.hook_name_out is not None:
            metadata.hook_name_out = spec.hook_name_out

    def _beside(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the trainer takes, of the activations [tokens, d_in] by hook name."""
        rows = [batch[name] for name in self.spec.hook_names]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def prepare(self, stream: ActivationStream) -> None:
        """Estimate the input scale from the stream's first buffer, which costs neither a token nor a forward pass; then take
        the weights of the SAE that the training starts from, if there is one."""
        scaler, cfg = self.trainer.activation_scaler, self.sae.cfg
        samples = {name: stream.sample(name) for name in self.spec.hook_names}
        estimates = {"expected_average_only_in": "scaling_factor", "covariance_whitening": "whitening"}
        what = estimates.get(cfg.normalize_activations)
        if what is not None and getattr(scaler, what) is None:
            with contextlib.redirect_stderr(io.StringIO()):  # SAELens shows a bar of one step
                getattr(scaler, f"estimate_{what}")(cfg.d_in, iter([self._beside(samples)]), 1)
        if self.origin is not None and self.n_steps == 0:
            x, y = (samples[self.spec.hook_names[place]] for place in (0, -1))
            self.origin.start(self.sae, x, y, scaler.scaling_factor)

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Take one training step. It counts as done at once: log it as step `n_steps` - 1."""
        self.trainer.maybe_reset_sparsity()
        self.output = self.processes.step(self.trainer, self._beside(batch))
        self.trainer.n_training_steps += 1

    def row(self) -> dict[str, Any]:
        """Return the last step's metrics, in SAELens' names. Raises: Diverged."""
        row = self.processes.row(self.trainer, self.output)
        losses = [row[key] for key in LOSS_KEYS if key in row]
        if math.isnan(self.start_loss):
            self.start_loss = losses[0]
        if not all(map(math.isfinite, losses)):
            raise self._diverged(f"the loss became {row['losses/overall_loss']}")
        if losses[0] > DIVERGED * self.start_loss and 1 - row["metrics/explained_variance"] > DIVERGED:
            raise self._diverged(f"the loss grew from {self.start_loss:.3g} to {losses[0]:.3g}")
        return row

    def record(self) -> dict[str, Any]:
        """Log the last step's metrics and return them. Raises: Diverged."""
        row = self.row()
        self.log(row, self.n_steps - 1)
        return row

    def check(self) -> None:
        """Raise Diverged when the loss has exploded, or a weight is not finite; UsageError as `Processes.check_equal`."""
        if self.output is not None:  # None where a run is resumed whose last step was done
            self.row()
        wrong = [name for name, weight in self.sae.named_parameters() if not torch.isfinite(weight).all()]
        if self.processes.any_of(bool(wrong))[0]:
            raise self._diverged(f"{wrong[0] if wrong else 'a weight elsewhere'} is no longer finite")
        self.processes.check_equal(self)

    def _diverged(self, what: str) -> Diverged:
        return Diverged(f"{what} at step {self.n_steps - 1}: the training has diverged. Lower lr (now {self.spec.lr}).")

    def evaluate(self, model: Any) -> None:
        """Judge the SAE as it would be saved now, and log the card's means as `eval/...`."""
        folder = self.out / ".evaluated.tmp"  # goes with the next claim after a kill
        self._folded().save_inference_model(folder)
        self.log.evaluation(folder, model, self.n_steps - 1)
        remove(folder)

    def _folded(self) -> Any:
        """Return a copy of the SAE in training with the input scale put into its weights: it takes raw activations."""
        sae, scaler = copy.deepcopy(self.whole.sae), self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if (white := scaler.whitening) is not None:
            mean, matrix, inverse = (each.to(sae.device) for each in (white.mean, white.matrix, white.inverse_matrix))
            sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
        return sae

    def gather(self, whole: bool) -> None:
        """Hold at rank 0 the whole of an SAE with sharded latents, to be written, or no longer."""
        self.whole = assembled(self.trainer) if whole else self.trainer

    def save(self, folder: Path) -> None:
        """Write the whole state of this SAE's training into a new folder."""
        self.whole.save_checkpoint(checkpoint_name=folder.name, base_path=folder.parent)
        origin = self.origin and self.origin.record
        write_json(folder / "run_state.json", {"start_loss": self.start_loss, "origin": origin})

    def load(self, folder: Path) -> None:
        """Continue from a saved state."""
        if self.spec.shard_latents:
            load_part(self.trainer, folder)
        else:
            self.sae.load_weights_from_checkpoint(folder)
            self.trainer.load_trainer_state(folder)
        state = read_json(folder / "run_state.json")
        self.start_loss = state["start_loss"]
        if self.origin is not None:
            self.origin.resume(state["origin"])

    def finish(self) -> None:
        """Fold the input scale and write the SAE in SAELens' format, the weights last."""
        self.whole.set_final_sae_metadata()
        if self.origin is not None:
            self.sae.cfg.metadata.started_from = self.origin.finish(self.sae.W_dec, self.out)
        with atomic_path(self.out / "sparsity.safetensors") as temporary:
            save_file({"sparsity": self.whole.log_feature_sparsity}, temporary)
        write_json(self.out / "runner_cfg.json", json.loads(json.dumps(self.config.to_dict(), default=str)))
        staging = self.out / ".final"
        self._folded().save_inference_model(staging)
        for name in SAE_FILES:
            os.replace(staging / name, self.out / name)
        remove(staging)


def checkpoints(out: Path) -> list[Path]:
    """Return the whole checkpoints of a training, the newest last; what else lies beside them is not ours."""
    saved = [path for path in (out / CHECKPOINTS).glob("*") if re.fullmatch("[0-9]+", path.name)]
    return sorted(saved, key=lambda path: int(path.name))


def clear_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a training that is done, and folders that held nothing else."""
    for saved in checkpoints(out):
        remove(saved)
    for folder in (out / CHECKPOINTS, out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class Loop:
    """Drives `runs`, by name, on the batches of one stream; all have the same training_tokens and batch size.

    The state of the stream and of all runs is one checkpoint, `out/checkpoints/<tokens>`, whole or absent; only the last
    one is kept. Sizes and intervals are those of the first run's spec. Of several processes the first one writes.
    """

    def __init__(self, runs: Mapping[str, SAERun], stream: ActivationStream, out: Path, processes: Processes = ALONE):
        self.runs, self.stream, self.out, self.processes = dict(runs), stream, out, processes
        self.first = next(iter(self.runs.values()))
        self.spec = self.first.spec
        self.interrupted = False
        self.dead: dict[str, int] = {}  # latents of each run at the last look
        self.warned: set[str] = set()  # runs whose start is wrong

    def kept(self) -> str:
        """Return the end of a message: which state is safe."""
        saved = checkpoints(self.out)
        return f"The last good checkpoint is {saved[-1]}." if saved else "There was no checkpoint yet."

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one. Raises: DataError when it cannot be read."""
        if not (saved := checkpoints(self.out)):
            return
        last = saved[-1]
        try:
            for name, run in self.runs.items():
                run.load(last / name)
            self.stream.load(last)
            cpu, *gpus = torch.load(last / RANDOM_FILE)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
        except (*ODD, OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            why = " ".join(str(error).split())
            raise DataError(
                f"checkpoint {last} cannot be read ({why:.200}). Remove it, or start over with --overwrite."
            ) from error

    def fit(self) -> None:
        """Train to the end, or to the next signal, which saves the state and raises KeyboardInterrupt.

        Raises: Diverged (the last good checkpoint is kept); UsageError when the corpus ends early (the state is saved) or
        the disk is full.
        """
        for run in self.runs.values():
            run.log.cut(run.n_steps)
        what = "train SAE" if len(self.runs) == 1 else f"train {len(self.runs)} SAEs"
        with on_signals(self._ask_to_stop):
            hidden = not self.processes.first
            with progress("first activations", total=len(self.stream.holes), leave=False, hidden=hidden) as bar:
                self.stream.fill(bar.update)
            for run in self.runs.values():
                run.prepare(self.stream)
            self.saved_at = time.monotonic()
            with progress(what, total=self.spec.training_tokens, initial=self.first.n_tokens, hidden=hidden) as bar:
                while self.first.n_tokens < self.spec.training_tokens:
                    self._advance(bar)

    def _advance(self, bar: Any) -> None:
        """Take one step, and do what is due after it."""
        spec, before = self.spec, self.first.n_tokens
        self._step()
        if (self.first.n_steps - 1) % LOG_EVERY_STEPS == 0:
            rows = [run.record() for run in self.runs.values()]
            explained = [row["metrics/explained_variance"] for row in rows]
            dead = [row["sparsity/dead_features"] for row in rows]
            bar.set_postfix(ev=f"{sum(explained) / len(rows):.3f}", dead=sum(dead), refresh=False)
            for look in zip(self.runs, explained, dead, strict=True):
                self._warn_of_the_start(bar, *look)
        bar.update(self.first.n_tokens - before)
        if self._passed(spec.evaluate_every_tokens, before):
            self._by_first(lambda: [run.evaluate(self.stream.model) for run in self.runs.values()])
        by_time = 0 < spec.checkpoint_every_minutes <= (time.monotonic() - self.saved_at) / 60
        stop, by_time = self.processes.any_of(self.interrupted, by_time)
        if stop or by_time or self._passed(spec.checkpoint_every_tokens, before):
            self.save()
        if stop:
            raise KeyboardInterrupt(f"saved at {self.first.n_tokens:,} tokens; --resume continues")

    def _warn_of_the_start(self, bar: Any, name: str, explained: float, dead: int) -> None:
        """Say once a run, while it is still cheap, that it explains less than the mean alone would, or that its latents die."""
        spec, steps, before = self.runs[name].spec, self.first.n_steps, self.dead.get(name, dead)
        self.dead[name] = dead
        dying = dead > MOSTLY_DEAD * spec.sae["d_sae"] and dead >= before
        early = steps <= max(spec.lr_warm_up_steps, HOPELESS_AFTER)
        if early or name in self.warned or not (dying or explained < 0) or not self.processes.first:
            return
        self.warned.add(name)
        at_zero = spec.sae.get("start") == "zero"
        remedy = "Set sae.start=mean." if at_zero else "Lower lr, or raise sae.aux_loss_coefficient (TopK)."
        bar.write(
            f"sae-italian: {name} after {steps} steps: explained variance {explained:.2f}, {dead:,} of "
            f"{spec.sae['d_sae']:,} latents dead{' and more with every step' if dying else ''}. It does not fit these "
            f"activations. {remedy}",
            file=sys.stderr,
        )

    def _step(self) -> None:
        try:
            batch = next(self.stream)
        except UsageError as error:
            if not self.stream.ended or self.first.n_steps == 0:
                raise
            self.save()
            raise UsageError(
                f"the corpus ended after {self.first.n_tokens:,} of the {self.spec.training_tokens:,} training_tokens; "
                f"the state is saved. --resume with repeat_corpus=true goes on from the start of the corpus."
            ) from error
        for run in self.runs.values():
            run.step(batch)

    def _passed(self, every: int, before: int) -> bool:
        """Return whether a multiple of `every` was passed, so a resumed run saves where an uninterrupted one would."""
        return every > 0 and self.first.n_tokens // every > before // every

    def save(self) -> None:
        """Save the state of everything as the last checkpoint, then remove the one before.

        Raises: Diverged when the state is bad, UsageError when it is not the same in all processes, or the disk is full; the
        earlier checkpoint is kept.
        """
        self._by_first(self._write)
        self.saved_at = time.monotonic()

    def _by_first(self, do: Callable[[], object]) -> None:
        """Let rank 0 do something with the SAEs, checked and whole, while the others wait."""
        for run in self.runs.values():
            run.check()
            run.gather(whole=True)
        self.processes.by_first(do)
        for run in self.runs.values():
            run.gather(whole=False)

    def _write(self) -> None:
        target = self.out / CHECKPOINTS / str(self.first.n_tokens)
        if not target.exists():
            with disk_errors(self.out, self.kept()), atomic_path(target) as temporary:
                temporary.mkdir(parents=True)
                for name, run in self.runs.items():
                    run.save(temporary / name)
                self.stream.save(temporary)
                torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], temporary / RANDOM_FILE)
        for old in checkpoints(self.out):
            if old != target:
                remove(old)
        for name, run in self.runs.items():
            run.log.checkpoint(target / name, run.n_tokens)

    def finish(self) -> None:
        """Write all SAEs, then drop the checkpoints. Raises: Diverged; UsageError when the disk is full."""
        self._by_first(self._finish)

    def _finish(self) -> None:
        with disk_errors(self.out, self.kept()):
            for run in self.runs.values():
                run.finish()
        clear_checkpoints(self.out)

    def _ask_to_stop(self, _number: int, _frame: Any) -> None:
        """Let a signal finish the step and save, then stop; a second one stops at once."""
        if self.first.n_steps == 0:
            raise KeyboardInterrupt("no step was done yet; --resume starts the training")
        if self.interrupted:
            raise KeyboardInterrupt("at once; --resume continues from the last checkpoint")
        self.interrupted = True

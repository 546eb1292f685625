"""Train one SAE, or several on the same batches, with checkpoints, signals and evaluations on held-out text."""

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, disk_errors, on_signals, remove
from sae_italian.saes.loading import tensors_alone
from sae_italian.training.processes import ALONE, Processes
from sae_italian.training.sae_run import SAERun
from sae_italian.training.stream import ActivationStream

LOG_EVERY_STEPS = 10
HOPELESS_AFTER = 30  # steps: a start that suits explains more than the mean does by then
MOSTLY_DEAD = 2 / 3  # of the latents: from zero, 94 to 97 % of them die on a real model (docs/results/gemma-3-270m.md)
CHECKPOINTS, RANDOM_FILE = "checkpoints", "random.pt"
UNREADABLE = (DataError, OSError, SafetensorError, ValueError, RuntimeError, KeyError, EOFError)


def clear_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a training that is done, and a folder that held nothing else."""
    remove(out / CHECKPOINTS)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


class Loop:
    """Drives `runs`, by name, on the batches of one stream; all have the same training_tokens and batch size.

    The state of the stream and of all runs is one checkpoint, `out/checkpoints/<tokens>`, whole or absent; only the last
    one is kept. Sizes and intervals are those of the first run's spec. Of several processes the first one writes.
    """

    def __init__(self, runs: Mapping[str, SAERun], stream: ActivationStream, out: Path, processes: Processes = ALONE):
        self.processes = processes
        self.runs, self.stream, self.out = dict(runs), stream, out
        self.first = next(iter(self.runs.values()))
        self.spec = self.first.spec
        self.interrupted = False
        self.dead: dict[str, int] = {}  # latents of each run at the last look
        self.warned: set[str] = set()  # runs whose start is wrong
        self.saved_at = time.monotonic()

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, if there is one."""
        saved = [path for path in (self.out / CHECKPOINTS).glob("*") if re.fullmatch("[0-9]+", path.name)]
        return max(saved, key=lambda path: int(path.name), default=None)

    def kept(self) -> str:
        """Return the end of a message: which state is safe."""
        last = self.last_checkpoint()
        return f"The last good checkpoint is {last}." if last else "There was no checkpoint yet."

    def resume(self) -> bool:
        """Restore the last checkpoint; False when there is none. Raises: DataError when it cannot be read."""
        last = self.last_checkpoint()
        if last is None:
            return False
        try:
            with tensors_alone():
                for name, run in self.runs.items():
                    run.load(last / name)
                self.stream.load(last)
                cpu, *gpus = torch.load(last / RANDOM_FILE)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
        except UNREADABLE as error:
            why = " ".join(str(error).split())
            raise DataError(
                f"checkpoint {last} cannot be read ({why:.200}). Remove it, or start over with --overwrite."
            ) from error
        return True

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
            explained = sum(row["metrics/explained_variance"] for row in rows) / len(rows)
            dead = sum(int(row["sparsity/dead_features"]) for row in rows)
            bar.set_postfix(ev=f"{explained:.3f}", dead=dead, refresh=False)
            for name, row in zip(self.runs, rows, strict=True):
                self._warn_of_the_start(
                    bar, name, row["metrics/explained_variance"], int(row["sparsity/dead_features"])
                )
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
        remedy = "Lower lr, or raise sae.aux_loss_coefficient (TopK)."
        if spec.sae.get("start") == "zero":
            remedy = "Set sae.start=mean."
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
        self._check()
        self._by_first(self._write)
        self.saved_at = time.monotonic()

    def _by_first(self, do: Callable[[], object]) -> None:
        """Let rank 0 do something with the SAEs, whole, while the others wait."""
        for run in self.runs.values():
            run.gather(whole=True)
        self.processes.by_first(do)
        for run in self.runs.values():
            run.gather(whole=False)

    def _check(self) -> None:
        for run in self.runs.values():
            run.check()
            self.processes.check_equal(run)

    def _write(self) -> None:
        target = self.out / CHECKPOINTS / str(self.first.n_tokens)
        if not target.exists():
            with disk_errors(self.out, self.kept()), atomic_path(target) as temporary:
                temporary.mkdir(parents=True)
                for name, run in self.runs.items():
                    run.save(temporary / name)
                self.stream.save(temporary)
                torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], temporary / RANDOM_FILE)
        for old in target.parent.iterdir():
            if old != target:
                remove(old)
        for name, run in self.runs.items():
            run.log.checkpoint(target / name, run.n_tokens)

    def finish(self) -> None:
        """Write all SAEs, then drop the checkpoints. Raises: Diverged; UsageError when the disk is full."""
        self._check()
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

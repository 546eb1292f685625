"""Train one SAE, or several on the same batches, with checkpoints, signals and evaluations on held-out text."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import disk_errors
from sae_italian.training.checkpoint import Checkpoints, cut_metrics
from sae_italian.training.sae_run import SAERun
from sae_italian.training.stream import ActivationStream

LOG_EVERY_STEPS = 10
# Ctrl-C, `kill`, a closed terminal, and Slurm's warning before the time is up.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Loop:
    """Drives `runs`, by name, on the batches of one stream; all have the same training_tokens and batch size.

    The state of the stream and of all runs is one checkpoint in `checkpoints`. Sizes and intervals are those of the first
    run's spec.
    """

    def __init__(self, runs: Mapping[str, SAERun], stream: ActivationStream, checkpoints: Checkpoints):
        self.runs, self.stream, self.checkpoints = dict(runs), stream, checkpoints
        self.first = next(iter(self.runs.values()))
        self.spec = self.first.spec
        self.interrupted = False
        self.saved_at = time.monotonic()

    def resume(self) -> bool:
        """Restore the last checkpoint; False when there is none. Raises: DataError as `Checkpoints.load`."""

        def read(folder: Path) -> None:
            for name, run in self.runs.items():
                run.load(folder / name)
            self.stream.load(folder)

        return self.checkpoints.load(read)

    def fit(self) -> None:
        """Train to the end, or to the next signal, which saves the state and raises KeyboardInterrupt.

        Raises: UsageError when the training diverges (the last good checkpoint is kept), the corpus ends early (the
        state is saved) or the disk is full.
        """
        for run in self.runs.values():
            cut_metrics(run.metrics_file, run.n_steps)
        what = "train SAE" if len(self.runs) == 1 else f"train {len(self.runs)} SAEs"
        sizes: Any = {"total": self.spec.training_tokens, "initial": self.first.n_tokens, "unit": "tok"}
        with self._signals(), tqdm(desc=what, unit_scale=True, disable=None, **sizes) as bar:
            for run in self.runs.values():
                run.prepare(self.stream)
            self.saved_at = time.monotonic()
            while self.first.n_tokens < self.spec.training_tokens:
                before = self.first.n_tokens
                self._step()
                self._record(bar)
                bar.update(self.first.n_tokens - before)
                if self._passed(self.spec.evaluate_every_tokens, before):
                    for run in self.runs.values():
                        run.evaluate(self.stream.model)
                if self._checkpoint_is_due(before):
                    self.save()
                if self.interrupted:
                    raise KeyboardInterrupt(f"saved at {self.first.n_tokens:,} tokens; --resume continues")

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

    def _record(self, bar: Any) -> None:
        if (self.first.n_steps - 1) % LOG_EVERY_STEPS:
            return
        with self._naming_what_is_safe():
            rows = [run.record(run.row()) for run in self.runs.values()]
        explained = sum(row["metrics/explained_variance"] for row in rows) / len(rows)
        bar.set_postfix(ev=f"{explained:.3f}", dead=sum(int(row["sparsity/dead_features"]) for row in rows))

    def _passed(self, every: int, before: int) -> bool:
        """Return whether a multiple of `every` was passed, so a resumed run saves where an uninterrupted one would."""
        return every > 0 and self.first.n_tokens // every > before // every

    def _checkpoint_is_due(self, before: int) -> bool:
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = 0 < self.spec.checkpoint_every_minutes <= minutes
        return self.interrupted or by_time or self._passed(self.spec.checkpoint_every_tokens, before)

    def save(self) -> None:
        """Save the state of everything, unless it is bad. Raises: UsageError when it is, or the disk is full."""

        def write(folder: Path) -> None:
            for name, run in self.runs.items():
                run.save(folder / name)
            self.stream.save(folder)

        with self._naming_what_is_safe():
            for run in self.runs.values():
                run.check()
        self.checkpoints.save(self.first.n_tokens, write)
        saved = self.checkpoints.last()
        for name, run in self.runs.items():
            if saved:
                run.log.checkpoint(saved / name, run.n_tokens)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def _naming_what_is_safe(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{error} {self.checkpoints.kept()}") from error

    def finish(self) -> None:
        """Write all SAEs, then drop the checkpoints. Raises: UsageError when one has diverged or the disk is full."""
        with self._naming_what_is_safe():
            for run in self.runs.values():
                run.check()
        with disk_errors(self.checkpoints.folder.parent, self.checkpoints.kept()):
            for run in self.runs.values():
                run.finish()
        self.checkpoints.clear()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let a signal finish the step and save, then stop; a second one stops at once.

        Only in the main thread, and restored afterwards. `nohup` ignores SIGHUP, and so it stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(_number: int, _frame: Any) -> None:
            if self.first.n_steps == 0:
                raise KeyboardInterrupt("no step was done yet; --resume starts the training")
            if self.interrupted:
                raise KeyboardInterrupt("at once; --resume continues from the last checkpoint")
            self.interrupted = True

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        heard = [number for number, was in before.items() if was != signal.SIG_IGN or number == signal.SIGINT]
        try:
            for number in heard:
                signal.signal(number, ask_to_stop)
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number] or signal.SIG_DFL)

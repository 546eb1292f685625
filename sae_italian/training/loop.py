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
from sae_italian.training.checkpoint import Checkpoints
from sae_italian.training.sae_run import SAERun
from sae_italian.training.stream import ActivationStream

LOG_EVERY_STEPS = 10


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
        return self.checkpoints.load(self._load)

    def _load(self, folder: Path) -> None:
        for name, run in self.runs.items():
            run.load(folder / name)
        self.stream.load(folder)

    def _save(self, folder: Path) -> None:
        for name, run in self.runs.items():
            run.save(folder / name)
        self.stream.save(folder)

    def fit(self) -> None:
        """Train to the end, or to the next signal, which saves the state and raises KeyboardInterrupt.

        Raises: UsageError when the training diverges (the last good checkpoint is kept), the corpus ends early (the
        state is saved) or the disk is full.
        """
        for run in self.runs.values():
            run.metrics.truncate(run.n_steps)
        with self._signals(), self._progress() as bar:
            for run in self.runs.values():
                run.prepare(self.stream)
            self.saved_at = time.monotonic()
            while self.first.n_tokens < self.spec.training_tokens:
                before = self.first.n_tokens
                self._step()
                self._record(bar)
                bar.update(self.first.n_tokens - before)
                self._evaluate(before)
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
        with self._naming():
            rows = [run.record() for run in self.runs.values()]
        values = [row["metrics/explained_variance"] for row in rows]
        bar.set_postfix(
            ev=f"{sum(values) / len(values):.3f}", dead=sum(int(row["sparsity/dead_features"]) for row in rows)
        )

    def _evaluate(self, before: int) -> None:
        every = self.spec.evaluate_every_tokens
        if every and _passed(every, before, self.first.n_tokens):
            for run in self.runs.values():
                run.evaluate(self.stream.model)

    def _checkpoint_is_due(self, before: int) -> bool:
        minutes = (time.monotonic() - self.saved_at) / 60
        return (
            self.interrupted
            or _passed(self.spec.checkpoint_every_tokens, before, self.first.n_tokens)
            or 0 < self.spec.checkpoint_every_minutes <= minutes
        )

    def save(self) -> None:
        """Save the state of everything, unless it is bad. Raises: UsageError when it is, or the disk is full."""
        with self._naming():
            for run in self.runs.values():
                run.check()
        self.checkpoints.save(self.first.n_tokens, self._save)
        saved = self.checkpoints.last()
        for name, run in self.runs.items():
            if saved:
                run.log.checkpoint(saved / name, run.n_tokens)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Add to an error of a run what is safe."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{error} {self.checkpoints.kept()}") from error

    def finish(self) -> None:
        """Write all SAEs, then drop the checkpoints. Raises: UsageError when the disk is full."""
        with disk_errors(self.checkpoints.folder.parent, self.checkpoints.kept()):
            for run in self.runs.values():
                run.finish()
        self.checkpoints.clear()

    def _progress(self) -> Any:
        return tqdm(
            total=self.spec.training_tokens,
            initial=self.first.n_tokens,
            unit="tok",
            unit_scale=True,
            desc="train SAE" if len(self.runs) == 1 else f"train {len(self.runs)} SAEs",
            disable=None,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM finish the step and save, then stop; a second one stops at once.

        Only in the main thread, and restored afterwards.
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

        before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _passed(every: int, before: int, now: int) -> bool:
    """Return whether a multiple of `every` was passed, so a resumed run saves where an uninterrupted one would."""
    return now // every > before // every

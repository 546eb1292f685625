"""The last full state of a training run: whole or absent, never replaced by a bad one, gone when the run is finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_italian.base.errors import DataError
from sae_italian.base.storage import atomic_path, disk_errors, fingerprint, read_json, remove, write_json

STATE_FILE = "state.json"
RANDOM_FILE = "random.safetensors"


class Checkpoints:
    """Folder `checkpoints/<tokens>` of a run or of a group of runs; only the last one is kept.

    `identity` is the settings that decide the result; a checkpoint of other settings is refused.
    """

    def __init__(self, out: Path, identity: Any):
        self.folder = out / "checkpoints"
        self.identity = fingerprint(identity)

    def last(self) -> Path | None:
        """Return the newest whole checkpoint, if there is one."""
        saved = [path for path in self.folder.iterdir() if path.name.isdigit()] if self.folder.is_dir() else []
        return max(saved, key=lambda path: int(path.name), default=None)

    def save(self, n_tokens: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder beside the last checkpoint, make it the last one, then remove the old one.

        Raises: UsageError when the disk is full; the last checkpoint is kept.
        """
        target = self.folder / str(n_tokens)
        if target.exists():
            return
        with disk_errors(self.folder.parent, self.kept()), atomic_path(target) as temporary:
            temporary.mkdir(parents=True)
            write(temporary)
            save_file(_random_state(), temporary / RANDOM_FILE)
            write_json(temporary / STATE_FILE, {"n_tokens": n_tokens, "identity": self.identity})
            _sync(temporary)
        for old in self.folder.iterdir():
            if old != target:
                remove(old)

    def load(self, read: Callable[[Path], None]) -> bool:
        """Let `read` restore the state of the last checkpoint; False when there is none, so the run starts again.

        Raises: DataError when it cannot be read or is of another config.
        """
        last = self.last()
        if last is None:
            return False
        try:
            if read_json(last / STATE_FILE)["identity"] != self.identity:
                raise DataError(
                    f"checkpoint {last} belongs to another config than this run's. Put the right one back, remove it "
                    "to start again, or use --overwrite."
                )
            read(last)
            _restore_random(load_file(last / RANDOM_FILE))
        except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"checkpoint {last} cannot be read ({_line(error)}). Remove it, or start over with --overwrite."
            ) from error
        return True

    def kept(self) -> str:
        """Return the end of a message: which state is safe."""
        last = self.last()
        return f"The last good checkpoint is {last}." if last else "There was no checkpoint yet."

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return state


def _restore_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    for name, saved in state.items():
        device = name.partition(".")[2]
        if device and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(saved, int(device))


class Metrics:
    """metrics.jsonl: one line a row, kept on resume up to the step that is continued."""

    def __init__(self, file: Path):
        self.file = file

    def truncate(self, n_steps: int) -> None:
        """Drop the rows of step `n_steps` and after, and a half-written last line."""
        if self.file.is_file():
            with atomic_path(self.file) as temporary:
                temporary.write_text("".join(line for line in self._lines(n_steps)), encoding="utf-8")

    def _lines(self, n_steps: int) -> Iterator[str]:
        for line in self.file.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] < n_steps:
                    yield line
            except json.JSONDecodeError:
                continue

    def append(self, step: int, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **row}) + "\n")

"""What a training run keeps while it goes on: its last full state, whole or absent, and its metrics, row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from sae_italian.base.errors import DataError
from sae_italian.base.storage import atomic_path, disk_errors, fingerprint, read_json, remove, write_json, write_text

STATE_FILE, RANDOM_FILE = "state.json", "random.pt"


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
            torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], temporary / RANDOM_FILE)
            write_json(temporary / STATE_FILE, {"n_tokens": n_tokens, "identity": self.identity})
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
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
            cpu, *gpus = torch.load(last / RANDOM_FILE)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
        except DataError:
            raise
        except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            why = " ".join(str(error).split())[:200]
            raise DataError(
                f"checkpoint {last} cannot be read ({why}). Remove it, or start over with --overwrite."
            ) from error
        return True

    def kept(self) -> str:
        """Return the end of a message: which state is safe."""
        last = self.last()
        return f"The last good checkpoint is {last}." if last else "There was no checkpoint yet."

    def clear(self) -> None:
        """Remove all of them, and a folder that held nothing else."""
        remove(self.folder)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def append_metrics(file: Path, step: int, row: dict[str, Any]) -> None:
    """Add a step's row to metrics.jsonl."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": step, **row}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a line that is cut short, or being written, is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def cut_metrics(file: Path, n_steps: int) -> None:
    """Drop the rows of step `n_steps` and after, which a resumed run writes again."""
    if file.is_file():
        rows = [row for row in read_metrics(file) if row["step"] < n_steps]
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

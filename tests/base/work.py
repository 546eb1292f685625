"""Units of work for the engine's tests: functions that another process can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path, write_text


def square(number: int) -> int:
    return number * number


def write(folder: Path, number: int) -> int:
    """Write the file of one unit and a line in the log of who did it."""
    log(folder, number)
    write_text(folder / f"{number}.txt", str(number * number))
    return number * number


def log(folder: Path, number: int) -> None:
    with (folder / "log").open("a") as handle:
        handle.write(f"{number} {os.getpid()}\n")


def read_log(folder: Path) -> list[tuple[int, int]]:
    lines = (folder / "log").read_text().splitlines() if (folder / "log").is_file() else []
    return [(int(number), int(pid)) for number, pid in (line.split() for line in lines)]


def write_slowly(folder: Path, number: int) -> int:
    """As `write`; the unit's file is open, under its temporary name, for a while."""
    log(folder, number)
    with atomic_path(folder / f"{number}.txt") as temporary:
        temporary.write_text(str(number * number))
        time.sleep(0.15)
    return number * number


def die_once(folder: Path, number: int) -> int:
    """As `write`; the first process that is given unit 3 is killed with its file half written."""
    log(folder, number)
    with atomic_path(folder / f"{number}.txt") as temporary:
        temporary.write_text(str(number * number))
        if number == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> int:
    if number == 2:
        raise UsageError("unit 2: expected a corpus, found none. Give --corpus.")
    return number


def break_down(number: int) -> int:
    return [1, 2][number + 2]


class Unpicklable(Exception):
    def __init__(self, first: str, second: Any):
        super().__init__(first)


def raise_unpicklable(number: int) -> None:
    raise Unpicklable("a reason", lambda: None)


class Writer:
    """A function of work in a folder; a process that is given it opens the folder, and counts that in a file."""

    def __init__(self, do: Callable[[Path, int], int], folder: Path):
        self.do, self.folder = do, folder

    def __reduce__(self) -> tuple[Any, ...]:
        return open_writer, (self.do, self.folder)

    def __call__(self, number: int) -> int:
        return self.do(self.folder, number)


def open_writer(do: Callable[[Path, int], int], folder: Path) -> Writer:
    with (folder / "setups").open("a") as handle:
        handle.write(f"{os.getpid()}\n")
    return Writer(do, folder)


def seen_by(folder: Path) -> bool:
    """Return whether this process has left its mark, `pool-PID`, in the folder before."""
    return (folder / f"pool-{os.getpid()}").exists()


class Sent(int):
    """A result whose process is told to end while it is on its way."""

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return int, (int(self),)

"""One builder at a time in a folder. The lock is the operating system's and ends with the process, so none goes stale."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sae_italian.base.errors import UsageError


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the folders, which are made where missing, for this process alone.

    Raises: UsageError when another process holds one, or it cannot be made or written to.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; atomic files and identical bytes still hold there
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; an output folder was expected. Give another path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}). Give a folder you may write to."
        ) from error
    try:
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} cannot be written to (read-only). Give a folder you may write to.")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{folder} is being written by another build. Wait for it, or give another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)

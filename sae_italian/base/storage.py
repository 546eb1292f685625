"""Files that are whole or absent: atomic writes, content hashes, the folder of a run, its lock, and a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError

RUN_FILE, LOCK_FILE = "run.json", ".lock"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it there when the block ends well, remove it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    """Return whether a path is what a killed `atomic_path` leaves."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the folders, which are made where missing, for this process alone. A process that dies holds nothing.

    Raises: UsageError when another process holds one, or it cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        for folder in folders:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"{folder} is a file; an output folder was expected. Give another path.")
            lock = FileLock(folder / LOCK_FILE, timeout=0)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout as error:
                raise UsageError(
                    f"{folder} is being written by another build. Wait for it, or give another folder."
                ) from error
            except OSError as error:
                raise UsageError(
                    f"{folder} cannot be written to ({error.strerror}). Give a folder you may write to."
                ) from error
            stack.callback(lock.release)
            stack.callback(remove, folder / LOCK_FILE)
        yield


def disk_full(error: BaseException) -> bool:
    """Return whether an error of Python, torch or safetensors means that a file could not grow."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # Rust gives the number as text, torch only the name of what wrote.
    signs = ("No space left", "os error 28", "os error 27", "iostream", "inline_container", "PytorchStreamWriter")
    return any(sign in str(error) for sign in signs)


def free_space(path: Path) -> str:
    """Return how much room there is on the disk of a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**30:,.1f} GiB"


@contextmanager
def disk_errors(folder: Path, kept: str = "What is finished is kept.") -> Iterator[None]:
    """Turn what is raised in the block when the disk is full into one line, which says what is kept.

    Raises: UsageError for a full disk; every other error passes as it is.
    """
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        raise UsageError(
            f"the disk of {folder} is full ({free_space(folder)} free). {kept} Make room, then run the same "
            "command with --resume."
        ) from error


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return a short hash of any JSON-serialisable value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def package_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    names = ("sae-italian", "sae-lens", "transformer-lens", "transformers", "torch", "tokenizers", "datasets")
    return {name: version(name) for name in names}


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old!r}, is now {new!r}"


def _content(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if child.name != LOCK_FILE]


def claim_folder(out: Path, kind: str, spec: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> bool:
    """Make `out` the folder of the run described by `spec`; return True when it continues an earlier one.

    A new or empty folder is claimed by writing `run.json`. A folder that holds the same run is continued with
    `resume`; any run of ours is replaced with `overwrite`. Everything else is refused and left untouched.

    Raises: UsageError, naming the first setting that differs when a resumed run is not the same one.
    """
    spec = json.loads(json.dumps(spec, default=str))
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; an output folder was expected. Give another path.")
    existing = out / RUN_FILE
    if out.exists() and any(not _is_temporary(child) for child in _content(out)):
        if not existing.is_file():
            raise UsageError(f"{out} is not empty and holds no run of ours. Give an empty or new folder.")
        earlier = read_json(existing)
        if resume and not overwrite:
            if earlier["kind"] != kind:
                raise UsageError(f"{out} holds a {earlier['kind']} run, not a {kind} run. Give another folder.")
            if earlier["spec"] != spec:
                difference = _first_difference(earlier["spec"], spec)
                raise UsageError(f"{out} holds another {kind} run ({difference}). Undo that, or use --overwrite.")
            for left in [path for path in out.rglob(".*.tmp") if _is_temporary(path)]:
                remove(left)
            return True
        if not overwrite:
            raise UsageError(
                f"{out} already holds a {earlier['kind']} run of {earlier['created']}. "
                "Add --resume to finish it, --overwrite to replace it, or give another folder."
            )
        for child in _content(out):
            remove(child)
    write_json(existing, {"kind": kind, "created": utc_now(), "spec": spec, "versions": package_versions()})
    return False

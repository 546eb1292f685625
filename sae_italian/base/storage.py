"""Files that are whole or absent: atomic writes, content hashes, and the folder of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError

RUN_FILE = "run.json"


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
    if out.exists() and any(not _is_temporary(child) for child in out.iterdir()):
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
        for child in out.iterdir():
            remove(child)
    write_json(existing, {"kind": kind, "created": utc_now(), "spec": spec, "versions": package_versions()})
    return False

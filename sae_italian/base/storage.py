"""Files that are whole or absent: atomic writes, content hashes, the folder of a run, its lock, and a full disk.

Every folder that is written is claimed by one function, `claimed`: it is locked, it says in `run.json` what it is, a
stopped run goes on in it, and an overwritten one loses our own files and no other.
"""

import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError, SaeItalianError, UsageError

RUN_FILE, LOCK_FILE = "run.json", ".lock"
# Names of the files that we and the libraries write into our folders. `--overwrite` removes these and nothing else.
OURS = """
    *.safetensors spans-*.npy seen-*.npz data-*.arrow documents-*.parquet stats.parquet matches.parquet
    metrics.jsonl release.jsonl model.jsonl sourceset.jsonl source.jsonl batch-*.jsonl.gz autointerp.sqlite*
    wandb/* checkpoints/[0-9]*/* index.html map.html assets/app.js assets/app.css data/*.js other/*.js pictures/*.svg
    curves.svg density.svg run.json part-[0-9]*.npy benchmark.* leaderboard.* cfg.json runner_cfg.json
    activation_scaler.json card.* results.* report.* baselines.* overview.* language.* shift.* geometry.* layer.json
    manifest.json progress.json counts.json state.json dataset_*.json sae_lens.json browser.json wandb.json
    config.json run_settings.json skipped_indexes.json batch-*.json [0-9]*.json README.md graph.* neuronpedia.json
    rows.partial visited.json config.yaml index.json.gz layer_*.bin meaning.npz seeds.json choose-k.* absorption.*
"""
# The folders that these runs make: whatever else lies in them, another run as well, stays. Other runs are made of runs.
OWN = {"train": r"(wandb|seeds)(/.*)?|checkpoints(/\d+(/.*)?)?", "cache": "(random-twin/?)?(tokens|acts|latents|runs)?"}
IS_WINDOWS = sys.platform == "win32"
# Ctrl-C, `kill`, a closed terminal, and the warnings of Slurm and of a CPU limit before the time is up.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *(() if IS_WINDOWS else (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU))]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a user's share of it, a file
MEND = "Mend it, or make it again."
# What is raised where a record lacks a field, or has one of another kind.
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, EOFError)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder; rename it there if the block ends well.

    What is renamed is on the disk, its name too, and has the rights that the umask gives. Otherwise it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _give_rights(temporary)
        for written in (temporary, *temporary.rglob("*")):
            _sync(written)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        remove(temporary)


def _sync(path: Path) -> None:
    if IS_WINDOWS:  # which syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a folder, on a file system that cannot
            raise
    finally:
        os.close(descriptor)


def _give_rights(path: Path) -> None:
    """Give a file, or all files of a folder, the rights that the umask leaves: safetensors writes for its owner alone."""
    if IS_WINDOWS:  # which has no such rights
        return
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        if file.stat().st_uid == os.getuid():
            file.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # NFS keeps a file that is still mapped under another name, and so its folder
            gc.collect()
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    """Return whether a path is what a killed `atomic_path`, a training's end, or safetensors (`.tmpcytWjC`) leaves."""
    return re.fullmatch(r"\..*\.tmp|\.tmp\w{6}|\.final", path.name) is not None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; one that is made for it and stays empty goes. Who dies holds nothing."""
    from filelock import FileLock, SoftFileLock, Timeout

    lock, is_new = FileLock(folder / LOCK_FILE, timeout=0), not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; an output folder was expected. Give another path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        # on a disk without locks its file stays when the process is killed, and another machine cannot know
        ask = "." if not isinstance(lock, SoftFileLock) else f"; if no process is, remove {lock.lock_file}."
        raise UsageError(f"{folder} is being written by another process. Wait, or give another folder{ask}") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}). Give one you may write to.") from error
    try:
        yield
    finally:
        if not IS_WINDOWS:  # where no open file can be removed, and the lock removes its own
            remove(folder / LOCK_FILE)
        lock.release()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def on_signals(do: Callable[[int, Any], Any], numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Let signals call `do` while the block works, in the main thread alone; what was there before comes back.

    One that is ignored stays ignored, as SIGHUP under `nohup`; not Ctrl-C, which shells ignore for jobs behind them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, was in before.items() if was != signal.SIG_IGN or number == signal.SIGINT]
    try:
        for number in heard:
            signal.signal(number, do)
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number] or signal.SIG_DFL)


def path_of(name: str | Path) -> Path:
    """Return a path with `~` replaced. Raises: UsageError for what no system takes for one, as an endless name."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        told = f"{str(name)[:60]!r} cannot be looked for ({getattr(error, 'strerror', None) or error})"
        raise UsageError(f"{told}. Give another path or name.") from error
    return path


def disk_full(error: BaseException) -> bool:
    """Return whether an error of Python, torch or safetensors means that a file could not grow."""
    # Rust gives the number as text, torch only the name of what wrote.
    signs = ("No space left", "iostream", "inline_container", "PytorchStreamWriter", *map("os error {}".format, FULL))
    return getattr(error, "errno", None) in FULL or any(sign in str(error) for sign in signs)


def room_on(path: Path) -> int:
    """Return how many bytes are free on the disk of a path, which need not exist."""
    return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free


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
            f"the disk of {folder} is full ({room_on(folder) / 2**30:,.1f} GiB free). {kept} Make room, then run the same "
            "command again, with --resume where it has that."
        ) from error


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        # half a letter, which some JSON has, is "?"
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises: DataError for one that is damaged."""
    with understood(path, MEND, kind="JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def packaged_yaml(text: str) -> Any:
    """Return what a YAML text holds that comes with a package: read by libyaml, which is fast, and dies of endless nesting."""
    import yaml

    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_yaml(source: Path | str, name: str = "") -> Any:
    """Return what a YAML file holds, or a text called `name`. Raises: DataError where it is damaged or repeats a key."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
                raise ValueError(f"line {node.start_mark.line + 1} and on: the key {twice!r} is there twice")
            return super().construct_mapping(node, deep)

    with understood(name or source, MEND, yaml.YAMLError, kind="YAML"):
        return yaml.load(source if isinstance(source, str) else source.read_text(encoding="utf-8"), Strict)


@contextmanager
def understood(
    file: Path | str, remedy: str = "Make it again.", *also: type[Exception], kind: str = ""
) -> Iterator[None]:
    """Turn what a damaged record raises where it is read into one line that names its file; `also` is raised here alone.

    `kind` is the format it should have: YAML, JSON.

    Raises: DataError; every error of ours passes as it is.
    """
    try:
        yield
    except SaeItalianError:
        raise
    except (*ODD, *also) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{file} cannot be read{f' as {kind}' * bool(kind)} ({why:.200}). {remedy}") from error


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return a short hash of any JSON-serialisable value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode(errors="replace")).hexdigest()[:16]


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def package_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = "sae-italian sae-lens transformer-lens transformers torch tokenizers datasets"
    return {name: version(name) for name in names.split()}


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return the first of two records' fields that is not the same, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old!r}, is now {new!r}"


@contextmanager
def claimed(
    out: Path,
    kind: str,
    spec: dict[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    changeable: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[bool]:
    """Hold `out` for this process while the block writes the run described by `spec`; yield whether it goes on.

    A new or empty folder gets a `run.json`. With `resume`, a folder that holds the same run is continued; the settings
    that are `changeable` may differ, and one that an older record lacks had its default. With `overwrite`, a run of the
    same kind is replaced: its files go, every other file stays. Everything else is refused and left untouched.

    Raises: UsageError when another process holds the folder, or it cannot be written to, or holds something else, naming
    the first setting that differs; and when the disk is full in the block.
    """
    with locked(out), disk_errors(out):
        earlier, record = _records(out, kind, spec, resume, overwrite, changeable, defaults or {})
        if continuing := bool(earlier) and not overwrite:
            for left in [path for path in out.rglob(".*") if _is_temporary(path)]:
                remove(left)
        elif earlier:  # who is killed here leaves what can be overwritten, not resumed
            write_json(out / RUN_FILE, {**earlier, "spec": {}})
            _remove_ours(out, OWN.get(kind, ".*"))
        if not continuing or record != earlier:
            write_json(out / RUN_FILE, record)
        try:
            yield continuing
        except Exception:
            if not continuing and {child.name for child in out.iterdir()} <= {RUN_FILE, LOCK_FILE}:
                remove(out / RUN_FILE)  # refused before anything was done
            raise
        _give_rights(out)


def check_claim(out: Path, kind: str, spec: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Raise now what `claimed` would of a folder that is there, and leave it as it is."""
    if out.is_dir():
        with locked(out):
            _records(out, kind, spec, resume, overwrite, (), {})


def _records(
    out: Path,
    kind: str,
    spec: dict[str, Any],
    resume: bool,
    overwrite: bool,
    changeable: Collection[str],
    defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a folder's record, empty without one, and that of the run that is to be there. Raises: UsageError as `claimed`."""
    spec = json.loads(json.dumps(spec, default=str))
    earlier = record_in(out)
    new = {"kind": kind, "created": utc_now(), "spec": spec, "versions": package_versions()}
    if all(_is_temporary(child) or child.name == LOCK_FILE for child in out.iterdir()):
        return {}, new
    if not earlier:
        raise UsageError(f"{out} is not empty and holds no run of ours. Give an empty or new folder.")
    if earlier["kind"] != kind:
        raise UsageError(f"{out} holds a {earlier['kind']} run, not a {kind} run. Give another folder.")
    if overwrite:
        return earlier, new
    if not resume:
        raise UsageError(
            f"{out} already holds a {kind} run of {earlier['created']}. "
            "Add --resume to finish it, --overwrite to replace it, or give another folder."
        )
    earlier["spec"] = {**defaults, **earlier["spec"]}
    same = spec | {key: value for key, value in earlier["spec"].items() if key in changeable}
    if earlier["spec"] != same:
        difference = first_difference(earlier["spec"], same)
        raise UsageError(f"{out} holds another {kind} run ({difference}). Undo that, or use --overwrite.")
    return earlier, {**earlier, "spec": spec}


def record_in(folder: str | Path, *kinds: str) -> dict[str, Any]:
    """Return a folder's `run.json`: kind, created and spec; empty without one, or where it is not ours or of other `kinds`."""
    file = Path(folder) / RUN_FILE
    found: Any = read_json(file) if file.is_file() else None
    known = isinstance(found, dict) and {"kind", "created", "spec"} <= found.keys() and isinstance(found["spec"], dict)
    return found if known and found["kind"] in (kinds or [found["kind"]]) else {}


def _remove_ours(out: Path, folders: str, below: str = "") -> None:
    """Remove the files that runs write, in those `folders` too, and folders then empty; record, lock and all else stay."""
    for path in sorted((out / below).iterdir(), reverse=True):
        name = path.relative_to(out).as_posix()
        if path.is_dir() and not path.is_symlink() and not _is_temporary(path):
            if re.fullmatch(folders, name):
                _remove_ours(out, folders, name)
            if not any(path.iterdir()):
                path.rmdir()
        elif _is_temporary(path) or (name != RUN_FILE and any(fnmatchcase(f"/{name}", f"*/{n}") for n in OURS.split())):
            remove(path)

"""New processes without the seconds that importing PyTorch, transformers and the rest takes.

They are forked from one that has imported what TransformerLens and SAELens need, but has let go of these two and of ours:
a process imports them anew, in the order that it says, as a new interpreter does. What a library reads from the environment
while it is imported (the hub's folder, say) is as it was when the first of these processes was asked for.
"""

from __future__ import annotations

import atexit
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")


class Fresh:
    """A process that was started as `python -m NAME WORDS...` or `python -c CODE WORDS...`; as subprocess.Popen's.

    It leads a session of its own.
    """

    stdin = stdout = stderr = None

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None):
        started()
        self._told = tempfile.TemporaryDirectory()
        files = [str(Path(self._told.name) / name) for name in ("out", "err")]
        given = [*words], dict(env or os.environ), cwd or str(Path.cwd()), files
        self._process = CONTEXT.Process(target=_as_new, args=given)
        self._process.start()
        self.pid, self._files = self._process.pid, files
        self.kill, self.terminate = self._process.kill, self._process.terminate
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # whoever ends its group must not end ours
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end and return what it said on standard output and on standard error."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a fresh process", timeout)
        said = [Path(file).read_text("utf-8") if Path(file).exists() else "" for file in self._files]
        return said[0], said[1]


def run(words: Sequence[str], env: Mapping[str, str] | None = None, check: bool = False, timeout: float = 300):
    """Start one, wait for it and return it as `subprocess.run` does."""
    process = Fresh(words, env)
    done = subprocess.CompletedProcess([*words], 0, *process.communicate(timeout))
    done.returncode = process.returncode or 0
    if check:
        done.check_returncode()
    return done


def spawned(method: str) -> Any:
    """Return what starts workers, for `get_context` of base/units.py: they come from the same process, not from nothing."""
    started()
    return CONTEXT if method == "spawn" else get_context(method)


def told_in(*words: str) -> tuple[str, float]:
    """Return what a new interpreter prints, and its processor time: a clock also counts what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-W", "ignore", *words], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def started() -> None:
    """Start the process that the others are forked from, which imports this module."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *([before] if before else [])])
    forkserver.set_forkserver_preload([f"{__package__}.fresh_libraries"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _as_new(words: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    os.setsid()
    os.chdir(cwd)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    atexit._clear()  # what the libraries tidy when a process ends (W&B a folder) is for the one that imported them
    finalize: Any = weakref.finalize
    finalize._registry.clear()
    finalize._registered_with_atexit = False
    os.environ.clear()
    os.environ.update(env)
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without them

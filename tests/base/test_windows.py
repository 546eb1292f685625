"""What another system lacks, taken away from this one: no test has run on Windows itself."""

from tests import fresh

# As on Windows: no signals of a terminal or a scheduler, no users, no limits of a process, no fork; no folder can be opened,
# only what is open for writing is synced, and what is open cannot be removed.
WITHOUT = """
import os, pathlib, shutil, signal, sys
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGKILL", "SIGCHLD", "SIGQUIT", "SIGPIPE"):
    delattr(signal, name)
for name in ("getuid", "geteuid", "fork", "killpg", "getpgid", "setsid", "sched_getaffinity"):
    delattr(os, name)
sys.modules["resource"] = sys.modules["fcntl"] = sys.modules["termios"] = sys.modules["pwd"] = sys.modules["grp"] = None
os_open, unlink = os.open, pathlib.Path.unlink

def opened(path, *how, **more):
    if isinstance(path, (str, pathlib.Path)) and os.path.isdir(path):
        raise PermissionError(13, "a folder", str(path))
    return os_open(path, *how, **more)

def removed(path, *how, **more):
    if str(path).endswith(".lock"):
        raise PermissionError(32, "it is open", str(path))
    return unlink(path, *how, **more)

def synced(descriptor):
    raise OSError(9, "open for reading alone")

os.open, os.fsync, pathlib.Path.unlink = opened, synced, removed
shutil._use_fd_functions = False
sys.platform = "win32"
import sae_italian.base.storage
sys.platform = "linux"  # what other libraries do on Windows is theirs
from sae_italian.cli import main
for words in COMMANDS:
    if code := main(words):
        sys.exit(code)
"""


def test_commands_work_without_what_windows_lacks(trained_sae, tmp_path):
    cache = str(tmp_path / "cache")
    commands = [
        ["models", "list"],
        [
            "train",
            "mini/topk",
            "training_tokens=8192",
            "buffer_tokens=4096",
            "lr_decay_steps=0",
            "--out",
            str(tmp_path / "sae"),
        ],
        ["evaluate", str(trained_sae), "--tokens", "2000"],
        ["cache", "build", str(trained_sae), "--out", cache, "--tokens", "20000"],
        ["autointerp", cache, "--n-latents", "5", "--no-random-control", "--workers", "2"],
        ["browse", cache],
    ]
    done = fresh.run(["-c", f"COMMANDS = {commands!r}\n{WITHOUT}"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache-report" / "index.html").is_file()

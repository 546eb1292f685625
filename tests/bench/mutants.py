"""How many seeded mutants of a room its tests kill, with mutmut: `make bench TABLE=mutants ARGS="statistics --n 200"`.

A mutant is the package with one expression changed: `<` for `<=`, 2 for 1, a string upper case, an argument None. mutmut writes
all of them once into a copy of the repository, learns which test calls which function, and forks a process a mutant.
It is no part of the development environment: pip install mutmut.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.report import table

ROOT = Path(__file__).parents[2]
# A room: its files, and the tests that are to kill its mutants.
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "statistics": (
        ["sae_italian/base/statistics.py"],
        ["tests/base/test_statistics.py", "tests/base/test_statistics_twins.py"],
    ),
    "scorers": (
        ["sae_italian/autointerp/scorers/*"],
        [f"tests/autointerp/test_{name}.py" for name in ("scorers", "rules", "model_scores", "planted_truth")],
    ),
    "cache": (["sae_italian/cache/*"], ["tests/cache"]),
    "training": (["sae_italian/training/*"], ["tests/training"]),
}
# Lines that are left as they are: those of words alone (messages are not tested letter by letter), and spellings that mean
# the same to Python ("nan" and "NAN", "utf-8" and "UTF-8").
SETTINGS = r"""
[tool.mutmut]
source_paths = ["sae_italian"]
only_mutate = {files}
also_copy = ["configs", "docs", "notebooks", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"]
pytest_add_cli_args = ["-m", "not slow and not real", "-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
do_not_mutate_patterns = ['^\s*f?"[^"]*"[,)]*$', 'raise \w+Error\(f?"', 'float\("nan"\)', 'encoding=']
process_isolation = "forkserver"
timeout_multiplier = 5.0
timeout_constant = 20.0
"""
GENERATE = """
from mutmut.__main__ import copy_also_copy_files, copy_src_dir, create_mutants, setup_source_paths
copy_src_dir(), copy_also_copy_files(), setup_source_paths(), create_mutants(1)
"""


def bench_mutants(options: argparse.Namespace) -> tuple[Any, str]:
    """Return the share killed and the survivors' changes; the folder keeps everything, the same command goes on in it.

    Raises: UsageError for an unknown room, and where mutmut is missing or the tests fail on the unchanged code.
    """
    if options.room not in ROOMS:
        raise UsageError(f"room {options.room!r} is unknown; {', '.join(ROOMS)} were expected.")
    files, tests = ROOMS[options.room]
    work: Path = options.folder / options.room
    if not (work / "mutants").exists():
        _copy(work, files, tests)
        _mutmut(work, "-c", GENERATE)
    names = _sample(work, files, options.n, options.seed)
    _mutmut(work, "-m", "mutmut", "run", "--max-children", str(options.processes), *names)
    outcomes = _outcomes(work, files)
    counts = Counter(_said(outcomes[name]) for name in names)
    judged = sum(counts.values()) - counts["no test"]
    left = [name for name in names if _said(outcomes[name]) in ("survived", "no test")]
    survivors = {name: _change(work, name) for name in left}
    value = {"room": options.room, "n": len(names), "seed": options.seed, **counts, "survivors": survivors}
    share = (counts["killed"] + counts["timeout"]) / max(judged + counts["no test"], 1)
    row = (options.room, len(names), *(counts[kind] for kind in ("killed", "timeout", "survived", "no test")), share)
    text = table("room | mutants | killed | timeout | survived | no test | share killed", [(*row[:-1], f"{share:.1%}")])
    return value, "\n\n".join([text, *(f"{name}\n{change}" for name, change in survivors.items())])


def _copy(work: Path, files: list[str], tests: list[str]) -> None:
    """Copy what git tracks, with mutmut's settings in pyproject.toml."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, work / name)
    with (work / "pyproject.toml").open("a", encoding="utf-8") as settings:
        settings.write(SETTINGS.format(files=json.dumps(files), tests=json.dumps(tests)))


def _mutmut(work: Path, *arguments: str) -> None:
    with (work / "mutmut.log").open("a") as log:
        done = subprocess.run([sys.executable, *arguments], cwd=work, stdout=log, stderr=log)
    if done.returncode:
        raise UsageError(
            f"mutmut is missing (pip install mutmut) or the unchanged code fails: see {work / 'mutmut.log'}."
        )


def _outcomes(work: Path, files: list[str]) -> dict[str, int | None]:
    """Return mutmut's exit code of each mutant's tests, None where it did not run."""
    found: dict[str, int | None] = {}
    for path in sorted((work / "mutants").rglob("*.meta")):
        name = str(path.relative_to(work / "mutants")).removesuffix(".meta")
        if any(fnmatch(name, pattern) for pattern in files):
            found |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def _sample(work: Path, files: list[str], n: int, seed: int) -> list[str]:
    names = list(_outcomes(work, files))
    return sorted(random.Random(seed).sample(names, min(n, len(names))))


def _said(code: int | None) -> str:
    """Return an outcome by its name, with mutmut's numbers: 33 no test, 36 and 24 a timeout, 1 and 3 killed, 0 survived."""
    if code in (5, 33):
        return "no test"
    return "survived" if code == 0 else "timeout" if code in (24, 36, 152) else "not run" if code is None else "killed"


def _change(work: Path, name: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "mutmut", "show", name], cwd=work, capture_output=True, text=True
    ).stdout
    return "\n".join(line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))

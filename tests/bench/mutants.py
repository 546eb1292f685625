"""How many seeded mutants of a room its tests kill, with mutmut: `make bench TABLE=mutants ARGS="statistics --n 200"`.

A mutant is the package with one expression changed: `<` for `<=`, 2 for 1, a string upper case, an argument None. mutmut writes
all of them once into a copy of the repository; mutant_runs.py judges the drawn ones, each by the quickest tests that call its
function. The same command goes on in its folder, with the tests as they are now, and asks again only for those that survived.
mutmut is no part of the development environment: pip install mutmut.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.report import table

ROOT = Path(__file__).parents[2]
# Two files of this room have tests that start Python anew, where nobody sees which functions are called: left out.
_TRAINING = {"config", "curves", "logging", "loop", "pretrained", "processes", "publish", "run"}
_TRAINING |= {"stream", "suite", "text"}
_MORE_TESTS = {"annealing", "cached", "checkpoint", "launching", "recipes", "shards"}
# A room: its files, and the tests that are to kill its mutants.
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "statistics": (
        ["sae_italian/base/statistics.py"],
        ["tests/base/test_statistics.py", "tests/base/test_statistics_twins.py"],
    ),
    "scorers": (
        ["sae_italian/autointerp/scorers/*"],
        [f"tests/autointerp/test_{name}.py" for name in ("scorers", "model_scores")],
    ),
    "cache": (["sae_italian/cache/*"], ["tests/cache"]),
    "training": (
        [f"sae_italian/training/{name}.py" for name in sorted(_TRAINING)],
        [f"tests/training/test_{name}.py" for name in sorted(_TRAINING - {"loop", "text"} | _MORE_TESTS)],
    ),
}
# A mutant that differs only in what these match, in the unchanged code and in the mutant, gives the same results: not asked.
SAME = {
    r",? ?\bstrict=True": r",? ?\bstrict=(True|False|None)",  # refuses what never comes: lengths that differ
    r"\bnp\.errstate\([^()]*\)": r"\bnp\.errstate\([^()]*\)",  # decides what NumPy warns of
}
# Lines that are left as they are: those of words alone (messages are not tested letter by letter), and spellings that mean
# the same to Python ("nan" and "NAN", "utf-8" and "UTF-8").
SETTINGS = r"""
[tool.mutmut]
source_paths = ["sae_italian"]
only_mutate = {files}
also_copy = ["configs", "docs", "notebooks", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"]
do_not_mutate_patterns = ['^\s*f?"[^"]*"[,)]*$', 'raise \w+Error\(f?"', 'float\("nan"\)', 'encoding=']
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
    work: Path = (options.folder / options.room).resolve()
    if not (work / "mutants").exists():
        _copy(work, files)
        _run(work, "-c", GENERATE)
    names, same = _sample(work, files, options.n, options.seed)
    shutil.copytree(ROOT / "tests", work / "mutants" / "tests", dirs_exist_ok=True)
    (work / "asked.json").write_text(json.dumps((tests, names)), encoding="utf-8")
    if not options.told:
        _run(work / "mutants", str(Path(__file__).with_name("mutant_runs.py")), str(work), str(work / "asked.json"))
    outcomes = json.loads((work / "outcomes.json").read_text(encoding="utf-8"))
    names = [name for name in names if name in outcomes]
    counts = Counter(outcomes[name]["outcome"] for name in names)
    left = [name for name in names if outcomes[name]["outcome"] in ("survived", "no test")]
    survivors = {name: _change(work, name) for name in left}
    drawn = {"room": options.room, "n": len(names), "seed": options.seed, "not_asked": same}
    value = drawn | {**counts, "survivors": survivors}
    share = 1 - len(left) / max(1, len(names))
    row = (
        options.room,
        len(names),
        same,
        *(counts[kind] for kind in ("killed", "timeout", "survived", "no test")),
        f"{share:.1%}",
    )
    text = table("room | mutants | not asked | killed | timeout | survived | no test | share killed", [row])
    return value, "\n\n".join([text, *(f"{name}\n{change}" for name, change in survivors.items())])


def _copy(work: Path, files: list[str]) -> None:
    """Copy what git tracks, with mutmut's settings in pyproject.toml."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, work / name)
    with (work / "pyproject.toml").open("a", encoding="utf-8") as settings:
        settings.write(SETTINGS.format(files=json.dumps(files)))


def _run(folder: Path, *arguments: str) -> None:
    """Run Python in a folder of the work, the package of that folder first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    log = next(parent for parent in (folder, folder.parent) if (parent / "pyproject.toml").exists()) / "run.log"
    with log.open("a") as told:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, stdout=told, stderr=told)
    if done.returncode:
        raise UsageError(f"mutmut is missing (pip install mutmut) or the unchanged code fails: see {log}.")


def _names(work: Path, files: list[str]) -> list[str]:
    """Return the names of all mutants of some files."""
    found: list[str] = []
    for path in sorted((work / "mutants").rglob("*.meta")):
        name = str(path.relative_to(work / "mutants")).removesuffix(".meta")
        if any(fnmatch(name, pattern) for pattern in files):
            found += json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def _sample(work: Path, files: list[str], n: int, seed: int) -> tuple[list[str], int]:
    """Return the first n mutants in an order drawn by the seed, fewer being the beginning of more; and how many not asked."""
    names = _names(work, files)
    random.Random(seed).shuffle(names)
    chosen: list[str] = []
    for tried, name in enumerate(names):
        if len(chosen) == n:
            return chosen, tried - n
        before, after = _versions(work, name)
        for ours, theirs in SAME.items():
            before, after = re.sub(ours, "", before), re.sub(theirs, "", after)
        if before != after:
            chosen.append(name)
    return chosen, len(names) - len(chosen)


@cache
def _functions(file: Path) -> dict[str, str]:
    """Return the functions of a file of mutants, all their versions, as `ast` spells them."""
    parsed = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {
        node.name: ast.unparse(node) for node in parsed if isinstance(node, ast.FunctionDef) and "mutmut" in node.name
    }


def _versions(work: Path, name: str) -> tuple[str, str]:
    """Return a mutated function as it was and as it is."""
    module, _, function = name.rpartition(".")
    path = work / "mutants" / module.replace(".", "/")
    found = _functions(path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py"))
    original = function.rpartition("__mutmut_")[0] + "__mutmut_orig"
    return found[original].replace(original, "_", 1), found[function].replace(function, "_", 1)


def _change(work: Path, name: str) -> str:
    before, after = (version.splitlines() for version in _versions(work, name))
    return "\n".join(line for line in difflib.unified_diff(before, after, n=0) if line[:3] not in ("---", "+++", "@@ "))

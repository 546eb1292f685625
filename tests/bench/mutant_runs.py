"""Judge mutants one by one, each by the quickest tests that call its function. Run by mutants.py in the folder of mutants.

1. All tests of the room run once on the unchanged code: which functions does each call, and each fixture while it is made,
   and how many seconds of processor time does either take? Processes that a test forks count with it, others do not.
2. A process is forked for each mutant. It runs the tests that call the mutated function, quickest first, until one fails
   or their forecast reaches the budget. Fixtures of a wider scope than one test (a model, a trained SAE, a cache) are those
   of step 1, unless making them calls the mutated function: then they are made again, and their seconds count.

Files of shared fixtures that a mutant has changed are put back before the next one.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mutmut.mutation import trampoline

sys.path[0] = str(Path.cwd())  # the mutants, not the folder of this file
BUDGET = 8.0  # seconds of processor time for the tests of one mutant, as forecast
# Left out: what starts Python anew or trains for long. No mutant would be asked of these first, all would wait for them.
LONG = "ray wheel kill_at_random a_killed_run second_builder side_by_side as_well_as_ours its_curve sweep_starts hangs "
LONG += "small_recipe take_the_steps bytes_of_a_step"
PLAIN = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not real and not hub", "--tb=no"]
PLAIN += ["-k", " and ".join(f"not {name}" for name in LONG.split())]


@dataclass
class Made:
    """A fixture of a wider scope than one test: its value, the functions called to make it and what it rests on."""

    value: Any
    calls: set[str]
    seconds: float
    kept: bool  # False for what is torn down at the end of its scope


@dataclass
class Seen:
    """A test that passed: the functions it calls, the shared fixtures it uses, its own seconds."""

    calls: set[str]
    uses: list[Any]
    seconds: float = 0.0


def processor() -> float:
    """Return the seconds of processor time of this process and of those it has waited for."""
    return sum(os.times()[:4])


def key_of(fixture: Any) -> tuple[str, str]:
    return fixture.argname, fixture.baseid


@dataclass(eq=False)
class Learn:
    """Pytest's hooks of step 1."""

    now: set[str] = field(default_factory=set)
    made: dict[Any, Made] = field(default_factory=dict)
    tests: dict[str, Seen] = field(default_factory=dict)
    shared_seconds: float = 0.0
    own: int = field(default_factory=os.getpid)
    elsewhere: Path = Path("called-in-forks.txt").absolute()

    def hit(self, function: str, caller: str | None = None) -> None:
        """Note a call, also where a test has forked a process."""
        if function in self.now:
            return
        self.now.add(function)
        if os.getpid() != self.own:
            with self.elsewhere.open("a", encoding="utf-8") as told:
                told.write(function + "\n")

    def called(self) -> set[str]:
        """Return the functions called since the last time something began, here and in forks."""
        if self.elsewhere.exists():
            self.now |= set(self.elsewhere.read_text(encoding="utf-8").split("\n")[:-1])
            self.elsewhere.unlink()
        return self.now

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        if fixturedef.scope == "function" or not fixturedef.func.__module__.startswith("tests"):
            return (yield)
        outer, self.now, before = self.now, set(), processor()
        value = yield
        own, self.now, seconds = self.called(), outer, processor() - before
        for name in fixturedef.argnames:
            below = self.made.get(key_of(request._get_active_fixturedef(name))) if name != "request" else None
            own |= below.calls if below else set()
        kept = not inspect.isgeneratorfunction(fixturedef.func) and fixturedef.params is None
        self.made[key_of(fixturedef)] = Made(value, own, seconds, kept)
        self.shared_seconds += seconds
        return value

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.now, before, shared = set(), processor(), self.shared_seconds
        done = yield
        uses = [key_of(found[-1]) for found in item._fixtureinfo.name2fixturedefs.values() if found]
        seconds = processor() - before - (self.shared_seconds - shared)
        if item.nodeid in self.tests:
            self.tests[item.nodeid] = Seen(self.called(), [use for use in uses if use in self.made], seconds)
        return done

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.tests[report.nodeid] = Seen(set(), [])
        elif report.failed:
            self.tests.pop(report.nodeid, None)

    def tests_of(self, function: str) -> list[str]:
        """Return the tests that call a function, cheapest first, until the budget is spent; always the first."""
        costs = []
        for name, test in self.tests.items():
            again = [use for use in test.uses if function in self.made[use].calls or not self.made[use].kept]
            if function in test.calls or any(function in self.made[use].calls for use in test.uses):
                costs.append((test.seconds + sum(self.made[use].seconds for use in again), test.seconds, name, again))
        chosen: list[str] = []
        spent, paid = 0.0, set()
        for _, seconds, name, again in sorted(costs):
            spent += seconds + sum(self.made[use].seconds for use in set(again) - paid)
            paid |= set(again)
            if chosen and spent > BUDGET:
                break
            chosen.append(name)
        return chosen


@dataclass(eq=False)
class Reuse:
    """Pytest's hooks in a fork: fixtures that the mutated function has no part in are taken as they are."""

    made: dict[Any, Made]
    function: str
    failed: list[str] = field(default_factory=list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        made = self.made.get(key_of(fixturedef))
        if made is None or not made.kept or self.function in made.calls:
            return None
        fixturedef.cached_result = (made.value, fixturedef.cache_key(request), None)
        return made.value

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


@functools.cache
def remembering() -> list[Any]:
    """Return the package's functions that remember what they returned; what is there now is no garbage of any fork."""
    found = [each for each in gc.get_objects() if isinstance(each, functools._lru_cache_wrapper)]
    gc.collect(), gc.freeze()
    return [each for each in found if str(each.__module__).startswith("sae_italian")]


def forked(learnt: Learn, mutant: str, tests: Iterable[str], folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Run tests in a fork with one mutant switched on ("" for none); return the outcome and the tests that failed."""
    function, caches = mutant.rpartition("__mutmut_")[0], remembering()
    limit = int(BUDGET * 4)
    told = folder / "failed.json"
    told.unlink(missing_ok=True)
    if not (child := os.fork()):
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        if mutant:
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit,) * 2)
        for each in caches:  # what the unchanged code has remembered
            each.cache_clear()
        trampoline.set_mutant_under_test(mutant)
        hooks = Reuse(learnt.made, function)
        code = 3
        try:
            code = int(pytest.main([*PLAIN, *flags, f"--basetemp={folder / 'fork'}", *tests], plugins=[hooks]))
            told.write_text(json.dumps(hooks.failed))
        finally:
            os._exit(code)
    end = time.monotonic() + (4 * limit if mutant else 36_000)
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what the tests have started
    if done[0] == 0:
        os.waitpid(child, 0)
        return "timeout", []
    code = os.waitstatus_to_exitcode(done[1])
    failed = json.loads(told.read_text()) if told.exists() else []
    return ("survived" if code == 0 else "no test" if code == 5 else "killed" if code > 0 else "timeout"), failed


def put_back(folder: Path, kept: Path) -> None:
    """Make a folder what it was: files that differ by size or date, or are missing, are copied from `kept`."""

    def tree(root: Path) -> dict[str, tuple[int, int]]:
        files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        return {str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    now, before = tree(folder), tree(kept)
    for name in now.keys() - before.keys():
        (folder / name).unlink()
    for name in (name for name in before if now.get(name) != before[name]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)  # a mapped file keeps its bytes
        shutil.copy2(kept / name, folder / name)


def main(work: Path, tests: list[str], mutants: list[str]) -> None:
    """Judge the mutants that outcomes.json does not call killed, and write each outcome there."""
    scratch, kept = work / "scratch", work / "scratch-kept"
    outcomes_file = work / "outcomes.json"
    outcomes = json.loads(outcomes_file.read_text()) if outcomes_file.exists() else {}
    learnt = Learn()
    trampoline.record_trampoline_hit = learnt.hit
    trampoline.set_mutant_under_test("stats")
    pytest.main([*PLAIN, f"--basetemp={scratch}", *tests], plugins=[learnt])
    trampoline.set_mutant_under_test("")
    if not learnt.tests:
        sys.exit(f"no test of {', '.join(tests)} passes on the unchanged code")
    scratch.mkdir(exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(scratch, kept, symlinks=True)
    left = [name for name in mutants if outcomes.get(name, {}).get("outcome") not in ("killed", "timeout")]
    asked = {test for mutant in left for test in learnt.tests_of(mutant.rpartition("__mutmut_")[0])}
    _, failed = forked(learnt, "", sorted(asked), work)
    for name in failed:  # those that need fixtures of their own, or run once in a process
        learnt.tests.pop(name, None)
    print(f"{len(asked) - len(failed)} of {len(learnt.tests)} tests are asked; left out: {failed}", flush=True)
    for number, mutant in enumerate(left, 1):
        put_back(scratch, kept)
        chosen, before = learnt.tests_of(mutant.rpartition("__mutmut_")[0]), time.monotonic()
        outcome, by = forked(learnt, mutant, chosen, work, "-x") if chosen else ("no test", [])
        seconds = round(time.monotonic() - before, 1)
        outcomes[mutant] = {"outcome": outcome, "tests": len(chosen), "seconds": seconds, "by": by[:1]}
        outcomes_file.write_text(json.dumps(outcomes, indent=1))
        print(f"{number} of {len(left)}: {outcome} after {seconds} s of {len(chosen)} tests: {mutant}", flush=True)
    put_back(scratch, kept)
    _, after = forked(learnt, "", sorted(asked - set(failed)), work)
    if after:
        sys.exit(f"tests that passed before the mutants fail after them, so shared files were lost: {after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *json.loads(Path(sys.argv[2]).read_text()))
